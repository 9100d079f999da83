//! From the text of an answer to thinking, text and tool calls.
//!
//! # Rules
//!
//! * The result does not depend on how the text was cut into pieces. The parser holds back only text that could become a marker,
//!   with the line breaks before it, and the beginning of a call until its name is complete.
//! * Thinking opens if the prompt ends with its opening marker, or if the answer begins with it. A marker of thinking later in the
//!   answer is text, because models mention them.
//! * Line breaks between thinking, text and calls belong to the markup and are dropped. Everything else is kept.
//! * A marker of a call counts if a complete beginning of a call follows: the family's own form, with a name. Otherwise it is text.
//!   Fences of Markdown are ignored, as the families ignore them. Within thinking, a call is thinking, unless the answer ends with
//!   it, because models forget to end their thinking. In the families that begin calls with control tokens (DeepSeek, Kimi), which
//!   text does not contain, a call always ends the thinking.
//! * Without tools, nothing is a call.
//! * Malformed text is passed on. A call of an unknown tool is a call, and arguments that are not JSON are the arguments. A call
//!   that breaks off inside its arguments stays broken, so that clients see it; a call whose parameters are all complete is closed.
//! * Arguments in JSON are passed on byte for byte (except white space around them). Arguments in tags become JSON: strings if the
//!   schema says so, escaped, as they arrive; everything else once it is complete, with the type on which schema and text agree.

mod arguments;
mod fields;
mod harmony;
mod header;
mod ids;
mod markup;
mod nested;
mod output;
mod python;
mod scan;
mod tags;
#[cfg(test)]
mod tests;

use crate::syntax::{Calls, Syntax};
use crate::tools::Tools;
use harmony::Harmony;
pub(crate) use ids::letters;
use markup::Markup;

/// A part of an answer, in the order in which it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// More thinking.
    Thinking(String),
    /// More text for the reader.
    Text(String),
    /// A call begins.
    Call {
        /// Its number in the answer, from 0.
        index: usize,
        /// Its id: the family's own, or a generated one.
        id: String,
        /// The function's name, as the model wrote it.
        name: String,
    },
    /// More of the arguments of a call: together they are the text of a JSON object, if the model made no mistake.
    Arguments {
        /// The number of the call.
        index: usize,
        /// The text to append.
        delta: String,
    },
}

/// Takes the text of one answer in any pieces, and returns its parts.
#[derive(Debug, Clone)]
pub struct AnswerParser {
    inner: Inner,
}

#[derive(Debug, Clone)]
enum Inner {
    Markup(Box<Markup>),
    Harmony(Box<Harmony>),
}

impl AnswerParser {
    pub(crate) fn new(syntax: &'static Syntax, prompt_tail: &str, tools: &Tools) -> Self {
        let inner = match syntax.calls {
            Calls::Harmony => Inner::Harmony(Box::new(Harmony::new(prompt_tail, tools))),
            _ => Inner::Markup(Box::new(Markup::new(syntax, prompt_tail, tools))),
        };
        Self { inner }
    }

    /// Makes the ids of calls depend only on this number. Without it they differ in every parser.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        match &mut self.inner {
            Inner::Markup(parser) => parser.output().set_seed(seed),
            Inner::Harmony(parser) => parser.output().set_seed(seed),
        }
        self
    }

    /// Takes more of the answer's text, with markers in the family's spelling. Adjacent pieces of a kind are merged.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        match &mut self.inner {
            Inner::Markup(parser) => parser.push(text),
            Inner::Harmony(parser) => parser.push(text),
        }
    }

    /// Ends the answer: returns the text that was held back. Nothing may be pushed after it.
    pub fn finish(&mut self) -> Vec<Piece> {
        match &mut self.inner {
            Inner::Markup(parser) => parser.finish(),
            Inner::Harmony(parser) => parser.finish(),
        }
    }

    /// Whether a call has begun.
    pub fn has_calls(&self) -> bool {
        match &self.inner {
            Inner::Markup(parser) => parser.calls() > 0,
            Inner::Harmony(parser) => parser.calls() > 0,
        }
    }
}

//! From the text of an answer to thinking, text and tool calls.
//!
//! # Rules
//!
//! * The result does not depend on how the text was cut into pieces. Held back is only what could become a marker, with the line
//!   breaks before it, and the beginning of a call until its name is complete.
//! * Thinking opens where the prompt ends with its opening marker, or where the answer begins with it. A marker of thinking
//!   later in the answer is text: models mention them.
//! * Line breaks between thinking, text and calls belong to the markup and are dropped. Everything else is kept.
//! * A marker of a call counts where a complete beginning of a call follows: the family's own form, with a name. Otherwise it is text.
//!   Fences of Markdown are not looked at: the families do not, either. Within thinking it is thinking, unless
//!   the answer ends with it: models forget to end their thinking. In the families that begin calls with control tokens
//!   (DeepSeek, Kimi), which text does not contain, a call ends the thinking in any case.
//! * Without tools, nothing is a call.
//! * What is not well formed is handed on. A call of an unknown tool is a call, and arguments that are not JSON are the
//!   arguments. A call that breaks off inside its arguments stays broken, so that clients see it; one
//!   whose parameters are all complete is closed.
//! * Arguments in JSON are handed on byte for byte (white space around them excepted). Arguments in tags become JSON: strings where the
//!   schema says so, escaped, as they come; everything else once it is complete, as the type that schema and text agree on.

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
        /// Its id: what the family writes itself, or one that is made up.
        id: String,
        /// The function's name, as the model wrote it.
        name: String,
    },
    /// More of the arguments of a call: together the text of a JSON object, if the model made no mistake.
    Arguments {
        /// The number of the call.
        index: usize,
        /// What is appended.
        delta: String,
    },
}

/// Takes the text of one answer in any pieces, and gives what is meant by it.
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

    /// Makes the ids of calls depend on this number alone. Without it they are different in every parser.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        match &mut self.inner {
            Inner::Markup(parser) => parser.output().set_seed(seed),
            Inner::Harmony(parser) => parser.output().set_seed(seed),
        }
        self
    }

    /// Takes more of the answer's text, with markers spelled as the family spells them. Neighbouring pieces of a kind come as one.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        match &mut self.inner {
            Inner::Markup(parser) => parser.push(text),
            Inner::Harmony(parser) => parser.push(text),
        }
    }

    /// The answer has ended: gives what was held back. Nothing may be pushed after it.
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

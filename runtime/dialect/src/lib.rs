//! Dialects: how families of models write thinking and tool calls.

use serde_json::{Map, Value};
use sluice_text::Message;

/// A tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON schema of its arguments.
    pub parameters: Value,
    /// Whether arguments must match the schema.
    pub strict: bool,
}

/// Tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools(pub Vec<Tool>);

/// Which tools must be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// How a family writes.
#[derive(Clone, Debug, Default)]
pub struct Dialect;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Thinking.
    Thinking(String),
    /// Text.
    Text(String),
    /// A call begins.
    Call {
        /// Its place among the calls.
        index: usize,
        /// Its id.
        id: String,
        /// The tool.
        name: String,
    },
    /// More of the arguments of a call.
    Arguments {
        /// The call.
        index: usize,
        /// More text.
        delta: String,
    },
}

/// Why messages cannot be given to a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DialectError(pub String);

/// Takes an answer apart.
#[derive(Debug)]
pub struct AnswerParser;

impl Dialect {
    /// From what the model's files say.
    pub fn detect(_model_type: Option<&str>, _template: Option<&str>, _has_token: &dyn Fn(&str) -> bool) -> Self {
        Dialect
    }

    /// Messages as the template wants them.
    ///
    /// # Errors
    /// What it cannot say.
    pub fn messages(&self, messages: Vec<Message>) -> Result<Vec<Message>, DialectError> {
        Ok(messages)
    }

    /// Variables of the template.
    pub fn template_options(&self, thinking: Option<bool>, effort: Option<&str>) -> Map<String, Value> {
        let mut options = Map::new();
        thinking.map(|thinking| options.insert("enable_thinking".into(), thinking.into()));
        effort.map(|effort| options.insert("reasoning_effort".into(), effort.into()));
        options
    }

    /// A grammar of the calls.
    pub fn tool_grammar(&self, _: &Tools, _: &ToolChoice, _parallel: bool, _prompt_tail: &str) -> Option<String> {
        None
    }

    /// A parser of one answer.
    pub fn parser(&self, _prompt_tail: &str, _tools: &Tools) -> AnswerParser {
        AnswerParser
    }
}

impl AnswerParser {
    /// More text.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        vec![Piece::Text(text.to_owned())]
    }

    /// The end.
    pub fn finish(&mut self) -> Vec<Piece> {
        Vec::new()
    }

    /// Whether there were calls.
    pub fn has_calls(&self) -> bool {
        false
    }
}

impl Dialect {
    /// A template of our own.
    pub fn own_template(_model_type: Option<&str>, _has_token: &dyn Fn(&str) -> bool) -> Option<&'static str> {
        None
    }
}

//! Answers in a form that is asked for: JSON schemas, regular expressions, grammars.

use sluice_generate::Constraint;
use sluice_text::Tokenizer;

/// A vocabulary.
#[derive(Clone, Debug)]
pub struct Vocabulary;

/// A form.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// JSON that matches a schema.
    JsonSchema(serde_json::Value),
    /// A regular expression.
    Regex(String),
    /// A grammar.
    Lark(String),
    /// This text.
    Text(String),
}

/// A compiled form.
#[derive(Clone, Debug)]
pub struct Grammar;

/// What is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("forms are not supported")]
pub struct GrammarError;

impl Vocabulary {
    /// Of a model.
    ///
    /// # Errors
    /// When it cannot be constrained.
    pub fn new(_tokenizer: &Tokenizer, _vocab_size: usize, _end: &[u32]) -> Result<Self, GrammarError> {
        Ok(Vocabulary)
    }
}

impl Grammar {
    /// Compiles.
    ///
    /// # Errors
    /// What is not supported.
    pub fn compile(_vocabulary: &Vocabulary, _form: &Form) -> Result<Grammar, GrammarError> {
        Err(GrammarError)
    }

    /// A fresh constraint.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        unreachable!("nothing compiles")
    }
}

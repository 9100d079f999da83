//! JSON schemas as Lark grammars.
//!
//! A *goal* is what a value must satisfy: a set of schemas against which it must be valid, or must not be. A goal becomes a
//! rule. For each type of JSON, it is divided into *cases* ([`cases`]): combinations of demands that no longer contain a choice.
//! A case becomes an alternative ([`emit`]), and refers to the goals of its items and properties. Equal goals are the same rule,
//! so schemas may refer to themselves.
//!
//! Every text of the grammar is valid against the schema. The converse has limits: properties come in the order of the schema,
//! numbers have a bounded number of digits, and items for `contains` come first. An alternative of a negation that cannot be
//! expressed is left out; everything else that cannot be expressed is refused by name.

mod cases;
mod document;
mod emit;
mod keywords;
mod numbers;
mod rules;
mod strings;
mod validate;

use std::collections::HashMap;
use std::rc::Rc;

use regex::Regex;
use serde_json::Value;

use crate::GrammarError;
use document::Document;
use keywords::Keywords;

pub(crate) use strings::whole as whole_regex;

/// Most steps in dividing a schema into cases. A step takes about a microsecond.
const MAX_STEPS: usize = 500_000;

/// A schema that is being translated.
struct Schema<'v> {
    document: Document<'v>,
    keywords: HashMap<usize, Rc<Keywords>>,
    patterns: HashMap<Rc<str>, Regex>,
    steps: usize,
    /// The first thing that was left out of the grammar because it cannot be expressed.
    left_out: Option<GrammarError>,
}

impl<'v> Schema<'v> {
    fn new(root: &'v Value) -> Result<Self, GrammarError> {
        let document = Document::new(root)?;
        Ok(Schema { document, keywords: HashMap::new(), patterns: HashMap::new(), steps: 0, left_out: None })
    }

    fn keywords(&mut self, node: usize) -> Result<Rc<Keywords>, GrammarError> {
        if let Some(keywords) = self.keywords.get(&node) {
            return Ok(keywords.clone());
        }
        let keywords = Rc::new(Keywords::read(&mut self.document, node)?);
        self.keywords.insert(node, keywords.clone());
        Ok(keywords)
    }

    fn place(&self, node: usize) -> String {
        self.document.nodes[node].place.clone()
    }

    /// Counts a step.
    fn step(&mut self) -> Result<(), GrammarError> {
        self.steps += 1;
        match self.steps > MAX_STEPS {
            true => {
                Err(GrammarError::TooLarge { what: "too many steps to take the schema apart".into(), limit: MAX_STEPS })
            }
            false => Ok(()),
        }
    }
}

/// A grammar for the values that a schema allows.
///
/// # Errors
/// When the schema is malformed, too large, not supported, or allows nothing.
pub(crate) fn lark(schema: &Value) -> Result<String, GrammarError> {
    let mut schema = Schema::new(schema)?;
    let (rules, start) = emit::rules(&mut schema)?;
    match rules.print(start)? {
        Some(text) => Ok(text),
        None => Err(schema.left_out.unwrap_or(GrammarError::Unsatisfiable { place: "#".into() })),
    }
}

/// Whether a value is valid against a schema. `format` demands nothing.
///
/// # Errors
/// When the schema is malformed or too large, or a pattern in it is not a regular expression.
pub fn is_valid(schema: &Value, value: &Value) -> Result<bool, GrammarError> {
    Schema::new(schema)?.is_valid(value, 0)
}

//! What can go wrong with a grammar, and what the user can do about it.

use sluice_text::TextError;
use thiserror::Error;

/// Every error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// The schema demands something that cannot be enforced.
    #[error("the schema's `{keyword}` at {place} is not supported: {reason}")]
    Unsupported {
        /// The keyword.
        keyword: String,
        /// Where it stands, as a JSON pointer from the schema's root (`#/properties/name`).
        place: String,
        /// Why, and what to write instead if there is an alternative.
        reason: String,
    },

    /// The schema is not a valid schema.
    #[error("the schema's `{keyword}` at {place} is wrong: it should be {expected}")]
    Malformed {
        /// The keyword.
        keyword: String,
        /// Where it stands, as a JSON pointer from the schema's root.
        place: String,
        /// What it should be.
        expected: &'static str,
    },

    /// No value can satisfy the schema.
    #[error("no value can satisfy the schema: {place} allows nothing")]
    Unsatisfiable {
        /// The part that allows nothing, as a JSON pointer from the schema's root.
        place: String,
    },

    /// The schema, the expression or the grammar asks for too much.
    #[error("{what}, more than the {limit} that are accepted; make it simpler")]
    TooLarge {
        /// The thing that is too large, and its size.
        what: String,
        /// The most that is accepted.
        limit: usize,
    },

    /// Nothing is wrong with it, but there is no place to compile it.
    #[error(
        "it cannot be compiled now: {running} others have taken more than {seconds} seconds and have not ended; try again later"
    )]
    Busy {
        /// How many others there are.
        running: usize,
        /// How long each of them has taken at least.
        seconds: u64,
    },

    /// A regular expression or a grammar that cannot be understood.
    #[error("the {what} cannot be used: {reason}")]
    Invalid {
        /// What it is: a regular expression, a grammar, a list.
        what: &'static str,
        /// The library's own words, shortened.
        reason: String,
    },

    /// The vocabulary cannot be used for grammars.
    #[error("this model's tokens cannot be constrained: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },

    /// The tokenizer fails.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// Longest message of the library that is passed on, in characters.
const MAX_REASON: usize = 400;

/// The library's message without back traces and dumps of its state.
pub(crate) fn clip(message: &str) -> String {
    let end = ["\n<backtrace>", "\n<non-verbose/>", "\n<state>"].iter().filter_map(|mark| message.find(mark)).min();
    let message = message[..end.unwrap_or(message.len())].trim();
    match message.char_indices().nth(MAX_REASON) {
        Some((at, _)) => format!("{}…", &message[..at]),
        None => message.to_owned(),
    }
}

//! Answers in a requested form: JSON schemas, regular expressions, grammars.
//!
//! A [`Grammar`] is a [`Form`] compiled for the [`Vocabulary`] of a model. Its constraints go into a
//! [`Request`](sluice_generate::Request): they allow only the tokens with which the text can continue, and end tokens only where it
//! may end. If nothing may follow, the generation ends by itself. So the text always has the form, unless it is cut off by a limit
//! on its length.
//!
//! Forms come from strangers. They are checked before the library that does the work (`llguidance`) sees them, their size and
//! depth are bounded, and a grammar that fails in the middle of a text makes the generation fail.

mod constraint;
mod error;
mod grammar;
mod lark;
mod places;
mod schema;
mod vocabulary;

pub use error::GrammarError;
pub use grammar::{Form, Grammar};
pub use lark::lark_json;
pub use schema::is_valid;
pub use vocabulary::Vocabulary;

//! Dialects: how families of models write thinking and tool calls.

mod dialect;
mod error;
mod grammar;
mod json;
mod messages;
mod parser;
mod syntax;
mod templates;
mod tools;

pub use dialect::Dialect;
pub use error::DialectError;
pub use parser::{AnswerParser, Piece};
pub use tools::{MAX_NAME_BYTES, MAX_TOOLS, Tool, ToolChoice, Tools};

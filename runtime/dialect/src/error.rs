//! What can be wrong with tools and messages.

use thiserror::Error;

/// Tools or messages that a model cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DialectError {
    /// A field has a value that it cannot have.
    #[error("`{field}` must be {expected}, but is {found}")]
    BadField {
        /// Where it is, such as `messages[2].content`.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// What it is, shortened.
        found: String,
    },
    /// Two tools have the same name.
    #[error("`tools` has two functions with the name {name:?}; give them different names")]
    DuplicateTool {
        /// Their name.
        name: String,
    },
    /// A kind of content or tool that is not for this program: images, searches of the web.
    #[error(
        "`{field}` is of the type {kind:?}, which this server cannot give to a model: send text and functions only"
    )]
    Unsupported {
        /// Where it is.
        field: String,
        /// Its type, such as `image_url`.
        kind: String,
    },
    /// A tool result that belongs to no call.
    #[error("`{field}` is {id:?}, but no tool call before this message has that id")]
    UnknownCall {
        /// Where it is.
        field: String,
        /// The id.
        id: String,
    },
    /// A conversation that the format of this family cannot express.
    #[error("`{field}` cannot be given to a model of the family {family}: {reason}")]
    Inexpressible {
        /// Where it is.
        field: String,
        /// The family.
        family: &'static str,
        /// Why not, and what can be done.
        reason: &'static str,
    },
}

impl DialectError {
    /// A field with a wrong value.
    pub(crate) fn bad(field: impl Into<String>, expected: &'static str, found: &serde_json::Value) -> Self {
        Self::BadField { field: field.into(), expected, found: clip(&found.to_string()) }
    }
}

/// At most 80 characters of a text that came from outside.
pub(crate) fn clip(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

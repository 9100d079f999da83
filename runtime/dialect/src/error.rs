//! Errors in tools and messages.

use thiserror::Error;

/// Tools or messages that cannot be given to a model.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DialectError {
    /// A field has a value that it cannot have.
    #[error("`{field}` must be {expected}, but is {found}")]
    BadField {
        /// Its place, such as `messages[2].content`.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// Its value, shortened.
        found: String,
    },
    /// Two tools have the same name.
    #[error("`tools` has two functions with the name {name:?}; give them different names")]
    DuplicateTool {
        /// Their name.
        name: String,
    },
    /// A kind of content or tool that this program does not support: images, web searches.
    #[error(
        "`{field}` is of the type {kind:?}, which this server cannot give to a model: send text and functions only"
    )]
    Unsupported {
        /// Its place.
        field: String,
        /// Its type, such as `image_url`.
        kind: String,
    },
    /// A tool result that belongs to no call.
    #[error("`{field}` is {id:?}, but no tool call before this message has that id")]
    UnknownCall {
        /// Its place.
        field: String,
        /// The id.
        id: String,
    },
    /// A conversation that the format of this family cannot express.
    #[error("`{field}` cannot be given to a model of the family {family}: {reason}")]
    Inexpressible {
        /// Its place.
        field: String,
        /// The family.
        family: &'static str,
        /// The reason, and what can be done.
        reason: &'static str,
    },
}

impl DialectError {
    /// A field with a wrong value.
    pub(crate) fn bad(field: impl Into<String>, expected: &'static str, found: &serde_json::Value) -> Self {
        Self::BadField { field: field.into(), expected, found: clip(&found.to_string()) }
    }
}

/// At most 80 characters of a text that came from a client.
pub(crate) fn clip(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

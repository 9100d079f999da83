//! What can go wrong with text, and what the user can do about it.

use thiserror::Error;

/// Every error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TextError {
    /// The tokenizer file is larger than any real one.
    #[error(
        "tokenizer.json has {bytes} bytes, more than the {limit} that this program accepts; \
         check that the file really is the model's tokenizer"
    )]
    TokenizerTooLarge {
        /// Size of the file.
        bytes: usize,
        /// The largest size accepted.
        limit: usize,
    },

    /// The tokenizer file does not describe a tokenizer.
    #[error(
        "tokenizer.json cannot be used: {reason}; fetch the file again from the model's \
         repository"
    )]
    BadTokenizer {
        /// What is wrong with it.
        reason: String,
    },

    /// The tokenizer needs a feature that would crash or that is deliberately left out.
    #[error(
        "tokenizer.json uses {what}, which is not supported; use the tokenizer.json that the \
         model's authors publish, or report the model"
    )]
    UnsupportedTokenizer {
        /// The feature.
        what: String,
    },

    /// Two files disagree about a token.
    #[error(
        "{file} gives the token {token:?} the id {id}, {reason}; one of the files belongs to another model or is damaged: \
         fetch them again from the model's repository"
    )]
    TokenContradiction {
        /// Which file.
        file: &'static str,
        /// The token's spelling, shortened.
        token: String,
        /// The id that the file gives.
        id: u32,
        /// Which other file there is, and what it says.
        reason: String,
    },

    /// The tokenizer was stopped, because it takes more time or memory than any real one.
    #[error(
        "the tokenizer was stopped: {what}. Published tokenizers stay far below this limit: tokenizer.json is damaged or \
         made to do harm"
    )]
    Stopped {
        /// Which limit it reached.
        what: String,
    },

    /// A text that is too long to be tokenised at once.
    #[error("the text has {bytes} bytes; at most {limit} are tokenised at once: give it in parts")]
    TextTooLong {
        /// Its length.
        bytes: usize,
        /// The longest accepted.
        limit: usize,
    },

    /// The tokenizer refuses this text.
    #[error(
        "this text cannot be tokenised: {reason}; the model's vocabulary may lack an unknown \
         token, try the text in smaller pieces to find the characters it refuses"
    )]
    Encode {
        /// The library's own words.
        reason: String,
    },

    /// The tokenizer refuses these ids.
    #[error("these tokens cannot be turned into text: {reason}; check the model's tokenizer.json")]
    Decode {
        /// The library's own words.
        reason: String,
    },

    /// The tokenizer library panicked; this program continued.
    #[error(
        "the tokenizer library crashed while {during} ({reason}); tokenizer.json is probably \
         damaged, fetch it again from the model's repository"
    )]
    Crashed {
        /// What was being done.
        during: &'static str,
        /// The panic's message.
        reason: String,
    },

    /// A configuration file is not JSON, or not an object.
    #[error("{file} is not a JSON object: {reason}; fetch it again from the model's repository")]
    BadConfig {
        /// Which file.
        file: &'static str,
        /// The parser's own words.
        reason: String,
    },

    /// A field of a configuration file has a value that makes no sense.
    #[error("{file}: `{field}` should be {expected}, but is {found}; correct it or remove it")]
    BadConfigField {
        /// Which file.
        file: &'static str,
        /// Which field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is, shortened.
        found: String,
    },

    /// A stop string that would stop before the first character.
    #[error("a stop string is empty; remove it or give it at least one character")]
    EmptyStopString {
        /// Position in the list, from 0.
        index: usize,
    },

    /// A stop string so long that holding text back for it would look like a hang.
    #[error("a stop string has {bytes} bytes; at most {limit} are accepted")]
    StopStringTooLong {
        /// Position in the list, from 0.
        index: usize,
        /// Its length.
        bytes: usize,
        /// The longest accepted.
        limit: usize,
    },

    /// The chat template is not valid, or fails.
    #[error(
        "the chat template cannot be used{}: {reason}",
        .line.map(|line| format!(" (line {line})")).unwrap_or_default()
    )]
    ChatTemplate {
        /// Line of the template, from 1.
        line: Option<usize>,
        /// What is wrong with it.
        reason: String,
    },

    /// The chat template does not accept this conversation.
    #[error("the chat template refuses these messages: {reason}")]
    ChatRefused {
        /// The template's own words.
        reason: String,
    },

    /// A tiktoken vocabulary is damaged.
    #[error(
        "tiktoken.model cannot be used: {reason}; fetch the file again from the model's \
         repository"
    )]
    BadTiktoken {
        /// What is wrong with it.
        reason: String,
    },
}

//! Why a session is refused.

use std::io;
use std::path::PathBuf;

use sluice_format::StateId;
use sluice_kernels::{KvType, NUMERICS_VERSION};

use super::{Part, SESSION_VERSION};
use crate::cache::{PAGE_TOKENS, PagesFull};
use crate::prompt_attention::PromptAttention;
use crate::thrift::Thrift;

/// Why a sequence could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Writing failed.
    #[error("{path}: the session cannot be saved: {source}. What was saved before is still there")]
    Save {
        /// The file.
        path: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// The name belongs to something else.
    #[error("{path} is there already and is not a session: choose another name")]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// Opening failed.
    #[error("{path}: the session cannot be opened: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// Reading failed.
    #[error("{path}: {part} cannot be read at byte {offset}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The part that was read.
        part: Part,
        /// Its offset in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file is shorter than it says.
    #[error(
        "{path}: the session is cut off: it ends within {part}, which begins at byte {offset}. Use a copy, or begin anew"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The incomplete part.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// Another kind of file.
    #[error("{path} is not a session")]
    NotASession {
        /// The file.
        path: PathBuf,
    },
    /// Another version of the file.
    #[error(
        "{path}: the session has version {found}, this program reads version {SESSION_VERSION}: read the text anew"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A checksum is wrong.
    #[error("{path}: {part} of the session, at byte {offset}, is damaged: use a copy, or begin anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damaged part.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// A section is not the one that must be here.
    #[error("{path}: at byte {offset} of the session there is something other than {part}: use a copy, or begin anew")]
    Misplaced {
        /// The file.
        path: PathBuf,
        /// The part that must be here.
        part: Part,
        /// Its offset in the file.
        offset: u64,
    },
    /// The session belongs to another model.
    #[error(
        "{path}: the session is of another model, {found} instead of {wanted}: other weights, another specification or another \
         tokenizer"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The state id of its model.
        found: StateId,
        /// The state id of the opened model.
        wanted: StateId,
    },
    /// The session has numbers that this program would compute differently.
    #[error(
        "{path}: the session has numbers of version {found}, this program computes those of version {NUMERICS_VERSION}: read the \
         text anew"
    )]
    Numerics {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The session has another type of keys and values.
    #[error(
        "{path}: the session keeps keys and values in {found}: open the model with --kv-type {found} instead of {wanted}"
    )]
    KvType {
        /// The file.
        path: PathBuf,
        /// Its type, or the number of an unknown type.
        found: String,
        /// The engine's type.
        wanted: KvType,
    },
    /// The session has another precision.
    #[error("{path}: the session was computed {} --exact: open the model in the same way", if *.exact { "with" } else { "without" })]
    Precision {
        /// The file.
        path: PathBuf,
        /// Whether it was computed with f32 activations.
        exact: bool,
    },
    /// The session was computed with other experts.
    #[error(
        "{path}: the experts of the session were chosen otherwise ({found}) than those of the opened model ({wanted}): give the \
         same --expert-preference and --top-k-experts"
    )]
    Thrift {
        /// The file.
        path: PathBuf,
        /// How its experts were chosen, in words.
        found: String,
        /// How the engine chooses them.
        wanted: Thrift,
    },
    /// Prompts in another form.
    #[error(
        "{path}: the prompts of the session were read in the {found} form: open the model with --prompt-attention {found} instead of \
         {wanted}"
    )]
    PromptAttention {
        /// The file.
        path: PathBuf,
        /// Its form, or the number of one that is not known.
        found: String,
        /// That of the engine.
        wanted: PromptAttention,
    },
    /// More tokens than there is room for.
    #[error("{path}: the session has {position} tokens, there is room for {capacity}: raise --context")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        position: u64,
        /// Tokens that fit.
        capacity: usize,
    },
    /// A segment cannot begin at this token.
    #[error(
        "a segment of a sequence of {position} tokens cannot begin at token {start}: begin at a multiple of {PAGE_TOKENS} before its last token"
    )]
    Start {
        /// Where it should begin.
        start: usize,
        /// Tokens of the sequence.
        position: usize,
    },
    /// The session continues another one, which has to be restored first.
    #[error(
        "{path}: the session continues another one of at least {start} tokens, and here are {position}: restore that one first"
    )]
    Continues {
        /// The file.
        path: PathBuf,
        /// Tokens before the session.
        start: u64,
        /// Tokens that are there.
        position: usize,
    },
    /// The session continues another text.
    #[error("{path}: the session continues a text other than the {start} tokens that are here")]
    OtherText {
        /// The file.
        path: PathBuf,
        /// Tokens before the session.
        start: u64,
    },
    /// Fewer pages are free than it needs.
    #[error("{path}: the session does not fit now: {full}")]
    PagesFull {
        /// The file.
        path: PathBuf,
        /// Which pages, and how many.
        full: PagesFull,
    },
    /// A token that the model does not have.
    #[error(
        "{path}: the session has token {token} at byte {offset}, outside the model's vocabulary of {vocab}: begin anew"
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// Where it is.
        offset: u64,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

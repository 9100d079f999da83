//! Text in, text out: everything between strings and token ids.
//!
//! * [`Tokenizer`] turns text into token ids and back,
//! * [`Detokenizer`] does the second half token by token, for streaming,
//! * [`StopCondition`] decides where a generation ends,
//! * [`ChatTemplate`] and [`encode_chat`] turn conversations into token ids,
//! * [`GenerationDefaults`] reads what the model's authors recommend, and [`TextFiles`] all text files of a model.
//!
//! Nothing here knows a model, a file or a pool; all inputs are slices. All of them may come from files of strangers,
//! so every function fails with a [`TextError`] and never panics.

mod added;
mod around;
pub mod chat;
mod effective;
mod error;
#[cfg(test)]
pub(crate) mod fixtures;
mod generation_config;
mod guard;
mod limits;
mod pipeline;
mod stop;
mod stream;
mod text_files;
mod tiktoken;
mod tokenizer;
mod untrusted;

pub use chat::{ChatTemplate, Message, Prompt, RenderOptions, SpecialTokens, encode_chat};
pub use error::TextError;
pub use generation_config::{GenerationDefaults, Remark};
pub use limits::MAX_TEXT_BYTES;
pub use stop::{Emit, StopCondition, StopMatcher};
pub use stream::{Detokenizer, Special};
pub use text_files::TextFiles;
pub use tokenizer::{MAX_TOKEN_ID, MAX_TOKENIZER_BYTES, Tokenizer};

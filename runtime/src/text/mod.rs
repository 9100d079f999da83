//! Text in, text out: everything between strings and token ids.
//!
//! * [`Tokenizer`] turns text into token ids and back,
//! * [`Detokenizer`] does the second half token by token, for streaming,
//! * [`StopCondition`] decides where a generation ends,
//! * [`ChatTemplate`] and [`encode_chat`] turn conversations into token ids,
//! * [`GenerationDefaults`] reads what the model's authors recommend.
//!
//! Nothing here knows a model, a file or a pool; all inputs are slices. All of them may come from
//! files of strangers, so every function answers with a [`TextError`] and never panics.

pub mod chat;
mod error;
#[cfg(test)]
pub(crate) mod fixtures;
mod generation_config;
mod stop;
mod stream;
mod tiktoken;
mod tokenizer;
mod untrusted;

pub use chat::{ChatTemplate, Message, RenderOptions, SpecialTokens, encode_chat};
pub use error::TextError;
pub use generation_config::{GenerationDefaults, Remark};
pub use stop::{Emit, StopCondition, StopMatcher};
pub use stream::Detokenizer;
pub use tokenizer::{MAX_TOKEN_ID, MAX_TOKENIZER_BYTES, Tokenizer};

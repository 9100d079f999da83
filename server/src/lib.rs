//! HTTP over generations: the APIs of OpenAI, Anthropic and Ollama, and a page.
//!
//! A request takes this path: [`guard`] (access control), [`api`] (an API's JSON becomes an [`Ask`](ask::Ask)), [`models`] (which
//! are loaded on demand), [`texts`] (an `Ask` becomes tokens, and is checked), [`served`] (it becomes generations), [`answer`] (events become pieces of thinking, text and calls),
//! [`reply`] (pieces become an API's events, or one object).

pub mod answer;
pub mod api;
pub mod app;
pub mod ask;
pub mod batch;
pub mod batches;
pub mod clock;
pub mod error;
pub mod guard;
pub mod hygiene;
pub mod live;
pub mod logs;
pub mod metrics;
pub mod models;
pub mod options;
pub mod page;
pub mod reply;
pub mod request_id;
pub mod run;
pub mod serve;
pub mod served;
pub mod stalled;
pub mod texts;
pub mod transcripts;

pub use guard::Guard;
pub use options::{BatchOptions, Force, ServerOptions, SessionOptions};
pub use serve::{Server, ServerError, serve_until_told};
pub use sluice_dialect::Piece;

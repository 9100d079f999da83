//! A model that computes: its file, its memory, and the steps that sequences take through its layers.
//!
//! [`Engine`] opens a file and runs steps; [`memory`] plans the use of the budget before anything large is allocated; `model`
//! executes the specification layer by layer over the rows of a step. Nothing here knows text, sampling or model families.

mod attention;
mod cache;
mod compressed;
pub mod compute;
pub mod control;
pub mod counts;
mod delta;
mod embedding;
pub mod engine;
mod experts;
mod ffn;
mod gated;
mod gated_streams;
mod gqa;
mod indexer;
mod key_blocks;
mod key_means;
mod mamba;
pub mod memory;
mod mla;
mod model;
mod ngrams;
mod norm;
pub mod outputs;
mod prediction;
mod prefetch;
mod projection;
mod prompt_attention;
mod recurrent;
mod residual;
mod room;
mod rope;
pub mod router;
pub mod rows;
mod sequence;
pub mod session;
mod tally;
mod tasks;
mod thrift;
mod token_table;
pub mod weights;

pub use self::cache::{PAGE_TOKENS, PageCount, PageKind, PagesFull, WINDOW_SLACK};
pub use self::control::{Cancel, Control, Progress};
pub use self::engine::{Engine, EngineOptions, Prefetch, ReadEngineKind, RuntimeError, ShrinkError, Stats, Yields};
pub use self::model::ModelError;
pub(crate) use self::model::{LayerTimes, Model, ModelOptions, Weights, dense_extents, opened_extents};
pub use self::prediction::{PredictionSequence, PredictionSpan};
pub use self::prompt_attention::{GENERATED, PromptAttention};
pub use self::rows::{Phase, Span, Want};
pub use self::sequence::{Mark, RewindError, Sequence};
pub use self::thrift::{Preference, Thrift};
pub use sluice_kernels::KvType;

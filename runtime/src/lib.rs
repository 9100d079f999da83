//! The runtime: a model file becomes text.
//!
//! Data flows one way: `io` reads extents, `pool` keeps them in slots, `model` computes layers with them, `engine` runs
//! steps, `sampler` picks tokens and `text` turns them into characters; `generate` puts these together, for many callers on
//! one engine. `calibrate` watches the model's inputs. A test checks that no module looks upstream.

pub mod calibrate;
pub mod counts;
pub mod engine;
pub mod estimate;
pub mod generate;
pub mod io;
pub mod memory;
pub mod model;
pub mod pool;
pub mod sampler;
pub mod text;
pub mod trace;

pub use engine::{Engine, EngineOptions, Prefetch, ReadEngineKind, RuntimeError, Stats};
pub use model::control::{Cancel, Control, Progress};
pub use model::rows::{Phase, Span, Want};
pub use model::{Mark, RewindError, Sequence};
pub use sluice_kernels::KvType;

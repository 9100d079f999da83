//! Model files with random weights in the geometry of real models: to measure a machine before the download of a real one.
//!
//! [`Geometry`] says what a model looks like, [`Layout`] how large everything in its file is, and [`synth()`] writes the
//! file. What is random depends on the seed alone, not on the number of threads. Routing is like that of a real model when
//! the tokens come from [`token_stream`].

mod geometry;
mod layout;
mod noise;
mod random;
mod release;
mod topics;
mod values;
mod write;

pub use geometry::{Geometry, Weights};
pub use layout::{KindTypes, Layout, WeightTypes};
pub use noise::expert_noise;
pub use release::Release;
pub use topics::token_stream;
pub use values::TYPES;
pub use write::{SynthOptions, SynthSummary, synth};

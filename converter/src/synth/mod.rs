//! Model files with random weights in the geometry of real models, to measure a machine before the download of a real one.
//!
//! [`Geometry`] is the shape of a model, [`Layout`] the sizes of everything in its file, and [`synth()`] writes the file. The
//! random numbers depend only on the seed, not on the number of threads. If the tokens come from [`token_stream`], routing is like
//! that of a real model.

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

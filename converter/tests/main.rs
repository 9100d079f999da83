//! All integration tests of this crate are one program: it links once, and its tests share the cores.

mod common;

mod arrangements;
mod checkpoint;
mod forms;
mod gguf;
mod gguf_hybrids;
mod gguf_latest;
mod histories;
mod hostile;
mod leftovers;
mod ngrams;
mod prediction;
mod recipes;
mod repeated;
mod resume;
mod sources;
mod spec;
mod stripes;
mod values;
mod volumes;

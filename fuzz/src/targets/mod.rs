//! What is fuzzed: one function per parser, which does with a file what the program does with it. Whatever the bytes are,
//! it must come back: without a panic, soon, and without much memory.
//!
//! These files are compiled twice: into the fuzzer, and into an ordinary test that replays `fuzz/regressions/`.

pub(crate) mod batch;
mod calibration;
pub(crate) mod checkpoint;
mod config;
mod counts;
mod gguf;
mod header;
pub(crate) mod importance;
mod index;
pub(crate) mod journal;
pub(crate) mod model;
pub(crate) mod rewrite;
mod session;
mod template;
pub(crate) mod tokenizer;
mod trace;

use std::path::Path;

/// How inputs of a target are built, which is how they are mutated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// A model file with checksums, or the specification of one as JSON.
    Model,
    /// A model file whose metadata are being replaced.
    Rewrite,
    /// A journal, bound to the plan of a conversion.
    Journal,
    /// The journal of a batch.
    Batch,
    /// A safetensors file, of which the header matters.
    Header,
    /// A JSON document.
    Json,
    /// A JSON document a line.
    JsonLines,
    /// A program in Jinja.
    Template,
    /// An importance file.
    Importance,
    /// What an eviction policy has learned.
    Counts,
    /// A saved sequence.
    Session,
    /// A GGUF file, of which the head matters.
    Gguf,
}

/// One parser.
#[derive(Debug)]
pub(crate) struct Target {
    /// Name on the command line, and of the folder of its regressions.
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    /// Feeds it one file. The folder is for files that the program needs; what is there from an earlier run of the same
    /// target is used or overwritten.
    pub(crate) run: fn(&[u8], &Path),
    /// Sound files to begin with, by name. The folder is for making them.
    pub(crate) seeds: fn(&Path) -> Seeds,
}

/// Sound files by name.
pub(crate) type Seeds = Vec<(String, Vec<u8>)>;

/// Every parser.
pub(crate) static TARGETS: [Target; 15] = [
    Target { name: "model", shape: Shape::Model, run: model::run, seeds: model::seeds },
    Target { name: "rewrite", shape: Shape::Rewrite, run: rewrite::run, seeds: rewrite::seeds },
    Target { name: "journal", shape: Shape::Journal, run: journal::run, seeds: journal::seeds },
    Target { name: "batch", shape: Shape::Batch, run: batch::run, seeds: batch::seeds },
    Target { name: "header", shape: Shape::Header, run: header::run, seeds: header::seeds },
    Target { name: "index", shape: Shape::Json, run: index::run, seeds: index::seeds },
    Target { name: "config", shape: Shape::Json, run: config::run, seeds: config::seeds },
    Target { name: "tokenizer", shape: Shape::Json, run: tokenizer::run, seeds: tokenizer::seeds },
    Target { name: "template", shape: Shape::Template, run: template::run, seeds: template::seeds },
    Target { name: "importance", shape: Shape::Importance, run: importance::run, seeds: importance::seeds },
    Target { name: "counts", shape: Shape::Counts, run: counts::run, seeds: counts::seeds },
    Target { name: "session", shape: Shape::Session, run: session::run, seeds: session::seeds },
    Target { name: "trace", shape: Shape::JsonLines, run: trace::run, seeds: trace::seeds },
    Target { name: "gguf", shape: Shape::Gguf, run: gguf::run, seeds: gguf::seeds },
    Target { name: "calibration", shape: Shape::Json, run: calibration::run, seeds: calibration::seeds },
];

/// A number that depends on nothing but the input: what the caller could choose is chosen by it.
fn choice(input: &[u8]) -> u64 {
    sluice_format::checksum(input)
}

/// A fixture as bytes. Paths begin at `tests/fixtures`.
macro_rules! fixture {
    ($path:expr) => {
        include_bytes!(concat!("../../../tests/fixtures/", $path))
    };
}
pub(crate) use fixture;

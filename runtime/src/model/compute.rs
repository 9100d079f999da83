//! What every layer needs to compute: kernels, threads, precision.

use std::cell::RefCell;

use sluice_kernels::{Activations, Kernels, Precision, ThreadPool};

/// Kernels, threads and precision of an opened model.
#[derive(Debug)]
pub struct Compute {
    /// Kernels of the CPU's instruction set.
    pub kernels: Kernels,
    /// The worker threads.
    pub threads: ThreadPool,
    /// Whether quantised weights meet f32 or int8 activations.
    pub precision: Precision,
}

/// What one thread needs to compute an attention head by itself.
pub struct HeadScratch {
    /// A pool without workers: kernels called with it run on the calling thread.
    pub serial: ThreadPool,
    /// f32 activations of one head.
    pub activations: Activations,
    /// Gathered inputs, `[tokens, width]`.
    pub input: Vec<f32>,
    /// Product of the inputs, `[tokens, width]`.
    pub product: Vec<f32>,
    /// One query.
    pub query: Vec<f32>,
    /// One score per cached position.
    pub scores: Vec<f32>,
}

thread_local! {
    static HEAD_SCRATCH: RefCell<HeadScratch> = RefCell::new(HeadScratch {
        serial: ThreadPool::new(1),
        activations: Activations::new(Precision::Exact),
        input: Vec::new(),
        product: Vec::new(),
        query: Vec::new(),
        scores: Vec::new(),
    });
}

/// Runs `f` with the calling thread's scratch. Not re-entrant.
pub fn with_head_scratch<R>(f: impl FnOnce(&mut HeadScratch) -> R) -> R {
    HEAD_SCRATCH.with_borrow_mut(f)
}

/// Sets the length of a scratch buffer without initialising what was there: every element is written before it is read.
pub fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

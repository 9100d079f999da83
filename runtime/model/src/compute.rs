//! What every layer needs to compute: kernels, threads, precision.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use sluice_format::ExtentKind;
use sluice_kernels::{Activations, Kernels, KvBuffer, Precision, QueryTile, ThreadPool, TopK};

use super::control::Cancel;
use super::mla::Expansion;
use super::prompt_attention::PromptAttention;
use super::rows::Rows;
use super::weights::{MatrixPlace, MatrixRef, VectorRef};

/// What observers are told of as the inputs of a matrix of this name in the router's extent, though none has it: what all experts of a
/// layer choose from, where that is a projection of what the router meets.
pub const EXPERTS_INPUT: &str = "experts_input";

/// Sees what every matrix is multiplied with.
pub trait InputObserver: Send + Sync {
    /// `x` is about to meet a matrix. `index`: the expert, or the number of the matrix in a batch; otherwise 0. Matrices of
    /// a batch are seen from several threads, each matrix from one at a time. Experts come in the order in which they are read; the
    /// router's inputs, which are those of all experts of a layer, in the order of the rows.
    fn inputs(&self, place: MatrixPlace, index: u32, x: &Activations);
}

/// Kernels, threads and precision of an opened model.
pub struct Compute {
    /// Kernels of the CPU's instruction set.
    pub kernels: Kernels,
    /// The worker threads.
    pub threads: Arc<ThreadPool>,
    /// Whether quantised weights meet f32 or int8 activations.
    pub precision: Precision,
    /// In which form the latent attention of prompts is computed.
    pub prompt_attention: PromptAttention,
    /// Sees the inputs of every quantisable matrix.
    pub observer: Option<Arc<dyn InputObserver>>,
    /// Ends what is being computed.
    pub cancel: Option<Cancel>,
    /// Inputs of a matrix whose columns have an order of their own, [`REORDERED_ROWS`] rows at most.
    reordered: Mutex<Activations>,
}

/// Rows whose columns are brought into the order of a matrix at a time: enough for the weights to be met by many at once, and few
/// enough that their memory is small.
const REORDERED_ROWS: usize = 128;

impl fmt::Debug for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compute { kernels, threads, precision, .. } = self;
        f.debug_struct("Compute")
            .field("kernels", kernels)
            .field("threads", threads)
            .field("precision", precision)
            .finish_non_exhaustive()
    }
}

impl Compute {
    /// For a model that nobody observes, with prompts in the absorbed form.
    pub fn new(kernels: Kernels, threads: Arc<ThreadPool>, precision: Precision) -> Self {
        let reordered = Mutex::new(Activations::new(precision));
        let prompt_attention = PromptAttention::default();
        Compute { kernels, threads, precision, prompt_attention, observer: None, cancel: None, reordered }
    }

    /// Gives its buffer back.
    pub fn give_back(&self) {
        *self.reordered.lock().unwrap_or_else(PoisonError::into_inner) = Activations::new(self.precision);
    }

    /// Shows the observer, if there is one, what `matrix` is about to be multiplied with.
    #[inline]
    pub fn observe(&self, matrix: &MatrixRef, index: u32, x: &Activations) {
        if let Some(observer) = &self.observer {
            observer.inputs(matrix.place(), index, x);
        }
    }

    /// Shows the observer, if there is one, what the experts of a layer choose from.
    pub fn observe_experts_input(&self, layer: u32, x: &Activations) {
        if let Some(observer) = &self.observer {
            observer.inputs(MatrixPlace { kind: ExtentKind::Router, layer, name: EXPERTS_INPUT }, 0, x);
        }
    }

    /// Whether the step has been cancelled. Long loops check this, and leave their results unfinished.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(|cancel| cancel.is_cancelled())
    }

    /// `out` `[n, rows]` = `matrix` · `x`, on all threads.
    pub fn multiply(&self, matrix: &MatrixRef, extent: &[u8], x: &Activations, out: &mut [f32]) {
        self.observe(matrix, 0, x);
        self.product(matrix, extent, x, out);
    }

    /// As [`multiply`](Self::multiply), without telling the observer.
    pub fn product(&self, matrix: &MatrixRef, extent: &[u8], x: &Activations, out: &mut [f32]) {
        let view = matrix.view(extent);
        self.inputs(matrix, extent, x, |rows, x| {
            let out = &mut out[rows.start * matrix.rows()..rows.end * matrix.rows()];
            self.kernels.matmul(&self.threads, view, x, out);
        });
    }

    /// Calls `f` with what the rows `x` are for `matrix`: all at once, or some at a time, numbered, with their columns in the order
    /// of the matrix. Not re-entrant.
    pub fn inputs(
        &self,
        matrix: &MatrixRef,
        extent: &[u8],
        x: &Activations,
        mut f: impl FnMut(Range<usize>, &Activations),
    ) {
        let Some(order) = matrix.order(extent) else { return f(0..x.n(), x) };
        let mut reordered = self.reordered.lock().unwrap_or_else(PoisonError::into_inner);
        for first in (0..x.n()).step_by(REORDERED_ROWS) {
            let rows = first..(first + REORDERED_ROWS).min(x.n());
            reordered.reorder(x, rows.clone(), order);
            f(rows, &reordered);
        }
    }
}

/// What a part of a layer computes with: kernels, the rows of the pass, and the bytes that hold its weights.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// Kernels, threads, precision.
    pub compute: &'a Compute,
    /// The rows.
    pub rows: &'a Rows,
    /// Bytes of the extent that the part's weights are in.
    pub extent: &'a [u8],
}

impl Step<'_> {
    /// Rows of the pass.
    pub fn n(&self) -> usize {
        self.rows.len()
    }

    /// Whether the step has been cancelled: see [`Compute::is_cancelled`].
    pub fn is_cancelled(&self) -> bool {
        self.compute.is_cancelled()
    }

    /// `out` `[n, rows]` = `matrix` · `x`, on all threads.
    pub fn multiply(&self, matrix: &MatrixRef, x: &Activations, out: &mut [f32]) {
        self.compute.multiply(matrix, self.extent, x, out);
    }

    /// Reads a vector of the extent into `out`.
    pub fn read(&self, vector: &VectorRef, out: &mut Vec<f32>) {
        vector.read(self.extent, out);
    }
}

/// What one thread needs to compute an attention head by itself.
pub struct HeadScratch {
    /// A pool without workers: kernels called with it run on the calling thread.
    pub serial: ThreadPool,
    /// f32 activations of one head.
    pub activations: Activations,
    /// The same for a matrix whose columns have an order of their own.
    pub reordered: Activations,
    /// Gathered inputs, `[tokens, width]`.
    pub input: Vec<f32>,
    /// Product of the inputs, `[tokens, width]`.
    pub product: Vec<f32>,
    /// Results of one head, `[tokens, width]`.
    pub output: Vec<f32>,
    /// Queries that meet the same keys.
    pub tile: QueryTile,
    /// Of the keys that an indexer has chosen, those of one block.
    pub chosen: Option<KvBuffer>,
    /// Their values, where those are other rows.
    pub chosen_values: Option<KvBuffer>,
    /// An indexer's scores of one block of keys.
    pub scores: Vec<f32>,
    /// The positions with the best of all its scores.
    pub best: TopK,
    /// What expands latents to the keys and values of a head.
    pub expansion: Expansion,
}

thread_local! {
    static HEAD_SCRATCH: RefCell<HeadScratch> = RefCell::new(HeadScratch {
        serial: ThreadPool::new(1),
        activations: Activations::new(Precision::Exact),
        reordered: Activations::new(Precision::Exact),
        input: Vec::new(),
        product: Vec::new(),
        output: Vec::new(),
        tile: QueryTile::default(),
        chosen: None,
        chosen_values: None,
        scores: Vec::new(),
        best: TopK::default(),
        expansion: Expansion::default(),
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

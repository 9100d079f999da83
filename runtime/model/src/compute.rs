//! What every layer needs for computing: kernels, threads, precision.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use sluice_format::ExtentKind;
use sluice_kernels::{Activations, Kernels, KvBuffer, Precision, QueryTile, ThreadPool, TopK, Work, Works};

use super::control::Cancel;
use super::mla::Expansion;
use super::prompt_attention::PromptAttention;
use super::rows::Rows;
use super::weights::{MatrixPlace, MatrixRef, VectorRef};

/// Name under which observers get the inputs of all experts of a layer if these are a projection of the router's input. It counts
/// as a matrix in the router's extent, although no matrix has it.
pub const EXPERTS_INPUT: &str = "experts_input";

/// Sees the inputs of every matrix.
pub trait InputObserver: Send + Sync {
    /// `x` is about to be multiplied with a matrix. `index`: the number of the expert, or of the matrix in a batch; otherwise 0.
    /// Matrices of a batch are seen from several threads, but each matrix from one thread at a time. Experts come in the order in
    /// which they are read; the router's inputs, which are those of all experts of a layer, come in the order of the rows.
    fn inputs(&self, place: MatrixPlace, index: u32, x: &Activations);
}

/// Kernels, threads and precision of an opened model.
pub struct Compute {
    /// Kernels of the CPU's instruction set.
    pub kernels: Kernels,
    /// The worker threads.
    pub threads: Arc<ThreadPool>,
    /// Whether quantised weights are multiplied with f32 or int8 activations.
    pub precision: Precision,
    /// In which form the latent attention of prompts is computed.
    pub prompt_attention: PromptAttention,
    /// Sees the inputs of every quantisable matrix.
    pub observer: Option<Arc<dyn InputObserver>>,
    /// Ends the computation.
    pub cancel: Option<Cancel>,
}

/// Rows whose columns are put into the order of a matrix at a time: enough that each weight that is read serves many rows, and few
/// enough that they take little memory.
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
        let prompt_attention = PromptAttention::default();
        Compute { kernels, threads, precision, prompt_attention, observer: None, cancel: None }
    }

    /// Frees the buffer of [`inputs`](Self::inputs) that the calling thread has.
    pub fn give_back(&self) {
        REORDERED.take();
    }

    /// Shows the observer, if there is one, the inputs with which `matrix` is about to be multiplied.
    #[inline]
    pub fn observe(&self, matrix: &MatrixRef, index: u32, x: &Activations) {
        if let Some(observer) = &self.observer {
            observer.inputs(matrix.place(), index, x);
        }
    }

    /// Shows the observer, if there is one, the inputs of a layer's experts before any is chosen.
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

    /// `out` `[n, rows]` = `matrix` · `x` for a few matrices of one extent with the same `x`, as one job: threads wait for each other
    /// once. The bits are those of one product after the other.
    ///
    /// # Panics
    /// If there are more than [`Works::MOST`].
    pub fn multiply_each<'o>(
        &self,
        extent: &[u8],
        x: &Activations,
        products: impl IntoIterator<Item = (&'o MatrixRef, &'o mut [f32])>,
    ) {
        let mut together = Works::new();
        for (matrix, out) in products {
            self.observe(matrix, 0, x);
            // The buffer for columns in another order holds those of one matrix.
            match matrix.is_ordered() {
                true => self.product(matrix, extent, x, out),
                false => together.push(Work::matmul(matrix.view(extent), x, out)),
            }
        }
        self.kernels.products(&self.threads, &together);
    }

    /// Like [`multiply`](Self::multiply), without telling the observer.
    pub fn product(&self, matrix: &MatrixRef, extent: &[u8], x: &Activations, out: &mut [f32]) {
        let view = matrix.view(extent);
        self.inputs(matrix, extent, x, |rows, x| {
            let out = &mut out[rows.start * matrix.rows()..rows.end * matrix.rows()];
            self.kernels.matmul(&self.threads, view, x, out);
        });
    }

    /// Calls `f` with the rows `x` in the form that `matrix` takes: all at once, or some at a time, with the number of the first
    /// and their columns in the order of the matrix. Allocates only when the calling thread does this for the first time, or needs a
    /// larger buffer than before.
    pub fn inputs(
        &self,
        matrix: &MatrixRef,
        extent: &[u8],
        x: &Activations,
        mut f: impl FnMut(Range<usize>, &Activations),
    ) {
        let Some(order) = matrix.order(extent) else { return f(0..x.n(), x) };
        // Other models on this thread may compute in another precision.
        let fits = |kept: &Activations| kept.precision() == self.precision;
        let mut reordered = REORDERED.take().filter(fits).unwrap_or_else(|| Activations::new(self.precision));
        for first in (0..x.n()).step_by(REORDERED_ROWS) {
            let rows = first..(first + REORDERED_ROWS).min(x.n());
            reordered.reorder(x, rows.clone(), order);
            f(rows, &reordered);
        }
        REORDERED.set(Some(reordered));
    }
}

/// The data with which a part of a layer computes: kernels, the rows of the pass, and the bytes that hold its weights.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// Kernels, threads, precision.
    pub compute: &'a Compute,
    /// The rows.
    pub rows: &'a Rows,
    /// Bytes of the extent with the part's weights.
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

    /// The same for a few matrices: see [`Compute::multiply_each`].
    pub fn multiply_each<'o>(
        &self,
        x: &Activations,
        products: impl IntoIterator<Item = (&'o MatrixRef, &'o mut [f32])>,
    ) {
        self.compute.multiply_each(self.extent, x, products);
    }

    /// Reads a vector of the extent into `out`.
    pub fn read(&self, vector: &VectorRef, out: &mut Vec<f32>) {
        vector.read(self.extent, out);
    }
}

/// Buffers with which one thread computes an attention head by itself.
pub struct HeadScratch {
    /// A pool without workers: kernels called with it run on the calling thread.
    pub serial: ThreadPool,
    /// f32 activations of one head.
    pub activations: Activations,
    /// The same, for a matrix whose columns have an order of their own.
    pub reordered: Activations,
    /// Gathered inputs, `[tokens, width]`.
    pub input: Vec<f32>,
    /// Product of the inputs, `[tokens, width]`.
    pub product: Vec<f32>,
    /// Results of one head, `[tokens, width]`.
    pub output: Vec<f32>,
    /// Queries that meet the same keys.
    pub tile: QueryTile,
    /// The chosen keys of one block, if an indexer chooses.
    pub chosen: Option<KvBuffer>,
    /// Their values, if these are other rows.
    pub chosen_values: Option<KvBuffer>,
    /// An indexer's scores of one block of keys.
    pub scores: Vec<f32>,
    /// The positions with the best of all the indexer's scores.
    pub best: TopK,
    /// What expands latents to the keys and values of a head.
    pub expansion: Expansion,
}

thread_local! {
    /// Inputs of a matrix whose columns have an order of their own, at most [`REORDERED_ROWS`] rows; `None` while they are in use. Each
    /// thread has its own, so that products wait for no lock.
    static REORDERED: Cell<Option<Activations>> = const { Cell::new(None) };
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

/// Sets the length of a scratch buffer without initialising its contents: every element is written before it is read.
pub fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

//! Matrix products: which row groups are multiplied with which tokens, on which thread.
//!
//! Nothing here adds two numbers. A kernel computes a whole tile, one or two row groups times a few tokens, so the order of tiles
//! and their distribution over threads cannot change a bit.

use crate::activations::Activations;
use crate::elementwise::Activation;
use crate::isa::Kernels;
use crate::matrix::{Matrix, ROW_GROUP, Watch};
use crate::par_slice::SharedRows;
use crate::threads::ThreadPool;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The most tokens of a tile; each kernel says how many it takes.
pub(crate) const TILE_TOKENS: usize = 32;

/// Products of a few tokens with two row groups, the second in lanes 8..16.
pub(crate) type Tile = [[f32; 2 * ROW_GROUP]; TILE_TOKENS];

/// The row groups and tokens of a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileShape {
    /// First row group.
    pub(crate) group: usize,
    /// Row groups: 1 or 2.
    pub(crate) groups: usize,
    /// First token.
    pub(crate) token: usize,
    /// Tokens: 1 to [`TILE_TOKENS`].
    pub(crate) tokens: usize,
    /// Whether to multiply int8 activations.
    pub(crate) int8: bool,
}

/// Tokens that go through all row groups of a task together; their activations should stay in the L2 cache.
const TOKEN_PANEL: usize = 64;

/// Weight bytes times tokens below which a task is not worth waking a thread for.
const TASK_BYTES_MIN: usize = 64 << 10;

/// Tasks per thread: more than one, so that a thread that was descheduled does not hold up the rest.
const TASKS_PER_THREAD: usize = 4;

/// Bytes that are multiplied before a watch is told of them, at least a pair of row groups: they should still be in the L1 cache
/// then.
const WATCHED_BYTES: usize = 16 << 10;

/// A product that is being computed.
struct Product<'a> {
    w: &'a Matrix<'a>,
    x: &'a Activations,
    /// Receives every tile.
    write: &'a (dyn Fn(TileShape, &Tile) + Sync),
    /// Once it is set, the rest of the results is no longer needed.
    cancel: Option<Arc<AtomicBool>>,
}

impl Product<'_> {
    fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

impl Kernels {
    /// `y = x Wᵀ`: `y` is row-major `[x.n(), w.rows()]`. Parallel over row groups.
    ///
    /// # Panics
    /// If `x.cols() != w.cols()` or `y.len() != x.n() * w.rows()`.
    pub fn matmul(&self, pool: &ThreadPool, w: Matrix<'_>, x: &Activations, y: &mut [f32]) {
        assert_eq!(x.cols(), w.cols(), "activations and weights differ in width");
        assert_eq!(Some(y.len()), x.n().checked_mul(w.rows()), "y is [{}, {}]", x.n(), w.rows());
        let y = SharedRows::new(y);
        self.tiles(pool, &w, x, &|shape, tile| {
            let first = shape.group * ROW_GROUP;
            let rows = (w.rows() - first).min(shape.groups * ROW_GROUP);
            for (t, values) in tile[..shape.tokens].iter().enumerate() {
                y.write((shape.token + t) * w.rows() + first, &values[..rows]);
            }
        });
    }

    /// `h = act(gate) · up`: `h` is row-major `[x.n(), width]`. The row groups of `w` alternate between gate and up.
    ///
    /// # Panics
    /// If `x.cols() != w.cols()`, `w.rows()` is not twice `width` rounded up to 8, or `h.len() != x.n() * width`.
    pub fn gate_up(
        &self,
        pool: &ThreadPool,
        w: Matrix<'_>,
        width: usize,
        act: Activation,
        x: &Activations,
        h: &mut [f32],
    ) {
        assert_eq!(x.cols(), w.cols(), "activations and weights differ in width");
        assert_eq!(w.rows(), 2 * width.next_multiple_of(ROW_GROUP), "gate and up of width {width}");
        assert_eq!(Some(h.len()), x.n().checked_mul(width), "h is [{}, {width}]", x.n());
        let h = SharedRows::new(h);
        self.tiles(pool, &w, x, &|shape, tile| {
            let first = shape.group / 2 * ROW_GROUP;
            let rows = (width - first).min(ROW_GROUP);
            for (t, values) in tile[..shape.tokens].iter().enumerate() {
                let [gate, up] = values.as_chunks::<ROW_GROUP>().0 else { unreachable!("a tile has two row groups") };
                let joined = act.apply_all(gate, up);
                h.write((shape.token + t) * width + first, &joined[..rows]);
            }
        });
    }

    /// `y = W x` on the calling thread, with f32 activations whatever the type; `scratch` holds the padded input.
    ///
    /// # Panics
    /// If `x.len() != w.cols()` or `y.len() != w.rows()`.
    pub fn matvec_f32(&self, w: Matrix<'_>, x: &[f32], y: &mut [f32], scratch: &mut Activations) {
        assert_eq!(x.len(), w.cols(), "activations and weights differ in width");
        assert_eq!(y.len(), w.rows(), "one output per row");
        scratch.set_rows(x, 1, x.len());
        let mut tile = [[0.0; 2 * ROW_GROUP]; TILE_TOKENS];
        for (pair, y) in y.chunks_mut(2 * ROW_GROUP).enumerate() {
            let groups = y.len().div_ceil(ROW_GROUP);
            let shape = TileShape { group: 2 * pair, groups, token: 0, tokens: 1, int8: false };
            self.tile(&w, scratch, shape, &mut tile);
            y.copy_from_slice(&tile[0][..y.len()]);
        }
    }

    /// Computes every tile exactly once, and passes it to `write`.
    fn tiles(&self, pool: &ThreadPool, w: &Matrix<'_>, x: &Activations, write: &(dyn Fn(TileShape, &Tile) + Sync)) {
        let pairs = w.groups().div_ceil(2);
        let work = w.group_bytes().saturating_mul(w.groups()).saturating_mul(x.n());
        let tasks = (work / TASK_BYTES_MIN).clamp(1, pool.threads() * TASKS_PER_THREAD).min(pairs.max(1));
        let product = Product { w, x, write, cancel: pool.cancel_flag() };
        let run = |task| {
            let range = task * pairs / tasks..(task + 1) * pairs / tasks;
            match w.watch() {
                None => self.tiles_of(&product, range),
                Some(watch) => self.watched_tiles_of(&product, range, watch),
            }
        };
        pool.run_product(tasks, &run);
    }

    /// Works in steps small enough that the bytes are still in the cache when the watch sees them.
    fn watched_tiles_of(&self, product: &Product<'_>, pairs: Range<usize>, watch: &dyn Watch) {
        let (w, group) = (product.w, product.w.group_bytes());
        let step = (WATCHED_BYTES / (2 * group).max(1)).max(1);
        for first in pairs.clone().step_by(step) {
            let end = (first + step).min(pairs.end);
            self.tiles_of(product, first..end);
            watch.seen(2 * first * group..(2 * end).min(w.groups()) * group);
        }
    }

    fn tiles_of(&self, product: &Product<'_>, pairs: Range<usize>) {
        let Product { w, x, write, .. } = *product;
        let int8 = x.quantised() && w.ty().is_blocked();
        let tile_tokens = self.tile_tokens(w.ty());
        let mut tile = [[0.0; 2 * ROW_GROUP]; TILE_TOKENS];
        for panel in (0..x.n()).step_by(TOKEN_PANEL) {
            let panel_end = (panel + TOKEN_PANEL).min(x.n());
            for pair in pairs.clone() {
                // A panel times two row groups takes a millisecond at most.
                if product.is_cancelled() {
                    return;
                }
                let groups = (w.groups() - 2 * pair).min(2);
                for token in (panel..panel_end).step_by(tile_tokens) {
                    let tokens = (panel_end - token).min(tile_tokens);
                    let shape = TileShape { group: 2 * pair, groups, token, tokens, int8 };
                    self.tile(w, x, shape, &mut tile);
                    write(shape, &tile);
                }
            }
        }
    }
}

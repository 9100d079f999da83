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

/// Most products that are computed together: gate and up of eight experts whose types differ.
const MOST_WORKS: usize = 16;

/// A product that is computed together with others: see [`Kernels::products`].
pub struct Work<'a> {
    w: Matrix<'a>,
    x: &'a Activations,
    form: Form,
    out: SharedRows<'a>,
}

/// What becomes of the products of a tile.
#[derive(Clone, Copy)]
enum Form {
    /// They are the output.
    Rows,
    /// Gate and up, which are joined.
    Gated { width: usize, act: Activation },
}

impl<'a> Work<'a> {
    /// `y = x Wᵀ`: `y` is row-major `[x.n(), w.rows()]`.
    ///
    /// # Panics
    /// If `x.cols() != w.cols()` or `y.len() != x.n() * w.rows()`.
    pub fn matmul(w: Matrix<'a>, x: &'a Activations, y: &'a mut [f32]) -> Self {
        assert_eq!(x.cols(), w.cols(), "activations and weights differ in width");
        assert_eq!(Some(y.len()), x.n().checked_mul(w.rows()), "y is [{}, {}]", x.n(), w.rows());
        Work { w, x, form: Form::Rows, out: SharedRows::new(y) }
    }

    /// `h = act(gate) · up`: `h` is row-major `[x.n(), width]`. The row groups of `w` alternate between gate and up.
    ///
    /// # Panics
    /// If `x.cols() != w.cols()`, `w.rows()` is not twice `width` rounded up to 8, or `h.len() != x.n() * width`.
    pub fn gate_up(w: Matrix<'a>, width: usize, act: Activation, x: &'a Activations, h: &'a mut [f32]) -> Self {
        assert_eq!(x.cols(), w.cols(), "activations and weights differ in width");
        assert_eq!(w.rows(), 2 * width.next_multiple_of(ROW_GROUP), "gate and up of width {width}");
        assert_eq!(Some(h.len()), x.n().checked_mul(width), "h is [{}, {width}]", x.n());
        Work { w, x, form: Form::Gated { width, act }, out: SharedRows::new(h) }
    }

    /// Pairs of row groups.
    fn pairs(&self) -> usize {
        self.w.groups().div_ceil(2)
    }

    /// Into how many tasks it is divided for so many threads.
    fn tasks(&self, threads: usize) -> usize {
        let work = self.w.group_bytes().saturating_mul(self.w.groups()).saturating_mul(self.x.n());
        (work / TASK_BYTES_MIN).clamp(1, threads * TASKS_PER_THREAD).min(self.pairs().max(1))
    }

    /// Takes the products of a tile.
    #[inline]
    fn write(&self, shape: TileShape, tile: &Tile) {
        match self.form {
            Form::Rows => {
                let first = shape.group * ROW_GROUP;
                let rows = (self.w.rows() - first).min(shape.groups * ROW_GROUP);
                for (t, values) in tile[..shape.tokens].iter().enumerate() {
                    self.out.write((shape.token + t) * self.w.rows() + first, &values[..rows]);
                }
            }
            Form::Gated { width, act } => {
                let first = shape.group / 2 * ROW_GROUP;
                let rows = (width - first).min(ROW_GROUP);
                for (t, values) in tile[..shape.tokens].iter().enumerate() {
                    let [gate, up] = values.as_chunks::<ROW_GROUP>().0 else {
                        unreachable!("a tile has two row groups")
                    };
                    let joined = act.apply_all(gate, up);
                    self.out.write((shape.token + t) * width + first, &joined[..rows]);
                }
            }
        }
    }
}

/// A few products, none of which needs the result of another. They are kept without an allocation.
pub struct Works<'a> {
    works: [Option<Work<'a>>; MOST_WORKS],
    len: usize,
}

impl<'a> Works<'a> {
    /// Most products.
    pub const MOST: usize = MOST_WORKS;

    /// None yet.
    pub fn new() -> Self {
        Works { works: [const { None }; MOST_WORKS], len: 0 }
    }

    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.len == MOST_WORKS
    }

    /// Adds a product.
    ///
    /// # Panics
    /// If there are [`Works::MOST`] already.
    pub fn push(&mut self, work: Work<'a>) {
        self.works[self.len] = Some(work);
        self.len += 1;
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.works[..self.len].fill_with(|| None);
        self.len = 0;
    }

    fn iter(&self) -> impl Iterator<Item = &Work<'a>> {
        self.works[..self.len].iter().flatten()
    }
}

impl<'a> Extend<Work<'a>> for Works<'a> {
    fn extend<I: IntoIterator<Item = Work<'a>>>(&mut self, works: I) {
        works.into_iter().for_each(|work| self.push(work));
    }
}

impl Default for Works<'_> {
    fn default() -> Self {
        Works::new()
    }
}

fn is_set(cancel: Option<&AtomicBool>) -> bool {
    cancel.is_some_and(|flag| flag.load(Ordering::Relaxed))
}

impl Kernels {
    /// `y = x Wᵀ`: `y` is row-major `[x.n(), w.rows()]`. Parallel over row groups.
    ///
    /// # Panics
    /// If `x.cols() != w.cols()` or `y.len() != x.n() * w.rows()`.
    pub fn matmul(&self, pool: &ThreadPool, w: Matrix<'_>, x: &Activations, y: &mut [f32]) {
        let work = Work::matmul(w, x, y);
        self.divided(pool, || std::iter::once(&work));
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
        let work = Work::gate_up(w, width, act, x, h);
        self.divided(pool, || std::iter::once(&work));
    }

    /// Computes all products as one job: threads wait for each other once, at the end, and not after each product. The bits are those
    /// of one after the other.
    pub fn products(&self, pool: &ThreadPool, works: &Works<'_>) {
        self.divided(pool, || works.iter());
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

    /// Computes every tile of the products exactly once. Each product is divided as if it were alone: what is left to do at the end
    /// is small then, however large all of them are together.
    fn divided<'a, 'w: 'a, I: Iterator<Item = &'a Work<'w>>>(&self, pool: &ThreadPool, works: impl Fn() -> I + Sync) {
        let (threads, cancel) = (pool.threads(), pool.cancel_flag());
        let tasks = works().map(|work| work.tasks(threads)).sum();
        pool.run_product(tasks, &|mut task| {
            for work in works() {
                let tasks = work.tasks(threads);
                if task < tasks {
                    return self.task(work, task, tasks, cancel.as_deref());
                }
                task -= tasks;
            }
        });
    }

    /// One of the tasks of a product.
    fn task(&self, work: &Work<'_>, task: usize, tasks: usize, cancel: Option<&AtomicBool>) {
        let pairs = work.pairs();
        let range = task * pairs / tasks..(task + 1) * pairs / tasks;
        match work.w.watch() {
            None => self.tiles_of(work, range, cancel),
            Some(watch) => self.watched_tiles_of(work, range, watch, cancel),
        }
    }

    /// Works in steps small enough that the bytes are still in the cache when the watch sees them.
    fn watched_tiles_of(&self, work: &Work<'_>, pairs: Range<usize>, watch: &dyn Watch, cancel: Option<&AtomicBool>) {
        let (w, group) = (&work.w, work.w.group_bytes());
        let step = (WATCHED_BYTES / (2 * group).max(1)).max(1);
        for first in pairs.clone().step_by(step) {
            let end = (first + step).min(pairs.end);
            self.tiles_of(work, first..end, cancel);
            watch.seen(2 * first * group..(2 * end).min(w.groups()) * group);
        }
    }

    fn tiles_of(&self, work: &Work<'_>, pairs: Range<usize>, cancel: Option<&AtomicBool>) {
        let Work { w, x, .. } = work;
        let int8 = x.quantised() && w.ty().is_blocked();
        let tile_tokens = self.tile_tokens(w.ty());
        let mut tile = [[0.0; 2 * ROW_GROUP]; TILE_TOKENS];
        for panel in (0..x.n()).step_by(TOKEN_PANEL) {
            let panel_end = (panel + TOKEN_PANEL).min(x.n());
            for pair in pairs.clone() {
                // A panel times two row groups takes a millisecond at most.
                if is_set(cancel) {
                    return;
                }
                let groups = (w.groups() - 2 * pair).min(2);
                for token in (panel..panel_end).step_by(tile_tokens) {
                    let tokens = (panel_end - token).min(tile_tokens);
                    let shape = TileShape { group: 2 * pair, groups, token, tokens, int8 };
                    self.tile(w, x, shape, &mut tile);
                    work.write(shape, &tile);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Precision, WeightType, packed_len};

    #[test]
    fn products_of_one_job_have_the_bits_of_one_after_the_other() {
        let kernels = Kernels::detect().unwrap();
        let shapes = [(48, 96), (8, 96), (136, 96), (24, 64), (3, 96)];
        let values = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
        let mut inputs = [96, 64].map(|cols| (cols, Activations::new(Precision::Int8)));
        inputs.iter_mut().for_each(|(cols, x)| x.set(&values(2 * *cols), 2, *cols));
        let input = |cols| &inputs.iter().find(|(width, _)| *width == cols).expect("an input of this width").1;
        // Any bytes are weights.
        let bytes = |rows, cols| -> Vec<u8> {
            (0..packed_len(WeightType::Int4, rows, cols).unwrap()).map(|i| (i * 7 % 61) as u8).collect()
        };
        let weights = shapes.map(|(rows, cols)| bytes(rows, cols));
        let matrices: Vec<Matrix<'_>> = shapes
            .iter()
            .zip(&weights)
            .map(|(&(rows, cols), bytes)| Matrix::new(WeightType::Int4, rows, cols, bytes).unwrap())
            .collect();
        let act = Activation::Silu;
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads);
            let mut apart: Vec<Vec<f32>> = shapes.iter().map(|(rows, _)| vec![f32::NAN; 2 * rows]).collect();
            let (mut together, mut gated) = (apart.clone(), vec![f32::NAN; 2 * 20]);
            let mut alone = gated.clone();
            for (w, y) in matrices.iter().zip(&mut apart) {
                kernels.matmul(&pool, *w, input(w.cols()), y);
            }
            kernels.gate_up(&pool, matrices[0], 20, act, input(96), &mut alone);
            let mut works = Works::new();
            for (w, y) in matrices.iter().zip(&mut together) {
                works.push(Work::matmul(*w, input(w.cols()), y));
            }
            works.push(Work::gate_up(matrices[0], 20, act, input(96), &mut gated));
            kernels.products(&pool, &works);
            works.clear();
            kernels.products(&pool, &works);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
            let all = |rows: &[Vec<f32>]| rows.iter().map(|row| bits(row)).collect::<Vec<_>>();
            assert_eq!(all(&together), all(&apart), "{threads} threads");
            assert_eq!(bits(&gated), bits(&alone), "{threads} threads");
        }
    }
}

//! How the inputs of a matrix vary together.

use crate::activations::{Activations, Precision};
use crate::isa::Kernels;
use crate::matrix::{BLOCK, Matrix, ROW_GROUP, WeightType, packed_len};
use crate::pack::pack_row_group;
use crate::threads::ThreadPool;

/// Tokens that are added at once.
const TOKENS: usize = 1024;

/// Sums of the products of the inputs of a matrix, `Σ x_i x_j` over tokens, for columns of the same panel: all that error feedback
/// can use. Panels bound memory and time: a panel of `w` columns takes `4 w²` bytes, and its factorisation `w³/3` steps.
#[derive(Clone, Debug)]
pub struct Moments {
    cols: usize,
    panel: usize,
    tokens: u64,
    /// `[w, w]`, one for each panel.
    sums: Vec<Vec<f32>>,
}

impl Moments {
    /// Nothing seen yet, of inputs of `cols` numbers in panels of `panel` columns, a multiple of [`BLOCK`].
    ///
    /// # Panics
    /// If it is none.
    pub fn new(cols: usize, panel: usize) -> Self {
        assert!(panel > 0 && panel.is_multiple_of(BLOCK), "panels are whole blocks");
        let sums = (0..cols).step_by(panel).map(|begin| (cols - begin).min(panel)).map(|w| vec![0.0; w * w]);
        Moments { cols, panel, tokens: 0, sums: sums.collect() }
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds the inputs of some tokens, `[n, cols]`. The result depends on the order in which tokens come, not on the threads.
    ///
    /// # Panics
    /// If their width is another one.
    pub fn add(&mut self, kernels: &Kernels, pool: &ThreadPool, x: &Activations) {
        assert_eq!(x.cols(), self.cols, "inputs and moments differ in width");
        let mut transposed = Activations::new(Precision::Exact);
        for first in (0..x.n()).step_by(TOKENS) {
            let n = TOKENS.min(x.n() - first);
            for (begin, sums) in (0..self.cols).step_by(self.panel).zip(&mut self.sums) {
                let width = self.panel.min(self.cols - begin);
                let mut columns = vec![0.0; width * n];
                for t in 0..n {
                    let row = &x.row(first + t)[begin..begin + width];
                    row.iter().zip(columns[t..].iter_mut().step_by(n)).for_each(|(&x, to)| *to = x);
                }
                transposed.set(&columns, width, n);
                let packed = pack_f32(&columns, width, n);
                let matrix = Matrix::new(WeightType::F32, width, n, &packed).expect("packed to this shape");
                let mut products = vec![0.0; width * width];
                kernels.matmul(pool, matrix, &transposed, &mut products);
                sums.iter_mut().zip(&products).for_each(|(sum, p)| *sum += p);
            }
        }
        self.tokens += x.n() as u64;
    }

    /// Adds what `tokens` tokens with these mean squares and nothing else in common would.
    ///
    /// # Panics
    /// If their width is another one.
    pub fn add_prior(&mut self, mean_squares: &[f32], tokens: f32) {
        assert_eq!(mean_squares.len(), self.cols, "inputs and moments differ in width");
        for (mean_squares, sums) in mean_squares.chunks(self.panel).zip(&mut self.sums) {
            let diagonal = sums.iter_mut().step_by(mean_squares.len() + 1);
            diagonal.zip(mean_squares).for_each(|(sum, mean)| *sum += tokens * mean);
        }
    }

    /// The mean square of each column; zero if nothing was seen.
    pub fn mean_squares(&self) -> Vec<f32> {
        let tokens = self.tokens.max(1) as f64;
        let diagonal = self.panels().flat_map(|(_, width, sums)| (0..width).map(move |i| sums[i * width + i]));
        diagonal.map(|sum| (f64::from(sum) / tokens) as f32).collect()
    }

    /// First column, width and sums of each panel.
    pub(super) fn panels(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let begins = (0..self.cols).step_by(self.panel);
        begins.zip(&self.sums).map(|(begin, sums)| (begin, self.panel.min(self.cols - begin), &sums[..]))
    }
}

/// A row-major matrix in the form of the kernels.
pub(super) fn pack_f32(values: &[f32], rows: usize, cols: usize) -> Vec<u8> {
    let len = packed_len(WeightType::F32, rows, cols).expect("it is no longer than its values are");
    let mut packed = vec![0; len];
    let group = len / rows.div_ceil(ROW_GROUP).max(1);
    for (values, out) in values.chunks(ROW_GROUP * cols.max(1)).zip(packed.chunks_mut(group.max(1))) {
        pack_row_group(WeightType::F32, values, values.len() / cols, cols, out);
    }
    packed
}

//! How the inputs of a matrix vary together.

use crate::activations::Activations;
use crate::isa::Kernels;
use crate::matrix::BLOCK;
use crate::threads::ThreadPool;
use crate::update::{Stripes, TALL, Target};

/// Tokens that are added at once, so that stripes of them stay in the nearest cache.
const TOKENS: usize = 256;

/// Stripes of rows that one thread takes at once, so that it reads the other operand once for all of them.
const STRIPES: usize = 4;

/// Sums of the products of the inputs of a matrix, `Σ x_i x_j` over tokens, for columns of the same panel; error feedback uses
/// nothing else. Panels bound memory and time: a panel of `w` columns takes `4 w²` bytes, and its factorisation takes `w³/3` steps.
#[derive(Clone, Debug)]
pub struct Moments {
    cols: usize,
    panel: usize,
    tokens: u64,
    /// `[w, w]`, one for each panel; elements above the diagonal have no meaning.
    sums: Vec<Vec<f32>>,
}

impl Moments {
    /// No inputs yet; they will have `cols` numbers, in panels of `panel` columns, a multiple of [`BLOCK`].
    ///
    /// # Panics
    /// If `panel` is not a positive multiple of [`BLOCK`].
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

    /// Adds the inputs of some tokens, `[n, cols]`. The result depends on the order of the tokens, but neither on how many come at
    /// once nor on the threads.
    ///
    /// # Panics
    /// If their width differs.
    pub fn add(&mut self, kernels: &Kernels, pool: &ThreadPool, x: &Activations) {
        assert_eq!(x.cols(), self.cols, "inputs and moments differ in width");
        let (mut tall, mut wide) = (Stripes::default(), Stripes::default());
        for first in (0..x.n()).step_by(TOKENS) {
            let n = TOKENS.min(x.n() - first);
            for (begin, sums) in (0..self.cols).step_by(self.panel).zip(&mut self.sums) {
                let width = self.panel.min(self.cols - begin);
                let row = |t: usize| &x.row(first + t)[begin..begin + width];
                tall.set(n, width, row);
                wide.set(n, width, row);
                pool.for_each_piece(sums, STRIPES * TALL * width, &|i, values| {
                    let stripes = i * STRIPES..((i + 1) * STRIPES).min(tall.count());
                    let mut to = Target { values, stride: width, columns: 0..width };
                    kernels.update(&tall, stripes, &wide, &mut to, true);
                });
            }
        }
        self.tokens += x.n() as u64;
    }

    /// Adds what `tokens` tokens would add that have these mean squares and are otherwise uncorrelated.
    ///
    /// # Panics
    /// If their width differs.
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

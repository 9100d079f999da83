//! The inputs of the matrices of one layer, and how these are rounded for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use sluice_converter::measure::{Guide, Inputs};
use sluice_format::{ColumnMeans, ExtentKind, MatrixKey};
use sluice_kernels::{Activations, Feedback, Kernels, Moments, Precision, ThreadPool};
use sluice_model::compute::EXPERTS_INPUT;

/// Columns of an expert's second matrix that can compensate for each other's errors: it sees few tokens, which cannot say much
/// about more columns, and there are very many such matrices.
const EXPERT_PANEL: usize = 512;

/// With fewer tokens than this, an expert's own inputs say too little.
const ENOUGH_TOKENS: usize = 32;

/// An expert's mean squares are mixed with those of its layer's experts as if it had seen this many tokens of these in addition.
const PRIOR_TOKENS: f32 = 8.0;

/// Inputs of an expert's second matrix, `[tokens, cols]`.
pub(crate) struct ExpertRows {
    pub(crate) cols: usize,
    pub(crate) rows: Vec<f32>,
}

impl ExpertRows {
    fn tokens(&self) -> usize {
        self.rows.len() / self.cols.max(1)
    }

    /// Sums of squares by column.
    fn squares(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.cols];
        for row in self.rows.chunks_exact(self.cols.max(1)) {
            sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        sums
    }
}

/// Inputs of matrices that every token meets, and results that are computed from them on demand.
pub(crate) struct Common {
    moments: Moments,
    feedback: OnceLock<Option<Arc<Feedback>>>,
}

impl Common {
    pub(crate) fn new(moments: Moments) -> Self {
        Common { moments, feedback: OnceLock::new() }
    }
}

/// The inputs of the matrices of one layer.
pub(crate) struct LayerInputs {
    kernels: Kernels,
    threads: ThreadPool,
    layer: u32,
    common: Vec<Common>,
    /// Index in `common` of a matrix's inputs.
    matrices: BTreeMap<MatrixKey, usize>,
    /// Name of an expert's first matrix.
    first: &'static str,
    gates: BTreeMap<u32, ColumnMeans>,
    downs: BTreeMap<u32, ExpertRows>,
    /// Mean squares of the inputs of all experts' second matrices.
    mean_down: Vec<f32>,
}

impl LayerInputs {
    pub(crate) fn new(
        kernels: Kernels,
        threads: ThreadPool,
        layer: u32,
        (common, matrices): (Vec<Common>, BTreeMap<MatrixKey, usize>),
        (first, gates): (&'static str, BTreeMap<u32, ColumnMeans>),
        downs: BTreeMap<u32, ExpertRows>,
    ) -> Self {
        let cols = downs.values().next().map_or(0, |rows| rows.cols);
        let tokens: usize = downs.values().map(ExpertRows::tokens).sum();
        let mut sums = vec![0.0f64; cols];
        for rows in downs.values() {
            sums.iter_mut().zip(rows.squares()).for_each(|(sum, squares)| *sum += squares);
        }
        let mean_down = sums.iter().map(|sum| (sum / tokens.max(1) as f64) as f32).collect();
        LayerInputs { kernels, threads, layer, common, matrices, first, gates, downs, mean_down }
    }

    /// Mean squares by matrix, for an importance file.
    pub(crate) fn means(&self) -> BTreeMap<MatrixKey, ColumnMeans> {
        let expert =
            |name: &str, index| MatrixKey { kind: ExtentKind::Expert, layer: self.layer, name: name.to_owned(), index };
        let quantisable = self.matrices.iter().filter(|(key, _)| key.kind != ExtentKind::Router);
        let common = quantisable.map(|(key, &number)| {
            let moments = &self.common[number].moments;
            let (tokens, mean_squares) = (moments.tokens(), moments.mean_squares());
            (key.clone(), ColumnMeans { tokens, mean_squares })
        });
        let gates = self.gates.iter().map(|(&index, means)| (expert(self.first, index), means.clone()));
        let downs = self.downs.iter().filter(|(_, rows)| rows.tokens() > 0).map(|(&index, rows)| {
            let tokens = rows.tokens() as u64;
            let mean_squares = rows.squares().iter().map(|sum| (sum / tokens as f64) as f32).collect();
            (expert("down", index), ColumnMeans { tokens, mean_squares })
        });
        common.chain(gates).chain(downs).collect()
    }

    /// The inputs of a matrix that every token meets. All experts of a layer share the inputs of their router, or a projection of
    /// them. `None` for the second matrices of experts, and if nothing was seen.
    fn common(&self, key: &MatrixKey) -> Option<usize> {
        match (key.kind, key.name.as_str()) {
            (ExtentKind::Expert, "down") => None,
            (ExtentKind::Expert, _) => {
                let seen = |name: &str| {
                    let (kind, name) = (ExtentKind::Router, name.to_owned());
                    self.matrices.get(&MatrixKey { kind, layer: self.layer, name, index: 0 }).copied()
                };
                seen(EXPERTS_INPUT).or_else(|| seen("router"))
            }
            _ => self.matrices.get(key).copied(),
        }
    }

    fn feedback(&self, number: usize) -> Option<Arc<Feedback>> {
        let Common { moments, feedback } = &self.common[number];
        feedback.get_or_init(|| Feedback::new(self.kernels, moments).map(Arc::new)).clone()
    }

    /// How an expert's second matrix is rounded.
    fn down(&self, expert: u32) -> Guide {
        let mean = || columns(self.mean_down.clone());
        let Some(seen) = self.downs.get(&expert).filter(|rows| rows.tokens() >= ENOUGH_TOKENS) else { return mean() };
        let mut x = Activations::new(Precision::Exact);
        x.set(&seen.rows, seen.tokens(), seen.cols);
        let mut moments = Moments::new(seen.cols, EXPERT_PANEL);
        moments.add(&self.kernels, &ThreadPool::new(1), &x);
        moments.add_prior(&self.mean_down, PRIOR_TOKENS);
        let feedback = Feedback::new(self.kernels, &moments);
        feedback.map_or_else(mean, |feedback| Guide::Feedback(Arc::new(feedback)))
    }
}

/// Column importance, if the squares are finite.
fn columns(mean_squares: Vec<f32>) -> Guide {
    let known = !mean_squares.is_empty() && mean_squares.iter().all(|m| m.is_finite());
    if known { Guide::Columns(mean_squares) } else { Guide::Nothing }
}

impl Inputs for LayerInputs {
    fn prepare(&self, keys: &[MatrixKey]) {
        let numbers: BTreeSet<usize> = keys.iter().filter_map(|key| self.common(key)).collect();
        let mut numbers: Vec<usize> = numbers.into_iter().collect();
        // The widest comes first, because it takes longest.
        numbers.sort_by_key(|&number| std::cmp::Reverse(self.common[number].moments.cols()));
        self.threads.run(numbers.len(), &|i| drop(self.feedback(numbers[i])));
    }

    fn guide(&self, key: &MatrixKey) -> Guide {
        if let (ExtentKind::Expert, "down") = (key.kind, key.name.as_str()) {
            return self.down(key.index);
        }
        let Some(number) = self.common(key) else { return Guide::Nothing };
        let means = || columns(self.common[number].moments.mean_squares());
        self.feedback(number).map_or_else(means, Guide::Feedback)
    }
}

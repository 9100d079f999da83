//! Seeing what meets the matrices of one layer.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use sluice_format::{ColumnMeans, ExtentKind, MatrixKey, NO_LAYER};
use sluice_kernels::{Activations, Kernels, Moments, Precision, ThreadPool};
use sluice_model::compute::InputObserver;
use sluice_model::weights::MatrixPlace;

use crate::inputs::{ExpertRows, LayerInputs};

/// Columns whose errors can be made good in each other. The moments of wider matrices take less memory and time so, and most
/// of the gain remains (`docs/QUANTISATION.md`).
const PANEL: usize = 2048;

/// Rows that are collected before they are multiplied.
const ROWS: usize = 1024;

/// Inputs of a matrix that every token meets.
struct Seen {
    moments: Moments,
    /// Rows that are not in the moments yet.
    rows: Vec<f32>,
}

#[derive(Default)]
struct State {
    matrices: BTreeMap<MatrixKey, Seen>,
    /// Mean squares of an expert's inputs as a sum, and tokens: the inputs themselves are the router's too.
    gates: BTreeMap<u32, (u64, Vec<f64>)>,
    /// Inputs of an expert's second matrix.
    downs: BTreeMap<u32, ExpertRows>,
}

/// What one layer's matrices have met. All that is summed is summed in the order of the rows, whatever the order of experts.
pub(crate) struct Observer {
    kernels: Kernels,
    threads: ThreadPool,
    /// Number of the layer, which is 0 in its file.
    layer: u32,
    state: Mutex<State>,
}

impl Observer {
    pub(crate) fn new(kernels: Kernels, threads: usize, layer: usize) -> Self {
        let threads = ThreadPool::new(threads);
        Observer { kernels, threads, layer: layer as u32, state: Mutex::default() }
    }

    /// What has been seen.
    pub(crate) fn finish(self) -> LayerInputs {
        let State { matrices, gates, downs } = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut moments = BTreeMap::new();
        for (key, mut seen) in matrices {
            seen.flush(&self.kernels, &self.threads);
            moments.insert(key, seen.moments);
        }
        let gates = gates.into_iter().map(|(expert, (tokens, squares))| {
            let mean_squares = squares.iter().map(|sum| (sum / tokens.max(1) as f64) as f32).collect();
            (expert, ColumnMeans { tokens, mean_squares })
        });
        LayerInputs::new(self.kernels, self.layer, moments, gates.collect(), downs)
    }
}

impl Seen {
    fn flush(&mut self, kernels: &Kernels, threads: &ThreadPool) {
        let cols = self.moments.cols();
        let mut x = Activations::new(Precision::Exact);
        x.set(&self.rows, self.rows.len() / cols, cols);
        self.moments.add(kernels, threads, &x);
        self.rows.clear();
    }
}

impl InputObserver for Observer {
    fn inputs(&self, place: MatrixPlace, index: u32, x: &Activations) {
        // The sums are valid at every instant, so a panic elsewhere does not spoil them.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = || (0..x.n()).map(|t| x.row(t));
        match (place.kind, place.name) {
            (ExtentKind::Expert, "down") => {
                let seen = state.downs.entry(index).or_insert_with(|| ExpertRows { cols: x.cols(), rows: Vec::new() });
                rows().for_each(|row| seen.rows.extend_from_slice(row));
            }
            (ExtentKind::Expert, _) => {
                let (tokens, squares) = state.gates.entry(index).or_default();
                *tokens += x.n() as u64;
                squares.resize(x.cols(), 0.0);
                rows().for_each(|row| {
                    squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
                });
            }
            (kind, name) => {
                let layer = if place.layer == NO_LAYER { NO_LAYER } else { self.layer };
                let key = MatrixKey { kind, layer, name: name.to_owned(), index };
                let new = || Seen { moments: Moments::new(x.cols(), PANEL), rows: Vec::new() };
                let seen = state.matrices.entry(key).or_insert_with(new);
                for row in rows() {
                    seen.rows.extend_from_slice(row);
                    if seen.rows.len() == ROWS * x.cols() {
                        seen.flush(&self.kernels, &self.threads);
                    }
                }
            }
        }
    }
}

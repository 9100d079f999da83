//! Measures the size of the activations that meet each column of each matrix while a text runs through the model.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use sluice_format::{ColumnMeans, ExtentKind, Importance, MatrixKey, ModelSpec};
use sluice_kernels::Activations;

use sluice_model::compute::InputObserver;
use sluice_model::weights::MatrixPlace;

/// Sums squares of activations by matrix and column. Sums are f64: twice the memory of the resulting file.
#[derive(Debug, Default)]
pub struct Calibration {
    sums: Mutex<BTreeMap<MatrixKey, Sums>>,
}

#[derive(Debug, Default)]
struct Sums {
    tokens: u64,
    squares: Vec<f64>,
}

impl InputObserver for Calibration {
    fn inputs(&self, place: MatrixPlace, index: u32, x: &Activations) {
        // Routers are never quantised.
        if place.kind == ExtentKind::Router {
            return;
        }
        let key = MatrixKey { kind: place.kind, layer: place.layer, name: place.name.to_owned(), index };
        // The sums are valid at every instant, so a panic elsewhere does no harm.
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = sums.entry(key).or_default();
        sums.tokens += x.n() as u64;
        sums.squares.resize(x.cols(), 0.0);
        for t in 0..x.n() {
            sums.squares.iter_mut().zip(x.row(t)).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
    }
}

impl Calibration {
    /// Empty sums.
    pub fn new() -> Self {
        Self::default()
    }

    /// The importance that was measured while `tokens` tokens ran through a model with this spec.
    ///
    /// # Errors
    /// Names a matrix that has seen something other than numbers.
    pub fn importance(&self, spec: &ModelSpec, tokens: u64) -> Result<Importance, String> {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = |s: &Sums| ColumnMeans {
            tokens: s.tokens,
            mean_squares: s.squares.iter().map(|sum| (sum / s.tokens as f64) as f32).collect(),
        };
        let matrices: BTreeMap<_, _> =
            sums.iter().filter(|(_, s)| s.tokens > 0).map(|(key, s)| (key.clone(), mean(s))).collect();
        Importance::new(spec, tokens, matrices)
    }
}

//! Observes the inputs of the matrices of one layer.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use sluice_checksum::Xxh3;
use sluice_format::{ColumnMeans, ExtentKind, MatrixKey, NO_LAYER};
use sluice_kernels::{Activations, Kernels, Moments, ThreadPool};
use sluice_model::compute::InputObserver;
use sluice_model::weights::MatrixPlace;

use crate::inputs::{Common, ExpertRows, LayerInputs};

/// Inputs that several matrices can share, such as queries, keys and values.
struct Seen {
    moments: Moments,
    /// Digest of all rows so far.
    digest: u128,
}

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    /// Index in `seen` of a matrix's inputs, and the digest of its rows.
    matrices: BTreeMap<MatrixKey, (usize, u128)>,
    /// Whether matrices have met the same rows at first, and then different ones.
    parted: bool,
    /// Sum of squares of an expert's inputs, and number of tokens; the inputs themselves are also the router's.
    gates: BTreeMap<u32, (u64, Vec<f64>)>,
    /// Name of an expert's first matrix.
    first: Option<&'static str>,
    /// Inputs of an expert's second matrix.
    downs: BTreeMap<u32, ExpertRows>,
}

/// The inputs of one layer's matrices. All sums are formed in the order of the rows, whatever the order of experts.
pub(crate) struct Observer {
    kernels: Kernels,
    threads: ThreadPool,
    /// Number of the layer, which is 0 in its file.
    layer: u32,
    /// Columns that can compensate for each other's errors.
    panel: usize,
    /// Whether matrices that have met the same rows share their moments.
    shares: bool,
    state: Mutex<State>,
}

impl Observer {
    pub(crate) fn new(kernels: Kernels, threads: usize, layer: usize, panel: usize) -> Self {
        let threads = ThreadPool::new(threads);
        Observer { kernels, threads, layer: layer as u32, panel, shares: true, state: Mutex::default() }
    }

    /// Gives matrices that have met the same rows moments of their own.
    #[must_use]
    pub(crate) fn without_sharing(self) -> Self {
        Observer { shares: false, ..self }
    }

    /// The observed inputs. `None` if matrices that had met the same rows later met different ones: they must then be observed
    /// again, without sharing.
    pub(crate) fn finish(self) -> Option<LayerInputs> {
        let State { seen, matrices, parted, gates, first, downs } =
            self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        // A matrix that has fallen behind others has not met all rows that its moments contain.
        if parted || matrices.values().any(|&(number, digest)| self.shares && seen[number].digest != digest) {
            return None;
        }
        let gates = gates.into_iter().map(|(expert, (tokens, squares))| {
            let mean_squares = squares.iter().map(|sum| (sum / tokens.max(1) as f64) as f32).collect();
            (expert, ColumnMeans { tokens, mean_squares })
        });
        let common = seen.into_iter().map(|seen| Common::new(seen.moments)).collect();
        let matrices = matrices.into_iter().map(|(key, (number, _))| (key, number)).collect();
        let gates = (first.unwrap_or_default(), gates.collect());
        Some(LayerInputs::new(self.kernels, self.threads, self.layer, (common, matrices), gates, downs))
    }

    /// Inputs of a matrix that every token meets.
    fn common(&self, state: &mut State, key: MatrixKey, x: &Activations) {
        let before = state.matrices.get(&key).copied();
        let digest = if self.shares { digest(before.map_or(0, |(_, digest)| digest), x) } else { 0 };
        let same = state.seen.iter().position(|seen| self.shares && seen.digest == digest);
        let number = match (same, before) {
            // Another matrix has met all of these rows already.
            (Some(number), _) => number,
            (None, Some((number, before))) => {
                state.parted |= state.seen[number].digest != before;
                number
            }
            (None, None) => {
                state.seen.push(Seen { moments: Moments::new(x.cols(), self.panel), digest });
                state.seen.len() - 1
            }
        };
        if same.is_none() {
            state.seen[number].moments.add(&self.kernels, &self.threads, x);
            state.seen[number].digest = digest;
        }
        state.matrices.insert(key, (number, digest));
    }
}

/// The digest of rows after others; equal rows have equal bits.
fn digest(before: u128, x: &Activations) -> u128 {
    let mut hash = Xxh3::new();
    hash.update(&before.to_le_bytes());
    hash.update(&(x.cols() as u64).to_le_bytes());
    let mut bytes = [0; 1024];
    for t in 0..x.n() {
        for values in x.row(t).chunks(bytes.len() / size_of::<f32>()) {
            for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *to = value.to_le_bytes();
            }
            hash.update(&bytes[..size_of_val(values)]);
        }
    }
    hash.digest128()
}

impl InputObserver for Observer {
    fn inputs(&self, place: MatrixPlace, index: u32, x: &Activations) {
        // The sums are valid at every instant, so a panic elsewhere does no harm.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = || (0..x.n()).map(|t| x.row(t));
        match (place.kind, place.name) {
            (ExtentKind::Expert, "down") => {
                let seen = state.downs.entry(index).or_insert_with(|| ExpertRows { cols: x.cols(), rows: Vec::new() });
                rows().for_each(|row| seen.rows.extend_from_slice(row));
            }
            (ExtentKind::Expert, _) => {
                state.first = Some(place.name);
                let (tokens, squares) = state.gates.entry(index).or_default();
                *tokens += x.n() as u64;
                squares.resize(x.cols(), 0.0);
                rows().for_each(|row| {
                    squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
                });
            }
            (kind, name) => {
                let layer = if place.layer == NO_LAYER { NO_LAYER } else { self.layer };
                self.common(&mut state, MatrixKey { kind, layer, name: name.to_owned(), index }, x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_converter::measure::{Guide, Inputs as _};
    use sluice_kernels::Precision;

    use super::*;

    fn rows(n: usize, seed: f32) -> Activations {
        let x: Vec<f32> = (0..n * 64).map(|i| ((i as f32 + 1.0) * seed).sin()).collect();
        let mut rows = Activations::new(Precision::Exact);
        rows.set(&x, n, 64);
        rows
    }

    /// Means of a layer's inputs in two passes.
    fn seen(shares: bool, passes: [[(&'static str, f32); 3]; 2]) -> Option<Vec<(String, ColumnMeans)>> {
        let observer = Observer { shares, ..Observer::new(Kernels::scalar(), 1, 3, 2048) };
        for (name, seed) in passes.into_iter().flatten() {
            observer.inputs(MatrixPlace { kind: ExtentKind::Attention, layer: 0, name }, 0, &rows(40, seed));
        }
        let inputs = observer.finish()?;
        let key = |name: &str| MatrixKey { kind: ExtentKind::Attention, layer: 3, name: name.to_owned(), index: 0 };
        assert!(matches!(inputs.guide(&key("q")), Guide::Feedback(_)));
        assert!(matches!(inputs.guide(&key("other")), Guide::Nothing));
        Some(inputs.means().into_iter().map(|(key, means)| (key.name, means)).collect())
    }

    #[test]
    fn matrices_with_the_same_inputs_share_their_moments() {
        let passes = [[("q", 0.3), ("k", 0.3), ("o", 0.7)], [("q", 0.4), ("k", 0.4), ("o", 0.9)]];
        let (shared, alone) = (seen(true, passes).unwrap(), seen(false, passes).unwrap());
        assert_eq!(shared, alone);
        assert!(shared.iter().all(|(_, means)| means.tokens == 80));
    }

    #[test]
    fn matrices_that_part_are_noticed() {
        let of_leader = [[("q", 0.3), ("k", 0.3), ("o", 0.7)], [("q", 0.4), ("k", 0.5), ("o", 0.9)]];
        let left_behind = [[("q", 0.3), ("k", 0.3), ("o", 0.7)], [("q", 0.4), ("o", 0.5), ("o", 0.9)]];
        for passes in [of_leader, left_behind] {
            assert!(seen(true, passes).is_none());
            assert!(seen(false, passes).is_some());
        }
    }
}

//! Plain reading of memory in turns with tokens that find everything in memory: what a token cannot be faster than, measured at the same time.
//!
//! The speed of a shared machine changes within a second, by more than what is to be seen, so rates that were measured one after the other
//! cannot be compared. A token and the pass of reading behind it can: their ratio is taken pair by pair, and the median counts.

use std::collections::TryReserveError;

use serde::Serialize;
use sluice_kernels::{Kernels, READING_STREAMS, ThreadPool};
use sluice_lab::estimate::StepWork;
use sluice_model::memory::available_memory;
use sluice_model::{Engine, RuntimeError};
use sluice_storage::io::bench::median;

use super::bench_kernels::{Bench, TAME};
use crate::error::CliError;

/// Most bytes of a pass of reading: more than the caches hold, and all that a token touches if that is less.
const MOST_BYTES: usize = 256 << 20;
/// Fewest: what is less stays in the caches, and reading it says nothing about memory.
const LEAST_BYTES: usize = 32 << 20;
/// Passes by which the best loop is chosen, of each.
const TRIED: usize = 5;

/// What tokens reach of plain reading.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct OfReading {
    /// Bytes of weights, keys and values that a token touches.
    touched_bytes: f64,
    /// Bytes per second of the best loop that only reads: the median of its passes.
    pub(super) reading_bytes_per_second: f64,
    /// Time that reading so many bytes takes ÷ time of the token, pair by pair: the median.
    pub(super) part: f64,
    /// Pairs.
    pub(super) pairs: usize,
}

/// Memory that is read in turns with an engine's tokens.
pub(super) struct Memory {
    kernels: Kernels,
    threads: usize,
    data: Vec<u8>,
    touched: f64,
}

impl Memory {
    /// Memory of the size that a token of this engine touches at a mean `position`. `None` if not all of the model stays in memory, if a token
    /// touches too little to say anything, or if there is no such memory beside the model.
    ///
    /// # Errors
    /// [`CliError::Runtime`] on a processor without kernels.
    pub(super) fn beside(engine: &Engine, position: f64) -> Result<Option<Self>, CliError> {
        let plan = engine.memory();
        if plan.slots < plan.experts || plan.dense_streamed > 0 {
            return Ok(None);
        }
        let routed = engine.spec().layers.iter().filter_map(|layer| layer.ffn.moe.as_ref());
        let experts: usize = routed.map(|moe| moe.top_k).sum();
        let touched = StepWork::of(engine.file(), 1, experts as f64, position, plan.kv_type).touched_bytes;
        let len = (touched as usize).min(MOST_BYTES);
        if len < LEAST_BYTES || available_memory() < 2 * len as u64 {
            return Ok(None);
        }
        let kernels = Kernels::detect().map_err(RuntimeError::from)?;
        let data = filled(len).ok();
        Ok(data.map(|data| Memory { kernels, threads: engine.threads(), data, touched }))
    }

    /// Ready to be read, by the loop that is best here.
    pub(super) fn turns(&self) -> Turns<'_> {
        let Memory { kernels, threads, data, touched } = self;
        let bench = Bench { kernels: *kernels, pool: ThreadPool::new(*threads), data };
        let tried = READING_STREAMS.map(|streams| {
            let seconds: Vec<_> = (0..TRIED).map(|_| bench.read_by(data, streams)).collect();
            (streams, median(&seconds))
        });
        let best = tried.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(1, |(streams, _)| streams);
        Turns { bench, streams: best, touched: *touched, pairs: Vec::new() }
    }
}

fn filled(len: usize) -> Result<Vec<u8>, TryReserveError> {
    let mut data = Vec::new();
    data.try_reserve_exact(len)?;
    data.resize(len, TAME);
    Ok(data)
}

/// Reading in turns with tokens.
pub(super) struct Turns<'a> {
    bench: Bench<'a>,
    streams: usize,
    touched: f64,
    /// Seconds of tokens and of a pass of reading behind each.
    pairs: Vec<(f64, f64)>,
}

impl Turns<'_> {
    /// Reads once, behind a token that took so many seconds and has waited for no drive.
    pub(super) fn after(&mut self, token: f64) {
        self.pairs.push((token, self.bench.read_by(self.bench.data, self.streams)));
    }

    /// What the tokens reached; `None` without tokens.
    pub(super) fn outcome(&self) -> Option<OfReading> {
        of_pairs(&self.pairs, self.bench.data.len() as f64, self.touched)
    }
}

/// `read`: bytes of a pass of reading; `touched`: bytes that a token touches.
fn of_pairs(pairs: &[(f64, f64)], read: f64, touched: f64) -> Option<OfReading> {
    if pairs.is_empty() {
        return None;
    }
    let of = |value: &dyn Fn(&(f64, f64)) -> f64| median(&pairs.iter().map(value).collect::<Vec<_>>());
    Some(OfReading {
        touched_bytes: touched,
        reading_bytes_per_second: of(&|(_, reading)| read / reading),
        part: of(&|(token, reading)| reading * touched / read / token),
        pairs: pairs.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_with_the_reading_behind_them() {
        assert_eq!(of_pairs(&[], 1e8, 2e8), None);
        // By hand: a token touches twice as many bytes as a pass reads. At half the speed of the machine both take twice as long.
        let pairs = [(0.025, 0.01), (0.05, 0.02), (0.5, 0.01)];
        let OfReading { reading_bytes_per_second, part, pairs, .. } = of_pairs(&pairs, 1e8, 2e8).expect("some");
        assert_eq!((reading_bytes_per_second, pairs), (1e10, 3));
        assert!((part - 0.8).abs() < 1e-9, "{part}");
    }
}

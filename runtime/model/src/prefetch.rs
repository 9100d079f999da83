//! Prefetch: experts that the next layer will probably choose are read before its router can say.
//!
//! The residual stream changes little from layer to layer, so the next layer's router, applied to the current state, names
//! most of what it will name later (measured elsewhere: 74–89 % of the slots of Qwen3 and GLM models). What matters is how
//! often that is right about experts that are *not* in memory, and that depends on model and cache. So it is learned, per
//! rank of the candidate, from every token, whether the candidate was read or not.

use sluice_kernels::Activations;

use super::compute::{Compute, sized};
use super::experts::Routed;
use super::norm::{Norm, NormScratch};
use super::router::{RouterScratch, rank};
use sluice_storage::pool::LayerPass;

/// Ranks beyond the router's top-k that are watched: where they turn out to be likely enough, they are read as well.
const EXTRA_RANKS: usize = 4;
/// Weight of one observation in the learned probabilities: the last hundred or so count.
const LEARNING_RATE: f32 = 1.0 / 64.0;
/// How sure a prefetch must be. A wrong one is done while the drive would idle, but takes a slot, the chunk in flight when a
/// demand read arrives, and, where cores are scarce, what the cores could have computed instead.
const LEAST_PROBABILITY: f32 = 0.75;
/// What is believed of the router's top-k and of the ranks beyond it before anything was observed.
const FIRST_BELIEF: (f32, f32) = (0.6, 0.3);

/// The next layer, as far as a prefetch needs it.
pub struct NextLayer<'a> {
    /// Its number.
    pub(super) layer: usize,
    pub(super) routed: &'a Routed,
    /// The norm of what its router sees; `None`: that is normalised already, and so is what stands for it here.
    pub(super) norm: Option<&'a Norm>,
    /// On what the layer before it adds to the residual stream; 0 where what it adds follows from all of its parts.
    pub(super) factor: f32,
    /// Bytes of its router extent.
    pub(super) extent: &'a [u8],
}

/// The candidates for a layer, and how often those of each rank have been right.
#[derive(Debug)]
pub struct Prefetcher {
    enabled: bool,
    /// Probability that an absent candidate of this rank is right.
    right: Vec<f32>,
    /// Layer that the candidates are of.
    layer: usize,
    /// Absent candidates: rank and expert, each expert once, by the best rank that any row gave it.
    candidates: Vec<(usize, u32)>,
    ranked: Vec<u32>,
    wanted: Vec<u32>,
    state: Vec<f32>,
    normed: Vec<f32>,
    norm: NormScratch,
    logits: Vec<f32>,
    bias: Vec<f32>,
    activations: Activations,
    router: RouterScratch,
}

impl Prefetcher {
    /// Knows nothing yet. When not `enabled`, never prefetches.
    pub fn new(enabled: bool, compute: &Compute) -> Self {
        Prefetcher {
            enabled,
            right: Vec::new(),
            layer: usize::MAX,
            candidates: Vec::new(),
            ranked: Vec::new(),
            wanted: Vec::new(),
            state: Vec::new(),
            normed: Vec::new(),
            norm: NormScratch::default(),
            logits: Vec::new(),
            bias: Vec::new(),
            activations: Activations::new(compute.precision),
            router: RouterScratch::default(),
        }
    }

    /// Gives all buffers back; what was learned stays.
    pub fn give_back(&mut self, compute: &Compute) {
        let right = std::mem::take(&mut self.right);
        *self = Prefetcher { right, ..Prefetcher::new(self.enabled, compute) };
    }

    /// Whether prefetches are wanted at all.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Learns from what the router of `layer` chose: `experts` are distinct and ascending.
    pub fn judge(&mut self, layer: usize, experts: &[u32]) {
        if self.layer != layer {
            return;
        }
        for &(rank, expert) in &self.candidates {
            let right = f32::from(u8::from(experts.binary_search(&expert).is_ok()));
            self.right[rank] += (right - self.right[rank]) * LEARNING_RATE;
        }
        self.candidates.clear();
        self.layer = usize::MAX;
    }

    /// Applies the next layer's router to `residual + factor · delta`, both `[rows, hidden]`, the state of the rows as far as it is
    /// known, or to what this layer's router saw where the next one's input is joined of streams, and starts to read what is likely
    /// enough. Where a table says which experts the tokens `ids` have, all of them are read.
    pub fn prefetch(
        &mut self,
        compute: &Compute,
        next: &NextLayer<'_>,
        (ids, residual): (&[u32], &[f32]),
        delta: &[f32],
        pass: &mut LayerPass<'_>,
    ) {
        if let Some(table) = next.routed.table() {
            self.wanted.clear();
            for &token in ids {
                // An error is the router's to report.
                if table.experts(next.extent, token, &mut self.ranked).is_ok() {
                    self.wanted.extend(self.ranked.iter().filter(|expert| !pass.has(next.layer as u32, **expert)));
                }
            }
            self.wanted.sort_unstable();
            self.wanted.dedup();
            return pass.prefetch(next.layer as u32, &self.wanted);
        }
        let rows = ids.len();
        let hidden = residual.len() / rows;
        let normed = sized(&mut self.normed, rows * hidden);
        if let Some(norm) = next.norm {
            let state = sized(&mut self.state, rows * hidden);
            state.iter_mut().zip(residual.iter().zip(delta)).for_each(|(s, (r, d))| *s = r + next.factor * d);
            norm.apply(next.extent, state, &mut self.norm, normed);
        } else {
            normed.copy_from_slice(residual);
        }
        self.activations.set(normed, rows, hidden);
        let logits = sized(&mut self.logits, rows * next.routed.experts());
        let bias = next.routed.logits(compute, next.extent, &self.activations, &mut self.bias, logits);
        let top_k = next.routed.top_k();
        self.layer = next.layer;
        self.candidates.clear();
        for logits in logits.chunks_exact(next.routed.experts()) {
            rank(next.routed.spec(), logits, bias, top_k + EXTRA_RANKS, &mut self.router, &mut self.ranked);
            let absent = self.ranked.iter().enumerate().filter(|(_, expert)| !pass.has(next.layer as u32, **expert));
            self.candidates.extend(absent.map(|(rank, &expert)| (rank, expert)));
        }
        self.candidates.sort_unstable_by_key(|&(rank, expert)| (expert, rank));
        self.candidates.dedup_by_key(|&mut (_, expert)| expert);
        self.candidates.sort_unstable();

        while self.right.len() < top_k + EXTRA_RANKS {
            self.right.push(if self.right.len() < top_k { FIRST_BELIEF.0 } else { FIRST_BELIEF.1 });
        }
        self.wanted.clear();
        let sure = self.candidates.iter().filter(|(rank, _)| self.right[*rank] >= LEAST_PROBABILITY);
        self.wanted.extend(sure.map(|&(_, expert)| expert));
        pass.prefetch(next.layer as u32, &self.wanted);
    }
}

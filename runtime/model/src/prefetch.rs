//! Prefetch: experts that the next layer will probably choose are read before its router can decide.
//!
//! The residual stream changes little from layer to layer, so the next layer's router, applied to the current state, names most of
//! the experts that it will name later (measured elsewhere: 74–89 % of the slots of Qwen3 and GLM models). What matters is how
//! often it is right about experts that are *not* in memory, which depends on the model and the cache. So that is learned
//! separately for each rank of a candidate, from every token, whether the candidate was read or not.
//!
//! A layer is looked at twice: while the layer before it computes its experts, and before its own attention, if the drive has nothing to
//! do then. By then the state has all that the layer before adds, so it names some of the experts that were not named earlier; and the
//! first layer with experts has no other layer to name its own.
//!
//! A long prompt uses nearly all experts of every layer ([`uses_all`]), so no router is asked: the pool reads those of the next layer when
//! those of this one are on their way.

use sluice_kernels::Activations;

use super::compute::{Compute, sized};
use super::experts::Routed;
use super::norm::{Norm, NormScratch};
use super::router::{RouterScratch, rank};
use super::rows::Rows;
use sluice_storage::pool::{LayerPass, Pool};

/// Ranks beyond the router's top-k that are watched: if they turn out to be likely enough, they are read too.
const EXTRA_RANKS: usize = 4;
/// Weight of one observation in the learned probabilities: the last hundred or so count.
const LEARNING_RATE: f32 = 1.0 / 64.0;
/// How sure a prefetch must be. A wrong one is read while the drive would be idle, but it takes a slot, it occupies the drive for
/// one chunk if a demand read arrives, and if cores are scarce, it takes time in which they could have computed.
const LEAST_PROBABILITY: f32 = 0.75;
/// The probabilities that are assumed before anything was observed: for the router's top-k, and for the ranks beyond it.
const FIRST_BELIEF: (f32, f32) = (0.6, 0.3);

/// Choices of a pass for each expert of a layer with which nearly all of them are chosen: by chance, 98 %.
const CHOICES_FOR_ALL: usize = 4;

/// Whether a pass that reads a prompt is so long that it uses nearly all experts of a layer.
pub fn uses_all(routed: &Routed, rows: &Rows) -> bool {
    !rows.generate() && rows.len() * routed.top_k() >= CHOICES_FOR_ALL * routed.experts()
}

/// The parts of a layer that prefetches of its experts need.
pub struct NextLayer<'a> {
    /// Its number.
    pub(super) layer: usize,
    pub(super) routed: &'a Routed,
    /// The norm before its router; `None`: the router's input is normalised already, and so is what stands in for it here.
    pub(super) norm: Option<&'a Norm>,
    /// Factor of what the layer before it adds to the residual stream; 0 if only all of its parts together determine what it adds.
    pub(super) factor: f32,
    /// Bytes of its router extent.
    pub(super) extent: &'a [u8],
}

/// The candidates for a layer, and how often candidates of each rank have been right.
#[derive(Debug)]
struct Look {
    /// Probability that an absent candidate of this rank is right.
    right: Vec<f32>,
    /// Layer of the candidates.
    layer: usize,
    /// Absent candidates: rank and expert. Each expert occurs once, with the best rank that any row gave it.
    candidates: Vec<(usize, u32)>,
}

impl Look {
    /// Knows nothing but how often candidates have been right.
    fn new(right: Vec<f32>) -> Self {
        Look { right, layer: usize::MAX, candidates: Vec::new() }
    }

    /// Learns from the choice of `layer`'s router: `experts` are distinct and ascending.
    fn judge(&mut self, layer: usize, experts: &[u32]) {
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

    /// Puts the candidates into order and leaves those that are likely enough in `wanted`, the likeliest first.
    fn choose(&mut self, top_k: usize, wanted: &mut Vec<u32>) {
        self.candidates.sort_unstable_by_key(|&(rank, expert)| (expert, rank));
        self.candidates.dedup_by_key(|&mut (_, expert)| expert);
        self.candidates.sort_unstable();
        while self.right.len() < top_k + EXTRA_RANKS {
            self.right.push(if self.right.len() < top_k { FIRST_BELIEF.0 } else { FIRST_BELIEF.1 });
        }
        wanted.clear();
        let sure = self.candidates.iter().filter(|(rank, _)| self.right[*rank] >= LEAST_PROBABILITY);
        wanted.extend(sure.map(|&(_, expert)| expert));
    }
}

/// When a layer is looked at.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// While the layer before it computes its experts.
    Before,
    /// Before its attention.
    Own,
}

/// Finds the experts that a layer will probably choose.
#[derive(Debug)]
pub struct Prefetcher {
    enabled: bool,
    /// From the layer before.
    before: Look,
    /// From the layer itself, before its attention.
    own: Look,
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
    /// Knows nothing yet. If not `enabled`, it never prefetches.
    pub fn new(enabled: bool, compute: &Compute) -> Self {
        Prefetcher {
            enabled,
            before: Look::new(Vec::new()),
            own: Look::new(Vec::new()),
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

    /// Frees all buffers; what was learned stays.
    pub fn give_back(&mut self, compute: &Compute) {
        let again = |look: &mut Look| Look::new(std::mem::take(&mut look.right));
        let (before, own) = (again(&mut self.before), again(&mut self.own));
        *self = Prefetcher { before, own, ..Prefetcher::new(self.enabled, compute) };
    }

    /// Whether prefetches are wanted at all.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Learns from the choice of `layer`'s router: `experts` are distinct and ascending.
    pub fn judge(&mut self, layer: usize, experts: &[u32]) {
        self.before.judge(layer, experts);
        self.own.judge(layer, experts);
    }

    /// Applies the next layer's router and starts to read the experts that are likely enough. The router's input is `residual +
    /// factor · delta`, both `[rows, hidden]`, which is the state of the rows as far as it is known; or, if the next layer's input
    /// is joined from streams, the input of this layer's router. If a table lists the experts of the tokens `ids`, all of them are
    /// read.
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
                // The router will report this error.
                if table.experts(next.extent, token, &mut self.ranked).is_ok() {
                    self.wanted.extend(self.ranked.iter().filter(|expert| !pass.has(next.layer as u32, **expert)));
                }
            }
            self.wanted.sort_unstable();
            self.wanted.dedup();
            return pass.prefetch(next.layer as u32, &self.wanted);
        }
        let mut state = std::mem::take(&mut self.state);
        let input = match next.norm {
            Some(_) => {
                let state = sized(&mut state, residual.len());
                state.iter_mut().zip(residual.iter().zip(delta)).for_each(|(s, (r, d))| *s = r + next.factor * d);
                &*state
            }
            None => residual,
        };
        self.name(compute, next, (ids.len(), input), Stage::Before, &|expert| pass.has(next.layer as u32, expert));
        self.state = state;
        pass.prefetch(next.layer as u32, &self.wanted);
    }

    /// Applies the router of a layer to the state `[rows, hidden]` before its attention, and starts to read the experts that are
    /// likely enough.
    pub fn prefetch_own(
        &mut self,
        compute: &Compute,
        layer: &NextLayer<'_>,
        (rows, state): (usize, &[f32]),
        pool: &mut Pool,
    ) {
        if layer.routed.table().is_none() {
            self.name(compute, layer, (rows, state), Stage::Own, &|expert| pool.has(layer.layer as u32, expert));
            pool.prefetch(layer.layer as u32, &self.wanted);
        }
    }

    /// Leaves in `wanted` the absent experts that the router of a layer will probably choose, by the state `[rows, hidden]`.
    fn name(
        &mut self,
        compute: &Compute,
        next: &NextLayer<'_>,
        (rows, state): (usize, &[f32]),
        stage: Stage,
        is_here: &dyn Fn(u32) -> bool,
    ) {
        let hidden = state.len() / rows;
        let normed = sized(&mut self.normed, rows * hidden);
        match next.norm {
            Some(norm) => norm.apply(next.extent, state, &mut self.norm, normed),
            None => normed.copy_from_slice(state),
        }
        self.activations.set(normed, rows, hidden);
        let logits = sized(&mut self.logits, rows * next.routed.experts());
        let bias = next.routed.logits(compute, next.extent, &self.activations, &mut self.bias, logits);
        let top_k = next.routed.top_k();
        let look = match stage {
            Stage::Before => &mut self.before,
            Stage::Own => &mut self.own,
        };
        look.layer = next.layer;
        look.candidates.clear();
        for logits in logits.chunks_exact(next.routed.experts()) {
            rank(next.routed.spec(), logits, bias, top_k + EXTRA_RANKS, &mut self.router, &mut self.ranked);
            let absent = self.ranked.iter().enumerate().filter(|(_, expert)| !is_here(**expert));
            look.candidates.extend(absent.map(|(rank, &expert)| (rank, expert)));
        }
        look.choose(top_k, &mut self.wanted);
    }
}

//! The feed-forward part of a layer: router, dense part, routed experts.

use std::time::{Duration, Instant};

use sluice_format::{FfnSpec, MoeSpec};
use sluice_kernels::{Activations, sigmoid};

use super::ModelError;
use super::compute::{Compute, sized};
use super::foresight::{Foresight, NextLayer};
use super::gated::{GatedFfn, GatedScratch, Progress};
use super::router::{Choice, RouterScratch, route};
use super::tally::{Tallied, Tally};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};
use crate::pool::{Arrival, ExpertGuard, ExpertPart, LayerPass, Pool, Routing};

/// Bytes of an expert that are worth computing with before the next ones are there: some 20 µs of work for two cores.
const PART_BYTES: usize = 512 << 10;

/// Router matrix and its bias, as places in the router extent.
#[derive(Debug)]
pub struct Router {
    matrix: MatrixRef,
    /// Added to the logits.
    logit_bias: Option<VectorRef>,
    /// Added to the scores for the choice.
    choice_bias: Option<VectorRef>,
}

/// The feed-forward part of one layer.
#[derive(Debug)]
pub struct Ffn {
    dense: Option<GatedFfn>,
    dense_gate: Option<MatrixRef>,
    routed: Option<Routed>,
}

#[derive(Debug)]
pub(super) struct Routed {
    spec: MoeSpec,
    router: Router,
    expert: GatedFfn,
    /// Bytes of an expert's extent.
    expert_len: usize,
}

/// One use of an expert: which token, and which of its choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Assignment {
    expert: u32,
    token: u32,
    choice: u32,
}

/// An expert that is computed while it is still being read.
#[derive(Debug)]
struct Early {
    /// Which one.
    expert: Option<u32>,
    progress: Progress,
    tally: Tally,
    gated: GatedScratch,
    /// Its output, `[hidden]`.
    output: Vec<f32>,
    /// Experts of the current pass whose output is in its place before they came as a whole, and their checksums, unless
    /// nobody wants to know them.
    computed: Vec<(u32, Option<u64>)>,
}

impl Early {
    fn new(compute: &Compute) -> Self {
        Early {
            expert: None,
            progress: Progress::default(),
            tally: Tally::default(),
            gated: GatedScratch::new(compute),
            output: Vec::new(),
            computed: Vec::new(),
        }
    }
}

/// Buffers that the feed-forward part reuses from call to call.
#[derive(Debug)]
pub struct FfnScratch {
    x: Activations,
    gathered: Activations,
    gated: GatedScratch,
    tally: Tally,
    early: Early,
    gate: Vec<f32>,
    logits: Vec<f32>,
    bias: Vec<f32>,
    router: RouterScratch,
    choices: Vec<Choice>,
    assignments: Vec<Assignment>,
    experts: Vec<u32>,
    tokens: Vec<u32>,
    /// One expert's output, `[its tokens, hidden]`.
    output: Vec<f32>,
    /// Every expert's output, `[tokens, top_k, hidden]`: summed at the end in a fixed order, whatever the order of arrival.
    outputs: Vec<f32>,
    foresight: Foresight,
}

impl FfnScratch {
    /// Empty buffers; they grow to what the first call needs.
    pub fn new(compute: &Compute, prefetch: bool) -> Self {
        let activations = || Activations::new(compute.precision);
        FfnScratch {
            x: activations(),
            gathered: activations(),
            gated: GatedScratch::new(compute),
            tally: Tally::default(),
            early: Early::new(compute),
            gate: Vec::new(),
            logits: Vec::new(),
            bias: Vec::new(),
            router: RouterScratch::default(),
            choices: Vec::new(),
            assignments: Vec::new(),
            experts: Vec::new(),
            tokens: Vec::new(),
            output: Vec::new(),
            outputs: Vec::new(),
            foresight: Foresight::new(prefetch, compute),
        }
    }

    /// Whether the next layer's experts are to be guessed.
    pub(super) fn looks_ahead(&self) -> bool {
        self.foresight.enabled()
    }

    /// The choices of the last call, `[tokens, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }
}

/// Bytes of memory for the checksums of experts of `len` bytes: of one that is there and of one that is being read.
pub(super) fn tally_memory(len: u64) -> u64 {
    2 * Tally::memory(len)
}

/// Verifies an expert before it is computed.
fn settle_first(compute: &Compute, expert: &mut ExpertGuard<'_>, tally: &mut Tally) -> bool {
    if expert.is_verified() {
        return true;
    }
    let bytes = expert.bytes();
    let tally = tally.begin(bytes.len());
    compute.threads.run(bytes.len().div_ceil(PART_BYTES), &|piece| {
        let range = piece * PART_BYTES..((piece + 1) * PART_BYTES).min(bytes.len());
        tally.add(&compute.kernels, bytes, range);
    });
    let checksum = tally.checksum(&compute.kernels);
    expert.settle(checksum)
}

/// The dense parts of a layer in memory.
#[derive(Clone, Copy)]
pub struct FfnExtents<'a> {
    /// Bytes of the router extent.
    pub router: &'a [u8],
    /// Bytes of the dense extent, if the layer has one.
    pub dense: Option<&'a [u8]>,
}

impl Ffn {
    pub(super) fn new(
        spec: &FfnSpec,
        router: &ExtentTensors<'_>,
        dense: &ExtentTensors<'_>,
        expert: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let routed = match &spec.moe {
            None => None,
            Some(moe) => Some(Routed {
                spec: moe.clone(),
                router: Router {
                    matrix: router.matrix("router")?,
                    logit_bias: moe.router.logit_bias.then(|| router.vector("router_logit_bias")).transpose()?,
                    choice_bias: moe.router.choice_bias.then(|| router.vector("router_bias")).transpose()?,
                },
                expert: GatedFfn::new(moe.width, spec.activation, moe.expert_bias, expert)?,
                expert_len: expert.extent_len(),
            }),
        };
        let dense_gate = spec.dense_gate.then(|| dense.matrix("dense_gate")).transpose()?;
        let dense = match spec.dense_width {
            0 => None,
            width => Some(GatedFfn::new(width, spec.activation, false, dense)?),
        };
        Ok(Ffn { dense, dense_gate, routed })
    }

    /// The routed experts, if the layer has any.
    pub(super) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    /// The feed-forward part of `n` tokens: reads `x` `[n, hidden]` (normalised), writes `out` `[n, hidden]`.
    /// `lookahead`: the residual stream before this part and the next layer, to read ahead for it.
    /// Returns the time spent in routed experts, without waiting for them.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when an expert cannot be read or is damaged.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, state, scratch and output of one step; a struct would only rename them"
    )]
    pub fn forward(
        &self,
        compute: &Compute,
        extents: FfnExtents<'_>,
        pool: &mut Pool,
        layer: usize,
        n: usize,
        x: &[f32],
        lookahead: Option<(&[f32], NextLayer<'_>)>,
        scratch: &mut FfnScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let hidden = x.len() / n;
        scratch.x.set(x, n, hidden);
        scratch.choices.clear();
        let mut pass = match &self.routed {
            None => None,
            Some(routed) => {
                routed.route(compute, extents.router, n, scratch);
                // One token is decoded; several are a prompt, whose sweep says little about what comes next.
                let routing = Routing { tokens: n, prefill: n > 1, choices: &scratch.choices };
                Some(pool.begin_layer(layer as u32, &scratch.experts, &routing)?)
            }
        };
        // The reads are under way: what every token needs is computed meanwhile.
        match (&self.dense, extents.dense) {
            (Some(dense), Some(bytes)) => {
                dense.forward(compute, Tallied::not(bytes), 0, &scratch.x, &mut scratch.gated, out);
                self.gate_dense(compute, bytes, n, scratch, out);
            }
            _ => out.fill(0.0),
        }
        let (Some(routed), Some(pass)) = (&self.routed, &mut pass) else { return Ok(Duration::ZERO) };
        scratch.foresight.judge(layer, &scratch.experts);
        if let Some((residual, next)) = lookahead {
            scratch.foresight.look_ahead(compute, &next, residual, out, pass);
        }
        let time = routed.run(compute, pass, n, hidden, scratch)?;
        routed.sum(compute, n, hidden, scratch, out);
        Ok(time)
    }
}

impl Ffn {
    /// Multiplies the dense part's output by the sigmoid of its gate (Qwen's shared expert).
    fn gate_dense(&self, compute: &Compute, extent: &[u8], n: usize, scratch: &mut FfnScratch, out: &mut [f32]) {
        let Some(matrix) = &self.dense_gate else { return };
        let gate = sized(&mut scratch.gate, n);
        compute.multiply(matrix, extent, &scratch.x, gate);
        for (row, gate) in out.chunks_exact_mut(out.len() / n).zip(gate) {
            let gate = sigmoid(*gate);
            row.iter_mut().for_each(|o| *o *= gate);
        }
    }
}

impl Routed {
    pub(super) fn spec(&self) -> &MoeSpec {
        &self.spec
    }

    pub(super) fn experts(&self) -> usize {
        self.spec.experts
    }

    pub(super) fn top_k(&self) -> usize {
        self.spec.top_k
    }

    /// The router's `logits` `[x.n(), experts]`. Returns the bias of the choice, which lives in `vector`.
    pub(super) fn logits<'v>(
        &self,
        compute: &Compute,
        extent: &[u8],
        x: &Activations,
        vector: &'v mut Vec<f32>,
        logits: &mut [f32],
    ) -> Option<&'v [f32]> {
        compute.kernels.matmul(&compute.threads, self.router.matrix.view(extent), x, logits);
        if let Some(bias) = &self.router.logit_bias {
            bias.read(extent, vector);
            for row in logits.chunks_exact_mut(self.spec.experts) {
                row.iter_mut().zip(&*vector).for_each(|(l, b)| *l += b);
            }
        }
        let bias = self.router.choice_bias.as_ref()?;
        bias.read(extent, vector);
        Some(vector)
    }

    /// Fills `choices`, `assignments` (by expert, then token) and `experts` (distinct, ascending).
    fn route(&self, compute: &Compute, extent: &[u8], n: usize, s: &mut FfnScratch) {
        let logits = sized(&mut s.logits, n * self.spec.experts);
        let bias = self.logits(compute, extent, &s.x, &mut s.bias, logits);
        for logits in logits.chunks_exact(self.spec.experts) {
            route(&self.spec, logits, bias, &mut s.router, &mut s.choices);
        }
        s.assignments.clear();
        s.assignments.extend(s.choices.iter().enumerate().map(|(i, c)| Assignment {
            expert: c.expert,
            token: (i / self.spec.top_k) as u32,
            choice: i as u32,
        }));
        s.assignments.sort_unstable();
        s.experts.clear();
        s.experts.extend(s.assignments.iter().map(|a| a.expert));
        s.experts.dedup();
    }

    /// Computes the experts as the pool hands them out, each into its own rows of `outputs`.
    fn run(
        &self,
        compute: &Compute,
        pass: &mut LayerPass<'_>,
        n: usize,
        hidden: usize,
        s: &mut FfnScratch,
    ) -> Result<Duration, ModelError> {
        let mut time = Duration::ZERO;
        sized(&mut s.outputs, n * self.spec.top_k * hidden);
        self.prepare(hidden, s);
        // Who observes inputs keeps what it sees: that has to be right at once.
        let observed = compute.observer.is_some();
        let parts = (n == 1 && !observed).then_some(PART_BYTES.min(self.expert_len / 2));
        loop {
            let arrival = pass.arrival(parts)?;
            let started = Instant::now();
            match arrival {
                Some(Arrival::Whole(mut expert)) => {
                    if !observed || settle_first(compute, &mut expert, &mut s.tally) {
                        self.compute_whole(compute, expert, hidden, s);
                    }
                }
                Some(Arrival::Part(part)) => self.compute_part(compute, part, hidden, s),
                None => return Ok(time),
            }
            time += started.elapsed();
        }
    }

    /// Makes room for parts and tallies, whether any come or not: when they do is a matter of time, and must not cost an
    /// allocation.
    fn prepare(&self, hidden: usize, s: &mut FfnScratch) {
        let early = &mut s.early;
        early.expert = None;
        early.computed.clear();
        if early.output.len() < hidden {
            sized(&mut early.output, hidden);
            early.computed.reserve(self.spec.top_k);
            self.expert.reserve(&mut early.gated);
        }
        early.tally.reserve(self.expert_len);
        s.tally.reserve(self.expert_len);
    }

    /// Computes an expert that is there, and its checksum if it is not known to be right. If it turns out to be wrong, the
    /// pool reads the expert again, and it comes once more.
    fn compute_whole(&self, compute: &Compute, mut expert: ExpertGuard<'_>, hidden: usize, s: &mut FfnScratch) {
        let id = expert.expert();
        if s.early.expert == Some(id) {
            let wanted = !expert.is_verified();
            self.advance_early(compute, expert.bytes(), expert.bytes().len(), wanted, hidden, s);
        }
        if let Some(at) = s.early.computed.iter().position(|computed| computed.0 == id) {
            if let (_, Some(checksum)) = s.early.computed.swap_remove(at) {
                expert.settle(checksum);
            }
            return;
        }
        let first = s.assignments.partition_point(|a| a.expert < id);
        let last = s.assignments.partition_point(|a| a.expert <= id);
        let uses = &s.assignments[first..last];
        s.tokens.clear();
        s.tokens.extend(uses.iter().map(|a| a.token));
        s.gathered.gather(&s.x, &s.tokens);
        let output = sized(&mut s.output, uses.len() * hidden);
        let tally = (!expert.is_verified()).then(|| s.tally.begin(expert.bytes().len()));
        let extent = Tallied { bytes: expert.bytes(), tally };
        self.expert.forward(compute, extent, id, &s.gathered, &mut s.gated, output);
        let checksum = extent.tally.map(|tally| tally.checksum(&compute.kernels));
        for (a, row) in uses.iter().zip(output.chunks_exact(hidden)) {
            s.outputs[a.choice as usize * hidden..][..hidden].copy_from_slice(row);
        }
        if let Some(checksum) = checksum {
            expert.settle(checksum);
        }
    }

    /// Goes on with an expert of which more has arrived.
    fn compute_part(&self, compute: &Compute, part: ExpertPart<'_>, hidden: usize, s: &mut FfnScratch) {
        let (bytes, len) = (part.bytes(), part.len());
        if s.early.expert != Some(part.expert()) {
            s.early.expert = Some(part.expert());
            s.early.progress = Progress::default();
            s.early.tally.begin(len);
        }
        self.advance_early(compute, bytes, len, !part.is_verified(), hidden, s);
        let more_at = s.early.expert.map(|_| (bytes.len() + PART_BYTES).min(len));
        part.more_at(more_at);
    }

    /// Computes what `prefix` allows of the expert in `s.early`, whose extent has `len` bytes; when that is all of it, puts its
    /// output into its place. `tallied`: the checksum is wanted.
    fn advance_early(
        &self,
        compute: &Compute,
        prefix: &[u8],
        len: usize,
        tallied: bool,
        hidden: usize,
        s: &mut FfnScratch,
    ) {
        let Early { expert, progress, tally, gated, output, computed } = &mut s.early;
        let Some(id) = *expert else { return };
        let output = &mut output[..hidden];
        let prefix = Tallied { bytes: prefix, tally: tallied.then_some(&*tally) };
        self.expert.advance(compute, prefix, len, &s.x, progress, gated, output);
        if !progress.is_done() {
            return;
        }
        let at = s.assignments.partition_point(|a| a.expert < id);
        let choice = s.assignments[at].choice as usize;
        s.outputs[choice * hidden..][..hidden].copy_from_slice(output);
        computed.push((id, prefix.tally.map(|tally| tally.checksum(&compute.kernels))));
        *expert = None;
    }

    /// Adds the weighted outputs in ascending order of expert, then the dense part that `out` already holds.
    fn sum(&self, compute: &Compute, n: usize, hidden: usize, s: &FfnScratch, out: &mut [f32]) {
        let top_k = self.spec.top_k;
        compute.threads.for_each_chunk(&mut out[..n * hidden], hidden, &|t, out| {
            let choices = &s.choices[t * top_k..][..top_k];
            let rows = &s.outputs[t * top_k * hidden..][..top_k * hidden];
            for (i, out) in out.iter_mut().enumerate() {
                let routed = choices.iter().enumerate().fold(0.0, |sum, (j, c)| sum + c.weight * rows[j * hidden + i]);
                *out += routed;
            }
        });
    }
}

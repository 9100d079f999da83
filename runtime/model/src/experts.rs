//! The routed experts of a layer: which rows use which, computing them as they come, and the sums of what they give.
//!
//! A row's outputs are added in ascending order of expert, whatever the order in which experts arrive, so that the order of
//! arrival cannot be seen in the result. There are two ways to that, with the same bits ([`Combining`]).

use std::time::{Duration, Instant};

use sluice_format::{ActivationSpec, MoeSpec};
use sluice_kernels::Activations;

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::gated::{Begun, GatedFfn, GatedScratch};
use super::router::{Choice, RouterScratch, route};
use super::tally::{Tallied, Tally};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};
use sluice_storage::pool::{Arrival, ExpertGuard, ExpertPart, LayerPass};

/// Bytes of an expert that are worth computing with before the next ones are there: some 20 µs of work for two cores.
const PART_BYTES: usize = 512 << 10;
/// Router matrix and its bias, as places in the router extent.
#[derive(Debug)]
struct Router {
    matrix: MatrixRef,
    /// Added to the logits.
    logit_bias: Option<VectorRef>,
    /// Added to the scores for the choice.
    choice_bias: Option<VectorRef>,
}

/// The routed experts of one layer.
#[derive(Debug)]
pub(super) struct Routed {
    spec: MoeSpec,
    router: Router,
    expert: GatedFfn,
    /// Bytes of an expert's extent.
    expert_len: usize,
}

/// How the outputs of a row's experts become their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Combining {
    /// Experts come as they arrive; every output is kept, and summed in the end. Nothing waits for a particular expert.
    Kept,
    /// Experts come in ascending order and are added at once: memory does not grow with the number of choices.
    InOrder,
}

/// f32 values per row that combining takes, at most, beside the outputs that are kept.
pub(super) fn combining_width(hidden: u64) -> u64 {
    // The running sum, and one expert's output with the rows gathered for it, in f32 and in int8.
    4 * hidden
}

/// Bytes of the outputs of all choices of `rows` rows.
pub(super) fn output_bytes(moe: &MoeSpec, rows: usize, hidden: usize) -> u64 {
    4 * (rows as u64).saturating_mul((moe.top_k * hidden) as u64)
}

/// One use of an expert: which row, and which of its choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Assignment {
    expert: u32,
    row: u32,
    choice: u32,
}

/// An expert that is computed while it is still being read.
#[derive(Debug)]
struct Early {
    /// Which one.
    expert: Option<u32>,
    tally: Tally,
    /// Its one input.
    x: Activations,
    begun: Begun,
    /// Experts of the current pass whose output is in its place before they came as a whole, and their checksums, unless
    /// nobody wants to know them.
    computed: Vec<(u32, Option<u64>)>,
}

impl Early {
    fn new(compute: &Compute) -> Self {
        Early {
            expert: None,
            tally: Tally::default(),
            x: Activations::new(compute.precision),
            begun: Begun::new(compute),
            computed: Vec::new(),
        }
    }
}

/// Buffers that routed experts reuse from call to call.
#[derive(Debug)]
pub(super) struct ExpertScratch {
    gathered: Activations,
    gated: GatedScratch,
    tally: Tally,
    early: Early,
    logits: Vec<f32>,
    bias: Vec<f32>,
    router: RouterScratch,
    choices: Vec<Choice>,
    assignments: Vec<Assignment>,
    /// Distinct experts of the pass, ascending.
    experts: Vec<u32>,
    /// Rows that use the current expert.
    rows: Vec<u32>,
    /// One expert's output, `[its rows, hidden]`.
    output: Vec<f32>,
    combining: Combining,
    /// Bytes of outputs that may be kept.
    most_kept: u64,
    /// [`Combining::Kept`]: every expert's output, `[rows, top_k, hidden]`; [`Combining::InOrder`]: the sums so far, `[rows,
    /// hidden]`.
    outputs: Vec<f32>,
}

impl ExpertScratch {
    /// Empty buffers; they grow to what the first call needs.
    pub fn new(compute: &Compute, most_kept: u64) -> Self {
        ExpertScratch {
            gathered: Activations::new(compute.precision),
            gated: GatedScratch::new(compute),
            tally: Tally::default(),
            early: Early::new(compute),
            logits: Vec::new(),
            bias: Vec::new(),
            router: RouterScratch::default(),
            choices: Vec::new(),
            assignments: Vec::new(),
            experts: Vec::new(),
            rows: Vec::new(),
            output: Vec::new(),
            combining: Combining::Kept,
            most_kept,
            outputs: Vec::new(),
        }
    }

    /// Bytes of outputs that may be kept.
    pub fn most_kept(&self) -> u64 {
        self.most_kept
    }

    /// Forgets the last pass.
    pub fn begin(&mut self) {
        self.choices.clear();
        self.assignments.clear();
        self.experts.clear();
    }

    /// The choices of the pass, `[rows, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }

    /// The experts of the pass, ascending.
    pub fn distinct(&self) -> &[u32] {
        &self.experts
    }

    /// How the outputs of `rows` rows are to be combined: kept as long as there is room, because nothing has to wait then.
    pub fn combine(&mut self, routed: &Routed, rows: usize, hidden: usize) -> Combining {
        let fit = output_bytes(&routed.spec, rows, hidden) <= self.most_kept;
        self.combining = if fit { Combining::Kept } else { Combining::InOrder };
        self.combining
    }

    /// The uses of an expert.
    fn uses(&self, expert: u32) -> &[Assignment] {
        let first = self.assignments.partition_point(|a| a.expert < expert);
        let last = self.assignments.partition_point(|a| a.expert <= expert);
        &self.assignments[first..last]
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

/// Puts the rows of `s.output`, those of expert `id`, where they belong.
fn place(id: u32, hidden: usize, s: &mut ExpertScratch) {
    let mut outputs = std::mem::take(&mut s.outputs);
    let rows = s.uses(id).iter().zip(s.output.chunks_exact(hidden));
    if s.combining == Combining::InOrder {
        for (a, row) in rows {
            let weight = s.choices[a.choice as usize].weight;
            // The operations of the other way, one by one: a fused multiply-add would give other bits.
            let sums = &mut outputs[a.row as usize * hidden..][..hidden];
            sums.iter_mut().zip(row).for_each(|(sum, o)| *sum += weight * o);
        }
    } else {
        for (a, row) in rows {
            outputs[a.choice as usize * hidden..][..hidden].copy_from_slice(row);
        }
    }
    s.outputs = outputs;
}

impl Routed {
    pub(super) fn new(
        moe: &MoeSpec,
        activation: ActivationSpec,
        router: &ExtentTensors<'_>,
        expert: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        Ok(Routed {
            spec: moe.clone(),
            router: Router {
                matrix: router.matrix("router")?,
                logit_bias: moe.router.logit_bias.then(|| router.vector("router_logit_bias")).transpose()?,
                choice_bias: moe.router.choice_bias.then(|| router.vector("router_bias")).transpose()?,
            },
            expert: GatedFfn::new(moe.width, activation, moe.expert_bias, expert)?,
            expert_len: expert.extent_len(),
        })
    }

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

    /// Fills `choices`, `assignments` (by expert, then row) and `experts` (distinct, ascending). `x`: the rows.
    pub(super) fn route(&self, step: Step<'_>, x: &Activations, s: &mut ExpertScratch) {
        let logits = sized(&mut s.logits, x.n() * self.spec.experts);
        let bias = self.logits(step.compute, step.extent, x, &mut s.bias, logits);
        for logits in logits.chunks_exact(self.spec.experts) {
            route(&self.spec, logits, bias, &mut s.router, &mut s.choices);
        }
        s.assignments.extend(s.choices.iter().enumerate().map(|(i, c)| Assignment {
            expert: c.expert,
            row: (i / self.spec.top_k) as u32,
            choice: i as u32,
        }));
        s.assignments.sort_unstable();
        s.experts.extend(s.assignments.iter().map(|a| a.expert));
        s.experts.dedup();
    }

    /// Computes the experts of the rows `x` as the pool hands them out and adds their weighted sum to `out` `[n, hidden]`, which
    /// holds what the dense part gave. Returns the time that took, without waiting.
    pub(super) fn run(
        &self,
        step: Step<'_>,
        pass: &mut LayerPass<'_>,
        x: &Activations,
        s: &mut ExpertScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let (compute, mut time) = (step.compute, Duration::ZERO);
        let combining = s.combining;
        match combining {
            Combining::Kept => _ = sized(&mut s.outputs, x.n() * self.spec.top_k * x.cols()),
            Combining::InOrder => sized(&mut s.outputs, x.n() * x.cols()).fill(0.0),
        }
        // Who observes inputs keeps what it sees: that has to be right at once.
        let observed = compute.observer.is_some();
        // A part pays where the drive is waited for, and needs a place for what is made of it until it has been verified.
        let early = step.rows.generate() && combining == Combining::Kept && !observed;
        let parts = early.then_some(PART_BYTES.min(self.expert_len / 2));
        self.prepare(x, s);
        loop {
            let arrival = pass.arrival(parts)?;
            let started = Instant::now();
            match arrival {
                Some(Arrival::Whole(mut expert)) => {
                    // What is added at once cannot be taken back: it has to be right before.
                    let first = observed || combining == Combining::InOrder;
                    if !first || settle_first(compute, &mut expert, &mut s.tally) {
                        self.compute_whole(compute, expert, x, s);
                    }
                }
                Some(Arrival::Part(part)) => self.compute_part(compute, part, x, s),
                None => break,
            }
            time += started.elapsed();
            if compute.is_cancelled() {
                return Err(ModelError::Cancelled);
            }
        }
        self.sum(compute, combining, s, out);
        Ok(time)
    }

    /// Makes room for parts and tallies, whether any come or not: when they do is a matter of time, and must not cost an
    /// allocation.
    fn prepare(&self, x: &Activations, s: &mut ExpertScratch) {
        let early = &mut s.early;
        early.expert = None;
        early.computed.clear();
        if early.x.cols() < x.cols() {
            early.x.gather(x, &[0]);
            self.expert.reserve(x.cols(), &mut early.begun);
        }
        early.computed.reserve(s.experts.len());
        early.tally.reserve(self.expert_len);
        s.tally.reserve(self.expert_len);
    }

    /// Computes an expert that is there, and its checksum if it is not known to be right. If it turns out to be wrong, the
    /// pool reads the expert again, and it comes once more.
    fn compute_whole(&self, compute: &Compute, mut expert: ExpertGuard<'_>, x: &Activations, s: &mut ExpertScratch) {
        let (id, hidden) = (expert.expert(), x.cols());
        if s.early.expert == Some(id) {
            let wanted = !expert.is_verified();
            self.advance_early(compute, expert.bytes(), expert.bytes().len(), wanted, s);
        }
        if let Some(at) = s.early.computed.iter().position(|computed| computed.0 == id) {
            if let (_, Some(checksum)) = s.early.computed.swap_remove(at) {
                expert.settle(checksum);
            }
            return;
        }
        let mut rows = std::mem::take(&mut s.rows);
        rows.clear();
        rows.extend(s.uses(id).iter().map(|a| a.row));
        s.gathered.gather(x, &rows);
        s.rows = rows;
        let output = sized(&mut s.output, s.rows.len() * hidden);
        let tally = (!expert.is_verified()).then(|| s.tally.begin(expert.bytes().len()));
        let extent = Tallied { bytes: expert.bytes(), tally };
        self.expert.forward(compute, extent, id, &s.gathered, &mut s.gated, output);
        if compute.is_cancelled() {
            // The checksum may be of a part of the bytes: whether they are right is not known yet.
            return;
        }
        let checksum = extent.tally.map(|tally| tally.checksum(&compute.kernels));
        place(id, hidden, s);
        if let Some(checksum) = checksum {
            expert.settle(checksum);
        }
    }

    /// Goes on with an expert of which more has arrived, if one row uses it: the rows of several do not lie together.
    fn compute_part(&self, compute: &Compute, part: ExpertPart<'_>, x: &Activations, s: &mut ExpertScratch) {
        let (id, bytes, len) = (part.expert(), part.bytes(), part.len());
        let &[Assignment { row, .. }] = s.uses(id) else {
            return part.more_at(None);
        };
        if s.early.expert != Some(id) {
            s.early.expert = Some(id);
            s.early.begun.restart();
            s.early.tally.begin(len);
            s.early.x.gather(x, &[row]);
        }
        self.advance_early(compute, bytes, len, !part.is_verified(), s);
        let more_at = s.early.expert.map(|_| (bytes.len() + PART_BYTES).min(len));
        part.more_at(more_at);
    }

    /// Computes what `prefix` allows of the expert in `s.early`, whose extent has `len` bytes; when that is all of it, puts its
    /// output into its place. `tallied`: the checksum is wanted.
    fn advance_early(&self, compute: &Compute, prefix: &[u8], len: usize, tallied: bool, s: &mut ExpertScratch) {
        let Early { expert, tally, x, begun, computed } = &mut s.early;
        let Some(id) = *expert else { return };
        let hidden = x.cols();
        let prefix = Tallied { bytes: prefix, tally: tallied.then_some(&*tally) };
        self.expert.advance(compute, prefix, len, x, begun);
        if !begun.is_done() || compute.is_cancelled() {
            return;
        }
        let at = s.assignments.partition_point(|a| a.expert < id);
        let choice = s.assignments[at].choice as usize;
        s.outputs[choice * hidden..][..hidden].copy_from_slice(begun.output(hidden));
        computed.push((id, prefix.tally.map(|tally| tally.checksum(&compute.kernels))));
        *expert = None;
    }

    /// Adds the weighted outputs in ascending order of expert, then the dense part that `out` already holds.
    fn sum(&self, compute: &Compute, combining: Combining, s: &ExpertScratch, out: &mut [f32]) {
        let top_k = self.spec.top_k;
        let hidden = out.len() / (s.choices.len() / top_k);
        compute.threads.for_each_chunk(out, hidden, &|row, out| match combining {
            Combining::InOrder => {
                let sums = &s.outputs[row * hidden..][..hidden];
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
            Combining::Kept => {
                let choices = &s.choices[row * top_k..][..top_k];
                let rows = &s.outputs[row * top_k * hidden..][..top_k * hidden];
                for (i, out) in out.iter_mut().enumerate() {
                    let sum = choices.iter().enumerate().fold(0.0, |sum, (j, c)| sum + c.weight * rows[j * hidden + i]);
                    *out += sum;
                }
            }
        });
    }
}

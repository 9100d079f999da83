//! The routed experts of a layer: finds which rows use which experts, computes experts as they arrive, and sums their outputs.
//!
//! A row's outputs are added in ascending order of expert, whatever the order in which experts arrive, so the order of arrival
//! never shows in the result. [`Outputs`] ensures that, and takes only outputs that were computed from verified bytes.

use std::time::{Duration, Instant};

use sluice_format::{ActivationSpec, MoeSpec};
use sluice_kernels::{Activations, BLOCK, Work};

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::gated::{Begun, GatedFfn, GatedScratch};
use super::outputs::{Combining, Outputs, Settled, Unsettled, Use};
use super::router::{Choice, RouterScratch, route, route_preferring, route_to};
use super::tally::{Tallied, Tally};
use super::thrift::Preferred;
use super::token_table::TokenTable;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};
use sluice_storage::pool::{self, Arrival, Expert, ExpertPart, LayerPass};

/// Bytes of an expert that are worth computing with before the next ones have arrived: some 20 µs of work for two cores.
const PART_BYTES: usize = 512 << 10;
/// Most outputs that wait until the rest of their expert has arrived, which takes little longer than the output.
const WAITING_MAX: usize = 4;

/// Router matrix and its bias, as places in the router extent.
#[derive(Debug)]
struct Router {
    matrix: MatrixRef,
    /// Added to the logits.
    logit_bias: Option<VectorRef>,
    /// Added to the scores for the choice.
    choice_bias: Option<VectorRef>,
    /// Factors of the weights.
    expert_scale: Option<VectorRef>,
    /// The experts of each token, if a table decides and not scores.
    table: Option<TokenTable>,
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

/// Most f32 values per row that combining takes, in addition to the outputs that are kept.
pub(super) fn combining_width(hidden: u64) -> u64 {
    // The running sum, and one expert's output with the rows gathered for it, in f32 and in int8.
    4 * hidden
}

/// Bytes of the outputs of all choices of `rows` rows.
pub(super) fn output_bytes(moe: &MoeSpec, rows: usize, hidden: usize) -> u64 {
    4 * (rows as u64).saturating_mul((moe.top_k * hidden) as u64)
}

/// Bytes of memory for the experts of one row that are computed together.
pub(super) fn together_memory(moe: &MoeSpec, hidden: usize) -> u64 {
    // Of each the output; both products, what is made of them, and that in the form that kernels consume, in f32 and in int8.
    let (width, hidden) = (moe.width.next_multiple_of(BLOCK) as u64, moe.input_width(hidden) as u64);
    moe.top_k as u64 * (4 * hidden + (8 + 4 + 4 + 2) * width)
}

/// An expert that is computed while it is being read.
#[derive(Debug)]
struct Early {
    /// Number of the expert.
    expert: Option<u32>,
    tally: Tally,
    /// Its one input.
    x: Activations,
    begun: Begun,
    /// Complete outputs of experts of the current pass whose last bytes have not arrived.
    waiting: Vec<Waiting>,
    /// Buffers for more such outputs.
    free: Vec<Vec<f32>>,
}

/// An output that was complete before all of its expert had arrived.
#[derive(Debug)]
struct Waiting {
    expert: u32,
    /// The checksum of its bytes, if it is needed.
    sum: Option<u64>,
    /// `[hidden]`, or longer.
    values: Vec<f32>,
}

impl Waiting {
    fn output(&self, hidden: usize) -> Unsettled<'_> {
        Unsettled::of_parts(self.expert, self.sum, &self.values[..hidden])
    }
}

impl Early {
    fn new(compute: &Compute) -> Self {
        Early {
            expert: None,
            tally: Tally::default(),
            x: Activations::new(compute.precision),
            begun: Begun::new(compute),
            waiting: Vec::with_capacity(WAITING_MAX),
            free: vec![Vec::new(); WAITING_MAX],
        }
    }

    /// Forgets the last pass.
    fn clear(&mut self) {
        self.expert = None;
        self.free.extend(self.waiting.drain(..).map(|waiting| waiting.values));
    }

    fn take(&mut self, expert: u32) -> Option<Waiting> {
        let at = self.waiting.iter().position(|waiting| waiting.expert == expert)?;
        Some(self.waiting.swap_remove(at))
    }
}

/// Experts of one row that are computed together, before they are handed out.
#[derive(Debug, Default)]
struct Together {
    /// Their numbers, in the order of their outputs.
    experts: Vec<u32>,
    /// One for each.
    scratch: Vec<GatedScratch>,
    /// `[experts, hidden]`.
    outputs: Vec<f32>,
}

impl Together {
    /// The output of an expert, if it was among them. Its bytes were verified before it was computed.
    fn output(&self, expert: u32, hidden: usize) -> Option<Unsettled<'_>> {
        let at = self.experts.iter().position(|&computed| computed == expert)?;
        Some(Unsettled::of_parts(expert, None, &self.outputs[at * hidden..][..hidden]))
    }
}

/// The inputs of one expert.
#[derive(Debug)]
struct Inputs {
    /// Rows of the pass.
    rows: Vec<u32>,
    /// Weights of these uses, if weights multiply inputs.
    factors: Vec<f32>,
    /// The gathered rows.
    x: Activations,
}

/// Buffers that routed experts reuse from call to call.
#[derive(Debug)]
pub(super) struct ExpertScratch {
    inputs: Inputs,
    gated: GatedScratch,
    together: Together,
    tally: Tally,
    early: Early,
    logits: Vec<f32>,
    bias: Vec<f32>,
    router: RouterScratch,
    /// The experts of one token, from a table.
    listed: Vec<u32>,
    choices: Vec<Choice>,
    /// Choices that differ from the routers' own, since the start.
    replaced: u64,
    /// By expert, then row.
    uses: Vec<Use>,
    /// Distinct experts of the pass, ascending.
    experts: Vec<u32>,
    /// One expert's output, `[its rows, hidden]`.
    output: Vec<f32>,
    outputs: Outputs,
}

impl ExpertScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute, most_kept: u64) -> Self {
        ExpertScratch {
            inputs: Inputs { rows: Vec::new(), factors: Vec::new(), x: Activations::new(compute.precision) },
            gated: GatedScratch::new(compute),
            together: Together::default(),
            tally: Tally::default(),
            early: Early::new(compute),
            logits: Vec::new(),
            bias: Vec::new(),
            router: RouterScratch::default(),
            listed: Vec::new(),
            choices: Vec::new(),
            replaced: 0,
            uses: Vec::new(),
            experts: Vec::new(),
            output: Vec::new(),
            outputs: Outputs::new(most_kept),
        }
    }

    /// Empty buffers in place of these; the counts stay.
    pub fn anew(&self, compute: &Compute) -> Self {
        ExpertScratch { replaced: self.replaced, ..ExpertScratch::new(compute, self.outputs.most_kept()) }
    }

    /// Changes how many bytes of outputs may wait to be summed, from the next pass on.
    pub fn keep_at_most(&mut self, bytes: u64) {
        self.outputs.keep_at_most(bytes);
    }

    /// Forgets the last pass.
    pub fn begin(&mut self) {
        self.choices.clear();
        self.uses.clear();
        self.experts.clear();
    }

    /// The choices of the pass, `[rows, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }

    /// How many choices differed from the routers' own because experts in memory were preferred.
    pub fn replaced(&self) -> u64 {
        self.replaced
    }

    /// The experts of the pass, ascending.
    pub fn distinct(&self) -> &[u32] {
        &self.experts
    }

    /// How the outputs of `rows` rows will be combined.
    pub fn combine(&mut self, routed: &Routed, rows: usize, hidden: usize) -> Combining {
        self.outputs.combine(output_bytes(&routed.spec, rows, hidden))
    }
}

/// The uses of one expert among `uses`.
fn uses_of(expert: u32, uses: &[Use]) -> &[Use] {
    let first = uses.partition_point(|used| used.expert < expert);
    let last = uses.partition_point(|used| used.expert <= expert);
    &uses[first..last]
}

/// Bytes of memory for the checksums of experts of `len` bytes: for one that has arrived and one that is being read.
pub(super) fn tally_memory(len: u64) -> u64 {
    2 * Tally::memory(len)
}

/// Verifies an expert before it is computed; `None` if its bytes are damaged, or the step was cancelled meanwhile.
fn settle_first<'p>(compute: &Compute, expert: pool::Unsettled<'p>, tally: &mut Tally) -> Option<Expert<'p>> {
    let bytes = expert.bytes();
    let tally = tally.begin(bytes.len());
    compute.threads.run(bytes.len().div_ceil(PART_BYTES), &|piece| {
        let range = piece * PART_BYTES..((piece + 1) * PART_BYTES).min(bytes.len());
        tally.add(bytes, range);
    });
    if compute.is_cancelled() {
        return None;
    }
    // A damaged expert is handed out a second time.
    expert.settle(tally.checksum()).ok()
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
                expert_scale: moe.router.expert_scale.then(|| router.vector("expert_scale")).transpose()?,
                table: TokenTable::new(moe, router)?,
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

    /// Computes the router's `logits` `[x.n(), experts]`. Returns the bias of the choice, which is stored in `vector`.
    pub(super) fn logits<'v>(
        &self,
        compute: &Compute,
        extent: &[u8],
        x: &Activations,
        vector: &'v mut Vec<f32>,
        logits: &mut [f32],
    ) -> Option<&'v [f32]> {
        compute.kernels.matmul(&compute.threads, self.router.matrix.view(extent), x, logits);
        self.finish_logits(extent, vector, logits)
    }

    /// The router's product with `x`, to be computed together with others; its results are `logits` `[x.n(), experts]` before
    /// [`Routed::finish_logits`].
    pub(super) fn router_work<'w>(&self, extent: &'w [u8], x: &'w Activations, s: &'w mut ExpertScratch) -> Work<'w> {
        Work::matmul(self.router.matrix.view(extent), x, sized(&mut s.logits, x.n() * self.spec.experts))
    }

    /// Whether the columns of the router's matrix have an order of their own.
    pub(super) fn router_is_ordered(&self) -> bool {
        self.router.matrix.is_ordered()
    }

    /// Turns the products with the router's matrix into logits. Returns the bias of the choice, which is stored in `vector`.
    fn finish_logits<'v>(&self, extent: &[u8], vector: &'v mut Vec<f32>, logits: &mut [f32]) -> Option<&'v [f32]> {
        if let Some(factor) = self.spec.router.logit_factor {
            logits.iter_mut().for_each(|l| *l *= factor);
        }
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

    /// The table with the experts of each token, if scores do not decide.
    pub(super) fn table(&self) -> Option<&TokenTable> {
        self.router.table.as_ref()
    }

    /// Fills `choices`, `uses` (by expert, then row) and `experts` (distinct, ascending). `x`: the rows. `multiplied`: the product of
    /// [`Routed::router_work`] has been computed already. `preferred`: the experts that are preferred to others, if any.
    ///
    /// # Errors
    /// [`ModelError::TokenTable`] and [`ModelError::Token`], if a table decides.
    pub(super) fn route(
        &self,
        step: Step<'_>,
        (x, multiplied): (&Activations, bool),
        preferred: Option<&Preferred<'_>>,
        s: &mut ExpertScratch,
    ) -> Result<(), ModelError> {
        step.compute.observe(&self.router.matrix, 0, x);
        let logits = sized(&mut s.logits, x.n() * self.spec.experts);
        let bias = match multiplied {
            true => self.finish_logits(step.extent, &mut s.bias, logits),
            false => self.logits(step.compute, step.extent, x, &mut s.bias, logits),
        };
        for (logits, &token) in logits.chunks_exact(self.spec.experts).zip(step.rows.ids()) {
            match (&self.router.table, preferred) {
                (None, None) => route(&self.spec, logits, bias, &mut s.router, &mut s.choices),
                (None, Some(preferred)) => {
                    let others = route_preferring(&self.spec, logits, bias, preferred, &mut s.router, &mut s.choices);
                    s.replaced += others as u64;
                }
                (Some(table), _) => {
                    table.experts(step.extent, token, &mut s.listed)?;
                    route_to(&self.spec, logits, &s.listed, &mut s.router, &mut s.choices);
                }
            }
        }
        if let Some(scale) = &self.router.expert_scale {
            scale.read(step.extent, &mut s.bias);
            s.choices.iter_mut().for_each(|choice| choice.weight *= s.bias[choice.expert as usize]);
        }
        s.uses.extend(s.choices.iter().enumerate().map(|(i, c)| Use {
            expert: c.expert,
            row: (i / self.spec.top_k) as u32,
            choice: i as u32,
        }));
        s.uses.sort_unstable();
        s.experts.extend(s.uses.iter().map(|a| a.expert));
        s.experts.dedup();
        Ok(())
    }

    /// Computes the experts of the rows `x` as the pool hands them out, and adds their weighted sum to `out` `[n, hidden]`, which
    /// holds the output of the dense part. Returns the time that this took, without waiting.
    pub(super) fn run(
        &self,
        step: Step<'_>,
        pass: &mut LayerPass<'_>,
        x: &Activations,
        s: &mut ExpertScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let (compute, mut time) = (step.compute, Duration::ZERO);
        let combining = s.outputs.combining();
        s.outputs.begin(x.n(), self.spec.top_k, x.cols(), self.spec.weighted_input);
        // An observer keeps the inputs that it sees, so they have to be right at once. An output that is added at once cannot be
        // undone.
        let observed = compute.observer.is_some();
        let first = observed || combining == Combining::InOrder;
        // Computing parts pays if the step waits for the drive; and the output needs a place until the expert has been verified.
        let early = step.rows.generate() && combining == Combining::Kept && !observed;
        let parts = early.then_some(PART_BYTES.min(self.expert_len / 2));
        self.prepare(compute, x, s);
        if early && self.shares_row(x) {
            let started = Instant::now();
            self.compute_together(compute, pass, x, &mut s.together);
            time += started.elapsed();
            if compute.is_cancelled() {
                return Err(ModelError::Cancelled);
            }
        }
        loop {
            let arrival = pass.arrival(parts)?;
            let started = Instant::now();
            match arrival {
                Some(Arrival::Settled(expert)) => self.compute_settled(compute, &expert, x, s),
                Some(Arrival::Unsettled(expert)) if first => {
                    if let Some(expert) = settle_first(compute, expert, &mut s.tally) {
                        self.compute_settled(compute, &expert, x, s);
                    }
                }
                Some(Arrival::Unsettled(expert)) => self.compute_unsettled(compute, expert, x, s),
                Some(Arrival::Part(part)) => self.compute_part(compute, part, x, s),
                None => break,
            }
            time += started.elapsed();
            if compute.is_cancelled() {
                return Err(ModelError::Cancelled);
            }
        }
        s.outputs.sum(compute, &s.choices, out);
        Ok(time)
    }

    /// Allocates room for parts and tallies in advance: whether any are needed depends on timing, and must not cause an allocation
    /// later.
    fn prepare(&self, compute: &Compute, x: &Activations, s: &mut ExpertScratch) {
        let together = &mut s.together;
        together.experts.clear();
        if self.shares_row(x) {
            let most = self.spec.top_k.max(together.scratch.len());
            together.experts.reserve(most);
            together.scratch.resize_with(most, || GatedScratch::new(compute));
            together.scratch.iter_mut().for_each(|scratch| self.expert.reserve_row(scratch));
            _ = sized(&mut together.outputs, most * x.cols());
        }
        let early = &mut s.early;
        early.clear();
        if early.x.cols() < x.cols() {
            early.x.gather(x, &[0]);
            self.expert.reserve(x.cols(), &mut early.begun);
            early.free.iter_mut().for_each(|values| _ = sized(values, x.cols()));
        }
        early.tally.reserve(self.expert_len);
        s.tally.reserve(self.expert_len);
    }

    /// Whether experts can be computed together: they have the same one row, unchanged.
    fn shares_row(&self, x: &Activations) -> bool {
        x.n() == 1 && !self.spec.weighted_input && self.expert.takes_inputs_as_they_are()
    }

    /// Computes the experts that are in memory and verified, as two jobs instead of two for each. With one, there is nothing to gain.
    fn compute_together(&self, compute: &Compute, pass: &LayerPass<'_>, x: &Activations, together: &mut Together) {
        let Together { experts, scratch, outputs } = together;
        experts.extend(pass.in_memory().map(|(expert, _)| expert));
        if experts.len() < 2 {
            return experts.clear();
        }
        let extents = pass.in_memory().map(|(_, bytes)| bytes);
        self.expert.forward_each(compute, extents, x, scratch, &mut outputs[..experts.len() * x.cols()]);
    }

    /// Computes an expert that has arrived and is verified.
    fn compute_settled(&self, compute: &Compute, expert: &Expert<'_>, x: &Activations, s: &mut ExpertScratch) {
        let (id, hidden) = (expert.expert(), x.cols());
        if let Some(output) = s.together.output(id, hidden) {
            return s.outputs.add(output.settled_by(expert), uses_of(id, &s.uses), &s.choices);
        }
        if let Some(waiting) = self.finish_early(compute, id, expert.bytes(), false, s) {
            s.outputs.add(waiting.output(hidden).settled_by(expert), uses_of(id, &s.uses), &s.choices);
            return s.early.free.push(waiting.values);
        }
        let output = self.gather(x, uses_of(id, &s.uses), &s.choices, &mut s.inputs, &mut s.output);
        let output = Settled::compute(expert, output, |bytes, out| {
            self.expert.forward(compute, Tallied::not(bytes), id, &s.inputs.x, &mut s.gated, out);
        });
        if !compute.is_cancelled() {
            s.outputs.add(output, uses_of(id, &s.uses), &s.choices);
        }
    }

    /// Computes an expert that has arrived, and its checksum. If the checksum is wrong, the pool reads the expert again and hands
    /// it out a second time.
    fn compute_unsettled(
        &self,
        compute: &Compute,
        expert: pool::Unsettled<'_>,
        x: &Activations,
        s: &mut ExpertScratch,
    ) {
        let (id, hidden) = (expert.expert(), x.cols());
        if let Some(waiting) = self.finish_early(compute, id, expert.bytes(), true, s) {
            if let Ok(output) = waiting.output(hidden).settle(expert) {
                s.outputs.add(output, uses_of(id, &s.uses), &s.choices);
            }
            return s.early.free.push(waiting.values);
        }
        let output = self.gather(x, uses_of(id, &s.uses), &s.choices, &mut s.inputs, &mut s.output);
        let output = Unsettled::compute(&expert, &mut s.tally, output, |extent, out| {
            self.expert.forward(compute, extent, id, &s.inputs.x, &mut s.gated, out);
            // After a cancellation, the tally may lack some bytes, so it cannot tell whether they are right.
            !compute.is_cancelled()
        });
        if let Some(Ok(output)) = output.map(|output| output.settle(expert)) {
            s.outputs.add(output, uses_of(id, &s.uses), &s.choices);
        }
    }

    /// The output of an expert that was begun before all of it had arrived, if there is one. It is completed, unless the step is
    /// cancelled.
    fn finish_early(
        &self,
        compute: &Compute,
        expert: u32,
        bytes: &[u8],
        tallied: bool,
        s: &mut ExpertScratch,
    ) -> Option<Waiting> {
        if s.early.expert == Some(expert) {
            self.advance_early(compute, bytes, bytes.len(), tallied, &mut s.early);
        }
        s.early.take(expert)
    }

    /// Continues with an expert after more of it has arrived, if only one row uses it: the rows of several are not contiguous.
    fn compute_part(&self, compute: &Compute, part: ExpertPart<'_>, x: &Activations, s: &mut ExpertScratch) {
        let (id, bytes, len) = (part.expert(), part.bytes(), part.len());
        let early = &mut s.early;
        if early.expert != Some(id) {
            let (&[Use { row, choice, .. }], false) = (uses_of(id, &s.uses), early.free.is_empty()) else {
                return part.more_at(None);
            };
            early.expert = Some(id);
            early.begun.restart();
            early.tally.begin(len);
            match self.spec.weighted_input {
                true => early.x.gather_scaled(x, &[row], &[s.choices[choice as usize].weight]),
                false => early.x.gather(x, &[row]),
            }
        }
        self.advance_early(compute, bytes, len, !part.is_verified(), early);
        let more_at = early.expert.map(|_| (bytes.len() + PART_BYTES).min(len));
        part.more_at(more_at);
    }

    /// Computes as much of the expert in `early` as `prefix` allows; its extent has `len` bytes. If that is all of it, its output
    /// waits for it. `tallied`: the checksum is needed.
    fn advance_early(&self, compute: &Compute, prefix: &[u8], len: usize, tallied: bool, early: &mut Early) {
        let Early { expert, tally, x, begun, waiting, free } = early;
        let Some(id) = *expert else { return };
        let prefix = Tallied { bytes: prefix, tally: tallied.then_some(&*tally) };
        self.expert.advance(compute, prefix, len, x, begun);
        if !begun.is_done() || compute.is_cancelled() {
            return;
        }
        let mut values = free.pop().expect("none is begun without a place for its output");
        begun.swap_output(&mut values);
        waiting.push(Waiting { expert: id, sum: prefix.tally.map(Tally::checksum), values });
        *expert = None;
    }

    /// Gathers the rows of `x` that use an expert; returns the place of its output `[its rows, hidden]`.
    fn gather<'o>(
        &self,
        x: &Activations,
        uses: &[Use],
        choices: &[Choice],
        inputs: &mut Inputs,
        output: &'o mut Vec<f32>,
    ) -> &'o mut [f32] {
        let Inputs { rows, factors, x: gathered } = inputs;
        rows.clear();
        rows.extend(uses.iter().map(|used| used.row));
        if self.spec.weighted_input {
            factors.clear();
            factors.extend(uses.iter().map(|used| choices[used.choice as usize].weight));
            gathered.gather_scaled(x, rows, factors);
        } else {
            gathered.gather(x, rows);
        }
        sized(output, rows.len() * x.cols())
    }
}

//! How many sequences a batch should decode at a time, and how long it takes: arithmetic on sizes and on the speeds of a machine.
//!
//! A step decodes one token of each sequence. Three things bound its time: the drive, which reads the experts that are not in
//! memory; the memory, from which everything that the step multiplies is read once; and the arithmetic, which multiplies every row.
//! More sequences share the reads, so the first two grow more slowly than the tokens; but the sequences take memory from the
//! experts.

use serde::Serialize;
use sluice_format::{ModelFile, ModelSpec};
use sluice_kernels::KvType;
use sluice_model::PAGE_TOKENS;
use sluice_model::memory::{Demand, MemoryPlan};

use crate::estimate::{Curve, Needs, StepWork};

/// Most sequences that are considered.
const MOST: usize = 1024;
/// Part of the best speed that is good enough: fewer sequences finish earlier, and leave memory to experts.
const GOOD_ENOUGH: f64 = 0.97;

/// Of the time that sequences take to be read again, the part that saving and restoring them may take.
const SAVING: f64 = 0.25;
/// Reading again that takes fewer seconds than this is not worth the bytes that are written to prevent it.
const WORTH_SECONDS: f64 = 1.0;

/// What a machine does in a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Bytes that the drive reads.
    pub drive: f64,
    /// Bytes that the memory reads.
    pub memory: f64,
    /// Multiplications and additions.
    pub arithmetic: f64,
}

/// The requests of a batch, on average.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Load {
    /// Answers.
    pub answers: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: f64,
    /// Tokens of all answers: as many as their requests allow, and a usual number where a request sets no limit.
    pub answer_tokens: f64,
    /// Answers whose request sets no limit.
    pub unlimited: usize,
    /// Most tokens of a sequence.
    pub context: usize,
}

/// What bounds a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepBound {
    /// The drive.
    Drive,
    /// The memory.
    Memory,
    /// The arithmetic.
    Arithmetic,
}

/// A number of sequences, and the least time of a step with them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Width {
    /// Sequences that decode at a time.
    pub sequences: usize,
    /// Sequences with the whole context for which memory is planned; together they have as many tokens as the others.
    pub planned: usize,
    /// Experts for which memory has room.
    pub slots: usize,
    /// Different experts that a step uses, over all layers, if every row chooses at random.
    pub union_of_experts: f64,
    /// Part of them that is expected to be in memory.
    pub hit_rate: f64,
    /// Seconds of a step for the drive, …
    pub drive: f64,
    /// … the memory, …
    pub memory: f64,
    /// … and the arithmetic.
    pub arithmetic: f64,
    /// The largest of the three.
    pub bound: StepBound,
    /// Tokens per second at that bound.
    pub tokens_per_second: f64,
    /// Most rows that go through the layers together.
    pub rows: usize,
}

impl Load {
    /// Number of sequences with the whole context that have as many tokens as `sequences` of average length.
    pub fn planned(&self, sequences: usize) -> usize {
        let tokens = sequences as f64 * self.tokens_per_answer();
        ((tokens / self.context.max(1) as f64).ceil() as usize).clamp(1, sequences.max(1))
    }

    /// Average number of tokens of a sequence at its end.
    fn tokens_per_answer(&self) -> f64 {
        let tokens = (self.prompt_tokens + self.answer_tokens) / self.answers.max(1) as f64;
        tokens.clamp(1.0, self.context as f64)
    }
}

impl Width {
    /// The number of sequences that pays: the least that nearly reaches the best speed that memory and bounds allow. `None` if not
    /// even one fits.
    pub fn best(file: &ModelFile, budget: Option<u64>, kv_type: KvType, load: &Load, rates: &Rates) -> Option<Width> {
        let most = load.answers.clamp(1, MOST);
        // Powers of two, and the middles between them.
        let powers = (0..usize::BITS).map(|power| 1_usize << power);
        let mut sizes: Vec<usize> =
            powers.flat_map(|n| [n, n + n / 2]).take_while(|n| *n < most).chain([most]).collect();
        sizes.dedup();
        let widths = sizes.into_iter().map_while(|n| Self::of(file, budget, kv_type, load, rates, n));
        let widths: Vec<Width> = widths.collect();
        let best = widths.iter().map(|width| width.tokens_per_second).fold(0.0, f64::max);
        widths.into_iter().find(|width| width.tokens_per_second >= GOOD_ENOUGH * best)
    }

    /// The least time of a step with this many sequences; `None` if memory has no room for them.
    pub fn of(
        file: &ModelFile,
        budget: Option<u64>,
        kv_type: KvType,
        load: &Load,
        rates: &Rates,
        sequences: usize,
    ) -> Option<Width> {
        let tokens = load.tokens_per_answer();
        let planned = load.planned(sequences);
        let demand = Demand { sequences: planned, ..Demand::one(load.context, kv_type) };
        let plan = MemoryPlan::new(file, budget, demand).ok().filter(|plan| plan.rows >= sequences)?;
        let needs = Needs::of(file.spec(), file.extents(), tokens as usize, kv_type);
        let union = union_of_experts(file.spec(), sequences as f64);
        let experts = plan.experts.max(1) as f64;
        let hit_rate = hit_rate(file.spec(), plan.slots as f64 / experts, union / experts);
        let stored = needs.token_cycle_stored as f64 / needs.experts_per_token.max(1) as f64;
        let missed = union * (1.0 - hit_rate) * stored + plan.dense_streamed as f64;
        let work = StepWork::of(file, sequences, union, tokens / 2.0, kv_type);
        let drive = missed / rates.drive;
        let (memory, arithmetic) = (work.touched_bytes / rates.memory, work.operations / rates.arithmetic);
        let largest = drive.max(memory).max(arithmetic);
        let bound = match () {
            () if largest == drive => StepBound::Drive,
            () if largest == memory => StepBound::Memory,
            () => StepBound::Arithmetic,
        };
        Some(Width {
            sequences,
            planned,
            slots: plan.slots,
            union_of_experts: union,
            hit_rate,
            drive,
            memory,
            arithmetic,
            bound,
            tokens_per_second: sequences as f64 / largest.max(f64::MIN_POSITIVE),
            rows: plan.rows,
        })
    }

    /// Seconds for the whole load at these bounds. Prompts are read beside the decoding: a step that reads one meets most experts
    /// of the model, and each of its rows is multiplied. Memory is empty at first, so the drive reads at least once what is used at all.
    pub fn seconds(&self, file: &ModelFile, load: &Load, rates: &Rates, kv_type: KvType) -> f64 {
        let decoding = load.answer_tokens / self.tokens_per_second;
        let per_prompt = load.prompt_tokens / load.answers.max(1) as f64;
        // As many prompts together as answers are made at a time.
        let rows = (self.sequences as f64 * per_prompt).min(load.prompt_tokens).max(1.0).min(self.rows as f64);
        let steps = decoding + self.pass(file, rates, kv_type, rows, per_prompt / 2.0) * load.prompt_tokens / rows;
        let needs = Needs::of(file.spec(), file.extents(), 1, kv_type);
        let stored = needs.token_cycle_stored as f64 / needs.experts_per_token.max(1) as f64;
        let used = union_of_experts(file.spec(), load.prompt_tokens + load.answer_tokens);
        steps.max((needs.dense_bytes as f64 + used * stored) / rates.drive)
    }

    /// Seconds of a pass that reads `rows` tokens of prompts at a mean `position`.
    fn pass(&self, file: &ModelFile, rates: &Rates, kv_type: KvType, rows: f64, position: f64) -> f64 {
        let union = union_of_experts(file.spec(), rows);
        let needs = Needs::of(file.spec(), file.extents(), (2.0 * position) as usize, kv_type);
        let stored = needs.token_cycle_stored as f64 / needs.experts_per_token.max(1) as f64;
        let resident = self.slots as f64 / needs.experts.max(1) as f64;
        let missed = union * (1.0 - resident.min(1.0)) * stored;
        let work = StepWork::of(file, rows as usize, union, position, kv_type);
        (missed / rates.drive).max(work.operations / rates.arithmetic)
    }

    /// After how many new tokens it pays to save the sequences: the least number, in powers of two from a page on, at which writing and
    /// reading back the keys, values and states of all sequences takes a quarter of the time, or less, that the model takes to read these
    /// tokens again. `None`: it never does, or reading again takes no second.
    pub fn worth_saving(&self, file: &ModelFile, load: &Load, rates: &Rates, kv_type: KvType) -> Option<usize> {
        let sequences = self.sequences as f64;
        let sizes = std::iter::successors(Some(PAGE_TOKENS), |tokens| tokens.checked_mul(2));
        sizes.take_while(|tokens| *tokens <= load.context).find(|&tokens| {
            let saving = 2.0 * sequences * saved_bytes(file, tokens, kv_type) as f64 / rates.drive;
            let all = sequences * tokens as f64;
            let rows = all.min(self.rows.max(1) as f64);
            let reading = self.pass(file, rates, kv_type, rows, tokens as f64 / 2.0) * all / rows;
            reading >= WORTH_SECONDS && saving <= SAVING * reading
        })
    }
}

/// Bytes of a saved sequence of so many tokens, nearly: its keys, values and states.
pub fn saved_bytes(file: &ModelFile, tokens: usize, kv_type: KvType) -> u64 {
    Needs::of(file.spec(), file.extents(), tokens, kv_type).kv_cache_bytes
}

/// Different experts that so many rows use, summed over the layers, if each chooses at random.
pub(crate) fn union_of_experts(spec: &ModelSpec, rows: f64) -> f64 {
    let layers = spec.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref());
    layers.map(|moe| union_of_layer(moe.experts, moe.top_k, rows)).sum()
}

/// The same in one layer.
pub(crate) fn union_of_layer(experts: usize, top_k: usize, rows: f64) -> f64 {
    let experts = experts.max(1) as f64;
    experts * (1.0 - (1.0 - top_k as f64 / experts).max(0.0).powf(rows))
}

/// The part of a step's experts that is in memory, if this part of all experts is: for one sequence, the hit rate of a trace; for a step that
/// uses all experts, the part of them that fits; in between, an interpolation, but never more than there is in memory. `used`: the part of all
/// experts that the step uses.
pub(crate) fn hit_rate(spec: &ModelSpec, cached: f64, used: f64) -> f64 {
    let moe = spec.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref()).max_by_key(|moe| moe.experts);
    let Some(moe) = moe else { return 1.0 };
    let cached = cached.min(1.0);
    let alone = Curve::nearest(moe.top_k, moe.experts).hit_rate(cached);
    let between = alone + (cached - alone) * used.clamp(0.0, 1.0);
    between.min(cached / used.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
}

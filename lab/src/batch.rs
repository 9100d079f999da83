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
    /// Not in a second, but in seconds: what passes between the submission of a read and its first byte, where the drive has nothing else to
    /// do.
    pub latency: f64,
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
        let routing = Routing::of(file.spec());
        let union = routing.union(sequences as f64);
        let slots = plan.slots as f64;
        let hit_rate = routing.hit_rate((slots, slots), sequences as f64);
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
        let used = Routing::of(file.spec()).union(load.prompt_tokens + load.answer_tokens);
        steps.max((needs.dense_bytes as f64 + used * stored) / rates.drive)
    }

    /// Seconds of a pass that reads `rows` tokens of prompts at a mean `position`.
    fn pass(&self, file: &ModelFile, rates: &Rates, kv_type: KvType, rows: f64, position: f64) -> f64 {
        let (routing, slots) = (Routing::of(file.spec()), self.slots as f64);
        let union = routing.union(rows);
        let needs = Needs::of(file.spec(), file.extents(), (2.0 * position) as usize, kv_type);
        let stored = needs.token_cycle_stored as f64 / needs.experts_per_token.max(1) as f64;
        let missed = union * (1.0 - routing.hit_rate((slots, slots), rows)) * stored;
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

/// The experts of a model.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    /// Layers that are alike: experts of each, experts of a token, and the number of such layers.
    layers: Vec<(usize, usize, f64)>,
}

impl Routing {
    pub(crate) fn of(spec: &ModelSpec) -> Self {
        let mut layers: Vec<(usize, usize, f64)> = Vec::new();
        for moe in spec.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref()) {
            match layers.iter_mut().find(|(experts, top_k, _)| (*experts, *top_k) == (moe.experts, moe.top_k)) {
                Some((.., count)) => *count += 1.0,
                None => layers.push((moe.experts, moe.top_k, 1.0)),
            }
        }
        Routing { layers }
    }

    /// Experts of the model.
    pub(crate) fn experts(&self) -> f64 {
        self.layers.iter().map(|&(experts, _, count)| experts as f64 * count).sum()
    }

    /// Different experts that so many rows use, summed over the layers, if each chooses at random.
    pub(crate) fn union(&self, rows: f64) -> f64 {
        self.layers.iter().map(|&(experts, top_k, count)| count * union_of_layer(experts, top_k, rows)).sum()
    }

    /// The part of the experts of a step with so many rows that is in memory when their layer begins. Memory has room for so many experts, and
    /// has been filled with so many (`(slots, held)`).
    ///
    /// One row finds what the traces of real models find. Of several, each finds in its part of the memory what it would find alone; of the
    /// rest, it finds what lies by chance in the parts of the others. And what a layer misses has to be somewhere until it is computed: so much less of
    /// all other layers is kept. Where the experts that a step uses in one layer do not fit, nothing is kept.
    pub(crate) fn hit_rate(&self, (slots, held): (f64, f64), rows: f64) -> f64 {
        let Some(&(experts, top_k, _)) = self.layers.iter().max_by_key(|(experts, ..)| *experts) else { return 1.0 };
        let (all, rows) = (self.experts(), rows.max(1.0));
        if held >= all {
            return 1.0;
        }
        // If a part h of what is used is kept, a layer misses 1 - h of what it uses, and slots - (1 - h) × used hold h of all. What is missed by
        // one row is part of what the traces say.
        let used = (union_of_layer(experts, top_k, rows) - top_k as f64).max(0.0);
        let most = if slots < all { ((slots - used) / (all - used).max(1.0)).max(0.0) } else { 1.0 };
        let kept = (held / all).min(most);
        let alone = Curve::nearest(top_k, experts).hit_rate(kept / rows);
        let by_chance = kept * (1.0 - 1.0 / rows) / (1.0 - kept / rows);
        let found = 1.0 - (1.0 - alone) * (1.0 - by_chance);
        found.min(held / self.union(rows).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
    }
}

/// Different experts that so many rows use in one layer, if each chooses at random.
pub(crate) fn union_of_layer(experts: usize, top_k: usize, rows: f64) -> f64 {
    let experts = experts.max(1) as f64;
    experts * (1.0 - (1.0 - top_k as f64 / experts).max(0.0).powf(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twelve layers of `bench-34x128`, of which a token uses 8 of 128 experts each.
    fn routing() -> Routing {
        Routing { layers: vec![(128, 8, 12.0)] }
    }

    /// Rows of a step, experts that fit, and experts that a step has missed of those that it used: the measurements on simulated drives in
    /// docs/notes/2026-11-30-benchmarks.md (megabytes missed per token × rows ÷ 2.65 MB). Where nothing was found, all that were used were missed.
    #[test]
    fn steps_find_what_they_were_measured_to_find() {
        for (rows, slots, missed, used) in [
            (8.0, 92.0, 552.0, 582.0),
            (8.0, 215.0, 459.0, 582.0),
            (8.0, 614.0, 225.0, 582.0),
            (32.0, 92.0, 1220.0, 1220.0),
            (32.0, 230.0, 1111.0, 1220.0),
            (32.0, 568.0, 773.0, 1220.0),
            (128.0, 107.0, 1497.0, 1497.0),
            (128.0, 246.0, 1400.0, 1497.0),
            (128.0, 584.0, 1014.0, 1497.0),
        ] {
            let (found, expected) = (1.0 - missed / used, routing().hit_rate((slots, slots), rows));
            assert!((found - expected).abs() < 0.04, "{rows} rows, {slots} slots: {expected}, not {found}");
        }
    }

    #[test]
    fn one_row_finds_what_a_trace_says_and_all_find_what_there_is() {
        let (routing, all) = (routing(), 1536.0);
        let alone = Curve::nearest(8, 128).hit_rate(0.25);
        assert!((routing.hit_rate((all / 4.0, all / 4.0), 1.0) - alone).abs() < 1e-12);
        for rows in [1.0, 8.0, 1000.0] {
            assert_eq!((routing.hit_rate((all, all), rows), routing.hit_rate((0.0, 0.0), rows)), (1.0, 0.0));
            let rates =
                (0..=48).map(|part| f64::from(part) * all / 48.0).map(|slots| routing.hit_rate((slots, slots), rows));
            assert!(rates.clone().zip(rates.skip(1)).all(|(less, more)| less <= more), "{rows}");
            // While memory fills, nothing has to leave.
            let filling = routing.hit_rate((all / 2.0, all / 8.0), rows);
            assert!(filling >= routing.hit_rate((all / 8.0, all / 8.0), rows), "{rows}");
        }
        assert_eq!(Routing { layers: Vec::new() }.hit_rate((0.0, 0.0), 1.0), 1.0);
        // By hand: 12 layers × 128 × (1 - 0.9375 ** 8).
        assert!((routing.union(8.0) - 12.0 * 51.62).abs() < 0.1, "{}", routing.union(8.0));
    }
}

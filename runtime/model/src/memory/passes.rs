//! How many rows of a long prompt go through a layer together.
//!
//! A pass of a prompt reads nearly all experts that are not in memory. So a prompt that takes several passes reads them several times, and
//! gains more from scratch for longer passes than from the experts that would lie in that memory. While tokens are generated it is the
//! other way round. So a model is opened with scratch for short passes, and while a long prompt is read, some of the slots make room for
//! what longer passes need. Which length is best follows from counts alone: the bytes that a prompt reads, and those that are read again
//! because their slots had to go.

use sluice_format::{AttentionSpec, ModelSpec};

use super::{MemoryPlan, Need};
use sluice_storage::pool::{LayerSize, PREFETCH_SLOTS, SlotClass, SlotPlan};

/// Rows by which the lengths of passes differ that are compared.
const STEP: usize = 256;
/// Operations that a machine computes while its drive reads a byte: some 100 GFLOP/s and 3 GB/s. It weighs what passes compute again
/// against what they read again.
const OPERATIONS_PER_BYTE: u64 = 32;
/// Longer passes must save at least this part of the bytes: which experts are missed in the end is not known.
const LEAST_GAIN: f64 = 0.1;

/// The lengths that passes can have beyond the planned one, and what passes of a prompt cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LongPasses {
    /// Rows of a pass, ascending, and the bytes that they need beyond those of the plan.
    lengths: Vec<(usize, u64)>,
    /// The layers with experts.
    layers: Vec<LayerSize>,
    /// What it costs to expand one token's latents again in every layer, as bytes that are read in the same time; 0 in the absorbed form.
    expansion: u64,
}

/// The part of a step that reads prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Rows of the step, those that generate included; 0 if it reads no prompt.
    pub rows: usize,
    /// Tokens of the same prompts that later steps read.
    pub later: usize,
    /// Tokens that stand before them in their sequences.
    pub before: usize,
}

/// A pass that is longer than planned.
#[derive(Clone, Debug)]
pub(crate) struct LongPass {
    pub rows: usize,
    /// The slots that remain meanwhile.
    pub slots: SlotPlan,
    /// Bytes that it needs beyond those of the plan.
    pub scratch: u64,
}

impl LongPasses {
    pub(super) fn new(need: &Need<'_>, (rows, kept): (usize, u64)) -> LongPasses {
        let (planned, pages) = (need.scratch(rows, kept), need.kv_cache(rows));
        let lengths = (rows + 1..=need.most_rows()).filter(|&longer| longer % STEP == 0 || longer == need.most_rows());
        // Pages are made when the model is opened, and windows have as many as the planned passes need.
        let lengths = lengths.filter(|&longer| need.kv_cache(longer) == pages);
        let lengths = lengths.map(|longer| (longer, need.scratch(longer, kept).saturating_sub(planned)));
        let expansion = if need.demand.expanding > 0 { expansion(need.spec) / OPERATIONS_PER_BYTE } else { 0 };
        LongPasses { lengths: lengths.collect(), layers: need.layers.clone(), expansion }
    }

    /// What a prompt costs in passes of at most `rows` rows while slots have `held` of the `all` bytes of the experts, as bytes. `streamed`: those
    /// of dense parts that each pass reads.
    fn cost(&self, reading: Reading, rows: usize, (held, all): (u64, u64), streamed: u64) -> f64 {
        let passes = reading.rows.div_ceil(rows) as f64;
        let each = reading.rows as f64 / passes;
        let missing = 1.0 - held as f64 / all.max(1) as f64;
        let read: f64 = self.layers.iter().map(|layer| layer.len as f64 * used(layer, each)).sum();
        // Each pass expands what stands before it.
        let again = reading.before as f64 * passes + reading.rows as f64 * (passes - 1.0) / 2.0;
        passes * (missing.max(0.0) * read + streamed as f64) + again * self.expansion as f64
    }
}

/// Experts of a layer that so many rows use, if each chooses at random.
fn used(layer: &LayerSize, rows: f64) -> f64 {
    let unused = 1.0 - layer.top_k as f64 / layer.experts.max(1) as f64;
    layer.experts as f64 * (1.0 - unused.max(0.0).powf(rows))
}

/// Operations that expand one token's latents to the keys and values of all heads, over all layers.
fn expansion(spec: &ModelSpec) -> u64 {
    let of_layer = |attention: &AttentionSpec| match attention {
        AttentionSpec::Mla(m) => 2 * m.kv_lora_rank * m.heads * (m.qk_nope_head_dim + m.v_head_dim),
        _ => 0,
    };
    spec.layers.iter().map(|layer| of_layer(&layer.attention) as u64).sum()
}

impl MemoryPlan {
    /// How many rows go through a layer together as planned, and the longer pass that is better for so much to read, if one is.
    pub(crate) fn passes(&self, reading: Reading) -> (usize, Option<LongPass>) {
        let (long, streamed) = (&self.long_passes, self.dense_streamed);
        if reading.rows <= self.rows {
            return (self.rows, None);
        }
        let reading = Reading { rows: reading.rows + reading.later, later: 0, ..reading };
        let bytes = |class: &SlotClass| class.len.saturating_mul(class.experts as u64);
        let all: u64 = self.slot_plan.classes().iter().map(bytes).fold(0, u64::saturating_add);
        let planned = long.cost(reading, self.rows, (self.slot_bytes, all), streamed);
        let mut best = (planned * (1.0 - LEAST_GAIN), None);
        for &(rows, extra) in &long.lengths {
            let slots =
                self.slot_bytes.checked_sub(extra).and_then(|bytes| self.slot_plan.within(bytes, PREFETCH_SLOTS));
            let Some(slots) = slots else { break };
            let held = slots.bytes();
            // Experts whose slots go have to be read again.
            let cost = long.cost(reading, rows, (held, all), streamed) + (self.slot_bytes - held) as f64;
            if cost < best.0 {
                best = (cost, Some(LongPass { rows, slots, scratch: extra }));
            }
            if rows >= reading.rows {
                break;
            }
        }
        (self.rows, best.1)
    }

    /// How many rows go through a layer together in a step that reads so many tokens of prompts, with so many tokens before them in their
    /// sequences.
    pub fn rows_together(&self, tokens: usize, before: usize) -> usize {
        let (planned, longer) = self.passes(Reading { rows: tokens, later: 0, before });
        longer.map_or(planned, |pass| pass.rows)
    }
}

//! What a model needs of a machine, and how fast it can be there: arithmetic on sizes, without a file and without a measurement.
//!
//! A token needs all dense parts and its experts once. Parts that are not in memory are read from the drive, and everything is read
//! from memory once to be multiplied. Both happen at the same time, so the slower of the two determines the speed: a roofline. This
//! leaves out computing itself, which can be slower than both on small machines and with small types.

use serde::Serialize;
use sluice_format::{ExtentKind, ExtentRecord, ModelFile, ModelSpec, NO_LAYER, TensorRecord};
use sluice_kernels::KvType;

use sluice_model::Sequence;
use sluice_model::memory::{BudgetError, Demand, MemoryPlan};

/// What a machine offers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Memory that is available, in bytes.
    pub ram: u64,
    /// Bytes per second that the drive reads.
    pub ssd: u64,
    /// Seconds between the submission of a read and its first byte, where the drive has nothing else to do.
    pub ssd_latency: f64,
    /// Bytes per second that the memory reads.
    pub memory_bandwidth: u64,
}

/// Hit rates of the default policy by the part of all experts that is in memory, from the replay of a recorded trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    /// The trace.
    pub trace: &'static str,
    /// Experts per token and layer, when it was recorded.
    pub top_k: usize,
    /// Experts per layer.
    pub experts: usize,
    /// `(part of all experts, hit rate)`, ascending: whole traces, beginning with an empty cache.
    pub points: &'static [(f64, f64)],
}

/// The traces are short and of one prompt each. Measurements of other models and texts scatter around them by
/// [`HIT_RATE_SPREAD`] and more. A test replays them.
pub const CURVES: [Curve; 3] = [
    Curve {
        trace: "olmoe-1b-7b",
        top_k: 8,
        experts: 64,
        points: &[(0.03, 0.142), (0.06, 0.294), (0.12, 0.473), (0.25, 0.651), (0.5, 0.837)],
    },
    Curve {
        trace: "qwen3-30b-a3b",
        top_k: 6,
        experts: 128,
        points: &[(0.03, 0.304), (0.06, 0.457), (0.12, 0.628), (0.25, 0.809), (0.5, 0.913)],
    },
    Curve {
        trace: "gpt-oss-120b",
        top_k: 2,
        experts: 128,
        points: &[(0.03, 0.350), (0.06, 0.484), (0.12, 0.619), (0.25, 0.737)],
    },
];

/// How far a hit rate can easily be from that of a curve.
pub const HIT_RATE_SPREAD: f64 = 0.15;

impl Curve {
    /// The curve of the trace whose tokens use the most similar part of a layer's experts.
    pub fn nearest(top_k: usize, experts: usize) -> &'static Curve {
        let part = |k: usize, e: usize| (k.max(1) as f64 / e.max(1) as f64).ln();
        let distance = |c: &Curve| (part(c.top_k, c.experts) - part(top_k, experts)).abs();
        CURVES.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("there are curves")
    }

    /// The hit rate if this part of all experts is in memory: linear in its logarithm between the points and up to the whole, which
    /// always hits; proportional below the first point.
    pub fn hit_rate(&self, part: f64) -> f64 {
        let mut below: Option<(f64, f64)> = None;
        for &(x, y) in self.points.iter().chain(&[(1.0, 1.0)]) {
            if part < x {
                return match below {
                    None => y * part.max(0.0) / x,
                    Some((x0, y0)) => y0 + (y - y0) * (part / x0).ln() / (x / x0).ln(),
                };
            }
            below = Some((x, y));
        }
        1.0
    }
}

/// What a model needs, on any machine. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Least memory with which it can be computed.
    pub least_memory: u64,
    /// Memory beyond which more does not help, because everything stays in memory.
    pub best_memory: u64,
    /// Bytes that every token reads: attention, routers, shared experts and the output head.
    pub dense_bytes: u64,
    /// Keys, values and states that a token reads when the context is full.
    pub kv_cache_bytes: u64,
    /// Size of the longest expert.
    pub expert_bytes: u64,
    /// And of the shortest: types can differ between layers.
    pub smallest_expert_bytes: u64,
    /// Experts of the model.
    pub experts: usize,
    /// Experts that one token uses, over all layers.
    pub experts_per_token: usize,
    /// Their size in memory.
    pub token_cycle_bytes: u64,
    /// Their size on the drive, which is less if they are compressed.
    pub token_cycle_stored: u64,
}

/// Which of the two determines the speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Reading from the drive.
    Drive,
    /// Reading from memory.
    Memory,
}

/// How fast a machine can decode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// How its memory would be used.
    pub memory: MemoryPlan,
    /// Part of all experts that is in memory.
    pub cached: f64,
    /// The same in token cycles: experts in memory ÷ experts per token.
    pub cached_cycles: f64,
    /// The trace whose hit rates are used; `None` if all experts fit, or there are none.
    pub curve: Option<&'static str>,
    /// Part of a token's experts that is expected to be in memory.
    pub hit_rate: f64,
    /// Bytes that a token is expected to read from the drive: experts, …
    pub missed_bytes: u64,
    /// … and dense parts that do not fit.
    pub streamed_bytes: u64,
    /// Bytes that a token reads from memory.
    pub touched_bytes: u64,
    /// Seconds for the drive's part of a token.
    pub drive_seconds: f64,
    /// Seconds for the memory's part.
    pub memory_seconds: f64,
    /// The slower of the two.
    pub bound: Bound,
    /// 1 ÷ its seconds.
    pub tokens_per_second: f64,
    /// The same with hit rates that are lower and higher by [`HIT_RATE_SPREAD`].
    pub tokens_per_second_range: [f64; 2],
}

impl Needs {
    /// What a model of these extents needs for `context` tokens, with keys and values of type `kv_type`.
    pub fn of(spec: &ModelSpec, extents: &[ExtentRecord], context: usize, kv_type: KvType) -> Self {
        let demand = Demand::one(context, kv_type);
        let extents = &extents.iter().filter(|extent| spec.decodes(extent)).copied().collect::<Vec<_>>()[..];
        let least = MemoryPlan::of_extents(spec, extents, Some(0), demand, u64::MAX / 2);
        let best = MemoryPlan::of_extents(spec, extents, None, demand, u64::MAX / 2);
        let bytes_of = |wanted: &dyn Fn(ExtentKind) -> bool| -> u64 {
            extents.iter().filter(|e| wanted(e.kind)).map(|e| e.padded_len).sum()
        };
        let experts = || extents.iter().filter(|e| e.kind == ExtentKind::Expert);
        let top_k =
            |layer: u32| spec.layers.get(layer as usize).and_then(|l| l.ffn.moe.as_ref()).map_or(0, |m| m.top_k);
        // The experts of a layer have equal lengths in memory; compressed in the file, nearly equal ones.
        let cycle = |len: &dyn Fn(&ExtentRecord) -> u64| -> u64 {
            experts().filter(|e| e.index == 0).map(|e| len(e) * top_k(e.layer) as u64).sum()
        };
        Needs {
            least_memory: least.map_or_else(|e| e.least, |plan| plan.effective),
            best_memory: best.as_ref().map_or(0, |plan| plan.effective),
            dense_bytes: bytes_of(&|kind| {
                !matches!(kind, ExtentKind::Expert | ExtentKind::Embedding | ExtentKind::Table)
            }),
            kv_cache_bytes: Sequence::touched(spec, context, kv_type),
            expert_bytes: experts().map(|e| e.padded_len).max().unwrap_or(0),
            smallest_expert_bytes: experts().map(|e| e.padded_len).min().unwrap_or(0),
            experts: experts().count(),
            experts_per_token: spec.routed_per_token(),
            token_cycle_bytes: cycle(&|e| e.padded_len),
            token_cycle_stored: cycle(&|e| e.stored_len),
        }
    }
}

/// The bytes and operations of a step that decodes one token of each of several sequences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepWork {
    /// Bytes of dense parts, distinct experts, keys and values that it reads from memory.
    pub touched_bytes: f64,
    /// Multiplications and additions with weights.
    pub operations: f64,
}

impl StepWork {
    /// The work of `sequences` rows at a mean `position`, which use `experts` distinct experts, summed over the layers.
    ///
    /// Every row meets every dense weight, and top-k experts in each layer that has experts. Everything is read once for all rows,
    /// except for keys and values, which belong to one row.
    pub fn of(file: &ModelFile, sequences: usize, experts: f64, position: f64, kv_type: KvType) -> Self {
        let decodes = |t: &TensorRecord| t.layer == NO_LAYER || (t.layer as usize) < file.spec().layers.len();
        let weights = |kind: ExtentKind, layer: Option<usize>| -> f64 {
            let of_kind =
                |t: &&TensorRecord| t.kind == kind && decodes(t) && layer.is_none_or(|layer| t.layer as usize == layer);
            file.tensors().iter().filter(of_kind).map(TensorRecord::weights).sum::<u64>() as f64
        };
        let dense_kinds = [ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense, ExtentKind::Head];
        let dense: f64 = dense_kinds.iter().map(|&kind| weights(kind, None)).sum();
        let layers = file.spec().layers.iter().enumerate();
        let routed = layers.filter_map(|(layer, l)| Some((layer, l.ffn.moe.as_ref()?.top_k)));
        let chosen: f64 = routed.map(|(layer, top_k)| top_k as f64 * weights(ExtentKind::Expert, Some(layer))).sum();
        let needs = Needs::of(file.spec(), file.extents(), position as usize, kv_type);
        let keys = sequences as f64 * needs.kv_cache_bytes as f64;
        // Experts of all sizes are used as often as their layers choose them.
        let expert_bytes = needs.token_cycle_bytes as f64 / needs.experts_per_token.max(1) as f64;
        StepWork {
            touched_bytes: needs.dense_bytes as f64 + experts * expert_bytes + keys,
            operations: 2.0 * sequences as f64 * (dense + chosen),
        }
    }
}

impl Speed {
    /// The same with another hit rate, such as that of a trace of this very model.
    #[must_use]
    pub fn with_hit_rate(self, needs: &Needs, machine: Machine, hit_rate: f64) -> Self {
        let missed_bytes = (needs.token_cycle_stored as f64 * (1.0 - hit_rate.clamp(0.0, 1.0))).round() as u64;
        let drive_seconds = (missed_bytes + self.streamed_bytes) as f64 / machine.ssd as f64;
        let tokens_per_second = 1.0 / f64::max(drive_seconds, self.memory_seconds);
        Speed {
            hit_rate,
            missed_bytes,
            drive_seconds,
            bound: if drive_seconds > self.memory_seconds { Bound::Drive } else { Bound::Memory },
            tokens_per_second,
            tokens_per_second_range: [tokens_per_second; 2],
            ..self
        }
    }

    /// How fast `machine` can decode a model of these extents with `context` tokens in memory, their keys and values of
    /// type `kv_type`.
    ///
    /// # Errors
    /// [`BudgetError`] if the machine's memory does not suffice.
    pub fn of(
        spec: &ModelSpec,
        extents: &[ExtentRecord],
        machine: Machine,
        context: usize,
        kv_type: KvType,
    ) -> Result<Self, BudgetError> {
        let needs = Needs::of(spec, extents, context, kv_type);
        let memory = MemoryPlan::of_extents(spec, extents, None, Demand::one(context, kv_type), machine.ram)?;
        let cached = if needs.experts == 0 { 1.0 } else { memory.slots as f64 / needs.experts as f64 };
        let moe = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref()).max_by_key(|m| m.experts);
        let curve = moe.filter(|_| cached < 1.0).map(|m| Curve::nearest(m.top_k, m.experts));
        let hit_rate = curve.map_or(1.0, |c| c.hit_rate(cached));
        let touched_bytes = needs.dense_bytes + needs.token_cycle_bytes + needs.kv_cache_bytes;
        let memory_seconds = touched_bytes as f64 / machine.memory_bandwidth as f64;
        let speed = Speed {
            cached,
            cached_cycles: memory.slots as f64 / needs.experts_per_token.max(1) as f64,
            curve: curve.map(|c| c.trace),
            hit_rate,
            missed_bytes: 0,
            streamed_bytes: memory.dense_streamed,
            touched_bytes,
            drive_seconds: 0.0,
            memory_seconds,
            bound: Bound::Memory,
            tokens_per_second: 0.0,
            tokens_per_second_range: [0.0; 2],
            memory,
        };
        let spread = if curve.is_some() { HIT_RATE_SPREAD } else { 0.0 };
        let at = |hit_rate| speed.clone().with_hit_rate(&needs, machine, hit_rate).tokens_per_second;
        let tokens_per_second_range = [at(hit_rate - spread), at(hit_rate + spread)];
        Ok(Speed { tokens_per_second_range, ..speed.with_hit_rate(&needs, machine, hit_rate) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_interpolate_and_end_at_everything() {
        let curve = Curve { trace: "", top_k: 1, experts: 8, points: &[(0.1, 0.4), (0.2, 0.6)] };
        for (part, rate) in [(0.0, 0.0), (0.05, 0.2), (0.1, 0.4), (0.2, 0.6), (1.0, 1.0), (2.0, 1.0)] {
            assert!((curve.hit_rate(part) - rate).abs() < 1e-12, "{part}");
        }
        // Halfway in the logarithm.
        assert!((curve.hit_rate(0.1 * 2f64.sqrt()) - 0.5).abs() < 1e-12);
        assert_eq!(Curve::nearest(8, 256).trace, "qwen3-30b-a3b");
        assert_eq!(Curve::nearest(2, 8).trace, "olmoe-1b-7b");
    }
}

//! How long a token takes: the schedule of its layers on a drive and the cores, simulated.
//!
//! The longest of reading and computing is what a token takes at least ([`Speed`]). It takes longer, because only parts of it overlap. A
//! layer knows its experts once its router has chosen, so the drive has nothing to do for the layer while its attention is computed, except
//! for what is read ahead. Misses come in bursts: a layer that misses many waits for the drive, and the next one that misses none leaves it idle.
//! While the drive is read, one core is left to it. What was read is verified. And every product begins and ends with a barrier, whatever its size.
//!
//! The simulation takes tokens through the layers by these rules, with the misses of a replayed trace or with random ones.

use serde::Serialize;
use sluice_format::{AttentionSpec, ExtentKind, ExtentRecord, ModelSpec};
use sluice_kernels::KvType;
use sluice_model::Sequence;
use sluice_model::memory::MemoryPlan;

use crate::estimate::{HIT_RATE_SPREAD, Machine, Speed};
use crate::trace::Replay;

/// Parallel sections of a layer beside those of its experts: norm and projections, heads, output; then the router.
pub(crate) const LAYER_SECTIONS: f64 = 6.0;
/// Of a gated network: the gate and up projections, then the down projection.
pub(crate) const FFN_SECTIONS: f64 = 2.0;
/// Seconds between the submission of a read and its first byte on an ordinary drive, where that was not measured.
pub const USUAL_LATENCY: f64 = 80e-6;
/// Of the experts that a layer misses, how many its predecessor names surely enough that they are read ahead. With this share, the simulation
/// gives the six measurements of `bench-34x128` on simulated drives that a test has within 8 %.
const NAMED_AHEAD: f64 = 0.3;
/// Of an expert's work, what is left to do when its last byte comes, since it is computed in parts.
const LAST_PART: f64 = 0.3;
/// Tokens that are simulated where no trace gives the misses.
const TOKENS: usize = 192;
/// By how much the share of experts that a token misses differs from token to token: standard deviation ÷ mean.
const BURSTS: f64 = 0.35;

/// What the cores do in a second, for the weights of one model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cores {
    /// Bytes of experts that products with one token take.
    pub experts: f64,
    /// The same with the threads that compute while the drive is read.
    pub experts_beside_reads: f64,
    /// Bytes of dense parts, …
    pub dense: f64,
    /// … and beside reads.
    pub dense_beside_reads: f64,
    /// Of the bytes per second that the drive gives alone, the part that it gives while those threads compute. It is less than 1 where the host of
    /// a virtual machine moves the bytes with the same cores, or where memory is short of bandwidth.
    pub reads_beside: f64,
    /// Seconds that a burst of reads takes beyond its bytes ÷ bandwidth, while those threads compute and the drive was idle before; none where that
    /// was not measured. Hosts of virtual machines, drives and processors have to wake up, so it can be much more than the latency of reads that
    /// follow each other.
    pub burst_latency: Option<f64>,
    /// Bytes of keys and values.
    pub keys: f64,
    /// Multiplications and additions of f32, of which attention consists; none where that was not measured.
    pub operations: Option<f64>,
    /// Bytes of checksums that the threads form that compute while the drive is read, out of a cache; none where that was not measured.
    pub verification: Option<f64>,
    /// Seconds that a parallel section takes however little it does.
    pub section_seconds: f64,
}

impl Cores {
    /// Cores of which only this is known: that they take so many bytes of anything.
    pub fn of_rate(bytes_per_second: f64) -> Self {
        Cores {
            experts: bytes_per_second,
            experts_beside_reads: bytes_per_second,
            dense: bytes_per_second,
            dense_beside_reads: bytes_per_second,
            reads_beside: 1.0,
            burst_latency: None,
            keys: bytes_per_second,
            operations: None,
            verification: None,
            section_seconds: 0.0,
        }
    }

    /// Seconds of verifying so many bytes, times the part of their speed that experts keep beside reads: the simulation divides by it.
    pub(crate) fn verify_seconds(&self, bytes: f64) -> f64 {
        self.verification.map_or(0.0, |rate| bytes / rate * self.experts_beside_reads / self.experts)
    }
}

/// How long a token is expected to take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Part of a token's experts that is in memory when their layer begins.
    pub hit_rate: f64,
    /// Seconds of a token that finds everything in memory.
    pub computing_seconds: f64,
    /// Seconds that the drive reads for a token.
    pub drive_seconds: f64,
    /// Seconds of a token.
    pub token_seconds: f64,
    /// 1 ÷ those.
    pub tokens_per_second: f64,
    /// The same with hit rates that are lower and higher by [`HIT_RATE_SPREAD`], where they are those of another model.
    pub tokens_per_second_range: [f64; 2],
}

/// The work of a token in one layer, or of a step with several. Times in seconds, on all threads and without reads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Layer {
    /// Until the router has chosen.
    pub(crate) before: f64,
    /// What needs no expert.
    pub(crate) shared: f64,
    /// Experts of the token; different ones of a step.
    pub(crate) top_k: usize,
    /// An expert, computing …
    pub(crate) expert: f64,
    /// … verifying it after it was read, …
    pub(crate) verify: f64,
    /// … and reading.
    pub(crate) read: f64,
    /// The drive's time for dense parts that do not stay in memory.
    pub(crate) streamed: f64,
}

/// The work of a token, or of a step with several.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Work {
    layers: Vec<Layer>,
    /// The output head.
    head: f64,
    /// Between the submission of a read and its first byte, where the drive has nothing else to do.
    latency: f64,
    /// Of the speed on all threads, what those have that compute while the drive is read: of experts and of dense parts.
    beside: (f64, f64),
    /// Of the drive's speed, what it has while the cores compute.
    reads_beside: f64,
}

impl Work {
    pub(crate) fn new(layers: Vec<Layer>, head: f64, cores: &Cores, latency: f64) -> Self {
        let beside = (cores.experts_beside_reads / cores.experts, cores.dense_beside_reads / cores.dense);
        let latency = cores.burst_latency.unwrap_or(0.0).max(latency);
        Work { layers, head, latency, beside, reads_beside: cores.reads_beside }
    }

    fn of(
        spec: &ModelSpec,
        extents: &[ExtentRecord],
        (memory, machine): (&MemoryPlan, &Machine),
        cores: &Cores,
        (context, kv_type): (usize, KvType),
    ) -> Self {
        let bytes = |kind: ExtentKind, layer: Option<usize>| -> f64 {
            let of_layer = |e: &&ExtentRecord| layer.is_none_or(|layer| e.layer as usize == layer);
            let of_kind = extents.iter().filter(|e| e.kind == kind && spec.decodes(e));
            of_kind.filter(of_layer).map(|e| e.padded_len as f64).sum()
        };
        let (count, ssd) = (spec.layers.len().max(1) as f64, machine.ssd as f64);
        let keys = Sequence::touched(spec, context, kv_type) as f64 / count / cores.keys;
        let streamed = memory.dense_streamed as f64 / count / ssd;
        let sections = |count: f64| count * cores.section_seconds;
        let layers = spec.layers.iter().enumerate().map(|(number, layer)| {
            let of = |kind| bytes(kind, Some(number));
            let arithmetic =
                cores.operations.map_or(0.0, |rate| attention_operations(&layer.attention, context) / rate);
            let attention = of(ExtentKind::Attention) / cores.dense + keys.max(arithmetic);
            let choosing = of(ExtentKind::Router) / cores.dense;
            let dense = of(ExtentKind::Dense);
            let dense = if dense > 0.0 { dense / cores.dense + sections(FFN_SECTIONS) } else { 0.0 };
            let (before, top_k) =
                (attention + choosing + sections(LAYER_SECTIONS), layer.ffn.moe.as_ref().map_or(0, |m| m.top_k));
            let expert = extents.iter().find(|e| e.kind == ExtentKind::Expert && e.layer as usize == number);
            let expert = expert.filter(|_| top_k > 0);
            Layer {
                before,
                shared: dense,
                top_k,
                expert: expert.map_or(0.0, |e| e.padded_len as f64 / cores.experts + sections(FFN_SECTIONS)),
                verify: expert.map_or(0.0, |e| cores.verify_seconds(e.padded_len as f64)),
                read: expert.map_or(0.0, |e| e.stored_len as f64 / ssd),
                streamed,
            }
        });
        let head = bytes(ExtentKind::Head, None) / cores.dense + sections(1.0);
        Work::new(layers.collect(), head, cores, machine.ssd_latency)
    }

    /// Seconds of a token that finds everything in memory.
    fn computing(&self) -> f64 {
        let of_layer = |layer: &Layer| layer.before + layer.shared + layer.top_k as f64 * layer.expert;
        self.layers.iter().map(of_layer).sum::<f64>() + self.head
    }
}

/// Multiplications and additions of one query of every head with the keys and values of `context` tokens; 0 where they are not what takes
/// the time.
pub(crate) fn attention_operations(attention: &AttentionSpec, context: usize) -> f64 {
    let (heads, width, positions) = match attention {
        // Absorbed: all heads meet the same latents.
        AttentionSpec::Mla(mla) => {
            let seen = mla.indexer.as_ref().map_or(context, |indexer| indexer.index_top_k.min(context));
            (mla.heads, 2 * mla.kv_lora_rank + mla.qk_rope_head_dim, seen)
        }
        AttentionSpec::Gqa(gqa) => {
            (gqa.heads, gqa.head_dim + gqa.v_head_dim, gqa.reach().unwrap_or(context).min(context))
        }
        AttentionSpec::Delta(_) | AttentionSpec::Mamba(_) | AttentionSpec::Compressed(_) => return 0.0,
    };
    2.0 * (heads * width) as f64 * positions as f64
}

/// A drive and cores at work. Times in seconds since the first token.
struct Simulation<'a> {
    work: &'a Work,
    now: f64,
    /// When the drive has read all that it was asked for.
    idle: f64,
    /// When those experts of the next layer come that are read ahead, and when the dense parts that do not stay.
    ahead: Vec<f64>,
    dense: f64,
    /// When those of this layer come that it misses.
    missed: Vec<f64>,
    /// Seconds that the drive reads, on its own.
    reading: f64,
}

impl Simulation<'_> {
    /// Computes for so many seconds' worth of all threads; `beside`: their speed while the drive is read.
    /// What the drive still has to read takes longer meanwhile.
    fn compute(&mut self, seconds: f64, beside: f64) {
        let (now, speed) = (self.now, self.work.reads_beside);
        let busy = (self.idle - now).max(0.0) / speed;
        let meanwhile = busy * beside;
        let time = if seconds <= meanwhile { seconds / beside } else { busy + seconds - meanwhile };
        let late = time.min(busy) * (1.0 - speed);
        let ends = self.ahead.iter_mut().chain(&mut self.missed).chain([&mut self.idle, &mut self.dense]);
        ends.filter(|end| **end > now).for_each(|end| *end += ((*end - now) * (1.0 / speed - 1.0)).min(late));
        self.now += time;
    }

    /// Takes a token through a layer that misses so many experts, and has the drive read `named` of those that the next one misses.
    fn layer(&mut self, number: usize, missing: usize, next: (usize, usize)) {
        let work = self.work;
        let layer = &work.layers[number];
        let (beside_experts, beside_dense) = work.beside;
        self.now = self.now.max(self.dense);
        self.compute(layer.before, beside_dense);
        // What has not begun when the router has chosen is not read ahead: demand overtakes it.
        let (now, read) = (self.now, layer.read);
        self.missed.clear();
        self.missed.extend(self.ahead.drain(..).filter(|end| end - read < now).take(missing));
        let mut end = self.missed.last().copied().unwrap_or(now).max(self.dense).max(now);
        let (demanded, latency) = (missing - self.missed.len(), work.latency);
        self.reading += missing as f64 * read;
        if demanded > 0 {
            // It passes while the drive reads what it was asked for before.
            end = end.max(now + latency);
        }
        for _ in 0..demanded {
            end += read;
            self.missed.push(end);
        }
        let (next, named) = next;
        let next = &work.layers[next];
        if next.streamed > 0.0 {
            end += next.streamed;
            self.reading += next.streamed;
            self.dense = end;
        }
        if named > 0 && self.idle <= now {
            end = end.max(now + latency);
        }
        // Experts that are read ahead keep the drive busy until the next router has chosen; how many, only then is known.
        self.ahead.extend((1..=named).map(|count| end + count as f64 * next.read));
        self.idle = self.ahead.last().copied().unwrap_or(end);
        self.compute(layer.shared + layer.top_k.saturating_sub(missing) as f64 * layer.expert, beside_experts);
        let arrived = layer.expert + layer.verify;
        for at in 0..self.missed.len() {
            self.now = self.now.max(self.missed[at] - read);
            self.compute(arrived, beside_experts);
            self.now = self.now.max(self.missed[at] + LAST_PART * arrived);
        }
    }
}

/// Seconds of a token, and those that the drive reads for it, where tokens miss these experts layer by layer.
fn simulate(work: &Work, misses: &[usize], named: &mut dyn FnMut(usize) -> usize) -> (f64, f64) {
    let layers = work.layers.len();
    let tokens = misses.len() / layers.max(1);
    if tokens == 0 {
        return (work.computing(), 0.0);
    }
    let (ahead, missed) = (Vec::new(), Vec::new());
    let mut simulation = Simulation { work, now: 0.0, idle: 0.0, ahead, dense: 0.0, missed, reading: 0.0 };
    for (at, &missing) in misses.iter().enumerate().take(tokens * layers) {
        let number = at % layers;
        // The first layer has no router before it that would name its experts.
        let next = (number + 1) % layers;
        let ahead = if next > 0 { named(misses[at + 1]) } else { 0 };
        simulation.layer(number, missing.min(work.layers[number].top_k), (next, ahead));
        if next == 0 {
            simulation.compute(work.head, work.beside.1);
        }
    }
    (simulation.now / tokens as f64, simulation.reading / tokens as f64)
}

/// Numbers that look random and are always the same (xorshift64*).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    /// Between 0 and 1.
    pub(crate) fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// How many of so many happen, of which each has that chance.
    fn of(&mut self, count: usize, chance: f64) -> usize {
        (0..count).filter(|_| self.next() < chance).count()
    }
}

/// Seconds of a step of so many rows at this hit rate: the mean of some steps.
pub(crate) fn mean_seconds(work: &Work, hit_rate: f64, rows: f64, steps: usize) -> f64 {
    // What one row misses more, another one misses less.
    let misses = misses_of(work, hit_rate, BURSTS / rows.max(1.0).sqrt(), steps);
    let mut numbers = Numbers(7);
    simulate(work, &misses, &mut |missing| numbers.of(missing, NAMED_AHEAD)).0
}

/// Misses of [`TOKENS`] tokens, layer by layer, at this hit rate.
fn random_misses(work: &Work, hit_rate: f64) -> Vec<usize> {
    misses_of(work, hit_rate, BURSTS, TOKENS)
}

/// Misses of so many steps, layer by layer, at this hit rate.
fn misses_of(work: &Work, hit_rate: f64, bursts: f64, steps: usize) -> Vec<usize> {
    let mut numbers = Numbers(1);
    let mut misses = Vec::with_capacity(steps * work.layers.len());
    for _ in 0..steps {
        // Twelve of them add up to nearly a normal distribution, with a standard deviation of 1.
        let normal = (0..12).map(|_| numbers.next()).sum::<f64>() - 6.0;
        // As far up as down, so that the mean stays.
        let (mean, most) = (1.0 - hit_rate, hit_rate.min(1.0 - hit_rate));
        let chance = mean + (mean * bursts * normal).clamp(-most, most);
        misses.extend(work.layers.iter().map(|layer| numbers.of(layer.top_k, chance)));
    }
    misses
}

impl Forecast {
    /// What to expect where experts are found in memory as `speed` says, or with a trace of this model as its replay says: the cache is empty at
    /// first, and prompts are not counted. `None` if the trace has nothing to count.
    ///
    /// `speed`: of the same model, machine, context and type of keys and values.
    pub fn of(
        (spec, extents): (&ModelSpec, &[ExtentRecord]),
        (machine, cores): (&Machine, &Cores),
        speed: &Speed,
        (context, kv_type): (usize, KvType),
        trace: Option<&Replay>,
    ) -> Option<Self> {
        let work = Work::of(spec, extents, (&speed.memory, machine), cores, (context, kv_type));
        let uses: usize = work.layers.iter().map(|layer| layer.top_k).sum();
        let timed = |misses: &[usize]| {
            let mut numbers = Numbers(7);
            simulate(&work, misses, &mut |missing| numbers.of(missing, NAMED_AHEAD))
        };
        let misses = match trace {
            None => random_misses(&work, speed.hit_rate),
            Some(replay) => {
                let routed =
                    work.layers.iter().enumerate().filter(|(_, layer)| layer.top_k > 0).map(|(number, _)| number);
                replay.misses_of_tokens(speed.memory.slots, &routed.collect::<Vec<_>>(), work.layers.len())?
            }
        };
        let (token_seconds, drive_seconds) = timed(&misses);
        let tokens = (misses.len() / work.layers.len().max(1)).max(1);
        let missed = misses.iter().sum::<usize>() as f64 / (tokens * uses.max(1)) as f64;
        let range = match (trace, speed.curve) {
            (None, Some(_)) => {
                let at = |more: f64| 1.0 / timed(&random_misses(&work, (speed.hit_rate + more).clamp(0.0, 1.0))).0;
                [at(-HIT_RATE_SPREAD), at(HIT_RATE_SPREAD)]
            }
            _ => [1.0 / token_seconds; 2],
        };
        Some(Forecast {
            hit_rate: 1.0 - missed,
            computing_seconds: work.computing(),
            drive_seconds,
            token_seconds,
            tokens_per_second: 1.0 / token_seconds,
            tokens_per_second_range: range,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers like those of `bench-34x128`, whose computing takes so many seconds in all: two fifths of it before the router has chosen.
    fn work(layers: usize, computing: f64, bytes_per_second: f64) -> Work {
        let of_layer = computing / layers as f64;
        let layer = Layer {
            before: 0.4 * of_layer,
            top_k: 8,
            expert: 0.6 * of_layer / 8.0,
            read: 2.65e6 / bytes_per_second,
            ..Layer::default()
        };
        Work { layers: vec![layer; layers], head: 0.0, latency: USUAL_LATENCY, beside: (0.7, 0.7), reads_beside: 1.0 }
    }

    fn seconds(work: &Work, hit_rate: f64) -> f64 {
        let mut numbers = Numbers(7);
        simulate(work, &random_misses(work, hit_rate), &mut |missing| numbers.of(missing, NAMED_AHEAD)).0
    }

    /// Twelve layers of `bench-34x128` on simulated drives: bytes per second, bytes missed of the 254.4 MB of a token, milliseconds of
    /// computing alone, and of a step (`tests/bench/simulated_drive.py`, two cores with AVX-512).
    #[test]
    fn measured_steps_take_as_long_as_they_are_expected_to() {
        for (drive, missed, computing, step) in [
            (3e9, 164.0, 18.6, 59.8),
            (3e9, 105.0, 19.6, 42.5),
            (3e9, 54.0, 17.4, 25.9),
            (7e9, 165.0, 18.4, 28.5),
            (7e9, 107.0, 19.2, 23.6),
            (7e9, 55.0, 16.6, 19.8),
        ] {
            let expected = 1e3 * seconds(&work(12, 1e-3 * computing, drive), 1.0 - missed / 254.4);
            assert!((expected / step - 1.0).abs() < 0.08, "{drive}, {missed} MB: {expected} ms, not {step}");
        }
    }

    #[test]
    fn a_token_takes_at_least_the_longer_and_at_most_the_sum() {
        let work = work(20, 0.02, 3e9);
        assert!((seconds(&work, 1.0) / work.computing() - 1.0).abs() < 1e-9);
        for hit_rate in [0.0, 0.3, 0.6, 0.9] {
            let misses = random_misses(&work, hit_rate);
            let (token, reading) = simulate(&work, &misses, &mut |_| 0);
            let latency = 20.0 * USUAL_LATENCY;
            assert!(token >= reading.max(work.computing()), "{hit_rate}: {token}");
            assert!(token <= reading + work.computing() / 0.7 + latency, "{hit_rate}: {token}");
            let ahead = seconds(&work, hit_rate);
            assert!(ahead <= token, "reading ahead never costs: {hit_rate}, {ahead}, {token}");
        }
    }

    #[test]
    fn a_layer_by_hand() {
        let layer = Layer { before: 1.0, shared: 0.5, top_k: 3, expert: 1.0, read: 4.0, ..Layer::default() };
        let work = Work { layers: vec![layer], head: 2.0, latency: 0.25, beside: (0.5, 1.0), reads_beside: 1.0 };
        // Attention 1. The reads end at 5 and 9 s, and a quarter later, because the first byte of the first comes then. Beside them, shared part and one expert take 1.5 ÷ 0.5 = 3 s, until 4; the first missing
        // one 2 s, until 6, the second begun in parts, 2 s, until 8, but its last part comes at 9. The head: 2 s.
        let (token, reading) = simulate(&work, &[2], &mut |_| 0);
        assert!((token - (9.25 + LAST_PART + 2.0)).abs() < 1e-9, "{token}");
        assert_eq!(reading, 8.0);
        // Verification takes 1 s of each beside reads, and the last part is longer.
        let verified = Work { layers: vec![Layer { verify: 0.5, ..layer }], ..work.clone() };
        let (token, _) = simulate(&verified, &[2], &mut |_| 0);
        assert!((token - (9.25 + 1.5 * LAST_PART + 2.0)).abs() < 1e-9, "{token}");
        // Dense parts of 30 s are read for each layer while the one before it is computed, and both tokens ask for them.
        let streamed = Work { layers: vec![Layer { streamed: 30.0, ..layer }], ..work };
        let (token, reading) = simulate(&streamed, &[0, 0], &mut |_| 0);
        assert!(token >= 15.0 && reading == 30.0, "{token}, {reading}");
    }

    #[test]
    fn bursts_have_the_hit_rate_in_the_mean() {
        let work = work(48, 0.02, 3e9);
        for hit_rate in [0.2, 0.5, 0.9] {
            let misses = random_misses(&work, hit_rate);
            let found = 1.0 - misses.iter().sum::<usize>() as f64 / (TOKENS * 48 * 8) as f64;
            assert!((found - hit_rate).abs() < 0.03, "{found}, not {hit_rate}");
        }
    }
}

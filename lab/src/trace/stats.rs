//! What a trace shows about its model's routing, independent of a cache.

use serde::Serialize;

use super::{ReplayError, Trace};

/// Figures of one layer with routing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerStats {
    /// The layer, with the trace's number.
    pub layer: usize,
    /// Experts used, each time counted.
    pub uses: u64,
    /// Experts that were used at least once.
    pub distinct: usize,
    /// Part of the uses whose expert the previous token of the layer had used too, 0 to 1.
    pub repeated: f64,
    /// Part of the uses that go to the most popular tenth of the experts, 0 to 1.
    pub top_tenth: f64,
    /// Entropy of the popularity ÷ that of a uniform one, 0 to 1.
    pub evenness: f64,
}

/// Figures of a whole trace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Name of the model, if the trace has it.
    pub model: Option<String>,
    /// Tokens.
    pub tokens: usize,
    /// Tokens that are known to be part of a prompt.
    pub prefill: usize,
    /// Experts per layer.
    pub experts: u32,
    /// Experts that a token uses in all layers together, on average.
    pub cycle: f64,
    /// Experts used, each time counted.
    pub uses: u64,
    /// Experts that were used at least once, in all layers.
    pub distinct: usize,
    /// Part of all uses whose expert the previous token had used too, 0 to 1.
    pub repeated: f64,
    /// Part of all uses that go to the most popular tenth of each layer's experts, 0 to 1.
    pub top_tenth: f64,
    /// `reuse[i]`: part of all uses whose expert was used at most 2^i tokens before, 0 to 1. First uses do not count.
    pub reuse: Vec<f64>,
    /// Half of the uses that are not the first of their expert come at most this many tokens after the one before.
    pub median_reuse: Option<u64>,
    /// `working_set[i]`: experts of all layers that 2^i consecutive tokens use, on average over the trace.
    pub working_set: Vec<f64>,
    /// Layer by layer.
    pub layers: Vec<LayerStats>,
}

impl LayerStats {
    /// Figures of a layer whose experts were used this often, `repeated` times right after a use.
    fn of(layer: usize, mut counts: Vec<u64>, repeated: u64) -> (Self, u64) {
        let (experts, uses) = (counts.len(), counts.iter().sum::<u64>());
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let top: u64 = counts.iter().take(experts.div_ceil(10)).sum();
        let entropy: f64 =
            counts.iter().map(|&c| c as f64 / uses as f64).map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
        let stats = LayerStats {
            layer,
            uses,
            distinct: counts.iter().filter(|&&c| c > 0).count(),
            repeated: repeated as f64 / uses as f64,
            top_tenth: top as f64 / uses as f64,
            evenness: if experts > 1 { entropy / (experts as f64).ln() } else { 1.0 },
        };
        (stats, top)
    }
}

impl Stats {
    /// Measures a trace; `experts` per layer if they differ from the trace's number.
    ///
    /// # Errors
    /// [`ReplayError`] if there is nothing to measure.
    pub fn new(trace: &Trace, experts: Option<u32>) -> Result<Stats, ReplayError> {
        let (routed, experts) = trace.routing(experts)?;
        let tokens = trace.tokens();
        // Windows of 1, 2, 4, … tokens, and one that holds the whole trace.
        let sizes = tokens.len().next_power_of_two().trailing_zeros() as usize + 1;
        // Uses by the distance to the previous one; 0: first use.
        let mut distances = vec![0u64; tokens.len() + 1];
        // Pairs of window and expert in it, by log2 of the window's length.
        let mut seen = vec![0u64; sizes];
        let mut layers = Vec::with_capacity(routed.len());
        let mut top_uses = 0;
        for &layer in &routed {
            let mut counts = vec![0u64; experts as usize];
            let mut last = vec![None::<usize>; experts as usize];
            let mut repeated = 0;
            for (t, token) in tokens.iter().enumerate() {
                for c in trace.choices(token, layer) {
                    let e = c.expert as usize;
                    let distance = last[e].map_or(0, |before| t - before);
                    distances[distance] += 1;
                    repeated += u64::from(distance == 1);
                    counts[e] += 1;
                    last[e] = Some(t);
                    for (i, seen) in seen.iter_mut().enumerate() {
                        // Windows of this length that contain this token but not the previous use.
                        *seen += windows(t, distance, 1 << i, tokens.len());
                    }
                }
            }
            let (stats, top) = LayerStats::of(layer, counts, repeated);
            top_uses += top;
            layers.push(stats);
        }
        let uses: u64 = layers.iter().map(|l| l.uses).sum();
        let mean = |sum: u64| sum as f64 / uses as f64;
        // Number of uses at most this many tokens after the previous one: none for 0 tokens.
        let within: Vec<u64> = std::iter::once(0)
            .chain(distances.iter().skip(1).scan(0, |sum, uses| {
                *sum += uses;
                Some(*sum)
            }))
            .collect();
        let again = within[tokens.len()];
        let median = within.iter().position(|&uses| again > 0 && 2 * uses >= again);
        Ok(Stats {
            model: trace.header().and_then(|h| h.model.clone()),
            tokens: tokens.len(),
            prefill: tokens.iter().filter(|t| t.phase == Some(super::Phase::Prefill)).count(),
            experts,
            cycle: uses as f64 / tokens.len() as f64,
            uses,
            distinct: layers.iter().map(|l| l.distinct).sum(),
            repeated: mean(distances.get(1).copied().unwrap_or(0)),
            top_tenth: mean(top_uses),
            reuse: (0..sizes).map(|i| mean(within[tokens.len().min(1 << i)])).collect(),
            median_reuse: median.map(|d| d as u64),
            working_set: seen
                .iter()
                .enumerate()
                .map(|(i, &s)| s as f64 / (tokens.len() as f64 - f64::from(1u32 << i) + 1.0).max(1.0))
                .collect(),
            layers,
        })
    }
}

/// How many windows of `length` tokens in a trace of `tokens` contain token `t` but not the use `distance` tokens before it (0:
/// there is none). A window longer than the trace is the whole trace.
fn windows(t: usize, distance: usize, length: usize, tokens: usize) -> u64 {
    let length = length.min(tokens);
    let first = match distance {
        0 => 0,
        d => t - d + 1,
    };
    let first = first.max((t + 1).saturating_sub(length));
    let last = t.min(tokens - length);
    (last + 1).saturating_sub(first) as u64
}

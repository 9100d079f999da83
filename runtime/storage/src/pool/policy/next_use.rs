//! Latest expected next use: the default.

use super::tournament::Candidates;
use super::{ImportError, Key, Pass, Policy, PolicyKind, Shape};

/// Half-lives of the decayed counts, in tokens.
const HALF_LIVES: [f32; RATES] = [1.0, 8.0, 64.0];
/// The share of each count in the probability; the rest is the share of recall.
const SHARES: [f32; RATES] = [0.2, 0.3, 0.1];
const RATES: usize = 3;
/// The share of recall in the probability.
const RECALL: f32 = 0.4;
/// Tokens that recall looks back.
const HISTORY: usize = 256;
/// Most choices of a token that recall remembers.
const MAX_TOP_K: usize = 16;
/// How sharply recall prefers similar moments.
const SHARPNESS: f32 = 20.0;
/// Similarity at which recall gives a single moment half of its full weight.
const TRUST: f32 = 0.42;
/// How much of a moment's similarity is due to the layers before.
const CARRY: f32 = 0.85;
/// How many tokens after a similar moment recall expects again, and the factor by which each counts less than the one
/// before.
const AHEAD: usize = 4;
const FADE: f32 = 0.7;
/// Scores are times in parts of a layer pass.
const TICKS: f64 = 64.0;

/// Evicts the key whose next use is expected latest.
///
/// # The estimate
/// For every expert, p is the probability that the next token in its layer uses it:
///
/// p = 0.2 r₁ + 0.3 r₈ + 0.1 r₆₄ + 0.4 R + k ÷ experts (at most 1)
///
/// * rₕ: the part of the layer's tokens that used the expert, exponentially decayed with a half-life of h tokens
///   (rₕ ← rₕ·2^(−1/h) + u·(1 − 2^(−1/h)), u = 1 if used, else 0). It counts passes of the layer, not time, and goes on
///   while the expert is not resident.
/// * R, recall: text repeats itself, and so does routing. The current token is compared with each of the layer's last 256:
///   s(a) is the part of its experts that the token a before it used too, averaged over the layers up to this one with
///   weight 0.85 per layer (the first layers go on from the token before, which makes s high within repeated phrases). What
///   followed similar moments is expected again: a use d ≤ 4 tokens after the moment a weighs 0.7^(d−1)·e^(20 s(a)), and R is
///   the weight of an expert's uses ÷ (weight of all tokens + e^(20·0.42)), so dissimilar moments say little.
/// * k ÷ experts is the mean, which remains for an expert without history. It keeps small differences between rare experts
///   from outweighing the order of the layers.
///
/// With L layers, the expected next use is then, in layer passes from now,
///
/// (1/p − 1)·L + distance to the layer's next pass
///
/// That is an absolute point in time, which changes only when the layer is passed. So a pass rescores only its own
/// layer's experts, a tournament over all keys finds the latest, and the cost does not depend on the number of slots:
/// O(experts + history) per pass, O(log keys) per eviction.
///
/// # Why this estimate
/// Replays, means over three real traces and five cache sizes: the three counts alone are within 0.3 points of every other
/// set of half-lives, shares, priors, log-linear and online-learnt mixtures that was tried; router weights as counts gained
/// nothing. Recall gains 1 to 4 points where routing is wide (top-6, top-8), on halves of the traces too; on top-2 and on
/// synthetic routing without memory it changes less than half a point. The constants sit on plateaus: other shares, sharpness,
/// carry and history move the mean by 0.2 at most.
#[derive(Clone, Debug)]
pub struct NextUse {
    shape: Shape,
    /// Decayed counts of every key: parts of its layer's tokens.
    rates: Vec<[f32; RATES]>,
    /// Counts of a layer behind these, as they were imported: one that predicts, which only some runs open.
    beyond: Vec<u8>,
    recall: Recall,
    /// Passes so far.
    clock: u64,
    /// When the next pass of each layer is expected.
    next: Vec<u64>,
    /// Expected next use of every key.
    scores: Vec<u64>,
    order: Candidates,
}

impl NextUse {
    /// Nothing is resident, nothing known.
    pub fn new(shape: Shape) -> Self {
        let mut policy = NextUse {
            shape,
            rates: vec![[0.0; RATES]; shape.keys()],
            beyond: Vec::new(),
            recall: Recall::new(shape),
            clock: 0,
            next: (0..u64::from(shape.layers)).collect(),
            scores: vec![0; shape.keys()],
            order: Candidates::new(shape.keys()),
        };
        (0..shape.layers).for_each(|layer| policy.rescore(layer, None));
        policy
    }

    /// Adds what the tokens of a pass used to the counts.
    fn count(&mut self, pass: &Pass<'_>) {
        let first = self.shape.key(pass.layer, 0).index();
        let rates = &mut self.rates[first..][..self.shape.experts as usize];
        let top_k = pass.choices.len() / pass.tokens as usize;
        for (h, half_life) in HALF_LIVES.iter().enumerate() {
            let keep = (-1.0 / half_life).exp2();
            let all = keep.powf(pass.tokens as f32);
            rates.iter_mut().for_each(|r| r[h] *= all);
            // The last token weighs 1 − keep, each before it less by `keep`.
            let mut weight = 1.0 - keep;
            for choices in pass.choices.chunks_exact(top_k).rev() {
                choices.iter().for_each(|c| rates[c.expert as usize][h] += weight);
                weight *= keep;
            }
        }
    }

    /// The probability that the next token in its layer uses `key`; `recall` is R, if something is recalled.
    fn probability(&self, key: usize, recall: f32, mean: f32) -> f32 {
        let counts: f32 = self.rates[key].iter().zip(SHARES).map(|(rate, share)| share * rate).sum();
        (counts + RECALL * recall + mean).min(1.0)
    }

    /// Computes when the keys of `layer` are expected next; `top_k` experts of it are used at a time, if known.
    fn rescore(&mut self, layer: u32, top_k: Option<usize>) {
        let first = self.shape.key(layer, 0).index();
        let experts = self.shape.experts as usize;
        let mean = top_k.unwrap_or(1) as f32 / experts as f32;
        for i in 0..experts {
            let recall = if top_k.is_some() { self.recall.share(i) } else { 0.0 };
            let wait = f64::from(1.0 / self.probability(first + i, recall, mean) - 1.0) * f64::from(self.shape.layers);
            self.scores[first + i] = ((self.next[layer as usize] as f64 + wait) * TICKS) as u64;
        }
        self.order.rescore_all(first..first + experts, |key| self.scores[key.index()]);
    }
}

impl Policy for NextUse {
    fn kind(&self) -> PolicyKind {
        PolicyKind::NextUse
    }

    fn begin_pass(&mut self, pass: &Pass<'_>) {
        self.clock += 1;
        self.next[pass.layer as usize] = self.clock + u64::from(self.shape.layers);
        if pass.choices.is_empty() || pass.tokens == 0 {
            return;
        }
        self.count(pass);
        self.recall.add(pass);
        self.rescore(pass.layer, Some(pass.choices.len() / pass.tokens as usize));
    }

    fn hit(&mut self, _key: Key) {}

    fn insert(&mut self, key: Key) {
        self.order.insert(key, self.scores[key.index()]);
    }

    fn evict(&mut self, key: Key) {
        self.order.remove(key);
    }

    fn pin(&mut self, key: Key) {
        self.order.pin(key);
    }

    fn unpin(&mut self, key: Key) {
        self.order.unpin(key, self.scores[key.index()]);
    }

    fn classify(&mut self, classes: &[u8]) {
        self.order.classify(self.shape, classes);
    }

    fn victim_in(&mut self, class: u8) -> Option<Key> {
        self.order.winner(class)
    }

    fn lateness(&self, key: Key) -> Option<u64> {
        let known = self.rates[key.index()].iter().any(|&rate| rate > 0.0);
        known.then(|| self.scores[key.index()])
    }

    /// Magic, layers, experts, then the counts of every key; all little-endian, four bytes each.
    fn export(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.rates.len() * RATES * 4 + self.beyond.len());
        let layers = self.shape.layers + u32::from(!self.beyond.is_empty());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&layers.to_le_bytes());
        bytes.extend_from_slice(&self.shape.experts.to_le_bytes());
        bytes.extend(self.rates.iter().flatten().flat_map(|rate| rate.to_le_bytes()));
        bytes.extend_from_slice(&self.beyond);
        bytes
    }

    /// The counts may have a layer more or less at the end: the one that predicts, which only some runs open.
    fn import(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        let (words, rest) = bytes.as_chunks::<4>();
        let [magic, layers, experts, counts @ ..] = words else { return Err(ImportError::Policy) };
        if magic != MAGIC {
            return Err(ImportError::Policy);
        }
        let (layers, experts) = (u32::from_le_bytes(*layers), u32::from_le_bytes(*experts));
        if experts != self.shape.experts || layers.abs_diff(self.shape.layers) > 1 {
            return Err(ImportError::Shape { layers, experts });
        }
        let valid = |bytes: &[u8; 4]| (0.0..=1.0 + 1e-3).contains(&f32::from_le_bytes(*bytes));
        let expected = (layers as usize).saturating_mul(experts as usize).saturating_mul(RATES);
        if !rest.is_empty() || counts.len() != expected || !counts.iter().all(valid) {
            return Err(ImportError::Damaged);
        }
        for (rate, bytes) in self.rates.iter_mut().flatten().zip(counts) {
            *rate = f32::from_le_bytes(*bytes);
        }
        let beyond = counts.get(self.rates.len() * RATES..).unwrap_or_default();
        self.beyond = beyond.as_flattened().to_vec();
        (0..self.shape.layers).for_each(|layer| self.rescore(layer, None));
        Ok(())
    }
}

/// The start of an export; the last byte is its version.
const MAGIC: &[u8; 4] = b"SNU\x01";
/// Bytes before the counts.
const HEAD: usize = 12;

/// What followed the past moments that were most like the present.
#[derive(Clone, Debug)]
struct Recall {
    /// For every layer a ring of the experts that its last tokens used.
    history: Vec<[u16; MAX_TOP_K]>,
    /// How many of each are filled, same order.
    filled: Vec<u8>,
    /// Tokens of every layer so far; the last one is at `(seen - 1) % HISTORY` of its ring.
    seen: Vec<u64>,
    /// Similarity of the present to the moment `a` tokens ago.
    similar: [f32; HISTORY],
    /// Whether the current token uses an expert: 1 or 0.
    used: Vec<f32>,
    /// For every expert: the weight of its uses that are expected again.
    expected: Vec<f32>,
    /// The weight of all tokens.
    total: f32,
}

impl Recall {
    fn new(shape: Shape) -> Self {
        let layers = shape.layers as usize;
        let experts = shape.experts as usize;
        Recall {
            history: vec![[0; MAX_TOP_K]; layers * HISTORY],
            filled: vec![0; layers * HISTORY],
            seen: vec![0; layers],
            similar: [0.0; HISTORY],
            used: vec![0.0; experts],
            expected: vec![0.0; experts],
            total: 1.0,
        }
    }

    /// Remembers the tokens of a pass and compares the last one with those before.
    fn add(&mut self, pass: &Pass<'_>) {
        let layer = pass.layer as usize;
        let top_k = pass.choices.len() / pass.tokens as usize;
        for choices in pass.choices.chunks_exact(top_k) {
            let place = layer * HISTORY + (self.seen[layer] % HISTORY as u64) as usize;
            let filled = top_k.min(MAX_TOP_K);
            for (to, choice) in self.history[place].iter_mut().zip(choices) {
                *to = choice.expert as u16;
            }
            self.filled[place] = filled as u8;
            self.seen[layer] += 1;
        }
        let Recall { history, filled, seen, similar, used, expected, total } = self;
        let seen = seen[layer];
        // The experts that the layer's token `age` before the last one used.
        let past = |age: usize| {
            let place = layer * HISTORY + ((seen - 1 - age as u64) % HISTORY as u64) as usize;
            &history[place][..usize::from(filled[place])]
        };
        let ages = seen.min(HISTORY as u64) as usize;
        used.fill(0.0);
        past(0).iter().for_each(|&e| used[usize::from(e)] = 1.0);
        let part = 1.0 / past(0).len() as f32;
        expected.fill(0.0);
        *total = (SHARPNESS * TRUST).exp();
        let mut weights = [0.0; HISTORY];
        for age in 1..ages {
            let same = past(age).iter().map(|&e| used[usize::from(e)]).sum::<f32>() * part;
            similar[age] = CARRY * similar[age] + (1.0 - CARRY) * same;
            weights[age] = (SHARPNESS * similar[age]).exp();
        }
        // A token is expected again with the weight of all AHEAD moments before it. The current token is left out, because the
        // counts have it.
        for age in 1..ages.saturating_sub(1) {
            let mut fade = 1.0;
            let mut weight = 0.0;
            for moment in &weights[age + 1..ages.min(age + 1 + AHEAD)] {
                weight += fade * moment;
                fade *= FADE;
            }
            *total += weight;
            past(age).iter().for_each(|&e| expected[usize::from(e)] += weight);
        }
    }

    /// R of an expert of the layer that was passed last.
    fn share(&self, expert: usize) -> f32 {
        self.expected[expert] / self.total
    }
}

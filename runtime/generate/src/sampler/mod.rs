//! From logits to the next token.
//!
//! The order of operations is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p, softmax, draw. Two things
//! are done more carefully than there:
//!
//! * Temperature does not change which token is likelier, so selection works on the unscaled logits, and the temperature is applied
//!   in the exponential: `exp((logit - largest) / T)`. Nothing can overflow, however small the temperature.
//! * Exponentials, their sums and the draw are f64, in a fixed order, with an exponential that is the same on every platform. Equal
//!   logits and equal seeds give equal tokens everywhere.

mod config;
mod exp;
mod logprobs;
mod rng;
#[cfg(test)]
mod tests;

pub use config::SamplerConfig;
pub use logprobs::{Logprob, logprobs};
pub use rng::Rng;

use std::cmp::Ordering;

use thiserror::Error;

use exp::exp_nonpositive;

/// Why no token can be chosen.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SamplerError {
    /// A setting is invalid.
    #[error("{field} is {value}, but must be {expected}; change the setting")]
    Config {
        /// Which setting.
        field: &'static str,
        /// Its value.
        value: f32,
        /// What it must be.
        expected: &'static str,
    },
    /// No generator can have this state.
    #[error("the saved state of the random numbers is all zeros; start over from a seed")]
    BadState,
    /// There are no logits, or more than there can be tokens.
    #[error("the model produced {count} logits; verify the model file")]
    BadLength {
        /// How many.
        count: usize,
    },
    /// A logit is not a number: the computation went wrong before sampling.
    #[error(
        "the model's output for token {id} is {value}, which is not a usable number; verify the model \
         file, and report the model if it is intact"
    )]
    NotANumber {
        /// The first token with such a logit.
        id: usize,
        /// NaN or plus infinity.
        value: f32,
    },
    /// All tokens are excluded.
    #[error("every token is excluded (all logits are minus infinity); relax the constraints")]
    NothingLeft,
    /// The history has a token that the model does not have.
    #[error("the history holds token {id}, but the model has only {vocab}; is it another model's?")]
    HistoryOutOfRange {
        /// The token.
        id: u32,
        /// Number of logits.
        vocab: usize,
    },
}

/// A token that may be chosen. `weight` is its probability relative to the likeliest token's.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f64,
}

impl Candidate {
    /// Likelier first; the lower id first among equals. A total order, because logits are finite.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

/// Chooses tokens. Each generation has one, because it holds the position in the random numbers.
///
/// Buffers grow to the size of the vocabulary once; afterwards, choosing allocates nothing.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    rng: Rng,
    /// How many of the seed's numbers `rng` has drawn, if known.
    drawn: Option<u64>,
    /// Logits after the repetition penalty.
    scores: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the beginning of its seed's random numbers.
    ///
    /// # Errors
    /// If a setting is invalid.
    pub fn new(config: SamplerConfig) -> Result<Self, SamplerError> {
        config.validate()?;
        Ok(Self {
            config,
            rng: Rng::from_seed(config.seed),
            drawn: Some(0),
            scores: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// A sampler that continues from another one's [`state`](Self::state).
    ///
    /// # Errors
    /// If a setting or the state is invalid.
    pub fn from_state(config: SamplerConfig, state: [u64; 4]) -> Result<Self, SamplerError> {
        let mut sampler = Self::new(config)?;
        sampler.rng = Rng::from_state(state).ok_or(SamplerError::BadState)?;
        sampler.drawn = None;
        Ok(sampler)
    }

    /// The position in the random numbers. It and the configuration are all that has to be saved.
    pub fn state(&self) -> [u64; 4] {
        self.rng.state()
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Like [`sample`](Self::sample), with the random number that belongs to token `index` of a generation, counted from 0,
    /// whatever this sampler did before: the choice depends only on logits, history, settings, seed and index. Called in order, it
    /// gives the same results as `sample`.
    ///
    /// # Errors
    /// Like [`sample`](Self::sample).
    pub fn sample_at(&mut self, index: u64, logits: &[f32], history: &[u32]) -> Result<u32, SamplerError> {
        if self.config.temperature != 0.0 && self.drawn != Some(index) {
            self.rng = Rng::at(self.config.seed, index);
            self.drawn = Some(index);
        }
        self.sample(logits, history)
    }

    /// Chooses a token. `history` is used by the repetition penalty: the prompt and all tokens so far; its order and repetitions do
    /// not matter.
    ///
    /// A logit of minus infinity excludes its token. The greedy choice (temperature 0) takes the lowest id among equals and uses no
    /// random number; otherwise each call uses exactly one.
    ///
    /// # Errors
    /// If some logits are not numbers, or all tokens are excluded. No random number is used then.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplerError> {
        if logits.is_empty() || u32::try_from(logits.len()).is_err() {
            return Err(SamplerError::BadLength { count: logits.len() });
        }
        let usable = |&x: &f32| x.is_finite() || x == f32::NEG_INFINITY;
        if let Some(id) = logits.iter().position(|x| !usable(x)) {
            return Err(SamplerError::NotANumber { id, value: logits[id] });
        }
        self.penalise(logits, history)?;
        let largest = self.likeliest()?;
        if self.config.temperature == 0.0 {
            return Ok(largest);
        }
        self.collect();
        self.keep_top_k();
        self.weigh(self.scores[largest as usize]);
        self.keep_top_p();
        self.keep_min_p();
        Ok(self.draw())
    }

    /// Fills `scores`: negative logits are multiplied, others divided, as in the CTRL paper
    /// (arXiv:1909.05858) and Hugging Face.
    fn penalise(&mut self, logits: &[f32], history: &[u32]) -> Result<(), SamplerError> {
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        let penalty = self.config.repetition_penalty;
        if penalty == 1.0 {
            return Ok(());
        }
        for &id in history {
            // Starts from the original logit, so a token that occurred twice is penalised once.
            let Some(&logit) = logits.get(id as usize) else {
                return Err(SamplerError::HistoryOutOfRange { id, vocab: logits.len() });
            };
            let score = match logit < 0.0 {
                true => logit * penalty,
                false => logit / penalty,
            };
            // Extreme penalties must neither exclude a token nor make it infinitely likely.
            self.scores[id as usize] = match logit.is_finite() {
                true => score.clamp(f32::MIN, f32::MAX),
                false => logit,
            };
        }
        Ok(())
    }

    /// The token with the largest score; the lowest id among equals.
    fn likeliest(&self) -> Result<u32, SamplerError> {
        let mut best = (f32::NEG_INFINITY, None);
        for (id, &score) in self.scores.iter().enumerate() {
            if score > best.0 {
                best = (score, Some(id as u32));
            }
        }
        best.1.ok_or(SamplerError::NothingLeft)
    }

    fn collect(&mut self) {
        self.candidates.clear();
        // Reserved at once, so that no later growth depends on which tokens the logits exclude.
        self.candidates.reserve(self.scores.len());
        let scores = self.scores.iter().enumerate();
        self.candidates.extend(scores.filter(|(_, score)| **score > f32::NEG_INFINITY).map(|(id, &logit)| Candidate {
            id: id as u32,
            logit,
            weight: 0.0,
        }));
    }

    /// Keeps the tokens that are at least as likely as the k-th. Like Hugging Face, and unlike a cut after exactly k, this does not
    /// let the numbering of the vocabulary decide between equals.
    fn keep_top_k(&mut self) {
        let k = self.config.top_k as usize;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        // Selection takes linear time: sorting 160 000 tokens to keep 20 would be a waste.
        let (_, kth, _) = self.candidates.select_nth_unstable_by(k - 1, Candidate::rank);
        let least = kth.logit;
        self.candidates.retain(|c| c.logit >= least);
        // Selection leaves an order that depends on the version of the standard library, and the draw must not. Sorting few
        // candidates costs nothing.
        self.candidates.sort_unstable_by_key(|c| c.id);
    }

    fn weigh(&mut self, largest: f32) {
        let temperature = f64::from(self.config.temperature);
        for c in &mut self.candidates {
            c.weight = exp_nonpositive((f64::from(c.logit) - f64::from(largest)) / temperature);
        }
    }

    /// Keeps the likeliest tokens, until the tokens before the next one reach the share `top_p`.
    fn keep_top_p(&mut self) {
        if self.config.top_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let wanted = f64::from(self.config.top_p) * total;
        let mut reached = 0.0;
        let mut sorted = 0;
        // A few tokens usually hold nearly all probability, so only the likeliest are sorted, and more of them only if needed.
        let mut step = 64;
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let ahead = step.min(rest.len());
            if ahead < rest.len() {
                rest.select_nth_unstable_by(ahead, Candidate::rank);
            }
            rest[..ahead].sort_unstable_by(Candidate::rank);
            for (at, candidate) in rest[..ahead].iter().enumerate() {
                reached += candidate.weight;
                if reached >= wanted {
                    self.candidates.truncate(sorted + at + 1);
                    return;
                }
            }
            sorted += ahead;
            step *= 4;
        }
    }

    /// Keeps tokens that are probable enough relative to the likeliest one, whose weight is 1.
    fn keep_min_p(&mut self) {
        let least = f64::from(self.config.min_p);
        if least > 0.0 {
            self.candidates.retain(|c| c.weight >= least);
        }
    }

    /// Draws in proportion to the weights. There is always a candidate, because the likeliest one passes every filter.
    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let point = self.rng.next_f64() * total;
        self.drawn = self.drawn.map(|drawn| drawn + 1);
        let mut reached = 0.0;
        let mut chosen = 0;
        for c in &self.candidates {
            // A weight of zero cannot be drawn, not even when rounding leaves `point` at the very end.
            if c.weight > 0.0 {
                chosen = c.id;
            }
            reached += c.weight;
            if reached > point {
                break;
            }
        }
        chosen
    }
}

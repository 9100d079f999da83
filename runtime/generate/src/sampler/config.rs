//! How to choose the next token.

use super::SamplerError;

/// How to choose the next token. The default takes the likeliest one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerConfig {
    /// Divides all logits: below 1 sharpens, above 1 flattens. 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens, and those equal to the last of them; 0 for all.
    pub top_k: u32,
    /// Keeps the likeliest tokens until their probabilities add up to this; 1 for all.
    pub top_p: f32,
    /// Keeps tokens at least this probable relative to the likeliest one; 0 for all.
    pub min_p: f32,
    /// Makes tokens that have occurred less likely (above 1) or likelier (below 1).
    pub repetition_penalty: f32,
    /// Start of the random numbers: the same seed makes the same choices.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplerConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// Names the first invalid value.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let checks = [
            ("temperature", self.temperature, "0 (the likeliest token) or more", self.temperature >= 0.0),
            ("top_p", self.top_p, "above 0 and at most 1 (off)", self.top_p > 0.0 && self.top_p <= 1.0),
            ("min_p", self.min_p, "from 0 (off) to 1", (0.0..=1.0).contains(&self.min_p)),
            ("repetition_penalty", self.repetition_penalty, "above 0 (1 is off)", self.repetition_penalty > 0.0),
        ];
        for (field, value, expected, good) in checks {
            if !good || !value.is_finite() {
                return Err(SamplerError::Config { field, value, expected });
            }
        }
        Ok(())
    }
}

//! Compares two models on one text: how far the predictions of the second are from those of the first.

/// Log probabilities of tokens, from a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct LogProbabilities<'l> {
    logits: &'l [f32],
    max: f32,
    /// ln Σ exp(logit − max).
    log_sum: f64,
}

impl<'l> LogProbabilities<'l> {
    /// For logits `[vocab]`.
    pub fn new(logits: &'l [f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        LogProbabilities { logits, max, log_sum: sum.ln() }
    }

    /// ln softmax(logits)\[token\], in nats; a token beyond the logits has probability 0.
    pub fn of(&self, token: u32) -> f64 {
        self.at(self.logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY))
    }

    fn at(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) - self.log_sum
    }

    /// The likeliest token: the first of them, if several are.
    fn likeliest(&self) -> Option<usize> {
        self.logits.iter().position(|&l| l == self.max)
    }

    /// The Kullback-Leibler divergence of the predictions of `other` from these: Σ p (ln p − ln q), in nats, ≥ 0 except for
    /// rounding. `other` has as many logits.
    fn divergence(&self, other: &LogProbabilities<'_>) -> f64 {
        let one = |(&mine, &theirs): (&f32, &f32)| {
            let ln_p = self.at(mine);
            let p = ln_p.exp();
            // A token that is impossible here does not count, however improbable it is there.
            if p == 0.0 { 0.0 } else { p * (ln_p - other.at(theirs)) }
        };
        self.logits.iter().zip(other.logits).map(one).sum()
    }
}

/// Sums over the tokens of a text. The first model is the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Tokens that were scored.
    pub tokens: u64,
    /// Σ −ln p of these, in nats: for the reference, and for the other model.
    pub nll: [f64; 2],
    /// Σ of the divergences of the other model from the reference, in nats.
    pub divergence: f64,
    /// The largest of them.
    pub max_divergence: f64,
    /// How often both models find the same token the likeliest.
    pub agreed: u64,
    /// The largest difference of two logits.
    pub max_difference: f32,
}

impl Comparison {
    /// Adds a token: the logits `[vocab]` of both models before it.
    pub fn add(&mut self, reference: &[f32], other: &[f32], token: u32) {
        let (p, q) = (LogProbabilities::new(reference), LogProbabilities::new(other));
        let divergence = p.divergence(&q);
        self.tokens += 1;
        self.nll[0] -= p.of(token);
        self.nll[1] -= q.of(token);
        self.divergence += divergence;
        self.max_divergence = self.max_divergence.max(divergence);
        self.agreed += u64::from(p.likeliest() == q.likeliest());
        let difference = reference.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        self.max_difference = self.max_difference.max(difference);
    }

    /// Perplexities of the reference and of the other model.
    pub fn perplexity(&self) -> [f64; 2] {
        self.nll.map(|nll| (nll / self.tokens as f64).exp())
    }

    /// The mean divergence, in nats per token.
    pub fn mean_divergence(&self) -> f64 {
        self.divergence / self.tokens as f64
    }

    /// The share of tokens for which both models find the same token the likeliest.
    pub fn agreement(&self) -> f64 {
        self.agreed as f64 / self.tokens as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities() {
        let nll = |logits: &[f32], token| -LogProbabilities::new(logits).of(token);
        assert!((nll(&[3.0; 8], 5) - 8f64.ln()).abs() < 1e-12);
        assert!(nll(&[0.0, 1000.0], 1).abs() < 1e-12);
        assert!((nll(&[0.0, 1000.0], 0) - 1000.0).abs() < 1e-9);
        assert!(nll(&[0.0], 1).is_infinite());
    }

    #[test]
    fn a_model_agrees_with_itself() {
        let mut comparison = Comparison::default();
        comparison.add(&[1.0, 2.0, -3.0], &[1.0, 2.0, -3.0], 1);
        assert_eq!((comparison.mean_divergence(), comparison.agreement(), comparison.max_difference), (0.0, 1.0, 0.0));
        assert_eq!(comparison.nll[0], comparison.nll[1]);
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        // Probabilities 1/2, 1/2 and 1/4, 3/4.
        let (p, q) = ([0.0, 0.0], [0.0, 3f32.ln()]);
        let mut comparison = Comparison::default();
        comparison.add(&p, &q, 0);
        comparison.add(&q, &p, 1);
        let first = 0.5 * (2f64.ln() + (2.0 / 3f64).ln());
        let second = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((comparison.mean_divergence() - (first + second) / 2.0).abs() < 1e-7, "{comparison:?}");
        assert!((comparison.max_divergence - first.max(second)).abs() < 1e-7);
        let [of_first, of_other] = comparison.perplexity();
        assert!((of_first - (2.0 * 4.0 / 3f64).sqrt()).abs() < 1e-6 && (of_other - (4.0 * 2f64).sqrt()).abs() < 1e-6);
        assert_eq!((comparison.tokens, comparison.agreed), (2, 0));
        assert_eq!(comparison.max_difference, 3f32.ln());
    }

    #[test]
    fn what_is_impossible_for_the_reference_does_not_count() {
        let mut comparison = Comparison::default();
        comparison.add(&[0.0, f32::NEG_INFINITY], &[0.0, 0.0], 0);
        assert!((comparison.mean_divergence() - 2f64.ln()).abs() < 1e-12, "{comparison:?}");
    }
}

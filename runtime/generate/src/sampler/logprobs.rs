//! The model's own probability of a token.

use super::exp::exp_nonpositive;

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logprob {
    /// The token.
    pub id: u32,
    /// At most 0; minus infinity for a token that is excluded.
    pub logprob: f32,
}

/// The logarithm of the probability of `id`, and the `top` likeliest tokens with theirs: the likeliest first, and the lower id
/// first among equals. Probabilities are the softmax of `logits` as they are, at temperature 1, before anything narrows the choice.
///
/// Exponentials and their sum are the same on every platform; the one logarithm comes from the platform, so the last digit of the
/// result may differ between platforms. `logits` must be those of a token that could be sampled (numbers or minus infinity, not all
/// excluded), and `id` one of them.
pub fn logprobs(logits: &[f32], id: u32, top: usize) -> (f32, Vec<Logprob>) {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&logit| exp_nonpositive(f64::from(logit) - largest)).sum();
    let scale = largest + total.ln();
    let of = |id: u32| (f64::from(logits[id as usize]) - scale) as f32;
    let top = top.min(logits.len());
    if top == 0 {
        return (of(id), Vec::new());
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top - 1, rank);
        ids.truncate(top);
    }
    ids.sort_unstable_by(rank);
    (of(id), ids.into_iter().map(|id| Logprob { id, logprob: of(id) }).collect())
}

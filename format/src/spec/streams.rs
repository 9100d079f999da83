//! Several residual streams instead of one.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_range, check_width};

/// Most rounds of normalisation.
const MAX_ITERATIONS: usize = 1 << 10;

/// Manifold-constrained hyper-connections (arXiv:2512.24880; DeepSeek-V4): the residual is `count` streams, all of them the
/// token's embedding at first.
///
/// Before a part of a layer, `f = fn · rms(S)` of all streams `S` `[count, hidden]` in one row gives, with `s` and `b` its scales
/// and biases: `pre = sigmoid(f₀·s₀ + b₀) + eps`, `post = 2·sigmoid(f₁·s₁ + b₁)`, and `mix = softmax(f₂·s₂ + b₂) + eps`, a square
/// matrix whose columns and rows are then divided by their sums plus `eps`, `iterations` times in all. The part sees
/// `Σ_i pre_i · S_i` and its output `y` makes the new streams `S'_i = post_i · y + Σ_j mix_ji · S_j`. Before the head,
/// `Σ_i pre_i · S_i` with functions of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamsSpec {
    /// Number of streams.
    pub count: usize,
    /// Rounds in which columns, and in all but the first round rows before them, are divided by their sums.
    pub iterations: usize,
    /// Added to weights and sums as above.
    pub eps: f32,
}

impl StreamsSpec {
    /// Outputs of a part's function: `pre`, `post` and `mix`.
    pub fn functions(&self) -> usize {
        self.count * (self.count + 2)
    }

    pub(super) fn validate(&self, hidden: usize) -> Result<(), String> {
        check_width("streams.count", self.count)?;
        check_width("streams.count × hidden_size", self.count.saturating_mul(hidden))?;
        check_width("streams.count × (streams.count + 2)", self.count.saturating_mul(self.count + 2))?;
        check_range("streams.iterations", self.iterations, MAX_ITERATIONS)?;
        check_eps("streams.eps", self.eps)
    }
}

/// Gated streams (the hyper-connections of Qwen4-Exp, `Qwen4ExpHyperConnection` of transformers): the residual is `count` streams
/// `S_i`, all of them the token's embedding at first.
///
/// Before a part of a layer, and in place of its norm, with `N_i` the root mean square norm of `S_i` with weights of its own and the
/// model's epsilon, and `N` all of them in one row: `m = sigmoid(up · silu(down · N / count))`, and the part sees the mean over `i` of
/// `m_i · N_i`, number by number. Its output `y` is added to each stream: `S_i += 2·sigmoid(inject_i · N / count) · y`. The head sees
/// the same mean, with weights of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatedStreamsSpec {
    /// Number of streams.
    pub count: usize,
    /// Rank of the gates' projection, `up · down`.
    pub rank: usize,
}

impl GatedStreamsSpec {
    pub(super) fn validate(&self, hidden: usize) -> Result<(), String> {
        check_width("gated_streams.count", self.count)?;
        check_width("gated_streams.rank", self.rank)?;
        check_width("gated_streams.count × hidden_size", self.count.saturating_mul(hidden))
    }
}

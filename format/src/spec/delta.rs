//! Gated delta net.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_width, is_false};

/// Gated delta net (arXiv:2412.06464) as in Qwen3-Next: a recurrent state per value head instead of cached keys.
///
/// Queries, keys and values pass through a causal convolution over `conv_width` tokens and SiLU. Value head `j` uses key head
/// `j / (value_heads / key_heads)`; queries and keys are normalised to length 1, and queries then to `key_head_dim^-0.5`. With
/// `beta = sigmoid(b · x)` and `decay = exp(-exp(a_log) · softplus(a · x + dt_bias))`, each token does
/// `S = decay · S; S += k ⊗ beta (v - Sᵀk); out = Sᵀq`, and the output is `rms(out) · norm · silu(z · x)`, per head. With
/// `decay_rank` or `channel_decay`, each row of `S`, a channel of the key, has a decay of its own (Kimi Delta Attention,
/// arXiv:2510.26692, equation 1): `a · x` then has one number per value head and channel, `a_log` still one per head, and with a rank
/// it is `a_up · a_down · x`. With `least_log_decay`, `decay = exp(least_log_decay · sigmoid(exp(a_log) · (a · x + dt_bias)))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaSpec {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a query and a key.
    pub key_head_dim: usize,
    /// Width of a value.
    pub value_head_dim: usize,
    /// Tokens that the convolution sees, the current one included.
    pub conv_width: usize,
    /// Epsilon of the norm of a head's output.
    pub norm_eps: f32,
    /// Whether value head `j` uses key head `j mod key_heads` instead: llama.cpp's order of value heads for Qwen3.5. The
    /// JSON has the key only if it is true, so older programs can read all other files.
    #[serde(default, skip_serializing_if = "is_false")]
    pub value_heads_tiled: bool,
    /// Rank of the projection of decays, of which each channel of a key then has one; `None`: one full matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_rank: Option<usize>,
    /// Whether each channel of a key has a decay although their projection is one full matrix.
    #[serde(default, skip_serializing_if = "is_false")]
    pub channel_decay: bool,
    /// The least logarithm of a decay, negative; it makes decays another function of their projection. `None`: there is no
    /// bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_log_decay: Option<f32>,
    /// Rank of the projection `z` of output gates, `z_up · z_down`; `None`: one full matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate_rank: Option<usize>,
    /// Whether the output is gated by the sigmoid of the projection instead of its SiLU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gate_sigmoid: bool,
}

impl DeltaSpec {
    /// Channels of the convolution: queries, keys and values.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_heads * self.key_head_dim + self.value_heads * self.value_head_dim
    }

    /// Decays of a value head: one, or one per channel of its key.
    pub fn decays_per_head(&self) -> usize {
        if self.decay_rank.is_some() || self.channel_decay { self.key_head_dim } else { 1 }
    }

    /// The key head that a value head uses.
    pub fn key_head(&self, value_head: usize) -> usize {
        if self.value_heads_tiled {
            value_head % self.key_heads
        } else {
            value_head / (self.value_heads / self.key_heads)
        }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        for (name, value) in [
            ("key_heads", self.key_heads),
            ("value_heads", self.value_heads),
            ("key_head_dim", self.key_head_dim),
            ("value_head_dim", self.value_head_dim),
            ("conv_width", self.conv_width),
            ("key_heads × key_head_dim", self.key_heads.saturating_mul(self.key_head_dim)),
            ("value_heads × value_head_dim", self.value_heads.saturating_mul(self.value_head_dim)),
            ("key_head_dim × value_head_dim", self.key_head_dim.saturating_mul(self.value_head_dim)),
            ("value_heads × decays", self.value_heads.saturating_mul(self.decays_per_head())),
            ("decay_rank", self.decay_rank.unwrap_or(1)),
            ("gate_rank", self.gate_rank.unwrap_or(1)),
        ] {
            check_width(name, value)?;
        }
        check_width("channels × conv_width", self.conv_channels().saturating_mul(self.conv_width))?;
        if self.least_log_decay.is_some_and(|least| !(least.is_finite() && least < 0.0)) {
            return Err("least_log_decay is not a negative number".into());
        }
        if !self.value_heads.is_multiple_of(self.key_heads) {
            return Err(format!("{} value heads share {} key heads", self.value_heads, self.key_heads));
        }
        check_eps("norm_eps", self.norm_eps)
    }
}

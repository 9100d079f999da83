//! Gated delta net.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_width};

/// Gated delta net (arXiv:2412.06464) as in Qwen3-Next: a recurrent state per value head instead of cached keys.
///
/// Queries, keys and values pass through a causal convolution over `conv_width` tokens and SiLU. Value head `j` uses key head
/// `j / (value_heads / key_heads)`; queries and keys have length 1, queries then `key_head_dim^-0.5`. With
/// `beta = sigmoid(b · x)` and `decay = exp(-exp(a_log) · softplus(a · x + dt_bias))`, each token does
/// `S = decay · S; S += k ⊗ beta (v - Sᵀk); out = Sᵀq`, and the output is `rms(out) · norm · silu(z · x)`, per head.
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
    /// Whether value head `j` uses key head `j mod key_heads` instead: llama.cpp's order of value heads for Qwen3.5. Files
    /// without such heads do not have the key, so that older programs read them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub value_heads_tiled: bool,
}

impl DeltaSpec {
    /// Channels of the convolution: queries, keys and values.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_heads * self.key_head_dim + self.value_heads * self.value_head_dim
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
        ] {
            check_width(name, value)?;
        }
        check_width("channels × conv_width", self.conv_channels().saturating_mul(self.conv_width))?;
        if !self.value_heads.is_multiple_of(self.key_heads) {
            return Err(format!("{} value heads share {} key heads", self.value_heads, self.key_heads));
        }
        check_eps("norm_eps", self.norm_eps)
    }
}

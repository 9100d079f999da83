//! Mamba-2.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_width, is_false};

/// Mamba-2 (arXiv:2405.21060) as in Nemotron-H: a recurrent state per head instead of cached keys.
///
/// `x`, `b` and `c` pass through a causal convolution over `conv_width` tokens and SiLU. Head `j` uses group
/// `j / (heads / groups)` of `b` and `c`. With `step = softplus(dt · x + dt_bias)` and `decay = exp(-exp(a_log) · step)`, one number
/// each per head, each token does `S = decay · S; S += b ⊗ step x; out = Sᵀc + d x`. The output is
/// `rms(out · silu(z · x)) · norm`, where each of `groups` equal parts of all heads together is normalised by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MambaSpec {
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of heads that share `b` and `c`; divides `heads`.
    pub groups: usize,
    /// Width of `b` and `c`: rows of a head's state.
    pub state_dim: usize,
    /// Tokens that the convolution sees, the current one included.
    pub conv_width: usize,
    /// Whether the convolution has a bias.
    #[serde(default, skip_serializing_if = "is_false")]
    pub conv_bias: bool,
    /// Epsilon of the norm of the output.
    pub norm_eps: f32,
}

impl MambaSpec {
    /// Numbers of all heads together.
    pub fn inner_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution: those of `x`, `b` and `c`.
    pub fn conv_channels(&self) -> usize {
        self.inner_width() + 2 * self.groups * self.state_dim
    }

    /// The group that a head uses.
    pub fn group(&self, head: usize) -> usize {
        head / (self.heads / self.groups)
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        for (name, value) in [
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("groups", self.groups),
            ("state_dim", self.state_dim),
            ("conv_width", self.conv_width),
            ("heads × head_dim", self.heads.saturating_mul(self.head_dim)),
            ("groups × state_dim", self.groups.saturating_mul(self.state_dim)),
            ("head_dim × state_dim", self.head_dim.saturating_mul(self.state_dim)),
        ] {
            check_width(name, value)?;
        }
        check_width("channels × conv_width", self.conv_channels().saturating_mul(self.conv_width))?;
        if !self.heads.is_multiple_of(self.groups) {
            return Err(format!("{} heads share {} groups", self.heads, self.groups));
        }
        check_eps("norm_eps", self.norm_eps)
    }
}

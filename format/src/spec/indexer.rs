//! The indexer of sparse attention.

use serde::{Deserialize, Serialize};

use super::{RopePairing, check_eps, check_range, check_width};
use crate::limits::MAX_LENGTH;

/// Sparse attention (DeepSeek-V3.2, arXiv:2512.02556): each token attends to the `top_k` earlier ones that a small attention
/// of its own scores highest: `Σ_h w_h · relu(q_h · k · head_dim^-0.5)`, with `w` a projection of the input times
/// `heads^-0.5`. Queries come from the low-rank query's latent; keys pass through a layer norm; the first `rope.dim` elements
/// of both rotate with the model's frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexerSpec {
    /// Whether this layer has no indexer of its own and attends to what the last layer with one has chosen.
    pub shared: bool,
    /// Query heads.
    pub index_heads: usize,
    /// Width of a query and a key.
    pub index_head_dim: usize,
    /// Tokens that each token attends to.
    pub index_top_k: usize,
    /// Which elements form a pair when queries and keys rotate.
    pub pairing: RopePairing,
    /// Epsilon of the norm of keys.
    pub key_norm_eps: f32,
}

impl IndexerSpec {
    /// `rotated`: elements that rotate; `latent`: whether there is a low-rank query to score with.
    pub(super) fn validate(&self, rotated: usize, latent: bool) -> Result<(), String> {
        for (name, value) in [
            ("index_heads", self.index_heads),
            ("index_head_dim", self.index_head_dim),
            ("index_heads × index_head_dim", self.index_heads.saturating_mul(self.index_head_dim)),
        ] {
            check_width(name, value)?;
        }
        check_range("index_top_k", self.index_top_k, MAX_LENGTH)?;
        check_eps("key_norm_eps", self.key_norm_eps)?;
        if rotated > self.index_head_dim {
            return Err(format!("rope.dim is {rotated} of an index head of {}", self.index_head_dim));
        }
        if latent { Ok(()) } else { Err("an indexer needs a low-rank query".into()) }
    }
}

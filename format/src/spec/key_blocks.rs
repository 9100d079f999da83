//! Attention to blocks of keys.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_range, check_width};
use crate::limits::MAX_LENGTH;

/// Block-sparse attention: each token attends to the keys of the `top_blocks` blocks that score highest. Keys are cut into blocks of
/// `block_len` at absolute positions. Query and key of the score are projections of the layer's input, each head normalised by its
/// root mean square and rotated as the layer's own. [`BlockScore`] says how they give a block's score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyBlocksSpec {
    /// Heads of the score's query.
    pub index_heads: usize,
    /// Width of the score's query and key.
    pub index_head_dim: usize,
    /// Epsilon of the norms of the score's queries and keys.
    pub index_norm_eps: f32,
    /// Keys of a block.
    pub block_len: usize,
    /// Blocks that a token attends to.
    pub top_blocks: usize,
    /// How many of these are always the last blocks; at most `top_blocks`.
    pub local_blocks: usize,
    /// What makes a block's score.
    #[serde(default, skip_serializing_if = "BlockScore::is_largest_key")]
    pub score: BlockScore,
}

/// What makes the score of a block of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockScore {
    /// The largest `q · k` of its keys that the token sees (MiniMax-M3): head `h` of the layer attends to what index head
    /// `h / (heads / index_heads)` has chosen. The token's own block and the `local_blocks - 1` before it come first.
    #[default]
    LargestKey,
    /// `Σ_h relu(q_h · k)` over all index heads, for all heads of the layer together, with one key for the block: the mean of those of its
    /// tokens before the norm, rotated as at the block's first position (Qwen4-Exp's QSA). Only blocks that are complete with the token
    /// have a score; the token attends in any case to the tokens behind the last of them, `block_len - 1` at most. `local_blocks` is 0.
    MeanKey,
}

impl BlockScore {
    /// Whether it is the default.
    pub fn is_largest_key(&self) -> bool {
        *self == BlockScore::LargestKey
    }
}

impl KeyBlocksSpec {
    /// How many choices of blocks a token makes: one for each index head, or one for all.
    pub fn choices(&self) -> usize {
        if self.score == BlockScore::MeanKey { 1 } else { self.index_heads }
    }

    /// Bounds sizes for a layer of `heads` query heads that share `kv_heads`, of which the first `rotated` elements rotate.
    pub(super) fn validate(&self, heads: usize, kv_heads: usize, rotated: usize) -> Result<(), String> {
        for (name, value) in [
            ("index_heads", self.index_heads),
            ("index_head_dim", self.index_head_dim),
            ("index_heads × index_head_dim", self.index_heads.saturating_mul(self.index_head_dim)),
            ("index_heads × top_blocks", self.index_heads.saturating_mul(self.top_blocks)),
        ] {
            check_width(name, value)?;
        }
        check_range("block_len", self.block_len, MAX_LENGTH)?;
        check_range("top_blocks", self.top_blocks, MAX_LENGTH)?;
        check_eps("index_norm_eps", self.index_norm_eps)?;
        if self.local_blocks > self.top_blocks {
            return Err(format!("{} of {} blocks are the last ones", self.local_blocks, self.top_blocks));
        }
        if self.score == BlockScore::MeanKey && self.local_blocks > 0 {
            return Err(format!("{} blocks come first that are scored by their mean key", self.local_blocks));
        }
        let choices = self.choices();
        let nested = choices.is_multiple_of(kv_heads) || kv_heads.is_multiple_of(choices);
        if !heads.is_multiple_of(choices) || !nested {
            return Err(format!("{choices} index heads choose for {heads} heads of {kv_heads} key-value heads"));
        }
        if rotated > self.index_head_dim {
            return Err(format!("rope.dim is {rotated} of an index head of {}", self.index_head_dim));
        }
        Ok(())
    }
}

//! Attention to blocks of keys.

use serde::{Deserialize, Serialize};

use super::{check_eps, check_range, check_width};
use crate::limits::MAX_LENGTH;

/// Block-sparse attention (MiniMax-M3): each token attends to the keys of the `top_blocks` blocks that score highest for a group
/// of heads. Keys are cut into blocks of `block_len` at absolute positions. A block's score is the largest `q · k` of its keys that
/// the token sees; the token's own block and the `local_blocks - 1` before it come first. Query and key of the score are
/// projections of the layer's input, each head normalised by its root mean square and rotated as the layer's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyBlocksSpec {
    /// Heads of the score's query: head `h` of the layer attends to what index head `h / (heads / index_heads)` has chosen.
    pub index_heads: usize,
    /// Width of the score's query and key.
    pub index_head_dim: usize,
    /// Epsilon of the norms of the score's queries and keys.
    pub index_norm_eps: f32,
    /// Keys of a block.
    pub block_len: usize,
    /// Blocks that a token attends to.
    pub top_blocks: usize,
    /// Of which so many are the last ones; at most `top_blocks`.
    pub local_blocks: usize,
}

impl KeyBlocksSpec {
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
        let nested = self.index_heads.is_multiple_of(kv_heads) || kv_heads.is_multiple_of(self.index_heads);
        if !heads.is_multiple_of(self.index_heads) || !nested {
            let index_heads = self.index_heads;
            return Err(format!("{index_heads} index heads choose for {heads} heads of {kv_heads} key-value heads"));
        }
        if rotated > self.index_head_dim {
            return Err(format!("rope.dim is {rotated} of an index head of {}", self.index_head_dim));
        }
        Ok(())
    }
}

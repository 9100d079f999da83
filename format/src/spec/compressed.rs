//! Attention over a sliding window and compressed entries.

use serde::{Deserialize, Serialize};

use super::{RopeSpec, check_eps, check_range, check_width, is_false};
use crate::limits::MAX_LENGTH;

/// Attention whose heads share one key per token, which is also the value (DeepSeek-V4): the last `window` tokens, and,
/// further back, entries that each stand for some tokens.
///
/// Queries come from a low-rank latent, as in latent attention, and each head is divided by its root mean square. The last
/// `rope.dim` elements of queries and keys rotate; since keys are values, those of a head's output rotate back by the query's
/// position. The output is projected group by group to `output_rank` numbers, and all groups together to the hidden size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressedSpec {
    /// Groups of heads that are projected by themselves.
    pub output_groups: usize,
    /// Query heads of a group.
    pub group_heads: usize,
    /// Width to which a group's outputs are projected.
    pub output_rank: usize,
    /// Width of a query, of a key and of an entry.
    pub head_dim: usize,
    /// Rank of the query's low-rank factorisation.
    pub q_lora_rank: usize,
    /// Keys of single tokens that a query sees, its own included.
    pub window: usize,
    /// Factor on the scores before the softmax.
    pub softmax_scale: f32,
    /// Epsilon of all norms inside.
    pub norm_eps: f32,
    /// Rotation of queries, keys and entries.
    pub rope: RopeSpec,
    /// Whether each head has a sink: one more logit in the softmax, without a value.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sinks: bool,
    /// What stands for tokens beyond the window; `None`: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionSpec>,
}

/// How tokens become entries. Entry `e` is complete with token `(e + 1)·ratio − 1`, is seen from that token on, and rotates
/// as a key at position `e·ratio`.
///
/// With `kv` and `gate` two projections of a token's input to `spans` keys each, and `bias` a constant for each place in a span:
/// entry `e` is `norm(Σ_t softmax_t(gate_t + bias_t) · kv_t)`, channel by channel, over the tokens of the `spans` spans of
/// `ratio` tokens that end with span `e`; those of the `s`-th of these spans take part with their `s`-th key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressionSpec {
    /// Tokens from entry to entry.
    pub ratio: usize,
    /// Spans from which an entry is made; with more than one, entries overlap.
    pub spans: usize,
    /// Limits attention to the entries that an indexer chooses; `None`: all that are complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub indexer: Option<EntryIndexerSpec>,
}

/// An indexer of entries: each token attends to the `index_top_k` complete entries with the highest
/// `Σ_h w_h · relu(q_h · k · index_head_dim^-0.5)`. `k` is an entry made in the same way with projections of its own; `w` is a
/// projection of the input times `index_heads^-0.5`; queries come from the query's latent and rotate at their ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntryIndexerSpec {
    /// Query heads.
    pub index_heads: usize,
    /// Width of a query and a key.
    pub index_head_dim: usize,
    /// Entries that each token attends to.
    pub index_top_k: usize,
}

impl CompressedSpec {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.output_groups * self.group_heads
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        let heads = self.output_groups.saturating_mul(self.group_heads);
        for (name, value) in [
            ("output_groups", self.output_groups),
            ("group_heads", self.group_heads),
            ("output_rank", self.output_rank),
            ("head_dim", self.head_dim),
            ("q_lora_rank", self.q_lora_rank),
            ("heads × head_dim", heads.saturating_mul(self.head_dim)),
            ("output_groups × output_rank", self.output_groups.saturating_mul(self.output_rank)),
        ] {
            check_width(name, value)?;
        }
        check_range("window", self.window, MAX_LENGTH)?;
        check_eps("norm_eps", self.norm_eps)?;
        if !self.softmax_scale.is_finite() {
            return Err(format!("softmax_scale is {}", self.softmax_scale));
        }
        if self.rope.dim > self.head_dim {
            return Err(format!("rope.dim is {} of a head of {}", self.rope.dim, self.head_dim));
        }
        self.rope.validate()?;
        self.compression.as_ref().map_or(Ok(()), |c| c.validate(self.head_dim, self.rope.dim))
    }
}

impl CompressionSpec {
    /// The most tokens from which an entry is made.
    pub fn reach(&self) -> usize {
        self.ratio * self.spans
    }

    fn validate(&self, head_dim: usize, rotated: usize) -> Result<(), String> {
        check_range("ratio", self.ratio, MAX_LENGTH)?;
        check_width("spans", self.spans)?;
        check_range("ratio × spans", self.ratio.saturating_mul(self.spans), MAX_LENGTH)?;
        let sizes = |width: usize| {
            let keys = self.spans.saturating_mul(width);
            check_width("spans × width", keys)?;
            check_range("ratio × spans × width", self.ratio.saturating_mul(keys), MAX_LENGTH)
        };
        sizes(head_dim)?;
        let Some(indexer) = &self.indexer else { return Ok(()) };
        for (name, value) in [
            ("index_heads", indexer.index_heads),
            ("index_head_dim", indexer.index_head_dim),
            ("index_heads × index_head_dim", indexer.index_heads.saturating_mul(indexer.index_head_dim)),
        ] {
            check_width(name, value)?;
        }
        check_range("index_top_k", indexer.index_top_k, MAX_LENGTH)?;
        if rotated > indexer.index_head_dim {
            return Err(format!("rope.dim is {rotated} of an index head of {}", indexer.index_head_dim));
        }
        sizes(indexer.index_head_dim)
    }
}

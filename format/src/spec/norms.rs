//! Norms of the residual stream.

use serde::{Deserialize, Serialize};

use super::is_false;

/// Norms of the residual stream: before attention, before the feed-forward part and before the head, and behind the two parts.
/// Unless the JSON says otherwise, they are RMS norms before the parts, and there are none behind them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormsSpec {
    /// Whether the norms before the parts and before the head are layer norms (arXiv:1607.06450), which subtract the mean and have a
    /// bias, instead of RMS norms (arXiv:1910.07467).
    #[serde(default, skip_serializing_if = "is_false")]
    pub centred: bool,
    /// Whether what attention and the feed-forward part add to the residual stream goes through an RMS norm of its own
    /// (Gemma 2, arXiv:2408.00118, section 2).
    #[serde(default, skip_serializing_if = "is_false")]
    pub behind: bool,
}

impl NormsSpec {
    /// Whether they are the same as in most models.
    pub(super) fn are_usual(&self) -> bool {
        *self == NormsSpec::default()
    }
}

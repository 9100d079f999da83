//! Grouped-query attention.

use serde::{Deserialize, Serialize};

use super::{KeyBlocksSpec, QueryTemperature, RopeSpec, check_eps, check_range, check_width, is_false};
use crate::limits::MAX_LENGTH;

/// Grouped-query attention (arXiv:2305.13245): query head `h` uses key-value head `h / (heads / kv_heads)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GqaSpec {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a query and a key.
    pub head_dim: usize,
    /// Width of a value.
    pub v_head_dim: usize,
    /// Factor on the scores before the softmax.
    pub softmax_scale: f32,
    /// Rotation of the first `rope.dim` elements of queries and keys; `None`: no positions.
    pub rope: Option<RopeSpec>,
    /// Keys that a query sees, itself included; `None`: all before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Positions are cut into stretches of this many, and a query sees the keys of its own stretch up to itself; `None`: it sees
    /// those of all positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stretch: Option<usize>,
    /// RMS norm of queries and keys, before the rotation unless it says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<QkNorm>,
    /// Bounds queries, keys and values to ± this, after the norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_qkv: Option<f32>,
    /// Factor on queries that grows with the position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<QueryTemperature>,
    /// Factor on values; `None`: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_factor: Option<f32>,
    /// Epsilon of an RMS norm without weights on each head's value; `None`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_norm: Option<f32>,
    /// Whether values have no projection: they are the keys, before norm and rotation.
    #[serde(default, skip_serializing_if = "is_false")]
    pub value_is_key: bool,
    /// Whether the projections of queries, keys and values have biases.
    #[serde(default, skip_serializing_if = "is_false")]
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    #[serde(default, skip_serializing_if = "is_false")]
    pub o_bias: bool,
    /// Whether each head has a sink: one more logit in the softmax, without a value.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sinks: bool,
    /// Whether the heads' outputs are multiplied by the sigmoid of a projection of the input.
    #[serde(default, skip_serializing_if = "is_false")]
    pub output_gate: bool,
    /// Whether the output of each head is multiplied by the sigmoid of a projection of the input to one number per head.
    #[serde(default, skip_serializing_if = "is_false")]
    pub head_gate: bool,
    /// Limits attention to blocks of keys; `None`: all keys in the window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<KeyBlocksSpec>,
}

/// RMS norm of queries and keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QkNorm {
    /// What is normalised at once.
    pub scope: QkNormScope,
    /// Epsilon.
    pub eps: f32,
    /// Whether it has no weights: they are 1.
    #[serde(default, skip_serializing_if = "is_false")]
    pub weightless: bool,
    /// Whether it comes behind the rotation.
    #[serde(default, skip_serializing_if = "is_false")]
    pub after_rope: bool,
}

/// What a norm of queries and keys normalises at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNormScope {
    /// Each head by itself, with weights of one head's width.
    Head,
    /// All heads together.
    Whole,
}

impl GqaSpec {
    /// The most keys that a query sees; `None`: all before it.
    pub fn reach(&self) -> Option<usize> {
        self.window.or(self.stretch)
    }

    /// The first position that a query at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        match (self.window, self.stretch) {
            (Some(window), _) => (position + 1).saturating_sub(window),
            (None, Some(stretch)) => position / stretch * stretch,
            (None, None) => 0,
        }
    }

    /// Adjacent query heads that see the same keys.
    pub fn heads_together(&self) -> usize {
        let choosing = self.blocks.as_ref().map_or(1, |blocks| blocks.choices());
        self.heads / self.kv_heads.max(choosing)
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        for (name, value) in [
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("v_head_dim", self.v_head_dim),
            ("heads × head_dim", self.heads.saturating_mul(self.head_dim)),
            ("heads × v_head_dim", self.heads.saturating_mul(self.v_head_dim)),
        ] {
            check_width(name, value)?;
        }
        check_range("window", self.window.unwrap_or(1), MAX_LENGTH)?;
        check_range("stretch", self.stretch.unwrap_or(1), MAX_LENGTH)?;
        if self.value_is_key && self.v_head_dim != self.head_dim {
            return Err(format!("its values are keys, but have {} numbers, not {}", self.v_head_dim, self.head_dim));
        }
        if self.output_gate && self.head_gate {
            return Err("it gates its heads twice".into());
        }
        if self.window.is_some() && self.stretch.is_some() {
            return Err("it has a window and stretches".into());
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads share {} key-value heads", self.heads, self.kv_heads));
        }
        if !self.softmax_scale.is_finite() || self.clip_qkv.is_some_and(|c| !(c.is_finite() && c > 0.0)) {
            return Err("softmax_scale or clip_qkv is not a positive number".into());
        }
        if let Some(norm) = &self.qk_norm {
            check_eps("qk_norm.eps", norm.eps)?;
        }
        if let Some(temperature) = &self.temperature {
            temperature.validate()?;
        }
        check_eps("value_norm", self.value_norm.unwrap_or(0.0))?;
        if self.value_factor.is_some_and(|factor| !factor.is_finite()) {
            return Err("value_factor is not a number".into());
        }
        if let Some(blocks) = &self.blocks {
            if self.reach().is_some() {
                return Err("it attends to blocks of keys within a window or stretch".into());
            }
            blocks.validate(self.heads, self.kv_heads, self.rope.as_ref().map_or(0, |rope| rope.dim))?;
        }
        match &self.rope {
            Some(rope) if rope.dim > self.head_dim => {
                Err(format!("rope.dim is {} of a head of {}", rope.dim, self.head_dim))
            }
            Some(rope) => rope.validate(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_query_sees() {
        let spec = |window, stretch| GqaSpec {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            v_head_dim: 2,
            softmax_scale: 1.0,
            rope: None,
            window,
            stretch,
            blocks: None,
            qk_norm: None,
            clip_qkv: None,
            temperature: None,
            value_factor: None,
            value_norm: None,
            value_is_key: false,
            qkv_bias: false,
            o_bias: false,
            sinks: false,
            output_gate: false,
            head_gate: false,
        };
        let first = |spec: &GqaSpec| [0, 7, 8, 15, 16].map(|position| spec.first_seen(position));
        assert_eq!((first(&spec(None, None)), spec(None, None).reach()), ([0; 5], None));
        assert_eq!((first(&spec(Some(8), None)), spec(Some(8), None).reach()), ([0, 0, 1, 8, 9], Some(8)));
        assert_eq!((first(&spec(None, Some(8))), spec(None, Some(8)).reach()), ([0, 0, 8, 8, 16], Some(8)));
    }
}

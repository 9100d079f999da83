//! Constant factors on what flows between the layers.

use serde::{Deserialize, Serialize};

/// Constant factors on what flows between the layers, as maximal update parametrisation has them (arXiv:2203.03466, table 8).
/// Each is 1 where it is not in the JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factors {
    /// On the embedding of a token.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub embedding: f32,
    /// On what attention and the feed-forward part add to the residual stream.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub residual: f32,
    /// On the logits.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub logits: f32,
}

impl Default for Factors {
    fn default() -> Self {
        Factors { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

impl Factors {
    /// Whether all are 1.
    pub(super) fn are_one(&self) -> bool {
        *self == Factors::default()
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        for (name, value) in [("embedding", self.embedding), ("residual", self.residual), ("logits", self.logits)] {
            if !value.is_finite() || value == 0.0 {
                return Err(format!("factors.{name} is {value}"));
            }
        }
        Ok(())
    }
}

fn one() -> f32 {
    1.0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(value: &f32) -> bool {
    *value == 1.0
}

//! The layer that predicts the token after the next one.

use serde::{Deserialize, Serialize};

use super::{AttentionSpec, LayerSpec, ModelSpec, check_width, is_false};

/// A layer of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2, with one module).
///
/// It makes the logits of token `t[i + 2]` from token `t[i + 1]` and `h[i]`, what the head sees after token `t[i]`: the residual
/// behind the last layer, after the final norm.
///
/// ```text
/// x[i]      = projection · [norm(embedding(t[i + 1])); norm(h[i])]
/// logits[i] = head · norm(layer(x)[i])
/// ```
///
/// The three norms have weights of their own and the model's epsilon; the layer attends to `x[0..=i]` and is otherwise like those of
/// the decoder. It has its own keys and values: those of `x[i]` have position `i`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PredictionSpec {
    /// The layer.
    pub layer: LayerSpec,
    /// Whether it has a token embedding of its own; otherwise it uses the model's.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own_embedding: bool,
    /// Whether it has an output head of its own; otherwise it uses the model's.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own_head: bool,
}

impl PredictionSpec {
    /// Checks the layer, and that it fits `model`.
    pub(super) fn validate(&self, model: &ModelSpec) -> Result<(), String> {
        self.layer.attention.validate()?;
        self.layer.ffn.validate()?;
        check_width("hidden_size × 2", model.hidden_size.saturating_mul(2))?;
        if self.layer.ffn.is_none() {
            return Err("it has no feed-forward part".into());
        }
        if model.norms.centred || model.head_bias {
            return Err("the model has layer norms, or a bias of the head".into());
        }
        if model.residual_width() != model.hidden_size {
            return Err("the model has several residual streams".into());
        }
        if let AttentionSpec::Mla(mla) = &self.layer.attention
            && mla.indexer.as_ref().is_some_and(|indexer| indexer.shared)
        {
            return Err("its indexer is shared, and there is none before it".into());
        }
        Ok(())
    }
}

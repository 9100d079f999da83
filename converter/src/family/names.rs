//! Names that many families share.

use super::View;

/// Names of a decoder whose tensors are called as in Llama: `model.layers.3.mlp.down_proj.weight`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecoderNames {
    /// What stands before `layers.N`, such as `model.`.
    pub(crate) prefix: &'static str,
    /// The output head.
    pub(crate) head: &'static str,
}

impl DecoderNames {
    /// The layout of almost every checkpoint.
    pub(crate) const USUAL: DecoderNames = DecoderNames { prefix: "model.", head: "lm_head.weight" };

    /// The token embedding.
    pub(crate) fn embedding(self) -> String {
        format!("{}embed_tokens.weight", self.prefix)
    }

    /// The norm before the head.
    pub(crate) fn final_norm(self) -> String {
        format!("{}norm.weight", self.prefix)
    }

    /// A tensor of a layer.
    pub(crate) fn layer(self, layer: usize, rest: &str) -> String {
        format!("{}layers.{layer}.{rest}", self.prefix)
    }

    /// The layer that a tensor belongs to.
    pub(crate) fn layer_of(self, name: &str) -> Option<usize> {
        let (number, _) = name.strip_prefix(self.prefix)?.strip_prefix("layers.")?.split_once('.')?;
        number.parse().ok()
    }
}

/// Gate, up or down of a gated feed-forward network called `module`; `tensor` is the canonical name, `shape` its rows and
/// columns.
pub(crate) fn gated_ffn(module: &str, tensor: &str, [rows, cols]: [usize; 2]) -> Vec<View> {
    let part = |which: &str| View::whole(format!("{module}.{which}_proj.weight"), rows, cols);
    match tensor {
        "gate_up" => vec![part("gate"), part("up")],
        "down" => vec![part("down")],
        other => unreachable!("a feed-forward network has no `{other}`"),
    }
}

//! Prediction layers: the names of their tensors.
//!
//! DeepSeek and GLM number them after the layers of the decoder (`model.layers.61.eh_proj.weight`); Qwen has a separate module for
//! them (`mtp.fc.weight`). llama.cpp converts both to the first arrangement.

use sluice_format::TensorShape;

use super::names::Names;
use super::view::View;

/// The names of the tensors of a prediction layer.
#[derive(Clone, Debug)]
pub(crate) struct PredictionNames {
    /// The names of a model with only this layer, as layer 0.
    pub(crate) layer: Names,
    /// The prefix of all its tensors.
    prefix: String,
    own: &'static Own,
}

/// Names that only a prediction layer has, after the prefix.
#[derive(Debug)]
struct Own {
    embedding_norm: &'static str,
    hidden_norm: &'static str,
    projection: &'static str,
    norm: &'static str,
    embedding: &'static str,
    head: &'static str,
}

const NUMBERED: Own = Own {
    embedding_norm: "enorm.weight",
    hidden_norm: "hnorm.weight",
    projection: "eh_proj.weight",
    norm: "shared_head.norm.weight",
    embedding: "embed_tokens.weight",
    head: "shared_head.head.weight",
};

const MODULE: Own = Own {
    embedding_norm: "pre_fc_norm_embedding.weight",
    hidden_norm: "pre_fc_norm_hidden.weight",
    projection: "fc.weight",
    norm: "norm.weight",
    embedding: "embed_tokens.weight",
    head: "lm_head.weight",
};

impl PredictionNames {
    /// Possible names of the first prediction layer of a decoder with this many layers, whose tensors are called `names`.
    pub(crate) fn spellings(names: Names, layers: usize) -> Vec<Self> {
        let module = |&prefix: &&'static str| PredictionNames {
            layer: Names { prefix, first: 0, ..names },
            prefix: prefix.to_owned(),
            own: &MODULE,
        };
        let numbered = PredictionNames {
            layer: Names { first: layers, ..names },
            prefix: names.layer(layers, ""),
            own: &NUMBERED,
        };
        names.mtp.iter().map(module).chain([numbered]).collect()
    }

    /// Whether a tensor belongs to the layer.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        tensor.starts_with(&self.prefix)
    }

    /// The projection, which no other layer has.
    pub(crate) fn projection(&self) -> String {
        self.name(self.own.projection)
    }

    /// Its token embedding and output head, which are often copies of the model's.
    pub(crate) fn embedding_and_head(&self) -> [String; 2] {
        [self.own.embedding, self.own.head].map(|rest| self.name(rest))
    }

    /// Where a tensor of its extent of kind prediction comes from.
    pub(crate) fn origin(&self, tensor: &TensorShape) -> View {
        let [_, rows, cols] = tensor.shape;
        let norm = |rest| self.layer.norm(self.name(rest), cols);
        match tensor.name {
            "embedding_norm" => norm(self.own.embedding_norm),
            "hidden_norm" => norm(self.own.hidden_norm),
            "projection" => View::whole(self.projection(), rows, cols),
            "norm" => norm(self.own.norm),
            other => unreachable!("a prediction layer has no `{other}`"),
        }
    }

    fn name(&self, rest: &str) -> String {
        format!("{}{rest}", self.prefix)
    }
}

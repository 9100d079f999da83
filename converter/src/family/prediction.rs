//! Prediction layers: what their tensors are called.
//!
//! DeepSeek and GLM number them behind the layers of the decoder (`model.layers.61.eh_proj.weight`), Qwen has a module of its own
//! for them (`mtp.fc.weight`). llama.cpp brings both to the first arrangement.

use sluice_format::TensorShape;

use super::names::Names;
use super::view::View;

/// What the tensors of a prediction layer are called.
#[derive(Clone, Debug)]
pub(crate) struct PredictionNames {
    /// The names of a model that has this layer alone, as layer 0.
    pub(crate) layer: Names,
    /// What all its tensors begin with.
    prefix: String,
    own: &'static Own,
}

/// What only a prediction layer has, behind the prefix.
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
    /// What the first prediction layer of a decoder of so many layers may be called, where its tensors are called `names`.
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

    /// Whether a tensor belongs to it.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        tensor.starts_with(&self.prefix)
    }

    /// The projection, which no other layer has.
    pub(crate) fn projection(&self) -> String {
        self.name(self.own.projection)
    }

    /// Its token embedding and its output head, which are often copies of the model's.
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

//! Where the tensors of a model come from: of the decoder as its family says, and of a prediction layer.

use sluice_format::{ExtentKind, ModelSpec, TensorShape};

use crate::family::names::Names;
use crate::family::prediction::PredictionNames;
use crate::family::{Family, Origin, Place};

/// What the tensors of a checkpoint are called, and what model they make.
#[derive(Clone, Copy)]
pub(crate) struct Naming<'a> {
    pub(crate) family: &'a dyn Family,
    pub(crate) names: Names,
    pub(crate) spec: &'a ModelSpec,
    /// How many tensors each table of n-grams is split into.
    pub(crate) table_parts: usize,
    /// Of the prediction layer, if the model that `spec` describes has one.
    pub(crate) prediction: Option<&'a Prediction>,
}

/// A prediction layer of the checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Prediction {
    pub(crate) names: PredictionNames,
    /// The layer as a model of one layer.
    pub(crate) model: ModelSpec,
    /// Its token embedding and its output head, where they are not the model's.
    pub(crate) embedding: Option<String>,
    pub(crate) head: Option<String>,
    /// Those of the two that are there and are the model's.
    pub(crate) copies: Vec<String>,
}

impl Naming<'_> {
    /// Where a tensor of an extent comes from: one of those of layers.
    pub(crate) fn origin(&self, place: Place, tensor: &TensorShape) -> Origin {
        match self.prediction {
            Some(prediction) if place.layer >= self.spec.layers.len() => prediction.origin(self.family, place, tensor),
            _ => self.family.origin(self.names, self.spec, place, tensor),
        }
    }

    /// The embedding and the head that the prediction layer has of its own.
    pub(crate) fn own_parts(&self) -> Vec<(ExtentKind, &str)> {
        let Some(prediction) = self.prediction else { return Vec::new() };
        let own = [(ExtentKind::Embedding, &prediction.embedding), (ExtentKind::Head, &prediction.head)];
        own.into_iter().filter_map(|(kind, name)| Some((kind, name.as_deref()?))).collect()
    }
}

impl Prediction {
    /// Where a tensor of an extent of this layer comes from.
    pub(crate) fn origin(&self, family: &dyn Family, place: Place, tensor: &TensorShape) -> Origin {
        match place.kind {
            ExtentKind::Prediction => vec![vec![self.names.origin(tensor)]],
            _ => family.origin(self.names.layer, &self.model, Place { layer: 0, ..place }, tensor),
        }
    }
}

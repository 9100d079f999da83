//! Where the tensors of a model come from: those of the decoder as its family says, and those of a prediction layer.

use sluice_format::{ExtentKind, ModelSpec, TensorShape};

use crate::family::names::Names;
use crate::family::prediction::PredictionNames;
use crate::family::{Family, Origin, Place};

/// The names of a checkpoint's tensors, and the model that they form.
#[derive(Clone, Copy)]
pub(crate) struct Naming<'a> {
    pub(crate) family: &'a dyn Family,
    pub(crate) names: Names,
    pub(crate) spec: &'a ModelSpec,
    /// How many tensors each table of n-grams is split into.
    pub(crate) table_parts: usize,
    /// The prediction layer, if the model that `spec` describes has one.
    pub(crate) prediction: Option<&'a Prediction>,
}

/// A prediction layer of the checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Prediction {
    pub(crate) names: PredictionNames,
    /// The layer as a model of one layer.
    pub(crate) model: ModelSpec,
    /// Its token embedding and its output head, if they differ from the model's.
    pub(crate) embedding: Option<String>,
    pub(crate) head: Option<String>,
    /// Which of the two exist and equal the model's.
    pub(crate) copies: Vec<String>,
}

impl Naming<'_> {
    /// Where a tensor of a layer's extent comes from.
    pub(crate) fn origin(&self, place: Place, tensor: &TensorShape) -> Origin {
        match self.prediction {
            Some(prediction) if place.layer >= self.spec.layers.len() => prediction.origin(self.family, place, tensor),
            _ => self.family.origin(self.names, self.spec, place, tensor),
        }
    }

    /// The separate embedding and head of the prediction layer.
    pub(crate) fn own_parts(&self) -> Vec<(ExtentKind, &str)> {
        let Some(prediction) = self.prediction else { return Vec::new() };
        let own = [(ExtentKind::Embedding, &prediction.embedding), (ExtentKind::Head, &prediction.head)];
        own.into_iter().filter_map(|(kind, name)| Some((kind, name.as_deref()?))).collect()
    }
}

impl Prediction {
    /// Where a tensor of this layer's extents comes from.
    pub(crate) fn origin(&self, family: &dyn Family, place: Place, tensor: &TensorShape) -> Origin {
        match place.kind {
            ExtentKind::Prediction => vec![vec![self.names.origin(tensor)]],
            _ => family.origin(self.names.layer, &self.model, Place { layer: 0, ..place }, tensor),
        }
    }
}

//! Finds out whether a checkpoint has a prediction layer that can be carried.
//!
//! A model can generate without it. So a layer that is incomplete, or has unknown tensors, does not stop a conversion: it is left
//! out, and a note says why. Wrong shapes of tensors are an error as elsewhere.

use std::collections::BTreeSet;

use sluice_format::{ExtentKind, ModelSpec, PredictionSpec};

use super::build::places_of;
use super::form;
use super::harmless::{self, Harmless};
use super::inventory::{MAX_MISSING, Tied, same_numbers};
use super::naming::Prediction;
use super::resolve::pick;
use crate::error::{ConvertError, counted};
use crate::family::names::Names;
use crate::family::prediction::PredictionNames;
use crate::family::{Family, by_its_name};
use crate::source::Checkpoint;

/// The prediction layer of a checkpoint, or why an existing one is left out.
pub(crate) enum Found {
    /// There is none, or this family's are not supported.
    None,
    /// It is complete, and now part of the spec.
    Layer(Box<Prediction>),
    /// A remark for the user.
    LeftOut(String),
}

/// Looks for the prediction layer of a model. `spec` is the decoder's; the layer is added to it if there is one.
pub(crate) fn find(
    checkpoint: &Checkpoint,
    family: &dyn Family,
    names: Names,
    spec: &mut ModelSpec,
    tied: Tied,
) -> Result<Found, ConvertError> {
    let Some(layer) = family.prediction(spec) else { return Ok(Found::None) };
    let there = |names: &PredictionNames| form::find(checkpoint, &names.projection()).is_some();
    let Some(names_of) = PredictionNames::spellings(names, spec.layers.len()).into_iter().find(there) else {
        return Ok(Found::None);
    };
    let why =
        |problem: &str| Ok(Found::LeftOut(format!("the layer for multi-token prediction is left out: {problem}")));
    // MLX adds one only to the norms that it knows, which are those of the decoder.
    if family.names().zero_centred && !names.zero_centred && !checkpoint.whole_norms {
        return why("how its norms are stored is not known in an arrangement of MLX");
    }
    let mut with_layer = spec.clone();
    with_layer.prediction = Some(PredictionSpec { layer, own_embedding: false, own_head: false });
    if let Err(problem) = with_layer.validate() {
        return why(&problem);
    }
    let model = with_layer.prediction_model().expect("it has one");
    let mut prediction = Prediction { names: names_of, model, embedding: None, head: None, copies: Vec::new() };
    let (used, missing) = needed(checkpoint, family, &with_layer, &prediction);
    if !missing.is_empty() {
        return why(&format!("the checkpoint does not have {}", counted(&missing)));
    }
    let used = own_parts(checkpoint, names, tied, &mut prediction, used)?;
    let unknown = unknown(checkpoint, &prediction, &used)?;
    if !unknown.is_empty() {
        return why(&format!("it has {}, which this converter does not know", counted(&unknown)));
    }
    let of_spec = with_layer.prediction.as_mut().expect("it has one");
    (of_spec.own_embedding, of_spec.own_head) = (prediction.embedding.is_some(), prediction.head.is_some());
    *spec = with_layer;
    Ok(Found::Layer(Box::new(prediction)))
}

/// The layer's tensors by index, and the names of those that are missing.
fn needed(
    checkpoint: &Checkpoint,
    family: &dyn Family,
    spec: &ModelSpec,
    prediction: &Prediction,
) -> (Vec<bool>, Vec<String>) {
    let (mut used, mut missing) = (vec![false; checkpoint.tensors.len()], BTreeSet::new());
    for place in spec.prediction_layer().into_iter().flat_map(|layer| places_of(spec, layer)) {
        for tensor in spec.tensors(place.kind, place.layer) {
            for view in pick(checkpoint, prediction.origin(family, place, &tensor)) {
                match form::find(checkpoint, &view.tensor) {
                    Some(parts) => {
                        parts.tensors.into_iter().for_each(|tensor| used[tensor] = true);
                        missing.extend(parts.missing);
                    }
                    None => drop(missing.insert(view.tensor)),
                }
            }
        }
        if missing.len() >= MAX_MISSING {
            break;
        }
    }
    (used, missing.into_iter().collect())
}

/// Finds out whether embedding and head of the layer, if it has them, are the model's; marks them as used.
fn own_parts(
    checkpoint: &Checkpoint,
    names: Names,
    tied: Tied,
    prediction: &mut Prediction,
    mut used: Vec<bool>,
) -> Result<Vec<bool>, ConvertError> {
    let (embedding, head) = (names.embedding(), names.head.to_owned());
    // If the configuration ties the model's head to the embedding, the layer's must be a copy of both.
    let head_is_there = form::find(checkpoint, &head).is_some();
    let embedding_is_head = tied == Tied::Yes || !head_is_there;
    let heads = [(head_is_there, &head), (embedding_is_head, &embedding)].into_iter().filter(|(there, _)| *there);
    let of_model = [vec![&embedding], heads.map(|(_, name)| name).collect()];
    let kinds = [ExtentKind::Embedding, ExtentKind::Head];
    for ((own, of_model), kind) in prediction.names.embedding_and_head().into_iter().zip(of_model).zip(kinds) {
        let Some(parts) = form::find(checkpoint, &own) else { continue };
        parts.tensors.into_iter().for_each(|tensor| used[tensor] = true);
        let mut is_copy = true;
        for other in of_model {
            is_copy = is_copy && same_numbers(checkpoint, &own, other)?;
        }
        match kind {
            _ if is_copy => prediction.copies.push(own),
            ExtentKind::Embedding => prediction.embedding = Some(own),
            _ => prediction.head = Some(own),
        }
    }
    Ok(used)
}

/// Tensors of the layer that are not used, but may change what it computes.
fn unknown(checkpoint: &Checkpoint, prediction: &Prediction, used: &[bool]) -> Result<Vec<String>, ConvertError> {
    let mut unknown = Vec::new();
    for (number, tensor) in checkpoint.tensors.iter().enumerate() {
        if used[number] || !prediction.names.has(&tensor.name) || by_its_name(&tensor.name).is_some() {
            continue;
        }
        match harmless::look(checkpoint, used, number) {
            Ok(Harmless::Yes(_)) => {}
            Ok(Harmless::Unknown) | Err(ConvertError::NotZero { .. }) => unknown.push(tensor.name.clone()),
            Err(other) => return Err(other),
        }
    }
    Ok(unknown)
}

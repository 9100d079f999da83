//! Taking stock: every tensor that the model needs is there, and every tensor that is there is accounted for.

use std::collections::{BTreeMap, BTreeSet};

use sluice_format::ModelSpec;

use super::LeftOut;
use super::build::places;
use super::form;
use super::resolve::pick;
use crate::error::{ConvertError, first_few};
use crate::family::{Family, Unused};
use crate::source::Checkpoint;

/// Missing names are counted up to this many: a hostile configuration can imply billions.
const MAX_MISSING: usize = 10_000;

/// What taking stock found.
pub(crate) struct Inventory {
    /// The tensor that makes the output head.
    pub(crate) head: String,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) notes: Vec<String>,
}

struct Ledger<'a> {
    checkpoint: &'a Checkpoint,
    used: Vec<bool>,
    missing: Vec<String>,
}

impl Ledger<'_> {
    /// Marks what holds a tensor as used, or as missing.
    fn need(&mut self, name: &str) {
        let Some(parts) = form::find(self.checkpoint, name) else {
            self.missing.push(name.to_owned());
            return;
        };
        parts.tensors.into_iter().for_each(|tensor| self.used[tensor] = true);
        self.missing.extend(parts.missing);
    }
}

pub(crate) fn take(
    checkpoint: &Checkpoint,
    family: &dyn Family,
    spec: &ModelSpec,
    tied: bool,
) -> Result<Inventory, ConvertError> {
    let names = family.names();
    let mut notes = Vec::new();
    let stored_head = form::find(checkpoint, names.head);
    let head = match (tied, &stored_head) {
        (false, Some(_)) => names.head.to_owned(),
        // Many tied checkpoints do not say so; the absent tensor does.
        (false, None) => {
            notes.push(format!("there is no `{}`: the token embedding is also the output head", names.head));
            names.embedding()
        }
        (true, _) => names.embedding(),
    };
    let mut ledger = Ledger { checkpoint, used: vec![false; checkpoint.tensors.len()], missing: Vec::new() };
    for name in [&names.embedding(), &head, &names.final_norm(spec.hidden_size).tensor] {
        ledger.need(name);
    }
    for place in places(spec) {
        for tensor in spec.tensors(place.kind, place.layer) {
            let views = pick(checkpoint, family.origin(spec, place, &tensor));
            views.iter().for_each(|view| ledger.need(&view.tensor));
        }
        if ledger.missing.len() >= MAX_MISSING {
            break;
        }
    }
    ledger.missing.dedup();
    if !ledger.missing.is_empty() {
        return Err(ConvertError::MissingTensors {
            path: checkpoint.dir.clone(),
            count: ledger.missing.len(),
            names: first_few(&ledger.missing),
        });
    }
    if let (true, Some(copy)) = (tied, stored_head) {
        copy.tensors.into_iter().for_each(|tensor| ledger.used[tensor] = true);
        notes.push(format!(
            "`tie_word_embeddings` is true: `{}` is ignored, the token embedding is the head",
            names.head
        ));
    }
    let left_out = account_for_rest(checkpoint, family, spec, &ledger.used)?;
    Ok(Inventory { head, left_out, notes })
}

/// Sorts what is not used into what may be left out and what is unknown.
fn account_for_rest(
    checkpoint: &Checkpoint,
    family: &dyn Family,
    spec: &ModelSpec,
    used: &[bool],
) -> Result<Vec<LeftOut>, ConvertError> {
    let names = family.names();
    let mut left_out: BTreeMap<Unused, LeftOut> = BTreeMap::new();
    let (mut unknown, mut surplus) = (Vec::new(), Vec::new());
    // Not as many as `num_nextn_predict_layers` says: published files say 0 there and have such a layer all the same.
    let predicting: BTreeSet<usize> =
        checkpoint.tensors.iter().filter_map(|t| names.prediction_layer_of(&t.name)).collect();
    let rest = checkpoint.tensors.iter().zip(used).filter(|(_, used)| !**used);
    for (tensor, _) in rest {
        let surplus_layer = names.layer_of(&tensor.name).filter(|&layer| layer >= spec.layers.len());
        let reason = match surplus_layer {
            Some(layer) => predicting.contains(&layer).then_some(Unused::MultiTokenPrediction),
            None => family.unused(&tensor.name),
        };
        let Some(reason) = reason else {
            let list = if surplus_layer.is_some() { &mut surplus } else { &mut unknown };
            list.push(tensor.name.clone());
            continue;
        };
        let entry = left_out.entry(reason);
        let entry = entry.or_insert_with(|| LeftOut { reason: reason.name().to_owned(), tensors: 0, bytes: 0 });
        entry.tensors += 1;
        entry.bytes += tensor.len;
    }
    if !surplus.is_empty() {
        return Err(ConvertError::SurplusLayers {
            path: checkpoint.dir.clone(),
            count: surplus.len(),
            names: first_few(&surplus),
            layers: spec.layers.len(),
        });
    }
    if !unknown.is_empty() {
        return Err(ConvertError::UnknownTensors {
            path: checkpoint.dir.clone(),
            count: unknown.len(),
            names: first_few(&unknown),
            family: spec.family.clone(),
        });
    }
    Ok(left_out.into_values().collect())
}

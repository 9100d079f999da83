//! Checks that every tensor that the model needs exists, and that every existing tensor is accounted for.

use std::collections::{BTreeMap, BTreeSet};

use sluice_checksum::Xxh3;
use sluice_format::{ExtentKind, ModelSpec};

use super::LeftOut;
use super::build::places;
use super::form;
use super::harmless::{self, Harmless};
use super::naming::Naming;
use super::resolve::pick;
use crate::error::{ConvertError, counted, first_few};
use crate::family::config::Config;
use crate::family::names::Names;
use crate::family::{Family, Unused};
use crate::source::recognise::unfinished;
use crate::source::{AbsentTensor, Checkpoint, INDEX};

/// Missing names are counted up to this limit: a hostile configuration can imply billions.
pub(crate) const MAX_MISSING: usize = 10_000;
/// Number of pieces of embedding and head that are compared, and their length.
const PIECES: u64 = 9;
const COMPARED: u64 = 64 << 10;
/// The key that says whether the token embedding is also the output head.
const TIE: &str = "tie_word_embeddings";

/// The result of the check.
pub(crate) struct Inventory {
    /// The tensor that becomes the output head.
    pub(crate) head: String,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) notes: Vec<String>,
}

/// What the configuration says about the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tied {
    /// It is the token embedding.
    Yes,
    /// It is a separate tensor.
    No,
    /// Nothing, which the family's configuration class treats as no.
    Unsaid,
}

impl Tied {
    /// From the text model's section, or otherwise from the whole. `by_default`: the meaning of a missing key.
    pub(crate) fn read(text: &Config, whole: &Config, by_default: bool) -> Result<Self, ConvertError> {
        let Some(config) = [text, whole].into_iter().find(|c| c.has(TIE)) else {
            return Ok(if by_default { Tied::Yes } else { Tied::Unsaid });
        };
        Ok(if config.bool_or(TIE, false)? { Tied::Yes } else { Tied::No })
    }
}

struct Ledger<'a> {
    checkpoint: &'a Checkpoint,
    names: Names,
    /// Layers of the model as configured, in the numbering of names.
    layers: usize,
    /// Layers that predict further tokens.
    predicting: BTreeSet<usize>,
    used: Vec<bool>,
    missing: Vec<String>,
}

impl Ledger<'_> {
    /// Marks the tensors that hold this one as used, or the name as missing.
    fn need(&mut self, name: &str) {
        let Some(parts) = form::find(self.checkpoint, name) else {
            self.missing.push(name.to_owned());
            return;
        };
        parts.tensors.into_iter().for_each(|tensor| self.used[tensor] = true);
        self.missing.extend(parts.missing);
    }

    /// Marks the parts of tables of n-grams, this many for each, and the tensors that select their rows.
    fn need_tables(&mut self, family: &dyn Family, spec: &ModelSpec, parts: usize) {
        let names = self.names;
        family.deciding(names, spec).iter().for_each(|name| self.need(name));
        for (layer, part) in spec.ngrams.iter().flat_map(|n| (0..parts).map(|part| (n.layer, part))) {
            if self.missing.len() >= MAX_MISSING {
                break;
            }
            self.need(&family.table_part(names, layer, part));
        }
    }

    /// The layer of a tensor, if it is beyond the layers that the configuration counts.
    fn surplus_layer(&self, tensor: &str) -> Option<usize> {
        self.names.layer_of(tensor).filter(|&layer| layer >= self.layers)
    }

    /// Why a tensor that no extent uses may be left out.
    fn unused(&self, family: &dyn Family, tensor: &str) -> Option<Unused> {
        match self.surplus_layer(tensor) {
            Some(layer) => self.predicting.contains(&layer).then_some(Unused::MultiTokenPrediction),
            None => family.unused(tensor),
        }
    }

    /// A possible explanation for missing tensors, as the continuation of a sentence.
    fn hint(&self, missing: &[String]) -> String {
        let missing: BTreeSet<&String> = missing.iter().collect();
        let placed = self.checkpoint.absent.iter().find(|a| missing.contains(&a.tensor));
        let placed = placed.map(|a| format!("`{INDEX}` places `{}` in `{}`, which does not hold it", a.tensor, a.file));
        placed.or_else(|| self.checkpoint.hint.clone()).map_or(String::new(), |hint| format!(". {hint}"))
    }
}

pub(crate) fn take(checkpoint: &Checkpoint, naming: Naming<'_>, tied: Tied) -> Result<Inventory, ConvertError> {
    let Naming { family, names, spec, table_parts, .. } = naming;
    // Not the number in `num_nextn_predict_layers`: some published files have 0 there, although they have such a layer.
    let all = checkpoint.tensors.iter().map(|t| &t.name).chain(checkpoint.absent.iter().map(|a| &a.tensor));
    let mut ledger = Ledger {
        checkpoint,
        names,
        layers: family.named_layers(spec),
        predicting: all.filter_map(|name| names.prediction_layer_of(name)).collect(),
        used: vec![false; checkpoint.tensors.len()],
        missing: Vec::new(),
    };
    let mut notes = checkpoint.notes.clone();
    notes.extend(absent_files(&ledger, family)?);
    let stored_head = form::find(checkpoint, names.head);
    let untied = tied == Tied::Yes && holds_other_numbers(checkpoint, names)?;
    if untied {
        notes.push(format!(
            "`{TIE}` is true, but `{}` holds other numbers than the token embedding: it is the head, as for transformers 5 \
             (version 4 takes the embedding)",
            names.head
        ));
    }
    let head = match (tied, &stored_head) {
        (Tied::Yes, _) if !untied => names.embedding(),
        (_, Some(_)) => names.head.to_owned(),
        (_, None) => return Err(no_head(&ledger, tied)),
    };
    for name in [&names.embedding(), &head] {
        ledger.need(name);
    }
    for tensor in spec.tensors(ExtentKind::FinalNorm, usize::MAX) {
        let views = pick(checkpoint, family.final_origin(names, spec, &tensor));
        views.iter().for_each(|view| ledger.need(&view.tensor));
    }
    for place in places(spec) {
        for tensor in spec.tensors(place.kind, place.layer) {
            let views = pick(checkpoint, naming.origin(place, &tensor));
            views.iter().for_each(|view| ledger.need(&view.tensor));
        }
        if ledger.missing.len() >= MAX_MISSING {
            break;
        }
    }
    naming.own_parts().iter().for_each(|(_, tensor)| ledger.need(tensor));
    naming.prediction.iter().flat_map(|p| &p.copies).for_each(|tensor| ledger.need(tensor));
    ledger.need_tables(family, spec, table_parts);
    ledger.missing.dedup();
    if !ledger.missing.is_empty() {
        let shown: Vec<String> = ledger.missing.iter().map(|tensor| checkpoint.shown(tensor)).collect();
        return Err(checkpoint.lacks(shown.len(), first_few(&shown), ledger.hint(&ledger.missing)));
    }
    if let (Tied::Yes, false, Some(copy)) = (tied, untied, stored_head) {
        copy.tensors.into_iter().for_each(|tensor| ledger.used[tensor] = true);
        notes.push(format!("`{TIE}` is true: `{}` is ignored, the token embedding is the head", names.head));
    }
    notes.extend(used_unindexed(&ledger));
    let left_out = account_for_rest(&ledger, family, spec, &mut notes)?;
    Ok(Inventory { head, left_out, notes })
}

/// Whether embedding and head have the same form and different numbers: a separately trained head differs everywhere, so pieces are
/// enough.
fn holds_other_numbers(checkpoint: &Checkpoint, names: Names) -> Result<bool, ConvertError> {
    let (Some(embedding), Some(head)) = (checkpoint.find(&names.embedding()), checkpoint.find(names.head)) else {
        return Ok(false);
    };
    let [a, b] = [embedding, head].map(|tensor| &checkpoint.tensors[tensor]);
    if (&a.dtype, &a.shape) != (&b.dtype, &b.shape) {
        return Ok(false);
    }
    Ok(!pieces_agree(checkpoint, [embedding, head])?)
}

/// Whether two tensors hold the same numbers, judged by pieces; false for tensors in different forms.
pub(super) fn same_numbers(checkpoint: &Checkpoint, one: &str, other: &str) -> Result<bool, ConvertError> {
    let (Some(one), Some(other)) = (checkpoint.find(one), checkpoint.find(other)) else { return Ok(false) };
    let [a, b] = [one, other].map(|tensor| &checkpoint.tensors[tensor]);
    let alike = (&a.dtype, &a.shape, &a.order) == (&b.dtype, &b.shape, &b.order) && a.derived == b.derived;
    Ok(alike && pieces_agree(checkpoint, [one, other])?)
}

/// Whether pieces of two tensors of the same length are equal.
fn pieces_agree(checkpoint: &Checkpoint, tensors: [usize; 2]) -> Result<bool, ConvertError> {
    let a = &checkpoint.tensors[tensors[0]];
    let piece = a.len.min(COMPARED);
    let mut bytes = [vec![0; piece as usize], vec![0; piece as usize]];
    for part in 0..PIECES {
        let at = (a.len - piece) / (PIECES - 1) * part;
        for (tensor, out) in tensors.into_iter().zip(&mut bytes) {
            checkpoint.read(tensor, at, out, &mut Xxh3::new())?;
        }
        if bytes[0] != bytes[1] {
            return Ok(false);
        }
    }
    Ok(true)
}

fn no_head(ledger: &Ledger<'_>, tied: Tied) -> ConvertError {
    let head = ledger.names.head.to_owned();
    let said = if tied == Tied::No { "false" } else { "not given, which means false" };
    let hint = ledger.hint(std::slice::from_ref(&head));
    ConvertError::NoHead { path: ledger.checkpoint.dir.clone(), head, said, hint }
}

/// If the index names files that do not exist, the download is unfinished, unless everything in them would be left out. Returns a
/// note about those that are not needed.
fn absent_files(ledger: &Ledger<'_>, family: &dyn Family) -> Result<Vec<String>, ConvertError> {
    let mut files: BTreeMap<&str, Vec<&AbsentTensor>> = BTreeMap::new();
    for absent in ledger.checkpoint.absent.iter().filter(|a| a.file_is_absent) {
        files.entry(&absent.file).or_default().push(absent);
    }
    let needed = |tensors: &Vec<&AbsentTensor>| tensors.iter().any(|a| ledger.unused(family, &a.tensor).is_none());
    let needed: Vec<String> = files.iter().filter(|(_, t)| needed(t)).map(|(file, _)| (*file).to_owned()).collect();
    if !needed.is_empty() {
        return Err(ConvertError::Incomplete {
            path: ledger.checkpoint.dir.clone(),
            missing: files.len(),
            total: ledger.checkpoint.files().len() + files.len(),
            names: first_few(&needed),
            unfinished: format!("{}{}", unfinished(&ledger.checkpoint.dir), ledger.hint(&[])),
        });
    }
    let note = |(file, tensors): (&str, Vec<&AbsentTensor>)| {
        let reasons: BTreeSet<&str> =
            tensors.iter().filter_map(|a| ledger.unused(family, &a.tensor)).map(Unused::name).collect();
        let reasons = reasons.into_iter().collect::<Vec<_>>().join(", ");
        let count = tensors.len();
        format!("`{file}` is not there and not needed: its {count} tensors would be left out, by `{INDEX}` ({reasons})")
    };
    Ok(files.into_iter().map(note).collect())
}

/// A note about tensors that are used although the index does not name them, as in transformers.
fn used_unindexed(ledger: &Ledger<'_>) -> Option<String> {
    let tensors = ledger.checkpoint.tensors.iter().zip(&ledger.used);
    let names: Vec<String> = tensors.filter(|(t, used)| !t.indexed && **used).map(|(t, _)| t.name.clone()).collect();
    if names.is_empty() {
        return None;
    }
    let named = counted(&names);
    Some(format!("`{INDEX}` does not name {named}, which the files hold and the model needs: used all the same"))
}

/// Divides the unused tensors into those that may be left out and unknown ones.
fn account_for_rest(
    ledger: &Ledger<'_>,
    family: &dyn Family,
    spec: &ModelSpec,
    notes: &mut Vec<String>,
) -> Result<Vec<LeftOut>, ConvertError> {
    let checkpoint = ledger.checkpoint;
    let mut left_out: BTreeMap<Unused, LeftOut> = BTreeMap::new();
    let (mut unknown, mut surplus, mut unindexed) = (Vec::new(), Vec::new(), Vec::new());
    for (number, tensor) in checkpoint.tensors.iter().enumerate().filter(|(number, _)| !ledger.used[*number]) {
        let known = match ledger.unused(family, &tensor.name) {
            Some(reason) => Some(reason),
            None => match harmless::look(checkpoint, &ledger.used, number)? {
                Harmless::Yes(reason) => Some(reason),
                Harmless::Unknown => None,
            },
        };
        let reason = match known {
            Some(reason) => reason,
            // The author of the index did not count it as part of the model.
            None if !tensor.indexed => {
                unindexed.push(tensor.name.clone());
                Unused::Unindexed
            }
            None => {
                let behind = ledger.surplus_layer(&tensor.name).is_some();
                if behind { &mut surplus } else { &mut unknown }.push(tensor.name.clone());
                continue;
            }
        };
        let entry = left_out.entry(reason);
        let entry = entry.or_insert_with(|| LeftOut { reason: reason.name().to_owned(), tensors: 0, bytes: 0 });
        entry.tensors += 1;
        entry.bytes += tensor.len;
    }
    if !unindexed.is_empty() {
        notes.push(format!("left out, as neither `{INDEX}` nor the model knows it: {}", counted(&unindexed)));
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

//! Model files of one layer, in types that hold its weights as they are: what is executed while a model is measured.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sluice_format::{
    AttentionSpec, ExtentKind, ExtentRecord, FileLayout, FileWriter, FormatError, LayerSpec, Metadata, ModelSpec,
    NO_LAYER, NgramSpec, PlannedExtent, SPEC_BLOB, TensorRecord, TensorShape, WeightType, Written, pack_tensors,
};

use crate::contents::Contents;
use crate::encoding::Rows;
use crate::error::ConvertError;
use crate::own::{Own, make_room};
use crate::pack::Packer;
use crate::plan::Plan;

/// A file that is removed when it is no longer needed.
pub(crate) struct LayerFile {
    path: PathBuf,
}

impl Drop for LayerFile {
    fn drop(&mut self) {
        // It is a temporary file: what is left of it costs space, and the next run writes it again.
        drop(fs::remove_file(&self.path));
    }
}

/// The tensor that has a number for each token of the vocabulary.
const HEAD_BIAS: &str = "head_bias";

impl LayerFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the file of a layer to `path`. Runs on the current rayon pool.
    pub(crate) fn write<'a>(
        plan: &'a Plan,
        contents: &'a Contents<'a>,
        layer: usize,
        path: PathBuf,
    ) -> Result<LayerFile, ConvertError> {
        make_room(&path, Own::Model)?;
        let made = LayerFile { path };
        let reading = plan.reading.as_ref().expect("the plan knows that it is measured");
        let belongs = |kind, of: u32| reads(plan, layer, kind, of);
        let ngrams = plan.spec.ngrams_of(layer).map(|ngrams| NgramSpec { layer: 0, ..ngrams.clone() });
        let spec = ModelSpec {
            vocab_size: 1,
            // Nobody asks for logits: there is one row of embedding and head, and no bias for each token.
            head_bias: false,
            ngrams: ngrams.into_iter().collect(),
            layers: vec![alone(&plan.spec.layers[layer])],
            prediction: None,
            ..plan.spec.clone()
        };
        let here = |of: u32| if of == NO_LAYER { NO_LAYER } else { 0 };
        let numbers: Vec<usize> = (0..reading.planned.len())
            .filter(|&i| belongs(reading.planned[i].kind, reading.planned[i].layer))
            .collect();
        // Not read, but part of every model file.
        let stubs = [ExtentKind::FinalNorm, ExtentKind::Embedding, ExtentKind::Head].into_iter();
        let stubs = stubs.filter(|&kind| !belongs(kind, NO_LAYER)).map(|kind| stub(&spec, kind));
        let stubs: Vec<(PlannedExtent, Vec<TensorRecord>)> = stubs.collect::<Result<_, ConvertError>>()?;
        let behind_layers = reading.records.iter().filter(|r| r.kind == ExtentKind::FinalNorm && r.name != HEAD_BIAS);
        let behind_len = behind_layers.map(|r| r.offset + r.len).max();
        let moved = |&i: &usize| {
            let planned = reading.planned[i];
            let whole = if planned.kind == ExtentKind::FinalNorm { behind_len } else { None };
            let logical_len = whole.unwrap_or(planned.logical_len);
            PlannedExtent { layer: here(planned.layer), logical_len, ..planned }
        };
        let planned = stubs.iter().map(|stub| stub.0).chain(numbers.iter().map(moved));
        let planned: Vec<PlannedExtent> = planned.collect();
        let records = reading.records.iter().filter(|r| belongs(r.kind, r.layer) && r.name != HEAD_BIAS);
        let records = records.map(|r| TensorRecord { layer: here(r.layer), ..r.clone() });
        let records: Vec<TensorRecord> = stubs.iter().flat_map(|stub| stub.1.clone()).chain(records).collect();
        let layout = FileLayout::new(plan.options.page_size, &planned)?;
        let writer = FileWriter::open(&made.path, layout)?;
        let pack = |packer: &mut Packer<'a>, number: usize| -> Result<Written, ConvertError> {
            let mut extent = writer.extent(number);
            match number.checked_sub(stubs.len()) {
                None => extent.write(&vec![0; stubs[number].0.logical_len as usize])?,
                Some(i) => {
                    let PlannedExtent { layer, index, .. } = planned[number];
                    let tensors = &reading.extents[numbers[i]];
                    // The bias of the head is the last tensor of its extent.
                    let without_bias = tensors.split_last().filter(|(last, _)| last.name == HEAD_BIAS);
                    let tensors = without_bias.map_or(&tensors[..], |(_, others)| others);
                    packer.reading(tensors, (layer, index), &mut extent)?;
                }
            }
            Ok(extent.finish()?)
        };
        let all = (0..planned.len()).into_par_iter().map_init(|| Packer::new(plan, contents), pack);
        let written = all.collect::<Result<Vec<Written>, _>>()?;
        let mut metadata = Metadata::default();
        metadata.insert(SPEC_BLOB, spec.to_json());
        writer.finish(&written, &records, &metadata)?;
        Ok(made)
    }
}

/// A layer as it is without those before it. One that attends to what an indexer of theirs chooses attends to all: the windows of the
/// text are no longer than what such an indexer chooses in all published models, and so it chooses all.
fn alone(layer: &LayerSpec) -> LayerSpec {
    let mut layer = layer.clone();
    if let AttentionSpec::Mla(mla) = &mut layer.attention {
        mla.indexer = mla.indexer.take().filter(|indexer| !indexer.shared);
    }
    layer
}

/// An extent that is part of every model file, of zeros: of embedding and head one row.
fn stub(spec: &ModelSpec, kind: ExtentKind) -> Result<(PlannedExtent, Vec<TensorRecord>), ConvertError> {
    let part = spec.part_tensor(kind, 1, WeightType::F32);
    let tensors = part.map_or_else(|| spec.tensors(kind, usize::MAX), |part| vec![part]);
    let record = |tensor: TensorShape| TensorRecord {
        kind,
        weight_type: WeightType::F32,
        layout: tensor.layout,
        layer: NO_LAYER,
        index: 0,
        shape: tensor.shape.map(|n| n as u64),
        offset: 0,
        len: 0,
        name: tensor.name.to_owned(),
    };
    let mut records: Vec<TensorRecord> = tensors.into_iter().map(record).collect();
    let logical_len = pack_tensors(&mut records).map_err(FormatError::Layout)?;
    Ok((PlannedExtent { kind, layer: NO_LAYER, index: 0, logical_len }, records))
}

/// Whether the file of a layer has the extents of this kind and layer: its own, and what is behind the last one.
pub(crate) fn reads(plan: &Plan, layer: usize, kind: ExtentKind, of: u32) -> bool {
    of == layer as u32 || (kind == ExtentKind::FinalNorm && layer + 1 == plan.spec.layers.len())
}

/// The embeddings of tokens, `[tokens, hidden]`.
///
/// # Errors
/// [`ConvertError::Options`] for an unknown token, and those of reading.
pub(crate) fn embeddings(plan: &Plan, contents: &Contents<'_>, tokens: &[u32]) -> Result<Vec<f32>, ConvertError> {
    let is_part = |e: &ExtentRecord| e.kind == ExtentKind::Embedding && e.layer == NO_LAYER;
    let parts = plan.layout.extents().iter().zip(&plan.extents).filter(|(e, _)| is_part(e));
    let parts: Vec<_> = parts.map(|(_, tensors)| &tensors[0]).collect();
    let (height, hidden) = (parts.first().map_or(1, |p| p.shape[1]), plan.spec.hidden_size);
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&i| tokens[i]);
    let mut states = vec![0.0; tokens.len() * hidden];
    let mut packer = Packer::new(plan, contents);
    for of_part in order.chunk_by(|&a, &b| tokens[a] as usize / height == tokens[b] as usize / height) {
        let part = parts.get(tokens[of_part[0]] as usize / height).ok_or_else(|| {
            ConvertError::Options(format!("the tokenizer has a token {}, the model has none", tokens[of_part[0]]))
        })?;
        packer.rows(part, of_part.iter().map(|&i| tokens[i] as usize % height), |number, row| {
            states[of_part[number] * hidden..][..hidden].copy_from_slice(row);
        })?;
    }
    Ok(states)
}

/// The row of a tensor with this number.
pub(crate) fn one_row(first: usize, cols: usize) -> Rows {
    Rows { first, count: 1, cols }
}

//! Writes the file: extents on the threads of the current rayon pool, then tables and superblock.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde_json::json;
use sluice_checksum::Xxh3;
use sluice_format::sectors::{SectorId, Sectors};
use sluice_format::{
    ExtentKind, ExtentRecord, FileWriter, Layout as Arrangement, Metadata, PROVENANCE_BLOB, ROW_GROUP,
    SOURCE_CONFIG_BLOB, SPEC_BLOB, TensorRecord, WeightType, Written,
};

use super::geometry::Geometry;
use super::layout::{Layout, WeightTypes};
use super::random::Random;
use super::topics::Embeddings;
use super::values::{Filler, truncate_to_bf16};
use crate::Progress;
use crate::error::ConvertError;
use crate::own::{clear_all, folder_of, journal_path, partial_path};
use crate::partial::{check_space, claim, publish, refuse_existing, sync_note};
use crate::plan::{CONVERTER, KindSize, kind_sizes};
use crate::striping::Destination;

/// Bytes that are made before they are written.
const BATCH: usize = 1 << 20;
/// Standard deviation of what a layer's parts add to the residual stream, whose embedding has 1. So the stream changes from layer
/// to layer, but slowly, as in real models, where a router applied one layer early names most of the right experts.
const RESIDUAL: f32 = 0.25;

/// Key in the provenance of a file whose experts are missing.
pub(super) const NO_EXPERTS: &str = "no_experts";

/// Name of an expert's last matrix.
pub(super) const DOWN: &str = "down";

/// The checksum of missing experts. The checksum of zeros is different, whatever their number.
const MISSING_CHECKSUM: u64 = 0;

/// The caller's options.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthOptions {
    /// Types of the weights.
    pub types: WeightTypes,
    /// How much routing repeats itself: 0 not at all, 1 like a real model.
    pub skew: f32,
    /// Where the random numbers start.
    pub seed: u64,
    /// Holes instead of weights: a file of any size takes almost no space, and all its weights are zero.
    pub sparse: bool,
    /// Holes instead of experts, which are refused as damaged: for measurements on a simulated drive, which has its own.
    pub no_experts: bool,
    /// Page size of the file, one of [`sluice_format::PAGE_SIZES`].
    pub page_size: u32,
    /// Whether an existing destination is replaced, once the new file is complete.
    pub overwrite: bool,
}

impl SynthOptions {
    /// Weights of these types with the routing of a real model.
    pub fn new(types: WeightTypes) -> Self {
        let page_size = sluice_format::PAGE_SIZES[0];
        SynthOptions { types, skew: 1.0, seed: 0, sparse: false, no_experts: false, page_size, overwrite: false }
    }
}

/// A description of the written file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SynthSummary {
    /// The name or path of the geometry.
    pub geometry: String,
    /// Its `model_type`.
    pub family: String,
    /// Identity of the file: a hash of its content.
    pub model_id: String,
    /// Its length.
    pub file_bytes: u64,
    /// Bytes of that in holes.
    pub hole_bytes: u64,
    /// Extents and bytes by kind.
    pub sizes: Vec<KindSize>,
}

/// Writes a model file with random weights to `dst`. Its name is `dst.partial` until it is complete; remains of an earlier run are
/// removed.
///
/// # Errors
/// [`ConvertError::Options`] for a skew that is not a number from 0 to 100 or a type that cannot be made, [`ConvertError::Exists`],
/// [`ConvertError::NotReplaced`], [`ConvertError::Locked`], [`ConvertError::NoSpace`], [`ConvertError::Io`],
/// [`ConvertError::Format`]. `dst` is then unchanged.
pub fn synth(
    geometry: &Geometry,
    dst: &Path,
    options: &SynthOptions,
    progress: &dyn Progress,
) -> Result<SynthSummary, ConvertError> {
    if !(0.0..=100.0).contains(&options.skew) {
        return Err(ConvertError::Options(format!("the skew is {}: use a number from 0 to 100", options.skew)));
    }
    let layout = Layout::new(geometry.spec(), options.types, options.page_size)?;
    let metadata = metadata(geometry, options);
    let destination = Destination::new(dst, None);
    destination.check_folder()?;
    destination.refuse_name(1)?;
    let refuse = || {
        refuse_existing(dst, options.overwrite, None)?;
        destination.refuse_foreign(&[dst.to_owned()], &[])
    };
    refuse()?;
    let path = partial_path(dst, 0);
    let mut notes = Vec::new();
    let lock = claim(&path, &journal_path(dst), &mut notes)?;
    refuse()?;
    let file = lock.try_clone().map_err(ConvertError::io(&path, "open it"))?;
    let writer = FileWriter::of_files(vec![(path.clone(), file)], layout.file.clone())?;
    let syncer = writer.syncer().clone();
    notes.extend(sync_note(dst, &writer));
    lock.set_len(0).map_err(ConvertError::io(&path, "empty it"))?;
    let written = prepare(&path, &lock, &layout, options, &mut notes).and_then(|()| {
        notes.iter().for_each(|note| progress.note(note));
        progress.started(layout.extent_bytes(), 0);
        let checksums = if options.sparse {
            holes(&layout, progress)
        } else {
            Synthesis::new(geometry, &layout, options).run(&writer, progress)?
        };
        let written: Vec<_> = layout.extents().iter().zip(checksums).map(|(e, sum)| Written::raw(e, sum)).collect();
        let (id, _) = writer.finish(&written, &layout.records, &metadata)?;
        refuse()?;
        Ok(id)
    });
    // Nothing in it is worth keeping, because it can be made again at any time.
    let model_id = written.inspect_err(|_| drop(fs::remove_file(&path)))?;
    let file_bytes = lock.metadata().map_err(ConvertError::io(&path, "read its length"))?.len();
    publish(&lock, &path, dst)?;
    syncer.folder(folder_of(dst)).map_err(ConvertError::io(folder_of(dst), "sync the folder"))?;
    clear_all(dst, false)?;
    Ok(SynthSummary {
        geometry: geometry.name().to_owned(),
        family: geometry.spec().family.clone(),
        model_id: model_id.to_string(),
        file_bytes,
        hole_bytes: hole_bytes(&layout, options),
        sizes: kind_sizes(layout.extents()),
    })
}

/// Bytes of the extents that are not written.
fn hole_bytes(layout: &Layout, options: &SynthOptions) -> u64 {
    let experts = || layout.extents().iter().filter(|e| e.kind == ExtentKind::Expert);
    match options {
        SynthOptions { sparse: true, .. } => layout.extent_bytes(),
        SynthOptions { no_experts: true, .. } => experts().map(|e| e.stored_len).sum(),
        _ => 0,
    }
}

/// Sets the file's length, and unless it is sparse, allocates its space.
fn prepare(
    path: &Path,
    file: &File,
    layout: &Layout,
    options: &SynthOptions,
    notes: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let len = layout.file.ends().iter().sum();
    if !options.sparse {
        check_space(path, layout.file_bytes(BATCH) - hole_bytes(layout, options), notes)?;
    }
    file.set_len(len).map_err(ConvertError::io(path, "give it its length (does the filesystem allow it?)"))
}

fn metadata(geometry: &Geometry, options: &SynthOptions) -> Metadata {
    let provenance = json!({
        "converter": CONVERTER,
        "synthetic": true,
        "geometry": geometry.spec().family,
        "expert_type": options.types.experts.name(),
        "dense_type": options.types.dense.name(),
        // As given: 0.7, and not the nearest number of single precision with all its digits.
        "skew": options.skew.to_string().parse::<f64>().unwrap_or_default(),
        "seed": options.seed,
        "sparse": options.sparse,
        NO_EXPERTS: options.no_experts,
    });
    let mut metadata = Metadata::default();
    metadata.insert(SPEC_BLOB, geometry.spec().to_json());
    metadata.insert(PROVENANCE_BLOB, serde_json::to_vec_pretty(&provenance).expect("a JSON value serialises"));
    metadata.insert(SOURCE_CONFIG_BLOB, geometry.config().to_vec());
    metadata
}

/// Checksums of extents that contain only zeros: computed once per length.
fn holes(layout: &Layout, progress: &dyn Progress) -> Vec<u64> {
    let mut known: HashMap<u64, u64> = HashMap::new();
    let checksum = |e: &ExtentRecord| {
        progress.advanced(e.stored_len);
        *known.entry(e.stored_len).or_insert_with(|| checksum_of_zeros(e.stored_len))
    };
    layout.extents().iter().map(checksum).collect()
}

fn checksum_of_zeros(len: u64) -> u64 {
    let zeros = [0; 1 << 14];
    let mut hash = Xxh3::new();
    let mut left = len;
    while left > 0 {
        let step = left.min(zeros.len() as u64);
        hash.update(&zeros[..step as usize]);
        left -= step;
    }
    hash.digest()
}

struct Synthesis<'a> {
    layout: &'a Layout,
    seed: u64,
    embeddings: Embeddings,
    /// Rows of all parts of the embedding but the last.
    part_rows: usize,
    no_experts: bool,
}

impl<'a> Synthesis<'a> {
    fn new(geometry: &Geometry, layout: &'a Layout, options: &SynthOptions) -> Self {
        let spec = geometry.spec();
        let embeddings = Embeddings::new(options.seed, spec.vocab_size, spec.hidden_size, options.skew);
        let first = layout.records.iter().find(|r| r.kind == ExtentKind::Embedding);
        let part_rows = first.map_or(0, |r| r.shape[1] as usize);
        Synthesis { layout, seed: options.seed, embeddings, part_rows, no_experts: options.no_experts }
    }

    /// Writes all extents; returns their checksums.
    fn run(&self, writer: &FileWriter, progress: &dyn Progress) -> Result<Vec<u64>, ConvertError> {
        let checksums = Mutex::new(vec![0; self.layout.extents().len()]);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let results = rayon::broadcast(|_| {
            let mut batch = Vec::with_capacity(BATCH);
            while !failed.load(Ordering::Relaxed) {
                let extent = next.fetch_add(1, Ordering::Relaxed);
                if extent >= self.layout.extents().len() {
                    break;
                }
                let checksum = self.extent(extent, writer, &mut batch, progress).inspect_err(|_| {
                    failed.store(true, Ordering::Relaxed);
                })?;
                checksums.lock().unwrap_or_else(PoisonError::into_inner)[extent] = checksum;
            }
            Ok(())
        });
        results.into_iter().collect::<Result<(), ConvertError>>()?;
        Ok(checksums.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn extent(
        &self,
        number: usize,
        writer: &FileWriter,
        batch: &mut Vec<u8>,
        progress: &dyn Progress,
    ) -> Result<u64, ConvertError> {
        let record = &self.layout.extents()[number];
        if self.no_experts && record.kind == ExtentKind::Expert {
            progress.advanced(record.stored_len);
            return Ok(MISSING_CHECKSUM);
        }
        let mut random = Random::new(self.seed, [record.kind as u32, record.layer, record.index]);
        let mut out = writer.extent(number);
        let tensors = &self.layout.records[self.layout.tensors[number].clone()];
        for tensor in tensors {
            let gap = tensor.offset - out.position();
            out.write(&vec![0; gap as usize])?;
            let mut write = |batch: &mut Vec<u8>| {
                out.write(batch)?;
                progress.advanced(batch.len() as u64);
                batch.clear();
                Ok(())
            };
            batch.clear();
            match (record.kind, tensor.layout) {
                (ExtentKind::Embedding, _) => self.embedding(record.index, tensor, batch, &mut write)?,
                (_, Arrangement::Sectors) => table(tensor, &mut random, batch, &mut write)?,
                (_, Arrangement::Plain) => vector(tensor, tensors, &mut random, batch),
                _ => matrix(tensor, usual_deviation(tensor), &mut random, batch, &mut write)?,
            }
            write(batch)?;
        }
        let written = out.position();
        let checksum = out.finish()?.checksum;
        progress.advanced(record.stored_len - written);
        Ok(checksum)
    }

    fn embedding(
        &self,
        part: u32,
        tensor: &TensorRecord,
        batch: &mut Vec<u8>,
        write: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let [_, rows, cols] = tensor.shape.map(|d| d as usize);
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            self.embeddings.row(part as usize * self.part_rows + r, &mut row);
            match tensor.weight_type {
                WeightType::F32 => batch.extend(row.iter().flat_map(|v| v.to_le_bytes())),
                _ => batch.extend(row.iter().flat_map(|&v| truncate_to_bf16(v).to_le_bytes())),
            }
            if batch.len() >= BATCH {
                write(batch)?;
            }
        }
        Ok(())
    }
}

/// Norms are 1, and taps of convolutions random; tables assign the experts to the tokens in turn; all other vectors are biases or
/// the like, and 0. `extent`: all tensors of the extent.
pub(super) fn vector(tensor: &TensorRecord, extent: &[TensorRecord], random: &mut Random, batch: &mut Vec<u8>) {
    if tensor.name == "token_experts" {
        let experts = extent.iter().find(|t| t.name == "router").map_or(1, |router| router.shape[1].max(1));
        // A token's experts are consecutive, so none occurs twice.
        return (0..tensor.shape[2]).for_each(|i| batch.extend(((i % experts) as f32).to_le_bytes()));
    }
    let value: f32 = if tensor.name.ends_with("norm") { 1.0 } else { 0.0 };
    (0..tensor.shape[2]).for_each(|_| batch.extend(value.to_le_bytes()));
    if matches!(tensor.name.as_str(), "conv" | "ngram_conv") {
        for four in batch.chunks_mut(16) {
            four.as_chunks_mut::<4>().0.iter_mut().zip(random.uniform()).for_each(|(slot, v)| *slot = v.to_le_bytes());
        }
    }
}

/// A part of a table: rows of unit variance, in sectors.
fn table(
    tensor: &TensorRecord,
    random: &mut Random,
    batch: &mut Vec<u8>,
    write: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let [_, rows, cols] = tensor.shape.map(|d| d as usize);
    let element = tensor.weight_type.plain_element_len().expect("the layout computed the tensor's length from it");
    let sectors = Sectors::of_rows(element * cols).expect("the layout computed the tensor's length from it");
    let mut numbers = Vec::with_capacity(sectors.rows * sectors.row_len);
    for (sector, first) in (0..rows).step_by(sectors.rows).enumerate() {
        numbers.clear();
        let len = sectors.rows.min(rows - first) * cols;
        while numbers.len() < len * element {
            for v in random.uniform() {
                // The variance of a uniform number from −1 to 1 is a third.
                let v = v * 3f32.sqrt();
                match tensor.weight_type {
                    WeightType::F32 => numbers.extend(v.to_le_bytes()),
                    WeightType::F16 => numbers.extend(sluice_kernels::f32_to_f16(v).to_le_bytes()),
                    _ => numbers.extend(truncate_to_bf16(v).to_le_bytes()),
                }
            }
        }
        numbers.truncate(len * element);
        let id = SectorId { layer: tensor.layer, part: tensor.index, sector: sector as u32 };
        let start = batch.len();
        batch.resize(start + sectors.len, 0);
        sectors.seal(id, &numbers, &mut batch[start..]);
        if batch.len() >= BATCH {
            write(batch)?;
        }
    }
    Ok(())
}

/// A matrix, a pair, or a batch: row groups one after the other. Weights have this standard deviation.
pub(super) fn matrix(
    tensor: &TensorRecord,
    deviation: f32,
    random: &mut Random,
    batch: &mut Vec<u8>,
    write: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let [count, rows, cols] = tensor.shape.map(|d| d as usize);
    let twins = if tensor.layout == Arrangement::TiledPair { 2 } else { 1 };
    let group_len = tensor.weight_type.row_group_len(cols).expect("the layout computed the tensor's length from it");
    let filler = Filler::new(tensor.weight_type, cols, deviation);
    for _ in 0..count {
        for first in (0..rows).step_by(ROW_GROUP) {
            for _ in 0..twins {
                let start = batch.len();
                batch.resize(start + group_len, 0);
                filler.row_group(random, (rows - first).min(ROW_GROUP), &mut batch[start..]);
                if batch.len() >= BATCH {
                    write(batch)?;
                }
            }
        }
    }
    Ok(())
}

/// A product with a vector of unit variance has unit variance, except for what is added to the residual stream.
pub(super) fn usual_deviation(tensor: &TensorRecord) -> f32 {
    let [_, rows, cols] = tensor.shape;
    match tensor.name.as_str() {
        // It is stored transposed: the key is the product with the rows.
        "k_b" => (rows as f32).sqrt().recip(),
        "o" | DOWN => RESIDUAL / (cols as f32).sqrt(),
        _ => (cols as f32).sqrt().recip(),
    }
}

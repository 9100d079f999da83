//! A model file in memory, whose matrices can be replaced, and the inputs of its matrices.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use sluice_calibrate::TEXT;
use sluice_format::{
    ExtentKind, FileLayout, FileWriter, Layout, ModelFile, PlannedExtent, TensorRecord, WeightType, Written,
    pack_tensors,
};
use sluice_kernels::{
    Activations, Feedback, FeedbackScratch, Kernels, Matrix, Moments, Precision, ROW_GROUP, ThreadPool, pack_row_group,
    row_group_len, unpack,
};
use sluice_model::compute::InputObserver;
use sluice_model::weights::MatrixPlace;
use sluice_model::{Control, Engine, EngineOptions, Span, Want};

/// Tokens of a window, which attend to each other.
pub const WINDOW: usize = 256;

/// Columns that can compensate for each other's errors, as in a conversion by default.
const PANEL: usize = 2048;

/// Rows that are rounded together.
const ROWS: usize = 8 * ROW_GROUP;

/// Number of a tensor in the model's table.
pub type Number = usize;

/// An f32 model file, without its routed experts.
pub struct Model {
    pub file: ModelFile,
    /// The bytes of each tensor; empty for those of experts.
    bytes: Vec<Vec<u8>>,
}

/// A matrix in some type.
#[derive(Clone)]
pub struct Packed {
    pub ty: WeightType,
    pub bytes: Vec<u8>,
}

impl Model {
    pub fn open(path: &Path) -> Result<Self, Box<dyn Error>> {
        let file = ModelFile::open(path)?;
        let (mut bytes, mut extent) = (Vec::new(), Vec::new());
        for tensor in file.tensors() {
            let Some(record) = file.extent(tensor.kind, tensor.layer, tensor.index) else {
                bytes.push(Vec::new());
                continue;
            };
            file.read_extent(record, &mut extent)?;
            bytes.push(extent[tensor.offset as usize..][..tensor.len as usize].to_vec());
        }
        Ok(Model { file, bytes })
    }

    pub fn tensor(&self, number: Number) -> &TensorRecord {
        &self.file.tensors()[number]
    }

    /// All matrices that a conversion quantises and every token meets, except those in batches.
    pub fn matrices(&self) -> Vec<Number> {
        let others = [ExtentKind::Embedding, ExtentKind::Router, ExtentKind::Expert];
        let quantisable = |t: &TensorRecord| !others.contains(&t.kind) && t.layout != Layout::Plain && t.shape[0] == 1;
        (0..self.bytes.len()).filter(|&i| quantisable(self.tensor(i))).collect()
    }

    /// Rows, including both matrices of a pair and padding, and columns.
    pub fn shape(&self, number: Number) -> (usize, usize) {
        let TensorRecord { shape: [_, rows, cols], layout, .. } = self.tensor(number);
        let rows = *rows as usize;
        (if layout.is_pair() { 2 * rows.next_multiple_of(ROW_GROUP) } else { rows }, *cols as usize)
    }

    /// The weights, `[rows, cols]`.
    pub fn weights(&self, number: Number) -> Vec<f32> {
        self.unpacked(number, WeightType::F32, &self.bytes[number])
    }

    /// The numbers that the packed weights represent, `[rows, cols]`.
    pub fn unpacked(&self, number: Number, ty: WeightType, bytes: &[u8]) -> Vec<f32> {
        let (rows, cols) = self.shape(number);
        unpack(Matrix::new(ty, rows, cols, bytes).expect("the bytes of the tensor"))
    }

    /// Writes a model file in which `replaced` replaces its tensors; only for a model without experts.
    pub fn write(&self, path: &Path, replaced: &BTreeMap<Number, &Packed>) -> Result<(), Box<dyn Error>> {
        if self.bytes.iter().any(Vec::is_empty) {
            return Err("models with experts can only be looked at matrix by matrix".into());
        }
        let mut tensors = self.file.tensors().to_vec();
        replaced.iter().for_each(|(&number, packed)| tensors[number].weight_type = packed.ty);
        let (mut planned, mut contents, mut first) = (Vec::new(), Vec::new(), 0);
        let extents = tensors.chunk_by(|a, b| (a.kind, a.layer, a.index) == (b.kind, b.layer, b.index));
        let lengths: Vec<usize> = extents.map(<[_]>::len).collect();
        for len in lengths {
            let of_extent = &mut tensors[first..first + len];
            let logical_len = pack_tensors(of_extent)?;
            let TensorRecord { kind, layer, index, .. } = of_extent[0];
            planned.push(PlannedExtent { kind, layer, index, logical_len });
            let mut bytes = vec![0; logical_len as usize];
            for (i, tensor) in of_extent.iter().enumerate() {
                let from = replaced.get(&(first + i)).map_or(&self.bytes[first + i], |packed| &packed.bytes);
                bytes[tensor.offset as usize..][..from.len()].copy_from_slice(from);
            }
            contents.push(bytes);
            first += len;
        }
        let writer = FileWriter::open(path, FileLayout::new(self.file.superblock().page_size, &planned)?)?;
        let mut written: Vec<Written> = Vec::with_capacity(contents.len());
        for (i, bytes) in contents.iter().enumerate() {
            let mut extent = writer.extent(i);
            extent.write(bytes)?;
            written.push(extent.finish()?);
        }
        writer.finish(&written, &tensors, self.file.metadata())?;
        Ok(())
    }
}

/// The weights in `q8`.
pub fn pack_q8(weights: &[f32], cols: usize) -> Packed {
    let group = |rows: &[f32]| {
        let mut bytes = vec![0; row_group_len(WeightType::Q8, cols).expect("it is in memory")];
        pack_row_group(WeightType::Q8, rows, rows.len() / cols, cols, &mut bytes);
        bytes
    };
    let groups: Vec<Vec<u8>> = weights.par_chunks(ROW_GROUP * cols).map(group).collect();
    Packed { ty: WeightType::Q8, bytes: groups.concat() }
}

/// The weights in `q4`, `q3` or `q2`, by error feedback.
pub fn pack_by(feedback: &Feedback, ty: WeightType, weights: &[f32], cols: usize) -> Packed {
    let some = |scratch: &mut FeedbackScratch, rows: &[f32]| {
        let (found, count) = (feedback.quantise(ty, rows, scratch), rows.len() / cols);
        let group = row_group_len(ty, cols).expect("it is in memory");
        let mut bytes = vec![0; count.div_ceil(ROW_GROUP) * group];
        for (i, out) in bytes.chunks_mut(group).enumerate() {
            found.pack_row_group(i * ROW_GROUP, (count - i * ROW_GROUP).min(ROW_GROUP), out);
        }
        bytes
    };
    let pieces: Vec<Vec<u8>> = weights.par_chunks(ROWS * cols).map_init(FeedbackScratch::default, some).collect();
    Packed { ty, bytes: pieces.concat() }
}

/// Error feedback for these inputs, `[tokens, cols]`.
pub fn feedback(kernels: Kernels, pool: &ThreadPool, inputs: &[f32], cols: usize) -> Option<Feedback> {
    let mut x = Activations::new(Precision::Exact);
    x.set(inputs, inputs.len() / cols, cols);
    let mut moments = Moments::new(cols, PANEL);
    moments.add(&kernels, pool, &x);
    Feedback::new(kernels, &moments)
}

/// The built-in text as the model reads it: every fourth window, from number `first` on.
pub fn built_in(path: &Path, first: usize) -> Result<Vec<u32>, Box<dyn Error>> {
    let ids = crate::score::tokens(path, TEXT)?;
    Ok(ids.chunks_exact(WINDOW).skip(first).step_by(4).flatten().copied().collect())
}

/// The inputs of a matrix, by the layer and name of the tensor.
pub type Inputs = BTreeMap<(u32, &'static str), Arc<Vec<f32>>>;

/// Keeps the inputs of the matrices of some layers.
struct Recorder<F> {
    wanted: F,
    seen: Mutex<BTreeMap<(u32, &'static str), Vec<f32>>>,
}

impl<F: Fn(u32) -> bool + Send + Sync> InputObserver for Recorder<F> {
    fn inputs(&self, place: MatrixPlace, _: u32, x: &Activations) {
        // An expert's matrices have the same names as others.
        if place.kind != ExtentKind::Expert && (self.wanted)(place.layer) {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = seen.entry((place.layer, place.name)).or_default();
            (0..x.n()).for_each(|t| rows.extend_from_slice(x.row(t)));
        }
    }
}

/// Runs tokens through the model in `path`, in windows, and keeps the inputs of the matrices in the wanted layers.
pub fn record(
    path: &Path,
    ids: &[u32],
    wanted: impl Fn(u32) -> bool + Send + Sync + 'static,
) -> Result<Inputs, Box<dyn Error>> {
    let options =
        EngineOptions { no_calibration: true, forget: true, context: Some(WINDOW), ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options)?;
    let recorder = Arc::new(Recorder { wanted, seen: Mutex::default() });
    let mut sequence = engine.new_sequence();
    for ids in ids.chunks(WINDOW) {
        sequence.clear();
        let mut control = Control { inputs: Some(recorder.clone()), ..Control::default() };
        engine.step(&mut [Span::prompt(&mut sequence, ids, Want::All)], &mut control, &mut |_, _, _| ())?;
    }
    let seen = std::mem::take(&mut *recorder.seen.lock().unwrap_or_else(PoisonError::into_inner));
    let mut inputs = Inputs::new();
    for (place, rows) in seen {
        // Queries, keys and values have the same inputs.
        let same = inputs.iter().find(|(key, other)| key.0 == place.0 && ***other == rows).map(|found| found.1.clone());
        inputs.insert(place, same.unwrap_or_else(|| Arc::new(rows)));
    }
    Ok(inputs)
}

//! From the names that a family gives to tensors of the checkpoint whose shape and format have been checked.

use crate::error::ConvertError;
use crate::family::View;
use crate::source::{Checkpoint, Dtype, FLOATS, WIDE_FLOATS};

/// Rows and columns of the source that share one fp8 scale.
pub(crate) const SCALE_BLOCK: usize = 128;

/// How the source stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    F32,
    F16,
    Bf16,
    /// e4m3 codes; the number of the tensor that holds one scale per 128×128 block.
    Fp8 {
        scales: usize,
    },
}

/// A [`View`] of a tensor that exists. All arithmetic on rows and columns stays inside the tensor's checked shape.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Number of the tensor.
    pub(crate) tensor: usize,
    pub(crate) storage: Storage,
    /// Columns of the tensor.
    pub(crate) cols: usize,
    pub(crate) first_row: usize,
    pub(crate) batch_stride: usize,
    pub(crate) transposed: bool,
}

impl Source {
    /// First source row of matrix `batch`.
    pub(crate) fn base_row(&self, batch: usize) -> usize {
        self.first_row + batch * self.batch_stride
    }

    /// Source row and column of element (`row`, `col`) of matrix `batch`.
    pub(crate) fn locate(&self, batch: usize, row: usize, col: usize) -> (usize, usize) {
        let base = self.base_row(batch);
        if self.transposed { (base + col, row) } else { (base + row, col) }
    }
}

/// The name of the tensor that holds the scales of an fp8 tensor.
pub(crate) fn scale_name(tensor: &str) -> String {
    format!("{tensor}_scale_inv")
}

/// Finds the tensor of a view and checks it. `plain`: it is a vector, which no checkpoint quantises.
/// The caller has checked that all names exist.
pub(crate) fn resolve(checkpoint: &Checkpoint, view: &View, plain: bool) -> Result<Source, ConvertError> {
    let tensor = find(checkpoint, &view.tensor)?;
    check_shape(checkpoint, tensor, &view.source_shape)?;
    let cols = *view.source_shape.last().expect("a view has columns");
    let rows = view.source_shape.iter().rev().skip(1).product();
    let dtype_error = |supported| dtype_error(checkpoint, tensor, supported);
    let storage = match &checkpoint.tensors[tensor].dtype {
        Dtype::F32 => Storage::F32,
        Dtype::F16 => Storage::F16,
        Dtype::Bf16 => Storage::Bf16,
        Dtype::F8E4M3 if !plain => Storage::Fp8 { scales: find_scales(checkpoint, &view.tensor, rows, cols)? },
        _ => return Err(dtype_error(if plain { WIDE_FLOATS } else { FLOATS })),
    };
    Ok(Source {
        tensor,
        storage,
        cols,
        first_row: view.first_row,
        batch_stride: view.batch_stride,
        transposed: view.transposed,
    })
}

fn find(checkpoint: &Checkpoint, name: &str) -> Result<usize, ConvertError> {
    checkpoint.find(name).ok_or_else(|| ConvertError::MissingTensors {
        path: checkpoint.dir.clone(),
        count: 1,
        names: format!("`{name}`"),
    })
}

fn find_scales(checkpoint: &Checkpoint, name: &str, rows: usize, cols: usize) -> Result<usize, ConvertError> {
    let scales = find(checkpoint, &scale_name(name))?;
    check_shape(checkpoint, scales, &[rows.div_ceil(SCALE_BLOCK), cols.div_ceil(SCALE_BLOCK)])?;
    match checkpoint.tensors[scales].dtype {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => Ok(scales),
        _ => Err(dtype_error(checkpoint, scales, WIDE_FLOATS)),
    }
}

fn check_shape(checkpoint: &Checkpoint, tensor: usize, expected: &[usize]) -> Result<(), ConvertError> {
    let t = &checkpoint.tensors[tensor];
    if t.shape == expected {
        return Ok(());
    }
    Err(ConvertError::Shape {
        path: checkpoint.path_of(tensor).to_owned(),
        tensor: t.name.clone(),
        found: t.shape.clone(),
        expected: expected.to_vec(),
    })
}

fn dtype_error(checkpoint: &Checkpoint, tensor: usize, supported: &'static str) -> ConvertError {
    let t = &checkpoint.tensors[tensor];
    ConvertError::Dtype {
        path: checkpoint.path_of(tensor).to_owned(),
        tensor: t.name.clone(),
        dtype: t.dtype.name().to_owned(),
        supported,
    }
}

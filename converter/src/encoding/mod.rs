//! The number formats of published checkpoints: one file per encoding.
//!
//! | module | content |
//! |---|---|
//! | `plain` | f32, f16 and bf16 |
//! | `fp8` | e4m3 codes with scales by block, row or tensor, MXFP8 |
//! | `integers` | the integers of compressed-tensors |
//! | `float4` | e2m1 codes: MXFP4 of gpt-oss, DeepSeek-V4 and compressed-tensors, NVFP4 of modelopt and compressed-tensors |
//! | `mlx` | MLX's affine codes, and its floats of four and eight bits |
//! | `hqq` | HQQ, whose bytes hold codes of distant rows |
//! | `columnar` | AWQ and GPTQ, whose matrices are transposed |
//! | `ggml` | the blocks of GGUF files |
//! | `grouped` | codes by row with scales by group of columns: the common part of `integers`, `float4` and `mlx` |
//! | `carry` | the weight types that hold such codes and scales, and how rows are carried into them |
//! | `numbers` | integers, such as the expert ids in a table |
//! | `reader`, `lines`, `checks` | bytes of rows; which rows; checks of the shapes of tensors |
//!
//! Planning a conversion finds an [`Encoding`] ([`resolve`]); its [`Decoder`] returns values, or carries codes into the weight type
//! that holds the same bits.

mod carry;
mod checks;
mod columnar;
mod float4;
mod fp8;
pub(crate) mod ggml;
mod grouped;
mod hqq;
mod integers;
mod lines;
mod mlx;
mod numbers;
mod plain;
mod reader;

use std::fmt;
use std::sync::Arc;

use sluice_format::WeightType;

pub(crate) use columnar::Columnar;
pub(crate) use reader::Reader;

use crate::error::ConvertError;
use crate::family::Strides;
use crate::plan::form::{Form, Parts};
use crate::plan::scheme::Scheme;
use crate::source::{Checkpoint, Dtype, FLOATS, WIDE_FLOATS};
use checks::{check_shape, dtype_error};

/// How a tensor's numbers are stored. All tensors that it mentions exist and have the right shapes.
///
/// Its `Debug` form is part of what a journal is bound to: it names everything that decides what the bytes mean.
pub(crate) trait Encoding: fmt::Debug + Send + Sync {
    /// Indices of the tensors that are read in addition to that of the selection.
    fn others(&self) -> Vec<usize>;

    /// The type that holds codes and scales bit for bit; `None`: there is none, and f32 holds the values.
    fn carried(&self) -> Option<WeightType>;

    /// The order of the carried columns, if it is not the tensor's.
    fn order(&self) -> Option<ColumnOrder> {
        None
    }

    /// For a note: why there is no such type, if the form usually has one.
    fn obstacle(&self) -> Option<&'static str> {
        None
    }

    /// Whether that type can hold these elements of the tensor: its groups may not be divided, which they are not in whole rows. `shape` is
    /// batch, rows and columns.
    fn fits(&self, selection: &Selection, shape: [usize; 3]) -> bool {
        selection.whole_rows(shape[2])
    }

    /// Reads what belongs to the whole tensor, such as scales by block.
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`] and [`ConvertError::Damaged`], and errors of reading.
    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError>;
}

/// Returns the rows of a selection.
pub(crate) trait Decoder {
    /// Elements of `rows`, row-major, as f32. The caller checks whether they are finite.
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError>;

    /// Packs `rows` into row groups of the type that carries them. Called only if it [`fits`](Encoding::fits).
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`] if a value would be infinite or NaN, and errors of reading.
    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, groups: Groups<'_>) -> Result<(), ConvertError>;

    /// For each column that [`Decoder::carry`] packs, the index of the tensor's column, if the order differs.
    fn order(&self) -> Option<&[u16]> {
        None
    }

    /// Appends `rows` unchanged, row-major: for types whose elements are independent, as in the embedding.
    fn carry_plain(&self, _rows: Rows, _reader: &mut Reader<'_>, _out: &mut Vec<u8>) -> Result<(), ConvertError> {
        unreachable!("the plan stores only numbers that stand alone row by row")
    }

    /// Reads what [`Decoder::carry`] (if `carried`) or [`Decoder::values`] would read for these rows, in the same order, only for
    /// the digest.
    fn skim(&self, rows: Rows, carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError>;
}

/// Identifies an order of columns: the xxh3-128 of the data that determines it. There are too many orders to keep them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ColumnOrder(pub(crate) u128);

/// A range of rows of a tensor; rows are numbered across a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Columns of the matrix.
    pub(crate) cols: usize,
}

/// Where the row groups of one source go in a packed block: every `step`-th place from `first` on.
pub(crate) struct Groups<'p> {
    pub(crate) packed: &'p mut [u8],
    pub(crate) group_len: usize,
    pub(crate) first: usize,
    pub(crate) step: usize,
}

impl Groups<'_> {
    /// The bytes of a row group.
    pub(crate) fn slot(&mut self, group: usize) -> &mut [u8] {
        &mut self.packed[(group * self.step + self.first) * self.group_len..][..self.group_len]
    }
}

/// Elements of a tensor that form rows of a matrix: a [`View`](crate::family::View) of a tensor that exists. All arithmetic on rows
/// and columns stays inside the tensor's checked shape.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// Index of the tensor that holds the codes or numbers.
    pub(crate) tensor: usize,
    pub(crate) encoding: Arc<dyn Encoding>,
    /// Columns of the tensor.
    pub(crate) cols: usize,
    pub(crate) strides: Strides,
    pub(crate) plus_one: bool,
}

impl Selection {
    /// Source row and column of an element; rows are numbered across a batch.
    pub(crate) fn locate(&self, row: usize, col: usize) -> (usize, usize) {
        let element = self.strides.at(row, col);
        (element / self.cols, element % self.cols)
    }

    /// Whether every row is a whole row of the source.
    pub(crate) fn whole_rows(&self, cols: usize) -> bool {
        let s = &self.strides;
        s.col_step == 1 && cols == self.cols && [s.start, s.run_step, s.row_step].iter().all(|n| n.is_multiple_of(cols))
    }

    /// Whether columns are contiguous.
    pub(crate) fn is_transposed(&self) -> bool {
        self.strides.col_step != 1
    }

    /// The type that carries these elements bit for bit; `shape` is batch, rows and columns.
    pub(crate) fn carrier(&self, shape: [usize; 3]) -> Option<WeightType> {
        self.encoding.carried().filter(|_| !self.plus_one && self.encoding.fits(self, shape))
    }

    /// The order of the carried columns, if it is not the tensor's.
    pub(crate) fn order(&self) -> Option<ColumnOrder> {
        self.encoding.order()
    }

    /// Opens the decoder.
    pub(crate) fn open(&self, reader: &mut Reader<'_>) -> Result<Box<dyn Decoder + '_>, ConvertError> {
        self.encoding.open(self, reader)
    }

    /// Indices of all tensors that are read.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = usize> {
        std::iter::once(self.tensor).chain(self.encoding.others())
    }
}

/// The encoding of a table of integers with the tensors `parts` and the expected `shape`. The integers must be less than `below`,
/// and all different in each row.
pub(crate) fn resolve_numbers(
    checkpoint: &Checkpoint,
    shape: &[usize],
    parts: &Parts,
    below: usize,
) -> Result<Arc<dyn Encoding>, ConvertError> {
    let tensor = parts.tensors[0];
    let encoding = numbers::of(&checkpoint.tensors[tensor].dtype, below);
    let encoding = encoding.ok_or_else(|| dtype_error(checkpoint, tensor, numbers::SUPPORTED))?;
    check_shape(checkpoint, tensor, shape)?;
    Ok(Arc::new(encoding))
}

/// The encoding of the tensor with these `parts` and the expected `shape`. `plain`: it is a vector, which no checkpoint quantises.
pub(crate) fn resolve(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    shape: &[usize],
    parts: &Parts,
    plain: bool,
) -> Result<Arc<dyn Encoding>, ConvertError> {
    let tensor = parts.tensors[0];
    let dtype = &checkpoint.tensors[tensor].dtype;
    if plain && plain::of(dtype).is_none() {
        return Err(dtype_error(checkpoint, tensor, WIDE_FLOATS));
    }
    Ok(match parts.form {
        Form::Single => {
            let Some(encoding) = plain::of(dtype) else {
                return Err(dtype_error(checkpoint, tensor, if plain { WIDE_FLOATS } else { FLOATS }));
            };
            check_shape(checkpoint, tensor, shape)?;
            Arc::new(encoding)
        }
        Form::Ggml => {
            check_shape(checkpoint, tensor, shape)?;
            let Dtype::Ggml(ty) = *dtype else { return Err(dtype_error(checkpoint, tensor, FLOATS)) };
            Arc::new(ggml::resolve(checkpoint, shape, parts, ty)?)
        }
        Form::Fp8 => {
            check_shape(checkpoint, tensor, shape)?;
            fp8::resolve(checkpoint, scheme.fp8_block, shape, parts.tensors[1])?
        }
        Form::PackedInt | Form::Int8 => Arc::new(integers::resolve(checkpoint, shape, parts)?),
        Form::PackedMxfp4 | Form::Blocks | Form::Pairs | Form::PackedNvfp4 | Form::Nvfp4 => {
            Arc::new(float4::resolve(checkpoint, shape, parts)?)
        }
        Form::Mlx => Arc::new(mlx::resolve(checkpoint, shape, parts)?),
        Form::Hqq => Arc::new(hqq::resolve(checkpoint, shape, parts)?),
        Form::Columnar => Arc::new(columnar::resolve(checkpoint, scheme, shape, parts)?),
    })
}

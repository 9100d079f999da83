//! From the names that a family gives to tensors of the checkpoint whose shape and format have been checked.

use super::form::{self, Form, Parts};
use super::scheme::{Columnar, Scheme};
use crate::error::ConvertError;
use crate::family::{Strides, View};
use crate::source::{Checkpoint, Dtype, FLOATS, WIDE_FLOATS};

/// Rows and columns of the source that share one fp8 scale, and of the file's fp8 type.
pub(crate) const SCALE_BLOCK: usize = 128;

/// How the source stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    F32,
    F16,
    Bf16,
    /// e4m3 codes.
    Fp8(Fp8Scales),
    /// Codes of a few bits, row by row, with a scale per row and group of columns.
    Grouped(Grouped),
    /// AWQ and GPTQ: the tensor is transposed.
    Columnar(ColumnarTensors),
}

/// Where the scales of an fp8 tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fp8Scales {
    pub(crate) tensor: usize,
    /// Rows of one matrix of a stack; scales begin anew with each.
    pub(crate) matrix_rows: usize,
    /// Rows and columns that share one scale.
    pub(crate) block: [usize; 2],
    /// Scales of one matrix: rows and columns of them.
    pub(crate) grid: [usize; 2],
}

impl Fp8Scales {
    /// Number of the scale of an element.
    pub(crate) fn index(&self, (row, col): (usize, usize)) -> usize {
        let (matrix, row) = (row / self.matrix_rows, row % self.matrix_rows);
        (matrix * self.grid[0] + row / self.block[0]) * self.grid[1] + col / self.block[1]
    }
}

/// `value = code · scale · global + bias`, with scale and bias per row and `group` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grouped {
    pub(crate) code: Code,
    pub(crate) group: usize,
    pub(crate) scales: usize,
    pub(crate) scale_type: ScaleType,
    pub(crate) biases: Option<usize>,
    pub(crate) global: Option<Global>,
}

/// What a code of a few bits means. Codes fill bytes from the low bits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// Four bits, eight more than the value.
    Offset4,
    /// Eight bits, 128 more than the value.
    Offset8,
    /// Eight bits, two's complement.
    Signed8,
    /// Four bits: the float e2m1.
    E2m1,
    /// Eight bits: the float e4m3.
    E4m3,
    /// An integer from 0 on.
    Unsigned { bits: usize },
}

impl Code {
    pub(crate) fn bits(self) -> usize {
        match self {
            Code::Offset4 | Code::E2m1 => 4,
            Code::E4m3 | Code::Offset8 | Code::Signed8 => 8,
            Code::Unsigned { bits } => bits,
        }
    }
}

/// Format of scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleType {
    F32,
    F16,
    Bf16,
    E4m3,
    /// A power of two.
    E8m0,
}

/// One number for a whole matrix, or one per matrix of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Global {
    pub(crate) tensor: usize,
    /// Whether scales are divided by it instead of multiplied.
    pub(crate) divides: bool,
}

/// The tensors of an AWQ or GPTQ matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ColumnarTensors {
    pub(crate) kind: Columnar,
    /// Of a code: 2, 4 or 8.
    pub(crate) bits: usize,
    pub(crate) zeros: usize,
    pub(crate) scales: usize,
    /// Group of each input feature; `None`: groups follow one another.
    pub(crate) groups: Option<usize>,
    /// Number of groups.
    pub(crate) count: usize,
    /// Output features.
    pub(crate) outputs: usize,
}

/// A [`View`] of a tensor that exists. All arithmetic on rows and columns stays inside the tensor's checked shape.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Number of the tensor that holds the codes or numbers.
    pub(crate) tensor: usize,
    pub(crate) storage: Storage,
    /// Columns of the tensor.
    pub(crate) cols: usize,
    pub(crate) strides: Strides,
    pub(crate) plus_one: bool,
}

impl Source {
    /// Source row and column of an element; rows of a batch are counted through.
    pub(crate) fn locate(&self, row: usize, col: usize) -> (usize, usize) {
        let element = self.strides.at(row, col);
        (element / self.cols, element % self.cols)
    }

    /// Whether every row is all of a row of the source.
    pub(crate) fn whole_rows(&self, cols: usize) -> bool {
        let s = &self.strides;
        s.col_step == 1 && cols == self.cols && [s.start, s.run_step, s.row_step].iter().all(|n| n.is_multiple_of(cols))
    }
}

/// The first alternative whose tensors exist, else the first of all.
pub(crate) fn pick(checkpoint: &Checkpoint, mut alternatives: Vec<Vec<View>>) -> Vec<View> {
    let exists = |views: &Vec<View>| views.iter().all(|v| form::find(checkpoint, &v.tensor).is_some());
    let chosen = alternatives.iter().position(exists).unwrap_or(0);
    alternatives.swap_remove(chosen)
}

/// Finds the tensor of a view and checks it. `plain`: it is a vector, which no checkpoint quantises.
/// The caller has checked that all names exist.
pub(crate) fn resolve(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    view: &View,
    plain: bool,
) -> Result<Source, ConvertError> {
    let parts = form::find(checkpoint, &view.tensor).filter(|p| p.missing.is_none());
    let parts = parts.ok_or_else(|| ConvertError::MissingTensors {
        path: checkpoint.dir.clone(),
        count: 1,
        names: format!("`{}`", view.tensor),
        hint: String::new(),
    })?;
    let tensor = parts.tensors[0];
    let dtype = &checkpoint.tensors[tensor].dtype;
    let shape = view.source_shape.as_slice();
    let storage = match (parts.form, dtype) {
        (Form::Single, Dtype::F32) => Storage::F32,
        (Form::Single, Dtype::F16) => Storage::F16,
        (Form::Single, Dtype::Bf16) => Storage::Bf16,
        (Form::Single, _) => return Err(dtype_error(checkpoint, tensor, if plain { WIDE_FLOATS } else { FLOATS })),
        _ if plain => return Err(dtype_error(checkpoint, tensor, WIDE_FLOATS)),
        (Form::Fp8, _) => Storage::Fp8(fp8(checkpoint, scheme.fp8_block, shape, parts.tensors[1])?),
        (Form::Columnar, _) => Storage::Columnar(columnar(checkpoint, scheme, shape, &parts)?),
        _ => Storage::Grouped(grouped(checkpoint, shape, &parts)?),
    };
    if matches!(parts.form, Form::Single | Form::Fp8) {
        check_shape(checkpoint, tensor, shape)?;
    }
    let cols = *shape.last().expect("a view has columns");
    Ok(Source { tensor, storage, cols, strides: view.strides, plus_one: view.plus_one })
}

/// Scales per block as in DeepSeek's checkpoints, per row, or one: their shape tells.
fn fp8(checkpoint: &Checkpoint, block: [usize; 2], shape: &[usize], scales: usize) -> Result<Fp8Scales, ConvertError> {
    let wide = [Dtype::F32, Dtype::F16, Dtype::Bf16].contains(&checkpoint.tensors[scales].dtype);
    if !wide {
        return Err(dtype_error(checkpoint, scales, WIDE_FLOATS));
    }
    let [stack @ .., rows, cols] = shape else { return Err(shape_error(checkpoint, scales, shape)) };
    let found = checkpoint.tensors[scales].shape.as_slice();
    let with = |grid: [usize; 2], block: [usize; 2]| {
        Ok(Fp8Scales { tensor: scales, matrix_rows: *rows, block: block.map(|n| n.max(1)), grid })
    };
    let blocks = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    if found == [stack, &blocks].concat() {
        return with(blocks, block);
    }
    if found == [stack, &[*rows, 1]].concat() || found == [stack, &[*rows]].concat() {
        return with([*rows, 1], [1, *cols]);
    }
    if stack.is_empty() && (found.is_empty() || found == [1] || found == [1, 1]) {
        return with([1, 1], [*rows, *cols]);
    }
    Err(shape_error(checkpoint, scales, &[stack, &blocks].concat()))
}

/// Codes of a few bits with a scale per group: what the codes mean, and how many share a scale.
fn grouped(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Grouped, ConvertError> {
    let (codes, scales) = (parts.tensors[0], parts.tensors[1]);
    let third = parts.tensors.get(2).copied();
    let (cols, lead) = shape.split_last().expect("a view has columns");
    let scale_shape = &checkpoint.tensors[scales].shape;
    // One scale per row may stand without a dimension of its own.
    let per_row = parts.form == Form::Int8 && scale_shape == lead;
    let groups = if per_row { 1 } else { scale_shape.last().copied().unwrap_or(0) };
    let fits = per_row || scale_shape.len() == shape.len() && scale_shape.starts_with(lead);
    if !fits || groups == 0 || !cols.is_multiple_of(groups) {
        return Err(shape_error(checkpoint, scales, &[lead, &[cols.div_ceil(32)]].concat()));
    }
    let group = cols / groups;
    let scale_type = scale_type(checkpoint, scales, parts, group)?;
    let (code, word, global, biases) = match parts.form {
        Form::PackedInt => (packed_int_code(checkpoint, codes, *cols), 4, None, None),
        Form::Int8 => (Code::Signed8, 1, None, None),
        Form::PackedMxfp4 | Form::Blocks => (Code::E2m1, 1, None, None),
        Form::PackedNvfp4 | Form::Nvfp4 => {
            let global = third.map(|tensor| Global { tensor, divides: parts.form == Form::PackedNvfp4 });
            (Code::E2m1, 1, global, None)
        }
        _ => (mlx_code(checkpoint, codes, *cols, group, third)?, 4, None, third),
    };
    let check_word = |expected: &str| {
        if checkpoint.tensors[codes].dtype.name() == expected {
            return Ok(());
        }
        Err(dtype_error(checkpoint, codes, "U8 or 32-bit words of packed codes"))
    };
    check_word(match parts.form {
        Form::Int8 => "I8",
        Form::Mlx => "U32",
        _ if word == 1 => "U8",
        _ => "I32",
    })?;
    let row_bits = cols * code.bits();
    if !row_bits.is_multiple_of(8 * word) {
        return Err(shape_error(checkpoint, codes, &[lead, &[row_bits.div_ceil(8 * word)]].concat()));
    }
    let expected = match parts.form {
        Form::Blocks => [lead, &[groups, group / 2]].concat(),
        _ => [lead, &[row_bits / 8 / word]].concat(),
    };
    check_shape(checkpoint, codes, &expected)?;
    if let Some(biases) = biases {
        check_shape(checkpoint, biases, &checkpoint.tensors[scales].shape)?;
        if checkpoint.tensors[biases].dtype != checkpoint.tensors[scales].dtype {
            return Err(dtype_error(checkpoint, biases, "the type of the scales"));
        }
    }
    if let Some(Global { tensor, .. }) = global {
        let one = checkpoint.tensors[tensor].shape.iter().product::<usize>() == 1;
        if !one || checkpoint.tensors[tensor].dtype != Dtype::F32 {
            return Err(shape_error(checkpoint, tensor, &[1]));
        }
    }
    Ok(Grouped { code, group, scales, scale_type, biases, global })
}

/// Eight bits where that is what fills the words, else four.
fn packed_int_code(checkpoint: &Checkpoint, codes: usize, cols: usize) -> Code {
    let words = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    if words.checked_mul(4) == Some(cols) { Code::Offset8 } else { Code::Offset4 }
}

fn scale_type(checkpoint: &Checkpoint, scales: usize, parts: &Parts, group: usize) -> Result<ScaleType, ConvertError> {
    let nvfp4 = matches!(parts.form, Form::Nvfp4 | Form::PackedNvfp4);
    let powers = matches!(parts.form, Form::Blocks | Form::PackedMxfp4 | Form::Mlx);
    match checkpoint.tensors[scales].dtype.name() {
        "F8_E4M3" if nvfp4 => Ok(ScaleType::E4m3),
        // MLX's nvfp4, by its groups of 16, has no global scale.
        "U8" if parts.form == Form::Mlx && parts.tensors.len() == 2 && group == 16 => Ok(ScaleType::E4m3),
        "U8" | "F8_E8M0" if powers && parts.tensors.len() == 2 => Ok(ScaleType::E8m0),
        "F32" if !nvfp4 => Ok(ScaleType::F32),
        "F16" if !nvfp4 => Ok(ScaleType::F16),
        "BF16" if !nvfp4 => Ok(ScaleType::Bf16),
        _ => Err(dtype_error(checkpoint, scales, "BF16, F16, F32, and U8 or F8_E4M3 where the codes are floats")),
    }
}

/// MLX's affine mode has biases and codes of 2 to 8 bits but 7; its modes mxfp4, nvfp4 and mxfp8 have none.
fn mlx_code(
    checkpoint: &Checkpoint,
    codes: usize,
    cols: usize,
    group: usize,
    biases: Option<usize>,
) -> Result<Code, ConvertError> {
    let words = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    let bits = words.saturating_mul(32) / cols.max(1);
    match (biases, bits, group) {
        (Some(_), 2..=6 | 8, _) => Ok(Code::Unsigned { bits }),
        (None, 4, 16 | 32) => Ok(Code::E2m1),
        (None, 8, 32) => Ok(Code::E4m3),
        _ => Err(dtype_error(
            checkpoint,
            codes,
            "MLX's affine codes of 2, 3, 4, 5, 6 and 8 bits, mxfp4, nvfp4 and mxfp8",
        )),
    }
}

fn columnar(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    shape: &[usize],
    parts: &Parts,
) -> Result<ColumnarTensors, ConvertError> {
    let (codes, zeros, scales) = (parts.tensors[0], parts.tensors[1], parts.tensors[2]);
    let &[outputs, inputs] = shape else { return Err(shape_error(checkpoint, codes, shape)) };
    let count = checkpoint.tensors[scales].shape.first().copied().unwrap_or(0);
    if count == 0 || !inputs.is_multiple_of(count) || !outputs.is_multiple_of(8) || !inputs.is_multiple_of(8) {
        return Err(shape_error(checkpoint, scales, &[inputs.div_ceil(128), outputs]));
    }
    let found = checkpoint.tensors[codes].shape.as_slice();
    // The shape tells AWQ, which packs along the other axis. It does not tell the versions of GPTQ apart.
    let awq_by_shape = (found == [inputs, outputs / 8]).then_some(Columnar::Awq);
    let Some(kind) = awq_by_shape.or(scheme.columnar) else {
        let supported = "`qweight` of GPTQ where `quantization_config` says that it is, with `quant_method`";
        return Err(dtype_error(checkpoint, codes, supported));
    };
    let awq = kind == Columnar::Awq;
    let rows = found.first().copied().unwrap_or(0);
    // GPTQ may have other widths for some layers, which its shape tells.
    let bits = match rows.saturating_mul(32) / inputs {
        bits @ (2 | 8) if !awq => bits,
        _ => 4,
    };
    check_shape(checkpoint, scales, &[count, outputs])?;
    check_shape(checkpoint, zeros, &[count, outputs * bits / 32])?;
    match kind {
        Columnar::Awq => check_shape(checkpoint, codes, &[inputs, outputs / 8])?,
        Columnar::Gptq { .. } => check_shape(checkpoint, codes, &[inputs * bits / 32, outputs])?,
    }
    // Codes of two bits are sixteen in a word.
    if !inputs.is_multiple_of(32 / bits) || !outputs.is_multiple_of(32 / bits) {
        return Err(shape_error(checkpoint, codes, &[inputs.div_ceil(32 / bits), outputs]));
    }
    let groups = parts.tensors.get(3).copied();
    groups.map_or(Ok(()), |groups| check_shape(checkpoint, groups, &[inputs]))?;
    for tensor in [Some(codes), Some(zeros), groups].into_iter().flatten() {
        if !["I32", "U32"].contains(&checkpoint.tensors[tensor].dtype.name()) {
            return Err(dtype_error(checkpoint, tensor, "I32"));
        }
    }
    if ![Dtype::F16, Dtype::Bf16, Dtype::F32].contains(&checkpoint.tensors[scales].dtype) {
        return Err(dtype_error(checkpoint, scales, WIDE_FLOATS));
    }
    Ok(ColumnarTensors { kind, bits, zeros, scales, groups, count, outputs })
}

fn check_shape(checkpoint: &Checkpoint, tensor: usize, expected: &[usize]) -> Result<(), ConvertError> {
    if checkpoint.tensors[tensor].shape == expected { Ok(()) } else { Err(shape_error(checkpoint, tensor, expected)) }
}

fn shape_error(checkpoint: &Checkpoint, tensor: usize, expected: &[usize]) -> ConvertError {
    let t = &checkpoint.tensors[tensor];
    ConvertError::Shape {
        path: checkpoint.path_of(tensor).to_owned(),
        tensor: t.name.clone(),
        found: t.shape.clone(),
        expected: expected.to_vec(),
    }
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

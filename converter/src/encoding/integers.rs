//! The integers of compressed-tensors: `weight_packed`, `weight_scale` and `weight_shape` (`pack-quantized`), or an I8 `weight`
//! with its scale (`int-quantized`); also `weight_zero_point` if quantisation is asymmetric. Packed codes are a stream of bits
//! along rows, packed zeros one along columns; half of their range is added to both
//! (<https://github.com/vllm-project/compressed-tensors>, `compressors/pack_quantized`).

use super::checks::{check_dtype, check_shape, dtype_error};
use super::grouped::{Code, Grouped, Zeros, check_codes, group_of, wide_scale};
use crate::error::ConvertError;
use crate::plan::form::{Form, Parts};
use crate::source::Checkpoint;

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Grouped, ConvertError> {
    let (codes, scales) = (parts.tensors[0], parts.tensors[1]);
    let is_packed = parts.form == Form::PackedInt;
    let group = group_of(checkpoint, shape, scales, !is_packed)?;
    let scale_type = wide_scale(&checkpoint.tensors[scales].dtype);
    let scale_type = scale_type.ok_or_else(|| {
        dtype_error(checkpoint, scales, "BF16, F16, F32, and U8 or F8_E4M3 where the codes are floats")
    })?;
    let (code, word) = if is_packed {
        (Code::Offset(packed_bits(checkpoint, codes, shape)), (4, "I32"))
    } else {
        (Code::Signed8, (1, "I8"))
    };
    check_codes(checkpoint, shape, codes, code, word)?;
    let cols = shape.last().copied().unwrap_or(0);
    // After the shape of packed codes, which adds no information.
    let zeros = parts.tensors.get(if is_packed { 3 } else { 2 });
    let zeros = zeros.map(|&tensor| zeros_of(checkpoint, tensor, shape, code, cols / group)).transpose()?;
    Ok(Grouped { code, group, cols, scales, scale_type, biases: None, zeros, global: None })
}

/// The width that fills the words, otherwise four.
fn packed_bits(checkpoint: &Checkpoint, codes: usize, shape: &[usize]) -> usize {
    let words = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    let cols = shape.last().copied().unwrap_or(0);
    [2, 3, 5, 6, 8].into_iter().find(|bits| words.checked_mul(32) == cols.checked_mul(*bits)).unwrap_or(4)
}

fn zeros_of(
    checkpoint: &Checkpoint,
    tensor: usize,
    shape: &[usize],
    code: Code,
    groups: usize,
) -> Result<Zeros, ConvertError> {
    check_dtype(checkpoint, tensor, &["I8", "I32"], "I8, and I32 where codes are packed")?;
    let packed = checkpoint.tensors[tensor].dtype.name() == "I32";
    let lead = &shape[..shape.len() - 1];
    match (packed, lead) {
        (true, &[rows]) => check_shape(checkpoint, tensor, &[(rows * code.bits()).div_ceil(32), groups])?,
        _ => check_shape(checkpoint, tensor, &[lead, &[groups]].concat())?,
    }
    Ok(Zeros { tensor, packed })
}

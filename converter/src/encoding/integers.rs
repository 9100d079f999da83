//! The integers of compressed-tensors: `weight_packed`, `weight_scale` and `weight_shape` (`pack-quantized`), or a `weight` of
//! I8 beside its scale (`int-quantized`).

use super::checks::dtype_error;
use super::grouped::{Code, Grouped, ScaleType, check_codes, group_of};
use crate::error::ConvertError;
use crate::plan::form::{Form, Parts};
use crate::source::Checkpoint;

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Grouped, ConvertError> {
    let (codes, scales) = (parts.tensors[0], parts.tensors[1]);
    let is_packed = parts.form == Form::PackedInt;
    let group = group_of(checkpoint, shape, scales, !is_packed)?;
    let scale_type = ScaleType::wide(&checkpoint.tensors[scales].dtype)
        .ok_or_else(|| dtype_error(checkpoint, scales, "BF16, F16, F32, and U8 or F8_E4M3 where the codes are floats"))?;
    let (code, word) = if is_packed {
        (packed_code(checkpoint, codes, shape), (4, "I32"))
    } else {
        (Code::Signed8, (1, "I8"))
    };
    check_codes(checkpoint, shape, codes, code, word)?;
    Ok(Grouped { code, group, scales, scale_type, biases: None, global: None })
}

/// Eight bits where that is what fills the words, else four.
fn packed_code(checkpoint: &Checkpoint, codes: usize, shape: &[usize]) -> Code {
    let words = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    let eight = words.checked_mul(4) == shape.last().copied();
    if eight { Code::Offset8 } else { Code::Offset4 }
}

//! MLX: `weight` in words of 32 bits, `scales`, and `biases` in the affine mode, which has codes of 2 to 8 bits except 7. The modes
//! mxfp4, nvfp4 and mxfp8 have floats, scales of one byte and no biases (<https://github.com/ml-explore/mlx>, `quantize`).

use sluice_weights::ScaleType;

use super::checks::{check_shape, dtype_error};
use super::grouped::{Code, Grouped, check_codes, group_of, wide_scale};
use crate::error::ConvertError;
use crate::plan::form::Parts;
use crate::source::Checkpoint;

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Grouped, ConvertError> {
    let (codes, scales) = (parts.tensors[0], parts.tensors[1]);
    let biases = parts.tensors.get(2).copied();
    let group = group_of(checkpoint, shape, scales, false)?;
    let scale_type = scale_type(checkpoint, scales, biases.is_some(), group)?;
    let cols = shape.last().copied().unwrap_or(0);
    let code = code(checkpoint, codes, (cols, group), biases)?;
    check_codes(checkpoint, shape, codes, code, (4, "U32"))?;
    if let Some(biases) = biases {
        check_shape(checkpoint, biases, &checkpoint.tensors[scales].shape)?;
        if checkpoint.tensors[biases].dtype != checkpoint.tensors[scales].dtype {
            return Err(dtype_error(checkpoint, biases, "the type of the scales"));
        }
    }
    Ok(Grouped { code, group, cols, scales, scale_type, biases, zeros: None, global: None })
}

fn scale_type(
    checkpoint: &Checkpoint,
    scales: usize,
    has_biases: bool,
    group: usize,
) -> Result<ScaleType, ConvertError> {
    let dtype = &checkpoint.tensors[scales].dtype;
    let found = match dtype.name() {
        // MLX's nvfp4, recognised by its groups of 16, has no global scale.
        "U8" if !has_biases && group == 16 => Some(ScaleType::E4m3),
        "U8" | "F8_E8M0" if !has_biases => Some(ScaleType::E8m0),
        _ => wide_scale(dtype),
    };
    let supported = "BF16, F16, F32, and U8 or F8_E4M3 where the codes are floats";
    found.ok_or_else(|| dtype_error(checkpoint, scales, supported))
}

fn code(
    checkpoint: &Checkpoint,
    codes: usize,
    (cols, group): (usize, usize),
    biases: Option<usize>,
) -> Result<Code, ConvertError> {
    let words = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    let bits = words.saturating_mul(32) / cols.max(1);
    match (biases, bits, group) {
        (Some(_), 2..=6 | 8, _) => Ok(Code::Unsigned(bits)),
        (None, 4, 16 | 32) => Ok(Code::E2m1),
        (None, 8, 32) => Ok(Code::E4m3),
        _ => Err(dtype_error(
            checkpoint,
            codes,
            "MLX's affine codes of 2, 3, 4, 5, 6 and 8 bits, mxfp4, nvfp4 and mxfp8",
        )),
    }
}

//! e2m1 codes. MXFP4 has a power of two per 32 columns: gpt-oss in `_blocks` and `_scales`, DeepSeek-V4 in `weight` and `scale`,
//! compressed-tensors in `weight_packed` and `weight_scale`. NVFP4 has an e4m3 scale per 16 columns and one f32 for the tensor:
//! modelopt multiplies by `weight_scale_2`, compressed-tensors divides by `weight_global_scale`.

use sluice_weights::ScaleType;

use super::checks::{check_dtype, check_shape, dtype_error, shape_error};
use super::grouped::{Code, Global, Grouped, check_codes, group_of, wide_scale};
use crate::error::ConvertError;
use crate::plan::form::{Form, Parts};
use crate::source::{Checkpoint, Dtype};

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Grouped, ConvertError> {
    let (codes, scales) = (parts.tensors[0], parts.tensors[1]);
    let group = group_of(checkpoint, shape, scales, false)?;
    let nvfp4 = matches!(parts.form, Form::Nvfp4 | Form::PackedNvfp4);
    let scale_type = scale_type(checkpoint, scales, nvfp4)?;
    let code = Code::E2m1;
    if parts.form == Form::Blocks {
        check_dtype(checkpoint, codes, &["U8"], "U8 or 32-bit words of packed codes")?;
        let (cols, lead) = shape.split_last().expect("a view has columns");
        if !cols.is_multiple_of(2) {
            return Err(shape_error(checkpoint, codes, &[lead, &[cols.div_ceil(2)]].concat()));
        }
        check_shape(checkpoint, codes, &[lead, &[cols / group, group / 2]].concat())?;
    } else {
        let dtype = if parts.form == Form::Pairs { "I8" } else { "U8" };
        check_codes(checkpoint, shape, codes, code, (1, dtype))?;
    }
    let global = parts.tensors.get(2).filter(|_| nvfp4);
    let global = global.map(|&tensor| Global { tensor, divides: parts.form == Form::PackedNvfp4 });
    if let Some(Global { tensor, .. }) = global {
        let one = checkpoint.tensors[tensor].shape.iter().product::<usize>() == 1;
        if !one || checkpoint.tensors[tensor].dtype != Dtype::F32 {
            return Err(shape_error(checkpoint, tensor, &[1]));
        }
    }
    let cols = shape.last().copied().unwrap_or(0);
    Ok(Grouped { code, group, cols, scales, scale_type, biases: None, zeros: None, global })
}

fn scale_type(checkpoint: &Checkpoint, scales: usize, nvfp4: bool) -> Result<ScaleType, ConvertError> {
    let dtype = &checkpoint.tensors[scales].dtype;
    let found = match dtype.name() {
        "F8_E4M3" if nvfp4 => Some(ScaleType::E4m3),
        "U8" | "F8_E8M0" if !nvfp4 => Some(ScaleType::E8m0),
        _ if !nvfp4 => wide_scale(dtype),
        _ => None,
    };
    let supported = "BF16, F16, F32, and U8 or F8_E4M3 where the codes are floats";
    found.ok_or_else(|| dtype_error(checkpoint, scales, supported))
}

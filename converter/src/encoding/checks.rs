//! Checks that tensors have the shapes and formats that an encoding needs.

use crate::error::ConvertError;
use crate::source::Checkpoint;

pub(super) fn check_shape(checkpoint: &Checkpoint, tensor: usize, expected: &[usize]) -> Result<(), ConvertError> {
    if checkpoint.tensors[tensor].shape == expected { Ok(()) } else { Err(shape_error(checkpoint, tensor, expected)) }
}

pub(super) fn shape_error(checkpoint: &Checkpoint, tensor: usize, expected: &[usize]) -> ConvertError {
    let t = &checkpoint.tensors[tensor];
    ConvertError::Shape {
        path: checkpoint.path_of(tensor).to_owned(),
        tensor: checkpoint.shown(&t.name),
        found: t.shape.clone(),
        expected: expected.to_vec(),
    }
}

pub(super) fn dtype_error(checkpoint: &Checkpoint, tensor: usize, supported: &'static str) -> ConvertError {
    let t = &checkpoint.tensors[tensor];
    ConvertError::Dtype {
        path: checkpoint.path_of(tensor).to_owned(),
        tensor: checkpoint.shown(&t.name),
        dtype: t.dtype.name().to_owned(),
        supported,
    }
}

/// Refuses a tensor whose format is not one of `formats`.
pub(super) fn check_dtype(
    checkpoint: &Checkpoint,
    tensor: usize,
    formats: &[&str],
    supported: &'static str,
) -> Result<(), ConvertError> {
    let known = formats.contains(&checkpoint.tensors[tensor].dtype.name());
    if known { Ok(()) } else { Err(dtype_error(checkpoint, tensor, supported)) }
}

//! Tensors that have no effect, whatever they are: biases and zero points that are zero.
//!
//! Some tools write them beside what they belong to. AutoGPTQ up to 0.7 has a bias of zeros beside every `qweight`, and
//! compressed-tensors may have zero points of zeros with symmetric quantisation. Names do not say whether they are zero, so only
//! here does planning read more than headers; such tensors have one number per row.

use sluice_checksum::Xxh3;

use crate::error::ConvertError;
use crate::family::Unused;
use crate::plan::form;
use crate::source::Checkpoint;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Whether a tensor may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harmless {
    /// It has no effect.
    Yes(Unused),
    /// Nothing is known about it.
    Unknown,
}

/// Inspects an unused tensor. If the model has the matrix to which it would be added, it is harmless if it is zero, and otherwise
/// an error that gives its name.
pub(crate) fn look(checkpoint: &Checkpoint, used: &[bool], tensor: usize) -> Result<Harmless, ConvertError> {
    let t = &checkpoint.tensors[tensor];
    let stem = [".bias", ".weight_zero_point"].iter().find_map(|end| t.name.strip_suffix(end));
    let Some(stem) = stem else { return Ok(Harmless::Unknown) };
    let of_matrix = form::find(checkpoint, &format!("{stem}.weight"));
    if !of_matrix.is_some_and(|parts| used[parts.tensors[0]]) {
        return Ok(Harmless::Unknown);
    }
    if is_zero(checkpoint, tensor)? {
        return Ok(Harmless::Yes(Unused::Zeros));
    }
    Err(ConvertError::NotZero { path: checkpoint.path_of(tensor).to_owned(), tensor: t.name.clone() })
}

/// Whether all numbers of a tensor are zero. In every format, a number is zero if all bits except the sign are.
fn is_zero(checkpoint: &Checkpoint, tensor: usize) -> Result<bool, ConvertError> {
    let t = &checkpoint.tensors[tensor];
    let sign_byte = match t.dtype.name() {
        "F16" | "BF16" => 2,
        "F32" => 4,
        // Integers have no separate sign bit.
        _ => 0,
    };
    let mut buffer = vec![0; PIECE.min(t.len as usize)];
    let mut at = 0;
    while at < t.len {
        let piece = &mut buffer[..PIECE.min((t.len - at) as usize)];
        checkpoint.read(tensor, at, piece, &mut Xxh3::new())?;
        // Pieces begin at whole numbers.
        let zero = |(i, &byte): (usize, &u8)| {
            let high = sign_byte != 0 && i % sign_byte == sign_byte - 1;
            byte & if high { 0x7f } else { 0xff } == 0
        };
        if !piece.iter().enumerate().all(zero) {
            return Ok(false);
        }
        at += piece.len() as u64;
    }
    Ok(true)
}

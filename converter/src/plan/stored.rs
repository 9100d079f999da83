//! The few tensors whose values decide what a model computes.

use sluice_checksum::Xxh3;

use super::form;
use crate::error::ConvertError;
use crate::family::Stored;
use crate::source::Checkpoint;

/// A checkpoint in the form that families use.
pub(super) struct Tensors<'a>(pub(super) &'a Checkpoint);

impl Stored for Tensors<'_> {
    fn integers(&self, tensor: &str, len: usize) -> Result<Vec<i64>, ConvertError> {
        let Tensors(checkpoint) = self;
        let name = || format!("`{}`", checkpoint.shown(tensor));
        let number = checkpoint.find(tensor).ok_or_else(|| checkpoint.lacks(1, name(), String::new()))?;
        let (found, path) = (&checkpoint.tensors[number], || checkpoint.path_of(number).to_owned());
        if found.shape != [len] {
            let (found, expected) = (found.shape.clone(), vec![len]);
            return Err(ConvertError::Shape { path: path(), tensor: tensor.to_owned(), found, expected });
        }
        if found.dtype.name() != "I64" {
            let (dtype, supported) = (found.dtype.name().to_owned(), "I64");
            return Err(ConvertError::Dtype { path: path(), tensor: tensor.to_owned(), dtype, supported });
        }
        let mut bytes = vec![0; 8 * len];
        checkpoint.read(number, 0, &mut bytes, &mut Xxh3::new())?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
    }

    fn unsigned(&self, tensor: &str, len: usize) -> Result<Vec<u64>, ConvertError> {
        let numbers = self.integers(tensor, len)?.into_iter().map(u64::try_from);
        numbers.collect::<Result<_, _>>().map_err(|_| ConvertError::Damaged {
            path: self.0.dir.clone(),
            problem: format!("`{tensor}` has a number that is negative"),
        })
    }

    fn rows(&self, tensor: &str) -> Option<usize> {
        rows_of(self.0, tensor)
    }
}

/// Rows of a matrix of the checkpoint.
pub(super) fn rows_of(checkpoint: &Checkpoint, tensor: &str) -> Option<usize> {
    let parts = form::find(checkpoint, tensor)?;
    checkpoint.tensors[parts.tensors[0]].shape.first().copied()
}

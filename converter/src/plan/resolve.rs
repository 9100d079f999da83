//! Turns the names that a family gives into tensors of the checkpoint with checked shapes and formats.

use super::form;
use super::scheme::Scheme;
use crate::encoding::{self, Selection};
use crate::error::ConvertError;
use crate::family::View;
use crate::source::Checkpoint;

/// The first alternative whose tensors exist, otherwise the first one.
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
) -> Result<Selection, ConvertError> {
    let parts = form::find(checkpoint, &view.tensor).filter(|p| p.missing.is_none());
    let name = || format!("`{}`", checkpoint.shown(&view.tensor));
    let parts = parts.ok_or_else(|| checkpoint.lacks(1, name(), String::new()))?;
    let shape = view.source_shape.as_slice();
    let encoding = match view.below {
        Some(below) => encoding::resolve_numbers(checkpoint, shape, &parts, below)?,
        None => encoding::resolve(checkpoint, scheme, shape, &parts, plain)?,
    };
    let cols = *shape.last().expect("a view has columns");
    Ok(Selection { tensor: parts.tensors[0], encoding, cols, strides: view.strides, plus_one: view.plus_one })
}

//! The data from which an interrupted measurement continues: the states before a layer and, if requested, the means of all layers
//! before it.

use sluice_format::{Importance, ModelSpec};

/// States and, if there are any, means. The converter binds these bytes to model and text, and checks them.
pub(crate) fn to_bytes(states: &[f32], means: Option<&Importance>) -> Vec<u8> {
    let mut bytes = (states.len() as u64).to_le_bytes().to_vec();
    bytes.extend(states.iter().flat_map(|x| x.to_le_bytes()));
    bytes.extend(means.map(Importance::to_bytes).unwrap_or_default());
    bytes
}

/// The reverse. `None` if the bytes do not belong to a measurement of `states` numbers.
pub(crate) fn from_bytes(bytes: &[u8], states: usize, spec: &ModelSpec) -> Option<(Vec<f32>, Option<Importance>)> {
    let (count, rest) = bytes.split_first_chunk()?;
    if u64::from_le_bytes(*count) != states as u64 {
        return None;
    }
    let (numbers, means) = rest.split_at_checked(states.checked_mul(size_of::<f32>())?)?;
    let numbers = numbers.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let means = if means.is_empty() { None } else { Some(Importance::from_bytes(means, spec)?) };
    Some((numbers, means))
}

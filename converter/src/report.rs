//! A summary of a conversion, for the user.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::contents::digest_of_zeros;
use crate::error::counted;
use crate::pack::{ErrorSums, Outcome};
use crate::partial::Published;
use crate::plan::{KindSize, LeftOut, Plan};
use crate::source::SourceTensor;

/// A summary of a conversion.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The source's `model_type`.
    pub family: String,
    /// Identity of the new file: a hash of its content.
    pub model_id: String,
    /// Its length.
    pub file_bytes: u64,
    /// The files: one, or the volumes.
    pub files: Vec<PathBuf>,
    /// Bytes of all extents before compression.
    pub extent_bytes: u64,
    /// The same in the files.
    pub stored_bytes: u64,
    /// Extents and bytes by kind, in file order.
    pub sizes: Vec<KindSize>,
    /// Types by tensor group.
    pub types: BTreeMap<String, Vec<String>>,
    /// Relative root-mean-square error by tensor group, for those whose values changed.
    pub errors: BTreeMap<String, f64>,
    /// Tensors stored as f32 because they could not be carried as they are; their values are the same.
    pub widened: Vec<String>,
    /// Tensors of the checkpoint that are not in the file.
    pub left_out: Vec<LeftOut>,
    /// All texts passed to [`crate::Progress::note`].
    pub notes: Vec<String>,
    /// Bytes of weights read by this run.
    pub bytes_read: u64,
    /// Bytes of extents written by this run.
    pub bytes_written: u64,
    /// Extents that an earlier run had finished.
    pub resumed_extents: usize,
    /// Whether an interrupted conversion with other options or another source was discarded.
    pub restarted: bool,
}

impl Summary {
    /// What is the same whichever run has written which extents. `outcomes` are by extent.
    pub(crate) fn of(plan: &Plan, outcomes: &[Outcome], published: Published) -> Self {
        let Published { model_id, file_bytes, files, orphans: _ } = published;
        Summary {
            family: plan.spec.family.clone(),
            model_id: model_id.to_string(),
            file_bytes,
            files,
            extent_bytes: plan.extent_bytes(),
            stored_bytes: outcomes.iter().map(|o| o.written.stored_len).sum(),
            sizes: plan.sizes(),
            types: plan.types.clone(),
            errors: errors(plan, outcomes),
            widened: plan.widened.clone(),
            left_out: plan.left_out.clone(),
            notes: Vec::new(),
            bytes_read: 0,
            bytes_written: 0,
            resumed_extents: 0,
            restarted: false,
        }
    }
}

/// Relative RMS error by group, without groups that have no error. The sums are in file order, whichever threads computed the
/// parts.
pub(crate) fn errors(plan: &Plan, outcomes: &[Outcome]) -> BTreeMap<String, f64> {
    let mut sums = vec![ErrorSums::default(); plan.groups.len()];
    for (tensors, outcome) in plan.extents.iter().zip(outcomes) {
        for (tensor, part) in tensors.iter().zip(&outcome.errors) {
            let sum = &mut sums[tensor.group];
            sum.error += part.error;
            sum.magnitude += part.magnitude;
        }
    }
    let named = plan.groups.iter().zip(sums).filter(|(_, s)| s.magnitude > 0.0);
    named.map(|(group, s)| (group.clone(), (s.error / s.magnitude).sqrt())).collect()
}

/// A note about matrices that contain only zeros, found by the digests of the source's parts: programs that reserve the space of a
/// download leave files that look complete but have no contents, and such a model would produce nonsense.
pub(crate) fn empty(plan: &Plan, parts: &[u128]) -> Option<String> {
    let checkpoint = &plan.checkpoint;
    let is_zero = |t: &&SourceTensor| {
        // Biases and zero points may be zero.
        let is_matrix =
            t.shape.iter().filter(|&&n| n > 1).count() > 1 && !t.name.contains("zero") && !t.name.ends_with("bias");
        let part = || checkpoint.parts.binary_search_by_key(&(t.file, t.start), |p| (p.file, p.start));
        let is_stored = t.derived.is_none();
        is_stored && is_matrix && part().is_ok_and(|part| parts[part] == digest_of_zeros(checkpoint.parts[part].len))
    };
    let names: Vec<String> = checkpoint.tensors.iter().filter(is_zero).map(|t| t.name.clone()).collect();
    (!names.is_empty()).then(|| {
        format!(
            "nothing but zeros in {}: if that is not how the model was published, the download is not complete",
            counted(&names)
        )
    })
}

/// A note about weights that became zero because `q8` has no scale for them.
pub(crate) fn vanished(plan: &Plan, outcomes: &[Outcome]) -> Option<String> {
    let (mut blocks, mut first) = (0u64, None);
    for (tensors, outcome) in plan.extents.iter().zip(outcomes) {
        for (tensor, sums) in tensors.iter().zip(&outcome.errors).filter(|(_, sums)| sums.vanished > 0) {
            blocks = blocks.saturating_add(sums.vanished);
            first.get_or_insert_with(|| format!("{} {}", plan.layout.extents()[outcome.extent].name(), tensor.name));
        }
    }
    let first = first?;
    Some(format!(
        "{blocks} blocks of 32 weights are too small for the scales of q8, and became zero; the first are in `{first}`"
    ))
}

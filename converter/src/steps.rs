//! The order in which extents are made: that of their places, so that reads and writes are nearly sequential. If files are fetched
//! one after the other, it is that of the files that they need, so that only few files are on the drive at once.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;

use sluice_format::{ExtentKind, ExtentRecord, NO_LAYER};

use crate::layer_file;
use crate::plan::Plan;
use crate::source::FileUse;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Makes an extent.
    Extent(usize),
    /// Reads the rest of a file that no extent needs, because its digest is still required.
    Rest(usize),
    /// Begins a measurement with the embeddings of its text.
    Embed,
    /// Measures a layer.
    Measure(usize),
    /// Keeps what measuring needs to continue before a layer, after everything before that layer is made.
    Keep(usize),
}

impl Step {
    /// Whether it measures: such a step runs alone, because later steps depend on it.
    pub(crate) fn measures(self) -> bool {
        matches!(self, Step::Embed | Step::Measure(_) | Step::Keep(_))
    }
}

/// All steps, in order. `is_todo` says whether an extent must be made, `is_unknown` whether a file's digest must still be computed.
pub(crate) fn of(plan: &Plan, is_todo: &dyn Fn(usize) -> bool, is_unknown: &dyn Fn(usize) -> bool) -> Vec<Step> {
    let todo = (0..plan.extents.len()).filter(|&extent| is_todo(extent));
    if !plan.checkpoint.source().is_fetched() {
        return todo.map(Step::Extent).collect();
    }
    let mut steps: Vec<((usize, usize), Step)> = Vec::new();
    let mut needed = vec![false; plan.checkpoint.files().len()];
    for extent in todo {
        let files = plan.files_of(extent);
        files.iter().for_each(|&file| needed[file] = true);
        let [first, last] = [files.first(), files.last()].map(|file| file.copied().unwrap_or(0));
        // An extent can be made when the last of its files has arrived; files that have waited longest are used first, so that they
        // can be released.
        steps.push(((last, first), Step::Extent(extent)));
    }
    let idle = needed.iter().enumerate().filter(|&(file, needed)| !needed && is_unknown(file));
    steps.extend(idle.map(|(file, _)| ((file, file), Step::Rest(file))));
    // A stable sort: extents of the same files stay in the order of their places.
    steps.sort_by_key(|&(files, _)| files);
    steps.into_iter().map(|(_, step)| step).collect()
}

/// The round in which an extent is made if the model is measured. Before all layers come extents without a measured input, such as
/// the embedding and a prediction layer; then come the layers. The head, whose inputs are the results of the last layer, comes with
/// that layer.
pub(crate) fn round_of(plan: &Plan, extent: usize) -> usize {
    match plan.layout.extents()[extent] {
        ExtentRecord { kind: ExtentKind::Embedding | ExtentKind::FinalNorm, .. } => 0,
        ref extent if !plan.spec.decodes(extent) => 0,
        ExtentRecord { kind: ExtentKind::Head, .. } => plan.spec.layers.len(),
        ExtentRecord { layer, .. } => layer as usize + 1,
    }
}

/// Like [`of`], if the model is measured: each layer is measured before its extents are made. `from`: the layer from which
/// measuring can continue, because an earlier run kept the states before it; nothing of earlier layers must be made.
pub(crate) fn measured(
    plan: &Plan,
    from: Option<usize>,
    is_todo: &dyn Fn(usize) -> bool,
    is_unknown: &dyn Fn(usize) -> bool,
) -> Vec<Step> {
    let round_of = |step: &Step| match *step {
        Step::Extent(extent) => Some(round_of(plan, extent)),
        _ => None,
    };
    let all = of(plan, is_todo, is_unknown);
    // What an earlier run has finished is measured again only to get the states for later layers.
    let last = all.iter().filter_map(round_of).max().unwrap_or(0);
    let mut steps = Vec::with_capacity(all.len() + 2 * last + 2);
    for round in 0..=last {
        // There is something to measure for, and nothing of the embedding has been released.
        let measures = last > 0 && from.is_none_or(|from| round > from);
        steps.extend(measures.then(|| round.checked_sub(1).map_or(Step::Embed, Step::Measure)));
        steps.extend(all.iter().filter(|step| round_of(step) == Some(round)));
        // Only the last layer's own extents need what comes after it.
        steps.extend((measures && round < last).then_some(Step::Keep(round)));
    }
    steps.extend(all.iter().filter(|step| round_of(step).is_none()));
    steps
}

/// The files that the steps need, by index, and when.
pub(crate) fn uses(plan: &Plan, steps: &[Step]) -> Vec<FileUse> {
    let mut uses: Vec<Option<FileUse>> = vec![None; plan.checkpoint.files().len()];
    for (at, step) in steps.iter().enumerate() {
        for file in files_of(plan, *step) {
            let of_file = uses[file].get_or_insert(FileUse { file, first: at, last: at });
            of_file.last = at;
        }
    }
    uses.into_iter().flatten().collect()
}

/// How many steps need each file of the source.
pub(crate) fn needing(plan: &Plan, steps: &[Step]) -> Vec<AtomicUsize> {
    let mut counts = vec![0; plan.checkpoint.files().len()];
    steps.iter().flat_map(|&step| files_of(plan, step)).for_each(|file| counts[file] += 1);
    counts.into_iter().map(AtomicUsize::new).collect()
}

/// Indices of the files that a step reads.
pub(crate) fn files_of(plan: &Plan, step: Step) -> Vec<usize> {
    let of_extents = |reads: &dyn Fn(&ExtentRecord) -> bool| -> Vec<usize> {
        let extents = plan.layout.extents().iter().enumerate().filter(|(_, e)| reads(e));
        let files: BTreeSet<usize> = extents.flat_map(|(extent, _)| plan.files_of(extent)).collect();
        files.into_iter().collect()
    };
    match step {
        Step::Extent(extent) => plan.files_of(extent).into_iter().collect(),
        Step::Rest(file) => vec![file],
        Step::Embed => of_extents(&|e| e.kind == ExtentKind::Embedding && e.layer == NO_LAYER),
        // The files from which it is made are released only after it is kept.
        Step::Keep(0) => files_of(plan, Step::Embed),
        Step::Keep(layer) => files_of(plan, Step::Measure(layer - 1)),
        Step::Measure(layer) => of_extents(&|e| layer_file::reads(plan, layer, e.kind, e.layer)),
    }
}

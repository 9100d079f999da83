//! In which order extents are made: that of their places, so that reads and writes are nearly sequential; but where files are
//! fetched one after the other, that of the files they need, so that few files are here at once.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;

use sluice_format::{ExtentKind, ExtentRecord};

use crate::layer_file;
use crate::plan::Plan;
use crate::source::FileUse;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// To make an extent.
    Extent(usize),
    /// To read what no extent needs of a file of which none needs anything: its digest is asked for all the same.
    Rest(usize),
    /// To begin a measurement with the embeddings of its text.
    Embed,
    /// To measure a layer.
    Measure(usize),
}

impl Step {
    /// Whether it measures: such a step stands alone, since what comes behind it depends on it.
    pub(crate) fn measures(self) -> bool {
        matches!(self, Step::Embed | Step::Measure(_))
    }
}

/// All steps, in order; `is_todo` says of an extent whether it has to be made, `is_unknown` of a file whether its digest has yet to
/// be formed.
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
        // Everything is there once the last of its files is; and what has waited longest goes first, to be released.
        steps.push(((last, first), Step::Extent(extent)));
    }
    let idle = needed.iter().enumerate().filter(|&(file, needed)| !needed && is_unknown(file));
    steps.extend(idle.map(|(file, _)| ((file, file), Step::Rest(file))));
    // Stable: extents of the same files stay in the order of their places.
    steps.sort_by_key(|&(files, _)| files);
    steps.into_iter().map(|(_, step)| step).collect()
}

/// As [`of`], where the model is measured: layer by layer, each of them measured before its extents are made, and the head, whose
/// inputs are what the last layer gives, with that.
pub(crate) fn measured(plan: &Plan, is_todo: &dyn Fn(usize) -> bool, is_unknown: &dyn Fn(usize) -> bool) -> Vec<Step> {
    let last = plan.spec.layers.len().saturating_sub(1);
    // Before all layers comes what meets no input.
    let round_of = |step: &Step| match *step {
        Step::Extent(extent) => match plan.layout.extents()[extent] {
            ExtentRecord { kind: ExtentKind::Embedding | ExtentKind::FinalNorm, .. } => Some(0),
            ExtentRecord { kind: ExtentKind::Head, .. } => Some(last + 1),
            ExtentRecord { layer, .. } => Some(layer as usize + 1),
        },
        _ => None,
    };
    let all = of(plan, is_todo, is_unknown);
    // What an earlier run has finished with need not be measured again, but for the states that later layers see.
    let rounds = all.iter().filter_map(round_of).max();
    let mut steps = Vec::with_capacity(all.len() + last + 2);
    for round in 0..rounds.map_or(0, |last| last + 1) {
        // There is something to measure for, and nothing of the embedding has been released.
        steps.extend((round == 0 && rounds > Some(0)).then_some(Step::Embed));
        steps.extend(round.checked_sub(1).map(Step::Measure));
        steps.extend(all.iter().filter(|step| round_of(step) == Some(round)));
    }
    steps.extend(all.iter().filter(|step| round_of(step).is_none()));
    steps
}

/// The files that the steps need, by number, and when.
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

/// Numbers of the files that a step reads.
pub(crate) fn files_of(plan: &Plan, step: Step) -> Vec<usize> {
    let of_extents = |reads: &dyn Fn(&ExtentRecord) -> bool| -> Vec<usize> {
        let extents = plan.layout.extents().iter().enumerate().filter(|(_, e)| reads(e));
        let files: BTreeSet<usize> = extents.flat_map(|(extent, _)| plan.files_of(extent)).collect();
        files.into_iter().collect()
    };
    match step {
        Step::Extent(extent) => plan.files_of(extent).into_iter().collect(),
        Step::Rest(file) => vec![file],
        Step::Embed => of_extents(&|e| e.kind == ExtentKind::Embedding),
        Step::Measure(layer) => of_extents(&|e| layer_file::reads(plan, layer, e.kind, e.layer)),
    }
}

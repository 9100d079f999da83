//! In which order extents are made: that of their places, so that reads and writes are nearly sequential; but where files are
//! fetched one after the other, that of the files they need, so that few files are here at once.

use std::sync::atomic::AtomicUsize;

use crate::plan::Plan;
use crate::source::FileUse;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// To make an extent.
    Extent(usize),
    /// To read what no extent needs of a file of which none needs anything: its digest is asked for all the same.
    Rest(usize),
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

fn files_of(plan: &Plan, step: Step) -> Vec<usize> {
    match step {
        Step::Extent(extent) => plan.files_of(extent).into_iter().collect(),
        Step::Rest(file) => vec![file],
    }
}

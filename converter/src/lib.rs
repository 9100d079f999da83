//! Hugging Face checkpoints → Sluice model files.
//!
//! [`plan()`] decides everything that can be decided without touching a weight: what the model computes, which tensor goes
//! where and as what. [`convert`] carries the plan out with bounded memory: extents are packed in blocks of rows over the
//! threads of the current rayon pool, written to `NAME.partial`, and journaled once they are on the drive. A conversion
//! that was killed at any moment resumes from its journal, and the file does not depend on how often that happened or on
//! how many threads there were.
//!
//! | module | does |
//! |---|---|
//! | [`source`] | where the bytes of a checkpoint come from, and which tensors there are; trusts nothing in them |
//! | `family` | the meaning of `config.json` and the names of tensors, one file per family |
//! | `recipe`, [`mod@pattern`] | types by pattern |
//! | `plan` | chooses types, lays out extents, checks that every tensor is accounted for |
//! | `encoding` | number formats, one file per published encoding |
//! | `fp8`, `pack` | rows of numbers → row groups of the file |
//! | `journal`, `own`, `partial`, `resume`, `execute`, `settle` | crash safety, disk space, threads |
//! | `contents`, [`mod@provenance`] | which bytes the source holds; whether a model file was made of them |
//! | `layer_file`, `states`, [`mod@measure`] | the inputs of the matrices, measured layer by layer during the conversion |
//! | `report` | summary |
//! | `striping` | into which folders the volumes of a striped model go |
//! | `upgrade` | model files rewritten as the newest version of the format, compressed, in volumes, striped over drives |
//! | [`mod@synth`] | model files with random weights, to measure machines |

mod contents;
mod encoding;
mod error;
mod execute;
mod family;
mod fp8;
#[doc(hidden)]
pub mod fuzzing;
mod journal;
mod layer_file;
pub mod measure;
mod nearest;
mod options;
mod own;
mod pack;
mod partial;
pub mod pattern;
mod plan;
pub mod provenance;
mod recipe;
mod report;
mod resume;
mod settle;
pub mod source;
mod states;
mod steps;
mod striping;
pub mod synth;
mod upgrade;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use sluice_format::Written;

pub use error::ConvertError;
pub use options::{Options, TypeChoice};
pub use own::left_elsewhere;
pub use plan::{KindSize, LeftOut, Plan, plan, plan_source};
pub use recipe::Recipe;
pub use report::Summary;
pub use source::recognise::no_model;
pub use striping::Striping;
pub use upgrade::{UpgradeOptions, UpgradeSummary, restripe, upgrade};

/// Receives the progress of a conversion. Called from several threads.
pub trait Progress: Sync {
    /// The conversion begins: bytes of extents to write in all, and how many of them an earlier run has written.
    fn started(&self, total_bytes: u64, already_done: u64);
    /// This many more bytes have been written.
    fn advanced(&self, bytes: u64);
    /// Something that the user should know.
    fn note(&self, text: &str);
}

/// Ignores everything.
impl Progress for () {
    fn started(&self, _total_bytes: u64, _already_done: u64) {}
    fn advanced(&self, _bytes: u64) {}
    fn note(&self, _text: &str) {}
}

/// Passes everything on, and keeps the notes.
struct Remarks<'a> {
    progress: &'a dyn Progress,
    said: Mutex<Vec<String>>,
}

impl Progress for Remarks<'_> {
    fn started(&self, total_bytes: u64, already_done: u64) {
        self.progress.started(total_bytes, already_done);
    }

    fn advanced(&self, bytes: u64) {
        self.progress.advanced(bytes);
    }

    fn note(&self, text: &str) {
        self.progress.note(text);
        self.said.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
    }
}

/// Converts the checkpoint in the folder `src` to the file `dst`, resuming an interrupted conversion of the same source with
/// the same options.
///
/// # Errors
/// See [`ConvertError`]. After an error, `dst` is unchanged; what has been converted stays in `dst.partial`.
pub fn convert(src: &Path, dst: &Path, options: &Options, progress: &dyn Progress) -> Result<Summary, ConvertError> {
    let plan = plan(src, options)?;
    convert_plan(&plan, dst, progress)
}

/// Whether `dst` can become the model file of this plan, as far as this can be known before anything is written.
///
/// # Errors
/// [`ConvertError::Exists`], [`ConvertError::NotReplaced`], [`ConvertError::Namesake`], [`ConvertError::OtherModel`],
/// [`ConvertError::IsVolume`], and [`ConvertError::NoFolder`].
pub fn check_destination(plan: &Plan, dst: &Path) -> Result<(), ConvertError> {
    partial::refuse_all_existing(plan.destination(dst), plan)
}

/// Removes what a conversion to `dst` has left that was killed when the model file was complete and had its name: the journal, and
/// volumes that a compressed model did not need. Does nothing if a conversion may still continue.
pub fn clear_remains(plan: &Plan, dst: &Path) {
    partial::clear_remains(plan.destination(dst), plan.layout.ends().len());
}

/// Carries out a plan: [`convert`] with a plan that the caller has inspected.
///
/// # Errors
/// As [`convert`].
pub fn convert_plan(plan: &Plan, dst: &Path, progress: &dyn Progress) -> Result<Summary, ConvertError> {
    convert_measured(plan, dst, None, progress)
}

/// Like [`convert_plan`], with an object that measures the model during the conversion if the plan requests it
/// ([`Plan::is_measured`]).
///
/// # Errors
/// As [`convert`]; [`ConvertError::Measure`].
pub fn convert_measured(
    plan: &Plan,
    dst: &Path,
    measure: Option<&mut dyn measure::Measure>,
    progress: &dyn Progress,
) -> Result<Summary, ConvertError> {
    if plan.is_measured() != measure.is_some() {
        let problem = "the plan and the conversion disagree on whether the model is measured";
        return Err(ConvertError::Options(problem.into()));
    }
    let tokens = measure.as_ref().map(|measure| measure.tokens());
    if let Some(summary) = settle(plan, dst, tokens)? {
        summary.notes.iter().for_each(|text| progress.note(text));
        return Ok(summary);
    }
    let hash = plan.hash_with(tokens);
    let scratch = measure.as_ref().map_or(0, |measure| plan.measuring_bytes(measure.kept_bytes()));
    let remarks = Remarks { progress, said: Mutex::default() };
    let progress: &dyn Progress = &remarks;
    let partial::Opened { partial, identity, found, notes } = partial::open(dst, plan, hash, scratch)?;
    let restarted = matches!(found, journal::Found::OtherPlan);
    if restarted {
        progress.note("an interrupted conversion with other options or from another source was there; it starts over");
    }
    let synced = partial::sync_note(dst, &partial.writer);
    plan.notes().iter().chain(&notes).chain(&synced).for_each(|note| progress.note(note));
    let start = resume::start(plan, &partial, identity, found, &|text| progress.note(&text))?;
    let (resumed_extents, resumed_read) = (start.done.len(), bytes_read(&start.done));
    let resumed_bytes: u64 = start.done.iter().map(|o| plan.layout.extents()[o.extent].stored_len).sum();
    progress.started(plan.extent_bytes(), resumed_bytes);
    let is_full = |error: ConvertError| error.or_full(dst);
    let execute::Finished { outcomes, parts } =
        execute::run(plan, &partial, start, measure, progress).map_err(is_full)?;
    let written: Vec<Written> = outcomes.iter().map(|o| o.written).collect();
    let metadata = plan.metadata(provenance::blob(plan, &outcomes, &parts), &parts);
    let published = partial.finish(plan, &written, &metadata).map_err(is_full)?;
    published.orphans.iter().for_each(|orphan| progress.note(orphan));
    let found = report::empty(plan, &parts).into_iter().chain(report::vanished(plan, &outcomes));
    found.for_each(|note| progress.note(&note));
    Ok(Summary {
        notes: remarks.said.into_inner().unwrap_or_else(PoisonError::into_inner),
        bytes_read: bytes_read(&outcomes).saturating_sub(resumed_read),
        bytes_written: plan.extent_bytes() - resumed_bytes,
        resumed_extents,
        restarted,
        ..Summary::of(plan, &outcomes, published)
    })
}

/// Finishes a conversion by this plan that was killed when the model file was complete and had its name: removes what lies beside it, and
/// says what it has ended in. `None`, and nothing has changed, if there is no such. `tokens`: those that are measured, if any are.
///
/// # Errors
/// [`ConvertError::Io`]: the folder cannot be synced, or what is left cannot be removed.
pub fn settle(plan: &Plan, dst: &Path, tokens: Option<&[u32]>) -> Result<Option<Summary>, ConvertError> {
    let (destination, identity) = (plan.destination(dst), partial::identity(plan, plan.hash_with(tokens)));
    let Some(settled) = settle::settled(destination, plan, identity) else { return Ok(None) };
    settle::sync_folders(destination)?;
    own::clear_all(dst, destination.striping.is_some())?;
    let settle::Settled { model, outcomes, parts } = settled;
    let published = partial::Published {
        model_id: model.superblock().model_id,
        file_bytes: model.file_bytes(),
        files: destination.targets(model.volumes().len()),
        orphans: Vec::new(),
    };
    let empty = parts.and_then(|parts| report::empty(plan, &parts));
    let done = "an earlier run was interrupted when the model file was complete: nothing is left to do".to_owned();
    let notes = [done].into_iter().chain(empty).chain(report::vanished(plan, &outcomes));
    Ok(Some(Summary {
        notes: notes.collect(),
        resumed_extents: outcomes.len(),
        ..Summary::of(plan, &outcomes, published)
    }))
}

/// Bytes of the source that these were made of. A journal is a file: what it says may be too much to add up.
fn bytes_read(outcomes: &[pack::Outcome]) -> u64 {
    outcomes.iter().fold(0, |sum: u64, o| sum.saturating_add(o.source_bytes))
}

//! Carrying out a plan: extents in file order over the threads, the journal behind them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_format::FileWriter;

use crate::Progress;
use crate::contents::Contents;
use crate::error::ConvertError;
use crate::journal::Journal;
use crate::layer_file::{self, LayerFile};
use crate::measure::{Inputs, Measure};
use crate::pack::{self, Outcome, Packer};
use crate::partial::Partial;
use crate::plan::Plan;
use crate::resume::{Start, is_possible};
use crate::states;
use crate::steps::{self, Step};

/// Finished extents are journaled in batches, because each batch waits for the drive: this many, …
const BATCH_EXTENTS: usize = 64;
/// … or this many bytes, …
const BATCH_BYTES: u64 = 256 << 20;
/// … or as many as came in this time. What is lost to an interruption is at most one batch.
const BATCH_TIME: Duration = Duration::from_secs(2);

/// Finished extents that are not in the journal yet.
struct Pending {
    outcomes: Vec<Outcome>,
    bytes: u64,
    since: Instant,
}

struct Execution<'a> {
    plan: &'a Plan,
    writer: &'a FileWriter,
    states_path: &'a Path,
    layer_path: &'a Path,
    progress: &'a dyn Progress,
    contents: &'a Contents<'a>,
    /// By extent.
    outcomes: Mutex<Vec<Option<Outcome>>>,
    pending: Mutex<Pending>,
    journal: Mutex<Journal>,
    /// How many extents that are not in the journal yet need each file of the source.
    needing: Vec<AtomicUsize>,
    /// Next position in the list of extents to do.
    next: AtomicUsize,
    failed: AtomicBool,
}

/// What a conversion has found out when all extents are written.
pub(crate) struct Finished {
    /// By extent.
    pub(crate) outcomes: Vec<Outcome>,
    /// Digests of the parts of the source.
    pub(crate) parts: Vec<u128>,
}

/// Writes all extents that are not done. Runs on the current rayon pool.
pub(crate) fn run(
    plan: &Plan,
    partial: &Partial,
    start: Start<'_>,
    mut measure: Option<&mut dyn Measure>,
    progress: &dyn Progress,
) -> Result<Finished, ConvertError> {
    let Start { journal, contents, done } = start;
    let mut outcomes = vec![None; plan.extents.len()];
    for outcome in done {
        let extent = outcome.extent;
        outcomes[extent] = Some(outcome);
    }
    let source = plan.checkpoint.source();
    let is_todo = |extent: usize| outcomes[extent].is_none();
    let is_unknown = |file: usize| !contents.is_file_whole(file);
    let steps = match &mut measure {
        None => steps::of(plan, &is_todo, &is_unknown),
        Some(measure) => {
            let note = |text: &str| progress.note(text);
            let from = states::go_on(plan, &partial.states_path, &outcomes, &mut **measure, &note)?;
            steps::measured(plan, from, &is_todo, &is_unknown)
        }
    };
    source.schedule(&steps::uses(plan, &steps));
    let execution = Execution {
        plan,
        writer: &partial.writer,
        states_path: &partial.states_path,
        layer_path: &partial.layer_path,
        progress,
        contents: &contents,
        outcomes: Mutex::new(outcomes),
        pending: Mutex::new(Pending { outcomes: Vec::new(), bytes: 0, since: Instant::now() }),
        journal: Mutex::new(journal),
        needing: steps::needing(plan, &steps),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    let results = execution.all(&steps, measure);
    // Extents that other threads finished before an error are journaled too: they need not be done again.
    let flushed = execution.flush();
    // Before any other error: what changes while it is read can look like anything.
    execution.check_source()?;
    results?;
    flushed?;
    contents.complete().or_else(|e| execution.check_source().and(Err(e)))?;
    // The last look: all that was read, by whichever run, is what the files hold.
    execution.check_source()?;
    let outcomes = execution.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes = outcomes.into_iter().map(|o| o.expect("every extent was done or is an error")).collect();
    Ok(Finished { outcomes, parts: contents.digests() })
}

impl Execution<'_> {
    /// Makes some extents; `inputs`: what has been measured of their layer.
    fn round(&self, steps: &[Step], inputs: Option<&dyn Inputs>) -> Result<(), ConvertError> {
        self.next.store(0, Ordering::Relaxed);
        if let Some(inputs) = inputs {
            let extents =
                steps.iter().filter_map(|step| if let Step::Extent(extent) = *step { Some(extent) } else { None });
            inputs.prepare(&extents.flat_map(|extent| pack::guided(self.plan, extent)).collect::<Vec<_>>());
        }
        // A shared counter instead of a parallel iterator: threads stay close together in the file, so that reads and writes
        // are nearly sequential, and each thread keeps its buffers.
        rayon::broadcast(|_| self.work(steps, inputs)).into_iter().collect()
    }

    /// Takes all steps. Those that measure stand alone, and what they find is for the extents behind them.
    fn all(&self, steps: &[Step], mut measure: Option<&mut dyn Measure>) -> Result<(), ConvertError> {
        let plan = self.plan;
        let mut inputs = None;
        for steps in steps.chunk_by(|a, b| !a.measures() && !b.measures()) {
            match (steps, &mut measure) {
                (&[Step::Embed], Some(measure)) => {
                    measure.begin(layer_file::embeddings(plan, self.contents, measure.tokens())?);
                }
                (&[Step::Measure(layer)], Some(measure)) => {
                    let path = self.layer_path.to_owned();
                    let file = LayerFile::write(plan, self.contents, layer, path).map_err(|e| match e {
                        // Of the type that it is measured in, which is not the one that was asked for.
                        ConvertError::TooLarge { .. } => ConvertError::Measure { layer, source: e.into() },
                        other => other,
                    })?;
                    let found = measure.layer(layer, file.path());
                    inputs = Some(found.map_err(|source| ConvertError::Measure { layer, source })?);
                }
                (&[Step::Keep(layer)], Some(measure)) => {
                    // What comes before the layer need not be made again: only then is it of use.
                    self.flush()?;
                    let outcomes = lock(&self.outcomes);
                    states::keep(plan, self.states_path, layer, &outcomes, &**measure, self.writer.syncer())?;
                }
                _ => {
                    self.round(steps, inputs.as_deref())?;
                    continue;
                }
            }
            steps::files_of(plan, steps[0]).into_iter().try_for_each(|file| self.done_with(file))?;
        }
        Ok(())
    }

    fn work(&self, steps: &[Step], inputs: Option<&dyn Inputs>) -> Result<(), ConvertError> {
        let mut packer = Packer::new(self.plan, self.contents);
        while !self.failed.load(Ordering::Relaxed) {
            let Some(&step) = steps.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            let result = match step {
                Step::Extent(extent) => {
                    let written = |bytes| self.progress.advanced(bytes);
                    let packed = packer.extent(extent, inputs, self.writer.extent(extent), &written);
                    packed.and_then(|outcome| self.finished(outcome))
                }
                Step::Rest(file) => self.done_with(file),
                Step::Embed | Step::Measure(_) | Step::Keep(_) => unreachable!("these stand alone"),
            };
            result.inspect_err(|_| self.failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn finished(&self, outcome: Outcome) -> Result<(), ConvertError> {
        debug_assert!(is_possible(self.plan, &outcome), "this would not be believed again: {outcome:?}");
        let extent = outcome.extent;
        let bytes = self.plan.layout.extents()[extent].stored_len;
        lock(&self.outcomes)[extent] = Some(outcome.clone());
        let full = {
            let mut pending = lock(&self.pending);
            pending.outcomes.push(outcome);
            pending.bytes += bytes;
            pending.outcomes.len() >= BATCH_EXTENTS
                || pending.bytes >= BATCH_BYTES
                || pending.since.elapsed() >= BATCH_TIME
        };
        if full {
            self.flush()?;
        }
        self.plan.files_of(extent).into_iter().try_for_each(|file| self.done_with(file))
    }

    /// Fails if the source is not what it was when it was opened.
    fn check_source(&self) -> Result<(), ConvertError> {
        let checkpoint = &self.plan.checkpoint;
        checkpoint.check_unchanged()?;
        self.contents.torn().map_or(Ok(()), |file| Err(checkpoint.changed(file)))
    }

    /// Syncs the data of all pending extents, then journals them. Other threads go on meanwhile.
    fn flush(&self) -> Result<(), ConvertError> {
        let mut journal = lock(&self.journal);
        // Before the extents are taken: a part that became known later belongs to the next batch, whose source is looked at
        // again.
        let parts = self.contents.take_news();
        let outcomes = {
            let mut pending = lock(&self.pending);
            pending.bytes = 0;
            pending.since = Instant::now();
            std::mem::take(&mut pending.outcomes)
        };
        if outcomes.is_empty() && parts.is_empty() {
            return Ok(());
        }
        // All bytes that these were made of have been read: if the source is still what it was, they were its bytes, and the
        // journal, which names this identity, may say so. Else they are not journaled.
        self.check_source()?;
        let syncer = self.writer.syncer();
        self.writer
            .files()
            .try_for_each(|(path, file)| syncer.data(file).map_err(ConvertError::io(path, "sync it")))?;
        journal.append(&outcomes, &parts)
    }

    /// One step less needs a file. The last one releases it, once the digest of all of it is known, and the journal says so:
    /// another run has no need of it either.
    fn done_with(&self, file: usize) -> Result<(), ConvertError> {
        if self.needing[file].fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(());
        }
        if !self.plan.checkpoint.source().is_fetched() {
            // What is here stays here, and what is missing of its digest is read by all threads at the end.
            return Ok(());
        }
        self.contents.complete_file(file)?;
        self.flush()?;
        self.plan.checkpoint.source().release(file);
        Ok(())
    }
}

/// A thread that panicked has left these lists whole: every change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

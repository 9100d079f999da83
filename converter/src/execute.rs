//! Carrying out a plan: extents in file order over the threads, the journal behind them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_format::{FileWriter, FormatError};

use crate::Progress;
use crate::contents::Contents;
use crate::error::ConvertError;
use crate::journal::Journal;
use crate::pack::{Outcome, Packer};
use crate::partial::Partial;
use crate::plan::Plan;
use crate::resume::{Start, is_possible};

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
    progress: &'a dyn Progress,
    contents: &'a Contents<'a>,
    /// By extent.
    outcomes: Mutex<Vec<Option<Outcome>>>,
    pending: Mutex<Pending>,
    journal: Mutex<Journal>,
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
    progress: &dyn Progress,
) -> Result<Finished, ConvertError> {
    let Start { journal, contents, done } = start;
    let mut outcomes = vec![None; plan.extents.len()];
    for outcome in done {
        let extent = outcome.extent;
        outcomes[extent] = Some(outcome);
    }
    let todo: Vec<usize> = (0..outcomes.len()).filter(|&i| outcomes[i].is_none()).collect();
    let execution = Execution {
        plan,
        writer: &partial.writer,
        progress,
        contents: &contents,
        outcomes: Mutex::new(outcomes),
        pending: Mutex::new(Pending { outcomes: Vec::new(), bytes: 0, since: Instant::now() }),
        journal: Mutex::new(journal),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    // A shared counter instead of a parallel iterator: threads stay close together in the file, so that reads and writes
    // are nearly sequential, and each thread keeps its buffers.
    let results = rayon::broadcast(|_| execution.work(&todo));
    // Extents that other threads finished before an error are journaled too: they need not be done again.
    let flushed = execution.flush();
    // Before any other error: what changes while it is read can look like anything.
    execution.check_source()?;
    first_cause(results)?;
    flushed?;
    contents.complete().or_else(|e| execution.check_source().and(Err(e)))?;
    // The last look: all that was read, by whichever run, is what the files hold.
    execution.check_source()?;
    let outcomes = execution.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes = outcomes.into_iter().map(|o| o.expect("every extent was done or is an error")).collect();
    Ok(Finished { outcomes, parts: contents.digests() })
}

/// Why the work has ended: not that an extent has waited in vain for another one, but what was wrong with that.
pub(crate) fn first_cause(results: Vec<Result<(), ConvertError>>) -> Result<(), ConvertError> {
    let is_cause = |error: &ConvertError| !matches!(error, ConvertError::Format(FormatError::Abandoned { .. }));
    let mut errors: Vec<ConvertError> = results.into_iter().filter_map(Result::err).collect();
    let cause = errors.iter().position(is_cause).unwrap_or(0);
    if errors.is_empty() { Ok(()) } else { Err(errors.swap_remove(cause)) }
}

impl Execution<'_> {
    fn work(&self, todo: &[usize]) -> Result<(), ConvertError> {
        let mut packer = Packer::new(self.plan, self.contents);
        while !self.failed.load(Ordering::Relaxed) {
            let Some(&extent) = todo.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            let written = |bytes| self.progress.advanced(bytes);
            let result = packer.extent(extent, self.writer.extent(extent), &written);
            result.and_then(|outcome| self.finished(outcome)).inspect_err(|_| {
                self.failed.store(true, Ordering::Relaxed);
            })?;
        }
        Ok(())
    }

    fn finished(&self, outcome: Outcome) -> Result<(), ConvertError> {
        debug_assert!(is_possible(self.plan, &outcome), "this would not be believed again: {outcome:?}");
        let bytes = self.plan.layout.extents()[outcome.extent].stored_len;
        lock(&self.outcomes)[outcome.extent] = Some(outcome.clone());
        let full = {
            let mut pending = lock(&self.pending);
            pending.outcomes.push(outcome);
            pending.bytes += bytes;
            pending.outcomes.len() >= BATCH_EXTENTS
                || pending.bytes >= BATCH_BYTES
                || pending.since.elapsed() >= BATCH_TIME
        };
        if full { self.flush() } else { Ok(()) }
    }

    /// Extents from the first on, up to here, are written; or all, where the place of an extent does not depend on others.
    fn known_places(&self) -> usize {
        if !self.writer.compresses() {
            return usize::MAX;
        }
        lock(&self.outcomes).iter().position(Option::is_none).unwrap_or(usize::MAX)
    }

    /// Fails if the source is not what it was when it was opened.
    fn check_source(&self) -> Result<(), ConvertError> {
        let checkpoint = &self.plan.checkpoint;
        checkpoint.check_unchanged()?;
        self.contents.torn().map_or(Ok(()), |file| Err(checkpoint.changed(&checkpoint.files[file])))
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
            let all = std::mem::take(&mut pending.outcomes);
            // In a compressed file the place of an extent follows from all before it: the journal has none without those.
            let known = self.known_places();
            let (ready, early) = all.into_iter().partition(|outcome| outcome.extent < known);
            pending.outcomes = early;
            ready
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
}

/// A thread that panicked has left these lists whole: every change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

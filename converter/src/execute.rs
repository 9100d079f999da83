//! Carrying out a plan: extents in file order over the threads, the journal behind them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_format::FileWriter;

use crate::Progress;
use crate::error::ConvertError;
use crate::journal::Journal;
use crate::pack::{Outcome, Packer};
use crate::partial::Partial;
use crate::plan::Plan;

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
    /// Of the partial file, for messages.
    path: &'a Path,
    progress: &'a dyn Progress,
    /// By extent.
    outcomes: Mutex<Vec<Option<Outcome>>>,
    pending: Mutex<Pending>,
    journal: Mutex<Journal>,
    /// Next position in the list of extents to do.
    next: AtomicUsize,
    failed: AtomicBool,
}

/// Writes all extents that `done` does not list; returns the outcomes of all. Runs on the current rayon pool.
pub(crate) fn run(
    plan: &Plan,
    partial: &Partial,
    journal: Journal,
    done: Vec<Outcome>,
    progress: &dyn Progress,
) -> Result<Vec<Outcome>, ConvertError> {
    let mut outcomes = vec![None; plan.extents.len()];
    for outcome in done {
        let extent = outcome.extent;
        outcomes[extent] = Some(outcome);
    }
    let todo: Vec<usize> = (0..outcomes.len()).filter(|&i| outcomes[i].is_none()).collect();
    let execution = Execution {
        plan,
        writer: &partial.writer,
        path: &partial.path,
        progress,
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
    results.into_iter().collect::<Result<(), _>>()?;
    flushed?;
    let outcomes = execution.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(outcomes.into_iter().map(|o| o.expect("every extent was done or is an error")).collect())
}

impl Execution<'_> {
    fn work(&self, todo: &[usize]) -> Result<(), ConvertError> {
        let mut packer = Packer::new(self.plan);
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

    /// Syncs the data of all pending extents, then journals them. Other threads go on meanwhile.
    fn flush(&self) -> Result<(), ConvertError> {
        let mut journal = lock(&self.journal);
        let outcomes = {
            let mut pending = lock(&self.pending);
            pending.bytes = 0;
            pending.since = Instant::now();
            std::mem::take(&mut pending.outcomes)
        };
        if outcomes.is_empty() {
            return Ok(());
        }
        self.writer.file().sync_data().map_err(ConvertError::io(self.path, "sync it"))?;
        journal.append(&outcomes).map_err(ConvertError::io(self.path, "write its journal"))
    }
}

/// A thread that panicked has left these lists whole: every change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

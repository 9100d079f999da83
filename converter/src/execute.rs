//! Carrying out a plan: extents in file order over the threads, the journal behind them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_format::{ExtentKind, FileWriter};

use crate::Progress;
use crate::contents::Contents;
use crate::error::ConvertError;
use crate::journal::Journal;
use crate::layer_file::{self, LayerFile};
use crate::measure::{Inputs, Measure};
use crate::pack::{Outcome, Packer};
use crate::partial::{Partial, with_suffix};
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
    /// Of the partial file, for messages.
    path: &'a Path,
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
    measure: Option<&mut dyn Measure>,
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
        path: &partial.path,
        progress,
        contents: &contents,
        outcomes: Mutex::new(outcomes),
        pending: Mutex::new(Pending { outcomes: Vec::new(), bytes: 0, since: Instant::now() }),
        journal: Mutex::new(journal),
        needing: needing(plan, &todo),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    // What an earlier run has finished with need not be fetched again. Where something is missing, it waits until the end.
    let release = |file: usize| plan.checkpoint.source().release(file);
    let idle = (0..execution.needing.len()).filter(|&file| execution.needing[file].load(Ordering::Relaxed) == 0);
    let (whole, rest): (Vec<usize>, Vec<usize>) = idle.partition(|&file| contents.is_file_whole(file));
    whole.into_iter().for_each(release);
    let results = match measure {
        None => execution.round(&todo, None),
        Some(measure) => execution.measured(&todo, measure),
    };
    // Extents that other threads finished before an error are journaled too: they need not be done again.
    let flushed = execution.flush();
    // Before any other error: what changes while it is read can look like anything.
    execution.check_source()?;
    results?;
    flushed?;
    contents.complete().or_else(|e| execution.check_source().and(Err(e)))?;
    rest.into_iter().for_each(release);
    // The last look: all that was read, by whichever run, is what the files hold.
    execution.check_source()?;
    let outcomes = execution.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes = outcomes.into_iter().map(|o| o.expect("every extent was done or is an error")).collect();
    Ok(Finished { outcomes, parts: contents.digests() })
}

/// How many of the extents `todo` need each file of the source.
fn needing(plan: &Plan, todo: &[usize]) -> Vec<AtomicUsize> {
    let mut counts = vec![0; plan.checkpoint.files().len()];
    todo.iter().flat_map(|&extent| plan.files_of(extent)).for_each(|file| counts[file] += 1);
    counts.into_iter().map(AtomicUsize::new).collect()
}

impl Execution<'_> {
    /// Makes some extents; `inputs`: what has been measured of their layer.
    fn round(&self, todo: &[usize], inputs: Option<&dyn Inputs>) -> Result<(), ConvertError> {
        self.next.store(0, Ordering::Relaxed);
        // A shared counter instead of a parallel iterator: threads stay close together in the file, so that reads and writes
        // are nearly sequential, and each thread keeps its buffers.
        rayon::broadcast(|_| self.work(todo, inputs)).into_iter().collect()
    }

    /// Makes extents layer by layer, each layer once it has been measured. The last layer's inputs are those of the head too.
    fn measured(&self, todo: &[usize], measure: &mut dyn Measure) -> Result<(), ConvertError> {
        let (plan, layers) = (self.plan, self.plan.spec.layers.len());
        // Of each layer; before all of them comes what meets no input.
        let mut rounds = vec![Vec::new(); layers + 1];
        for &extent in todo {
            let record = &plan.layout.extents()[extent];
            rounds[match record.kind {
                ExtentKind::Embedding | ExtentKind::FinalNorm => 0,
                ExtentKind::Head => layers,
                _ => record.layer as usize + 1,
            }]
            .push(extent);
        }
        // What an earlier run has finished with need not be measured again, but for the states that later layers see.
        let Some(last) = rounds.iter().rposition(|round| !round.is_empty()) else { return Ok(()) };
        self.round(&rounds[0], None)?;
        if last > 0 {
            measure.begin(layer_file::embeddings(plan, self.contents, measure.tokens())?);
        }
        for layer in 0..last {
            let path = with_suffix(self.path, ".layer");
            let file = LayerFile::write(plan, self.contents, layer, path)?;
            let inputs = measure.layer(layer, file.path());
            let inputs = inputs.map_err(|source| ConvertError::Measure { layer, source })?;
            drop(file);
            self.round(&rounds[layer + 1], Some(&*inputs))?;
        }
        Ok(())
    }

    fn work(&self, todo: &[usize], inputs: Option<&dyn Inputs>) -> Result<(), ConvertError> {
        let mut packer = Packer::new(self.plan, self.contents);
        while !self.failed.load(Ordering::Relaxed) {
            let Some(&extent) = todo.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            let written = |bytes| self.progress.advanced(bytes);
            let result = packer.extent(extent, inputs, self.writer.extent(extent), &written);
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
        syncer.data(self.writer.file()).map_err(ConvertError::io(self.path, "sync it"))?;
        journal.append(&outcomes, &parts)?;
        drop(journal);
        outcomes.iter().flat_map(|o| self.plan.files_of(o.extent)).try_for_each(|file| self.done_with(file))
    }

    /// One extent less needs a file. The last one releases it, once the digest of all of it is known.
    fn done_with(&self, file: usize) -> Result<(), ConvertError> {
        if self.needing[file].fetch_sub(1, Ordering::Relaxed) > 1 {
            return Ok(());
        }
        self.contents.complete_file(file)?;
        let parts = self.contents.take_news();
        self.check_source()?;
        lock(&self.journal).append(&[], &parts)?;
        self.plan.checkpoint.source().release(file);
        Ok(())
    }
}

/// A thread that panicked has left these lists whole: every change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

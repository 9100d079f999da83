//! Who gets pages: admission, and saving the youngest when they run out.
//!
//! Generations are admitted in order of arrival, when there are pages for their prompt, for what the others have yet to read, and
//! for some tokens of each. What they generate beyond that can exhaust the pages. Then the youngest is saved: its sequence goes, to
//! a file or for good, and what it was about to say stays with its generation. It is the first to be admitted again. The oldest
//! is never saved, so there is always one that goes on; and whoever is admitted has room for some tokens, so that everyone does.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_model::engine::{Engine, RuntimeError};
use sluice_model::{ModelError, Sequence};

use super::Generation;
use super::scheduler::{Running, Scheduler};
use super::shared::{Arrival, Owner, Place};

/// Tokens of each that there must be pages for when one more is admitted: those who are saved and read again too often cost more
/// than they give.
const AHEAD: usize = 64;

/// A generation that has no sequence for the time being.
pub(super) struct Saved {
    pub(super) id: u64,
    pub(super) generation: Generation,
    pub(super) owner: Owner,
    reported: usize,
    file: Option<SavedSequence>,
}

/// A sequence in a file of its own, which goes with this.
struct SavedSequence {
    path: PathBuf,
    /// What it holds. Programs on two machines, or in two containers, can have the same number, and the folder in common.
    tokens: Vec<u32>,
}

impl SavedSequence {
    /// `None` where it cannot be saved: it is read again then.
    fn new(sequence: &Sequence, folder: &Path) -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("sluice-{}-{number}.session", std::process::id()));
        let saved = SavedSequence { path, tokens: sequence.tokens().to_vec() };
        sequence.save_file(&saved.path).is_ok().then_some(saved)
    }

    /// `None` where it cannot be read, or is another one by now: the tokens are there to be read again.
    fn restore(&self, engine: &Engine) -> Option<Sequence> {
        engine.restore_file(&self.path).ok().filter(|sequence| sequence.tokens() == self.tokens)
    }
}

impl Drop for SavedSequence {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) fn is_pages_full(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::Model(ModelError::PagesFull(_)))
}

impl Scheduler {
    /// Gives sequences to those who have waited longest: first to those who had one before.
    pub(super) fn admit(&mut self, engine: &Engine) {
        let most = self.options.running.unwrap_or(usize::MAX).min(engine.memory().rows).max(1);
        while self.running.len() < most {
            let next = match self.saved.first() {
                Some(saved) => Some(wants(&saved.generation, 0)),
                None => self.shared.lock().queue.front().map(|arrival| wants(&arrival.generation, 0)),
            };
            let Some(tokens) = next else { break };
            // Who is alone gets what there is, and hears if that is not enough.
            if !self.running.is_empty() && !self.has_room(engine, tokens) {
                break;
            }
            match self.saved.is_empty() {
                true => self.begin(engine),
                false => self.resume(engine),
            }
        }
    }

    /// Whether there are pages for one more that wants so many tokens, beside what those have yet to take who are there.
    fn has_room(&mut self, engine: &Engine, tokens: usize) -> bool {
        let empty = &*self.spare.get_or_insert_with(|| engine.new_sequence());
        let limit = |sequence: &Sequence, n: usize| n.min(sequence.capacity() - sequence.position());
        let running = self.running.iter().filter(|r| !r.is_over());
        let running = running.map(|r| (&r.sequence, limit(&r.sequence, wants(&r.generation, r.sequence.position()))));
        engine.room_for(running.chain([(empty, limit(empty, tokens))])).is_ok()
    }

    /// Admits the head of the queue.
    fn begin(&mut self, engine: &Engine) {
        let mut state = self.shared.lock();
        let Some(Arrival { id, generation, owner }) = state.queue.pop_front() else { return };
        state.places.insert(id, Place::Reading { read: 0, prompt: generation.usage().prompt_tokens });
        drop(state);
        let sequence = self.spare.take().unwrap_or_else(|| engine.new_sequence());
        let (events, reported, failed) = (Vec::new(), 0, false);
        self.running.push(Running { id, generation, sequence, owner, events, reported, failed });
    }

    /// Admits the oldest of those who were saved.
    fn resume(&mut self, engine: &Engine) {
        let Saved { id, generation, owner, reported, file } = self.saved.remove(0);
        let restored = file.and_then(|file| file.restore(engine));
        let sequence = restored.unwrap_or_else(|| engine.new_sequence());
        let running = Running { id, generation, sequence, owner, events: Vec::new(), reported, failed: false };
        let place = self.running.partition_point(|other| other.id < id);
        self.running.insert(place, running);
    }

    /// A step did not find the pages that it needs: makes the youngest give theirs back. The last one has nobody to wait for: it has
    /// the context that there are pages for.
    pub(super) fn give_way(&mut self, error: RuntimeError) {
        for over in self.running.iter_mut().filter(|r| r.is_over()) {
            over.sequence.clear();
        }
        let alive = self.running.iter().filter(|r| !r.is_over()).count();
        let Some(youngest) = self.running.iter().rposition(|r| !r.is_over()) else { return };
        if alive == 1 {
            self.running[youngest].fill(error);
            return;
        }
        let Running { id, generation, sequence, mut owner, events, reported, .. } = self.running.remove(youngest);
        let file = self.options.spill.as_deref().and_then(|folder| SavedSequence::new(&sequence, folder));
        drop(sequence);
        self.preemptions += 1;
        let flow = events.into_iter().try_for_each(&mut owner);
        let mut state = self.shared.lock();
        state.places.insert(id, Place::Saved { generated: generation.generated().len() });
        if flow.is_break() {
            state.cancelled.insert(id);
        }
        drop(state);
        let place = self.saved.partition_point(|other| other.id < id);
        self.saved.insert(place, Saved { id, generation, owner, reported, file });
    }
}

/// Tokens that a sequence of this generation at `position` is to take before anyone else is admitted.
fn wants(generation: &Generation, position: usize) -> usize {
    generation.len().saturating_sub(position) + generation.remaining().min(AHEAD)
}

impl Running {
    /// Nobody else has pages, and there are none: as if the context were full. One that has generated nothing hears why.
    fn fill(&mut self, error: RuntimeError) {
        if self.generation.generated().is_empty() {
            self.fail(error.into());
            return;
        }
        if let Err(error) = self.generation.fill(&mut |event| self.events.push(event)) {
            self.fail(error);
        }
    }
}

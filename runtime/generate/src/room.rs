//! Who gets pages: admission, and saving the youngest when they run out.
//!
//! Generations are admitted in order of arrival, once there are pages for the prompt, for what the others have yet to read, and
//! for some more tokens of each. Tokens beyond that can exhaust the pages. Then the youngest is saved: its tokens and its sampler
//! stay in memory, and its sequence is written to a file or dropped. It is admitted again before everyone in the queue. The oldest
//! is never saved, so one always goes on; and each that is admitted has room for some tokens, so all of them do.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_model::engine::{Engine, RuntimeError};
use sluice_model::{ModelError, Sequence};

use super::Generation;
use super::scheduler::{Running, Scheduler};
use super::shared::{Arrival, Owner, Place};

/// For how many more tokens of each generation there must be pages when another one is admitted. With fewer, generations would be
/// saved and restored more often than is worth it.
const AHEAD: usize = 64;

/// A generation that has been saved and has no sequence until it is admitted again.
pub(super) struct Saved {
    pub(super) id: u64,
    pub(super) generation: Generation,
    pub(super) owner: Owner,
    reported: usize,
    file: Option<SavedSequence>,
}

/// A sequence in a file of its own. Dropping this deletes the file.
struct SavedSequence {
    path: PathBuf,
    /// The tokens that it holds. Two programs in different containers can have the same process id and share the folder, so a
    /// file is only used if these agree.
    tokens: Vec<u32>,
}

impl SavedSequence {
    /// `None` if it cannot be saved; its tokens are then read again.
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
    /// Admits as many generations as there is room for: first those that were saved, then the queue, each in order of arrival.
    pub(super) fn admit(&mut self, engine: &Engine) {
        let most = self.options.running.unwrap_or(usize::MAX).min(engine.memory().rows).max(1);
        while self.running.len() < most {
            let next = match self.saved.first() {
                Some(saved) => Some(wants(&saved.generation, 0)),
                None => self.shared.lock().queue.front().map(|arrival| wants(&arrival.generation, 0)),
            };
            let Some(tokens) = next else { break };
            // With nothing else running, waiting would not help: it starts with the pages there are, and fails if those are too few.
            if !self.running.is_empty() && !self.has_room(engine, tokens) {
                break;
            }
            match self.saved.is_empty() {
                true => self.begin(engine),
                false => self.resume(engine),
            }
        }
    }

    /// Whether there are pages for another generation that wants `tokens` tokens, besides what the running ones have yet to take.
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

    /// Admits the oldest of the saved generations.
    fn resume(&mut self, engine: &Engine) {
        let Saved { id, generation, owner, reported, file } = self.saved.remove(0);
        let restored = file.and_then(|file| file.restore(engine));
        let sequence = restored.unwrap_or_else(|| engine.new_sequence());
        let running = Running { id, generation, sequence, owner, events: Vec::new(), reported, failed: false };
        let place = self.running.partition_point(|other| other.id < id);
        self.running.insert(place, running);
    }

    /// A step did not find the pages that it needs: the youngest generation gives its pages back. If only one is left, its context
    /// is as long as there are pages for.
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

/// Tokens that a generation with its sequence at `position` must have room for before another one is admitted.
fn wants(generation: &Generation, position: usize) -> usize {
    generation.len().saturating_sub(position) + generation.remaining().min(AHEAD)
}

impl Running {
    /// The only generation left finds no pages: its context counts as full. If it has generated nothing yet, it fails with `error`.
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

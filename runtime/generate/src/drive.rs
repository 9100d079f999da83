//! Sequences on the drive: sequences of ended generations are written there, and read again after a restart or when memory no
//! longer has them.

use std::sync::Arc;

use sluice_model::session::Binding;
use sluice_model::{Engine, PAGE_TOKENS, Sequence};
use sluice_sessions::{Found, Store};

use super::kept::FEWEST;
use super::scheduler::{Running, Scheduler};

/// The store of one model's sequences.
pub(super) struct Drive {
    store: Arc<Store>,
    binding: Binding,
    /// New tokens of a running generation after which it is saved.
    every: usize,
}

impl Drive {
    pub(super) fn new(engine: &Engine, store: Arc<Store>, every: usize) -> Self {
        Drive { store, binding: engine.binding(), every: every.max(PAGE_TOKENS) }
    }

    /// The stored sequence for a prompt, if it has enough more than the `reached` tokens in memory to be worth reading.
    pub(super) fn find(&self, tokens: &[u32], reached: usize) -> Option<Found> {
        let (_, but_last) = tokens.split_last()?;
        // Where memory has nothing, a few tokens already save a pass through the whole model, with all experts that they choose.
        let least = if reached == 0 { FEWEST } else { reached + PAGE_TOKENS };
        self.store.longest(self.binding, but_last).filter(|found| found.position() >= least)
    }

    /// Reads the sequence that was found. `None` if it cannot be read or has another text; then the prompt is read again.
    pub(super) fn restore(&self, engine: &Engine, found: &Found, tokens: &[u32]) -> Option<Sequence> {
        let restored = self.store.restore(engine, found).ok()?;
        (restored.position() < tokens.len() && tokens.starts_with(restored.phased())).then_some(restored)
    }

    /// Saves a sequence, on another thread.
    pub(super) fn keep(&self, sequence: &Sequence, title: Option<&str>) {
        if sequence.position() >= FEWEST {
            self.store.keep(sequence.fork(), title);
        }
    }

    /// Records that a stored sequence was useful, although it was in memory.
    fn touch(&self, tokens: &[u32]) {
        self.store.touch(self.binding, tokens);
    }

    /// The tokens of sessions that were deleted since the last call.
    fn take_deleted(&self) -> Vec<Vec<u32>> {
        self.store.take_deleted(self.binding)
    }

    /// Whether sequences are waiting to be written. They keep their pages until then.
    fn is_writing(&self) -> bool {
        self.store.usage().waiting > 0
    }

    /// Waits until every waiting sequence is written.
    pub(super) fn flush(&self) {
        self.store.flush();
    }

    /// Waits until everything is written, including these sequences. If many came at once, some may have been left out.
    fn settle<'a>(&self, kept: impl Iterator<Item = &'a Sequence>) {
        self.store.flush();
        for sequence in kept {
            let stored = self.store.longest(self.binding, sequence.phased()).map_or(0, |found| found.position());
            if stored < sequence.position() {
                self.store.keep(sequence.fork(), None);
                self.store.flush();
            }
        }
    }

    /// Saves a generation that is still running, if much of it is new, so that little is lost when the program is killed.
    fn save(&self, running: &mut Running) {
        let usage = running.generation.usage();
        let position = running.sequence.position();
        running.saved = running.saved.min(position);
        let prompt_is_long = usage.prompt_tokens - usage.cached_tokens >= self.every;
        let has_read = prompt_is_long && running.saved < usage.prompt_tokens && position >= usage.prompt_tokens;
        if position - running.saved >= self.every || has_read {
            running.saved = position;
            self.keep(&running.sequence, running.generation.keeps().1);
        }
    }
}

impl Scheduler {
    /// Saves the running generations with many new tokens.
    pub(super) fn save_running(&mut self) {
        let Some(drive) = &self.drive else { return };
        for running in self.running.iter_mut().filter(|r| !r.is_over() && r.follows.is_none()) {
            if running.generation.keeps().0 {
                drive.save(running);
            }
        }
    }

    /// Records the use of a stored sequence when a generation has begun after tokens that were in memory.
    pub(super) fn touch_stored(&self, running: &Running) {
        if let Some(drive) = &self.drive
            && running.sequence.position() >= FEWEST
        {
            drive.touch(running.sequence.phased());
        }
    }

    /// Whether sequences that are being written hold pages.
    pub(super) fn is_writing(&self) -> bool {
        self.drive.as_ref().is_some_and(Drive::is_writing)
    }

    /// Gives up the kept sequences, and their memory. If there is a store, all of them are written first.
    pub fn release_kept(&mut self) {
        self.settle();
        self.kept.clear();
        self.shared.lock().kept = (0, 0);
    }

    /// Gives up kept sequences of sessions that were deleted.
    pub(super) fn forget_deleted(&mut self) {
        let deleted = self.drive.as_ref().map(Drive::take_deleted).unwrap_or_default();
        if !deleted.is_empty() {
            // If a sequence has given up its last tokens, only the first remain.
            let is_of = |tokens: &[u32], text: &Vec<u32>| tokens.starts_with(text) || text.starts_with(tokens);
            self.kept.forget(|tokens| deleted.iter().any(|text| is_of(tokens, text)));
        }
    }

    /// Waits until the sequences that are kept are all written, if there is a store that is to have them.
    pub(super) fn settle(&mut self) {
        self.forget_deleted();
        match &self.drive {
            Some(drive) if self.options.save_ended => drive.settle(self.kept.sequences()),
            Some(drive) => drive.flush(),
            None => {}
        }
    }
}

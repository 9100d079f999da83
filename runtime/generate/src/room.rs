//! Distribution of pages: admission, and saving the youngest generations when pages run out.
//!
//! Generations are admitted in order of arrival, once there are pages for the prompt, for what the others have yet to read, and for
//! some more tokens of each. Tokens beyond that can exhaust the pages. Then the youngest generation is saved: its tokens and its
//! sampler stay in memory, and its sequence is written to a file or dropped. It is admitted again before everything in the queue.
//! The oldest is never saved, so one always continues; and each admitted generation has room for some tokens, so all of them make
//! progress.
//!
//! Generations in the background count as younger than all others, and a generation that somebody is waiting for replaces the
//! youngest of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_model::engine::{Engine, RuntimeError};
use sluice_model::{ModelError, PAGE_TOKENS, PagesFull, Sequence};

use super::Generation;
use super::guard::tell;
use super::proposing::Ahead;
use super::scheduler::{Running, Scheduler};
use super::shared::{Arrival, Owner, Place, is_background};
use super::start::Start;

/// Number of additional tokens for which each generation must have pages when another one is admitted. With fewer, generations
/// would be saved and restored too often to be worth it.
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
    /// The tokens that it holds, with their phases. Two programs in different containers can have the same process id and share the folder, so a
    /// file is only used if these agree.
    tokens: Vec<u32>,
}

impl SavedSequence {
    /// `None` if it cannot be saved; then its tokens are read again.
    fn new(sequence: &Sequence, folder: &Path) -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("sluice-{}-{number}.session", std::process::id()));
        let saved = SavedSequence { path, tokens: sequence.phased().to_vec() };
        sequence.save_file(&saved.path).is_ok().then_some(saved)
    }

    /// `None` if the file cannot be read, or has become another one; then the tokens are read again.
    fn restore(&self, engine: &Engine) -> Option<Sequence> {
        engine.restore_file(&self.path).ok().filter(|sequence| sequence.phased() == self.tokens)
    }
}

impl Drop for SavedSequence {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) fn pages_full(error: &RuntimeError) -> Option<PagesFull> {
    if let RuntimeError::Model(ModelError::PagesFull(full)) = error { Some(*full) } else { None }
}

/// The generation that will be admitted next.
struct Next {
    id: u64,
    tokens: Arc<[u32]>,
    /// Additional tokens that it must have room for.
    ahead: usize,
    /// Whether it starts with an empty sequence: its own is in a file, or the whole prompt has to be computed.
    anew: bool,
    /// Whether it was saved, and is not in the queue.
    saved: bool,
}

impl Scheduler {
    /// Admits as many generations as there is room for: first those that were saved, then the queue, each in order of arrival.
    pub(super) fn admit(&mut self, engine: &Engine) {
        let most = self.options.running.unwrap_or(usize::MAX).min(engine.memory().rows).max(1);
        while let Some(next) = self.next() {
            if self.running.len() >= most && !self.yields_to(next.id) {
                break;
            }
            let start = match next.anew {
                true => Start::With(engine.new_sequence()),
                false => self.start(engine, next.id, &next.tokens, true),
            };
            let (sequence, follows, stored) = match start {
                Start::With(sequence) => (sequence, None, None),
                Start::Behind(follows) => (engine.new_sequence(), Some(follows), None),
                Start::Stored(found) => (engine.new_sequence(), None, Some(found)),
            };
            // The page within which the two diverge is copied.
            let more = if follows.is_some() { PAGE_TOKENS } else { 0 };
            let position = follows.map_or(sequence.position(), |follows| follows.position);
            let tokens = next.tokens.len() - position + next.ahead + more;
            // With nothing else running, waiting would not help: it starts with the pages that there are, and fails if those are
            // too few.
            if !self.make_room(engine, &sequence, tokens) && !self.running.is_empty() {
                match sequence.position() {
                    0 => self.spare = Some(sequence),
                    // The sequence from which it continues may have given up the rest meanwhile.
                    _ => self.kept.insert(sequence),
                }
                match self.yields_to(next.id) {
                    true => continue,
                    false => break,
                }
            }
            let at = match next.saved {
                false => self.begin(next.id, sequence),
                true => self.resume(engine, sequence),
            };
            let Some(at) = at else { break };
            self.running[at].follows = follows;
            self.next = None;
            if let Some(found) = stored {
                self.restore(engine, at, &found, &next.tokens);
            }
            self.begun(at);
        }
    }

    /// The generation that will be admitted next.
    fn next(&mut self) -> Option<Next> {
        let of = |id, generation: &Generation, tokens: Arc<[u32]>, in_file, saved| {
            let anew = in_file || generation.scores_prompt();
            // One that already ended with what an earlier run sampled needs no pages.
            let (tokens, ahead) = match generation.finish() {
                Some(_) => (Arc::default(), 0),
                None => (tokens, generation.remaining().min(AHEAD)),
            };
            Some(Next { id, tokens, ahead, anew, saved })
        };
        let state = self.shared.lock();
        let queued = state.queue.front().map(|arrival| arrival.id);
        // Saved generations arrived earlier than queued ones, except those in the background.
        if let Some(saved) = self.saved.first().filter(|saved| queued.is_none_or(|queued| saved.id < queued)) {
            return of(saved.id, &saved.generation, saved.generation.phased().into(), saved.file.is_some(), true);
        }
        let Arrival { id, generation, .. } = state.queue.front()?;
        // It can wait for many turns.
        if self.next.as_ref().is_none_or(|next| next.0 != *id) {
            self.next = Some((*id, generation.phased().into()));
        }
        of(*id, generation, Arc::clone(&self.next.as_ref()?.1), false, false)
    }

    /// Whether there are pages for another generation that wants `tokens` more tokens than `sequence` has, besides the pages that
    /// running generations have yet to take. Kept sequences give up pages for that.
    fn make_room(&mut self, engine: &Engine, sequence: &Sequence, tokens: usize) -> bool {
        let limit = |sequence: &Sequence, n: usize| n.min(sequence.capacity() - sequence.position());
        loop {
            let running = self.running.iter().filter(|r| !r.is_over());
            let running = running.map(|r| (&r.sequence, limit(&r.sequence, r.wants())));
            match engine.room_for(running.chain([(sequence, limit(sequence, tokens))])) {
                Ok(()) => return true,
                Err(full) if self.shed(&full, !self.running.is_empty()) => {}
                Err(_) => return false,
            }
        }
    }

    /// Frees pages for a step that lacks them: first kept sequences give theirs up, then proposals are left out, then marks are
    /// given up. False if none of these are left.
    pub(super) fn find_pages(&mut self, full: &PagesFull) -> bool {
        if self.shed(full, false) || std::mem::take(&mut self.drafts) {
            return true;
        }
        let keeps_marks = full.kind.forgets();
        keeps_marks && self.running.iter_mut().rev().any(Running::unmark)
    }

    /// Admits one from the queue, where others may have arrived before it meanwhile. Returns its place among the running
    /// generations.
    fn begin(&mut self, id: u64, sequence: Sequence) -> Option<usize> {
        let mut state = self.shared.lock();
        let at = state.queue.binary_search_by_key(&id, |arrival| arrival.id).ok()?;
        let Arrival { id, mut generation, owner } = state.queue.remove(at)?;
        state.places.insert(id, Place::Reading { read: 0, prompt: generation.usage().prompt_tokens });
        drop(state);
        generation.limit_marks(self.marks);
        let (events, reported, failed, follows) = (generation.take_replayed(), 0, false, None);
        let (saved, ahead) = (0, Ahead::default());
        let running = Running { id, generation, sequence, owner, events, reported, failed, follows, saved, ahead };
        Some(self.run(running))
    }

    /// Adds a generation to the running ones. Returns its place.
    fn run(&mut self, running: Running) -> usize {
        let place = self.running.partition_point(|other| other.id < running.id);
        self.running.insert(place, running);
        place
    }

    /// Saves the youngest generation if it is in the background and `id` is not.
    fn yields_to(&mut self, id: u64) -> bool {
        let youngest = self.running.iter().rposition(|r| !r.is_over());
        match youngest.filter(|&at| is_background(self.running[at].id) && !is_background(id)) {
            Some(youngest) => self.save(youngest),
            None => return false,
        }
        true
    }

    /// Admits the oldest of the saved generations. Returns its place among the running ones.
    fn resume(&mut self, engine: &Engine, sequence: Sequence) -> Option<usize> {
        let Saved { id, generation, owner, reported, file } = self.saved.remove(0);
        let sequence = file.and_then(|file| file.restore(engine)).unwrap_or(sequence);
        let (events, failed, follows) = (Vec::new(), false, None);
        let (saved, ahead) = (0, Ahead::default());
        let running = Running { id, generation, sequence, owner, events, reported, failed, follows, saved, ahead };
        Some(self.run(running))
    }

    /// Handles a step that did not find its pages: the youngest generation gives its pages back. If only one is left, its context
    /// is limited to the pages that there are.
    pub(super) fn give_way(&mut self, error: RuntimeError) {
        for over in self.running.iter_mut().filter(|r| r.is_over()) {
            over.sequence.clear();
        }
        let alive = |r: &&mut Running| !r.is_over() && r.follows.is_none();
        if let (Some(last), None) = {
            let mut alive = self.running.iter_mut().filter(alive);
            (alive.next(), alive.next())
        } {
            last.fill(error);
            return;
        }
        // A generation that waits for another is younger than that one, and has no pages. It goes first, so that the order of
        // arrival stays.
        if let Some(youngest) = self.running.iter().rposition(|r| !r.is_over()) {
            self.save(youngest);
        }
    }

    /// Takes the pages of a running generation, which then waits to be admitted again.
    fn save(&mut self, at: usize) {
        let Running { id, generation, sequence, mut owner, events, reported, .. } = self.running.remove(at);
        let file = self.options.spill.as_deref().and_then(|folder| SavedSequence::new(&sequence, folder));
        if file.is_none() && generation.keeps().0 {
            // The copy gives up no more pages than the others need.
            self.kept.insert(sequence.fork());
        }
        drop(sequence);
        self.preemptions += 1;
        let flow = events.into_iter().try_for_each(|event| tell(&mut owner, event));
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

impl Running {
    /// Tokens that it must have room for before another generation is admitted.
    fn wants(&self) -> usize {
        let copied = if self.follows.is_some() { PAGE_TOKENS } else { 0 };
        self.generation.len().saturating_sub(self.start()) + self.generation.remaining().min(AHEAD) + copied
    }

    /// The only remaining generation finds no pages: its context counts as full. If it has generated nothing yet, it fails with
    /// `error`.
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

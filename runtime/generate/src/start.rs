//! The start of a generation: after the tokens that a sequence has already seen.
//!
//! Any sequence that begins with the same tokens will do, whether it is kept or its generation is still running: a fork of it
//! shares the pages and reads only the rest. If an older generation is about to read what a new one needs, the new one waits until
//! that has been read. It loses nothing by waiting, because it would have to read the same tokens in the same steps. A generation
//! waits only for older ones, so the oldest never waits, and they never wait in a circle. If the one that it waits for ends or
//! gives up its pages, it searches again.

use sluice_model::{Engine, PAGE_TOKENS, Sequence};
use sluice_sessions::Found;

use super::kept::{FEWEST, fork_at, reach, shared};
use super::scheduler::{Running, Scheduler};

/// A generation that waits until an older one has read what both share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Follows {
    /// Number of the older one.
    leader: u64,
    /// Position at which this one will begin.
    pub(super) position: usize,
}

/// How a generation begins.
pub(super) enum Start {
    /// From a sequence that has seen the first tokens, or from an empty one.
    With(Sequence),
    /// After an older generation.
    Behind(Follows),
    /// From a sequence on the drive.
    Stored(Found),
}

impl Scheduler {
    /// How generation `id` with these tokens, as sequences have them, best begins; `drive`: whether the drive counts.
    pub(super) fn start(&mut self, engine: &Engine, id: u64, tokens: &[u32], drive: bool) -> Start {
        self.forget_deleted();
        let kept = self.kept.best(tokens);
        let started = self.running.iter().filter(|r| r.follows.is_none());
        let running = started.map(|r| (r, reach(&r.sequence, tokens))).filter(|best| best.1 >= FEWEST);
        let running = running.max_by_key(|best| best.1);
        let reached = kept.map_or(0, |best| best.1).max(running.map_or(0, |best| best.1));
        let stored = self.drive.as_ref().filter(|_| drive).and_then(|drive| drive.find(tokens, reached));
        let found = stored.as_ref().map_or(reached, Found::position);
        if let Some(follows) = self.leader(id, tokens, found) {
            return Start::Behind(follows);
        }
        if let Some(found) = stored {
            return Start::Stored(found);
        }
        Start::With(match (kept, running) {
            (Some((number, position)), _) if position == reached => self.kept.fork(number, position),
            (_, Some((running, position))) => fork_at(&running.sequence, position),
            _ => self.spare.take().unwrap_or_else(|| engine.new_sequence()),
        })
    }

    /// An older generation that will have read enough more than `reached` of these tokens to be worth waiting for.
    fn leader(&self, id: u64, tokens: &[u32], reached: usize) -> Option<Follows> {
        let older = self.running.iter().filter(|r| r.id < id && !r.is_over() && r.start() < r.generation.to_read());
        let ahead = older.map(|r| (r, shared(&r.generation.phased()[..r.generation.to_read()], tokens)));
        // The oldest of equals.
        let ahead = ahead.filter(|(r, position)| *position > r.start()).rev().max_by_key(|ahead| ahead.1);
        let (leader, position) = ahead?;
        let gain = position.saturating_sub(reached);
        let is_all = position + 1 == tokens.len();
        let worth = gain >= PAGE_TOKENS || (is_all && gain >= FEWEST);
        worth.then_some(Follows { leader: leader.id, position })
    }

    /// Starts the generations that have waited for others to read what they share.
    pub(super) fn follow_up(&mut self, engine: &Engine) {
        for at in 0..self.running.len() {
            let Running { id, follows: Some(follows), .. } = self.running[at] else { continue };
            if self.running.iter().any(|r| r.id == follows.leader && !r.is_over() && r.start() < follows.position) {
                continue;
            }
            let tokens = self.running[at].generation.phased().into_owned();
            match self.start(engine, id, &tokens, false) {
                Start::Behind(follows) => self.running[at].follows = Some(follows),
                // The drive was not searched.
                Start::Stored(_) => {}
                Start::With(sequence) => {
                    let running = &mut self.running[at];
                    (running.sequence, running.follows) = (sequence, None);
                    self.begun(at);
                }
            }
        }
    }

    /// Reads the sequence from which a generation starts from the drive. If that fails, it starts from what memory has.
    pub(super) fn restore(&mut self, engine: &Engine, at: usize, found: &Found, tokens: &[u32]) {
        let drive = self.drive.as_ref();
        if let Some(sequence) = drive.and_then(|drive| drive.restore(engine, found, tokens)) {
            self.totals.restored_tokens += sequence.position() as u64;
            self.running[at].sequence = sequence;
            return;
        }
        let id = self.running[at].id;
        match self.start(engine, id, tokens, false) {
            Start::With(sequence) => self.running[at].sequence = sequence,
            Start::Behind(follows) => self.running[at].follows = Some(follows),
            // The drive was not searched.
            Start::Stored(_) => {}
        }
    }

    /// A generation has received the sequence from which it starts.
    pub(super) fn begun(&mut self, at: usize) {
        let running = &mut self.running[at];
        if running.follows.is_some() {
            return;
        }
        let position = running.sequence.position();
        running.saved = position;
        if running.generation.begin_at(position) {
            let usage = running.generation.usage();
            self.totals.prompt_tokens += usage.prompt_tokens as u64;
            self.totals.cached_tokens += usage.cached_tokens as u64;
        }
        running.report(position);
        running.mark();
        self.touch_stored(&self.running[at]);
    }

    /// Rows that a generation can take before it has to stop: to be marked, or to be forked by one that waits for it. A sequence
    /// whose layers all see everything can go back to any position later, and need not stop.
    pub(super) fn rows_to_stop(&self, running: &Running) -> usize {
        if !self.forgets {
            return usize::MAX;
        }
        let position = running.sequence.position();
        let followers = self.running.iter().filter_map(|r| r.follows).filter(|f| f.leader == running.id);
        let stops = followers.map(|follows| follows.position).chain(running.generation.mark_behind(position));
        stops.filter(|&stop| stop > position).min().map_or(usize::MAX, |stop| stop - position)
    }
}

impl Running {
    /// Position at which its sequence is, or will begin.
    pub(super) fn start(&self) -> usize {
        self.follows.map_or(self.sequence.position(), |follows| follows.position)
    }

    /// Marks the sequence, if the request has a mark at this position.
    pub(super) fn mark(&mut self) {
        if self.generation.is_mark(self.sequence.position()) {
            // If the memory plan has no room for marks, there are none.
            let _ = self.sequence.mark();
        }
    }

    /// Gives up the marks. False if there are none.
    pub(super) fn unmark(&mut self) -> bool {
        let marks: Vec<_> = self.sequence.marks().collect();
        marks.iter().for_each(|&mark| self.sequence.unmark(mark));
        !marks.is_empty()
    }
}

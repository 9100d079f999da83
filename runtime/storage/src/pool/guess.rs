//! Reading ahead of the router: experts that it will probably choose.
//!
//! A guess takes a slot that is free or whose expert the policy would evict next, and is read only while the drive would
//! idle. When the layer comes, guesses that were right are used, wherever their reads are; those that were wrong and are
//! still being read are given up. What remains of wrong guesses are experts in memory like all others.

use super::parts::Pending;
use super::policy::Key;
use super::{ABSENT, Content, ExpertKey, Pool};
use crate::io::{Check, Class};

/// Most guesses that are read at once: more than a layer's worth would only be guesses about guesses.
const OPEN_MAX: usize = 16;

/// The guesses of a pool.
pub(super) struct Guesses {
    /// Slots that are being read into on a guess.
    open: Vec<u32>,
    /// For each slot, whether the guess that is being read into it was given up.
    given_up: Vec<bool>,
    /// For each expert, whether it was read on a guess and has not been requested since.
    unproven: Vec<bool>,
    /// Slots that passes must have for themselves: a pool as small as this does not guess.
    least_slots: usize,
}

impl Guesses {
    pub(super) fn new(slots: usize, keys: usize) -> Self {
        Guesses {
            open: Vec::with_capacity(slots.min(OPEN_MAX)),
            given_up: vec![false; slots],
            unproven: vec![false; keys],
            least_slots: 2 * OPEN_MAX,
        }
    }
}

impl Pool {
    /// Starts reading those of `experts` that are absent, as far as there are slots for guesses.
    pub(super) fn guess(&mut self, layer: u32, experts: &[u32]) {
        self.settle_guesses();
        for &expert in experts {
            // Experts that somebody waits for come first, also for slots.
            let room = self.guesses.open.len() < OPEN_MAX && self.slot_count() >= self.guesses.least_slots;
            if !room || !self.pass.todo.is_empty() {
                return;
            }
            let index = self.directory.index(ExpertKey { layer, expert });
            if self.table[index.index()] != ABSENT {
                continue;
            }
            let Some(number) = self.vacate() else { return };
            // A read that cannot be submitted now fails again, with someone to tell, when the expert is requested.
            if self.start_read(number, index, Class::Prefetch, Check::ByReceiver).is_ok() {
                self.guesses.open.push(number);
                self.guesses.unproven[index.index()] = true;
                self.stats.guessed += 1;
            }
        }
    }

    /// Makes experts of the guesses whose reads have ended.
    pub(super) fn settle_guesses(&mut self) {
        let mut at = 0;
        while at < self.guesses.open.len() {
            let number = self.guesses.open[at];
            let done = matches!(&self.slots[number as usize], Content::Loading { read, .. } if read.is_done());
            if done {
                self.guesses.open.swap_remove(at);
                self.end_guess(number);
            } else {
                at += 1;
            }
        }
    }

    /// Ends one guess, waiting for its read if need be.
    fn end_guess(&mut self, number: u32) {
        let Content::Loading { expert, .. } = self.slots[number as usize] else { return };
        self.guesses.given_up[number as usize] = false;
        // An error of a read that nobody asked for will be reported if somebody does.
        if self.finish_read(number, 0).is_err() {
            self.count_wasted(expert);
        }
    }

    /// The current pass needs what a guess is reading.
    pub(super) fn adopt_guess(&mut self, number: u32, index: Key) {
        self.guesses.open.retain(|&open| open != number);
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.promote();
        }
        self.pass.pending.push(Pending::new(number));
        self.count_used(index);
    }

    /// Gives up the guesses about a layer whose router has spoken.
    pub(super) fn give_up_guesses(&mut self, routed_layer: u32) {
        for &number in &self.guesses.open {
            if let Content::Loading { expert, read, .. } = &self.slots[number as usize]
                && self.directory.shape().expert(*expert).0 == routed_layer
            {
                read.cancel();
                self.guesses.given_up[number as usize] = true;
            }
        }
    }

    /// A guess that was given up and turns out to be wanted is ended first: its read may be cancelled yet.
    pub(super) fn settle_given_up(&mut self, index: Key) {
        let number = self.table[index.index()];
        if number != ABSENT && self.guesses.given_up[number as usize] {
            self.guesses.open.retain(|&open| open != number);
            self.end_guess(number);
        }
    }

    /// Ends one guess for the sake of its slot; false if there is none.
    pub(super) fn reclaim_guess(&mut self) -> bool {
        let Some(number) = self.guesses.open.pop() else { return false };
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.cancel();
        }
        self.end_guess(number);
        true
    }

    pub(super) fn count_used(&mut self, index: Key) {
        if std::mem::take(&mut self.guesses.unproven[index.index()]) {
            self.stats.guessed_used += 1;
        }
    }

    pub(super) fn count_wasted(&mut self, index: Key) {
        if std::mem::take(&mut self.guesses.unproven[index.index()]) {
            self.stats.guessed_wasted += 1;
        }
    }
}

//! Prefetch: experts that the router will probably choose are read before it can say.
//!
//! A prefetch takes a slot that is free or whose expert the policy would evict next, and is done only while the drive would
//! idle. When the layer comes, prefetches that were right are used, wherever their reads are; those that were wrong and are
//! still being read are given up. What remains of wrong prefetches are experts in memory like all others.

use super::parts::Pending;
use super::policy::Key;
use super::{ABSENT, Content, ExpertKey, Pool};
use crate::io::{Check, Class};

/// Most prefetches at once: more than a layer's worth would build on prefetches that may be wrong.
const OPEN_MAX: usize = 16;

/// The prefetches of a pool.
pub(super) struct Prefetches {
    /// Slots that are being read into by a prefetch.
    open: Vec<u32>,
    /// For each slot, whether the prefetch that is being read into it was given up.
    given_up: Vec<bool>,
    /// For each expert, whether it was prefetched and has not been requested since.
    unproven: Vec<bool>,
    /// Slots that passes must have for themselves: a pool as small as this does not prefetch.
    least_slots: usize,
}

impl Prefetches {
    pub(super) fn new(slots: usize, keys: usize) -> Self {
        Prefetches {
            open: Vec::with_capacity(slots.min(OPEN_MAX)),
            given_up: vec![false; slots],
            unproven: vec![false; keys],
            least_slots: 2 * OPEN_MAX,
        }
    }
}

impl Pool {
    /// Starts reading those of `experts` that are absent, as far as there are slots for prefetches.
    pub(super) fn prefetch(&mut self, layer: u32, experts: &[u32]) {
        self.settle_prefetches();
        for &expert in experts {
            // Experts that somebody waits for come first, also for slots.
            let room = self.prefetches.open.len() < OPEN_MAX && self.slot_count() >= self.prefetches.least_slots;
            if !room || !self.pass.todo.is_empty() {
                return;
            }
            let index = self.directory.index(ExpertKey { layer, expert });
            if self.table[index.index()] != ABSENT {
                continue;
            }
            // The last staging slot is for what somebody waits for.
            let staged = self.directory.location(index).packed.is_some();
            if staged && self.staging.len() < 2 {
                return;
            }
            let Some(number) = self.vacate() else { return };
            // A read that cannot be submitted now fails again, with someone to tell, when the expert is requested.
            if self.start_read(number, index, Class::Prefetch, Check::ByReceiver).is_ok() {
                self.prefetches.open.push(number);
                self.prefetches.unproven[index.index()] = true;
                self.stats.prefetched += 1;
            }
        }
    }

    /// Makes experts of the prefetches whose reads have ended.
    pub(super) fn settle_prefetches(&mut self) {
        let mut at = 0;
        while at < self.prefetches.open.len() {
            let number = self.prefetches.open[at];
            // A compressed one stays in its staging slot until it is requested, or given up.
            let waits = self.is_packed(number) && !self.prefetches.given_up[number as usize];
            let done =
                !waits && matches!(&self.slots[number as usize], Content::Loading { read, .. } if read.is_done());
            if done {
                self.prefetches.open.swap_remove(at);
                self.end_prefetch(number);
            } else {
                at += 1;
            }
        }
    }

    /// Ends one prefetch, waiting for its read if need be.
    fn end_prefetch(&mut self, number: u32) {
        let Content::Loading { expert, .. } = self.slots[number as usize] else { return };
        self.prefetches.given_up[number as usize] = false;
        if self.is_packed(number) {
            self.count_wasted(expert);
            return self.forget_read(number);
        }
        // An error of a read that nobody asked for will be reported if somebody does.
        if self.finish_read(number, 0).is_err() {
            self.count_wasted(expert);
        }
    }

    /// The current pass needs what a prefetch is reading.
    pub(super) fn adopt_prefetch(&mut self, number: u32, index: Key) {
        self.prefetches.open.retain(|&open| open != number);
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.promote();
        }
        self.pass.pending.push(Pending::new(number));
        self.count_used(index);
    }

    /// Gives up the prefetches about a layer whose router has spoken.
    pub(super) fn give_up_prefetches(&mut self, routed_layer: u32) {
        for &number in &self.prefetches.open {
            if let Content::Loading { expert, read, .. } = &self.slots[number as usize]
                && self.directory.shape().expert(*expert).0 == routed_layer
            {
                read.cancel();
                self.prefetches.given_up[number as usize] = true;
            }
        }
    }

    /// A prefetch that was given up and turns out to be wanted is ended first: its read may be cancelled yet.
    pub(super) fn settle_given_up(&mut self, index: Key) {
        let number = self.table[index.index()];
        if number != ABSENT && self.prefetches.given_up[number as usize] {
            self.prefetches.open.retain(|&open| open != number);
            self.end_prefetch(number);
        }
    }

    /// Ends one prefetch for the sake of its slot; false if there is none.
    pub(super) fn reclaim_prefetch(&mut self) -> bool {
        let Some(number) = self.prefetches.open.pop() else { return false };
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.cancel();
        }
        self.end_prefetch(number);
        true
    }

    pub(super) fn count_used(&mut self, index: Key) {
        if std::mem::take(&mut self.prefetches.unproven[index.index()]) {
            self.stats.prefetched_used += 1;
        }
    }

    pub(super) fn count_wasted(&mut self, index: Key) {
        if std::mem::take(&mut self.prefetches.unproven[index.index()]) {
            self.stats.prefetched_wasted += 1;
        }
    }
}

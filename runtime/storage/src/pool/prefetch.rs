//! Prefetch: experts that the router will probably choose are read before it chooses.
//!
//! A prefetch takes a slot that is free or whose expert the policy would evict next, and is read only while the drive would
//! be idle. When the layer's turn comes, prefetches that were right are used, however far their reads are; those that were
//! wrong and are still being read are given up. Wrong prefetches that were read completely are experts in memory like all
//! others.
//!
//! A long prompt uses nearly all experts of a layer, so nobody has to say which: once all reads of a layer have begun, those of the next
//! one follow ([`LayerPass::then_read`]), and the drive goes on while the cores compute.
//!
//! [`LayerPass::then_read`]: super::LayerPass::then_read

use super::parts::Pending;
use super::policy::{Key, Shape};
use super::{ABSENT, Content, ExpertKey, Pool};
use crate::io::{Check, Class};

/// Most prefetches at once: more than a layer's worth would build on prefetches that may be wrong.
const OPEN_MAX: usize = 16;
/// Slots of a size that are reserved for passes: where there are fewer, none of them is prefetched into.
pub const PREFETCH_SLOTS: usize = 2 * OPEN_MAX;
/// While a prompt is read, prefetches may take the slots of this part of all experts. More would keep fewer experts from one pass to the
/// next, and so more would have to be read.
const AHEAD: usize = 16;
/// A prompt's next layer is read ahead if it has used at least this part of the experts of the layer before, in quarters. Long prompts
/// whose tokens resemble each other use fewer, and then most of what is read would be read for nothing, beside cores that compute.
const LEAST_USED: usize = 3;

/// The prefetches of a pool.
pub(super) struct Prefetches {
    /// Slots that are being read into by a prefetch.
    pub(super) open: Vec<u32>,
    /// For each slot, whether the prefetch that is being read into it was given up.
    given_up: Vec<bool>,
    /// For each expert, whether it was prefetched and has not been requested since.
    unproven: Vec<bool>,
    /// [`PREFETCH_SLOTS`]; tests have fewer slots.
    least_slots: usize,
    /// Most prefetches for a prompt, as far as they take slots from other experts, and as far as slots are empty.
    ahead: (usize, usize),
    /// Whether the last layer that was to be followed by another used so few of its experts that the next one is not worth reading.
    uses_few: bool,
    /// Experts that must not lose their slots to others of their layer. Empty between calls.
    pub(super) held: Vec<Key>,
}

impl Prefetches {
    pub(super) fn new(slots: usize, shape: Shape) -> Self {
        let ahead = OPEN_MAX.max(shape.keys() / AHEAD);
        let most = ahead.max(shape.experts as usize);
        Prefetches {
            open: Vec::with_capacity(slots.min(most)),
            given_up: vec![false; slots],
            unproven: vec![false; shape.keys()],
            least_slots: PREFETCH_SLOTS,
            ahead: (ahead, most),
            uses_few: false,
            held: Vec::with_capacity(shape.experts as usize),
        }
    }
}

impl Pool {
    /// How many prefetches are being read.
    pub fn prefetching(&mut self) -> usize {
        self.settle_prefetches();
        self.prefetches.open.len()
    }

    /// Starts reading those of `experts` that are absent, as far as there are slots for prefetches: as [`LayerPass::prefetch`], also
    /// between passes.
    ///
    /// [`LayerPass::prefetch`]: super::LayerPass::prefetch
    pub fn prefetch(&mut self, layer: u32, experts: &[u32]) {
        self.settle_prefetches();
        for &expert in experts {
            // Experts for which a caller waits come first, also for slots.
            let index = self.directory.index(ExpertKey { layer, expert });
            let class = self.class_of(index);
            let slots = self.classes[usize::from(class)].count();
            let room = self.prefetches.open.len() < OPEN_MAX && slots >= self.prefetches.least_slots;
            if !room || !self.pass.todo.is_empty() {
                return;
            }
            if self.table[index.index()] != ABSENT {
                continue;
            }
            // The last staging slot is reserved for experts for which a caller waits.
            let staged = self.directory.location(index).packed.is_some();
            if staged && self.staging.len() < 2 {
                return;
            }
            let Some(number) = self.vacate(class) else { return };
            self.start_prefetch(number, index);
        }
    }

    fn start_prefetch(&mut self, number: u32, index: Key) {
        // A read that cannot be submitted now fails again when the expert is requested, and then a caller gets the error.
        if self.start_read(number, index, Class::Prefetch, Check::ByReceiver).is_ok() {
            self.prefetches.open.push(number);
            self.prefetches.unproven[index.index()] = true;
            self.stats.prefetched += 1;
        }
    }

    /// Starts reading all experts of a layer that are absent, in ascending order, because a prompt that will soon come to it needs nearly
    /// all of them; as far as there are slots, and once the current pass has begun all of its reads. What has been read stays pinned until
    /// the layer begins. Nothing is read where [`LayerPass::then_read`] found that the prompt uses few.
    ///
    /// [`LayerPass::then_read`]: super::LayerPass::then_read
    pub fn read_ahead(&mut self, layer: u32) {
        let routed = self.directory.routed_layer(layer);
        let class = self.class_of_layer[routed as usize];
        let slots = self.classes[usize::from(class)].count();
        let (most, most_into_empty) = self.prefetches.ahead;
        // Some slots stay for experts that are computed and read in the meantime.
        let most = most.min(slots.saturating_sub(2 * OPEN_MAX).max(OPEN_MAX));
        if self.prefetches.uses_few || slots < self.prefetches.least_slots || !self.pass.todo.is_empty() {
            return;
        }
        for expert in 0..self.directory.shape().experts {
            let room = if self.has_empty(class) { most_into_empty } else { most };
            if self.prefetches.open.len() >= room {
                break;
            }
            let index = self.directory.shape().key(routed, expert);
            if self.table[index.index()] != ABSENT || !self.directory.exists(index) {
                continue;
            }
            if self.directory.location(index).packed.is_some() && self.staging.len() < 2 {
                break;
            }
            let Some(number) = self.vacate_for(class, routed) else { break };
            self.start_prefetch(number, index);
        }
        while let Some(held) = self.prefetches.held.pop() {
            self.policy.unpin(held);
        }
    }

    /// Takes how many experts of its layer a pass of a long prompt uses.
    pub(super) fn judge_prompt(&mut self, used: usize) {
        self.prefetches.uses_few = 4 * used < LEAST_USED * self.directory.shape().experts as usize;
    }

    /// An empty slot of a size class for an expert of a routed layer, but none that another expert of this layer has. Those that the
    /// policy would have evicted are pinned, and in `prefetches.held`.
    fn vacate_for(&mut self, class: u8, routed_layer: u32) -> Option<u32> {
        while !self.has_empty(class) {
            let victim = self.policy.victim_in(class)?;
            if self.directory.shape().expert(victim).0 != routed_layer {
                break;
            }
            self.policy.pin(victim);
            self.prefetches.held.push(victim);
        }
        self.vacate(class)
    }

    /// Gives up all prefetches that are still being read.
    pub fn stop_reading_ahead(&mut self) {
        for &number in &self.prefetches.open {
            if let Content::Loading { read, .. } = &self.slots[number as usize] {
                read.cancel();
                self.prefetches.given_up[number as usize] = true;
            }
        }
    }

    /// Turns prefetches whose reads have ended into experts.
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
        // No caller asked for this expert; the error will be reported if one does.
        if self.finish_read(number, 0).is_err() {
            self.count_wasted(expert);
        }
    }

    /// The current pass needs the expert that a prefetch is reading.
    pub(super) fn adopt_prefetch(&mut self, number: u32, index: Key) {
        self.prefetches.open.retain(|&open| open != number);
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.promote();
        }
        self.pass.pending.push(Pending::new(number));
        self.count_used(index);
    }

    /// Gives up the remaining prefetches for a layer whose router has chosen.
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

    /// If a prefetch that was given up is wanted after all, it is ended first, because its read may still be
    /// cancelled.
    pub(super) fn settle_given_up(&mut self, index: Key) {
        let number = self.table[index.index()];
        if number != ABSENT && self.prefetches.given_up[number as usize] {
            self.prefetches.open.retain(|&open| open != number);
            self.end_prefetch(number);
        }
    }

    /// Ends one prefetch to free a slot, or a staging slot, for the next expert of the pass; false if there is none.
    pub(super) fn reclaim_for_pass(&mut self) -> bool {
        let class = self.pass.todo.front().map(|&expert| self.class_of(expert));
        class.is_some_and(|class| self.reclaim_prefetch(class)) || self.reclaim_any_prefetch()
    }

    /// Ends one prefetch to free its slot of this size class; false if there is none.
    pub(super) fn reclaim_prefetch(&mut self, class: u8) -> bool {
        let numbers = &self.classes[usize::from(class)].numbers;
        let Some(at) = self.prefetches.open.iter().rposition(|number| numbers.contains(number)) else { return false };
        let number = self.prefetches.open.remove(at);
        self.end_open(number);
        true
    }

    /// Ends one prefetch; false if there is none.
    fn reclaim_any_prefetch(&mut self) -> bool {
        let Some(number) = self.prefetches.open.pop() else { return false };
        self.end_open(number);
        true
    }

    fn end_open(&mut self, number: u32) {
        if let Content::Loading { read, .. } = &self.slots[number as usize] {
            read.cancel();
        }
        self.end_prefetch(number);
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

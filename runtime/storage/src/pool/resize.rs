//! How many slots may have memory: a pool can give memory back to the system while it runs, and take it again.
//!
//! The experts that leave are those that the policy would evict next. Slots without memory keep their addresses. A slot takes
//! memory when it is filled, so others can have taken what the system had when the pool was made:
//! [`Pool::limit_new_memory`] says how many slots may still take some.

use super::{Content, Pool};

impl Pool {
    /// Number of slots with which the pool was made.
    #[must_use]
    pub fn most_slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots that may have memory.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len() - self.away.len()
    }

    /// Empty slots that have no memory and may take some: those that have never been filled, above all.
    #[must_use]
    pub fn unfilled(&self) -> usize {
        self.free.iter().filter(|&&number| self.is_absent(number)).count()
    }

    /// Lets this many slots without memory take some from now on. Beyond that, experts leave slots that have memory, as if the
    /// others did not exist; only if no slot is in use, one takes memory all the same, because a pass needs one.
    pub fn limit_new_memory(&mut self, slots: usize) {
        self.new_slots = slots;
    }

    pub(super) fn is_absent(&self, number: u32) -> bool {
        matches!(&self.slots[number as usize], Content::Empty(slot) if slot.is_absent())
    }

    /// Gives memory back to the system, or allows to take it again, until `slots` slots may have memory, but at most those with
    /// which the pool was made. Call it between passes. Prefetches are ended if their slots are needed.
    pub fn resize(&mut self, slots: usize) {
        self.stop_warming();
        self.end_pass();
        self.settle_prefetches();
        self.drop_unfilled(self.slot_count().saturating_sub(slots));
        while self.slot_count() > slots {
            // Nothing is pinned between passes: a slot that is not available is lost with the I/O thread.
            let Some(number) = self.vacate().or_else(|| self.reclaim_prefetch().then(|| self.vacate()).flatten())
            else {
                break;
            };
            self.give_back(number);
        }
        if slots == 0 {
            // If the system does not take the pages, they stay in memory.
            self.staging.iter_mut().for_each(|slot| _ = slot.give_back());
        }
        let more = slots.saturating_sub(self.slot_count()).min(self.away.len());
        let returned = self.away.split_off(self.away.len() - more);
        // At the beginning: slots that have memory are filled first.
        self.free.splice(0..0, returned);
        self.io.wake();
    }

    /// Lets up to this many slots go that have no memory anyway.
    fn drop_unfilled(&mut self, most: usize) {
        let Pool { free, away, slots, .. } = self;
        let mut left = most;
        free.retain(|&number| {
            let goes = left > 0 && matches!(&slots[number as usize], Content::Empty(slot) if slot.is_absent());
            if goes {
                left -= 1;
                away.push(number);
            }
            !goes
        });
    }

    /// Gives up the memory of an empty slot.
    fn give_back(&mut self, number: u32) {
        if let Content::Empty(slot) = &mut self.slots[number as usize] {
            // If the system does not take the pages, they stay in memory, but the slot is not used.
            let _ = slot.give_back();
        }
        self.away.push(number);
    }
}

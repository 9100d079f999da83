//! How many slots may have memory: a pool can give memory back to the system while it runs, and take it again.
//!
//! The experts that leave are those that the policy would evict next. Slots without memory keep their addresses. A slot takes
//! memory when it is filled, so others can have taken what the system had when the pool was made:
//! [`Pool::limit_new_memory`] says how much they may still take.

use super::{Content, Pool, Slots};

impl Pool {
    /// Number of slots with which the pool was made.
    #[must_use]
    pub fn most_slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots that may have memory.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.classes.iter().map(Slots::count).sum()
    }

    /// The same of each size, ascending by size.
    pub fn slot_counts(&self) -> impl Iterator<Item = usize> {
        self.classes.iter().map(Slots::count)
    }

    /// Empty slots that have no memory and may take some: those that have never been filled, above all.
    #[must_use]
    pub fn unfilled(&self) -> usize {
        self.classes.iter().map(|class| self.unfilled_of(class)).sum()
    }

    /// Bytes that they take once they are filled.
    #[must_use]
    pub fn unfilled_bytes(&self) -> u64 {
        self.classes.iter().map(|class| (self.unfilled_of(class) * class.bytes) as u64).sum()
    }

    fn unfilled_of(&self, class: &Slots) -> usize {
        class.free.iter().filter(|&&number| self.is_absent(number)).count()
    }

    /// Lets slots without memory take at most this many bytes from now on. Beyond that, experts leave slots that have memory, as if the
    /// others did not exist; only if no slot of a size is in use, one takes memory all the same, because a pass needs one.
    pub fn limit_new_memory(&mut self, bytes: u64) {
        self.new_bytes = bytes;
    }

    pub(super) fn is_absent(&self, number: u32) -> bool {
        matches!(&self.slots[number as usize], Content::Empty(slot) if slot.is_absent())
    }

    /// Gives memory back to the system, or allows to take it again, until `slots` slots of each size may have memory, ascending by size,
    /// but at most those with which the pool was made; sizes that are not listed have none. Call it between passes. Prefetches are
    /// ended if their slots are needed.
    pub fn resize(&mut self, slots: &[usize]) {
        self.stop_warming();
        self.end_pass();
        self.settle_prefetches();
        for class in (0u8..).take(self.classes.len()) {
            self.resize_class(class, slots.get(usize::from(class)).copied().unwrap_or(0));
        }
        if self.slot_count() == 0 {
            // If the system does not take the pages, they stay in memory.
            self.staging.iter_mut().for_each(|slot| _ = slot.give_back());
        }
        self.io.wake();
    }

    fn resize_class(&mut self, class: u8, slots: usize) {
        let at = usize::from(class);
        self.drop_unfilled(at, self.classes[at].count().saturating_sub(slots));
        while self.classes[at].count() > slots {
            // Nothing is pinned between passes: a slot that is not available is lost with the I/O thread.
            let vacant = self.vacate(class);
            let Some(number) = vacant.or_else(|| self.reclaim_prefetch(class).then(|| self.vacate(class)).flatten())
            else {
                break;
            };
            self.give_back(at, number);
        }
        let class = &mut self.classes[at];
        let more = slots.saturating_sub(class.count()).min(class.away.len());
        let returned = class.away.split_off(class.away.len() - more);
        // At the beginning: slots that have memory are filled first.
        class.free.splice(0..0, returned);
    }

    /// Lets up to this many slots of a size class go that have no memory anyway.
    fn drop_unfilled(&mut self, class: usize, most: usize) {
        let Slots { free, away, .. } = &mut self.classes[class];
        let slots = &self.slots;
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
    fn give_back(&mut self, class: usize, number: u32) {
        if let Content::Empty(slot) = &mut self.slots[number as usize] {
            // If the system does not take the pages, they stay in memory, but the slot is not used.
            let _ = slot.give_back();
        }
        self.classes[class].away.push(number);
    }
}

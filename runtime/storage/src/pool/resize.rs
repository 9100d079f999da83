//! How many slots have memory: a pool can give memory back to the system while it runs, and take it again.
//!
//! The experts that leave are those that the policy would evict next. Slots without memory keep their addresses.

use std::io;

use super::{Content, Pool, PoolError};
use crate::io::IoError;

impl Pool {
    /// Number of slots with which the pool was made.
    #[must_use]
    pub fn most_slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots that have memory.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len() - self.away.len()
    }

    /// Gives memory back to the system, or takes it again, until `slots` slots have memory, but at most those with which the
    /// pool was made. Call it between passes. Prefetches are ended if their slots are needed.
    ///
    /// # Errors
    /// [`PoolError::Io`] when the system does not give memory; [`slot_count`](Self::slot_count) says how far it went.
    pub fn resize(&mut self, slots: usize) -> Result<(), PoolError> {
        self.end_pass();
        self.settle_prefetches();
        while self.slot_count() > slots {
            // Nothing is pinned between passes: a slot that is not available is lost with the I/O thread.
            let Some(number) = self.vacate().or_else(|| self.reclaim_prefetch().then(|| self.vacate()).flatten())
            else {
                break;
            };
            self.give_back(number);
        }
        for slot in &mut self.staging {
            // If the system does not give the memory at once, it comes page by page.
            let _ = if slots == 0 { slot.give_back() } else { slot.take_again() };
        }
        while self.slot_count() < slots
            && let Some(&number) = self.away.last()
        {
            self.take_again(number).map_err(|source| {
                PoolError::Io(IoError::Memory { bytes: self.directory.slot_bytes(), what: "experts", source })
            })?;
            self.away.pop();
            self.free.push(number);
        }
        self.io.wake();
        Ok(())
    }

    /// Gives up the memory of an empty slot.
    fn give_back(&mut self, number: u32) {
        if let Content::Empty(slot) = &mut self.slots[number as usize] {
            // If the system does not take the pages, they stay in memory, but the slot is not used.
            let _ = slot.give_back();
        }
        self.away.push(number);
    }

    fn take_again(&mut self, number: u32) -> io::Result<()> {
        match &mut self.slots[number as usize] {
            Content::Empty(slot) => slot.take_again(),
            _ => Ok(()),
        }
    }
}

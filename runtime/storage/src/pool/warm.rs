//! Warming: while nobody computes, the drive fills the pool with the experts that the policy expects soonest.
//!
//! An empty slot is filled with anything that the policy has seen used. A full pool changes only for the better: an expert is
//! replaced by one that the policy expects sooner, so warming comes to an end. A few experts are read at a time, and a pass that
//! begins ends these reads: it waits for the chunks that the drive is reading at that moment, and for no others.

use super::policy::Key;
use super::{ABSENT, Content, Pool};
use crate::io::{Check, Class};

/// Most experts that are read at a time, and bytes of them beyond which no further one is read: enough to keep a drive busy until the
/// pool is looked at again.
const OPEN_MAX: usize = 16;
const OPEN_BYTES: usize = 32 << 20;

/// What is being read because there is nothing else to do.
#[derive(Debug, Default)]
pub(super) struct Warming {
    /// Slots that are being read into.
    pub(super) open: Vec<u32>,
    /// A read has failed. Nothing is read until the next pass, which gets the error if it asks for the expert.
    failed: bool,
}

impl Pool {
    /// Takes in experts that have arrived, and starts to read others. Does not block, except to decompress experts. True if reads are
    /// in flight: call it again soon.
    pub fn warm(&mut self) -> bool {
        self.settle_prefetches();
        self.settle_warm();
        while !self.warming.failed && self.has_room_to_warm() {
            let Some(expert) = self.soonest_worth_reading() else { break };
            if !self.can_stage(expert) {
                break;
            }
            let Some(number) = self.vacate(self.class_of(expert)) else { break };
            match self.start_read(number, expert, Class::Prefetch, Check::ByReceiver) {
                Ok(()) => self.warming.open.push(number),
                Err(_) => self.warming.failed = true,
            }
        }
        !self.warming.open.is_empty()
    }

    /// Ends the reads of [`warm`](Self::warm). What has arrived completely stays.
    pub fn stop_warming(&mut self) {
        self.warming.failed = false;
        if self.warming.open.is_empty() {
            return;
        }
        for &number in &self.warming.open {
            if let Content::Loading { read, .. } = &self.slots[number as usize] {
                read.cancel();
            }
        }
        while let Some(number) = self.warming.open.pop() {
            if self.is_packed(number) {
                // Decompressing would take time that a pass needs.
                self.forget_read(number);
            } else {
                self.end_warm(number);
            }
        }
        self.warming.failed = false;
    }

    fn settle_warm(&mut self) {
        let mut at = 0;
        while at < self.warming.open.len() {
            let number = self.warming.open[at];
            if matches!(&self.slots[number as usize], Content::Loading { read, .. } if read.is_done()) {
                self.warming.open.swap_remove(at);
                self.end_warm(number);
            } else {
                at += 1;
            }
        }
    }

    fn end_warm(&mut self, number: u32) {
        let before = self.stats.bytes_read;
        match self.finish_read(number, 0) {
            Ok(()) => {
                self.stats.warmed += 1;
                self.stats.warmed_bytes += self.stats.bytes_read - before;
            }
            // Nobody has asked for this expert; the error will be reported if someone does.
            Err(_) => self.warming.failed = true,
        }
    }

    fn has_room_to_warm(&self) -> bool {
        let open = self.warming.open.len();
        open < OPEN_MAX && (open == 0 || open * self.directory.slot_bytes() < OPEN_BYTES)
    }

    /// The absent expert that the policy expects soonest among those that there are slots for.
    fn soonest_worth_reading(&mut self) -> Option<Key> {
        let mut soonest: Option<(u64, Key)> = None;
        for class in (0u8..).take(self.classes.len()) {
            if let Some(absent) = self.soonest_absent(class)
                && soonest.is_none_or(|soonest| absent < soonest)
                && self.is_worth_a_slot(absent.1)
            {
                soonest = Some(absent);
            }
        }
        soonest.map(|(_, key)| key)
    }

    /// The absent expert of a size class that the policy expects soonest, and how late that is.
    fn soonest_absent(&self, class: u8) -> Option<(u64, Key)> {
        let absent = self.table.iter().enumerate().filter(|(_, slot)| **slot == ABSENT);
        let keys = absent.map(|(index, _)| Key(index as u32));
        let keys = keys.filter(|&key| self.directory.exists(key) && self.class_of(key) == class);
        let late = keys.filter_map(|key| Some((self.policy.lateness(key)?, key)));
        late.min()
    }

    /// Whether there is an empty slot for an expert, or one with an expert that is expected later.
    fn is_worth_a_slot(&mut self, expert: Key) -> bool {
        let class = self.class_of(expert);
        let slots = &self.classes[usize::from(class)];
        let may_take = self.new_bytes >= slots.bytes as u64;
        if slots.free.last().is_some_and(|&number| !self.is_absent(number) || may_take) {
            return true;
        }
        let Some(victim) = self.policy.victim_in(class) else { return false };
        match (self.policy.lateness(expert), self.policy.lateness(victim)) {
            (Some(expert), Some(victim)) => expert < victim,
            // Nothing speaks for the other one.
            (Some(_), None) => true,
            _ => false,
        }
    }
}

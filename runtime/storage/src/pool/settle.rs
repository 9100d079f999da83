//! Turns bytes from a drive into an expert. This is the only place where that happens.
//!
//! The caller that gets an [`Unsettled`] can compute with its bytes, and forms their checksum on the way. It becomes an [`Expert`]
//! only if that is the table's checksum ([`Unsettled::settle`]). So a function that takes an `Expert` cannot be given bytes that have
//! not been verified:
//!
//! ```
//! # use sluice_storage::pool::{Damaged, Expert, Unsettled};
//! fn use_it(expert: &Expert<'_>) {}
//! fn arrived(expert: Unsettled<'_>, sum: u64) -> Result<(), Damaged> {
//!     Ok(use_it(&expert.settle(sum)?))
//! }
//! ```
//!
//! ```compile_fail,E0308
//! # use sluice_storage::pool::{Damaged, Expert, Unsettled};
//! fn use_it(expert: &Expert<'_>) {}
//! fn arrived(expert: Unsettled<'_>, sum: u64) -> Result<(), Damaged> {
//!     Ok(use_it(&expert))
//! }
//! ```

use sluice_checksum::xxh3_64;

use super::parts::Pending;
use super::{ABSENT, Arrival, Content, Key, Pool};
use crate::io::{Check, Class, Slot};

/// Whether the bytes of an expert have been verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict(bool);

impl Verdict {
    /// The state after a read with this kind of verification. `verify` says whether anything is verified.
    pub(super) fn after(check: Check, verify: bool) -> Verdict {
        Verdict(check != Check::ByReceiver || !verify)
    }

    /// Whether the bytes may be used.
    pub(super) fn is_settled(self) -> bool {
        self.0
    }
}

/// The bytes of an expert are not those that the file's table promises. The pass reads it again and yields it once more; if it is
/// damaged then too, the pass ends with [`ReadError::Checksum`](crate::io::ReadError::Checksum).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expert {expert} of the layer came damaged and is read again")]
pub struct Damaged {
    /// The expert within its layer.
    pub expert: u32,
}

/// An expert in memory whose bytes have not been verified. Dropping it releases its slot to the rest of the pass.
pub struct Unsettled<'a>(Pinned<'a>);

impl<'a> Unsettled<'a> {
    /// The expert within its layer.
    #[must_use]
    pub fn expert(&self) -> u32 {
        self.0.expert()
    }

    /// The bytes of the expert's extent, as they came from the drive.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.slot().bytes()
    }

    /// Compares the xxh3-64 of the bytes with the table's.
    ///
    /// # Errors
    /// [`Damaged`] if they differ: the caller must discard everything computed from the bytes, also from parts of
    /// them.
    pub fn settle(mut self, sum: u64) -> Result<Expert<'a>, Damaged> {
        if self.0.pool.settle(self.0.number, sum) {
            return Ok(Expert(self.0));
        }
        self.0.damaged = true;
        Err(Damaged { expert: self.expert() })
    }
}

/// An expert in memory, verified. Dropping it releases its slot to the rest of the pass.
pub struct Expert<'a>(Pinned<'a>);

impl Expert<'_> {
    /// The expert within its layer.
    #[must_use]
    pub fn expert(&self) -> u32 {
        self.0.expert()
    }

    /// The bytes of the expert's extent, which are the file's.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.slot().bytes()
    }
}

/// Keeps an expert in its slot.
struct Pinned<'a> {
    pool: &'a mut Pool,
    number: u32,
    damaged: bool,
}

impl Pinned<'_> {
    fn content(&self) -> (Key, &Slot, Verdict) {
        match &self.pool.slots[self.number as usize] {
            Content::Resident { expert, slot, verdict, .. } => (*expert, slot, *verdict),
            _ => unreachable!("a pinned slot is resident"),
        }
    }

    fn expert(&self) -> u32 {
        self.pool.directory.key(self.content().0).expert
    }

    fn slot(&self) -> &Slot {
        self.content().1
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        match self.damaged {
            true => self.pool.read_again(self.number),
            false => self.pool.unpin(self.number),
        }
        self.pool.submit_missing();
        self.pool.read_next();
    }
}

/// Hands out the expert in a slot that is pinned, as `Unsettled` or `Expert`.
pub(super) fn hand_out(pool: &mut Pool, number: u32) -> Arrival<'_> {
    let pinned = Pinned { pool, number, damaged: false };
    match pinned.content().2 {
        Verdict(true) => Arrival::Settled(Expert(pinned)),
        Verdict(false) => Arrival::Unsettled(Unsettled(pinned)),
    }
}

/// Hands out the expert in a slot that is pinned and verified.
pub(super) fn settled(pool: &mut Pool, number: u32) -> Expert<'_> {
    let pinned = Pinned { pool, number, damaged: false };
    assert_eq!(pinned.content().2, Verdict(true), "an expert that nobody has verified");
    Expert(pinned)
}

impl Pool {
    /// Compares the checksum of the expert in a pinned slot and notes the result. False if the bytes are damaged.
    fn settle(&mut self, number: u32, sum: u64) -> bool {
        let Content::Resident { expert, verdict, .. } = &mut self.slots[number as usize] else {
            unreachable!("a pinned slot is resident")
        };
        *verdict = Verdict(self.directory.location(*expert).memory_checksum() == sum);
        verdict.0
    }

    /// Verifies the expert in a pinned slot at once; if it is damaged, reads it again. True if it is settled.
    pub(super) fn verify(&mut self, number: u32) -> bool {
        let Content::Resident { slot, verdict: Verdict(false), .. } = &self.slots[number as usize] else { return true };
        let sum = xxh3_64(slot.bytes());
        let right = self.settle(number, sum);
        if !right {
            self.read_again(number);
        }
        right
    }

    /// Reads an expert of the pass again, because its bytes are damaged. This time it is verified before it is handed
    /// out.
    fn read_again(&mut self, number: u32) {
        let Content::Resident { expert, slot, .. } = self.slots[number as usize].take() else {
            unreachable!("a pinned slot is resident")
        };
        self.slots[number as usize] = Content::Empty(slot);
        self.table[expert.index()] = ABSENT;
        self.policy.unpin(expert);
        self.policy.evict(expert);
        if !self.can_stage(expert) {
            // When its turn comes, it is read into whichever slot is free.
            self.class_of_slot(number).free.push(number);
            self.pass.damaged.push(expert);
            self.pass.todo.push_front(expert);
            return;
        }
        match self.start_read(number, expert, Class::Demand, Check::Again) {
            Ok(()) => self.pass.pending.push(Pending::new(number)),
            Err(error) => self.pass.failed = Some(error),
        }
    }
}

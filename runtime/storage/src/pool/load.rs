//! How pinned dense extents come into memory.
//!
//! The reads of all of them are queued at once, in the order of use, behind whatever a caller waits for ([`Class::Certain`]). The
//! caller that needs an extent first waits for it, and verifies it while it arrives: its bytes are then in the caches of a thread
//! that would otherwise do nothing, and the I/O thread only reads.
//!
//! A compressed extent is read into a staging slot, whole, verified by the I/O thread, and decompressed by the caller. There are few
//! staging slots, so only the next few compressed extents are read ahead. Their memory is not in the plan of the budget: it is gone
//! when the last of them has been decompressed, at the end of the first step.

use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;

use sluice_checksum::Xxh3;

use super::dense::{DenseHandle, DenseParts, RING_SLOTS, unpack};
use super::{DenseLocation, PoolError};
use crate::io::{Arena, Check, Class, PendingRead, ReadError, ReadFailure, Scheduler, Slot};

/// An extent that stays in memory, or is on its way there.
#[derive(Debug)]
pub(super) struct Pinned {
    /// Its bytes, verified.
    slot: OnceCell<Slot>,
    /// Where the slot is until then.
    state: RefCell<State>,
}

#[derive(Debug)]
enum State {
    /// Nothing is in the slot.
    Empty(Slot),
    /// `target`: the slot of a compressed extent; the read is into a staging slot then.
    Reading { read: PendingRead, target: Option<Slot> },
    /// It has arrived, or was lost with the I/O thread.
    Gone,
}

impl State {
    fn take(&mut self) -> State {
        std::mem::replace(self, State::Gone)
    }
}

impl Pinned {
    pub(super) fn new(slot: Slot) -> Pinned {
        Pinned { slot: OnceCell::new(), state: RefCell::new(State::Empty(slot)) }
    }

    /// The slot with the bytes, once they have arrived and are verified.
    pub(super) fn slot(&self) -> Option<&Slot> {
        self.slot.get()
    }

    /// True if all bytes have come.
    pub(super) fn is_here(&self) -> bool {
        let read = matches!(&*self.state.borrow(), State::Reading { read, target: None } if read.is_done());
        read || self.slot.get().is_some()
    }

    /// The slot, whatever is in it, unless it is being read into or lost.
    pub(super) fn slot_mut(&mut self) -> Option<&mut Slot> {
        match self.state.get_mut() {
            State::Empty(slot) => Some(slot),
            State::Reading { .. } | State::Gone => None,
        }
    }

    fn put_back(&self, slot: Option<Slot>) {
        *self.state.borrow_mut() = slot.map_or(State::Gone, State::Empty);
    }

    /// Forgets what has arrived, and waits for the end of the read, if there is one.
    fn empty(&mut self) {
        let slot = match self.state.get_mut().take() {
            State::Empty(slot) => Some(slot),
            State::Reading { read, target } => {
                let read = read.finish().map_or_else(|failure| failure.slot, Some);
                target.or(read)
            }
            State::Gone => self.slot.take(),
        };
        self.put_back(slot);
    }
}

/// The compressed ones among the pinned extents that are still to come.
#[derive(Debug, Default)]
pub(super) struct Loader {
    /// Staging slots that no read is using.
    staging: Vec<Slot>,
    /// Those that are being read into a staging slot, in this order.
    reading: VecDeque<DenseHandle>,
    /// Those that have no staging slot yet, in this order.
    todo: VecDeque<DenseHandle>,
}

impl DenseParts {
    /// Queues the reads of all pinned extents that are not in memory.
    pub(super) fn start_loading(&self) -> Result<(), PoolError> {
        let mut loader = self.loader.borrow_mut();
        let mut longest = 0;
        for (i, pinned) in (0..).zip(&self.pinned) {
            let Some(pinned) = pinned else { continue };
            let (handle, location) = (DenseHandle(i), &self.locations[i as usize]);
            if !matches!(&*pinned.state.borrow(), State::Empty(_)) {
                continue;
            }
            if location.extent.packed.is_some() {
                longest = longest.max(location.extent.len as usize);
                loader.todo.push_back(handle);
            } else {
                self.start_read(pinned, location, Class::Certain, Check::ByReceiver)?;
            }
        }
        if !loader.todo.is_empty() {
            let slots = RING_SLOTS.min(loader.todo.len());
            loader.staging = Arena::uniform(longest, slots, "compressed dense parts")?.into_slots();
        }
        drop(loader);
        self.stage();
        Ok(())
    }

    /// Ends all reads of pinned extents, and empties their slots.
    pub(super) fn stop_loading(&mut self) {
        *self.loader.get_mut() = Loader::default();
        for pinned in self.pinned.iter().flatten() {
            if let State::Reading { read, .. } = &*pinned.state.borrow() {
                read.cancel();
            }
        }
        for pinned in self.pinned.iter_mut().flatten() {
            pinned.empty();
        }
    }

    /// Starts to read an extent into its empty slot.
    fn start_read(
        &self,
        pinned: &Pinned,
        location: &DenseLocation,
        class: Class,
        check: Check,
    ) -> Result<(), PoolError> {
        let State::Empty(slot) = pinned.state.borrow_mut().take() else { return Err(PoolError::NoSlots) };
        match location.submit(&self.io, slot, class, check) {
            Ok(read) => {
                *pinned.state.borrow_mut() = State::Reading { read, target: None };
                Ok(())
            }
            Err(ReadFailure { error, slot }) => {
                pinned.put_back(slot);
                Err((*error).into())
            }
        }
    }

    /// Starts to read compressed extents, as far as there are staging slots. What cannot be read now fails again when it is asked for.
    fn stage(&self) {
        let mut loader = self.loader.borrow_mut();
        while let Some(&handle) = loader.todo.front()
            && let Some(staging) = loader.staging.pop()
        {
            loader.todo.pop_front();
            match self.start_staged(handle, staging, Class::Certain) {
                Ok(()) => loader.reading.push_back(handle),
                Err(failure) => loader.staging.extend(failure.slot),
            }
        }
        if loader.todo.is_empty() && loader.reading.is_empty() {
            loader.staging = Vec::new();
        }
    }

    /// Starts to read a compressed extent into a staging slot; a failure has that slot.
    fn start_staged(&self, handle: DenseHandle, staging: Slot, class: Class) -> Result<(), ReadFailure> {
        let pinned = self.pinned[handle.0 as usize].as_ref();
        let state = pinned.map(|pinned| pinned.state.borrow_mut().take());
        let (Some(pinned), Some(State::Empty(target))) = (pinned, state) else {
            let reason = "the memory of a dense part was lost with it".to_owned();
            return Err(ReadFailure { error: Box::new(ReadError::Stopped { reason }), slot: Some(staging) });
        };
        match self.locations[handle.0 as usize].submit(&self.io, staging, class, Check::Here) {
            Ok(read) => {
                *pinned.state.borrow_mut() = State::Reading { read, target: Some(target) };
                Ok(())
            }
            Err(failure) => {
                pinned.put_back(Some(target));
                Err(failure)
            }
        }
    }

    /// Brings a pinned extent into its slot, verified: waits for its read, or reads it now, if nothing is reading it. Returns the
    /// bytes read.
    pub(super) fn finish_loading(&self, handle: DenseHandle) -> Result<u64, PoolError> {
        let (Some(pinned), location) = (&self.pinned[handle.0 as usize], &self.locations[handle.0 as usize]) else {
            return Ok(0);
        };
        let mut read_before = 0;
        if location.extent.packed.is_some() {
            read_before = self.make_turn(handle)?;
        } else if matches!(&*pinned.state.borrow(), State::Empty(_)) {
            // An earlier read of it has failed.
            self.start_read(pinned, location, Class::Demand, Check::ByReceiver)?;
        }
        let State::Reading { read, target } = pinned.state.borrow_mut().take() else {
            return Err(PoolError::NoSlots);
        };
        read.promote();
        let outcome = match target {
            None => receive(&self.io, read, location),
            Some(target) => {
                let outcome = self.receive_packed(read, target, location);
                self.loader.borrow_mut().reading.retain(|&other| other != handle);
                self.stage();
                outcome
            }
        };
        match outcome {
            Ok(slot) => {
                // Nobody else can have set it: the slot came from there.
                let _ = pinned.slot.set(slot);
                Ok(read_before + location.extent.len)
            }
            Err(ReadFailure { error, slot }) => {
                pinned.put_back(slot);
                Err((*error).into())
            }
        }
    }

    /// Makes sure that a compressed extent is being read. Extents before it that hold the staging slots are brought into memory first;
    /// returns their bytes.
    fn make_turn(&self, handle: DenseHandle) -> Result<u64, PoolError> {
        let is_reading = || self.loader.borrow().reading.contains(&handle);
        let mut bytes = 0;
        while !is_reading() {
            let before = self.loader.borrow().reading.front().copied();
            match before {
                // Its error comes when it is asked for.
                Some(before) if self.loader.borrow().todo.contains(&handle) => {
                    bytes += self.finish_loading(before).unwrap_or(0);
                }
                _ => {
                    // An earlier read of it has failed, and its staging slot may be gone.
                    let len = self.locations[handle.0 as usize].extent.len as usize;
                    let staging = Arena::uniform(len, 1, "compressed dense parts")?.into_slots().pop();
                    self.loader.borrow_mut().todo.retain(|&other| other != handle);
                    let staging = staging.ok_or(PoolError::NoSlots)?;
                    self.start_staged(handle, staging, Class::Demand).map_err(|failure| *failure.error)?;
                    self.loader.borrow_mut().reading.push_back(handle);
                }
            }
        }
        Ok(bytes)
    }

    /// Waits for a compressed extent and decompresses it into its slot.
    fn receive_packed(
        &self,
        read: PendingRead,
        mut target: Slot,
        location: &DenseLocation,
    ) -> Result<Slot, ReadFailure> {
        let stored = match read.finish() {
            Ok(stored) => stored,
            Err(ReadFailure { error, slot }) => {
                self.loader.borrow_mut().staging.extend(slot);
                return Err(ReadFailure { error, slot: Some(target) });
            }
        };
        let outcome = unpack(&self.io, location, &mut self.unpacker.borrow_mut(), &stored, &mut target);
        self.loader.borrow_mut().staging.push(stored);
        match outcome {
            Ok(()) => Ok(target),
            Err(error) => Err(ReadFailure { error: Box::new(error), slot: Some(target) }),
        }
    }
}

/// Waits for an extent, and forms its checksum from what has arrived. A damaged one is read once more.
fn receive(io: &Scheduler, read: PendingRead, location: &DenseLocation) -> Result<Slot, ReadFailure> {
    let (mut hasher, mut hashed) = (Xxh3::new(), 0);
    if io.verifies() {
        while !read.is_done() {
            read.wait_prefix(hashed + 1);
            let prefix = read.prefix();
            hasher.update(&prefix[hashed..]);
            hashed = prefix.len();
        }
    }
    let slot = read.finish()?;
    hasher.update(&slot.bytes()[hashed..]);
    if !io.verifies() || hasher.digest() == location.extent.checksum {
        return Ok(slot);
    }
    location.submit(io, slot, Class::Demand, Check::Again)?.finish()
}

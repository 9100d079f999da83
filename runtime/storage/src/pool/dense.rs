//! Dense extents, which every token needs.
//!
//! Those that fit are read once, from the start, in the order of use, and stay. A caller waits only for the extent that it needs,
//! and verifies it while it arrives ([`super::load`]). The others are streamed: every token needs them in the same order, so
//! the next one is known, and a ring of slots is always filled ahead of use. A streamed extent is handed out with its
//! slot; when the guard is dropped, the slot goes back to the ring and the next read starts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_checksum::xxh3_64;

use super::load::{Loader, Pinned};
use super::unpack::Unpacker;
use super::{DenseLocation, PoolError, Started, Workers};
use crate::io::{Arena, Check, Class, PendingRead, ReadError, ReadFailure, Scheduler, Slot};

/// Slots of the ring: one in use by each of the two extents that a feed-forward part needs at once, and two that are being
/// filled meanwhile.
pub const RING_SLOTS: usize = 4;

/// Names a dense extent: its position in the list given to [`DenseParts::load`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DenseHandle(pub u32);

/// The dense extents: some in memory, the others streamed.
#[derive(Debug)]
pub struct DenseParts {
    pub(super) io: Arc<Scheduler>,
    /// The extents that stay; `None` for those that are streamed.
    pub(super) pinned: Vec<Option<Pinned>>,
    pub(super) locations: Vec<DenseLocation>,
    pub(super) loader: RefCell<Loader>,
    stream: RefCell<Stream>,
    pub(super) unpacker: RefCell<Unpacker>,
    /// The memory has been given back to the system.
    away: bool,
}

/// The streamed extents and the ring.
#[derive(Debug, Default)]
struct Stream {
    /// Handles in the order of use, which repeats with every token.
    order: Vec<DenseHandle>,
    free: Vec<Slot>,
    /// Staging slots that no read is using.
    staging: Vec<Slot>,
    /// Being read, or read and not asked for yet, in the order of use.
    ahead: VecDeque<Ahead>,
    /// Position in `order` of the extent to be read next.
    next: usize,
    bytes_read: u64,
    wait: Duration,
}

/// A streamed extent on its way.
#[derive(Debug)]
struct Ahead {
    handle: DenseHandle,
    read: PendingRead,
    /// For a compressed extent, its slot of the ring; its read goes into a staging slot.
    target: Option<Slot>,
}

/// Memory for dense extents, before they are read.
#[derive(Debug)]
pub struct DenseMemory {
    pub(super) pinned: Arena,
    pub(super) ring: Arena,
    pub(super) staging: Arena,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DenseStats {
    /// Bytes of dense extents read, the first reading included. One that stays counts when it is asked for first.
    pub bytes_read: u64,
    /// Time in which [`DenseParts::dense`] was blocked.
    pub wait: Duration,
}

impl DenseParts {
    /// Reserves addresses for the extents whose `pinned` is true, and for the ring if there are others. An engine can know them
    /// before anything is read.
    ///
    /// # Errors
    /// [`PoolError::Io`] if the system does not give the addresses.
    pub fn reserve(locations: &[DenseLocation], pinned: &[bool]) -> Result<DenseMemory, PoolError> {
        let len = |location: &DenseLocation| location.extent.memory_len() as usize;
        let stays = locations.iter().zip(pinned).filter(|(_, pinned)| **pinned);
        let sizes: Vec<usize> = stays.map(|(location, _)| len(location)).collect();
        let streamed = locations.iter().zip(pinned).filter(|(_, pinned)| !**pinned);
        let largest = streamed.clone().map(|(location, _)| len(location)).max();
        let packed = streamed.filter(|(location, _)| location.extent.packed.is_some());
        let staged = packed.map(|(location, _)| location.extent.len as usize).max();
        let staging = Arena::uniform(
            staged.unwrap_or(0),
            if staged.is_some() { RING_SLOTS } else { 0 },
            "compressed dense parts",
        )?;
        let ring =
            Arena::uniform(largest.unwrap_or(0), if largest.is_some() { RING_SLOTS } else { 0 }, "the dense parts")?;
        Ok(DenseMemory { pinned: Arena::carve(sizes.into_iter(), "the dense parts")?, ring, staging })
    }

    /// Starts to read the pinned extents into the memory that [`reserve`](Self::reserve) has addresses for, in this order, and to
    /// stream the others. Blocks for nothing. Extent `i` has the handle `DenseHandle(i)`; handles ascend in the order of use.
    ///
    /// # Errors
    /// [`PoolError::Read`] for an extent whose read cannot even be queued, because the file ends before it, for instance. An extent
    /// that turns out to be unreadable later is an error of [`dense`](Self::dense).
    ///
    /// # Panics
    /// If the memory was reserved for another list.
    pub fn load(
        io: &Arc<Scheduler>,
        memory: DenseMemory,
        locations: &[DenseLocation],
        pinned: &[bool],
    ) -> Result<DenseParts, PoolError> {
        let mut slots = memory.pinned.into_slots().into_iter();
        let (free, staging) = (memory.ring.into_slots(), memory.staging.into_slots());
        let mut stream = Stream { free, staging, ..Stream::default() };
        let mut places = Vec::with_capacity(locations.len());
        for (i, &pinned) in pinned.iter().enumerate() {
            if pinned {
                places.push(Some(Pinned::new(slots.next().expect("memory was reserved for this list"))));
            } else {
                stream.order.push(DenseHandle(i as u32));
                places.push(None);
            }
        }
        let unpacker = Unpacker::new(Arc::new(Started), locations.iter().any(|l| l.extent.packed.is_some()));
        let parts = DenseParts {
            io: Arc::clone(io),
            pinned: places,
            locations: locations.to_vec(),
            loader: RefCell::default(),
            stream: RefCell::new(stream),
            unpacker: RefCell::new(unpacker),
            away: false,
        };
        parts.start_loading()?;
        parts.top_up()?;
        Ok(parts)
    }

    /// Says which threads decompress extents from now on. Before the first call, threads are started for each extent.
    pub fn set_workers(&mut self, workers: Arc<dyn Workers>) {
        self.unpacker.get_mut().set_workers(workers);
    }

    /// The bytes of an extent, for as long as the guard lives. The ring expects calls in ascending order of handles,
    /// again and again; any other order works, but then it reads ahead in vain. Blocks until the extent is in memory and verified.
    ///
    /// # Errors
    /// [`PoolError::Read`] for an extent that cannot be read or is damaged. The next call reads it again.
    ///
    /// # Panics
    /// If there is no such extent, more than two guards of streamed extents live, or the memory has been given back.
    pub fn dense(&self, handle: DenseHandle) -> Result<DenseGuard<'_>, PoolError> {
        assert!(!self.away, "the dense parts have been given back");
        if let Some(pinned) = &self.pinned[handle.0 as usize] {
            let slot = match pinned.slot() {
                Some(slot) => slot,
                None => self.wait_for(handle, pinned)?,
            };
            return Ok(DenseGuard { bytes: Held::Pinned(slot), owner: self });
        }
        let in_order = self.stream.borrow().ahead.front().is_some_and(|next| next.handle == handle);
        if !in_order {
            self.reposition(handle)?;
        }
        let Ahead { read, target, .. } =
            self.stream.borrow_mut().ahead.pop_front().expect("at most two guards of four slots live");
        let started = Instant::now();
        read.promote();
        let finished = read.finish();
        let mut stream = self.stream.borrow_mut();
        stream.wait += started.elapsed();
        match finished {
            Ok(read) => {
                stream.bytes_read += read.bytes().len() as u64;
                let slot = match target {
                    None => read,
                    Some(mut slot) => {
                        let location = &self.locations[handle.0 as usize];
                        let outcome = unpack(&self.io, location, &mut self.unpacker.borrow_mut(), &read, &mut slot);
                        stream.staging.push(read);
                        if let Err(error) = outcome {
                            stream.free.push(slot);
                            return Err(error.into());
                        }
                        slot
                    }
                };
                Ok(DenseGuard { bytes: Held::Streamed(Some(slot)), owner: self })
            }
            Err(ReadFailure { error, slot }) => {
                stream.take_back(slot, target);
                Err((*error).into())
            }
        }
    }

    /// Waits for a pinned extent.
    fn wait_for<'a>(&self, handle: DenseHandle, pinned: &'a Pinned) -> Result<&'a Slot, PoolError> {
        let started = Instant::now();
        let read = self.finish_loading(handle);
        let mut stream = self.stream.borrow_mut();
        stream.wait += started.elapsed();
        stream.bytes_read += read?;
        pinned.slot().ok_or(PoolError::NoSlots)
    }

    /// True if the extent stays in memory and all its bytes have come, so that asking for it does not wait for the drive.
    #[must_use]
    pub fn is_here(&self, handle: DenseHandle) -> bool {
        self.pinned[handle.0 as usize].as_ref().is_some_and(Pinned::is_here)
    }

    /// Waits until all extents that stay are in memory and verified.
    ///
    /// # Errors
    /// [`PoolError::Read`] for the first that cannot be read or is damaged.
    pub fn wait_for_all(&self) -> Result<(), PoolError> {
        let handles = (0..self.pinned.len()).filter(|&i| self.pinned[i].is_some());
        handles.map(|i| DenseHandle(i as u32)).try_for_each(|handle| self.dense(handle).map(drop))
    }

    /// Bytes of memory that extents will take which are not in memory yet.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        let each = self.pinned.iter().zip(&self.locations);
        let missing = each.filter(|(pinned, _)| pinned.as_ref().is_some_and(|pinned| pinned.slot().is_none()));
        missing.map(|(_, location)| location.extent.memory_len()).sum()
    }

    /// Drops what was read ahead and starts again at `handle`.
    fn reposition(&self, handle: DenseHandle) -> Result<(), PoolError> {
        let mut stream = self.stream.borrow_mut();
        stream.end_reads();
        stream.next = stream.order.iter().position(|h| *h == handle).expect("a streamed extent is in the order");
        drop(stream);
        self.top_up()
    }

    /// Starts reads into all free slots of the ring. They yield to reads for which a caller waits.
    fn top_up(&self) -> Result<(), PoolError> {
        let mut stream = self.stream.borrow_mut();
        while !stream.order.is_empty()
            && let Some(slot) = stream.free.pop()
        {
            let handle = stream.order[stream.next];
            let location = &self.locations[handle.0 as usize];
            let (slot, target) = match location.extent.packed {
                None => (slot, None),
                // There are as many staging slots as slots in the ring, and only an extent with a slot of the ring
                // has a staging slot.
                Some(_) => (stream.staging.pop().expect("a staging slot for each slot of the ring"), Some(slot)),
            };
            let read = submit(&self.io, slot, location, Class::Prefetch)?;
            stream.ahead.push_back(Ahead { handle, read, target });
            stream.next = (stream.next + 1) % stream.order.len();
        }
        Ok(())
    }

    /// Gives all memory back to the system. Nothing can be asked for until [`take_again`](Self::take_again) has read it again.
    pub fn give_back(&mut self) {
        self.away = true;
        self.stop_loading();
        let stream = self.stream.get_mut();
        stream.end_reads();
        // A system that does not take the pages keeps them.
        let pinned = self.pinned.iter_mut().flatten().filter_map(Pinned::slot_mut);
        let slots = pinned.chain(&mut stream.free).chain(&mut stream.staging);
        let given: Vec<_> = slots.map(Slot::give_back).collect();
        drop(given);
        self.io.wake();
    }

    /// True between [`give_back`](Self::give_back) and [`take_again`](Self::take_again).
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// Starts to read again what was given back, as [`load`](Self::load) does.
    ///
    /// # Errors
    /// As [`load`](Self::load). The memory then still counts as given back.
    pub fn take_again(&mut self) -> Result<(), PoolError> {
        if !self.away {
            return Ok(());
        }
        self.start_loading()?;
        self.stream.get_mut().next = 0;
        self.away = false;
        self.top_up()
    }

    /// Totals since the start.
    #[must_use]
    pub fn stats(&self) -> DenseStats {
        let stream = self.stream.borrow();
        DenseStats { bytes_read: stream.bytes_read, wait: stream.wait }
    }

    /// Extents in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.locations.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.locations.is_empty()
    }
}

impl Stream {
    /// Drops what was read ahead.
    fn end_reads(&mut self) {
        self.ahead.iter().for_each(|ahead| ahead.read.cancel());
        while let Some(Ahead { read, target, .. }) = self.ahead.pop_front() {
            let slot = match read.finish() {
                Ok(slot) => Some(slot),
                Err(failure) => failure.slot,
            };
            self.take_back(slot, target);
        }
    }

    /// Frees the slot of a read that has ended, and its slot in the ring if that is another one.
    fn take_back(&mut self, read: Option<Slot>, target: Option<Slot>) {
        match target {
            None => self.free.extend(read),
            Some(target) => {
                self.free.push(target);
                self.staging.extend(read);
            }
        }
    }
}

/// Decompresses an extent and compares the checksum of the result.
pub(super) fn unpack(
    io: &Scheduler,
    location: &DenseLocation,
    unpacker: &mut Unpacker,
    stored: &Slot,
    slot: &mut Slot,
) -> Result<(), ReadError> {
    let DenseLocation { extent, name } = location;
    let Some(packed) = &extent.packed else { return Ok(()) };
    let outcome = unpacker.unpack(stored.bytes(), packed, slot).and_then(|()| {
        let right = !io.verifies() || xxh3_64(slot.bytes()) == packed.checksum;
        right.then_some(()).ok_or_else(|| "what it becomes has another checksum".to_owned())
    });
    outcome.map_err(|problem| {
        let (extent, path, offset, len) = (*name, io.path(extent.file).to_owned(), extent.offset, extent.len as usize);
        ReadError::Code { extent, path, offset, len, problem }
    })
}

fn submit(io: &Scheduler, slot: Slot, location: &DenseLocation, class: Class) -> Result<PendingRead, PoolError> {
    location.submit(io, slot, class, Check::Here).map_err(|failure| (*failure.error).into())
}

/// Keeps a dense extent in memory while it is used.
#[derive(Debug)]
pub struct DenseGuard<'a> {
    bytes: Held<'a>,
    owner: &'a DenseParts,
}

#[derive(Debug)]
enum Held<'a> {
    Pinned(&'a Slot),
    /// `None` only while the guard is being dropped.
    Streamed(Option<Slot>),
}

impl DenseGuard<'_> {
    /// The bytes of the extent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Held::Pinned(slot) => slot.bytes(),
            Held::Streamed(slot) => slot.as_ref().map_or(&[], Slot::bytes),
        }
    }
}

impl Deref for DenseGuard<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for DenseGuard<'_> {
    fn drop(&mut self) {
        let Held::Streamed(slot) = &mut self.bytes else { return };
        self.owner.stream.borrow_mut().free.extend(slot.take());
        // A read that cannot even be submitted fails again, with someone to tell, when its extent is asked for.
        let _ = self.owner.top_up();
    }
}

//! Dense extents: what every token needs.
//!
//! Those that fit are read once, at start, and stay. The others are streamed: every token needs them in the same order, so
//! what comes next is known, and a ring of slots is always being filled ahead of use. A streamed extent is handed out with
//! its slot; when the guard is dropped, the slot goes back to the ring and the next read starts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DenseLocation, PoolError};
use crate::io::{Arena, Check, Class, ExtentRead, IoError, PendingRead, ReadFailure, Scheduler, Slot};

/// Slots of the ring: one in use by each of the two extents that a feed-forward part needs at once, and two that are being
/// filled meanwhile.
pub const RING_SLOTS: usize = 4;

/// Names a dense extent: its position in the list given to [`DenseParts::load`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DenseHandle(pub u32);

/// The dense extents: some in memory, the others streamed.
#[derive(Debug)]
pub struct DenseParts {
    io: Arc<Scheduler>,
    /// The extents that stay; `None` where the extent is streamed.
    pinned: Vec<Option<Slot>>,
    locations: Vec<DenseLocation>,
    stream: RefCell<Stream>,
    /// The memory has been given back to the system.
    away: bool,
}

/// The streamed extents and the ring.
#[derive(Debug, Default)]
struct Stream {
    /// In the order of use, which repeats with every token.
    order: Vec<DenseHandle>,
    free: Vec<Slot>,
    /// Being read, or read and not asked for yet, in the order of use.
    ahead: VecDeque<(DenseHandle, PendingRead)>,
    /// Position in `order` of the extent to be read next.
    next: usize,
    bytes_read: u64,
    wait: Duration,
}

/// Memory for dense extents, before they are read.
#[derive(Debug)]
pub struct DenseMemory {
    pub(super) pinned: Arena,
    pub(super) ring: Arena,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DenseStats {
    /// Bytes of dense extents read, the first reading included.
    pub bytes_read: u64,
    /// Time in which [`DenseParts::dense`] was blocked.
    pub wait: Duration,
}

impl DenseParts {
    /// Takes memory for the extents whose `pinned` is true, and for the ring if there are others. It can be registered with
    /// an engine before anything is read.
    ///
    /// # Errors
    /// [`PoolError::Io`] if the system does not give the memory.
    pub fn reserve(locations: &[DenseLocation], pinned: &[bool]) -> Result<DenseMemory, PoolError> {
        let len = |location: &DenseLocation| location.extent.len as usize;
        let stays = locations.iter().zip(pinned).filter(|(_, pinned)| **pinned);
        let sizes: Vec<usize> = stays.map(|(location, _)| len(location)).collect();
        let streamed = locations.iter().zip(pinned).filter(|(_, pinned)| !**pinned);
        let largest = streamed.map(|(location, _)| len(location)).max();
        let ring =
            Arena::uniform(largest.unwrap_or(0), if largest.is_some() { RING_SLOTS } else { 0 }, "the dense parts")?;
        Ok(DenseMemory { pinned: Arena::carve(sizes.into_iter(), "the dense parts")?, ring })
    }

    /// Reads the pinned extents into the memory that [`reserve`](Self::reserve) took for them, blocks until all are there
    /// and verified, and starts streaming the others. Extent `i` has the handle `DenseHandle(i)`; handles ascend in the
    /// order of use.
    ///
    /// # Errors
    /// [`PoolError::Read`] for the first extent of the list that cannot be read.
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
        let mut stream = Stream { free: memory.ring.into_slots(), ..Stream::default() };
        let mut pending = Vec::with_capacity(locations.len());
        for (i, (location, &pinned)) in locations.iter().zip(pinned).enumerate() {
            if pinned {
                let slot = slots.next().expect("memory was reserved for this list");
                pending.push(Some(submit(io, slot, location, Class::Demand)?));
            } else {
                stream.order.push(DenseHandle(i as u32));
                pending.push(None);
            }
        }
        let mut slots = Vec::with_capacity(pending.len());
        for read in pending {
            let slot = read.map(|read| read.finish().map_err(|failure| *failure.error)).transpose()?;
            stream.bytes_read += slot.as_ref().map_or(0, |s| s.bytes().len() as u64);
            slots.push(slot);
        }
        let parts = DenseParts {
            io: Arc::clone(io),
            pinned: slots,
            locations: locations.to_vec(),
            stream: RefCell::new(stream),
            away: false,
        };
        parts.top_up()?;
        Ok(parts)
    }

    /// The bytes of an extent, for as long as the guard lives. Asking in ascending order of handles, again and again, is
    /// what the ring expects; any other order works and reads ahead in vain.
    ///
    /// # Errors
    /// [`PoolError::Read`] for a streamed extent that cannot be read.
    ///
    /// # Panics
    /// If there is no such extent, more than two guards of streamed extents live, or the memory has been given back.
    pub fn dense(&self, handle: DenseHandle) -> Result<DenseGuard<'_>, PoolError> {
        assert!(!self.away, "the dense parts have been given back");
        if let Some(slot) = &self.pinned[handle.0 as usize] {
            return Ok(DenseGuard { bytes: Held::Pinned(slot), owner: self });
        }
        let in_order = self.stream.borrow().ahead.front().is_some_and(|(next, _)| *next == handle);
        if !in_order {
            self.reposition(handle)?;
        }
        let (_, read) = self.stream.borrow_mut().ahead.pop_front().expect("at most two guards of four slots live");
        let started = Instant::now();
        read.promote();
        let finished = read.finish();
        let mut stream = self.stream.borrow_mut();
        stream.wait += started.elapsed();
        match finished {
            Ok(slot) => {
                stream.bytes_read += slot.bytes().len() as u64;
                Ok(DenseGuard { bytes: Held::Streamed(Some(slot)), owner: self })
            }
            Err(ReadFailure { error, slot }) => {
                stream.free.extend(slot);
                Err((*error).into())
            }
        }
    }

    /// True if the extent stays in memory.
    #[must_use]
    pub fn is_pinned(&self, handle: DenseHandle) -> bool {
        self.pinned[handle.0 as usize].is_some()
    }

    /// Drops what was read ahead and starts again at `handle`.
    fn reposition(&self, handle: DenseHandle) -> Result<(), PoolError> {
        let mut stream = self.stream.borrow_mut();
        stream.end_reads();
        stream.next = stream.order.iter().position(|h| *h == handle).expect("a streamed extent is in the order");
        drop(stream);
        self.top_up()
    }

    /// Starts reads into all free slots of the ring. They yield to reads that someone waits for.
    fn top_up(&self) -> Result<(), PoolError> {
        let mut stream = self.stream.borrow_mut();
        while !stream.order.is_empty()
            && let Some(slot) = stream.free.pop()
        {
            let handle = stream.order[stream.next];
            let read = submit(&self.io, slot, &self.locations[handle.0 as usize], Class::Prefetch)?;
            stream.ahead.push_back((handle, read));
            stream.next = (stream.next + 1) % stream.order.len();
        }
        Ok(())
    }

    /// Gives all memory back to the system. Nothing can be asked for until [`take_again`](Self::take_again) has read it again.
    pub fn give_back(&mut self) {
        self.away = true;
        let stream = self.stream.get_mut();
        stream.end_reads();
        // A system that does not take the pages keeps them.
        let given: Vec<_> = self.pinned.iter_mut().flatten().chain(&mut stream.free).map(Slot::give_back).collect();
        drop(given);
        self.io.wake();
    }

    /// True between [`give_back`](Self::give_back) and [`take_again`](Self::take_again).
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// Takes the memory again that was given back, and reads what was in it.
    ///
    /// # Errors
    /// [`PoolError::Io`] when the system does not give the memory, [`PoolError::Read`] for an extent that cannot be read. The memory
    /// then still counts as given back.
    pub fn take_again(&mut self) -> Result<(), PoolError> {
        if !self.away {
            return Ok(());
        }
        let stream = self.stream.get_mut();
        for slot in self.pinned.iter_mut().flatten().chain(&mut stream.free) {
            let bytes = slot.capacity();
            slot.take_again().map_err(|source| IoError::Memory { bytes, what: "the dense parts", source })?;
        }
        self.io.wake();
        let mut failed = None;
        let mut pending = Vec::with_capacity(self.pinned.len());
        for (place, location) in self.pinned.iter_mut().zip(&self.locations) {
            let read = place.take().map(|slot| self.io.submit(slot, read_of(location, Class::Demand)));
            pending.push(read);
        }
        for (place, read) in self.pinned.iter_mut().zip(pending) {
            match read.map(|read| read.and_then(PendingRead::finish)) {
                None => {}
                Some(Ok(slot)) => {
                    stream.bytes_read += slot.bytes().len() as u64;
                    *place = Some(slot);
                }
                Some(Err(ReadFailure { error, slot })) => {
                    *place = slot;
                    failed.get_or_insert(error);
                }
            }
        }
        if let Some(error) = failed {
            return Err((*error).into());
        }
        stream.next = 0;
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
        self.ahead.iter().for_each(|(_, read)| read.cancel());
        while let Some((_, read)) = self.ahead.pop_front() {
            let slot = match read.finish() {
                Ok(slot) => Some(slot),
                Err(failure) => failure.slot,
            };
            self.free.extend(slot);
        }
    }
}

fn submit(io: &Scheduler, slot: Slot, location: &DenseLocation, class: Class) -> Result<PendingRead, PoolError> {
    io.submit(slot, read_of(location, class)).map_err(|failure| (*failure.error).into())
}

fn read_of(location: &DenseLocation, class: Class) -> ExtentRead {
    let DenseLocation { extent, name } = *location;
    ExtentRead {
        file: extent.file,
        offset: extent.offset,
        len: extent.len as usize,
        checksum: extent.checksum,
        class,
        check: Check::Here,
        name,
    }
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

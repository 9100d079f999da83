//! Dense extents, which every token needs.
//!
//! Those that fit are read once, at start, and stay. The others are streamed: every token needs them in the same order, so
//! the next one is known, and a ring of slots is always filled ahead of use. A streamed extent is handed out with its
//! slot; when the guard is dropped, the slot goes back to the ring and the next read starts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_checksum::xxh3_64;

use super::unpack::Unpacker;
use super::{DenseLocation, PoolError, Started, Workers};
use crate::io::{Arena, Check, Class, IoError, PendingRead, ReadError, ReadFailure, Scheduler, Slot};

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
    /// The extents that stay; `None` for those that are streamed.
    pinned: Vec<Option<Slot>>,
    locations: Vec<DenseLocation>,
    stream: RefCell<Stream>,
    unpacker: RefCell<Unpacker>,
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

    /// Reads the pinned extents into the memory that [`reserve`](Self::reserve) took for them, blocks until all of them
    /// are in memory and verified, and starts streaming the others. Extent `i` has the handle `DenseHandle(i)`; handles
    /// ascend in the order of use.
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
        let (free, staging) = (memory.ring.into_slots(), memory.staging.into_slots());
        let mut stream = Stream { free, staging, ..Stream::default() };
        let mut places = Vec::with_capacity(locations.len());
        for (i, &pinned) in pinned.iter().enumerate() {
            if pinned {
                places.push(Some(slots.next().expect("memory was reserved for this list")));
            } else {
                stream.order.push(DenseHandle(i as u32));
                places.push(None);
            }
        }
        let mut unpacker = Unpacker::new(Arc::new(Started), locations.iter().any(|l| l.extent.packed.is_some()));
        let (bytes, failed) = read_all(io, &mut places, locations, &mut unpacker);
        if let Some(error) = failed {
            return Err(error);
        }
        stream.bytes_read += bytes;
        let parts = DenseParts {
            io: Arc::clone(io),
            pinned: places,
            locations: locations.to_vec(),
            stream: RefCell::new(stream),
            unpacker: RefCell::new(unpacker),
            away: false,
        };
        parts.top_up()?;
        Ok(parts)
    }

    /// Says which threads decompress extents from now on. Before the first call, threads are started for each extent.
    pub fn set_workers(&mut self, workers: Arc<dyn Workers>) {
        self.unpacker.get_mut().set_workers(workers);
    }

    /// The bytes of an extent, for as long as the guard lives. The ring expects calls in ascending order of handles,
    /// again and again; any other order works, but then it reads ahead in vain.
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
                            return Err(error);
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
        let stream = self.stream.get_mut();
        stream.end_reads();
        // A system that does not take the pages keeps them.
        let slots = self.pinned.iter_mut().flatten().chain(&mut stream.free).chain(&mut stream.staging);
        let given: Vec<_> = slots.map(Slot::give_back).collect();
        drop(given);
        self.io.wake();
    }

    /// True between [`give_back`](Self::give_back) and [`take_again`](Self::take_again).
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// Takes again the memory that was given back, and reads its content again.
    ///
    /// # Errors
    /// [`PoolError::Io`] when the system does not give the memory, [`PoolError::Read`] for an extent that cannot be read. The memory
    /// then still counts as given back.
    pub fn take_again(&mut self) -> Result<(), PoolError> {
        if !self.away {
            return Ok(());
        }
        let stream = self.stream.get_mut();
        for slot in self.pinned.iter_mut().flatten().chain(&mut stream.free).chain(&mut stream.staging) {
            let bytes = slot.capacity();
            slot.take_again().map_err(|source| IoError::Memory { bytes, what: "the dense parts", source })?;
        }
        self.io.wake();
        let (bytes, failed) = read_all(&self.io, &mut self.pinned, &self.locations, self.unpacker.get_mut());
        stream.bytes_read += bytes;
        if let Some(error) = failed {
            return Err(error);
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

/// Reads into all slots; returns the bytes read, and the error of the first extent that cannot be read. Compressed extents go through
/// temporary staging slots, since nothing else needs memory yet.
fn read_all(
    io: &Scheduler,
    places: &mut [Option<Slot>],
    locations: &[DenseLocation],
    unpacker: &mut Unpacker,
) -> (u64, Option<PoolError>) {
    let (mut bytes, mut failed) = (0, None);
    let (packed, plain): (Vec<usize>, Vec<usize>) =
        (0..places.len()).filter(|&i| places[i].is_some()).partition(|&i| locations[i].extent.packed.is_some());
    let mut pending = Vec::with_capacity(plain.len());
    for &i in &plain {
        let DenseLocation { extent, name } = &locations[i];
        let slot = places[i].take();
        pending.extend(slot.map(|slot| (i, extent.submit(io, slot, Class::Demand, Check::Here, *name))));
    }
    for (i, read) in pending {
        match read.and_then(PendingRead::finish) {
            Ok(slot) => {
                bytes += slot.bytes().len() as u64;
                places[i] = Some(slot);
            }
            Err(ReadFailure { error, slot }) => {
                places[i] = slot;
                failed.get_or_insert((*error).into());
            }
        }
    }
    match read_packed(io, places, locations, &packed, unpacker) {
        Ok(more) => bytes += more,
        Err(error) => drop(failed.get_or_insert(error)),
    }
    (bytes, failed)
}

/// The same for the compressed extents, in this order.
fn read_packed(
    io: &Scheduler,
    places: &mut [Option<Slot>],
    locations: &[DenseLocation],
    packed: &[usize],
    unpacker: &mut Unpacker,
) -> Result<u64, PoolError> {
    let Some(longest) = packed.iter().map(|&i| locations[i].extent.len as usize).max() else { return Ok(0) };
    let mut free = Arena::uniform(longest, RING_SLOTS.min(packed.len()), "compressed dense parts")?.into_slots();
    let mut todo = packed.iter();
    let mut reads: VecDeque<(usize, PendingRead)> = VecDeque::with_capacity(RING_SLOTS);
    let mut bytes = 0;
    loop {
        while let Some(slot) = free.pop() {
            let Some(&i) = todo.next() else { break };
            reads.push_back((i, submit(io, slot, &locations[i], Class::Demand)?));
        }
        let Some((i, read)) = reads.pop_front() else { return Ok(bytes) };
        let stored = read.finish().map_err(|failure| *failure.error)?;
        bytes += stored.bytes().len() as u64;
        if let Some(slot) = &mut places[i] {
            unpack(io, &locations[i], unpacker, &stored, slot)?;
        }
        free.push(stored);
    }
}

/// Decompresses an extent and compares the checksum of the result.
fn unpack(
    io: &Scheduler,
    location: &DenseLocation,
    unpacker: &mut Unpacker,
    stored: &Slot,
    slot: &mut Slot,
) -> Result<(), PoolError> {
    let DenseLocation { extent, name } = location;
    let Some(packed) = &extent.packed else { return Ok(()) };
    let outcome = unpacker.unpack(stored.bytes(), packed, slot).and_then(|()| {
        let right = !io.verifies() || xxh3_64(slot.bytes()) == packed.checksum;
        right.then_some(()).ok_or_else(|| "what it becomes has another checksum".to_owned())
    });
    outcome.map_err(|problem| {
        let (extent, path, offset, len) = (*name, io.path(extent.file).to_owned(), extent.offset, extent.len as usize);
        ReadError::Code { extent, path, offset, len, problem }.into()
    })
}

fn submit(io: &Scheduler, slot: Slot, location: &DenseLocation, class: Class) -> Result<PendingRead, PoolError> {
    let submitted = location.extent.submit(io, slot, class, Check::Here, location.name);
    submitted.map_err(|failure| (*failure.error).into())
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

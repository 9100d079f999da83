//! Slot memory: one anonymous mapping, carved into page-aligned slots that live for ever.
//!
//! Addresses are reserved once, at start. The memory behind a slot is taken when the slot is first filled: the system provides
//! its pages while bytes are read into it, so opening a model costs nothing for slots that are filled later or never. From then
//! on the slot keeps its memory, and filling it again neither allocates nor faults.
//!
//! A [`Slot`] is the exclusive, safe owner of its bytes. To be read into, it is moved
//! into a `Filling`, and it comes back only when no read is in flight:
//! safe code can never look at bytes that a drive may still be writing.
//!
//! The memory of a slot can be given back to the system ([`Slot::give_back`]): the addresses stay the slot's, and the memory
//! returns when it is filled again.
//!
//! A *piece* is a run of whole slots: a read engine registers a piece with the kernel once all its slots have memory.

use std::fmt;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::error::IoError;
use super::fill::FillState;

/// Alignment in bytes of slots, of offsets in files, and of the length of every read.
pub const PAGE_BYTES: usize = 4096;

/// Alignment of large mappings, so that the kernel can use huge pages from the first byte.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Mappings are multiples of this: the largest page size of a supported system (Apple silicon).
pub(crate) const MAP_GRANULE_BYTES: usize = 16 << 10;

/// Most threads that fault in one mapping: memory, or the host of a VM, limits more of them.
const FAULT_THREADS_MAX: usize = 8;

/// Bytes below which a thread of its own is not worth starting.
const FAULT_BYTES_MIN: usize = 256 << 20;

/// Bytes of a piece, unless one slot has more. Registering so many takes less than a millisecond with huge pages, a few without.
const PIECE_BYTES: usize = 64 << 20;

/// Most pieces of a mapping, unless it has slots of more than a piece.
const PIECES_MAX: usize = 2048;

/// One anonymous mapping. Unmapped when the last slot, chunk and engine that know it are gone.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    huge_pages: bool,
    /// In the order of addresses; together they have all slots.
    pieces: Vec<Piece>,
    /// Counts changes of what the pieces say.
    changes: AtomicU64,
}

/// Some whole slots of a mapping.
#[derive(Debug)]
struct Piece {
    start: usize,
    len: usize,
    /// Slots of the piece without memory.
    absent: AtomicUsize,
    /// How often memory of the piece has been given back. An older registration with the kernel keeps pages that the mapping no
    /// longer shows, and must not be used.
    given_back: AtomicU64,
}

// SAFETY: a mapping is only an address range. Who may touch which bytes of it is decided by the
// owners of disjoint ranges (`Slot`, `Filling`, `ChunkMem`), not by the thread that holds it.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; the methods of `Mapping` itself never read or write its bytes, except
// for the unsafe ones, whose callers promise exclusive or shared access.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves address space in which no page is present.
    fn reserve(bytes: usize, what: &'static str) -> Result<Self, IoError> {
        let error = |source: std::io::Error| IoError::Memory { bytes, what, source };
        let overflow = || error(std::io::ErrorKind::OutOfMemory.into());
        let len = bytes.max(1).checked_next_multiple_of(MAP_GRANULE_BYTES).ok_or_else(overflow)?;
        let align = if len >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { MAP_GRANULE_BYTES };
        let padded = len.checked_add(align).ok_or_else(overflow)?;
        let length = NonZeroUsize::new(padded).ok_or_else(overflow)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice: it
        // cannot overlap memory that anyone else uses.
        let raw = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) };
        let raw = raw.map_err(|errno| error(errno.into()))?.cast::<u8>();
        let base = trim(raw, padded, align, len);
        Ok(Self { base, len, huge_pages: advise_huge_pages(base, len), pieces: Vec::new(), changes: AtomicU64::new(0) })
    }

    /// Makes every page present. The kernel zeroes them, at a few GB/s for each thread that asks.
    fn fault_in(&self, threads: usize) -> std::io::Result<()> {
        let part = self.len.div_ceil(threads.max(1)).next_multiple_of(HUGE_PAGE_BYTES);
        std::thread::scope(|scope| {
            let parts: Vec<_> = (part..self.len)
                .step_by(part)
                .map(|start| scope.spawn(move || self.fault_in_part(start, part.min(self.len - start))))
                .collect();
            let first = self.fault_in_part(0, part.min(self.len));
            parts.into_iter().fold(first, |result, part| {
                let part = part.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")));
                result.and(part)
            })
        })
    }

    fn fault_in_part(&self, start: usize, len: usize) -> std::io::Result<()> {
        let address = self.address(start, len);
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the range is inside this mapping; populating changes no byte.
            let result = unsafe { libc::madvise(address.as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
            if result == 0 {
                return Ok(());
            }
            let error = std::io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) {
                return Err(error);
            }
        }
        // Linux before 5.14, systems that imitate it, and macOS: write one zero to every page.
        for offset in (0..len).step_by(PAGE_BYTES) {
            // SAFETY: `offset` is inside the range. Nobody else uses its bytes meanwhile or relies on them: it is new.
            unsafe { address.as_ptr().add(offset).write_volatile(0) };
        }
        Ok(())
    }

    /// Address of byte `start`; only for arithmetic and for handing to the kernel.
    ///
    /// # Panics
    /// If the range `start..start + len` is not inside the mapping.
    pub(crate) fn address(&self, start: usize, len: usize) -> NonNull<u8> {
        let end = start.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "a range outside the mapping");
        // SAFETY: `start <= self.len`, asserted above, so the result is inside the mapping or
        // one past its end.
        unsafe { self.base.add(start) }
    }

    /// The bytes `start..start + len`.
    ///
    /// # Safety
    /// For the lifetime of the result, nobody may write to the range.
    pub(crate) unsafe fn bytes(&self, start: usize, len: usize) -> &[u8] {
        let address = self.address(start, len);
        // SAFETY: the range is inside the mapping (asserted by `address`), which lives as long
        // as `self` and was initialised with zeros by the kernel; the caller promises that
        // nobody writes to it.
        unsafe { std::slice::from_raw_parts(address.as_ptr(), len) }
    }

    /// The bytes `start..start + len`, to be written.
    ///
    /// # Safety
    /// For the lifetime of the result, nobody else may read from or write to the range.
    #[expect(clippy::mut_from_ref, reason = "the caller owns the range, not the mapping")]
    pub(crate) unsafe fn bytes_mut(&self, start: usize, len: usize) -> &mut [u8] {
        let address = self.address(start, len);
        // SAFETY: as in `bytes`; the caller promises exclusive access to the range.
        unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), len) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where each piece begins, and how many bytes it has.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn pieces(&self) -> impl ExactSizeIterator<Item = (usize, usize)> {
        self.pieces.iter().map(|piece| (piece.start, piece.len))
    }

    /// The piece with the slot that has this byte.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn piece_at(&self, start: usize) -> usize {
        self.pieces.partition_point(|piece| piece.start <= start).saturating_sub(1)
    }

    /// True if all slots of a piece have memory.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn is_present(&self, piece: usize) -> bool {
        self.pieces[piece].absent.load(SeqCst) == 0
    }

    /// A number that changes whenever memory of a piece has been given back.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn generation(&self, piece: usize) -> u64 {
        self.pieces[piece].given_back.load(SeqCst)
    }

    /// A number that changes whenever a piece becomes present, or memory of it has been given back.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// Gives the whole pages of a range back to the system. Reading there afterwards gives zeros, or on macOS the old bytes.
    ///
    /// # Safety
    /// Nobody else may read from or write to the range meanwhile, and nobody may rely on its bytes afterwards.
    unsafe fn give_back(&self, start: usize, len: usize) -> std::io::Result<()> {
        let page = page_bytes();
        let (first, end) = (start.next_multiple_of(page), (start + len) / page * page);
        if first >= end {
            return Ok(());
        }
        let address = self.address(first, end - first).as_ptr().cast();
        #[cfg(target_os = "macos")]
        let advice = libc::MADV_FREE_REUSABLE;
        #[cfg(not(target_os = "macos"))]
        let advice = libc::MADV_DONTNEED;
        // SAFETY: whole pages of an own private anonymous mapping; the caller owns their bytes and has given them up.
        match unsafe { libc::madvise(address, end - first, advice) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Tells the system that a range which was given back will be used again.
    ///
    /// # Safety
    /// Nobody else may read from or write to the range meanwhile, and nobody may rely on its bytes.
    #[cfg(target_os = "macos")]
    unsafe fn reuse(&self, start: usize, len: usize) {
        let page = page_bytes();
        let (first, end) = (start.next_multiple_of(page), (start + len) / page * page);
        if first < end {
            let address = self.address(first, end - first).as_ptr().cast();
            // SAFETY: as in `give_back`. It corrects the accounting; a failure changes nothing else.
            unsafe { libc::madvise(address, end - first, libc::MADV_FREE_REUSE) };
        }
    }
}

/// Bytes of a page of the system's memory.
fn page_bytes() -> usize {
    use nix::unistd::{SysconfVar, sysconf};
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|page| usize::try_from(page).ok()).unwrap_or(PAGE_BYTES).max(PAGE_BYTES)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `reserve` and is unmapped once; every owner of a part of
        // it holds an `Arc` of this mapping, so none is left.
        let result = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of an own mapping");
    }
}

/// Gives back the unaligned head and the tail of a fresh mapping; returns the aligned part.
fn trim(raw: NonNull<u8>, padded: usize, align: usize, len: usize) -> NonNull<u8> {
    let head = raw.as_ptr().align_offset(align);
    assert!(head + len <= padded, "the padding is as large as the alignment");
    // SAFETY: `head + len <= padded`, so both addresses are inside the fresh mapping or one
    // past its end.
    let (base, end) = unsafe { (raw.add(head), raw.add(head + len)) };
    for (start, bytes) in [(raw, head), (end, padded - head - len)] {
        if bytes > 0 {
            // SAFETY: these parts of the fresh mapping were never handed out. Both are whole
            // pages, because the mapping, `align` and `len` are multiples of the page size.
            // A failure leaves address space in use that is never touched: harmless.
            let _ = unsafe { munmap(start.cast(), bytes) };
        }
    }
    base
}

/// Asks for huge pages; true where the kernel has them. Best effort: speed, not correctness.
fn advise_huge_pages(base: NonNull<u8>, len: usize) -> bool {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::mman::{MmapAdvise, madvise};
        // SAFETY: the range is exactly the fresh mapping; the advice changes no byte.
        let advised = unsafe { madvise(base.cast(), len, MmapAdvise::MADV_HUGEPAGE) };
        len >= HUGE_PAGE_BYTES && advised.is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (base, len);
        false
    }
}

/// A mapping that a read engine may register with the kernel, piece by piece.
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) map: Arc<Mapping>,
}

impl Region {
    /// Bytes of the region.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never true: an empty arena still maps one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Slots of one mapping. Their memory is taken from the system as they are filled.
#[derive(Debug)]
pub struct Arena {
    map: Arc<Mapping>,
    slots: Vec<Slot>,
}

impl Arena {
    /// Maps `count` slots of `slot_bytes` each (rounded up to whole pages).
    ///
    /// # Errors
    /// [`IoError::Memory`] if the system does not give the memory.
    pub fn uniform(slot_bytes: usize, count: usize, what: &'static str) -> Result<Arena, IoError> {
        Self::carve(std::iter::repeat_n(slot_bytes, count), what)
    }

    /// Maps one slot per size, each of exactly that many bytes (rounded up to whole pages).
    ///
    /// # Errors
    /// [`IoError::Memory`] if the system does not give the memory.
    pub fn carve(sizes: impl Iterator<Item = usize> + Clone, what: &'static str) -> Result<Arena, IoError> {
        let total = sizes.clone().try_fold(0usize, |sum, size| {
            size.checked_next_multiple_of(PAGE_BYTES).and_then(|size| sum.checked_add(size))
        });
        let too_much = || IoError::Memory { bytes: usize::MAX, what, source: std::io::ErrorKind::OutOfMemory.into() };
        let mut map = Mapping::reserve(total.ok_or_else(too_much)?, what)?;
        let piece_bytes = PIECE_BYTES.max(map.len / PIECES_MAX);
        let (mut start, mut places) = (0, Vec::new());
        for size in sizes {
            let capacity = size.next_multiple_of(PAGE_BYTES);
            match map.pieces.last_mut() {
                Some(piece) if piece.len + capacity <= piece_bytes => {
                    piece.len += capacity;
                    *piece.absent.get_mut() += 1;
                }
                _ => {
                    let (absent, given_back) = (AtomicUsize::new(1), AtomicU64::new(0));
                    map.pieces.push(Piece { start, len: capacity, absent, given_back });
                }
            }
            places.push((start, capacity, map.pieces.len() - 1));
            start += capacity;
        }
        let map = Arc::new(map);
        let slot = |(start, capacity, piece)| {
            let (map, state) = (Arc::clone(&map), Arc::new(FillState::default()));
            Slot { map, state, start, capacity, len: 0, piece, absent: true }
        };
        let slots = places.into_iter().map(slot).collect();
        Ok(Arena { map, slots })
    }

    /// Takes the memory of all slots at once, with several threads, so that no read takes a page fault: for measurements of reads.
    /// `what`: the purpose, for the error.
    ///
    /// # Errors
    /// [`IoError::Memory`] if the system does not give the memory.
    pub fn take(&mut self, what: &'static str) -> Result<(), IoError> {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = cores.min(FAULT_THREADS_MAX).min(self.map.len / FAULT_BYTES_MIN);
        let taken = self.map.fault_in(threads);
        taken.map_err(|source| IoError::Memory { bytes: self.map.len, what, source })?;
        self.slots.iter_mut().for_each(Slot::has_memory);
        Ok(())
    }

    /// The memory as a whole, for engines that register it with the kernel.
    #[must_use]
    pub fn region(&self) -> Region {
        Region { map: Arc::clone(&self.map) }
    }

    /// Bytes of addresses, and of memory once all slots have been filled.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// True if the kernel was willing to back the memory with huge pages.
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        self.map.huge_pages
    }

    /// Writes the same bytes to every slot, with as many threads as fault memory in. Afterwards each slot has pages of its own, so
    /// reading one slot brings nothing of another into the caches.
    ///
    /// # Panics
    /// If a slot is smaller.
    #[cfg(any(test, feature = "sim"))]
    pub fn fill(&mut self, contents: &[u8]) {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let part = self.slots.len().div_ceil(cores.min(FAULT_THREADS_MAX)).max(1);
        std::thread::scope(|scope| {
            for slots in self.slots.chunks_mut(part) {
                scope.spawn(move || {
                    for slot in slots {
                        assert!(contents.len() <= slot.capacity, "the contents are larger than a slot");
                        // SAFETY: the slot owns its range, is borrowed exclusively, and no read into it can be in flight: it has
                        // not left the arena.
                        unsafe { slot.map.bytes_mut(slot.start, contents.len()) }.copy_from_slice(contents);
                        slot.has_memory();
                    }
                });
            }
        });
    }

    /// Hands out the slots. Each byte of the arena belongs to exactly one of them.
    #[must_use]
    pub fn into_slots(self) -> Vec<Slot> {
        self.slots
    }
}

/// Exclusive owner of a page-aligned piece of an arena.
///
/// Holds nothing, or the bytes of the extent that was last read into it.
pub struct Slot {
    pub(crate) map: Arc<Mapping>,
    pub(crate) state: Arc<FillState>,
    pub(crate) start: usize,
    pub(crate) capacity: usize,
    pub(crate) len: usize,
    /// The piece of the mapping with this slot.
    piece: usize,
    /// It has no memory: it has never been filled, or its memory has been given back.
    absent: bool,
}

impl Slot {
    /// Bytes that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The extent that was last read into the slot, verified unless its receiver verifies it; empty if there is none.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        debug_assert!(self.len <= self.capacity);
        // SAFETY: a `Slot` exists only while nothing can write to its range: `begin_fill`
        // consumes it, and it comes back after the last read of the fill has ended.
        unsafe { self.map.bytes(self.start, self.len) }
    }

    /// Gives the slot this many bytes for the caller to write; until then their values are arbitrary.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn overwrite(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.capacity, "more bytes than the slot has room for");
        self.prepare();
        self.len = len;
        if len > 0 {
            self.has_memory();
        }
        // SAFETY: a `Slot` is the only owner of its range, nothing is in flight to it, and it is borrowed exclusively.
        unsafe { self.map.bytes_mut(self.start, len) }
    }

    /// Something is about to be written to the slot.
    pub(crate) fn prepare(&mut self) {
        #[cfg(target_os = "macos")]
        if self.absent {
            // SAFETY: a `Slot` is the only owner of its range, nothing is in flight to it, and it is empty.
            unsafe { self.map.reuse(self.start, self.capacity) };
        }
    }

    /// Notes that the slot has memory, because something has been written to it.
    pub(crate) fn has_memory(&mut self) {
        if std::mem::take(&mut self.absent) && self.map.pieces[self.piece].absent.fetch_sub(1, SeqCst) == 1 {
            self.map.changes.fetch_add(1, SeqCst);
        }
    }

    /// Empties the slot and gives the whole pages of its memory back to the system. A read engine that has the memory registered
    /// lets go of it when it is woken ([`Scheduler::wake`](super::Scheduler::wake)). The memory comes back when the slot is filled
    /// again.
    ///
    /// # Errors
    /// The system's; the slot is empty then as well.
    pub fn give_back(&mut self) -> std::io::Result<()> {
        self.len = 0;
        let piece = &self.map.pieces[self.piece];
        // Before the pages go: from now on no read is issued to a registration of them.
        if !std::mem::replace(&mut self.absent, true) {
            piece.absent.fetch_add(1, SeqCst);
        }
        piece.given_back.fetch_add(1, SeqCst);
        self.map.changes.fetch_add(1, SeqCst);
        // SAFETY: a `Slot` is the only owner of its range, nothing is in flight to it, and its bytes were just given up.
        unsafe { self.map.give_back(self.start, self.capacity) }
    }

    /// True if the slot has no memory: it has never been filled, or its memory has been given back.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.absent
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({}+{}, {} bytes valid)", self.start, self.capacity, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn every_page_is_faulted_in_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 3, 9] {
            for bytes in [1, HUGE_PAGE_BYTES, 5 * HUGE_PAGE_BYTES + 1] {
                let mapping = Mapping::reserve(bytes, "test").expect("address space");
                mapping.fault_in(threads).expect("memory");
                let mut present = vec![0u8; mapping.len().div_ceil(PAGE_BYTES)];
                let address = mapping.address(0, mapping.len()).as_ptr().cast();
                // SAFETY: the range is the whole mapping, and `present` has a byte for each of its pages.
                let result = unsafe { libc::mincore(address, mapping.len(), present.as_mut_ptr()) };
                assert_eq!(result, 0);
                assert!(present.iter().all(|page| page & 1 == 1), "{bytes} bytes, {threads} threads");
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_of_a_slot_comes_when_it_is_filled_and_goes_back_to_the_system() {
        let (bytes, page) = (1 << 20, page_bytes());
        let mut slots = Arena::uniform(bytes, 3, "test").expect("memory").into_slots();
        let present = |slot: &Slot| {
            let mut present = vec![0u8; bytes / page];
            let address = slot.map.address(slot.start, slot.capacity).as_ptr().cast();
            // SAFETY: the range is the slot, and `present` has a byte for each of its pages.
            assert_eq!(unsafe { libc::mincore(address, bytes, present.as_mut_ptr()) }, 0);
            present.iter().filter(|&&page| page & 1 == 1).count()
        };
        assert!(slots.iter().all(|slot| present(slot) == 0 && slot.is_absent()), "nobody has filled them");
        slots.iter_mut().for_each(|slot| slot.overwrite(bytes).fill(1));
        let map = Arc::clone(&slots[0].map);
        assert!(slots.iter().all(|slot| present(slot) == bytes / page && !slot.is_absent()) && map.is_present(0));
        let (generation, changes) = (map.generation(0), map.changes());
        slots[1].give_back().expect("advice");
        slots[1].give_back().expect("twice is once");
        assert!(slots[1].is_absent() && !map.is_present(0));
        assert!(map.generation(0) > generation && map.changes() > changes);
        let counts: Vec<_> = slots.iter().map(present).collect();
        assert_eq!(counts, [bytes / page, 0, bytes / page], "the neighbours keep theirs");
        slots[1].overwrite(bytes).fill(2);
        assert!(!slots[1].is_absent() && map.is_present(0));
        assert_eq!(present(&slots[1]), bytes / page);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pieces_have_all_slots_and_cut_none() {
        let sizes = [PIECE_BYTES / 2, PIECE_BYTES / 2, 4096, 3 * PIECE_BYTES, 4096, PIECE_BYTES];
        let arena = Arena::carve(sizes.into_iter(), "test").expect("addresses");
        let map = Arc::clone(&arena.map);
        let pieces: Vec<_> = map.pieces().collect();
        assert_eq!(pieces.len(), 5, "the halves share one: {pieces:?}");
        let mut end = 0;
        for &(start, len) in &pieces {
            assert_eq!(start, end);
            end += len;
        }
        for slot in arena.into_slots() {
            let (start, len) = pieces[map.piece_at(slot.start)];
            assert!(start <= slot.start && slot.start + slot.capacity <= start + len);
            assert_eq!(map.piece_at(slot.start), map.piece_at(slot.start + slot.capacity - 1));
            assert!(!map.is_present(slot.piece));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_can_be_taken_at_once() {
        let mut arena = Arena::uniform(PAGE_BYTES, 3, "test").expect("addresses");
        arena.take("test").expect("memory");
        assert!(arena.map.is_present(0) && arena.slots.iter().all(|slot| !slot.is_absent()));
    }

    #[test]
    fn slots_are_disjoint_aligned_and_sized() {
        let sizes = [1, 4096, 5000, 3 << 20];
        let arena = Arena::carve(sizes.into_iter(), "test").expect("memory");
        assert!(arena.bytes() >= sizes.iter().sum::<usize>());
        let mut end = 0;
        for (slot, size) in arena.into_slots().iter().zip(sizes) {
            assert_eq!(slot.start, end);
            assert_eq!(slot.capacity(), size.next_multiple_of(PAGE_BYTES));
            assert_eq!(slot.map.address(slot.start, 1).as_ptr() as usize % PAGE_BYTES, 0);
            assert!(slot.bytes().is_empty());
            end += slot.capacity();
        }
    }

    #[test]
    fn large_arenas_start_on_a_huge_page() {
        let arena = Arena::uniform(1 << 20, 5, "test").expect("memory");
        assert_eq!(arena.map.base.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
        assert_eq!(arena.into_slots().len(), 5);
    }

    #[test]
    fn absurd_sizes_are_refused_not_wrapped() {
        for (bytes, count) in [(usize::MAX / 2, 3), (1 << 60, 2), (usize::MAX, 1)] {
            let error = Arena::uniform(bytes, count, "experts").expect_err("refused");
            assert!(matches!(error, IoError::Memory { .. }), "{error}");
        }
    }
}

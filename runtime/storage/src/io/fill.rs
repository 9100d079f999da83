//! Filling a slot: who may write which bytes, and who may read which, while reads are in flight.
//!
//! A fill has two ends. `Filling` belongs to the I/O thread: it cuts the slot into chunks, hands each out as a
//! [`ChunkMem`] (the exclusive right to write one range), takes it back, and knows how far the bytes are contiguous.
//! `Arriving` belongs to the waiter: in an open fill it can read the contiguous prefix, and it gives the slot back
//! once the fill has ended. The rules that make this sound, all enforced in this file:
//!
//! - a byte is covered by at most one `ChunkMem`, and by none once it is part of the prefix;
//! - the prefix shrinks only in `Filling::retract`, which open fills refuse, and only they show it;
//! - a fill ends only when all its `ChunkMem`s have been given back. One that is lost (the I/O
//!   thread died) takes its slot with it: memory that a drive may write is never reused.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use super::arena::{Mapping, PAGE_BYTES, Slot};
use super::error::ReadError;

/// How many chunks may arrive ahead of the first missing one: bits of `Filling::window`.
const WINDOW_CHUNKS: u32 = u128::BITS;

/// Most stripes of a fill.
pub(crate) const STRIPES_MAX: usize = 16;

/// Where a fill is. Stored as a number in `FillState::phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ReadPhase {
    /// Bytes are outstanding, or the I/O thread has yet to verify them.
    Reading = 1,
    /// All bytes are in memory, and verified unless their receiver verifies them.
    Ready = 2,
    /// The read ended without the extent.
    Failed = 3,
    /// The I/O thread died; the slot's memory is not used again.
    Lost = 4,
}

/// The state that the two ends of a fill share. One per slot, allocated with the arena.
#[derive(Debug, Default)]
pub(crate) struct FillState {
    /// Of the fill as a whole, which ends with the last of its stripes.
    phase: AtomicU32,
    /// Stripes that have not ended.
    unfinished: AtomicU32,
    /// The worst phase in which a stripe has ended.
    worst: AtomicU32,
    stripes: [StripeState; STRIPES_MAX],
    /// Position in the order in which fills ended; valid once the fill has ended.
    finished: AtomicU64,
    error: Mutex<Option<Box<ReadError>>>,
}

/// How far a stripe has arrived, as far as `Arriving` may see it: in an open fill. Places in the extent; a stripe begins where the one
/// before it ends.
#[derive(Debug, Default)]
struct StripeState {
    arrived: AtomicUsize,
    end: AtomicUsize,
}

impl FillState {
    /// Prepares for a fill with stripes that end at these places.
    fn begin(&self, ends: impl Iterator<Item = usize>) {
        let (mut start, mut count) = (0, 0);
        for (stripe, end) in self.stripes.iter().zip(ends) {
            stripe.arrived.store(start, SeqCst);
            stripe.end.store(end, SeqCst);
            (start, count) = (end, count + 1);
        }
        self.unfinished.store(count, SeqCst);
        self.worst.store(ReadPhase::Ready as u32, SeqCst);
        self.finished.store(0, SeqCst);
        self.phase.store(ReadPhase::Reading as u32, SeqCst);
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A stripe has ended in this phase.
    fn end_stripe(&self, phase: ReadPhase) {
        self.worst.fetch_max(phase as u32, SeqCst);
        if self.unfinished.fetch_sub(1, SeqCst) == 1 {
            self.phase.store(self.worst.load(SeqCst), SeqCst);
        }
    }

    /// Bytes contiguous from the start, of an extent of `len` bytes.
    fn arrived(&self, len: usize) -> usize {
        let mut prefix = 0;
        for stripe in &self.stripes {
            if prefix == len {
                break;
            }
            prefix = stripe.arrived.load(SeqCst);
            if prefix < stripe.end.load(SeqCst) {
                break;
            }
        }
        prefix
    }

    fn phase(&self) -> ReadPhase {
        match self.phase.load(SeqCst) {
            2 => ReadPhase::Ready,
            3 => ReadPhase::Failed,
            4 => ReadPhase::Lost,
            _ => ReadPhase::Reading,
        }
    }
}

/// The exclusive right to write one range of a slot. Comes back with the completion.
#[derive(Debug)]
pub struct ChunkMem {
    map: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl ChunkMem {
    /// Bytes still to be written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True once all bytes have been written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes to be written.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: a `ChunkMem` is the only owner of its range (rules at the top of the file),
        // and it is borrowed exclusively.
        unsafe { self.map.bytes_mut(self.start, self.len) }
    }

    /// Address to hand to the kernel, which may write `len()` bytes there while this exists.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn address(&self) -> *mut u8 {
        self.map.address(self.start, self.len).as_ptr()
    }

    /// The mapping, and where in it the chunk is: how an engine finds a registered buffer.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only the ring needs it"))]
    pub(crate) fn place(&self) -> (&Arc<Mapping>, usize) {
        (&self.map, self.start)
    }

    /// Drops the first `bytes`: they have been written.
    pub(crate) fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "a read wrote more than it was given");
        self.start += bytes;
        self.len -= bytes;
    }
}

/// An I/O thread's end of a fill, or of one of its stripes.
#[derive(Debug)]
pub(crate) struct Filling {
    map: Arc<Mapping>,
    state: Arc<FillState>,
    /// Which stripe of the fill this is, and where in the extent it begins.
    stripe: usize,
    before: usize,
    start: usize,
    len: usize,
    chunk_bytes: usize,
    /// Whether the prefix is shown to the other end, so that it can never be taken back.
    open: bool,
    /// Chunks handed out so far in this attempt.
    issued: u32,
    /// Chunks that are contiguous from the start.
    arrived: u32,
    /// Bit i: chunk `arrived + i` has arrived.
    window: u128,
    /// Chunks handed out and not given back.
    outstanding: u32,
    ended: bool,
}

impl Filling {
    /// Splits a slot into the two ends of a fill of `len` bytes. With `open`, the other end may look at the prefix, and the
    /// bytes are read only once.
    ///
    /// # Panics
    /// If `len` does not fit the slot or is not whole pages, or `chunk_bytes` is not whole pages.
    pub(crate) fn begin(slot: Slot, len: usize, chunk_bytes: usize, open: bool) -> (Filling, Arriving) {
        let mut filling = None;
        let arriving = Self::begin_stripes(slot, &[(len, chunk_bytes)], open, |one| filling = Some(one));
        (filling.expect("one stripe"), arriving)
    }

    /// Splits a slot into the ends of a fill whose stripes lie one behind the other, each with its own bytes and chunks: an end for
    /// each stripe, which `each` gets in their order, and that of the waiter. The fill ends when all stripes have.
    ///
    /// # Panics
    /// Unless there are 1 to [`STRIPES_MAX`] stripes of whole pages that fit the slot.
    pub(crate) fn begin_stripes(
        mut slot: Slot,
        stripes: &[(usize, usize)],
        open: bool,
        mut each: impl FnMut(Filling),
    ) -> Arriving {
        assert!((1..=STRIPES_MAX).contains(&stripes.len()), "an impossible number of stripes");
        let mut end = 0usize;
        for &(len, chunk_bytes) in stripes {
            assert!(len > 0 && len.is_multiple_of(PAGE_BYTES));
            assert!(chunk_bytes > 0 && chunk_bytes.is_multiple_of(PAGE_BYTES));
            assert!(u32::try_from(len / chunk_bytes).is_ok(), "more chunks than can be counted");
            end = end.checked_add(len).expect("the stripes of a slot fit into memory");
        }
        assert!(end <= slot.capacity, "the stripes do not fit the slot");
        let mut ends = 0;
        slot.state.begin(stripes.iter().map(|(len, _)| {
            ends += len;
            ends
        }));
        slot.len = 0;
        slot.prepare();
        let mut before = 0;
        for (stripe, &(len, chunk_bytes)) in stripes.iter().enumerate() {
            each(Filling {
                map: Arc::clone(&slot.map),
                state: Arc::clone(&slot.state),
                stripe,
                before,
                start: slot.start + before,
                len,
                chunk_bytes,
                open,
                issued: 0,
                arrived: 0,
                window: 0,
                outstanding: 0,
                ended: false,
            });
            before += len;
        }
        Arriving { slot, len: end }
    }

    /// Whether this is the beginning of the extent.
    pub(crate) fn is_first(&self) -> bool {
        self.stripe == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    fn chunk_count(&self) -> u32 {
        u32::try_from(self.len.div_ceil(self.chunk_bytes)).unwrap_or(u32::MAX)
    }

    fn chunk_offset(&self, number: u32) -> usize {
        number as usize * self.chunk_bytes
    }

    /// Bytes from the start of the extent at which chunk `number` ends.
    pub(crate) fn chunk_end(&self, number: u32) -> usize {
        (self.chunk_offset(number) + self.chunk_bytes).min(self.len)
    }

    fn has_more(&self) -> bool {
        self.issued < self.chunk_count()
    }

    /// True if only one chunk has not been handed out.
    pub(crate) fn is_last(&self) -> bool {
        self.issued + 1 == self.chunk_count()
    }

    /// True if `next_chunk` would hand one out now.
    pub(crate) fn can_issue(&self) -> bool {
        self.has_more() && self.issued - self.arrived < WINDOW_CHUNKS
    }

    /// Hands out the next chunk: its number and the right to write it.
    pub(crate) fn next_chunk(&mut self) -> Option<(u32, ChunkMem)> {
        if !self.can_issue() {
            return None;
        }
        let number = self.issued;
        self.issued += 1;
        self.outstanding += 1;
        let offset = self.chunk_offset(number);
        let len = self.chunk_end(number) - offset;
        Some((number, ChunkMem { map: Arc::clone(&self.map), start: self.start + offset, len }))
    }

    /// Takes a chunk back. It has arrived if nothing of it is left to be written.
    ///
    /// # Panics
    /// If the chunk is not chunk `number` of this fill.
    pub(crate) fn give_back(&mut self, number: u32, chunk: ChunkMem) {
        assert!(Arc::ptr_eq(&chunk.map, &self.map), "a chunk of another arena");
        assert_eq!(chunk.start + chunk.len, self.start + self.chunk_end(number), "another chunk");
        assert!(self.outstanding > 0 && number >= self.arrived && number < self.issued);
        self.outstanding -= 1;
        if !chunk.is_empty() {
            return;
        }
        self.window |= 1 << (number - self.arrived);
        let contiguous = self.window.trailing_ones();
        self.window = self.window.checked_shr(contiguous).unwrap_or(0);
        self.arrived += contiguous;
        if self.open {
            self.state.stripes[self.stripe].arrived.store(self.before + self.arrived_bytes(), SeqCst);
        }
    }

    /// Bytes contiguous from the start.
    pub(crate) fn arrived_bytes(&self) -> usize {
        if self.arrived == 0 { 0 } else { self.chunk_end(self.arrived - 1) }
    }

    /// The contiguous prefix.
    pub(crate) fn prefix(&self) -> &[u8] {
        // SAFETY: no `ChunkMem` covers bytes of the prefix, and it can only shrink through
        // `&mut self`, so nobody writes to it while it is borrowed.
        unsafe { self.map.bytes(self.start, self.arrived_bytes()) }
    }

    /// Begins again: all chunks can be handed out a second time.
    ///
    /// # Panics
    /// If chunks are outstanding, or the fill is open: someone may be looking at the prefix.
    pub(crate) fn retract(&mut self) {
        assert_eq!(self.outstanding, 0, "chunks are in flight");
        assert!(!self.open, "what has been shown is not taken back");
        self.issued = 0;
        self.arrived = 0;
        self.window = 0;
    }

    /// Ends the fill; the other end gets the slot back. `order` counts ended fills.
    ///
    /// # Panics
    /// If chunks are outstanding, or the fill succeeds without all its bytes.
    pub(crate) fn end(mut self, result: Result<(), ReadError>, order: u64) {
        assert_eq!(self.outstanding, 0, "chunks are in flight");
        let phase = match result {
            Ok(()) => {
                assert_eq!(self.arrived_bytes(), self.len, "bytes are missing");
                ReadPhase::Ready
            }
            Err(error) => {
                let mut place = self.state.error.lock().unwrap_or_else(PoisonError::into_inner);
                place.get_or_insert(Box::new(error));
                ReadPhase::Failed
            }
        };
        self.ended = true;
        self.state.finished.fetch_max(order, SeqCst);
        self.state.end_stripe(phase);
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if !self.ended {
            self.state.end_stripe(ReadPhase::Lost);
        }
    }
}

/// The waiter's end of a fill. Owns the slot, but shows only what has arrived, and only of an open fill.
#[derive(Debug)]
pub(crate) struct Arriving {
    slot: Slot,
    len: usize,
}

impl Arriving {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn phase(&self) -> ReadPhase {
        self.slot.state.phase()
    }

    pub(crate) fn arrived_bytes(&self) -> usize {
        self.slot.state.arrived(self.len)
    }

    /// Position in the order in which fills ended; meaningful once the fill has ended.
    pub(crate) fn finished(&self) -> u64 {
        self.slot.state.finished.load(SeqCst)
    }

    /// The bytes that have arrived contiguously; none of a fill that is not open.
    pub(crate) fn prefix(&self) -> &[u8] {
        let len = self.arrived_bytes();
        // SAFETY: these bytes had arrived in an open fill: no `ChunkMem` covers them, and as such a fill is not retracted,
        // none will. The slot leaves `self` only when this borrow has ended.
        unsafe { self.slot.map.bytes(self.slot.start, len) }
    }

    /// Ends the waiter's side.
    ///
    /// # Panics
    /// If the fill has not ended.
    pub(crate) fn finish(mut self) -> Result<Slot, (Option<Box<ReadError>>, Option<Slot>)> {
        match self.phase() {
            ReadPhase::Ready => {
                self.slot.len = self.len;
                self.slot.has_memory();
                Ok(self.slot)
            }
            ReadPhase::Failed => {
                let mut place = self.slot.state.error.lock().unwrap_or_else(PoisonError::into_inner);
                let error = place.take();
                drop(place);
                Err((error, Some(self.slot)))
            }
            ReadPhase::Lost => Err((None, None)),
            ReadPhase::Reading => panic!("the fill has not ended"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::arena::Arena;

    fn slot(bytes: usize) -> Slot {
        Arena::uniform(bytes, 1, "test").expect("memory").into_slots().remove(0)
    }

    fn fill(chunk: &mut ChunkMem, byte: u8) {
        chunk.as_mut_slice().fill(byte);
        chunk.advance(chunk.len());
    }

    #[test]
    fn the_prefix_grows_only_over_contiguous_chunks() {
        let (mut filling, arriving) = Filling::begin(slot(5 * 4096), 5 * 4096, 2 * 4096, true);
        let mut chunks: Vec<_> = std::iter::from_fn(|| filling.next_chunk()).collect();
        assert_eq!(chunks.iter().map(|c| c.1.len()).collect::<Vec<_>>(), [8192, 8192, 4096]);
        for (number, expect) in [(2, 0), (0, 8192), (1, 5 * 4096)] {
            let at = chunks.iter().position(|c| c.0 == number).expect("there");
            let (number, mut chunk) = chunks.remove(at);
            fill(&mut chunk, number as u8 + 1);
            filling.give_back(number, chunk);
            assert_eq!(arriving.arrived_bytes(), expect);
            assert_eq!(arriving.prefix().len(), expect);
        }
        filling.end(Ok(()), 1);
        let slot = arriving.finish().expect("ready");
        assert_eq!(slot.bytes()[0], 1);
        assert_eq!(slot.bytes()[8192], 2);
        assert_eq!(slot.bytes()[16384], 3);
    }

    #[test]
    fn stripes_arrive_on_their_own_and_the_prefix_is_what_is_contiguous() {
        let mut fillings = Vec::new();
        let stripes = [(3 * 4096, 2 * 4096), (4096, 4096), (2 * 4096, 4096)];
        let arriving = Filling::begin_stripes(slot(6 * 4096), &stripes, true, |filling| fillings.push(filling));
        assert_eq!(arriving.len(), 6 * 4096);
        let arrive = |filling: &mut Filling, byte| {
            let (number, mut chunk) = filling.next_chunk().expect("a chunk");
            fill(&mut chunk, byte);
            filling.give_back(number, chunk);
        };
        let mut last = fillings.pop().expect("three");
        let mut middle = fillings.pop().expect("three");
        let mut first = fillings.pop().expect("three");
        assert!(first.is_first() && !middle.is_first());
        arrive(&mut middle, 3);
        middle.end(Ok(()), 1);
        arrive(&mut last, 4);
        assert_eq!((arriving.arrived_bytes(), arriving.phase()), (0, ReadPhase::Reading));
        arrive(&mut first, 1);
        assert_eq!(arriving.arrived_bytes(), 2 * 4096);
        arrive(&mut first, 2);
        assert_eq!(arriving.arrived_bytes(), 5 * 4096);
        first.end(Ok(()), 2);
        arrive(&mut last, 5);
        assert_eq!((arriving.arrived_bytes(), arriving.phase()), (6 * 4096, ReadPhase::Reading));
        last.end(Ok(()), 3);
        assert_eq!((arriving.phase(), arriving.finished()), (ReadPhase::Ready, 3));
        let slot = arriving.finish().expect("ready");
        let starts = [0, 1, 2, 3, 4, 5].map(|page| slot.bytes()[page * 4096]);
        assert_eq!(starts, [1, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn the_worst_end_of_a_stripe_is_that_of_the_fill() {
        let begin = || {
            let mut fillings = Vec::new();
            let arriving =
                Filling::begin_stripes(slot(2 * 4096), &[(4096, 4096); 2], false, |filling| fillings.push(filling));
            (fillings, arriving)
        };
        let complete = |mut filling: Filling, order| {
            let (number, mut chunk) = filling.next_chunk().expect("a chunk");
            fill(&mut chunk, 1);
            filling.give_back(number, chunk);
            filling.end(Ok(()), order);
        };
        let stopped = || ReadError::Stopped { reason: "a test".to_owned() };
        let (mut fillings, arriving) = begin();
        fillings.remove(0).end(Err(stopped()), 1);
        assert_eq!(arriving.phase(), ReadPhase::Reading, "a drive may still write to the other");
        complete(fillings.remove(0), 2);
        assert!(matches!(arriving.finish(), Err((Some(_), Some(_)))));

        let (mut fillings, arriving) = begin();
        drop(fillings.remove(0));
        complete(fillings.remove(0), 1);
        assert_eq!(arriving.phase(), ReadPhase::Lost);
        assert!(matches!(arriving.finish(), Err((None, None))));
    }

    #[test]
    fn only_a_closed_fill_can_begin_again_and_it_shows_nothing() {
        let (mut filling, arriving) = Filling::begin(slot(8192), 8192, 4096, false);
        for byte in [1, 2] {
            let (number, mut chunk) = filling.next_chunk().expect("a chunk");
            fill(&mut chunk, byte);
            filling.give_back(number, chunk);
        }
        assert_eq!((filling.arrived_bytes(), arriving.arrived_bytes()), (8192, 0));
        assert!(arriving.prefix().is_empty());
        filling.retract();
        assert_eq!(filling.arrived_bytes(), 0);
        for byte in [3, 4] {
            let (number, mut chunk) = filling.next_chunk().expect("a chunk");
            fill(&mut chunk, byte);
            filling.give_back(number, chunk);
        }
        filling.end(Ok(()), 1);
        let slot = arriving.finish().expect("ready");
        assert_eq!((slot.bytes()[0], slot.bytes()[4096]), (3, 4));
    }

    #[test]
    #[should_panic(expected = "what has been shown")]
    fn an_open_fill_does_not_begin_again() {
        let (mut filling, _arriving) = Filling::begin(slot(4096), 4096, 4096, true);
        let (number, mut chunk) = filling.next_chunk().expect("a chunk");
        fill(&mut chunk, 1);
        filling.give_back(number, chunk);
        filling.retract();
    }

    #[test]
    fn chunks_are_not_handed_out_beyond_the_window() {
        let pages = 300;
        let (mut filling, _arriving) = Filling::begin(slot(pages * 4096), pages * 4096, 4096, false);
        let mut chunks: Vec<_> = std::iter::from_fn(|| filling.next_chunk()).collect();
        assert_eq!(chunks.len(), 128);
        let (number, mut first) = chunks.remove(0);
        for (number, mut chunk) in chunks {
            fill(&mut chunk, 0);
            filling.give_back(number, chunk);
        }
        assert_eq!(filling.arrived_bytes(), 0);
        assert!(!filling.can_issue() && filling.has_more());
        fill(&mut first, 0);
        filling.give_back(number, first);
        assert_eq!(filling.arrived_bytes(), 128 * 4096);
        assert!(filling.can_issue());
    }

    #[test]
    fn a_lost_fill_keeps_its_slot() {
        let (mut filling, arriving) = Filling::begin(slot(4096), 4096, 4096, false);
        let _chunk = filling.next_chunk();
        drop(filling);
        assert_eq!(arriving.phase(), ReadPhase::Lost);
        assert!(matches!(arriving.finish(), Err((None, None))));
    }
}

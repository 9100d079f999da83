//! The checksum of an expert, computed by the threads that multiply it, while its bytes are in their caches.
//!
//! Multiplying reads the expert from memory anyway. Summing its blocks at the same time costs what that takes out of a cache, at some
//! 40 GB/s of a core (Zen 4). Reading it a second time to sum them would cost as much as multiplying, since both run at the speed
//! of memory.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use sluice_checksum::{BLOCK_BYTES, BlockHash, BlockSum, block_sums};
use sluice_kernels::Watch;

/// Sums that are computed before they are put into their places.
const BATCH: usize = 16;

/// The checksum of one extent, while it is computed. Each block is summed by the thread that reads its first byte.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Sums that arrived before those of earlier blocks, and the sum of the last block. Stores are relaxed: the pool of threads
    /// orders them before whatever follows the job.
    sums: Vec<[AtomicU64; 8]>,
    blocks: usize,
    /// Blocks that have been summed.
    summed: AtomicUsize,
    /// All blocks before this one are in `head`.
    next: AtomicUsize,
    head: Mutex<BlockHash>,
}

impl Tally {
    /// Bytes of memory for extents of `len` bytes.
    pub fn memory(len: u64) -> u64 {
        len / BLOCK_BYTES as u64 * size_of::<[AtomicU64; 8]>() as u64
    }

    /// Makes room for extents of `len` bytes, so that a later call allocates nothing.
    pub fn reserve(&mut self, len: usize) {
        let blocks = len / BLOCK_BYTES;
        if self.sums.len() < blocks {
            self.sums.resize_with(blocks, Default::default);
        }
    }

    /// Starts again, for an extent of `len` bytes, whole pages.
    pub fn begin(&mut self, len: usize) -> &Self {
        self.reserve(len);
        self.blocks = len / BLOCK_BYTES;
        *self.summed.get_mut() = 0;
        *self.next.get_mut() = 0;
        *self.head.get_mut().unwrap_or_else(PoisonError::into_inner) = BlockHash::default();
        self
    }

    /// Sums the blocks that begin in `range`; `bytes`: as much of the extent as has arrived, whole pages.
    pub fn add(&self, bytes: &[u8], range: Range<usize>) {
        let blocks = range.start.div_ceil(BLOCK_BYTES)..range.end.div_ceil(BLOCK_BYTES);
        self.summed.fetch_add(blocks.len(), Relaxed);
        let kept = self.absorb(bytes, blocks.start, blocks.end.min(self.blocks - 1));
        let mut batch = [[0; 8]; BATCH];
        for first in (kept..blocks.end).step_by(BATCH) {
            let end = (first + BATCH).min(blocks.end);
            let batch = &mut batch[..end - first];
            let bytes = &bytes[first * BLOCK_BYTES..end * BLOCK_BYTES];
            block_sums(bytes, end == self.blocks, batch);
            for (to, from) in self.sums[first..].iter().zip(batch) {
                to.iter().zip(from).for_each(|(to, from)| to.store(*from, Relaxed));
            }
        }
    }

    /// Absorbs the blocks from `first` to `end` if they are the next ones. Returns the first block that has to be kept for later.
    fn absorb(&self, bytes: &[u8], first: usize, end: usize) -> usize {
        // Only the thread with the next blocks moves `next`, so it cannot change before this thread has moved it.
        if end <= first || self.next.load(Relaxed) != first {
            return first;
        }
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        head.update(&bytes[first * BLOCK_BYTES..end * BLOCK_BYTES]);
        self.next.store(end, Relaxed);
        end
    }

    /// The xxh3-64 of the extent.
    ///
    /// # Panics
    /// Unless every block has been summed once.
    pub fn checksum(&self) -> u64 {
        assert_eq!(self.summed.load(Relaxed), self.blocks, "blocks of the extent have not been summed");
        let sum = |sums: &[AtomicU64; 8]| -> BlockSum { std::array::from_fn(|i| sums[i].load(Relaxed)) };
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let last = self.blocks - 1;
        let mut batch = [[0; 8]; BATCH];
        while head.blocks() < last {
            let count = (last - head.blocks()).min(BATCH);
            let sums = &self.sums[head.blocks()..][..count];
            batch.iter_mut().zip(sums).for_each(|(to, sums)| *to = sum(sums));
            head.absorb(&batch[..count]);
        }
        head.finish(sum(&self.sums[last]))
    }
}

/// Bytes of an extent, from its first on, and their tally, if there is one.
#[derive(Clone, Copy)]
pub(super) struct Tallied<'a> {
    /// The bytes: all of the extent, or as many as have arrived.
    pub bytes: &'a [u8],
    /// Sees every byte that is multiplied.
    pub tally: Option<&'a Tally>,
}

impl<'a> Tallied<'a> {
    /// Bytes without a tally.
    pub fn not(bytes: &'a [u8]) -> Self {
        Tallied { bytes, tally: None }
    }

    /// Adds bytes that no product reads.
    pub fn add(&self, range: Range<usize>) {
        if let Some(tally) = self.tally {
            tally.add(self.bytes, range);
        }
    }

    /// A watch for a product with a matrix that begins at byte `offset` of the extent.
    pub fn watch(&self, offset: usize) -> Option<TallyWatch<'a>> {
        self.tally.map(|tally| TallyWatch { tally, bytes: self.bytes, offset })
    }
}

/// Adds the bytes that a product has read to a tally.
pub(super) struct TallyWatch<'a> {
    tally: &'a Tally,
    bytes: &'a [u8],
    offset: usize,
}

impl Watch for TallyWatch<'_> {
    fn seen(&self, bytes: Range<usize>) {
        self.tally.add(self.bytes, self.offset + bytes.start..self.offset + bytes.end);
    }
}

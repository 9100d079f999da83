//! The checksum of an input of whole blocks, whose sums can be formed by any thread.

use crate::constants::SECRET;
use crate::isa::{Isa, STRIPE};
use crate::long;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 1024;

/// What one block adds to the accumulators.
pub type BlockSum = [u64; 8];

/// The sums of consecutive blocks. `ends` says whether the last of them ends the input; such a block has a secret of its
/// own.
///
/// # Panics
/// If the number of blocks in `bytes` differs from the number of `sums`.
pub fn block_sums(bytes: &[u8], ends: bool, sums: &mut [BlockSum]) {
    let (blocks, rest) = bytes.as_chunks();
    assert!(rest.is_empty() && blocks.len() == sums.len(), "{} bytes for {} sums", bytes.len(), sums.len());
    Isa::detect().sums(&SECRET, blocks, sums);
    if let (true, Some(block), Some(sum)) = (ends, blocks.last(), sums.last_mut()) {
        *sum = [0; 8];
        let last: &[u8; STRIPE] = block.last_chunk().expect("a block is longer than a stripe");
        long::add_rest(&SECRET, sum, block, last);
    }
}

/// An unfinished xxh3-64 of an input of whole blocks: the accumulators after the blocks taken so far.
#[derive(Clone, Debug)]
pub struct BlockHash {
    state: BlockSum,
    blocks: usize,
}

impl Default for BlockHash {
    fn default() -> Self {
        BlockHash { state: long::START, blocks: 0 }
    }
}

impl BlockHash {
    /// Blocks that have been taken.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Takes the sums of the next blocks, none of which is the last of the input.
    pub fn absorb(&mut self, sums: &[BlockSum]) {
        Isa::detect().absorb(&SECRET, &mut self.state, sums);
        self.blocks += sums.len();
    }

    /// Takes the next blocks themselves, none of which is the last of the input. This gives the same as absorbing their sums,
    /// but faster.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks.
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks();
        assert!(rest.is_empty(), "{} bytes are not whole blocks", bytes.len());
        Isa::detect().update(&SECRET, &mut self.state, blocks);
        self.blocks += blocks.len();
    }

    /// The checksum of an input that ends with one more block, which has this sum.
    #[must_use]
    pub fn finish(mut self, last: BlockSum) -> u64 {
        self.state.iter_mut().zip(last).for_each(|(word, sum)| *word = word.wrapping_add(sum));
        long::merge64(&self.state, &SECRET, ((self.blocks + 1) * BLOCK_BYTES) as u64)
    }
}

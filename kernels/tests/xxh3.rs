//! Checksums made of sums of blocks are those of the library.

mod common;

use common::*;
use sluice_kernels::*;
use xxhash_rust::xxh3::xxh3_64;

/// The checksum of `bytes`, formed in pieces of `blocks` blocks, the last piece first.
fn in_pieces(kernels: Kernels, bytes: &[u8], blocks: usize) -> u64 {
    let mut sums = vec![[0; 8]; bytes.len() / XXH3_BLOCK_BYTES];
    let mut end = sums.len();
    while end > 0 {
        let start = (end - 1) / blocks * blocks;
        let piece = &bytes[start * XXH3_BLOCK_BYTES..end * XXH3_BLOCK_BYTES];
        kernels.xxh3_sums(piece, end * XXH3_BLOCK_BYTES == bytes.len(), &mut sums[start..end]);
        end = start;
    }
    let (last, others) = sums.split_last().expect("an input has a block");
    let mut hash = Xxh3State::default();
    others.chunks(blocks).for_each(|sums| kernels.xxh3_absorb(&mut hash, sums));
    assert_eq!(hash.blocks(), others.len());
    hash.finish(*last)
}

/// The same of blocks that come in order, but for those from `kept` on.
fn in_order(kernels: Kernels, bytes: &[u8], blocks: usize, kept: usize) -> u64 {
    let mut hash = Xxh3State::default();
    let (first, rest) = bytes.split_at(kept * XXH3_BLOCK_BYTES);
    first.chunks(blocks * XXH3_BLOCK_BYTES).for_each(|piece| kernels.xxh3_update(&mut hash, piece));
    assert_eq!(hash.blocks(), kept);
    let mut sums = vec![[0; 8]; rest.len() / XXH3_BLOCK_BYTES];
    kernels.xxh3_sums(rest, true, &mut sums);
    let (last, others) = sums.split_last().expect("the last block is kept");
    kernels.xxh3_absorb(&mut hash, others);
    hash.finish(*last)
}

#[test]
fn sums_in_any_order_make_the_checksum() {
    let mut rng = Rng(1);
    for len in [1, 2, 3, 4, 7, 64, 257] {
        let bytes = rng.bytes(len * XXH3_BLOCK_BYTES);
        for kernels in Kernels::available() {
            for blocks in [1, 3, 16, 1000] {
                let what = format!("{}, {len} blocks in pieces of {blocks}", kernels.isa_name());
                assert_eq!(in_pieces(kernels, &bytes, blocks), xxh3_64(&bytes), "{what}");
                for kept in [0, len / 2, len - 1] {
                    assert_eq!(in_order(kernels, &bytes, blocks, kept), xxh3_64(&bytes), "{what}, {kept} before");
                }
            }
        }
    }
}

#[test]
fn every_bit_counts() {
    let mut bytes = Rng(2).bytes(4 * XXH3_BLOCK_BYTES);
    let right = xxh3_64(&bytes);
    for bit in (0..8 * bytes.len()).step_by(97) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        for kernels in Kernels::available() {
            assert_ne!(in_pieces(kernels, &bytes, 2), right, "bit {bit}");
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

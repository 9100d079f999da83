//! Blocks with NEON, two accumulators to a vector. Compilers do not vectorise the scalar specification there.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

use std::arch::aarch64::*;

use crate::blocks::{BLOCK_BYTES, BlockSum};
use crate::constants::{PRIME32, u64_at};
use crate::isa::{SCRAMBLE_SECRET, STRIPE, Secret};

/// Proof that the CPU has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The proof, if it is true.
    #[inline]
    pub(crate) fn new() -> Option<Neon> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    pub(crate) fn sums(self, secret: &Secret, blocks: &[[u8; BLOCK_BYTES]], to: &mut [BlockSum]) {
        // SAFETY: `self` exists only where the CPU has NEON.
        unsafe { sums(secret, blocks, to) }
    }

    pub(crate) fn absorb(self, secret: &Secret, state: &mut BlockSum, sums: &[BlockSum]) {
        // SAFETY: as above.
        unsafe { absorb(secret, state, sums) }
    }

    pub(crate) fn update(self, secret: &Secret, state: &mut BlockSum, blocks: &[[u8; BLOCK_BYTES]]) {
        // SAFETY: as above.
        unsafe { update(secret, state, blocks) }
    }
}

/// Eight words.
type Words = [uint64x2_t; 4];

#[target_feature(enable = "neon")]
fn sums(secret: &Secret, blocks: &[[u8; BLOCK_BYTES]], sums: &mut [BlockSum]) {
    for (block, sum) in blocks.iter().zip(sums) {
        store(sum, &block_sum(secret, block));
    }
}

#[target_feature(enable = "neon")]
fn absorb(secret: &Secret, state: &mut BlockSum, sums: &[BlockSum]) {
    let mut words = load(state);
    for sum in sums {
        scramble(secret, &mut words, &load(sum));
    }
    store(state, &words);
}

#[target_feature(enable = "neon")]
fn update(secret: &Secret, state: &mut BlockSum, blocks: &[[u8; BLOCK_BYTES]]) {
    let mut words = load(state);
    for block in blocks {
        scramble(secret, &mut words, &block_sum(secret, block));
    }
    store(state, &words);
}

#[inline]
#[target_feature(enable = "neon")]
fn block_sum(secret: &Secret, block: &[u8; BLOCK_BYTES]) -> Words {
    let mut products = [vdupq_n_u64(0); 4];
    let mut values = products;
    for stripe in 0..BLOCK_BYTES / STRIPE {
        for i in 0..4 {
            let value = load_bytes(block, STRIPE * stripe + 16 * i);
            let keyed = veorq_u64(value, load_bytes(secret, 8 * stripe + 16 * i));
            products[i] = vmlal_u32(products[i], vmovn_u64(keyed), vshrn_n_u64::<32>(keyed));
            values[i] = vaddq_u64(values[i], value);
        }
    }
    for i in 0..4 {
        // Each word is added to its neighbour's accumulator.
        products[i] = vaddq_u64(products[i], vextq_u64::<1>(values[i], values[i]));
    }
    products
}

/// The words' product with a prime of 32 bits is that of their lower halves and, moved up, that of their upper ones.
#[inline]
#[target_feature(enable = "neon")]
fn scramble(secret: &Secret, words: &mut Words, sum: &Words) {
    let prime = vdup_n_u32(PRIME32[0] as u32);
    for i in 0..4 {
        let added = vaddq_u64(words[i], sum[i]);
        let key = load_bytes(secret, SCRAMBLE_SECRET + 16 * i);
        let keyed = veorq_u64(veorq_u64(added, vshrq_n_u64::<47>(added)), key);
        let upper = vshlq_n_u64::<32>(vmull_u32(vshrn_n_u64::<32>(keyed), prime));
        words[i] = vmlal_u32(upper, vmovn_u64(keyed), prime);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn pair(low: u64, high: u64) -> uint64x2_t {
    vcombine_u64(vcreate_u64(low), vcreate_u64(high))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bytes(from: &[u8], at: usize) -> uint64x2_t {
    pair(u64_at(from, at), u64_at(from, at + 8))
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &BlockSum) -> Words {
    let mut words = [vdupq_n_u64(0); 4];
    for i in 0..4 {
        words[i] = pair(from[2 * i], from[2 * i + 1]);
    }
    words
}

#[inline]
#[target_feature(enable = "neon")]
fn store(to: &mut BlockSum, words: &Words) {
    for i in 0..4 {
        to[2 * i] = vgetq_lane_u64::<0>(words[i]);
        to[2 * i + 1] = vgetq_lane_u64::<1>(words[i]);
    }
}

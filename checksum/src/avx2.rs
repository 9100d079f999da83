//! Blocks with AVX2, four accumulators to a vector.

use std::arch::x86_64::*;

use crate::blocks::{BLOCK_BYTES, BlockSum};
use crate::constants::PRIME32;
use crate::isa::{SCRAMBLE_SECRET, STRIPE, Secret};

/// How far ahead of the block that is being summed memory is prefetched into the caches. Summing reads from a cache. Without the
/// prefetch, memory would be idle meanwhile, and the thread would wait for it when it multiplies the next bytes.
const AHEAD: usize = 32 << 10;

/// Proof that the CPU has AVX2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, if it is true.
    #[inline]
    pub(crate) fn new() -> Option<Avx2> {
        is_x86_feature_detected!("avx2").then_some(Avx2(()))
    }

    pub(crate) fn sums(self, secret: &Secret, blocks: &[[u8; BLOCK_BYTES]], to: &mut [BlockSum]) {
        // SAFETY: `self` exists only where the CPU has AVX2.
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
type Words = [__m256i; 2];

#[target_feature(enable = "avx2")]
fn sums(secret: &Secret, blocks: &[[u8; BLOCK_BYTES]], sums: &mut [BlockSum]) {
    for (block, sum) in blocks.iter().zip(sums) {
        store(sum, block_sum(secret, block));
    }
}

#[target_feature(enable = "avx2")]
fn absorb(secret: &Secret, state: &mut BlockSum, sums: &[BlockSum]) {
    let mut words = load(state);
    for sum in sums {
        words = scrambled(secret, words, load(sum));
    }
    store(state, words);
}

#[target_feature(enable = "avx2")]
fn update(secret: &Secret, state: &mut BlockSum, blocks: &[[u8; BLOCK_BYTES]]) {
    let mut words = load(state);
    for block in blocks {
        words = scrambled(secret, words, block_sum(secret, block));
    }
    store(state, words);
}

#[inline]
#[target_feature(enable = "avx2")]
fn block_sum(secret: &Secret, block: &[u8; BLOCK_BYTES]) -> Words {
    let zero = _mm256_setzero_si256();
    let (mut products, mut values) = ([zero; 2], [zero; 2]);
    for stripe in 0..BLOCK_BYTES / STRIPE {
        _mm_prefetch::<_MM_HINT_T1>(block.as_ptr().wrapping_add(AHEAD + STRIPE * stripe).cast());
        for half in 0..2 {
            let value = load32(block, STRIPE * stripe + 32 * half);
            let keyed = _mm256_xor_si256(value, load32(secret, 8 * stripe + 32 * half));
            let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
            products[half] = _mm256_add_epi64(products[half], product);
            values[half] = _mm256_add_epi64(values[half], value);
        }
    }
    // Each word is added to its neighbour's accumulator.
    let mut sum = products;
    for half in 0..2 {
        sum[half] = _mm256_add_epi64(products[half], _mm256_shuffle_epi32::<0b01_00_11_10>(values[half]));
    }
    sum
}

/// The words' product with a prime of 32 bits is that of their lower halves and, moved up, that of their upper ones.
#[inline]
#[target_feature(enable = "avx2")]
fn scrambled(secret: &Secret, mut words: Words, sum: Words) -> Words {
    let prime = _mm256_set1_epi64x(PRIME32[0] as i64);
    for half in 0..2 {
        let key = load32(secret, SCRAMBLE_SECRET + 32 * half);
        let added = _mm256_add_epi64(words[half], sum[half]);
        let keyed = _mm256_xor_si256(_mm256_xor_si256(added, _mm256_srli_epi64::<47>(added)), key);
        let upper = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
        words[half] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64::<32>(upper));
    }
    words
}

#[inline]
#[target_feature(enable = "avx2")]
fn load32<const N: usize>(from: &[u8; N], at: usize) -> __m256i {
    let from: &[u8; 32] = from[at..].first_chunk().expect("32 bytes");
    // SAFETY: the reference covers the 32 bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(from: &BlockSum) -> Words {
    let mut words = [_mm256_setzero_si256(); 2];
    for (word, half) in words.iter_mut().zip(from.as_chunks::<4>().0) {
        // SAFETY: the reference covers the 32 bytes; the load has no alignment.
        *word = unsafe { _mm256_loadu_si256(half.as_ptr().cast()) };
    }
    words
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut BlockSum, words: Words) {
    for (to, words) in to.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        // SAFETY: the reference covers the 32 bytes; the store has no alignment.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), words) }
    }
}

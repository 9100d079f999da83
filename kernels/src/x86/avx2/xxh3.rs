//! Sums of xxh3-64 over blocks of 1 KiB, four accumulators to a vector.

use super::{load_words, load32, store_words};
use crate::xxh3::{PRIME32, SCRAMBLE_SECRET, SECRET, XXH3_BLOCK_BYTES, Xxh3Sum};
use std::arch::x86_64::*;

/// How far behind the block that is summed memory is asked for. Summing reads from a cache: without this, memory would rest
/// meanwhile, and multiplying, which comes next, would wait for it.
const AHEAD: usize = 32 << 10;

#[target_feature(enable = "avx2")]
pub(super) fn sums(blocks: &[[u8; XXH3_BLOCK_BYTES]], sums: &mut [Xxh3Sum]) {
    for (block, sum) in blocks.iter().zip(sums) {
        store_sum(sum, block_sum(block));
    }
}

/// As the function of the same name in the module `xxh3`.
#[target_feature(enable = "avx2")]
pub(super) fn absorb(state: &mut Xxh3Sum, sums: &[Xxh3Sum]) {
    let mut words = load_sum(state);
    for sum in sums {
        words = scrambled(words, load_sum(sum));
    }
    store_sum(state, words);
}

/// [`sums`] and [`absorb`] in one: scrambling is a chain of dependent steps, which takes no time of its own while the next
/// block is summed.
#[target_feature(enable = "avx2")]
pub(super) fn update(state: &mut Xxh3Sum, blocks: &[[u8; XXH3_BLOCK_BYTES]]) {
    let mut words = load_sum(state);
    for block in blocks {
        words = scrambled(words, block_sum(block));
    }
    store_sum(state, words);
}

#[inline]
#[target_feature(enable = "avx2")]
fn block_sum(block: &[u8; XXH3_BLOCK_BYTES]) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    let (mut products, mut values) = ([zero; 2], [zero; 2]);
    for stripe in 0..XXH3_BLOCK_BYTES / 64 {
        _mm_prefetch::<_MM_HINT_T1>(block.as_ptr().wrapping_add(AHEAD + 64 * stripe).cast());
        for h in 0..2 {
            let value = load32(block, 64 * stripe + 32 * h);
            let keyed = _mm256_xor_si256(value, load32(&SECRET, 8 * stripe + 32 * h));
            let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
            products[h] = _mm256_add_epi64(products[h], product);
            values[h] = _mm256_add_epi64(values[h], value);
        }
    }
    // Each word is added to its neighbour's accumulator.
    each!(zero; 2, h => _mm256_add_epi64(products[h], _mm256_shuffle_epi32::<0b01_00_11_10>(values[h])))
}

/// The words' product with a prime of 32 bits is that of their lower halves and, moved up, that of their upper ones.
#[inline]
#[target_feature(enable = "avx2")]
fn scrambled(words: [__m256i; 2], sum: [__m256i; 2]) -> [__m256i; 2] {
    let prime = _mm256_set1_epi64x(PRIME32[0] as i64);
    each!(prime; 2, h => {
        let key = load32(&SECRET, SCRAMBLE_SECRET + 32 * h);
        let words = _mm256_add_epi64(words[h], sum[h]);
        let words = _mm256_xor_si256(_mm256_xor_si256(words, _mm256_srli_epi64::<47>(words)), key);
        let upper = _mm256_mul_epu32(_mm256_srli_epi64::<32>(words), prime);
        _mm256_add_epi64(_mm256_mul_epu32(words, prime), _mm256_slli_epi64::<32>(upper))
    })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_sum(sum: &Xxh3Sum) -> [__m256i; 2] {
    let halves = sum.as_chunks().0;
    [load_words(&halves[0]), load_words(&halves[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_sum(sum: &mut Xxh3Sum, words: [__m256i; 2]) {
    for (half, words) in sum.as_chunks_mut().0.iter_mut().zip(words) {
        store_words(half, words);
    }
}

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
        for (h, words) in sum.as_chunks_mut().0.iter_mut().enumerate() {
            // Each word is added to its neighbour's accumulator.
            let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(values[h]);
            store_words(words, _mm256_add_epi64(products[h], swapped));
        }
    }
}

/// As the function of the same name in the module `xxh3`. The words' product with a prime of 32 bits is that of their lower
/// halves and, moved up, that of their upper ones.
#[target_feature(enable = "avx2")]
pub(super) fn absorb(state: &mut Xxh3Sum, sums: &[Xxh3Sum]) {
    let prime = _mm256_set1_epi64x(PRIME32[0] as i64);
    for (h, state) in state.as_chunks_mut().0.iter_mut().enumerate() {
        let key = load32(&SECRET, SCRAMBLE_SECRET + 32 * h);
        let mut words = load_words(state);
        for sum in sums {
            words = _mm256_add_epi64(words, load_words(&sum.as_chunks().0[h]));
            words = _mm256_xor_si256(_mm256_xor_si256(words, _mm256_srli_epi64::<47>(words)), key);
            let upper = _mm256_mul_epu32(_mm256_srli_epi64::<32>(words), prime);
            words = _mm256_add_epi64(_mm256_mul_epu32(words, prime), _mm256_slli_epi64::<32>(upper));
        }
        store_words(state, words);
    }
}

//! Sums of xxh3-64 over blocks of 1 KiB, four accumulators to a vector.

use super::{load32, store_words};
use crate::xxh3::{SECRET, XXH3_BLOCK_BYTES, Xxh3Sum};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2")]
pub(super) fn sums(blocks: &[[u8; XXH3_BLOCK_BYTES]], sums: &mut [Xxh3Sum]) {
    for (block, sum) in blocks.iter().zip(sums) {
        let mut halves = [_mm256_setzero_si256(); 2];
        for stripe in 0..XXH3_BLOCK_BYTES / 64 {
            for (h, half) in halves.iter_mut().enumerate() {
                let value = load32(block, 64 * stripe + 32 * h);
                let keyed = _mm256_xor_si256(value, load32(&SECRET, 8 * stripe + 32 * h));
                let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(value);
                *half = _mm256_add_epi64(*half, _mm256_add_epi64(product, swapped));
            }
        }
        for (half, words) in halves.into_iter().zip(sum.as_chunks_mut().0) {
            store_words(words, half);
        }
    }
}

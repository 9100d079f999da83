//! Products of bytes with AVX-VNNI: one instruction multiplies four columns of eight rows and adds the products to sums of 32 bits.

use super::{load16, load32, nibbles};
use crate::activations::QuantisedBlock;
use crate::x86::{MXFP4, Q8, bias, e2m1_table, words};
use std::arch::asm;
use std::arch::x86_64::*;

/// Adds the products of four columns: those of `unsigned` are unsigned bytes, those of `signed` signed ones. Nothing saturates.
///
/// It is written as an instruction because a function that enables AVX-VNNI would not be inlined into its callers, which are the
/// same for processors without it. The caller must hold the token of a processor that has it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_products(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    let mut sums = sums;
    // SAFETY: the instruction reads and writes only these registers. Constants of this module's callers say that the processor has
    // it, and only `Avx2::with_vnni`, which has checked the processor, makes a token that sets them.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sums}, {unsigned}, {signed}",
            sums = inout(ymm_reg) sums,
            unsigned = in(ymm_reg) unsigned,
            signed = in(ymm_reg) signed,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Integers of columns `4q..4q + 4` and `4q + 16..4q + 20` of a block, for `q` below 4, made unsigned by their bias.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unsigned<const TY: u8>(values: &[u8], q: usize) -> [__m256i; 2] {
    if TY == Q8 {
        let flip = _mm256_set1_epi8(-128);
        return [q, q + 4].map(|q| _mm256_xor_si256(load32(values, 32 * q), flip));
    }
    let (low, high) = nibbles(load32(values, 32 * q));
    if TY == MXFP4 {
        let table = _mm256_broadcastsi128_si256(load16(&const { e2m1_table(bias(MXFP4) as i8) }, 0));
        return [_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)];
    }
    [low, high]
}

/// Products of block `g` with each row of `x`. The sum of `x` removes the bias again.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots<const TY: u8, const T: usize>(values: &[u8], x: &[&[QuantisedBlock]; T], g: usize) -> [__m256i; T] {
    let words = words(x, g);
    // Two sums for each row, because each addition to the same sum would wait for the one before.
    let mut even = [_mm256_setzero_si256(); T];
    let mut odd = even;
    for t in 0..T {
        even[t] = _mm256_set1_epi32(-const { bias(TY) } * x[t][g].sum);
    }
    for q in 0..4 {
        let [low, high] = unsigned::<TY>(values, q);
        for t in 0..T {
            even[t] = add_products(even[t], low, _mm256_set1_epi32(words[t][q]));
            odd[t] = add_products(odd[t], high, _mm256_set1_epi32(words[t][q + 4]));
        }
    }
    each!(_mm256_setzero_si256(); T, t => _mm256_add_epi32(even[t], odd[t]))
}

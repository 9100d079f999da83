//! From codes to bytes: four columns of eight rows per vector, eight vectors per block.
//!
//! Bytes are positive and below 128, so that they can be either operand of a product, but for integers of eight bits and the
//! levels of IQ4_NL, which are signed.

use super::super::{load16, load32};
use super::grids;
use crate::grouped::IQ4NL as LEVELS;
use crate::matrix::Group;
use crate::x86::e2m1_table;
use crate::x86::grouped::{E2M1, GRID_BIAS, IQ4NL, STRIP, block_len};
use sluice_weights::{Codes, Grouped, ROW_GROUP};
use std::arch::x86_64::*;

/// The bytes of a block.
pub(in crate::x86) type Bytes = [__m256i; 8];

/// What a byte is above the integer that the code stands for.
pub(in crate::x86) const fn bias(codes: Codes) -> i32 {
    match codes {
        Codes::Uint(8) => -128,
        Codes::E2m1 => 12,
        Codes::Uint(_) | Codes::E4m3 | Codes::Iq4nl => 0,
        _ => GRID_BIAS,
    }
}

/// Whether bytes are signed.
pub(in crate::x86) const fn is_signed(codes: Codes) -> bool {
    matches!(codes, Codes::Uint(8) | Codes::Iq4nl)
}

/// Unpacks a strip of a row group, or what there is of it.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn strip(ty: Grouped, w: &Group<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    match ty.codes() {
        Codes::Uint(2) => blocks::<2>(w, strip, out),
        Codes::Uint(3) => blocks::<3>(w, strip, out),
        Codes::Uint(4) => blocks::<4>(w, strip, out),
        Codes::Uint(5) => blocks::<5>(w, strip, out),
        Codes::Uint(6) => blocks::<6>(w, strip, out),
        Codes::Uint(_) => blocks::<8>(w, strip, out),
        Codes::E2m1 => blocks::<E2M1>(w, strip, out),
        Codes::Iq4nl => blocks::<IQ4NL>(w, strip, out),
        codes => grid_blocks(codes, w, strip, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks<const C: u8>(w: &Group<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    let len = const { block_len(C) };
    for (values, out) in w.values[strip * STRIP * len..].chunks_exact(len).zip(out) {
        *out = block::<C>(values);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn grid_blocks(codes: Codes, w: &Group<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    let len = ROW_GROUP * codes.block_len();
    for (records, out) in w.values[strip * STRIP * len..].chunks_exact(len).zip(out) {
        *out = grids::block(codes, records);
    }
}

/// Unpacks one block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn block<const C: u8>(w: &[u8]) -> Bytes {
    let w = &w[..const { block_len(C) }];
    let mut bytes = [_mm256_setzero_si256(); 8];
    if matches!(C, E2M1 | IQ4NL) {
        let table = _mm256_broadcastsi128_si256(load16(&const { table(C) }, 0));
        for q in 0..8 {
            bytes[q] = _mm256_shuffle_epi8(table, field::<4, 0>(w, q));
        }
    } else if C == 8 {
        for q in 0..8 {
            bytes[q] = _mm256_xor_si256(load32(w, 32 * q), _mm256_set1_epi8(-128));
        }
    } else {
        for q in 0..8 {
            bytes[q] = match C {
                2 => field::<2, 0>(w, q),
                3 => _mm256_or_si256(field::<2, 0>(w, q), field::<1, 2>(&w[64..], q)),
                4 => field::<4, 0>(w, q),
                5 => _mm256_or_si256(field::<4, 0>(w, q), field::<1, 4>(&w[128..], q)),
                _ => _mm256_or_si256(field::<4, 0>(w, q), field::<2, 4>(&w[128..], q)),
            };
        }
    }
    bytes
}

const fn table(codes: u8) -> [u8; 16] {
    if codes == E2M1 {
        return e2m1_table(bias(Codes::E2m1) as i8);
    }
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = LEVELS[i] as u8;
        i += 1;
    }
    table
}

/// Vector `q` of a plane of `WIDTH` bits, moved to bit `TO` of each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field<const WIDTH: usize, const TO: usize>(plane: &[u8], q: usize) -> __m256i {
    let vector = load32(plane, 32 * (q % WIDTH));
    let mask = const { (((1 << WIDTH) - 1) << TO) as i8 };
    _mm256_and_si256(shift_right(vector, (q / WIDTH * WIDTH) as i32 - TO as i32), _mm256_set1_epi8(mask))
}

/// Shifts of 16 bits, to the left if `by` is negative; a constant once loops are unrolled.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shift_right(v: __m256i, by: i32) -> __m256i {
    match by {
        -4 => _mm256_slli_epi16::<4>(v),
        -3 => _mm256_slli_epi16::<3>(v),
        -2 => _mm256_slli_epi16::<2>(v),
        -1 => _mm256_slli_epi16::<1>(v),
        1 => _mm256_srli_epi16::<1>(v),
        2 => _mm256_srli_epi16::<2>(v),
        3 => _mm256_srli_epi16::<3>(v),
        4 => _mm256_srli_epi16::<4>(v),
        5 => _mm256_srli_epi16::<5>(v),
        6 => _mm256_srli_epi16::<6>(v),
        7 => _mm256_srli_epi16::<7>(v),
        _ => v,
    }
}

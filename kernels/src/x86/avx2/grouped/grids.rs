//! Grids: points and signs become bytes, four columns of eight rows per vector, eight vectors per block.
//!
//! Points are loaded one by one: eight loads for eight rows take no longer than a gather, and on some processors much less.

use super::super::load32;
use crate::grouped::grids::{self, unpack};
use crate::x86::grouped::GRID_BIAS;
use sluice_weights::{Codes, ROW_GROUP};
use std::arch::x86_64::*;

/// The integers of a block of records, [`GRID_BIAS`] added.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::x86) fn block(codes: Codes, records: &[u8]) -> [__m256i; 8] {
    match codes {
        Codes::Iq3s => fours(codes, records, grids::IQ3S.words()),
        Codes::Iq3xxs => fours(codes, records, grids::IQ3XXS.words()),
        Codes::Iq2s => eights(codes, records, grids::IQ2S.words()),
        Codes::Iq2xs => eights(codes, records, grids::IQ2XS.words()),
        Codes::Iq2xxs => eights(codes, records, grids::IQ2XXS.words()),
        _ => eights(codes, records, grids::IQ1.words()),
    }
}

/// Points of four columns.
#[inline]
#[target_feature(enable = "avx2")]
fn fours<const N: usize>(codes: Codes, records: &[u8], points: &[u32; N]) -> [__m256i; 8] {
    let unpacked = unpack(codes, records);
    let mut integers = [_mm256_setzero_si256(); 8];
    for q in 0..8 {
        // The remainder changes nothing, and spares the check.
        let indices = &unpacked.indices[q];
        let rows = each!(0; ROW_GROUP, r => points[usize::from(indices[r]) % N] as i32);
        let vector = _mm256_setr_epi32(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]);
        integers[q] = signed(vector, of_rows(&unpacked.signs[q / 2]), q % 2);
    }
    integers
}

/// Points of eight columns: those of rows 0, 1, 4 and 5 and of the others, from which two vectors of all rows are picked.
#[inline]
#[target_feature(enable = "avx2")]
fn eights<const N: usize>(codes: Codes, records: &[u8], points: &[u64; N]) -> [__m256i; 8] {
    let unpacked = unpack(codes, records);
    let mut integers = [_mm256_setzero_si256(); 8];
    for l in 0..4 {
        let indices = &unpacked.indices[l];
        let rows = each!(0; ROW_GROUP, r => points[usize::from(indices[r]) % N] as i64);
        let first = _mm256_castsi256_ps(_mm256_setr_epi64x(rows[0], rows[1], rows[4], rows[5]));
        let second = _mm256_castsi256_ps(_mm256_setr_epi64x(rows[2], rows[3], rows[6], rows[7]));
        let low = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(first, second));
        let high = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(first, second));
        let rows = of_rows(&unpacked.signs[l]);
        if matches!(codes, Codes::Iq1s | Codes::Iq1m) {
            let added = _mm256_add_epi8(rows, _mm256_set1_epi8(GRID_BIAS as i8));
            (integers[2 * l], integers[2 * l + 1]) = (_mm256_add_epi8(low, added), _mm256_add_epi8(high, added));
        } else {
            (integers[2 * l], integers[2 * l + 1]) = (signed(low, rows, 0), signed(high, rows, 1));
        }
    }
    integers
}

/// The byte of each row, four times.
#[inline]
#[target_feature(enable = "avx2")]
fn of_rows(rows: &[u8; ROW_GROUP]) -> __m256i {
    const PLACES: [u8; 32] = {
        let (mut places, mut i) = ([0; 32], 0);
        while i < 32 {
            places[i] = (i / 4) as u8;
            i += 1;
        }
        places
    };
    _mm256_shuffle_epi8(_mm256_set1_epi64x(i64::from_le_bytes(*rows)), load32(&PLACES, 0))
}

/// Negated where the bit of a column, in the low or the high half of the signs, is set; then the bias is added.
#[inline]
#[target_feature(enable = "avx2")]
fn signed(vector: __m256i, signs: __m256i, half: usize) -> __m256i {
    let bits = _mm256_set1_epi32(if half == 0 { 0x0804_0201 } else { 0x8040_2010_u32 as i32 });
    let mask = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits);
    let minus_bias = _mm256_sub_epi8(mask, _mm256_set1_epi8(GRID_BIAS as i8));
    _mm256_sub_epi8(_mm256_xor_si256(vector, mask), minus_bias)
}

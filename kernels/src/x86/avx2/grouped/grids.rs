//! Grids: points and signs become bytes, four columns of eight rows per vector, eight vectors per block.
//!
//! Points are loaded one by one: eight loads for eight rows take no longer than a gather, and much less on some processors.

use super::super::{load16, load32};
use super::decode::Bytes;
use crate::grouped::grids;
use crate::x86::bytes;
use crate::x86::grouped::GRID_BIAS;
use sluice_weights::{Codes, ROW_GROUP};
use std::arch::x86_64::*;

/// Unpacks blocks of records: integers with [`GRID_BIAS`] added.
#[target_feature(enable = "avx2")]
pub(in crate::x86) fn blocks(codes: Codes, records: &[u8], out: &mut [Bytes]) {
    for (records, out) in records.chunks_exact(ROW_GROUP * codes.block_len()).zip(out) {
        *out = match codes {
            Codes::Iq3s => iq3s(records),
            Codes::Iq3xxs => fours(bytes::<64>(records, 0), grids::IQ3XXS.words(), Signs::words(records, 64)),
            Codes::Iq2s => iq2s(records),
            Codes::Iq2xs => iq2xs(records),
            Codes::Iq2xxs => eights(bytes::<32>(records, 0), grids::IQ2XXS.words(), Signs::words(records, 32)),
            Codes::Iq1s => iq1s(records),
            _ => iq1m(records),
        };
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn iq3s(records: &[u8]) -> Bytes {
    let ninth = eight_twice(bytes(records, 96));
    let mut indices = [0; 64];
    for i in 0..4 {
        // Bits 2i and 2i + 1 become bit 8.
        let places = [256 >> (2 * i), 128 >> (2 * i)];
        store(&mut indices, i, _mm256_or_si256(low_bits(records, i), moved(ninth, places, 0x100)));
    }
    fours(&indices, grids::IQ3S.words(), Signs::bytes(records, 64))
}

#[inline]
#[target_feature(enable = "avx2")]
fn iq2s(records: &[u8]) -> Bytes {
    let high = eight_twice(bytes(records, 64));
    let mut indices = [0; 32];
    for i in 0..2 {
        let places = if i == 0 { [256, 64] } else { [16, 4] };
        store(&mut indices, i, _mm256_or_si256(low_bits(records, i), moved(high, places, 0x300)));
    }
    eights(&indices, grids::IQ2S.words(), Signs::bytes(records, 32))
}

#[inline]
#[target_feature(enable = "avx2")]
fn iq2xs(records: &[u8]) -> Bytes {
    let words = [load32(records, 0), load32(records, 32)];
    let mut indices = [0; 32];
    for i in 0..2 {
        store(&mut indices, i, _mm256_and_si256(words[i], _mm256_set1_epi16(511)));
    }
    // Columns 0..8 and 16..24 in the first lane, the others in the second.
    let signs = _mm256_packus_epi16(_mm256_srli_epi16::<9>(words[0]), _mm256_srli_epi16::<9>(words[1]));
    let mut all = [0; 32];
    store_bytes(&mut all, with_parity(signs));
    let [a, b, c, d] = [0, 16, 8, 24].map(|at| *bytes::<8>(&all, at));
    eights(&indices, grids::IQ2XS.words(), Signs::Bytes([a, b, c, d]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn iq1s(records: &[u8]) -> Bytes {
    let words = load16(records, 32);
    let twice = _mm256_broadcastsi128_si256(words);
    let mut indices = [0; 32];
    // Bits 3l to 3l + 3 become bits 8 to 11. The last ones are above those, so all move down by a bit first.
    let first = moved(twice, [256, 32], 0x700);
    let second = moved(_mm256_srli_epi16::<1>(twice), [8, 1], 0x700);
    store(&mut indices, 0, _mm256_or_si256(low_bits(records, 0), first));
    store(&mut indices, 1, _mm256_or_si256(low_bits(records, 1), second));
    let minus = _mm_srai_epi16::<15>(words);
    let added = one_or_minus(_mm_packs_epi16(minus, minus));
    eights(&indices, grids::IQ1.words(), Signs::Added([added; 4]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn iq1m(records: &[u8]) -> Bytes {
    let mut indices = [0; 32];
    let mut added = [_mm256_setzero_si256(); 4];
    for i in 0..2 {
        let nibbles = bytes(records, 32 + 8 * i);
        let high = moved(eight_twice(nibbles), [256, 16], 0x700);
        store(&mut indices, i, _mm256_or_si256(low_bits(records, i), high));
        let nibbles = _mm_cvtsi64_si128(i64::from_le_bytes(*nibbles));
        for (half, bit) in [(0, 8), (1, 128)] {
            let bit = _mm_set1_epi8(bit as u8 as i8);
            added[2 * i + half] = one_or_minus(_mm_cmpeq_epi8(_mm_and_si128(nibbles, bit), bit));
        }
    }
    eights(&indices, grids::IQ1.words(), Signs::Added(added))
}

/// The signs of points, or the number that is added to them.
enum Signs {
    /// Signs of eight columns each, of all rows.
    Bytes([[u8; ROW_GROUP]; 4]),
    /// Signs in the lowest bytes first, a word of 32 bits for each row.
    Words(__m256i),
    /// The number that is added to all columns of a point, the bias included, four times for each row.
    Added([__m256i; 4]),
}

impl Signs {
    #[inline(always)]
    fn bytes(records: &[u8], at: usize) -> Signs {
        Signs::Bytes([*bytes(records, at), *bytes(records, at + 8), *bytes(records, at + 16), *bytes(records, at + 24)])
    }

    /// Four times seven signs of each row.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn words(records: &[u8], at: usize) -> Signs {
        let words = load32(records, at);
        let part = |v, mask| _mm256_and_si256(v, _mm256_set1_epi32(mask));
        let low = _mm256_or_si256(part(words, 0x7f), part(_mm256_slli_epi32::<1>(words), 0x7f00));
        let third = part(_mm256_slli_epi32::<2>(words), 0x007f_0000);
        let fourth = part(_mm256_slli_epi32::<3>(words), 0x7f00_0000);
        Signs::Words(with_parity(_mm256_or_si256(low, _mm256_or_si256(third, fourth))))
    }

    /// The signs of columns `8l..8l + 8`, four times for each row.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn of(&self, l: usize) -> __m256i {
        match self {
            Signs::Bytes(rows) => {
                let rows = _mm256_set1_epi64x(i64::from_le_bytes(rows[l]));
                _mm256_shuffle_epi8(rows, load32(const { &places(1, 4) }, 0))
            }
            Signs::Words(words) => {
                let places = _mm256_add_epi8(load32(const { &places(4, 0) }, 0), _mm256_set1_epi8(l as i8));
                _mm256_shuffle_epi8(*words, places)
            }
            Signs::Added(added) => added[l],
        }
    }

    /// Applies the result of [`Signs::of`] to the first or the second four columns, and adds the bias.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn apply(&self, vector: __m256i, rows: __m256i, half: usize) -> __m256i {
        if matches!(self, Signs::Added(_)) {
            return _mm256_add_epi8(vector, rows);
        }
        let bits = _mm256_set1_epi32(if half == 0 { 0x0804_0201 } else { 0x8040_2010_u32 as i32 });
        let mask = _mm256_cmpeq_epi8(_mm256_and_si256(rows, bits), bits);
        let minus_bias = _mm256_sub_epi8(mask, _mm256_set1_epi8(GRID_BIAS as i8));
        _mm256_sub_epi8(_mm256_xor_si256(vector, mask), minus_bias)
    }
}

/// Places of the byte of each row, four times, in each lane; `second` more in the second lane.
const fn places(step: u8, second: u8) -> [u8; 32] {
    let (mut places, mut i) = ([0; 32], 0);
    while i < 32 {
        places[i] = (i % 16 / 4) as u8 * step + if i < 16 { 0 } else { second };
        i += 1;
    }
    places
}

/// Points of four columns. The remainder changes nothing: indices are below the size of the grid.
#[inline]
#[target_feature(enable = "avx2")]
fn fours<const N: usize, I: Copy + Into<usize>>(indices: &[I; 64], points: &[u32; N], signs: Signs) -> Bytes {
    let mut integers = [_mm256_setzero_si256(); 8];
    for l in 0..4 {
        let of = signs.of(l);
        for half in 0..2 {
            let q = 2 * l + half;
            let rows = each!(0; ROW_GROUP, r => points[indices[ROW_GROUP * q + r].into() % N] as i32);
            let vector = _mm256_setr_epi32(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]);
            integers[q] = signs.apply(vector, of, half);
        }
    }
    integers
}

/// Points of eight columns: those of rows 0, 1, 4 and 5 and those of the others, from which two vectors of all rows are selected.
#[inline]
#[target_feature(enable = "avx2")]
fn eights<const N: usize, I: Copy + Into<usize>>(indices: &[I; 32], points: &[u64; N], signs: Signs) -> Bytes {
    let mut integers = [_mm256_setzero_si256(); 8];
    for l in 0..4 {
        let rows = each!(0; ROW_GROUP, r => points[indices[ROW_GROUP * l + r].into() % N] as i64);
        let first = _mm256_castsi256_ps(_mm256_setr_epi64x(rows[0], rows[1], rows[4], rows[5]));
        let second = _mm256_castsi256_ps(_mm256_setr_epi64x(rows[2], rows[3], rows[6], rows[7]));
        let low = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(first, second));
        let high = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(first, second));
        let of = signs.of(l);
        (integers[2 * l], integers[2 * l + 1]) = (signs.apply(low, of, 0), signs.apply(high, of, 1));
    }
    integers
}

/// The bytes of points `2i` and `2i + 1` of all rows, as words of 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bits(records: &[u8], i: usize) -> __m256i {
    _mm256_cvtepu8_epi16(load16(records, 16 * i))
}

/// The bytes of all rows as words of 16 bits, in both lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn eight_twice(rows: &[u8; ROW_GROUP]) -> __m256i {
    _mm256_cvtepu8_epi16(_mm_set1_epi64x(i64::from_le_bytes(*rows)))
}

/// Multiplies by one factor in the first lane and by the other in the second; keeps the bits of `mask`.
#[inline]
#[target_feature(enable = "avx2")]
fn moved(words: __m256i, factors: [i16; 2], mask: i16) -> __m256i {
    let factors = _mm256_setr_m128i(_mm_set1_epi16(factors[0]), _mm_set1_epi16(factors[1]));
    _mm256_and_si256(_mm256_mullo_epi16(words, factors), _mm256_set1_epi16(mask))
}

/// 1, or −1 for rows whose byte is all ones, plus the bias; four times for each row.
#[inline]
#[target_feature(enable = "avx2")]
fn one_or_minus(minus: __m128i) -> __m256i {
    let added = _mm_add_epi8(_mm_or_si128(minus, _mm_set1_epi8(1)), _mm_set1_epi8(GRID_BIAS as i8));
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(added), load32(const { &places(1, 4) }, 0))
}

/// Adds an eighth sign to seven, which makes the number of minuses even.
#[inline]
#[target_feature(enable = "avx2")]
fn with_parity(signs: __m256i) -> __m256i {
    const ODD: [u8; 16] = {
        let (mut odd, mut i) = ([0; 16], 0);
        while i < 16 {
            odd[i] = (i as u8).count_ones() as u8 % 2 * 128;
            i += 1;
        }
        odd
    };
    let folded = _mm256_xor_si256(signs, _mm256_srli_epi16::<4>(signs));
    let nibbles = _mm256_and_si256(folded, _mm256_set1_epi8(15));
    let odd = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(&ODD, 0)), nibbles);
    _mm256_or_si256(signs, odd)
}

/// Stores the `i`-th sixteen indices.
#[inline]
#[target_feature(enable = "avx2")]
fn store<const N: usize>(to: &mut [u16; N], i: usize, v: __m256i) {
    let to: &mut [u16; 16] = to[16 * i..].first_chunk_mut().expect("there are as many");
    // SAFETY: the reference covers the 32 bytes; the store has no alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_bytes(to: &mut [u8; 32], v: __m256i) {
    // SAFETY: the reference covers the 32 bytes; the store has no alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) }
}

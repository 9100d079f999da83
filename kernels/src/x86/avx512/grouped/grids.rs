//! Grids with VBMI: the indices of 64 points are looked up at once, in tables that fit in registers or the nearest cache.
//!
//! A point of eight columns with three levels each is two bytes; a point of four columns with eight levels is twelve bits.
//! `vpermi2b` looks both up, 128 bytes at a time; `vpmultishiftqb` spreads the result over the columns, beside their signs, and one
//! more look-up turns level and sign into a byte.
//!
//! The bytes to be looked up lie in the order of [`PLACES`]. So codes and signs, interleaved, give each 64 bits the words of two
//! rows of one point and then of the same rows of the next, and `vpmultishiftqb` takes from them eight bytes of a vector.

use super::super::{Pair, load8x2, load16x2, load32x2};
use crate::grouped::grids::digits::{self, Digits};
use crate::grouped::grids::{IQ1_LEVELS, IQ2_LEVELS, IQ3S_LEVELS, IQ3XXS_LEVELS};
use crate::x86::bytes;
use crate::x86::grouped::{GRID_BIAS, STRIP};
use sluice_weights::{Codes, ROW_GROUP};
use std::arch::x86_64::*;

/// The bytes of a block: four columns of sixteen rows per vector.
type Bytes = [__m512i; 8];

// Codes as constant parameters.
const IQ3S: u8 = 0;
const IQ3XXS: u8 = 1;
const IQ2S: u8 = 2;
const IQ2XS: u8 = 3;
const IQ2XXS: u8 = 4;
const IQ1S: u8 = 5;
const IQ1M: u8 = 6;

/// Unpacks a strip of two row groups, or as much of it as exists: integers with [`GRID_BIAS`] added. If the CPU lacks VBMI, it does
/// nothing and returns false.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn strip(codes: Codes, w: &Pair<'_>, strip: usize, out: &mut [Bytes; STRIP]) -> bool {
    if !is_x86_feature_detected!("avx512vbmi") {
        return false;
    }
    // SAFETY: the CPU has the one feature that the function enables besides those of this one.
    unsafe { of_codes(codes, w, strip, out) };
    true
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn of_codes(codes: Codes, w: &Pair<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    let len = ROW_GROUP * codes.block_len();
    let [a, b] = [&w[0].values[strip * STRIP * len..], &w[1].values[strip * STRIP * len..]];
    for ((a, b), out) in a.chunks_exact(len).zip(b.chunks_exact(len)).zip(out) {
        *out = match codes {
            Codes::Iq3s => fours::<IQ3S, 512>(a, b, &digits::IQ3S),
            Codes::Iq3xxs => fours::<IQ3XXS, 256>(a, b, &digits::IQ3XXS),
            Codes::Iq2s => eights::<IQ2S, 1024>(a, b, &digits::IQ2S),
            Codes::Iq2xs => eights::<IQ2XS, 512>(a, b, &digits::IQ2XS),
            Codes::Iq2xxs => eights::<IQ2XXS, 256>(a, b, &digits::IQ2XXS),
            Codes::Iq1s => eights::<IQ1S, 2048>(a, b, &digits::IQ1),
            _ => eights::<IQ1M, 2048>(a, b, &digits::IQ1),
        };
    }
}

/// Bits 0..8 of indices, and for each bit from the eighth (number 7) on, which indices have it set.
struct Indices {
    low: __m512i,
    bits: [__mmask64; 4],
}

/// Points of eight columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn eights<const C: u8, const N: usize>(a: &[u8], b: &[u8], digits: &Digits<N>) -> Bytes {
    let (indices, signs) = match C {
        IQ2S => (iq2s(a, b), in_order(const { &places([32, 8, 1], 0) }, load32x2(a, b, 32))),
        IQ2XS => iq2xs(a, b),
        IQ2XXS => (low_bits(a, b, 0), in_order(const { &places([32, 1, 4], 0) }, seven_bits(a, b, 32))),
        IQ1S => iq1s(a, b),
        _ => iq1m(a, b),
    };
    let planes = [look_up(&digits.0[0], &indices), look_up(&digits.0[1], &indices)];
    let table = load(const { &two_bit_levels(C) });
    let mut out = [_mm512_setzero_si512(); 8];
    for (h, plane) in planes.into_iter().enumerate() {
        let words = [_mm512_unpacklo_epi8(plane, signs), _mm512_unpackhi_epi8(plane, signs)];
        for l in 0..4 {
            // Bits of levels begin at bit 0 of a word, those of signs at bit 8 or 12.
            out[2 * l + h] = spread::<2>(words[l / 2], l % 2, 8 + 4 * h, table);
        }
    }
    out
}

/// Points of four columns: points 0 to 4, then 4 to 8.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn fours<const C: u8, const N: usize>(a: &[u8], b: &[u8], digits: &Digits<N>) -> Bytes {
    let signs = if C == IQ3S { load32x2(a, b, 64) } else { seven_bits(a, b, 64) };
    let table = load(const { &three_bit_levels(C) });
    let mut out = [_mm512_setzero_si512(); 8];
    for half in 0..2 {
        let mut indices = low_bits(a, b, 32 * half);
        if C == IQ3S {
            let ninth = in_order(const { &places([8, 0, 1], 0) }, _mm512_castsi128_si512(load8x2(a, b, 96)));
            let tested = if half == 0 { const { &bits(1, 0) } } else { const { &bits(1, 4) } };
            indices.bits[1] = _mm512_test_epi8_mask(ninth, load(tested));
        }
        let planes = [look_up(&digits.0[0], &indices), look_up(&digits.0[1], &indices)];
        // Each point has a half of eight signs; they are put beside the four upper bits of its levels.
        let places = match (C, half) {
            (IQ3S, 0) => const { &halves_of_signs([32, 8, 1], 0) },
            (IQ3S, _) => const { &halves_of_signs([32, 8, 1], 2) },
            (_, 0) => const { &halves_of_signs([32, 1, 4], 0) },
            _ => const { &halves_of_signs([32, 1, 4], 2) },
        };
        let both = in_order(places, signs);
        let upper = _mm512_mask_slli_epi16::<4>(both, 0x5555_5555, both);
        let high = _mm512_ternarylogic_epi64::<0xea>(_mm512_set1_epi8(0xf0_u8 as i8), upper, planes[1]);
        let words = [_mm512_unpacklo_epi8(planes[0], high), _mm512_unpackhi_epi8(planes[0], high)];
        for p in 0..4 {
            out[4 * half + p] = spread::<3>(words[p / 2], p % 2, 12, table);
        }
    }
    out
}

/// Looks up bytes of points.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn look_up<const N: usize>(table: &[u8; N], indices: &Indices) -> __m512i {
    let mut found = [_mm512_setzero_si512(); 16];
    for i in 0..N / 128 {
        let [first, second] = [load(bytes(table, 128 * i)), load(bytes(table, 128 * i + 64))];
        found[i] = _mm512_permutex2var_epi8(first, indices.low, second);
    }
    let mut bit = 0;
    while N >> (8 + bit) > 0 {
        for i in 0..N >> (8 + bit) {
            found[i] = _mm512_mask_mov_epi8(found[2 * i], indices.bits[bit], found[2 * i + 1]);
        }
        bit += 1;
    }
    found[0]
}

/// Turns the words of sixteen rows, of the first or of the second point of `words`, into four bytes each: level `i` has `WIDTH`
/// bits from bit `WIDTH·i` on, and its sign is bit `signs + i`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn spread<const WIDTH: usize>(words: __m512i, point: usize, signs: usize, table: __m512i) -> __m512i {
    let levels = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(every(WIDTH, 16, 32 * point)), words);
    let moved = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(every(1, 16, 32 * point + signs - WIDTH)), words);
    // Selects the second operand where the first has bits set, and the third elsewhere; the look-up ignores bits above.
    let number = _mm512_ternarylogic_epi64::<0xca>(_mm512_set1_epi8(1 << WIDTH), moved, levels);
    _mm512_permutexvar_epi8(number, table)
}

/// First bits of eight bytes: `first`, `step` more for each byte, and `word` more from the fifth byte on.
const fn every(step: usize, word: usize, first: usize) -> i64 {
    let (mut all, mut i) = (0, 0);
    while i < 8 {
        all |= (((i / 4 * word + i % 4 * step + first) % 64) as i64) << (8 * i);
        i += 1;
    }
    all
}

/// The integer of a level's number and sign: the number is in bits 0 and 1, the sign in bit 2.
const fn two_bit_levels(codes: u8) -> [u8; 64] {
    let (mut table, mut i) = ([0; 64], 0);
    while i < 64 {
        let (level, minus) = (i % 4, i / 4 % 2 == 1);
        if level < 3 {
            let integer = match codes {
                IQ1S | IQ1M => IQ1_LEVELS[level] as i32 + if minus { -1 } else { 1 },
                _ if minus => -(IQ2_LEVELS[level] as i32),
                _ => IQ2_LEVELS[level] as i32,
            };
            table[i] = (integer + GRID_BIAS) as u8;
        }
        i += 1;
    }
    table
}

/// The number is in bits 0 to 2, the sign in bit 3.
const fn three_bit_levels(codes: u8) -> [u8; 64] {
    let levels = if codes == IQ3S { IQ3S_LEVELS } else { IQ3XXS_LEVELS };
    let (mut table, mut i) = ([0; 64], 0);
    while i < 64 {
        let integer = levels[i % 8] as i32 * if i / 8 % 2 == 1 { -1 } else { 1 };
        table[i] = (integer + GRID_BIAS) as u8;
        i += 1;
    }
    table
}

/// Row group, point and row of each byte that is looked up.
const PLACES: [[u8; 3]; 64] = {
    let (mut places, mut i) = ([[0; 3]; 64], 0);
    while i < 64 {
        let row = i / 16 * 4 + i % 8 / 4 * 2 + i % 2;
        let point = i % 16 / 8 * 2 + i % 4 / 2;
        places[i] = [row as u8 / 8, point as u8, row as u8 % 8];
        i += 1;
    }
    places
};

/// Places of the bytes that a row group has at `first + steps[1]·point + steps[2]·row`.
const fn places(steps: [u8; 3], first: u8) -> [u8; 64] {
    let (mut places, mut i) = ([0; 64], 0);
    while i < 64 {
        let [g, p, r] = PLACES[i];
        places[i] = g * steps[0] + p * steps[1] + r * steps[2] + first;
        i += 1;
    }
    places
}

/// Places of the signs of points of four columns, two of which share a byte.
const fn halves_of_signs(steps: [u8; 3], first: u8) -> [u8; 64] {
    let (mut places, mut i) = ([0; 64], 0);
    while i < 64 {
        let [g, p, r] = PLACES[i];
        places[i] = g * steps[0] + (first + p / 2) * steps[1] + r * steps[2];
        i += 1;
    }
    places
}

/// The bit `step·point + first` for each byte.
const fn bits(step: u8, first: u8) -> [u8; 64] {
    let (mut bits, mut i) = ([0; 64], 0);
    while i < 64 {
        bits[i] = 1 << (PLACES[i][1] * step + first);
        i += 1;
    }
    bits
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn in_order(places: &[u8; 64], v: __m512i) -> __m512i {
    _mm512_permutexvar_epi8(load(places), v)
}

/// Indices of one byte, for the four points at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn low_bits(a: &[u8], b: &[u8], at: usize) -> Indices {
    let low = in_order(const { &places([32, 8, 1], 0) }, load32x2(a, b, at));
    Indices { low, bits: [_mm512_movepi8_mask(low), 0, 0, 0] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn iq2s(a: &[u8], b: &[u8]) -> Indices {
    let mut indices = low_bits(a, b, 0);
    let high = in_order(const { &places([8, 0, 1], 0) }, _mm512_castsi128_si512(load8x2(a, b, 64)));
    indices.bits[1] = _mm512_test_epi8_mask(high, load(const { &bits(2, 0) }));
    indices.bits[2] = _mm512_test_epi8_mask(high, load(const { &bits(2, 1) }));
    indices
}

/// Indices and signs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn iq2xs(a: &[u8], b: &[u8]) -> (Indices, __m512i) {
    let [a, b] = [load(bytes(a, 0)), load(bytes(b, 0))];
    let low = _mm512_permutex2var_epi8(a, load(const { &places([64, 16, 2], 0) }), b);
    let high = _mm512_permutex2var_epi8(a, load(const { &places([64, 16, 2], 1) }), b);
    let ninth = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1));
    let signs = _mm512_and_si512(_mm512_srli_epi16::<1>(high), _mm512_set1_epi8(127));
    (Indices { low, bits: [_mm512_movepi8_mask(low), ninth, 0, 0] }, with_parity(signs))
}

/// Indices, and all ones where an eighth is subtracted.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn iq1s(a: &[u8], b: &[u8]) -> (Indices, __m512i) {
    /// Places and bits of bit `bit` of the upper three bits, which are bits 3l to 3l + 3 of a word.
    const fn upper(bit: u8) -> [[u8; 64]; 2] {
        let (mut found, mut i) = ([places([16, 0, 2], 0), [0; 64]], 0);
        while i < 64 {
            let place = 3 * PLACES[i][1] + bit;
            found[0][i] += place / 8;
            found[1][i] = 1 << (place % 8);
            i += 1;
        }
        found
    }
    const UPPER: [[[u8; 64]; 2]; 3] = [upper(0), upper(1), upper(2)];
    let mut indices = low_bits(a, b, 0);
    let words = _mm512_castsi256_si512(load16x2(a, b, 32));
    for (bit, [places, tested]) in UPPER.iter().enumerate() {
        indices.bits[1 + bit] = _mm512_test_epi8_mask(in_order(places, words), load(tested));
    }
    let top = in_order(const { &places([16, 0, 2], 1) }, words);
    (indices, _mm512_movm_epi8(_mm512_movepi8_mask(top)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn iq1m(a: &[u8], b: &[u8]) -> (Indices, __m512i) {
    /// Points 0 and 1 share a byte, then points 2 and 3.
    const BYTES: [u8; 64] = {
        let (mut bytes, mut i) = (places([16, 0, 1], 0), 0);
        while i < 64 {
            bytes[i] += PLACES[i][1] / 2 * 8;
            i += 1;
        }
        bytes
    };
    const fn tested(bit: u8) -> [u8; 64] {
        let (mut tested, mut i) = ([0; 64], 0);
        while i < 64 {
            tested[i] = 1 << (PLACES[i][1] % 2 * 4 + bit);
            i += 1;
        }
        tested
    }
    const TESTED: [[u8; 64]; 4] = [tested(0), tested(1), tested(2), tested(3)];
    let mut indices = low_bits(a, b, 0);
    let nibbles = in_order(&BYTES, _mm512_castsi256_si512(load16x2(a, b, 32)));
    for bit in 0..3 {
        indices.bits[1 + bit] = _mm512_test_epi8_mask(nibbles, load(&TESTED[bit]));
    }
    (indices, _mm512_movm_epi8(_mm512_test_epi8_mask(nibbles, load(&TESTED[3]))))
}

/// Four times seven signs, each with its eighth, for each row and row group in turn.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn seven_bits(a: &[u8], b: &[u8], at: usize) -> __m512i {
    let signs = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(const { every(7, 32, 0) }), load32x2(a, b, at));
    with_parity(_mm512_and_si512(signs, _mm512_set1_epi8(127)))
}

/// Adds an eighth sign, which makes the number of minuses even.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn with_parity(signs: __m512i) -> __m512i {
    const ODD: [u8; 64] = {
        let (mut odd, mut i) = ([0; 64], 0);
        while i < 64 {
            odd[i] = (i as u8).count_ones() as u8 % 2 * 128;
            i += 1;
        }
        odd
    };
    // Six bits are looked up; bit 6 is combined with bit 0, and bit 7 is not set.
    let folded = _mm512_xor_si512(signs, _mm512_and_si512(_mm512_srli_epi16::<6>(signs), _mm512_set1_epi8(3)));
    _mm512_or_si512(signs, _mm512_permutexvar_epi8(folded, load(&ODD)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[u8; 64]) -> __m512i {
    // SAFETY: the reference covers the 64 bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{Group, WeightType};
    use crate::x86::Avx512;
    use crate::x86::avx2::grouped::grid_blocks;

    const ALL: [Codes; 7] =
        [Codes::Iq3s, Codes::Iq3xxs, Codes::Iq2s, Codes::Iq2xs, Codes::Iq2xxs, Codes::Iq1s, Codes::Iq1m];

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn compare(codes: Codes, records: &[Vec<u8>; 2]) {
        let group = |values| Group { ty: WeightType::F32, scales: &[], values };
        let pair = [group(&records[0][..]), group(&records[1][..])];
        let mut out = [[_mm512_setzero_si512(); 8]; STRIP];
        if !strip(codes, &pair, 1, &mut out) {
            return;
        }
        let first = STRIP * ROW_GROUP * codes.block_len();
        for (half, records) in records.iter().enumerate() {
            let mut want = [[_mm256_setzero_si256(); 8]; 2];
            grid_blocks(codes, &records[first..], &mut want);
            for (g, (out, want)) in out.iter().zip(&want).enumerate() {
                for q in 0..8 {
                    let got =
                        if half == 0 { _mm512_castsi512_si256(out[q]) } else { _mm512_extracti64x4_epi64::<1>(out[q]) };
                    assert_eq!(
                        _mm256_cmpeq_epi8_mask(got, want[q]),
                        u32::MAX,
                        "{codes:?}, block {g}, columns from {}",
                        4 * q
                    );
                }
            }
        }
    }

    /// The blocks of CPUs without VBMI consist of AVX2 blocks.
    #[test]
    fn bytes_are_those_of_avx2() {
        if Avx512::new().is_none() {
            return;
        }
        let mut state = 1u32;
        for codes in ALL {
            let mut records = || {
                let next = |_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                };
                (0..(STRIP + 2) * ROW_GROUP * codes.block_len()).map(next).collect()
            };
            let records = [records(), records()];
            // SAFETY: the token proves the features that the function enables.
            unsafe { compare(codes, &records) };
        }
    }
}

//! `q4`, `q3` and `q2`: nibbles that `vpshufb` turns into integers, in the order of `quant::product`.

use super::{fold4, load16, load32, put, vnni};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::quant::UNIT;
use crate::x86::ahead::{Ahead, near};
use crate::x86::{
    LEVEL_BIAS, Q2, Q4, block_bytes, blocks_of, bytes, cut, has_codebook, levels, offset_base, padded_rows, parts,
    quantised_rows, words,
};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile<const TY: u8, const V: bool>(
    w: &Group<'_>,
    x: &Activations,
    shape: TileShape,
    g: usize,
    out: &mut Tile,
) {
    let mut t = 0;
    if !shape.int8 {
        while shape.tokens - t >= 2 {
            put(blocks_f32::<TY, 2>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
            t += 2;
        }
        if t < shape.tokens {
            put(blocks_f32::<TY, 1>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
        }
        return;
    }
    put(blocks_int8::<TY, 1, V>(w, quantised_rows(x, shape.token)), out, g);
}

/// 32 columns as four vectors of nibbles. In those of `q3` the fourth bit is zero. `q2` has a vector of words for each half, and
/// after them the same words rotated by six bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nibbles<const TY: u8>(w: &[u8]) -> [__m256i; 4] {
    let [a, b] = [load32(w, 0), load32(w, 32)];
    if TY == Q2 {
        return [a, b, turned(a), turned(b)];
    }
    let c = load32(w, 64);
    if TY == Q4 {
        return [a, b, c, load32(w, 96)];
    }
    let (three, fourth) = (_mm256_set1_epi8(0x77), _mm256_set1_epi8(0x88_u8 as i8));
    let last = _mm256_or_si256(
        _mm256_or_si256(
            _mm256_srli_epi16::<3>(_mm256_and_si256(a, fourth)),
            _mm256_srli_epi16::<2>(_mm256_and_si256(b, fourth)),
        ),
        _mm256_srli_epi16::<1>(_mm256_and_si256(c, fourth)),
    );
    [_mm256_and_si256(a, three), _mm256_and_si256(b, three), _mm256_and_si256(c, three), last]
}

/// Rotates each word right by six bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn turned(words: __m256i) -> __m256i {
    _mm256_or_si256(_mm256_srli_epi32::<6>(words), _mm256_slli_epi32::<26>(words))
}

/// The integers of four columns, number `v` of a half, from the result of `nibbles`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn level<const TY: u8>(table: __m256i, nibbles: &[__m256i; 4], half: usize, v: usize) -> __m256i {
    if TY != Q2 {
        return look_up::<TY>(table, nibbles[v], half == 1);
    }
    let words = nibbles[half];
    // The number of a level is the four bits that begin at twice its place in the word.
    let moved = match v {
        0 => words,
        1 => _mm256_srli_epi32::<2>(words),
        2 => _mm256_srli_epi32::<4>(words),
        _ => nibbles[2 + half],
    };
    _mm256_shuffle_epi8(table, _mm256_and_si256(moved, _mm256_set1_epi8(15)))
}

/// The integers of the low or the high nibbles. If there are no fourth bits, bits above a nibble do not disturb the look-up.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up<const TY: u8>(table: __m256i, nibbles: __m256i, high: bool) -> __m256i {
    let moved = if high { _mm256_srli_epi16::<4>(nibbles) } else { nibbles };
    _mm256_shuffle_epi8(table, if TY == Q4 { _mm256_and_si256(moved, _mm256_set1_epi8(15)) } else { moved })
}

/// Scale over `UNIT`, and offset plus its base, of the block whose bytes are at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scale_and_offset<const TY: u8>(codes: &[u8], at: usize) -> (__m256, __m256i) {
    let codes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes(codes, at)));
    let scale = _mm_and_si128(_mm_cvtepu8_epi16(codes), _mm_set1_epi16(31));
    let wide = _mm256_cvtepu8_epi32(codes);
    let offset = if TY == Q4 {
        _mm256_and_si256(_mm256_srli_epi32::<4>(wide), _mm256_set1_epi32(14))
    } else {
        _mm256_and_si256(_mm256_srli_epi32::<3>(wide), _mm256_set1_epi32(28))
    };
    (_mm256_cvtph_ps(_mm_slli_epi16::<7>(scale)), offset)
}

/// What was added to the integers of a type with a codebook, apart from offsets that differ by block.
const fn codebook_bias(ty: u8) -> i32 {
    if has_codebook(ty) { LEVEL_BIAS + offset_base(ty) } else { 0 }
}

/// The scale over `UNIT` of part `P` of a block, and the factor that applies its offset and bias. The factor is the lower (0) or the
/// upper (1) half of each lane and the other half is zero, so `vpmaddwd` with a pair of column sums takes the right one. Sums fit in 16
/// bits; the sign extension of a single negative one meets the zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scale_and_bias<const TY: u8, const P: usize>(codes: &[u8]) -> (__m256, __m256i) {
    let (scale, offset) = scale_and_offset::<TY>(codes, 8 * P);
    let bias = _mm256_set1_epi32(const { -codebook_bias(TY) & 0xffff });
    let bias = _mm256_add_epi16(offset, bias);
    (scale, if P == 0 { bias } else { _mm256_slli_epi32::<16>(bias) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn row_scales(scales: &[u8]) -> __m256 {
    _mm256_castsi256_ps(load32(scales, 0))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_int8<const TY: u8, const T: usize, const V: bool>(w: &Group<'_>, x: [&[QuantisedBlock]; T]) -> [__m256; T] {
    let table = _mm256_broadcastsi128_si256(load16(&const { levels(TY, LEVEL_BIAS) }, 0));
    // The sums of even and odd blocks alternate; at the end, their order does not matter.
    let mut s = [_mm256_setzero_ps(); T];
    let mut other = s;
    let blocks = w.values.len() / const { block_bytes(TY) };
    let x = cut(&x, blocks);
    let ahead = Ahead::new::<1, T>(&[*w]);
    for (g, (values, codes)) in (0..blocks).zip(blocks_of::<TY>(w)) {
        ahead.block::<TY, 1, T>(g);
        let words = words(&x, g);
        let (scale, bias) = scale_and_bias::<TY, 0>(codes);
        let x_scales = each!(_mm256_setzero_ps(); T, t => _mm256_set1_ps(x[t][g].scale_times_unit));
        if TY == Q4 {
            let mut dots = initial_sums(bias, &each!(0; T, t => x[t][g].sum));
            for v in 0..4 {
                let nibbles = load32(values, 32 * v);
                dot::<T, V>(&mut dots, look_up::<TY>(table, nibbles, false), &words, v);
                dot::<T, V>(&mut dots, look_up::<TY>(table, nibbles, true), &words, v + 4);
            }
            let next = add(&dots, scale, &x_scales, &s);
            (s, other) = (other, next);
            continue;
        }
        let nibbles = nibbles::<TY>(values);
        let mut low = initial_sums(bias, &each!(0; T, t => x[t][g].halves.0));
        for v in 0..4 {
            dot::<T, V>(&mut low, level::<TY>(table, &nibbles, 0, v), &words, v);
        }
        s = add(&low, scale, &x_scales, &s);
        let (scale, bias) = scale_and_bias::<TY, 1>(codes);
        let mut high = initial_sums(bias, &each!(0; T, t => x[t][g].halves.0));
        for v in 0..4 {
            dot::<T, V>(&mut high, level::<TY>(table, &nibbles, 1, v), &words, v + 4);
        }
        other = add(&high, scale, &x_scales, &other);
    }
    let scales = row_scales(w.scales);
    each!(_mm256_setzero_ps(); T, t => _mm256_mul_ps(_mm256_add_ps(s[t], other[t]), scales))
}

/// Adds the products of four columns with unsigned levels. Pair sums stay within 2·128·127 = 32512.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<const T: usize, const V: bool>(dots: &mut [__m256i; T], level: __m256i, words: &[&[i32; 8]; T], q: usize) {
    for t in 0..T {
        let x = _mm256_set1_epi32(words[t][q]);
        if V {
            dots[t] = vnni::add_products(dots[t], level, x);
            continue;
        }
        let pairs = _mm256_maddubs_epi16(level, x);
        dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
}

/// What sums begin with: the factors in `bias` times column sums of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn initial_sums<const T: usize>(bias: __m256i, columns: &[i32; T]) -> [__m256i; T] {
    each!(bias; T, t => _mm256_madd_epi16(bias, _mm256_set1_epi32(columns[t])))
}

/// Adds a block to sums of rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const T: usize>(dots: &[__m256i; T], scale: __m256, x_scales: &[__m256; T], s: &[__m256; T]) -> [__m256; T] {
    each!(scale; T, t => _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), _mm256_mul_ps(scale, x_scales[t]), s[t]))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_f32<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[f32]; T]) -> [__m256; T] {
    let table = _mm256_broadcastsi128_si256(load16(&const { levels(TY, 0) }, 0));
    let mut total = [_mm256_setzero_ps(); T];
    near(w.scales);
    for (g, values) in w.values.chunks_exact(const { block_bytes(TY) }).enumerate() {
        near(values);
        let nibbles = nibbles::<TY>(values);
        let x = parts(&x, g * 32, 32);
        let mut s = [[_mm256_setzero_ps(); 4]; T];
        for half in 0..2 {
            let b = if TY == Q4 { g } else { 2 * g + half };
            let (scale, offset) = scale_and_offset::<TY>(w.scales, 32 + 8 * b);
            let offset = _mm256_sub_epi32(offset, _mm256_set1_epi32(const { offset_base(TY) }));
            for v in 0..4 {
                let level = level::<TY>(table, &nibbles, half, v);
                let q = 4 * half + v;
                // The offset is added in 32 bits, after the four columns have been taken apart.
                let columns = [
                    _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(level)),
                    _mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(level)),
                    _mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(level)),
                    _mm256_srai_epi32::<24>(level),
                ];
                for i in 0..4 {
                    let column = _mm256_cvtepi32_ps(_mm256_add_epi32(columns[i], offset));
                    for t in 0..T {
                        s[t][i] = _mm256_fmadd_ps(column, _mm256_set1_ps(x[t][4 * q + i]), s[t][i]);
                    }
                }
            }
            if TY == Q4 && half == 0 {
                continue;
            }
            for t in 0..T {
                let sum = _mm256_mul_ps(fold4(s[t]), _mm256_set1_ps(UNIT));
                total[t] = _mm256_fmadd_ps(sum, scale, total[t]);
                s[t] = [_mm256_setzero_ps(); 4];
            }
        }
    }
    let scales = row_scales(w.scales);
    each!(_mm256_setzero_ps(); T, t => _mm256_mul_ps(total[t], scales))
}

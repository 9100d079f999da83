//! `q4` and `q3` with int8 activations, in the order of `quant::product`.

use super::{Ahead, Pair, load16, load32x2, put};
use crate::activations::{Activations, QuantisedRow};
use crate::matmul::{Tile, TileShape};
use crate::quant::UNIT;
use crate::x86::{Q4, block_bytes, bytes, levels, offset_base, quantised_rows, scale_bytes, words};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn tile<const TY: u8>(w: &Pair<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let mut t = 0;
    if shape.tokens >= 8 {
        put(blocks_int8::<TY, 8>(w, quantised_rows(x, shape.token)), out);
        t = 8;
    }
    if shape.tokens - t >= 4 {
        put(blocks_int8::<TY, 4>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(blocks_int8::<TY, 2>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 2;
    }
    if t < shape.tokens {
        put(blocks_int8::<TY, 1>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
    }
}

/// 32 columns as four vectors of nibbles. In those of `q3` the fourth bit is zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn nibbles<const TY: u8>(a: &[u8], b: &[u8]) -> [__m512i; 4] {
    let [p, q, r] = [load32x2(a, b, 0), load32x2(a, b, 32), load32x2(a, b, 64)];
    if TY == Q4 {
        return [p, q, r, load32x2(a, b, 96)];
    }
    let (three, fourth) = (_mm512_set1_epi8(0x77), _mm512_set1_epi8(0x88_u8 as i8));
    // The or of all three.
    let last = _mm512_ternarylogic_epi32::<0xfe>(
        _mm512_srli_epi16::<3>(_mm512_and_si512(p, fourth)),
        _mm512_srli_epi16::<2>(_mm512_and_si512(q, fourth)),
        _mm512_srli_epi16::<1>(_mm512_and_si512(r, fourth)),
    );
    [_mm512_and_si512(p, three), _mm512_and_si512(q, three), _mm512_and_si512(r, three), last]
}

/// What the low or the high nibbles stand for. Without fourth bits, bits above a nibble do not disturb the look-up.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn look_up<const TY: u8>(table: __m512i, nibbles: __m512i, high: bool) -> __m512i {
    let moved = if high { _mm512_srli_epi16::<4>(nibbles) } else { nibbles };
    _mm512_shuffle_epi8(table, if TY == Q4 { _mm512_and_si512(moved, _mm512_set1_epi8(15)) } else { moved })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocks_int8<const TY: u8, const T: usize>(w: &Pair<'_>, x: [QuantisedRow<'_>; T]) -> [__m512; T] {
    let len = const { block_bytes(TY) };
    let table = _mm512_broadcast_i32x4(load16(&const { levels(TY, 64) }, 0));
    // The sums of even and odd blocks take turns; in the end their order does not matter.
    let mut s = [_mm512_setzero_ps(); T];
    let mut other = s;
    let ahead = Ahead::new(w);
    for (g, (a, b)) in w[0].values.chunks_exact(len).zip(w[1].values.chunks_exact(len)).enumerate() {
        ahead.values(g * len, len);
        ahead.scales(32 + g * const { scale_bytes(TY) });
        let words = words(&x, g);
        if TY == Q4 {
            let mut dots = biased::<TY, T>(w, g, &each!(0; T, t => x[t].sums[g][0]));
            for v in 0..4 {
                let nibbles = load32x2(a, b, 32 * v);
                dot(&mut dots, look_up::<TY>(table, nibbles, false), &words, v);
                dot(&mut dots, look_up::<TY>(table, nibbles, true), &words, v + 4);
            }
            let next = add(&dots, scale(w, g), &x, g, &s);
            (s, other) = (other, next);
            continue;
        }
        let nibbles = nibbles::<TY>(a, b);
        let mut low = biased::<TY, T>(w, 2 * g, &each!(0; T, t => x[t].sums[g][1]));
        for v in 0..4 {
            dot(&mut low, look_up::<TY>(table, nibbles[v], false), &words, v);
        }
        s = add(&low, scale(w, 2 * g), &x, g, &s);
        let mut high = biased::<TY, T>(w, 2 * g + 1, &each!(0; T, t => x[t].sums[g][0] - x[t].sums[g][1]));
        for v in 0..4 {
            dot(&mut high, look_up::<TY>(table, nibbles[v], true), &words, v + 4);
        }
        other = add(&high, scale(w, 2 * g + 1), &x, g, &other);
    }
    let scales = _mm512_castsi512_ps(load32x2(w[0].scales, w[1].scales, 0));
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(_mm512_add_ps(s[t], other[t]), scales))
}

/// Adds the products of four columns with unsigned levels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot<const T: usize>(dots: &mut [__m512i; T], level: __m512i, words: &[&[i32; 8]; T], q: usize) {
    for t in 0..T {
        dots[t] = _mm512_dpbusd_epi32(dots[t], level, _mm512_set1_epi32(words[t][q]));
    }
}

/// The bytes of block `b`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn codes(w: &Pair<'_>, b: usize) -> __m128i {
    let at = 32 + 8 * b;
    let (low, high) = (i64::from_le_bytes(*bytes(w[0].scales, at)), i64::from_le_bytes(*bytes(w[1].scales, at)));
    _mm_set_epi64x(high, low)
}

/// The scale of block `b` over `UNIT`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scale(w: &Pair<'_>, b: usize) -> __m512 {
    let scale = _mm256_and_si256(_mm256_cvtepu8_epi16(codes(w, b)), _mm256_set1_epi16(31));
    _mm512_cvtph_ps(_mm256_slli_epi16::<7>(scale))
}

/// What the offset of block `b` and the bias of the levels contribute, for columns of `x` that add up to `sums`. The
/// sums fit in 16 bits, so that one multiplication of 16-bit pairs, the upper one with zero, is enough.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn biased<const TY: u8, const T: usize>(w: &Pair<'_>, b: usize, sums: &[i32; T]) -> [__m512i; T] {
    let wide = _mm512_cvtepu8_epi32(codes(w, b));
    let offset = if TY == Q4 {
        _mm512_and_si512(_mm512_srli_epi32::<4>(wide), _mm512_set1_epi32(14))
    } else {
        _mm512_and_si512(_mm512_srli_epi32::<3>(wide), _mm512_set1_epi32(28))
    };
    let bias = _mm512_sub_epi32(offset, _mm512_set1_epi32(const { 64 + offset_base(TY) }));
    each!(_mm512_setzero_si512(); T, t => _mm512_madd_epi16(bias, _mm512_set1_epi32(sums[t] & 0xffff)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add<const T: usize>(
    dots: &[__m512i; T],
    scale: __m512,
    x: &[QuantisedRow<'_>; T],
    g: usize,
    s: &[__m512; T],
) -> [__m512; T] {
    let mut next = *s;
    for t in 0..T {
        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[t].scales[g] * UNIT));
        next[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, s[t]);
    }
    next
}

//! `q4` and `q3` with int8 activations, in the order of `quant::product`.

use super::{Pair, load16, load32x2, prefetch, put};
use crate::activations::{Activations, QuantisedRow};
use crate::matmul::{Tile, TileShape};
use crate::quant::UNIT;
use crate::x86::{Q4, block_bytes, bytes, levels, offset_base, quantised_rows, words};
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
    let mut s = [[_mm512_setzero_ps(); T]; 2];
    for (g, (a, b)) in w[0].values.chunks_exact(len).zip(w[1].values.chunks_exact(len)).enumerate() {
        prefetch(a);
        prefetch(b);
        let words = words(&x, g);
        let nibbles = nibbles::<TY>(a, b);
        if TY == Q4 {
            let (scale, bias) = scale_and_bias::<TY>(w, g);
            let mut dots = biased(bias, &each!(0; T, t => x[t].sums[g][0]));
            for q in 0..8 {
                let level = look_up::<TY>(table, nibbles[q % 4], q >= 4);
                for t in 0..T {
                    dots[t] = _mm512_dpbusd_epi32(dots[t], level, _mm512_set1_epi32(words[t][q]));
                }
            }
            add(&dots, scale, &x, g, &mut s[0]);
            s.swap(0, 1);
        } else {
            for half in 0..2 {
                let (scale, bias) = scale_and_bias::<TY>(w, 2 * g + half);
                let rest = each!(0; T, t => x[t].sums[g][0] - x[t].sums[g][1]);
                let sums = if half == 0 { each!(0; T, t => x[t].sums[g][1]) } else { rest };
                let mut dots = biased(bias, &sums);
                for v in 0..4 {
                    let level = look_up::<TY>(table, nibbles[v], half == 1);
                    for t in 0..T {
                        dots[t] = _mm512_dpbusd_epi32(dots[t], level, _mm512_set1_epi32(words[t][4 * half + v]));
                    }
                }
                add(&dots, scale, &x, g, &mut s[half]);
            }
        }
    }
    let scales = _mm512_castsi512_ps(load32x2(w[0].scales, w[1].scales, 0));
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(_mm512_add_ps(s[0][t], s[1][t]), scales))
}

/// Scale over `UNIT`, and what must be added to unsigned levels, of block `b`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scale_and_bias<const TY: u8>(w: &Pair<'_>, b: usize) -> (__m512, __m512i) {
    let at = 32 + 8 * b;
    let (low, high) = (i64::from_le_bytes(*bytes(w[0].scales, at)), i64::from_le_bytes(*bytes(w[1].scales, at)));
    let codes = _mm_set_epi64x(high, low);
    let scale = _mm256_and_si256(_mm256_cvtepu8_epi16(codes), _mm256_set1_epi16(31));
    let wide = _mm512_cvtepu8_epi32(codes);
    let offset = if TY == Q4 {
        _mm512_and_si512(_mm512_srli_epi32::<4>(wide), _mm512_set1_epi32(14))
    } else {
        _mm512_and_si512(_mm512_srli_epi32::<3>(wide), _mm512_set1_epi32(28))
    };
    let bias = _mm512_sub_epi32(offset, _mm512_set1_epi32(const { 64 + offset_base(TY) }));
    (_mm512_cvtph_ps(_mm256_slli_epi16::<7>(scale)), bias)
}

/// The bias times each sum of `x`. The sums fit in 16 bits, and the upper pair of each lane meets zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn biased<const T: usize>(bias: __m512i, sums: &[i32; T]) -> [__m512i; T] {
    each!(_mm512_setzero_si512(); T, t => _mm512_madd_epi16(bias, _mm512_set1_epi32(sums[t] & 0xffff)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add<const T: usize>(dots: &[__m512i; T], scale: __m512, x: &[QuantisedRow<'_>; T], g: usize, s: &mut [__m512; T]) {
    for t in 0..T {
        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[t].scales[g] * UNIT));
        s[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, s[t]);
    }
}

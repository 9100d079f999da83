//! `q4`, `q3` and `q2` with int8 activations, in the order of `quant::product`.

use super::{Pair, add, load, load8x2, load16, load32, load32x2, multiply, put};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::quant::UNIT;
use crate::x86::ahead::Ahead;
use crate::x86::{LEVEL_BIAS, Q2, Q4, block_bytes, blocks_of, codebook, cut, levels, quantised_rows, words};
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

/// 32 columns as four vectors of nibbles. In those of `q3` the fourth bit is zero. `q2` has a vector of words for each half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn nibbles<const TY: u8>(a: &[u8], b: &[u8]) -> [__m512i; 4] {
    let [p, q] = [load32x2(a, b, 0), load32x2(a, b, 32)];
    if TY == Q2 {
        return [p, q, p, q];
    }
    let r = load32x2(a, b, 64);
    if TY == Q4 {
        return [p, q, r, load32x2(a, b, 96)];
    }
    let (three, fourth) = (_mm512_set1_epi8(0x77), _mm512_set1_epi8(0x88_u8 as i8));
    // The OR of all three.
    let last = _mm512_ternarylogic_epi32::<0xfe>(
        _mm512_srli_epi16::<3>(_mm512_and_si512(p, fourth)),
        _mm512_srli_epi16::<2>(_mm512_and_si512(q, fourth)),
        _mm512_srli_epi16::<1>(_mm512_and_si512(r, fourth)),
    );
    [_mm512_and_si512(p, three), _mm512_and_si512(q, three), _mm512_and_si512(r, three), last]
}

/// The integers of four columns, number `v` of a half, from the result of `nibbles`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn level<const TY: u8>(table: __m512i, nibbles: &[__m512i; 4], half: usize, v: usize) -> __m512i {
    if TY != Q2 {
        return look_up::<TY>(table, nibbles[v], half == 1);
    }
    let words = nibbles[half];
    // The number of a level is the four bits that begin at twice its place in the word.
    let moved = match v {
        0 => words,
        1 => _mm512_ror_epi32::<2>(words),
        2 => _mm512_ror_epi32::<4>(words),
        _ => _mm512_ror_epi32::<6>(words),
    };
    _mm512_shuffle_epi8(table, _mm512_and_si512(moved, _mm512_set1_epi8(15)))
}

/// The integers of the low or the high nibbles. If there are no fourth bits, bits above a nibble do not disturb the look-up.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn look_up<const TY: u8>(table: __m512i, nibbles: __m512i, high: bool) -> __m512i {
    let moved = if high { _mm512_srli_epi16::<4>(nibbles) } else { nibbles };
    _mm512_shuffle_epi8(table, if TY == Q4 { _mm512_and_si512(moved, _mm512_set1_epi8(15)) } else { moved })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocks_int8<const TY: u8, const T: usize>(w: &Pair<'_>, x: [&[QuantisedBlock]; T]) -> [__m512; T] {
    let table = _mm512_broadcast_i32x4(load16(&const { levels(TY, LEVEL_BIAS) }, 0));
    let blocks = w[0].values.len() / const { block_bytes(TY) };
    let x = cut(&x, blocks);
    // The sums of even and odd blocks alternate; at the end, their order does not matter.
    let mut s = [_mm512_setzero_ps(); T];
    let mut other = s;
    let ahead = Ahead::new::<2, T>(w);
    let pairs = blocks_of::<TY>(&w[0]).zip(blocks_of::<TY>(&w[1]));
    for (g, ((a, a_codes), (b, b_codes))) in (0..blocks).zip(pairs) {
        ahead.block::<TY, 2, T>(g);
        let words = words(&x, g);
        let codes = _mm512_cvtepu8_epi32(load8x2(a_codes, b_codes, 0));
        if TY == Q4 {
            let mut dots = biased::<TY, T>(codes, &each!(0; T, t => x[t][g].sum));
            for v in 0..4 {
                let nibbles = load32x2(a, b, 32 * v);
                multiply(&mut dots, look_up::<TY>(table, nibbles, false), &words, v);
                multiply(&mut dots, look_up::<TY>(table, nibbles, true), &words, v + 4);
            }
            let next = add(&dots, scale(codes), &x, g, UNIT, &s);
            (s, other) = (other, next);
            continue;
        }
        let nibbles = nibbles::<TY>(a, b);
        let mut low = biased::<TY, T>(codes, &each!(0; T, t => x[t][g].halves.first()));
        for v in 0..4 {
            multiply(&mut low, level::<TY>(table, &nibbles, 0, v), &words, v);
        }
        s = add(&low, scale(codes), &x, g, UNIT, &s);
        let codes = _mm512_cvtepu8_epi32(load8x2(a_codes, b_codes, 8));
        let mut high = biased::<TY, T>(codes, &each!(0; T, t => x[t][g].halves.second()));
        for v in 0..4 {
            multiply(&mut high, level::<TY>(table, &nibbles, 1, v), &words, v + 4);
        }
        other = add(&high, scale(codes), &x, g, UNIT, &other);
    }
    let scales = _mm512_castsi512_ps(load32x2(w[0].scales, w[1].scales, 0));
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(_mm512_add_ps(s[t], other[t]), scales))
}

/// The scales over `UNIT` of a block whose bytes are `codes`. Only five bits of an index matter.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scale(codes: __m512i) -> __m512 {
    const SCALES: [[f32; 16]; 2] = scales_over_unit();
    _mm512_permutex2var_ps(load(&SCALES[0]), codes, load(&SCALES[1]))
}

/// The contribution of the offsets of a block and the bias of the levels, for columns of `x` that add up to `sums`. The sums fit in
/// 16 bits, so one multiplication of 16-bit pairs, with zero as the upper number, is enough.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn biased<const TY: u8, const T: usize>(codes: __m512i, sums: &[i32; T]) -> [__m512i; T] {
    let biases = _mm512_broadcast_i32x8(load32(&const { biases(TY) }, 0));
    let bias = _mm512_permutexvar_epi32(_mm512_srli_epi32::<5>(codes), biases);
    each!(_mm512_setzero_si512(); T, t => _mm512_madd_epi16(bias, _mm512_set1_epi32(sums[t] & 0xffff)))
}

/// The number that the three bits of an offset and the bias of the levels add to each level, as eight little-endian numbers.
const fn biases(ty: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 8 {
        let bias = (codebook(ty).offset((i as u8) << 5) - LEVEL_BIAS).to_le_bytes();
        let mut b = 0;
        while b < 4 {
            bytes[4 * i + b] = bias[b];
            b += 1;
        }
        i += 1;
    }
    bytes
}

/// The values of the 32 scales, over `UNIT`: binary16 numbers with two bits of exponent and three of fraction.
const fn scales_over_unit() -> [[f32; 16]; 2] {
    let mut scales = [[0.0; 16]; 2];
    let mut code = 0;
    while code < 32 {
        let (exponent, fraction) = (code >> 3, code & 7);
        let value = if exponent == 0 { fraction } else { (8 + fraction) << (exponent - 1) };
        scales[code >> 4][code & 15] = value as f32 / UNIT;
        code += 1;
    }
    scales
}

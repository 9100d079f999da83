//! Several tokens of int8 times one or two row groups.
//!
//! The integers of a block are unpacked once for all tokens of a tile. Then each vector of them meets four tokens, and each word of
//! a token meets both row groups, before the next: sums stay in registers, and each load serves several products.

use super::codebook::{level, nibbles, row_scales, scale_and_offset};
use super::{block_scales, load16, load32, put, vnni};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::quant::UNIT;
use crate::x86::ahead::Ahead;
use crate::x86::{
    AVX2_TOKENS, INT4, MXFP4, Q4, Q8, bias, block_bytes, by_halves, e2m1_table, has_codebook, levels, offset_base,
    scale_bytes, scales_from, unit,
};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Tokens that a vector of weights meets: with two row groups, as many as leave their sums in the 16 registers.
const PASS: usize = 4;

/// The number that makes the levels of `q4`, `q3` and `q2` unsigned.
const LEVEL_BIAS: i32 = 64;

/// The sums of a tile, by token and row group, for even and for odd blocks.
type Sums<const G: usize> = [[[__m256; G]; AVX2_TOKENS]; 2];

/// One block of a row group.
#[derive(Clone, Copy)]
struct Block<'a> {
    values: &'a [u8],
    /// Scales of its parts, and the factors of a pair of sums of columns that apply offset and bias.
    terms: [(__m256, __m256i); 2],
    /// Eight vectors of unsigned integers, four columns each; unused if integers are stored as such.
    integers: [__m256i; 8],
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile<const TY: u8, const G: usize, const V: bool>(
    w: &[Group<'_>; G],
    x: &Activations,
    shape: TileShape,
    out: &mut Tile,
) {
    let blocks = w[0].values.len() / const { block_bytes(TY) };
    let mut rows: [&[QuantisedBlock]; AVX2_TOKENS] = [&[]; AVX2_TOKENS];
    for (t, row) in rows[..shape.tokens].iter_mut().enumerate() {
        *row = &x.quantised_row(shape.token + t)[..blocks];
    }
    let rows = &rows[..shape.tokens];
    let mut sums: Sums<G> = [[[_mm256_setzero_ps(); G]; AVX2_TOKENS]; 2];
    let ahead = Ahead::new::<G, AVX2_TOKENS>(w);
    // Because the compiler does not know the number of steps, it keeps the loop over them, and so the order described above.
    let steps = black_box(const { steps_of(TY) });
    for g in 0..blocks {
        ahead.block::<TY, G, AVX2_TOKENS>(g);
        let block = each!(block::<TY, V>(&w[0], g); G, i => block::<TY, V>(&w[i], g));
        let (full, rest) = rows.as_chunks::<PASS>();
        for (p, x) in full.iter().enumerate() {
            pass::<TY, G, PASS, V>(&block, x, g, steps, &mut sums, PASS * p);
        }
        let first = PASS * full.len();
        match *rest {
            [a, b, c] => pass::<TY, G, 3, V>(&block, &[a, b, c], g, steps, &mut sums, first),
            [a, b] => pass::<TY, G, 2, V>(&block, &[a, b], g, steps, &mut sums, first),
            [a] => pass::<TY, G, 1, V>(&block, &[a], g, steps, &mut sums, first),
            _ => {}
        }
    }
    for (t, out) in out[..shape.tokens].iter_mut().enumerate() {
        for i in 0..G {
            let sum = _mm256_add_ps(sums[0][t][i], sums[1][t][i]);
            let sum = if const { has_codebook(TY) } { _mm256_mul_ps(sum, row_scales(w[i].scales)) } else { sum };
            put([sum], std::slice::from_mut(out), i);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block<'a, const TY: u8, const V: bool>(w: &Group<'a>, g: usize) -> Block<'a> {
    let (len, scale_len) = const { (block_bytes(TY), scale_bytes(TY)) };
    let values = &w.values[g * len..][..len];
    let scales = &w.scales[const { scales_from(TY) } + g * scale_len..][..scale_len];
    let first = scale_and_bias::<TY, 0>(scales);
    let second = if const { by_halves(TY) } { scale_and_bias::<TY, 1>(scales) } else { first };
    Block { values, terms: [first, second], integers: unpack::<TY, V>(values) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const TY: u8, const V: bool>(values: &[u8]) -> [__m256i; 8] {
    let mut integers = [_mm256_setzero_si256(); 8];
    if TY == Q8 {
        if V {
            let flip = _mm256_set1_epi8(-128);
            integers = each!(integers[0]; 8, q => _mm256_xor_si256(load32(values, 32 * q), flip));
        }
        return integers;
    }
    let table = _mm256_broadcastsi128_si256(load16(&const { table(TY) }, 0));
    if const { has_codebook(TY) } {
        let nibbles = nibbles::<TY>(values);
        for v in 0..4 {
            integers[v] = level::<TY>(table, &nibbles, 0, v);
            integers[v + 4] = level::<TY>(table, &nibbles, 1, v);
        }
        return integers;
    }
    for v in 0..4 {
        let (low, high) = super::nibbles(load32(values, 32 * v));
        (integers[v], integers[v + 4]) =
            if TY == MXFP4 { (_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)) } else { (low, high) };
    }
    integers
}

/// The integers of the nibbles of a type, made unsigned.
const fn table(ty: u8) -> [u8; 16] {
    match ty {
        MXFP4 => e2m1_table(bias(MXFP4) as i8),
        _ if has_codebook(ty) => levels(ty, LEVEL_BIAS),
        _ => [0; 16],
    }
}

/// Adds block `g` of `T` tokens, whose sums begin at `first`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pass<const TY: u8, const G: usize, const T: usize, const V: bool>(
    w: &[Block<'_>; G],
    x: &[&[QuantisedBlock]; T],
    g: usize,
    steps: usize,
    sums: &mut Sums<G>,
    first: usize,
) {
    let x: [&QuantisedBlock; T] = each!(&x[0][g]; T, t => &x[t][g]);
    if const { by_halves(TY) } {
        let [even, odd] = sums;
        part::<TY, G, T, 0, V>(w, &x, steps, even[first..].first_chunk_mut().expect(PASS_FITS));
        part::<TY, G, T, 1, V>(w, &x, steps, odd[first..].first_chunk_mut().expect(PASS_FITS));
    } else {
        part::<TY, G, T, 0, V>(w, &x, steps, sums[g % 2][first..].first_chunk_mut().expect(PASS_FITS));
    }
}

const PASS_FITS: &str = "a tile has sums for all its tokens";

/// Pairs of vectors of weights in a part.
const fn steps_of(ty: u8) -> usize {
    if by_halves(ty) { 2 } else { 4 }
}

/// Adds the columns that share a scale: all of a block, or a half of it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn part<const TY: u8, const G: usize, const T: usize, const P: usize, const V: bool>(
    w: &[Block<'_>; G],
    x: &[&QuantisedBlock; T],
    steps: usize,
    sums: &mut [[__m256; G]; T],
) {
    let mut dots = [[_mm256_setzero_si256(); G]; T];
    // Sums of 16 bits may wrap in between, but without their bias they end within 16·8·127 or 16·12·127.
    if V && matches!(TY, Q8 | INT4 | MXFP4) {
        for t in 0..T {
            dots[t] = [_mm256_set1_epi32(-const { byte_bias(TY) } * x[t].sum); G];
        }
    } else if matches!(TY, INT4 | MXFP4) {
        for t in 0..T {
            let start = _mm256_mullo_epi16(
                _mm256_set1_epi32(x[t].minus_pairs.0),
                _mm256_set1_epi16(const { bias_of(TY) as i16 }),
            );
            dots[t] = [start; G];
        }
    }
    for step in 0..steps {
        // Shows that it is in bounds, without telling the compiler how many steps there are.
        let step = step % const { steps_of(TY) };
        for q in [2 * step, 2 * step + 1] {
            let q = 4 * P + q;
            let vector = each!(_mm256_setzero_si256(); G, i => {
                if TY == Q8 && !V { load32(w[i].values, 32 * q) } else { w[i].integers[q] }
            });
            for t in 0..T {
                let x = _mm256_set1_epi32(x[t].words[q]);
                for i in 0..G {
                    dots[t][i] = add_products::<TY, V>(dots[t][i], vector[i], x);
                }
            }
        }
    }
    for i in 0..G {
        let (scale, bias) = w[i].terms[P];
        for t in 0..T {
            let dot = match TY {
                INT4 | MXFP4 if !V => _mm256_madd_epi16(dots[t][i], _mm256_set1_epi16(1)),
                Q4 => _mm256_add_epi32(dots[t][i], _mm256_madd_epi16(bias, _mm256_set1_epi32(x[t].sum))),
                _ if const { by_halves(TY) } => {
                    _mm256_add_epi32(dots[t][i], _mm256_madd_epi16(bias, _mm256_set1_epi32(x[t].halves.0)))
                }
                _ => dots[t][i],
            };
            let x_scale = _mm256_mul_ps(_mm256_set1_ps(x[t].scale), _mm256_set1_ps(const { factor(TY) }));
            sums[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, x_scale), sums[t][i]);
        }
    }
}

/// The number that was added to the integers, apart from offsets that differ by block.
const fn bias_of(ty: u8) -> i32 {
    match ty {
        INT4 | MXFP4 => bias(ty),
        _ if has_codebook(ty) => LEVEL_BIAS + offset_base(ty),
        _ => 0,
    }
}

/// The number that makes the integers of a type without a codebook unsigned.
const fn byte_bias(ty: u8) -> i32 {
    if has_codebook(ty) { 0 } else { bias(ty) }
}

/// The factor by which the scale of the activations is multiplied.
const fn factor(ty: u8) -> f32 {
    if has_codebook(ty) { UNIT } else { 1.0 }
}

/// Adds the products of four columns to pairs of sums of 16 bits, or to sums of 32. Sums of two products stay within 2·128·127 =
/// 32512, so nothing saturates. `q8` has no bias: the other operand takes over the sign. With AVX-VNNI, all sums have 32 bits and
/// all integers are unsigned.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products<const TY: u8, const V: bool>(dots: __m256i, w: __m256i, x: __m256i) -> __m256i {
    if V {
        return vnni::add_products(dots, w, x);
    }
    match TY {
        INT4 | MXFP4 => _mm256_add_epi16(dots, _mm256_maddubs_epi16(w, x)),
        Q8 => {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(dots, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
        _ => {
            let pairs = _mm256_maddubs_epi16(w, x);
            _mm256_add_epi32(dots, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

/// The scales of part `P` of a block, and the factors of a pair of sums of columns that apply offset and bias.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale_and_bias<const TY: u8, const P: usize>(scales: &[u8]) -> (__m256, __m256i) {
    if !const { has_codebook(TY) } {
        // All powers of two from 2^-127 on can be halved, so it does not matter to which scale the unit is applied.
        let scale = _mm256_mul_ps(block_scales::<TY>(scales, 0), _mm256_set1_ps(const { unit(TY) }));
        return (scale, _mm256_setzero_si256());
    }
    let (scale, offset) = scale_and_offset::<TY>(scales, 8 * P);
    let bias = _mm256_sub_epi32(offset, _mm256_set1_epi32(const { bias_of(TY) }));
    let bias = if P == 0 { _mm256_and_si256(bias, _mm256_set1_epi32(0xffff)) } else { _mm256_slli_epi32::<16>(bias) };
    (scale, bias)
}

//! Several tokens of int8 times one or two row groups.
//!
//! The integers of a block are unpacked once for all tokens of a tile. Then each vector of them meets four tokens, and each word of
//! a token meets both row groups, before the next: sums stay in registers, and each load serves several products.

use super::codebook::{self, level, nibbles, row_scales};
use super::{block_scales, load16, load32, put, vnni};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::x86::ahead::Ahead;
use crate::x86::{
    AVX2_TOKENS, INT4, LEVEL_BIAS, MXFP4, Q8, bias, block_bytes, by_halves, e2m1_table, has_codebook, levels,
    scale_bytes, scales_from, unit,
};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Tokens that a vector of weights meets: with two row groups, as many as leave their sums in the 16 registers.
const PASS: usize = 4;

/// Up to so many tokens use a smaller tile: separating the signs of `q8` would cost more than it saves, and most sums of a full tile
/// would stay empty.
pub(super) const SMALL_TILE: usize = PASS;

/// The sums of a tile, by token and row group, for even and for odd blocks.
type Sums<const G: usize, const TOKENS: usize> = [[[__m256; G]; TOKENS]; 2];

/// One block of a row group, as `VECTORS` vectors of four columns: eight of integers, unsigned but for those of `q8` without
/// AVX-VNNI; or eight of magnitudes, and eight that are all ones where the integer is negative.
#[derive(Clone, Copy)]
struct Block<const VECTORS: usize> {
    integers: [__m256i; VECTORS],
    /// Scales of its parts, and the factors of a pair of sums of columns that apply offset and bias.
    terms: [(__m256, __m256i); 2],
    /// With magnitudes: for each row, the sum of those of negative integers.
    negative_sum: __m256i,
}

impl<const VECTORS: usize> Block<VECTORS> {
    /// Whether it has magnitudes.
    const HAS_MAGNITUDES: bool = VECTORS == 16;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Self {
        let nothing = _mm256_setzero_si256();
        Block { integers: [nothing; VECTORS], terms: [(_mm256_setzero_ps(), nothing); 2], negative_sum: nothing }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile<const TY: u8, const G: usize, const V: bool, const VECTORS: usize, const TOKENS: usize>(
    w: &[Group<'_>; G],
    x: &Activations,
    shape: TileShape,
    out: &mut Tile,
) {
    let blocks = w[0].values.len() / const { block_bytes(TY) };
    let mut rows: [&[QuantisedBlock]; TOKENS] = [&[]; TOKENS];
    for (t, row) in rows[..shape.tokens].iter_mut().enumerate() {
        *row = &x.quantised_row(shape.token + t)[..blocks];
    }
    let rows = &rows[..shape.tokens];
    let mut sums: Sums<G, TOKENS> = [[[_mm256_setzero_ps(); G]; TOKENS]; 2];
    let mut block = [Block::<VECTORS>::new(); G];
    let ahead = Ahead::new::<G, AVX2_TOKENS>(w);
    // Because the compiler does not know the number of steps, it keeps the loop over them, and so the order described above.
    let steps = black_box(const { steps_of(TY) });
    for g in 0..blocks {
        ahead.block::<TY, G, AVX2_TOKENS>(g);
        for i in 0..G {
            unpack::<TY, V, VECTORS>(&mut block[i], &w[i], g);
        }
        let (full, rest) = rows.as_chunks::<PASS>();
        for (p, x) in full.iter().enumerate() {
            pass::<TY, G, PASS, V, VECTORS, TOKENS>(&block, x, g, steps, &mut sums, PASS * p);
        }
        let first = PASS * full.len();
        match *rest {
            [a, b, c] => pass::<TY, G, 3, V, VECTORS, TOKENS>(&block, &[a, b, c], g, steps, &mut sums, first),
            [a, b] => pass::<TY, G, 2, V, VECTORS, TOKENS>(&block, &[a, b], g, steps, &mut sums, first),
            [a] => pass::<TY, G, 1, V, VECTORS, TOKENS>(&block, &[a], g, steps, &mut sums, first),
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

/// Unpacks block `g`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const TY: u8, const V: bool, const VECTORS: usize>(block: &mut Block<VECTORS>, w: &Group<'_>, g: usize) {
    let (len, scale_len) = const { (block_bytes(TY), scale_bytes(TY)) };
    let values = &w.values[g * len..][..len];
    let scales = &w.scales[const { scales_from(TY) } + g * scale_len..][..scale_len];
    block.terms[0] = scale_and_bias::<TY, 0>(scales);
    if const { by_halves(TY) } {
        block.terms[1] = scale_and_bias::<TY, 1>(scales);
    }
    if Block::<VECTORS>::HAS_MAGNITUDES {
        return magnitudes(block, values);
    }
    let integers = &mut block.integers;
    if TY == Q8 {
        let flip = _mm256_set1_epi8(if V { -128 } else { 0 });
        for q in 0..8 {
            integers[q] = _mm256_xor_si256(load32(values, 32 * q), flip);
        }
        return;
    }
    let table = _mm256_broadcastsi128_si256(load16(&const { table(TY) }, 0));
    if const { has_codebook(TY) } {
        let nibbles = nibbles::<TY>(values);
        for v in 0..4 {
            integers[v] = level::<TY>(table, &nibbles, 0, v);
            integers[v + 4] = level::<TY>(table, &nibbles, 1, v);
        }
        return;
    }
    for v in 0..4 {
        let (low, high) = super::nibbles(load32(values, 32 * v));
        (integers[v], integers[v + 4]) =
            if TY == MXFP4 { (_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)) } else { (low, high) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitudes<const VECTORS: usize>(block: &mut Block<VECTORS>, values: &[u8]) {
    let mut pairs = _mm256_setzero_si256();
    for q in 0..8 {
        let w = load32(values, 32 * q);
        let (magnitude, sign) = (_mm256_abs_epi8(w), _mm256_cmpgt_epi8(_mm256_setzero_si256(), w));
        let negative = _mm256_and_si256(magnitude, sign);
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(negative, _mm256_set1_epi8(1)));
        (block.integers[q], block.integers[VECTORS - 8 + q]) = (magnitude, sign);
    }
    block.negative_sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
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
fn pass<const TY: u8, const G: usize, const T: usize, const V: bool, const VECTORS: usize, const TOKENS: usize>(
    w: &[Block<VECTORS>; G],
    x: &[&[QuantisedBlock]; T],
    g: usize,
    steps: usize,
    sums: &mut Sums<G, TOKENS>,
    first: usize,
) {
    let x: [&QuantisedBlock; T] = each!(&x[0][g]; T, t => &x[t][g]);
    if const { by_halves(TY) } {
        let [even, odd] = sums;
        part::<TY, G, T, 0, V, VECTORS>(w, &x, steps, even[first..].first_chunk_mut().expect(PASS_FITS));
        part::<TY, G, T, 1, V, VECTORS>(w, &x, steps, odd[first..].first_chunk_mut().expect(PASS_FITS));
    } else {
        part::<TY, G, T, 0, V, VECTORS>(w, &x, steps, sums[g % 2][first..].first_chunk_mut().expect(PASS_FITS));
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
fn part<const TY: u8, const G: usize, const T: usize, const P: usize, const V: bool, const VECTORS: usize>(
    w: &[Block<VECTORS>; G],
    x: &[&QuantisedBlock; T],
    steps: usize,
    sums: &mut [[__m256; G]; T],
) {
    let mut dots = [[_mm256_setzero_si256(); G]; T];
    for t in 0..T {
        dots[t] = each!(dots[t][0]; G, i => start::<TY, P, V, VECTORS>(&w[i], x[t]));
    }
    for step in 0..steps {
        // Shows that it is in bounds, without telling the compiler how many steps there are.
        let step = 2 * P + step % const { steps_of(TY) };
        for q in [2 * step, 2 * step + 1] {
            let vector = each!(_mm256_setzero_si256(); G, i => w[i].integers[q]);
            let signs = each!(_mm256_setzero_si256(); G, i => w[i].integers[VECTORS - 8 + q]);
            for t in 0..T {
                let x = _mm256_set1_epi32(x[t].words[q]);
                for i in 0..G {
                    dots[t][i] = add_products::<TY, V, VECTORS>(dots[t][i], vector[i], signs[i], x);
                }
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    for i in 0..G {
        for t in 0..T {
            let dot = if matches!(TY, INT4 | MXFP4) && !V { _mm256_madd_epi16(dots[t][i], ones) } else { dots[t][i] };
            let x_scale = _mm256_set1_ps(if const { has_codebook(TY) } { x[t].scale_times_unit } else { x[t].scale });
            let scale = _mm256_mul_ps(w[i].terms[P].0, x_scale);
            sums[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sums[t][i]);
        }
    }
}

/// What sums begin with. It cancels the biases that products will add, and adds offsets; for magnitudes, see `add_products`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn start<const TY: u8, const P: usize, const V: bool, const VECTORS: usize>(
    w: &Block<VECTORS>,
    x: &QuantisedBlock,
) -> __m256i {
    match TY {
        Q8 if Block::<VECTORS>::HAS_MAGNITUDES => w.negative_sum,
        Q8 if !V => _mm256_setzero_si256(),
        Q8 | INT4 | MXFP4 if V => _mm256_set1_epi32(-const { byte_bias(TY) } * x.sum),
        // Sums of 16 bits may wrap in between, but without their bias they end within 16·8·127 or 16·12·127.
        INT4 | MXFP4 => {
            _mm256_mullo_epi16(_mm256_set1_epi32(x.minus_pairs.0), _mm256_set1_epi16(const { byte_bias(TY) as i16 }))
        }
        _ => {
            let columns = if const { by_halves(TY) } { x.halves.0 } else { x.sum };
            _mm256_madd_epi16(w.terms[P].1, _mm256_set1_epi32(columns))
        }
    }
}

/// The number that makes the integers of a type without a codebook unsigned.
const fn byte_bias(ty: u8) -> i32 {
    if has_codebook(ty) { 0 } else { bias(ty) }
}

/// Adds the products of four columns to pairs of sums of 16 bits, or to sums of 32. Sums of two products stay within -2·128·128 and
/// 2·128·127, so nothing saturates. With AVX-VNNI, all sums have 32 bits and all integers are unsigned.
///
/// Without it, a magnitude of `q8` meets `x` where the integer is positive, and `-x - 1` where it is negative, which is `x` with all
/// bits flipped. Each product is then too small by the magnitude, whatever the token, so sums begin with those magnitudes.
/// `vpsignb` would give `x` the sign of the integer, but it runs where multiplications run: on Zen 4, a loop of these instructions
/// takes 1.0 cycles for a vector, and one with `vpsignb` 1.6. Taking the signs apart pays from a few tokens on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products<const TY: u8, const V: bool, const VECTORS: usize>(
    dots: __m256i,
    w: __m256i,
    signs: __m256i,
    x: __m256i,
) -> __m256i {
    if V {
        return vnni::add_products(dots, w, x);
    }
    if matches!(TY, INT4 | MXFP4) {
        return _mm256_add_epi16(dots, _mm256_maddubs_epi16(w, x));
    }
    let pairs = match TY {
        Q8 if Block::<VECTORS>::HAS_MAGNITUDES => _mm256_maddubs_epi16(w, _mm256_xor_si256(x, signs)),
        Q8 => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)),
        _ => _mm256_maddubs_epi16(w, x),
    };
    _mm256_add_epi32(dots, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
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
    codebook::scale_and_bias::<TY, P>(scales)
}

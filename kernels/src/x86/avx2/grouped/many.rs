//! Several tokens of int8 times one or two row groups, in the same way as `many` for the other types: a strip is unpacked once for
//! all tokens of a tile, then each vector meets four tokens, and each word of a token meets both row groups, before the next.

use super::super::put;
use super::decode::{self, Bytes, Terms, bias, is_signed, row_factors};
use super::signed;
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{TILE_TOKENS, Tile, TileShape};
use crate::matrix::{Group, Matrix, ROW_GROUP};
use crate::x86::ahead::Stream;
use crate::x86::grouped::{STRIP, has_bias, has_halves};
use sluice_weights::{Codes, Grouped};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Tokens that a vector of weights meets: with two row groups, as many as leave their sums in the 16 registers.
const PASS: usize = 4;

/// The sums of a tile, by token and row group, for even and for odd blocks.
type Sums<const G: usize> = [[[__m256; G]; TILE_TOKENS]; 2];

/// A strip of `G` row groups, ready to be multiplied.
struct Strip<const G: usize> {
    bytes: [[Bytes; STRIP]; G],
    terms: [Terms; G],
    with_bias: bool,
    /// Pairs of vectors of a half block. Because the compiler does not know the number, it keeps the loop over them, and so the
    /// order described above.
    steps: usize,
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile(ty: Grouped, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let one = [w.group(shape.group)];
    if shape.groups == 1 {
        return of_groups::<1>(ty, &one, x, shape, out);
    }
    of_groups::<2>(ty, &[one[0], w.group(shape.group + 1)], x, shape, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn of_groups<const G: usize>(ty: Grouped, w: &[Group<'_>; G], x: &Activations, shape: TileShape, out: &mut Tile) {
    match (is_signed(ty.codes()), has_halves(ty)) {
        (false, false) => multiply::<G, false, false>(ty, w, x, shape, out),
        (false, true) => multiply::<G, false, true>(ty, w, x, shape, out),
        (true, false) => multiply::<G, true, false>(ty, w, x, shape, out),
        (true, true) => multiply::<G, true, true>(ty, w, x, shape, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const G: usize, const SIGNED: bool, const HALVES: bool>(
    ty: Grouped,
    w: &[Group<'_>; G],
    x: &Activations,
    shape: TileShape,
    out: &mut Tile,
) {
    let blocks = w[0].values.len() / (ROW_GROUP * ty.codes().block_len());
    let mut rows: [&[QuantisedBlock]; TILE_TOKENS] = [&[]; TILE_TOKENS];
    for (t, row) in rows[..shape.tokens].iter_mut().enumerate() {
        *row = &x.quantised_row(shape.token + t)[..blocks];
    }
    let rows = &rows[..shape.tokens];
    let (full, rest) = rows.as_chunks::<PASS>();
    let mut sums: Sums<G> = [[[_mm256_setzero_ps(); G]; TILE_TOKENS]; 2];
    let mut ahead = Stream::new(w, blocks);
    let mut strip = Strip {
        terms: [Terms::new(ty); G],
        bytes: [[[_mm256_setzero_si256(); 8]; STRIP]; G],
        with_bias: has_bias(ty),
        steps: black_box(2),
    };
    for g in 0..blocks {
        if g % STRIP == 0 {
            ahead.strip(ty.codes());
            for i in 0..G {
                strip.terms[i].fill(ty, &[w[i]], g / STRIP);
                decode::strip(ty, &[w[i]], g / STRIP, &mut strip.bytes[i]);
            }
        }
        for (p, x) in full.iter().enumerate() {
            pass::<G, PASS, SIGNED, HALVES>(&strip, x, g, &mut sums, PASS * p);
        }
        let first = PASS * full.len();
        match *rest {
            [a, b, c] => pass::<G, 3, SIGNED, HALVES>(&strip, &[a, b, c], g, &mut sums, first),
            [a, b] => pass::<G, 2, SIGNED, HALVES>(&strip, &[a, b], g, &mut sums, first),
            [a] => pass::<G, 1, SIGNED, HALVES>(&strip, &[a], g, &mut sums, first),
            _ => {}
        }
    }
    for (t, out) in out[..shape.tokens].iter_mut().enumerate() {
        for i in 0..G {
            let sum = _mm256_add_ps(sums[0][t][i], sums[1][t][i]);
            put([_mm256_mul_ps(sum, row_factors(ty, &[w[i]]))], std::slice::from_mut(out), i);
        }
    }
}

/// Adds block `g` of `T` tokens, whose sums begin at `first`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pass<const G: usize, const T: usize, const SIGNED: bool, const HALVES: bool>(
    strip: &Strip<G>,
    x: &[&[QuantisedBlock]; T],
    g: usize,
    sums: &mut Sums<G>,
    first: usize,
) {
    let x: [&QuantisedBlock; T] = each!(&x[0][g]; T, t => &x[t][g]);
    let at = g % STRIP;
    let mut products = [[_mm256_setzero_ps(); G]; T];
    let mut dots = [[_mm256_setzero_si256(); G]; T];
    add_half::<G, T, SIGNED>(strip, at, 0, &x, &mut dots);
    if HALVES {
        let of = each!((0, 0); T, t => (x[t].halves.0, x[t].halves.first()));
        apply::<G, T, SIGNED, true>(strip, 2 * at, &dots, &of, &mut products);
        dots = [[_mm256_setzero_si256(); G]; T];
    }
    add_half::<G, T, SIGNED>(strip, at, 1, &x, &mut dots);
    if HALVES {
        let of = each!((0, 0); T, t => (x[t].halves.0, x[t].halves.second()));
        apply::<G, T, SIGNED, false>(strip, 2 * at + 1, &dots, &of, &mut products);
    } else {
        let of = each!((0, 0); T, t => (x[t].sum, x[t].sum));
        apply::<G, T, SIGNED, true>(strip, at, &dots, &of, &mut products);
    }
    let sums: &mut [[__m256; G]; T] =
        sums[g % 2][first..].first_chunk_mut().expect("a tile has sums for all its tokens");
    for t in 0..T {
        for i in 0..G {
            sums[t][i] = _mm256_fmadd_ps(products[t][i], _mm256_set1_ps(x[t].scale), sums[t][i]);
        }
    }
}

/// Adds the products of one half of block `at` of the strip.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_half<const G: usize, const T: usize, const SIGNED: bool>(
    strip: &Strip<G>,
    at: usize,
    half: usize,
    x: &[&QuantisedBlock; T],
    dots: &mut [[__m256i; G]; T],
) {
    for step in 0..strip.steps {
        // Shows that it is in bounds, without telling the compiler how many steps there are.
        let step = step % 2;
        for q in [4 * half + 2 * step, 4 * half + 2 * step + 1] {
            let vector = each!(_mm256_setzero_si256(); G, i => strip.bytes[i][at][q]);
            for t in 0..T {
                let x = _mm256_set1_epi32(x[t].words[q]);
                for i in 0..G {
                    let pairs = if SIGNED { signed(vector[i], x) } else { _mm256_maddubs_epi16(vector[i], x) };
                    dots[t][i] = _mm256_add_epi32(dots[t][i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            }
        }
    }
}

/// Applies the terms of block `b`, which is the first of its 32 columns or not. The activations give the factors of the numbers
/// beside `A`, and the sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn apply<const G: usize, const T: usize, const SIGNED: bool, const FIRST: bool>(
    strip: &Strip<G>,
    b: usize,
    dots: &[[__m256i; G]; T],
    of: &[(i32, i32); T],
    products: &mut [[__m256; G]; T],
) {
    for i in 0..G {
        let (a, rest) = (strip.terms[i].a[b], strip.terms[i].rest[b]);
        for t in 0..T {
            let (pair, sum) = of[t];
            let moved = match (strip.with_bias, SIGNED) {
                (false, _) => _mm256_madd_epi16(rest, _mm256_set1_epi32(pair)),
                // No term removes the difference that makes integers of eight bits signed.
                (true, true) => _mm256_set1_epi32(-bias(Codes::Uint(8)) * sum),
                (true, false) => _mm256_setzero_si256(),
            };
            let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[t][i], moved));
            let product = if FIRST { _mm256_mul_ps(dot, a) } else { _mm256_fmadd_ps(dot, a, products[t][i]) };
            products[t][i] = if strip.with_bias {
                _mm256_fmadd_ps(_mm256_set1_ps(sum as f32), _mm256_castsi256_ps(rest), product)
            } else {
                product
            };
        }
    }
}

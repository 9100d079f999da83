//! Several tokens of int8 times one or two row groups, as `many` of the other types does it: a strip is unpacked once for all
//! tokens of a tile, then each vector meets four tokens, and each word of a token both row groups, before the next.

use super::super::put;
use super::unpack::{self, Bytes, bias, is_signed};
use super::{fill, row_factors, signed};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{TILE_TOKENS, Tile, TileShape};
use crate::matrix::{Group, Matrix, ROW_GROUP};
use crate::x86::ahead::Ahead;
use crate::x86::grouped::{STRIP, Terms, bytes_per_block, has_bias, has_halves};
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
    terms: Terms,
    with_bias: bool,
    /// Pairs of vectors of a half block. A number that the compiler does not know keeps the loop over them, and with it the order
    /// that this is about.
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
    let (ahead, ask) = (Ahead::new(w), bytes_per_block(w, blocks));
    let mut strip = Strip {
        bytes: [[[_mm256_setzero_si256(); 8]; STRIP]; G],
        terms: Terms::new(),
        with_bias: has_bias(ty),
        steps: black_box(2),
    };
    for g in 0..blocks {
        if g % STRIP == 0 {
            for i in 0..G {
                fill(ty, &w[i], g / STRIP, unpack::bias(ty.codes()), &mut strip.terms, i);
                unpack::strip(ty, &w[i], g / STRIP, &mut strip.bytes[i]);
            }
        }
        ahead.bytes(ask, g);
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
            put([_mm256_mul_ps(sum, row_factors(ty, &w[i]))], std::slice::from_mut(out), i);
        }
    }
}

const PASS_FITS: &str = "a tile has sums for all its tokens";

/// Adds block `g` of `T` tokens, whose sums are those from `first`.
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
    if HALVES {
        for half in 0..2 {
            let mut dots = [[_mm256_setzero_si256(); G]; T];
            add_half::<G, T, SIGNED>(strip, at, half, &x, &mut dots);
            let sums = sums[half][first..].first_chunk_mut().expect(PASS_FITS);
            let sum = each!(0; T, t => if half == 0 { x[t].halves.first() } else { x[t].halves.second() });
            add::<G, T, SIGNED>(strip, 2 * at + half, &dots, &x, (&each!(0; T, t => x[t].halves.0), &sum), sums);
        }
    } else {
        let mut dots = [[_mm256_setzero_si256(); G]; T];
        add_half::<G, T, SIGNED>(strip, at, 0, &x, &mut dots);
        add_half::<G, T, SIGNED>(strip, at, 1, &x, &mut dots);
        let sum = each!(0; T, t => x[t].sum);
        add::<G, T, SIGNED>(
            strip,
            at,
            &dots,
            &x,
            (&sum, &sum),
            sums[g % 2][first..].first_chunk_mut().expect(PASS_FITS),
        );
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
        // Says that it is in bounds without telling the compiler how many steps there are.
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

/// Applies the terms of block `b`. Of the activations, `of` has what meets the numbers beside `A`, and the sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const G: usize, const T: usize, const SIGNED: bool>(
    strip: &Strip<G>,
    b: usize,
    dots: &[[__m256i; G]; T],
    x: &[&QuantisedBlock; T],
    of: (&[i32; T], &[i32; T]),
    sums: &mut [[__m256; G]; T],
) {
    for i in 0..G {
        let (a, rest) = (strip.terms.a[b][i], strip.terms.rest[b][i]);
        for t in 0..T {
            let scaled = _mm256_mul_ps(a, _mm256_set1_ps(x[t].scale));
            if strip.with_bias {
                // No term takes out what makes integers of eight bits signed.
                let moved = if SIGNED { bias(Codes::Uint(8)) * of.1[t] } else { 0 };
                let dot = _mm256_sub_epi32(dots[t][i], _mm256_set1_epi32(moved));
                let sum = _mm256_set1_ps(of.1[t] as f32 * x[t].scale);
                let s = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scaled, sums[t][i]);
                sums[t][i] = _mm256_fmadd_ps(sum, _mm256_castsi256_ps(rest), s);
            } else {
                let moved = _mm256_madd_epi16(rest, _mm256_set1_epi32(of.0[t]));
                let dot = _mm256_add_epi32(dots[t][i], moved);
                sums[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scaled, sums[t][i]);
            }
        }
    }
}

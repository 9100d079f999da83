//! Several tokens of int8 times one or two row groups, in the same way as `many` for the other types: a strip is unpacked once for
//! all tokens of a tile, then each vector meets four tokens, and each word of a token meets both row groups, before the next.
//!
//! Products of codes with few bits are added in 16 bits first: `FIT` says how many sums of two products fit there, one for each of so
//! many vectors. What each type has beside `A`, `REST`, is a constant as well, because every instruction counts here.

use super::super::put;
use super::decode::{self, Bytes, Terms, bias, row_factors};
use super::{signed, sums_that_fit};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{TILE_TOKENS, Tile, TileShape};
use crate::matrix::{Group, Matrix, ROW_GROUP};
use crate::x86::ahead::Stream;
use crate::x86::grouped::{IQ4NL, STRIP, constant, has_bias, has_halves};
use sluice_weights::{Codes, Grouped, Scales, Zero};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Tokens that a vector of weights meets: with two row groups, as many as leave their sums in the 16 registers.
const PASS: usize = 4;

/// Stands for the number of sums that fit in 16 bits if bytes are signed: then it is one.
const SIGNED: usize = 0;

/// The sums of a tile, by token and row group, for even and for odd blocks.
type Sums<const G: usize> = [[[__m256; G]; TILE_TOKENS]; 2];

/// A strip of `G` row groups, ready to be multiplied.
struct Strip<const G: usize> {
    bytes: [[Bytes; STRIP]; G],
    terms: [Terms; G],
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
    let fit = match constant(ty.codes()) {
        Some(8 | IQ4NL) => SIGNED,
        Some(codes) => sums_that_fit(codes),
        None => 1,
    };
    let rest = match ty.scales() {
        _ if has_bias(ty) => BIAS,
        Scales::Groups { zero: Zero::Byte, .. } => NUMBER,
        _ if ty.middle() + bias(ty.codes()) != 0 => NUMBER,
        _ => NOTHING,
    };
    match (fit, has_halves(ty), rest) {
        (SIGNED, false, NOTHING) => multiply::<G, SIGNED, false, NOTHING>(ty, w, x, shape, out),
        (SIGNED, false, NUMBER) => multiply::<G, SIGNED, false, NUMBER>(ty, w, x, shape, out),
        (SIGNED, false, _) => multiply::<G, SIGNED, false, BIAS>(ty, w, x, shape, out),
        (SIGNED, true, BIAS) => multiply::<G, SIGNED, true, BIAS>(ty, w, x, shape, out),
        (SIGNED, true, _) => multiply::<G, SIGNED, true, NUMBER>(ty, w, x, shape, out),
        (2, false, BIAS) => multiply::<G, 2, false, BIAS>(ty, w, x, shape, out),
        (2, false, _) => multiply::<G, 2, false, NUMBER>(ty, w, x, shape, out),
        (2, true, BIAS) => multiply::<G, 2, true, BIAS>(ty, w, x, shape, out),
        (2, true, _) => multiply::<G, 2, true, NUMBER>(ty, w, x, shape, out),
        (4, false, BIAS) => multiply::<G, 4, false, BIAS>(ty, w, x, shape, out),
        (4, false, _) => multiply::<G, 4, false, NUMBER>(ty, w, x, shape, out),
        (8, false, BIAS) => multiply::<G, 8, false, BIAS>(ty, w, x, shape, out),
        (8, false, _) => multiply::<G, 8, false, NUMBER>(ty, w, x, shape, out),
        // A half has four.
        (4 | 8, true, BIAS) => multiply::<G, 4, true, BIAS>(ty, w, x, shape, out),
        (4 | 8, true, _) => multiply::<G, 4, true, NUMBER>(ty, w, x, shape, out),
        // Grids have no bias.
        (_, false, _) => multiply::<G, 1, false, NUMBER>(ty, w, x, shape, out),
        (_, true, _) => multiply::<G, 1, true, NUMBER>(ty, w, x, shape, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const G: usize, const FIT: usize, const HALVES: bool, const REST: u8>(
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
    let mut strip =
        Strip { terms: [Terms::new(ty); G], bytes: [[[_mm256_setzero_si256(); 8]; STRIP]; G], steps: black_box(2) };
    for g in 0..blocks {
        if g % STRIP == 0 {
            ahead.strip(ty.codes());
            for i in 0..G {
                strip.terms[i].fill(ty, &[w[i]], g / STRIP);
                decode::strip(ty, &[w[i]], g / STRIP, &mut strip.bytes[i]);
            }
        }
        for (p, x) in full.iter().enumerate() {
            pass::<G, PASS, FIT, HALVES, REST>(&strip, x, g, &mut sums, PASS * p);
        }
        let first = PASS * full.len();
        match *rest {
            [a, b, c] => pass::<G, 3, FIT, HALVES, REST>(&strip, &[a, b, c], g, &mut sums, first),
            [a, b] => pass::<G, 2, FIT, HALVES, REST>(&strip, &[a, b], g, &mut sums, first),
            [a] => pass::<G, 1, FIT, HALVES, REST>(&strip, &[a], g, &mut sums, first),
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
fn pass<const G: usize, const T: usize, const FIT: usize, const HALVES: bool, const REST: u8>(
    strip: &Strip<G>,
    x: &[&[QuantisedBlock]; T],
    g: usize,
    sums: &mut Sums<G>,
    first: usize,
) {
    let x: [&QuantisedBlock; T] = each!(&x[0][g]; T, t => &x[t][g]);
    let at = g % STRIP;
    let mut products = [[_mm256_setzero_ps(); G]; T];
    if HALVES {
        let first_half = dots::<G, T, FIT, 0, 1>(strip, at, &x, start::<G, T, FIT, REST, FIRST>(strip, 2 * at, &x));
        apply::<G, T, REST, FIRST>(strip, 2 * at, &first_half, &x, &mut products);
        let start = start::<G, T, FIT, REST, SECOND>(strip, 2 * at + 1, &x);
        let second_half = dots::<G, T, FIT, 1, 2>(strip, at, &x, start);
        apply::<G, T, REST, SECOND>(strip, 2 * at + 1, &second_half, &x, &mut products);
    } else {
        let dots = dots::<G, T, FIT, 0, 2>(strip, at, &x, start::<G, T, FIT, REST, WHOLE>(strip, at, &x));
        apply::<G, T, REST, WHOLE>(strip, at, &dots, &x, &mut products);
    }
    let sums: &mut [[__m256; G]; T] =
        sums[g % 2][first..].first_chunk_mut().expect("a tile has sums for all its tokens");
    for t in 0..T {
        for i in 0..G {
            sums[t][i] = _mm256_fmadd_ps(products[t][i], _mm256_set1_ps(x[t].scale), sums[t][i]);
        }
    }
}

/// The dot products of the halves `FROM..TO` of block `at` of the strip, added to `start`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const G: usize, const T: usize, const FIT: usize, const FROM: usize, const TO: usize>(
    strip: &Strip<G>,
    at: usize,
    x: &[&QuantisedBlock; T],
    start: [[__m256i; G]; T],
) -> [[__m256i; G]; T] {
    let none = [[_mm256_setzero_si256(); G]; T];
    // What is added in 32 bits from the beginning needs no addition of its own for the start.
    let mut sums = if FIT < 4 { start } else { none };
    let mut dots = start;
    for half in FROM..TO {
        sums = self::half::<G, T, FIT>(strip, at, half, x, sums);
        if FIT >= 4 && (half + 1 == TO || FIT == 4) {
            for t in 0..T {
                for i in 0..G {
                    dots[t][i] = _mm256_add_epi32(dots[t][i], _mm256_madd_epi16(sums[t][i], _mm256_set1_epi16(1)));
                }
            }
            sums = none;
        }
    }
    if FIT < 4 { sums } else { dots }
}

/// Adds the products of one half of block `at` of the strip to `sums`, which have 16 bits if at least four fit, else 32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half<const G: usize, const T: usize, const FIT: usize>(
    strip: &Strip<G>,
    at: usize,
    half: usize,
    x: &[&QuantisedBlock; T],
    mut sums: [[__m256i; G]; T],
) -> [[__m256i; G]; T] {
    for step in 0..strip.steps {
        // Shows that it is in bounds, without telling the compiler how many steps there are.
        let q = 4 * half + 2 * (step % 2);
        if FIT == 2 {
            two_vectors(strip, at, q, x, &mut sums);
        } else {
            one_vector::<G, T, FIT>(strip, at, q, x, &mut sums);
            one_vector::<G, T, FIT>(strip, at, q + 1, x, &mut sums);
        }
    }
    sums
}

/// Adds the products of vector `q` of block `at` of the strip.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn one_vector<const G: usize, const T: usize, const FIT: usize>(
    strip: &Strip<G>,
    at: usize,
    q: usize,
    x: &[&QuantisedBlock; T],
    sums: &mut [[__m256i; G]; T],
) {
    let vector = each!(_mm256_setzero_si256(); G, i => strip.bytes[i][at][q]);
    for t in 0..T {
        let x = _mm256_set1_epi32(x[t].words[q]);
        for i in 0..G {
            let pairs = if FIT == SIGNED { signed(vector[i], x) } else { _mm256_maddubs_epi16(vector[i], x) };
            sums[t][i] = if FIT >= 4 {
                _mm256_add_epi16(sums[t][i], pairs)
            } else {
                _mm256_add_epi32(sums[t][i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
        }
    }
}

/// Adds the products of vectors `q` and `q + 1`, of which the sums fit in 16 bits together.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two_vectors<const G: usize, const T: usize>(
    strip: &Strip<G>,
    at: usize,
    q: usize,
    x: &[&QuantisedBlock; T],
    sums: &mut [[__m256i; G]; T],
) {
    let vectors = each!([_mm256_setzero_si256(); 2]; G, i => [strip.bytes[i][at][q], strip.bytes[i][at][q + 1]]);
    for t in 0..T {
        let x = [_mm256_set1_epi32(x[t].words[q]), _mm256_set1_epi32(x[t].words[q + 1])];
        for i in 0..G {
            let [first, second] =
                [_mm256_maddubs_epi16(vectors[i][0], x[0]), _mm256_maddubs_epi16(vectors[i][1], x[1])];
            let pairs = _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
            sums[t][i] = _mm256_add_epi32(sums[t][i], pairs);
        }
    }
}

// What a type has beside `A`: nothing that has to be applied, a number that is subtracted from all integers, or a bias.
const NOTHING: u8 = 0;
const NUMBER: u8 = 1;
const BIAS: u8 = 2;

// Which part of 32 columns a block of terms belongs to.
const WHOLE: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;

/// The sums of the activations of a part, or those of both halves in 16 bits each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums_of<const PART: u8>(x: &QuantisedBlock) -> __m256i {
    _mm256_set1_epi32(if PART == WHOLE { x.sum } else { x.halves.0 })
}

/// The sum of the activations of a part.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of<const PART: u8>(x: &QuantisedBlock) -> __m256i {
    let sums = sums_of::<PART>(x);
    match PART {
        WHOLE => sums,
        FIRST => _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(sums)),
        _ => _mm256_srai_epi32::<16>(sums),
    }
}

/// What the dot products of block `b` of terms lack: they are those of bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn start<const G: usize, const T: usize, const FIT: usize, const REST: u8, const PART: u8>(
    strip: &Strip<G>,
    b: usize,
    x: &[&QuantisedBlock; T],
) -> [[__m256i; G]; T] {
    let mut start = [[_mm256_setzero_si256(); G]; T];
    for t in 0..T {
        for i in 0..G {
            start[t][i] = match (REST, FIT) {
                (NUMBER, _) => _mm256_madd_epi16(strip.terms[i].rest[b], sums_of::<PART>(x[t])),
                // No term removes the difference that makes integers of eight bits signed.
                (BIAS, SIGNED) => _mm256_slli_epi32::<DIFFERENCE>(sum_of::<PART>(x[t])),
                _ => start[t][i],
            };
        }
    }
    start
}

/// Multiplies dot products by the terms of block `b`, and adds the result to that of the columns before.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn apply<const G: usize, const T: usize, const REST: u8, const PART: u8>(
    strip: &Strip<G>,
    b: usize,
    dots: &[[__m256i; G]; T],
    x: &[&QuantisedBlock; T],
    products: &mut [[__m256; G]; T],
) {
    for t in 0..T {
        let sum = _mm256_cvtepi32_ps(sum_of::<PART>(x[t]));
        for i in 0..G {
            let (a, rest) = (strip.terms[i].a[b], strip.terms[i].rest[b]);
            let dot = _mm256_cvtepi32_ps(dots[t][i]);
            let product = if PART == SECOND { _mm256_fmadd_ps(dot, a, products[t][i]) } else { _mm256_mul_ps(dot, a) };
            products[t][i] =
                if REST == BIAS { _mm256_fmadd_ps(sum, _mm256_castsi256_ps(rest), product) } else { product };
        }
    }
}

/// The power of two that is subtracted from integers of eight bits.
const DIFFERENCE: i32 = bias(Codes::Uint(8)).unsigned_abs().trailing_zeros() as i32;

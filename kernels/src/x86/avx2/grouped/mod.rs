//! Grouped types: products of one row group, or two with several tokens of int8. In the order of the `grouped` module.

mod decode;
mod floats;
mod grids;
mod many;

use super::put;
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::{Group, Matrix};
use crate::x86::ahead::Stream;
use crate::x86::grouped::{E2M1, IQ4NL, STRIP, block_len, constant, has_bias, has_halves};
use crate::x86::quantised_rows;
use decode::{Bytes, Terms, bias, row_factors};
pub(in crate::x86) use grids::blocks as grid_blocks;
use sluice_weights::{Codes, Grouped};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile(ty: Grouped, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    if shape.int8 && (shape.tokens > 1 || ty.codes().is_grid()) {
        return many::tile(ty, w, x, shape, out);
    }
    for g in 0..shape.groups {
        let group = w.group(shape.group + g);
        if shape.int8 {
            put([one_token(ty, &group, quantised_rows::<1>(x, shape.token)[0])], out, g);
        } else {
            floats::tile(ty, &group, x, shape, g, out);
        }
    }
}

/// One token of int8.
#[target_feature(enable = "avx2,fma,f16c")]
fn one_token(ty: Grouped, w: &Group<'_>, x: &[QuantisedBlock]) -> __m256 {
    let codes = constant(ty.codes()).expect("grids are unpacked first, and e4m3 has no integers");
    match (codes, has_halves(ty)) {
        (2, false) => blocks_int8::<2, false>(ty, w, x),
        (2, true) => blocks_int8::<2, true>(ty, w, x),
        (3, false) => blocks_int8::<3, false>(ty, w, x),
        (3, true) => blocks_int8::<3, true>(ty, w, x),
        (4, false) => blocks_int8::<4, false>(ty, w, x),
        (4, true) => blocks_int8::<4, true>(ty, w, x),
        (5, false) => blocks_int8::<5, false>(ty, w, x),
        (5, true) => blocks_int8::<5, true>(ty, w, x),
        (6, false) => blocks_int8::<6, false>(ty, w, x),
        (6, true) => blocks_int8::<6, true>(ty, w, x),
        (E2M1, false) => blocks_int8::<E2M1, false>(ty, w, x),
        (E2M1, true) => blocks_int8::<E2M1, true>(ty, w, x),
        (IQ4NL, false) => blocks_int8::<IQ4NL, false>(ty, w, x),
        (IQ4NL, true) => blocks_int8::<IQ4NL, true>(ty, w, x),
        (_, false) => blocks_int8::<8, false>(ty, w, x),
        (_, true) => blocks_int8::<8, true>(ty, w, x),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_int8<const C: u8, const HALVES: bool>(ty: Grouped, w: &Group<'_>, x: &[QuantisedBlock]) -> __m256 {
    let len = const { block_len(C) };
    let blocks = w.values.len() / len;
    let x = &x[..blocks];
    let with_bias = has_bias(ty);
    let mut ahead = Stream::new(&[*w], blocks);
    let mut terms = Terms::new(ty);
    // The sums of even and odd blocks; at the end, their order does not matter.
    let (mut s, mut other) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for first in (0..blocks).step_by(STRIP) {
        let n = (blocks - first).min(STRIP);
        ahead.scales();
        terms.fill(ty, &[*w], first / STRIP);
        let values = &w.values[first * len..][..n * len];
        for (g, x) in x[first..first + n].iter().enumerate() {
            ahead.values::<C, 1>();
            let mut dots = dots::<C>(&decode::block::<C>(&[&values[g * len..][..len]]), x);
            if const { C == 8 } && with_bias {
                dots = without_bias(dots, x);
            }
            let [low, high] = dots;
            let products = if HALVES {
                let low = products(low, &terms, 2 * g, with_bias, (x.halves.0, x.halves.first()), None);
                products(high, &terms, 2 * g + 1, with_bias, (x.halves.0, x.halves.second()), Some(low))
            } else {
                products(_mm256_add_epi32(low, high), &terms, g, with_bias, (x.sum, x.sum), None)
            };
            (s, other) = (other, _mm256_fmadd_ps(products, _mm256_set1_ps(x.scale), s));
        }
    }
    _mm256_mul_ps(_mm256_add_ps(s, other), row_factors(ty, &[*w]))
}

/// Adds a block to the products `before` of the same 32 columns. The activations give the factor of the number beside `A`, and the
/// sum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products(
    dot: __m256i,
    terms: &Terms,
    block: usize,
    with_bias: bool,
    (pair, sum): (i32, i32),
    before: Option<__m256>,
) -> __m256 {
    let (a, rest) = (terms.a[block], terms.rest[block]);
    let dot = if with_bias { dot } else { _mm256_add_epi32(dot, _mm256_madd_epi16(rest, _mm256_set1_epi32(pair))) };
    let dot = _mm256_cvtepi32_ps(dot);
    let products = match before {
        Some(before) => _mm256_fmadd_ps(dot, a, before),
        None => _mm256_mul_ps(dot, a),
    };
    if with_bias { _mm256_fmadd_ps(_mm256_set1_ps(sum as f32), _mm256_castsi256_ps(rest), products) } else { products }
}

/// Number of pair sums, of the eight of a block, that can be added in 16 bits: a pair is at most 2·127 times the largest byte.
const fn sums_that_fit(codes: u8) -> usize {
    match codes {
        2..=4 => 8,
        5 | E2M1 => 4,
        6 => 2,
        _ => 1,
    }
}

/// The dot products of the bytes of each half of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const C: u8>(bytes: &Bytes, x: &QuantisedBlock) -> [__m256i; 2] {
    let ones = _mm256_set1_epi16(1);
    let fit = const { if sums_that_fit(C) < 4 { sums_that_fit(C) } else { 4 } };
    let mut dots = [_mm256_setzero_si256(); 2];
    for half in 0..2 {
        for first in (0..4).step_by(fit) {
            let mut pairs = _mm256_setzero_si256();
            for q in 4 * half + first..4 * half + first + fit {
                let x = _mm256_set1_epi32(x.words[q]);
                let products =
                    if matches!(C, 8 | IQ4NL) { signed(bytes[q], x) } else { _mm256_maddubs_epi16(bytes[q], x) };
                pairs = _mm256_add_epi16(pairs, products);
            }
            dots[half] = _mm256_add_epi32(dots[half], _mm256_madd_epi16(pairs, ones));
        }
    }
    dots
}

/// Removes the difference that makes integers of eight bits signed, if no term does it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn without_bias(dots: [__m256i; 2], x: &QuantisedBlock) -> [__m256i; 2] {
    let sums = [x.halves.first(), x.halves.second()];
    each!(dots[0]; 2, half => _mm256_sub_epi32(dots[half], _mm256_set1_epi32(bias(Codes::Uint(8)) * sums[half])))
}

/// `|w| · (x with the sign of w)`: pair sums stay within 2·128·127 = 32512.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signed(w: __m256i, x: __m256i) -> __m256i {
    _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
}

/// Whether codes are numbers of eight bits that only floats can represent.
fn is_e4m3(ty: Grouped) -> bool {
    ty.codes() == Codes::E4m3
}

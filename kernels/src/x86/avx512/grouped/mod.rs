//! Grouped types: products of two row groups, in the order of the `grouped` module.

mod decode;
mod grids;

use super::{Pair, e4m3_columns, multiply, put};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{TILE_TOKENS, Tile, TileShape};
use crate::matrix::{BLOCK, ROW_GROUP};
use crate::x86::ahead::Stream;
use crate::x86::grouped::{E2M1, IQ4NL, STRIP, block_len, constant, has_bias, has_halves};
use crate::x86::{padded_rows, parts, quantised_rows};
use decode::{Bytes, Terms, row_factors};
use sluice_weights::{Codes, Grouped};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn tile(ty: Grouped, w: &Pair<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    if ty.codes() == Codes::E4m3 {
        let mut t = 0;
        while shape.tokens - t >= 4 {
            put(floats::<4>(ty, w, &padded_rows(x, shape.token + t)), &mut out[t..]);
            t += 4;
        }
        while t < shape.tokens {
            put(floats::<1>(ty, w, &padded_rows(x, shape.token + t)), &mut out[t..]);
            t += 1;
        }
        return;
    }
    if shape.tokens == 1 && !ty.codes().is_grid() {
        return put([one_token(ty, w, quantised_rows::<1>(x, shape.token)[0])], out);
    }
    match (has_halves(ty), has_bias(ty)) {
        (false, false) => tokens::<false, false>(ty, w, x, shape, out),
        (false, true) => tokens::<false, true>(ty, w, x, shape, out),
        (true, false) => tokens::<true, false>(ty, w, x, shape, out),
        (true, true) => tokens::<true, true>(ty, w, x, shape, out),
    }
}

/// One token of int8.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_token(ty: Grouped, w: &Pair<'_>, x: &[QuantisedBlock]) -> __m512 {
    let codes = constant(ty.codes()).expect("grids are unpacked first, and e4m3 has no integers");
    match codes {
        2 => one_by_code::<2>(ty, w, x),
        3 => one_by_code::<3>(ty, w, x),
        4 => one_by_code::<4>(ty, w, x),
        5 => one_by_code::<5>(ty, w, x),
        6 => one_by_code::<6>(ty, w, x),
        E2M1 => one_by_code::<E2M1>(ty, w, x),
        IQ4NL => one_by_code::<IQ4NL>(ty, w, x),
        _ => one_by_code::<8>(ty, w, x),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_by_code<const C: u8>(ty: Grouped, w: &Pair<'_>, x: &[QuantisedBlock]) -> __m512 {
    match (has_halves(ty), has_bias(ty)) {
        (false, false) => one::<C, false, false>(ty, w, x),
        (false, true) => one::<C, false, true>(ty, w, x),
        (true, false) => one::<C, true, false>(ty, w, x),
        (true, true) => one::<C, true, true>(ty, w, x),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one<const C: u8, const HALVES: bool, const BIAS: bool>(ty: Grouped, w: &Pair<'_>, x: &[QuantisedBlock]) -> __m512 {
    let len = const { block_len(C) };
    let blocks = w[0].values.len() / len;
    let x = &x[..blocks];
    let mut ahead = Stream::new(w, blocks);
    let mut terms = Terms::new(ty);
    // The sums of even and odd blocks; at the end, their order does not matter.
    let (mut s, mut other) = ([_mm512_setzero_ps()], [_mm512_setzero_ps()]);
    for first in (0..blocks).step_by(STRIP) {
        let n = (blocks - first).min(STRIP);
        ahead.scales();
        terms.fill(ty, w, first / STRIP);
        let [a, b] = [&w[0].values[first * len..][..n * len], &w[1].values[first * len..][..n * len]];
        for (g, x) in x[first..first + n].iter().enumerate() {
            ahead.values::<C, 2>();
            let bytes = decode::block::<C>(&[&a[g * len..][..len], &b[g * len..][..len]]);
            let next = block::<HALVES, BIAS, 1>(&bytes, &terms, g, &[x], &s);
            (s, other) = (other, next);
        }
    }
    _mm512_mul_ps(_mm512_add_ps(s[0], other[0]), row_factors(ty, w))
}

/// The sums of the tokens of a tile, for even and for odd blocks.
struct Sums {
    even: [__m512; TILE_TOKENS],
    odd: [__m512; TILE_TOKENS],
}

/// A strip, ready to be multiplied.
struct Strip {
    terms: Terms,
    bytes: [Bytes; STRIP],
    /// Number of its first block, and the number of blocks.
    first: usize,
    blocks: usize,
}

/// Several tokens of int8, or codes that are unpacked first.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tokens<const HALVES: bool, const BIAS: bool>(
    ty: Grouped,
    w: &Pair<'_>,
    x: &Activations,
    shape: TileShape,
    out: &mut Tile,
) {
    let blocks = w[0].values.len() / (ROW_GROUP * ty.codes().block_len());
    let mut ahead = Stream::new(w, blocks);
    let bytes = [[_mm512_setzero_si512(); 8]; STRIP];
    let mut strip = Strip { terms: Terms::new(ty), bytes, first: 0, blocks: 0 };
    let mut rows: [&[QuantisedBlock]; TILE_TOKENS] = [&[]; TILE_TOKENS];
    for (t, row) in rows[..shape.tokens].iter_mut().enumerate() {
        *row = &x.quantised_row(shape.token + t)[..blocks];
    }
    let rows = &rows[..shape.tokens];
    let mut sums = Sums { even: [_mm512_setzero_ps(); TILE_TOKENS], odd: [_mm512_setzero_ps(); TILE_TOKENS] };
    for first in (0..blocks).step_by(STRIP) {
        (strip.first, strip.blocks) = (first, (blocks - first).min(STRIP));
        strip.terms.fill(ty, w, first / STRIP);
        decode::strip(ty, w, first / STRIP, &mut strip.bytes);
        ahead.strip(ty.codes());
        let (eights, rest) = rows.as_chunks::<8>();
        for (i, x) in eights.iter().enumerate() {
            pass::<HALVES, BIAS, 8>(&strip, x, &mut sums, 8 * i);
        }
        let mut t = 8 * eights.len();
        let (fours, rest) = rest.as_chunks::<4>();
        for x in fours {
            pass::<HALVES, BIAS, 4>(&strip, x, &mut sums, t);
            t += 4;
        }
        let (twos, rest) = rest.as_chunks::<2>();
        for x in twos {
            pass::<HALVES, BIAS, 2>(&strip, x, &mut sums, t);
            t += 2;
        }
        for x in rest {
            pass::<HALVES, BIAS, 1>(&strip, &[x], &mut sums, t);
        }
    }
    let factors = row_factors(ty, w);
    for t in 0..shape.tokens {
        put([_mm512_mul_ps(_mm512_add_ps(sums.even[t], sums.odd[t]), factors)], &mut out[t..]);
    }
}

/// A strip meets the tokens whose sums begin at `token`.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn pass<const HALVES: bool, const BIAS: bool, const T: usize>(
    strip: &Strip,
    x: &[&[QuantisedBlock]; T],
    sums: &mut Sums,
    token: usize,
) {
    let n = strip.blocks;
    let x: [&[QuantisedBlock]; T] = each!(x[0]; T, t => &x[t][strip.first..strip.first + n]);
    let evens = sums.even[token..].first_chunk_mut::<T>().expect(PASS_FITS);
    let odds = sums.odd[token..].first_chunk_mut::<T>().expect(PASS_FITS);
    let (mut even, mut odd) = (*evens, *odds);
    for (g, bytes) in strip.bytes[..n].iter().enumerate() {
        let next = block::<HALVES, BIAS, T>(bytes, &strip.terms, g, &each!(&x[0][g]; T, t => &x[t][g]), &even);
        (even, odd) = (odd, next);
    }
    // Strips begin with even blocks.
    (*evens, *odds) = if n % 2 == 1 { (odd, even) } else { (even, odd) };
}

const PASS_FITS: &str = "a tile has sums for all its tokens";

/// Adds 32 columns, number `g` of the strip.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn block<const HALVES: bool, const BIAS: bool, const T: usize>(
    bytes: &Bytes,
    terms: &Terms,
    g: usize,
    x: &[&QuantisedBlock; T],
    s: &[__m512; T],
) -> [__m512; T] {
    let products = if HALVES {
        let low = part::<BIAS, T, 0, 4>(bytes, (terms.a[2 * g], terms.rest[2 * g]), x, None);
        part::<BIAS, T, 4, 8>(bytes, (terms.a[2 * g + 1], terms.rest[2 * g + 1]), x, Some(&low))
    } else {
        part::<BIAS, T, 0, 8>(bytes, (terms.a[g], terms.rest[g]), x, None)
    };
    each!(s[0]; T, t => _mm512_fmadd_ps(products[t], _mm512_set1_ps(x[t].scale), s[t]))
}

/// Adds the products of vectors `FROM..TO` of a block to the products `before`, if there are any.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn part<const BIAS: bool, const T: usize, const FROM: usize, const TO: usize>(
    bytes: &Bytes,
    (a, rest): (__m512, __m512i),
    x: &[&QuantisedBlock; T],
    before: Option<&[__m512; T]>,
) -> [__m512; T] {
    let mut dots = [_mm512_setzero_si512(); T];
    if !BIAS {
        for t in 0..T {
            let sums = if TO - FROM == 8 { x[t].sum } else { x[t].halves.0 };
            dots[t] = _mm512_madd_epi16(rest, _mm512_set1_epi32(sums));
        }
    }
    let words: [&[i32; 8]; T] = each!(&x[0].words; T, t => &x[t].words);
    // With one token, there is no other whose additions could alternate with its own.
    let mut others = [_mm512_setzero_si512(); T];
    for q in FROM..TO {
        multiply(if T == 1 && q % 2 == 1 { &mut others } else { &mut dots }, bytes[q], &words, q);
    }
    let mut products = [_mm512_setzero_ps(); T];
    for t in 0..T {
        let dot = if T == 1 { _mm512_add_epi32(dots[t], others[t]) } else { dots[t] };
        let dot = _mm512_cvtepi32_ps(dot);
        products[t] = match before {
            Some(before) => _mm512_fmadd_ps(dot, a, before[t]),
            None => _mm512_mul_ps(dot, a),
        };
        if BIAS {
            let sum = match (FROM, TO) {
                (0, 8) => _mm512_set1_epi32(x[t].sum),
                (0, _) => _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(_mm512_set1_epi32(x[t].halves.0))),
                _ => _mm512_srai_epi32::<16>(_mm512_set1_epi32(x[t].halves.0)),
            };
            products[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_castsi512_ps(rest), products[t]);
        }
    }
    products
}

/// e4m3 and f32 activations.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn floats<const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[f32]; T]) -> [__m512; T] {
    let total = if has_halves(ty) { e4m3::<{ BLOCK / 2 }, T>(ty, w, x) } else { e4m3::<BLOCK, T>(ty, w, x) };
    let factors = row_factors(ty, w);
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(total[t], factors))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3<const LEN: usize, const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[f32]; T]) -> [__m512; T] {
    let mut terms = Terms::new(ty);
    let mut total = [_mm512_setzero_ps(); T];
    let mut ahead = Stream::new(w, w[0].values.len() / (BLOCK * ROW_GROUP));
    let len = STRIP * BLOCK * ROW_GROUP;
    for (strip, (a, b)) in w[0].values.chunks(len).zip(w[1].values.chunks(len)).enumerate() {
        terms.fill(ty, w, strip);
        ahead.scales();
        let pairs = a.chunks_exact(LEN * ROW_GROUP).zip(b.chunks_exact(LEN * ROW_GROUP));
        for (i, (a, b)) in pairs.enumerate() {
            let x = parts(x, strip * STRIP * BLOCK + i * LEN, LEN);
            let sum = e4m3_columns::<T>(a, b, x, ahead.lines(2 * a.len()));
            for t in 0..T {
                total[t] = _mm512_fmadd_ps(sum[t], terms.a[i], total[t]);
            }
        }
    }
    total
}

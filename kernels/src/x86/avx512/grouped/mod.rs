//! Grouped types: products of two row groups. In the order of the `grouped` module.

mod decode;
mod grids;

use super::{FP8, Pair, columns, multiply, put};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{TILE_TOKENS, Tile, TileShape};
use crate::matrix::{BLOCK, ROW_GROUP};
use crate::x86::ahead::Ahead;
use crate::x86::grouped::{E2M1, IQ4NL, STRIP, block_len, bytes_per_block, constant, has_bias, has_halves};
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
    let (ahead, ask) = (Ahead::new(w), bytes_per_block(w, blocks));
    let mut terms = Terms::new(ty);
    // The sums of even and odd blocks; those of whole blocks take turns, and in the end their order does not matter.
    let (mut even, mut odd) = ([_mm512_setzero_ps()], [_mm512_setzero_ps()]);
    let strips = w[0].values.chunks(STRIP * len).zip(w[1].values.chunks(STRIP * len));
    for (strip, ((a, b), x)) in strips.zip(x[..blocks].chunks(STRIP)).enumerate() {
        terms.fill(ty, w, strip);
        let pairs = a.chunks_exact(len).zip(b.chunks_exact(len));
        for (g, ((a, b), x)) in pairs.zip(x).enumerate().take(STRIP) {
            ahead.bytes(ask, STRIP * strip + g);
            let bytes = decode::block::<C>(&[a, b]);
            if HALVES {
                even = half::<BIAS, 1, 0>(&bytes, &terms, 2 * g, &[x], even);
                odd = half::<BIAS, 1, 1>(&bytes, &terms, 2 * g + 1, &[x], odd);
            } else {
                (even, odd) = (odd, whole::<BIAS, 1>(&bytes, &terms, g, &[x], even));
            }
        }
    }
    _mm512_mul_ps(_mm512_add_ps(even[0], odd[0]), row_factors(ty, w))
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
    /// Number of its first block, and how many there are.
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
    let (ahead, ask) = (Ahead::new(w), bytes_per_block(w, blocks));
    let bytes = [[_mm512_setzero_si512(); 8]; STRIP];
    let mut strip = Strip { terms: Terms::new(ty), bytes, first: 0, blocks: 0 };
    let mut sums = Sums { even: [_mm512_setzero_ps(); TILE_TOKENS], odd: [_mm512_setzero_ps(); TILE_TOKENS] };
    for first in (0..blocks).step_by(STRIP) {
        (strip.first, strip.blocks) = (first, (blocks - first).min(STRIP));
        strip.terms.fill(ty, w, first / STRIP);
        decode::strip(ty, w, first / STRIP, &mut strip.bytes);
        ahead.bytes(STRIP * ask, first / STRIP);
        let (mut t, token) = (0, shape.token);
        while shape.tokens - t >= 8 {
            pass::<HALVES, BIAS, 8>(&strip, &quantised_rows(x, token + t), &mut sums, t);
            t += 8;
        }
        if shape.tokens - t >= 4 {
            pass::<HALVES, BIAS, 4>(&strip, &quantised_rows(x, token + t), &mut sums, t);
            t += 4;
        }
        if shape.tokens - t >= 2 {
            pass::<HALVES, BIAS, 2>(&strip, &quantised_rows(x, token + t), &mut sums, t);
            t += 2;
        }
        if t < shape.tokens {
            pass::<HALVES, BIAS, 1>(&strip, &quantised_rows(x, token + t), &mut sums, t);
        }
    }
    let factors = row_factors(ty, w);
    for t in 0..shape.tokens {
        put([_mm512_mul_ps(_mm512_add_ps(sums.even[t], sums.odd[t]), factors)], &mut out[t..]);
    }
}

/// A strip meets the tokens whose sums are those from `token`.
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
        let x = each!(&x[0][g]; T, t => &x[t][g]);
        if HALVES {
            even = half::<BIAS, T, 0>(bytes, &strip.terms, 2 * g, &x, even);
            odd = half::<BIAS, T, 1>(bytes, &strip.terms, 2 * g + 1, &x, odd);
        } else {
            (even, odd) = (odd, whole::<BIAS, T>(bytes, &strip.terms, g, &x, even));
        }
    }
    // Strips begin with even blocks.
    (*evens, *odds) = if !HALVES && n % 2 == 1 { (odd, even) } else { (even, odd) };
}

const PASS_FITS: &str = "a tile has sums for all its tokens";

/// Adds a block of 32 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn whole<const BIAS: bool, const T: usize>(
    bytes: &Bytes,
    terms: &Terms,
    block: usize,
    x: &[&QuantisedBlock; T],
    s: [__m512; T],
) -> [__m512; T] {
    let mut dots = [_mm512_setzero_si512(); T];
    if !BIAS {
        dots = each!(dots[0]; T, t => _mm512_madd_epi16(terms.rest[block], _mm512_set1_epi32(x[t].sum)));
    }
    let words: [&[i32; 8]; T] = each!(&x[0].words; T, t => &x[t].words);
    for q in 0..8 {
        multiply(&mut dots, bytes[q], &words, q);
    }
    let mut next = s;
    for t in 0..T {
        let x_scale = _mm512_set1_ps(x[t].scale);
        next[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_mul_ps(terms.a[block], x_scale), s[t]);
        if BIAS {
            let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(x[t].sum)), x_scale);
            next[t] = _mm512_fmadd_ps(sum, _mm512_castsi512_ps(terms.rest[block]), next[t]);
        }
    }
    next
}

/// Adds half `H` of 32 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn half<const BIAS: bool, const T: usize, const H: usize>(
    bytes: &Bytes,
    terms: &Terms,
    block: usize,
    x: &[&QuantisedBlock; T],
    s: [__m512; T],
) -> [__m512; T] {
    let mut dots = [_mm512_setzero_si512(); T];
    if !BIAS {
        dots = each!(dots[0]; T, t => _mm512_madd_epi16(terms.rest[block], _mm512_set1_epi32(x[t].halves.0)));
    }
    let words: [&[i32; 8]; T] = each!(&x[0].words; T, t => &x[t].words);
    for q in 4 * H..4 * H + 4 {
        multiply(&mut dots, bytes[q], &words, q);
    }
    let mut next = s;
    for t in 0..T {
        let x_scale = _mm512_set1_ps(x[t].scale);
        next[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_mul_ps(terms.a[block], x_scale), s[t]);
        if BIAS {
            let sums = _mm512_set1_epi32(x[t].halves.0);
            let sum = _mm512_srai_epi32::<16>(if H == 0 { _mm512_slli_epi32::<16>(sums) } else { sums });
            let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), x_scale);
            next[t] = _mm512_fmadd_ps(sum, _mm512_castsi512_ps(terms.rest[block]), next[t]);
        }
    }
    next
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
    let len = STRIP * BLOCK * ROW_GROUP;
    for (strip, (a, b)) in w[0].values.chunks(len).zip(w[1].values.chunks(len)).enumerate() {
        terms.fill(ty, w, strip);
        let pairs = a.chunks_exact(LEN * ROW_GROUP).zip(b.chunks_exact(LEN * ROW_GROUP));
        for (i, (a, b)) in pairs.enumerate() {
            let sum = columns::<FP8, T>(a, b, parts(x, strip * STRIP * BLOCK + i * LEN, LEN));
            for t in 0..T {
                total[t] = _mm512_fmadd_ps(sum[t], terms.a[i], total[t]);
            }
        }
    }
    total
}

//! Grouped types: products of two row groups. In the order of the `grouped` module.

mod grids;
mod unpack;

use super::{FP8, Pair, columns, multiply, put};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::{BLOCK, ROW_GROUP};
use crate::x86::ahead::Ahead;
use crate::x86::avx2::grouped::{fill, row_factors};
use crate::x86::grouped::{E2M1, IQ4NL, STRIP, Terms, block_len, bytes_per_block, constant, has_bias, has_halves};
use crate::x86::{padded_rows, parts, quantised_rows};
use sluice_weights::{Codes, Grouped};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn tile(ty: Grouped, w: &Pair<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let mut t = 0;
    if ty.codes() == Codes::E4m3 {
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
    if shape.tokens >= 8 {
        put(tokens::<8>(ty, w, &quantised_rows(x, shape.token)), out);
        t = 8;
    }
    if shape.tokens - t >= 4 {
        put(tokens::<4>(ty, w, &quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(tokens::<2>(ty, w, &quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 2;
    }
    if t < shape.tokens {
        put(tokens::<1>(ty, w, &quantised_rows(x, shape.token + t)), &mut out[t..]);
    }
}

/// Decodes the terms of a strip of both row groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fill_both(ty: Grouped, w: &Pair<'_>, strip: usize, terms: &mut Terms) {
    for (i, w) in w.iter().enumerate() {
        fill(ty, w, strip, unpack::bias(ty.codes()), terms, i);
    }
}

/// `A` of a block of both row groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scale(terms: &Terms, block: usize) -> __m512 {
    let [a, b] = terms.a[block];
    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b)
}

/// What is beside `A`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn rest(terms: &Terms, block: usize) -> __m512i {
    let [a, b] = terms.rest[block];
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn factors(ty: Grouped, w: &Pair<'_>) -> __m512 {
    let [a, b] = [row_factors(ty, &w[0]), row_factors(ty, &w[1])];
    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b)
}

/// One token of int8.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_token(ty: Grouped, w: &Pair<'_>, x: &[QuantisedBlock]) -> __m512 {
    let codes = constant(ty.codes()).expect("grids are unpacked first, and e4m3 has no integers");
    match (codes, has_halves(ty)) {
        (2, false) => one_by_code::<2, false>(ty, w, x),
        (2, true) => one_by_code::<2, true>(ty, w, x),
        (3, false) => one_by_code::<3, false>(ty, w, x),
        (3, true) => one_by_code::<3, true>(ty, w, x),
        (4, false) => one_by_code::<4, false>(ty, w, x),
        (4, true) => one_by_code::<4, true>(ty, w, x),
        (5, false) => one_by_code::<5, false>(ty, w, x),
        (5, true) => one_by_code::<5, true>(ty, w, x),
        (6, false) => one_by_code::<6, false>(ty, w, x),
        (6, true) => one_by_code::<6, true>(ty, w, x),
        (E2M1, false) => one_by_code::<E2M1, false>(ty, w, x),
        (E2M1, true) => one_by_code::<E2M1, true>(ty, w, x),
        (IQ4NL, false) => one_by_code::<IQ4NL, false>(ty, w, x),
        (IQ4NL, true) => one_by_code::<IQ4NL, true>(ty, w, x),
        (_, false) => one_by_code::<8, false>(ty, w, x),
        (_, true) => one_by_code::<8, true>(ty, w, x),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_by_code<const C: u8, const HALVES: bool>(ty: Grouped, w: &Pair<'_>, x: &[QuantisedBlock]) -> __m512 {
    let len = const { block_len(C) };
    let blocks = w[0].values.len() / len;
    let with_bias = has_bias(ty);
    let (ahead, ask) = (Ahead::new(w), bytes_per_block(w, blocks));
    let mut terms = Terms::new();
    let mut sums = Sums::new();
    let strips = w[0].values.chunks(STRIP * len).zip(w[1].values.chunks(STRIP * len));
    for (strip, ((a, b), x)) in strips.zip(x[..blocks].chunks(STRIP)).enumerate() {
        fill_both(ty, w, strip, &mut terms);
        let pairs = a.chunks_exact(len).zip(b.chunks_exact(len));
        for (g, ((a, b), x)) in pairs.zip(x).enumerate().take(STRIP) {
            ahead.bytes(ask, STRIP * strip + g);
            add_block::<HALVES, 1>(&unpack::block::<C>(a, b), &terms, g, with_bias, &[x], &mut sums);
        }
    }
    _mm512_mul_ps(_mm512_add_ps(sums.even[0], sums.odd[0]), factors(ty, w))
}

/// Several tokens of int8, or codes that are unpacked first.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tokens<const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[QuantisedBlock]; T]) -> [__m512; T] {
    let sums = if has_halves(ty) { blocks::<true, T>(ty, w, x) } else { blocks::<false, T>(ty, w, x) };
    let factors = factors(ty, w);
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(sums[t], factors))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocks<const HALVES: bool, const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[QuantisedBlock]; T]) -> [__m512; T] {
    let blocks = w[0].values.len() / (ROW_GROUP * ty.codes().block_len());
    let with_bias = has_bias(ty);
    let (ahead, ask) = (Ahead::new(w), bytes_per_block(w, blocks));
    let mut terms = Terms::new();
    let mut bytes = [[_mm512_setzero_si512(); 8]; STRIP];
    let mut sums = Sums::<T>::new();
    for first in (0..blocks).step_by(STRIP) {
        let n = (blocks - first).min(STRIP);
        fill_both(ty, w, first / STRIP, &mut terms);
        unpack::strip(ty, w, first / STRIP, &mut bytes);
        let x: [&[QuantisedBlock]; T] = each!(x[0]; T, t => &x[t][first..first + n]);
        for (g, bytes) in bytes.iter().enumerate().take(n) {
            ahead.bytes(ask, first + g);
            let x = each!(&x[0][g]; T, t => &x[t][g]);
            add_block::<HALVES, T>(bytes, &terms, g, with_bias, &x, &mut sums);
        }
    }
    each!(_mm512_setzero_ps(); T, t => _mm512_add_ps(sums.even[t], sums.odd[t]))
}

/// The sums of even and of odd blocks. Those of whole blocks take turns; in the end their order does not matter.
struct Sums<const T: usize> {
    even: [__m512; T],
    odd: [__m512; T],
}

impl<const T: usize> Sums<T> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        Sums { even: [_mm512_setzero_ps(); T], odd: [_mm512_setzero_ps(); T] }
    }
}

/// Adds block `g` of a strip.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_block<const HALVES: bool, const T: usize>(
    bytes: &[__m512i; 8],
    terms: &Terms,
    g: usize,
    with_bias: bool,
    x: &[&QuantisedBlock; T],
    sums: &mut Sums<T>,
) {
    let words: [&[i32; 8]; T] = each!(&x[0].words; T, t => &x[t].words);
    let x_scale = each!(0.0; T, t => x[t].scale);
    if HALVES {
        let pair = each!(0; T, t => x[t].halves.0);
        let (low, high) = (rest(terms, 2 * g), rest(terms, 2 * g + 1));
        let mut dots = start(low, with_bias, &pair);
        for q in 0..4 {
            multiply(&mut dots, bytes[q], &words, q);
        }
        let sum = each!(0; T, t => x[t].halves.first());
        sums.even = add((&dots, &sum, &x_scale), scale(terms, 2 * g), low, with_bias, &sums.even);
        let mut dots = start(high, with_bias, &pair);
        for q in 4..8 {
            multiply(&mut dots, bytes[q], &words, q);
        }
        let sum = each!(0; T, t => x[t].halves.second());
        sums.odd = add((&dots, &sum, &x_scale), scale(terms, 2 * g + 1), high, with_bias, &sums.odd);
    } else {
        let sum = each!(0; T, t => x[t].sum);
        let rest = rest(terms, g);
        let mut dots = start(rest, with_bias, &sum);
        for q in 0..8 {
            multiply(&mut dots, bytes[q], &words, q);
        }
        let next = add((&dots, &sum, &x_scale), scale(terms, g), rest, with_bias, &sums.even);
        (sums.even, sums.odd) = (sums.odd, next);
    }
}

/// What dot products begin with: what takes out zeros and what was added to the integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn start<const T: usize>(rest: __m512i, with_bias: bool, pairs: &[i32; T]) -> [__m512i; T] {
    if with_bias {
        return [_mm512_setzero_si512(); T];
    }
    each!(_mm512_setzero_si512(); T, t => _mm512_madd_epi16(rest, _mm512_set1_epi32(pairs[t])))
}

/// Adds a block: dot products, sums of the activations and their scales.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add<const T: usize>(
    block: (&[__m512i; T], &[i32; T], &[f32; T]),
    scale: __m512,
    rest: __m512i,
    with_bias: bool,
    s: &[__m512; T],
) -> [__m512; T] {
    let (dots, sums, x_scale) = block;
    let mut next = *s;
    for t in 0..T {
        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale[t]));
        next[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, s[t]);
    }
    if with_bias {
        for t in 0..T {
            let sum = _mm512_set1_ps(sums[t] as f32 * x_scale[t]);
            next[t] = _mm512_fmadd_ps(sum, _mm512_castsi512_ps(rest), next[t]);
        }
    }
    next
}

/// e4m3 and f32 activations.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn floats<const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[f32]; T]) -> [__m512; T] {
    let total = if has_halves(ty) { e4m3::<{ BLOCK / 2 }, T>(ty, w, x) } else { e4m3::<BLOCK, T>(ty, w, x) };
    let factors = factors(ty, w);
    each!(_mm512_setzero_ps(); T, t => _mm512_mul_ps(total[t], factors))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3<const LEN: usize, const T: usize>(ty: Grouped, w: &Pair<'_>, x: &[&[f32]; T]) -> [__m512; T] {
    let mut terms = Terms::new();
    let mut total = [_mm512_setzero_ps(); T];
    let len = STRIP * BLOCK * ROW_GROUP;
    for (strip, (a, b)) in w[0].values.chunks(len).zip(w[1].values.chunks(len)).enumerate() {
        fill_both(ty, w, strip, &mut terms);
        let pairs = a.chunks_exact(LEN * ROW_GROUP).zip(b.chunks_exact(LEN * ROW_GROUP));
        for (i, (a, b)) in pairs.enumerate() {
            let sum = columns::<FP8, T>(a, b, parts(x, strip * STRIP * BLOCK + i * LEN, LEN));
            let scale = scale(&terms, i);
            for t in 0..T {
                total[t] = _mm512_fmadd_ps(sum[t], scale, total[t]);
            }
        }
    }
    total
}

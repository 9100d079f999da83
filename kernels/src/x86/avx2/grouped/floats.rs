//! f32 activations: bytes or e4m3 codes become f32.

use super::super::{FP8, columns, fold4, put};
use super::decode::{self, Terms, bias, row_factors};
use super::is_e4m3;
use crate::activations::Activations;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{BLOCK, Group, ROW_GROUP};
use crate::x86::ahead::Stream;
use crate::x86::grouped::{STRIP, has_bias, has_halves};
use crate::x86::{padded_rows, parts};
use sluice_weights::Grouped;
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile(ty: Grouped, w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 2 {
        put(tokens::<2>(ty, w, padded_rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(tokens::<1>(ty, w, padded_rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<const T: usize>(ty: Grouped, w: &Group<'_>, x: [&[f32]; T]) -> [__m256; T] {
    let total = match (is_e4m3(ty), has_halves(ty)) {
        (true, false) => e4m3::<BLOCK, T>(ty, w, &x),
        (true, true) => e4m3::<{ BLOCK / 2 }, T>(ty, w, &x),
        (false, false) => integers::<false, T>(ty, w, &x),
        (false, true) => integers::<true, T>(ty, w, &x),
    };
    let factors = row_factors(ty, &[*w]);
    each!(_mm256_setzero_ps(); T, t => _mm256_mul_ps(total[t], factors))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3<const LEN: usize, const T: usize>(ty: Grouped, w: &Group<'_>, x: &[&[f32]; T]) -> [__m256; T] {
    let mut terms = Terms::new(ty);
    let mut total = [_mm256_setzero_ps(); T];
    let mut ahead = Stream::new(&[*w], w.values.len() / (BLOCK * ROW_GROUP));
    for (strip, values) in w.values.chunks(STRIP * BLOCK * ROW_GROUP).enumerate() {
        terms.fill(ty, &[*w], strip);
        ahead.strip(ty.codes());
        for (b, values) in values.chunks_exact(LEN * ROW_GROUP).enumerate() {
            let sum = columns::<FP8, T>(values, parts(x, strip * STRIP * BLOCK + b * LEN, LEN));
            for t in 0..T {
                total[t] = _mm256_fmadd_ps(sum[t], terms.a[b], total[t]);
            }
        }
    }
    total
}

#[target_feature(enable = "avx2,fma,f16c")]
fn integers<const HALVES: bool, const T: usize>(ty: Grouped, w: &Group<'_>, x: &[&[f32]; T]) -> [__m256; T] {
    let (with_bias, added) = (has_bias(ty), bias(ty.codes()));
    let mut terms = Terms::new(ty);
    let mut bytes = [[_mm256_setzero_si256(); 8]; STRIP];
    let mut total = [_mm256_setzero_ps(); T];
    let blocks = w.values.len() / (ROW_GROUP * ty.codes().block_len());
    for g in 0..blocks {
        let at = g % STRIP;
        if at == 0 {
            terms.fill(ty, &[*w], g / STRIP);
            decode::strip(ty, &[*w], g / STRIP, &mut bytes);
        }
        let x = parts(x, g * BLOCK, BLOCK);
        let mut s = [[_mm256_setzero_ps(); 4]; T];
        for half in 0..2 {
            let b = if HALVES { 2 * at + half } else { at };
            let moved = if with_bias { _mm256_set1_epi32(-added) } else { number::<HALVES>(terms.rest[b], half) };
            for q in 4 * half..4 * half + 4 {
                add_columns(&mut s, bytes[at][q], moved, &x, q);
            }
            if !HALVES && half == 0 {
                continue;
            }
            let columns = if HALVES { BLOCK / 2 * half..BLOCK / 2 * (half + 1) } else { 0..BLOCK };
            for t in 0..T {
                total[t] = _mm256_fmadd_ps(fold4(s[t]), terms.a[b], total[t]);
                if with_bias {
                    let sum = _mm256_set1_ps(sum(&x[t][columns.clone()]));
                    total[t] = _mm256_fmadd_ps(sum, _mm256_castsi256_ps(terms.rest[b]), total[t]);
                }
                s[t] = [_mm256_setzero_ps(); 4];
            }
        }
    }
    total
}

/// The number that is added to the integers of a block, taken from the pair that multiplies pairs of sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn number<const HALVES: bool>(pair: __m256i, half: usize) -> __m256i {
    if HALVES && half == 1 {
        _mm256_srai_epi32::<16>(pair)
    } else {
        _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pair))
    }
}

/// Adds four columns, with `moved` added to their integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_columns<const T: usize>(s: &mut [[__m256; 4]; T], bytes: __m256i, moved: __m256i, x: &[&[f32]; T], q: usize) {
    let columns = [
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(bytes)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(bytes)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(bytes)),
        _mm256_srai_epi32::<24>(bytes),
    ];
    for i in 0..4 {
        let column = _mm256_cvtepi32_ps(_mm256_add_epi32(columns[i], moved));
        for t in 0..T {
            s[t][i] = _mm256_fmadd_ps(column, _mm256_set1_ps(x[t][4 * q + i]), s[t][i]);
        }
    }
}

/// `xsum` of the specification.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut t = [0.0f32; 4];
    for x in x.as_chunks::<4>().0 {
        for i in 0..4 {
            t[i] += x[i];
        }
    }
    (t[0] + t[1]) + (t[2] + t[3])
}

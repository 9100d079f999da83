//! Blocked types with int8 activations: `sdot`, four columns of four rows at a time.

use super::blocked::{block_scales, factor, halves, has_offset, integers, offsets, scales_per_block, times_row_scales};
use super::{IntLanes, Lanes, load_words, put, zero};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::vector::{block_bytes, by_halves, quantised_rows};
use std::arch::aarch64::*;
use std::arch::asm;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn tile<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 4 {
        put(blocks::<TY, 4>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(blocks::<TY, 2>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(blocks::<TY, 1>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn blocks<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[QuantisedBlock]; T]) -> [Lanes; T] {
    let mut s = [[zero(); 2]; T];
    let n = w.values.len() / const { block_bytes(TY) };
    let x = first_blocks(&x, n);
    for (g, values) in (0..n).zip(w.values.chunks_exact(const { block_bytes(TY) })) {
        for part in 0..const { scales_per_block(TY) } {
            let dots = dots::<TY, T>(values, &x, g, part);
            add::<TY, T>(&mut s, &dots, w, &x, g, part);
        }
    }
    total::<TY, T>(&s, w)
}

/// The first `n` blocks of each row, which are all of them: slices of one length are checked once.
#[inline(always)]
fn first_blocks<'a, const T: usize>(x: &[&'a [QuantisedBlock]; T], n: usize) -> [&'a [QuantisedBlock]; T] {
    each!(x[0]; T, t => &x[t][..n])
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dots<const TY: u8, const T: usize>(
    values: &[u8],
    x: &[&[QuantisedBlock]; T],
    g: usize,
    part: usize,
) -> [IntLanes; T] {
    let mut dots = [[vdupq_n_s32(0); 2]; T];
    dot_columns::<TY, T, 0>(&mut dots, values, x, g, part);
    dot_columns::<TY, T, 1>(&mut dots, values, x, g, part);
    dot_columns::<TY, T, 2>(&mut dots, values, x, g, part);
    dot_columns::<TY, T, 3>(&mut dots, values, x, g, part);
    dots
}

/// Adds the products of the `V`-th four columns of each half.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_columns<const TY: u8, const T: usize, const V: usize>(
    dots: &mut [IntLanes; T],
    values: &[u8],
    x: &[&[QuantisedBlock]; T],
    g: usize,
    part: usize,
) {
    for half in halves::<TY>(part) {
        let w = integers::<TY>(values, half, V);
        for t in 0..T {
            let words = load_words(&x[t][g].words.as_chunks::<4>().0[half]);
            for h in 0..2 {
                dots[t][h] = sdot::<V>(dots[t][h], w[h], words);
            }
        }
    }
}

/// Adds to each of four rows the products of its four bytes with those of word `V`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sdot<const V: usize>(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function enables the feature that the instruction belongs to; it touches only the registers named.
    unsafe {
        asm!("sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sums = inlateout(vreg) sums, w = in(vreg) w, x = in(vreg) x, lane = const V,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Adds to the sums of two rows and two tokens the products of eight columns.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn smmla(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function enables the feature that the instruction belongs to; it touches only the registers named.
    unsafe {
        asm!("smmla {sums:v}.4s, {w:v}.16b, {x:v}.16b",
            sums = inlateout(vreg) sums, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Adds part `part` of block `g`, whose products of integers are `dots`, to the sum whose turn it is.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add<const TY: u8, const T: usize>(
    s: &mut [[Lanes; 2]; T],
    dots: &[IntLanes; T],
    w: &Group<'_>,
    x: &[&[QuantisedBlock]; T],
    g: usize,
    part: usize,
) {
    let b = g * const { scales_per_block(TY) } + part;
    let (scale, offset) = (block_scales::<TY>(w.scales, b), offsets::<TY>(w.scales, b));
    for t in 0..T {
        let sum = match (const { by_halves(TY) }, part) {
            (true, 0) => x[t][g].halves.first(),
            (true, _) => x[t][g].halves.second(),
            _ => x[t][g].sum,
        };
        let x_scale = x[t][g].scale * const { factor(TY) };
        for h in 0..2 {
            let dot = if const { has_offset(TY) } { vmlaq_n_s32(dots[t][h], offset[h], sum) } else { dots[t][h] };
            let scale = vmulq_n_f32(scale[h], x_scale);
            s[t][part][h] = vfmaq_f32(s[t][part][h], vcvtq_f32_s32(dot), scale);
        }
        if !const { by_halves(TY) } {
            // Even and odd blocks alternate; at the end, the order of their sums does not matter.
            s[t].swap(0, 1);
        }
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn total<const TY: u8, const T: usize>(s: &[[Lanes; 2]; T], w: &Group<'_>) -> [Lanes; T] {
    let mut total = [zero(); T];
    for t in 0..T {
        let sum = each!(total[t][0]; 2, h => vaddq_f32(s[t][0][h], s[t][1][h]));
        total[t] = times_row_scales::<TY>(sum, w.scales);
    }
    total
}

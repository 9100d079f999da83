//! Blocked types with int8 activations of several tokens: `smmla`, eight columns of two rows and two tokens at a time.

use super::blocked::{integers, scales_per_block};
use super::int8::{self, add, first_blocks, total};
use super::{INT4, IntLanes, Lanes, MXFP4, Q3, Q4, Q8, load_words, put, zero};
use crate::activations::{Activations, QuantisedRow};
use crate::matmul::{Tile, TileShape};
use crate::matrix::{Group, Matrix, WeightType};
use crate::vector::{block_bytes, quantised_rows};
use std::arch::aarch64::*;
use std::arch::asm;

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn tile(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    for g in 0..shape.groups {
        let group = w.group(shape.group + g);
        match w.ty() {
            WeightType::Q8 => group_tile::<Q8>(&group, x, shape, g, out),
            WeightType::Int4 => group_tile::<INT4>(&group, x, shape, g, out),
            WeightType::Mxfp4 => group_tile::<MXFP4>(&group, x, shape, g, out),
            WeightType::Q4 => group_tile::<Q4>(&group, x, shape, g, out),
            WeightType::Q3 => group_tile::<Q3>(&group, x, shape, g, out),
            _ => unreachable!("only blocked types meet int8 activations"),
        }
    }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn group_tile<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 4 {
        put(blocks::<TY, 4, 2>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(blocks::<TY, 2, 1>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(int8::blocks::<TY, 1>(w, quantised_rows(x, shape.token + t)), &mut out[t..], g);
    }
}

/// `T` tokens, which are `P` pairs.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn blocks<const TY: u8, const T: usize, const P: usize>(w: &Group<'_>, x: [QuantisedRow<'_>; T]) -> [Lanes; T] {
    let mut s = [[zero(); 2]; T];
    let n = w.values.len() / const { block_bytes(TY) };
    let x = first_blocks(&x, n);
    for (g, values) in (0..n).zip(w.values.chunks_exact(const { block_bytes(TY) })) {
        for part in 0..const { scales_per_block(TY) } {
            let dots = dots::<TY, T, P>(values, &x, g, part);
            add::<TY, T>(&mut s, &dots, w, &x, g, part);
        }
    }
    total::<TY, T>(&s, w)
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn dots<const TY: u8, const T: usize, const P: usize>(
    values: &[u8],
    x: &[QuantisedRow<'_>; T],
    g: usize,
    part: usize,
) -> [IntLanes; T] {
    // Two rows times two tokens each.
    let mut squares = [[vdupq_n_s32(0); 4]; P];
    if TY != Q3 || part == 0 {
        add_half::<TY, T, P, 0>(&mut squares, values, x, g);
    }
    if TY != Q3 || part == 1 {
        add_half::<TY, T, P, 1>(&mut squares, values, x, g);
    }
    let mut dots = [[vdupq_n_s32(0); 2]; T];
    for p in 0..P {
        for h in 0..2 {
            dots[2 * p][h] = vuzp1q_s32(squares[p][2 * h], squares[p][2 * h + 1]);
            dots[2 * p + 1][h] = vuzp2q_s32(squares[p][2 * h], squares[p][2 * h + 1]);
        }
    }
    dots
}

/// Adds the products of 16 columns.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn add_half<const TY: u8, const T: usize, const P: usize, const HALF: usize>(
    squares: &mut [[int32x4_t; 4]; P],
    values: &[u8],
    x: &[QuantisedRow<'_>; T],
    g: usize,
) {
    let words = each!([vdupq_n_s8(0); 2]; P, p => token_pair::<HALF>(&x[2 * p], &x[2 * p + 1], g));
    for eight in 0..2 {
        let left = integers::<TY>(values, HALF, 2 * eight);
        let right = integers::<TY>(values, HALF, 2 * eight + 1);
        let rows = [
            row_pair::<0>(left[0], right[0]),
            row_pair::<1>(left[0], right[0]),
            row_pair::<0>(left[1], right[1]),
            row_pair::<1>(left[1], right[1]),
        ];
        for p in 0..P {
            for r in 0..4 {
                squares[p][r] = smmla(squares[p][r], rows[r], words[p][eight]);
            }
        }
    }
}

/// Eight columns of two rows, from four and four columns of four rows: rows 0 and 1, or 2 and 3.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn row_pair<const SECOND: usize>(left: int8x16_t, right: int8x16_t) -> int8x16_t {
    let (left, right) = (vreinterpretq_s32_s8(left), vreinterpretq_s32_s8(right));
    vreinterpretq_s8_s32(if SECOND == 0 { vzip1q_s32(left, right) } else { vzip2q_s32(left, right) })
}

/// The first and the last eight columns of a half block of two tokens.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn token_pair<const HALF: usize>(a: &QuantisedRow<'_>, b: &QuantisedRow<'_>, g: usize) -> [int8x16_t; 2] {
    let a = vreinterpretq_s64_s8(load_words(&a.words[g].as_chunks::<4>().0[HALF]));
    let b = vreinterpretq_s64_s8(load_words(&b.words[g].as_chunks::<4>().0[HALF]));
    [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
}

/// Adds the products of two rows with two tokens, of eight columns each.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn smmla(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function enables the feature that the instruction belongs to; it touches only the registers named.
    unsafe {
        asm!("smmla {sums:v}.4s, {w:v}.16b, {x:v}.16b",
            sums = inlateout(vreg) sums, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

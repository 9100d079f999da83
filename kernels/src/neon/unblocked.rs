//! `f32`, `f16`, `bf16` and `fp8` with f32 activations.

use super::{BF16, F16, F32, FP8, Lanes, add_columns, fold4, load, load_bytes, put, widen_bf16, widen_f16, zero};
use crate::activations::Activations;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{FP8_BLOCK, Group, ROW_GROUP};
use crate::scalar::f32_at;
use crate::vector::{four_columns, in_fours, parts, rows};
use std::arch::aarch64::*;

// Two tokens at a time: their sums and the columns that they meet fill 26 of the 32 registers.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn tile<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 2 {
        put(tokens::<TY, 2>(w, rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(tokens::<TY, 1>(w, rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn tokens<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[f32]; T]) -> [Lanes; T] {
    if TY != FP8 {
        return columns::<TY, T>(w.values, x);
    }
    let mut total = [zero(); T];
    for (c, values) in w.values.chunks(FP8_BLOCK * ROW_GROUP).enumerate() {
        let (first, len) = (c * FP8_BLOCK, values.len() / ROW_GROUP);
        let sum = columns::<TY, T>(values, parts(&x, first, len));
        let scale = 256.0 * f32_at(w.scales, c);
        for t in 0..T {
            for h in 0..2 {
                total[t][h] = vfmaq_n_f32(total[t][h], sum[t][h], scale);
            }
        }
    }
    total
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn columns<const TY: u8, const T: usize>(values: &[u8], x: [&[f32]; T]) -> [Lanes; T] {
    let step = const { four_columns(TY) };
    let cols = x[0].len();
    let fours = in_fours(&x, cols);
    let mut s = [[zero(); 4]; T];
    for (i, w) in values.chunks_exact(step).take(cols / 4).enumerate() {
        let w = four::<TY>(w);
        for t in 0..T {
            add_columns(&mut s[t], &w, load(&fours[t][i]));
        }
    }
    let rest = cols % 4;
    if rest > 0 {
        let mut last = [0u8; 128];
        last[..rest * step / 4].copy_from_slice(&values[cols / 4 * step..][..rest * step / 4]);
        let w = four::<TY>(&last[..step]);
        // Constant indices keep the sums in registers; missing columns must not be added, not even as zero.
        for j in 0..3 {
            if j < rest {
                for t in 0..T {
                    for h in 0..2 {
                        s[t][j][h] = vfmaq_n_f32(s[t][j][h], w[j][h], x[t][cols - rest + j]);
                    }
                }
            }
        }
    }
    each!(zero(); T, t => fold4(&s[t]))
}

/// Four columns.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn four<const TY: u8>(w: &[u8]) -> [Lanes; 4] {
    match TY {
        F32 => {
            each!(zero(); 4, j => each!(vdupq_n_f32(0.0); 2, h => vreinterpretq_f32_u8(load_bytes(w, 32 * j + 16 * h))))
        }
        F16 => each!(zero(); 4, j => widen_f16(vreinterpretq_u16_u8(load_bytes(w, 16 * j)))),
        BF16 => each!(zero(); 4, j => widen_bf16(vreinterpretq_u16_u8(load_bytes(w, 16 * j)))),
        _ => {
            let codes = each!(vdupq_n_s8(0); 2, i => vreinterpretq_s8_u8(load_bytes(w, 16 * i)));
            [
                widen_f16(e4m3_to_f16(vget_low_s8(codes[0]))),
                widen_f16(e4m3_to_f16(vget_high_s8(codes[0]))),
                widen_f16(e4m3_to_f16(vget_low_s8(codes[1]))),
                widen_f16(e4m3_to_f16(vget_high_s8(codes[1]))),
            ]
        }
    }
}

/// The binary16 bits of 8 codes, each worth 1/256 of the code.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn e4m3_to_f16(codes: int8x8_t) -> uint16x8_t {
    // The sign is extended so that it lands in bit 15; the mask removes its copy in bit 14.
    let moved = vreinterpretq_u16_s16(vshll_n_s8::<7>(codes));
    let bits = vandq_u16(moved, vdupq_n_u16(0xbf80));
    let magnitude = vdupq_n_u16(0x3f80);
    // All ones is a NaN of binary16 too.
    let nan = vceqq_u16(vandq_u16(bits, magnitude), magnitude);
    vorrq_u16(bits, nan)
}

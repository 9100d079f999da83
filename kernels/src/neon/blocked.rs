//! The numbers that the bytes of blocked types represent, and their products with f32 activations.
//!
//! A weight is `scale · (integer + offset)`, and for `q4`, `q3` and `q2` also times the scale of its row. Integers are one byte
//! each; types that do not store them as such look them up in a table.

use super::{INT4, IntLanes, Lanes, MXFP4, Q2, Q3, Q4, Q8};
use super::{add_columns, byte_columns, fold4, load, load_bytes, load_eight_bytes, put, widen_bf16, widen_f16, zero};
use crate::activations::Activations;
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::quant::UNIT;
use crate::vector::{
    block_bytes, by_halves, codebook, e2m1_table, has_codebook, levels, offset_base, padded_rows, parts, unit,
};
use std::arch::aarch64::*;

/// Parts of 32 columns that have a scale of their own.
pub(super) const fn scales_per_block(ty: u8) -> usize {
    if by_halves(ty) { 2 } else { 1 }
}

/// Halves of 32 columns that belong to a part.
#[inline(always)]
pub(super) fn halves<const TY: u8>(part: usize) -> std::ops::Range<usize> {
    if const { by_halves(TY) } { part..part + 1 } else { 0..2 }
}

/// Whether integers have an offset.
pub(super) const fn has_offset(ty: u8) -> bool {
    ty == INT4 || has_codebook(ty)
}

/// The factor by which a sum of integers is multiplied before the scale.
pub(super) const fn factor(ty: u8) -> f32 {
    if has_codebook(ty) { UNIT } else { unit(ty) }
}

/// Integers of columns `16·half + 4v..16·half + 4v + 4` of a block, without their offset: rows 0..4 and 4..8.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn integers<const TY: u8>(values: &[u8], half: usize, v: usize) -> [int8x16_t; 2] {
    let table = match TY {
        MXFP4 => load_bytes(&const { e2m1_table(0) }, 0),
        Q4 => load_bytes(&const { levels(Q4, 0) }, 0),
        Q2 => load_bytes(&const { levels(Q2, 0) }, 0),
        _ => load_bytes(&const { levels(Q3, 0) }, 0),
    };
    let mut integers = [vdupq_n_s8(0); 2];
    for h in 0..2 {
        let number = match TY {
            Q8 => load_bytes(values, 128 * half + 32 * v + 16 * h),
            Q3 if v == 3 => fourth(values, 16 * h),
            Q2 => turned(load_bytes(values, 32 * half + 16 * h), v),
            _ => load_bytes(values, 32 * v + 16 * h),
        };
        let nibble = if half == 0 || TY == Q2 { vandq_u8(number, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(number) };
        integers[h] = vreinterpretq_s8_u8(match TY {
            Q8 => number,
            INT4 => nibble,
            _ => vqtbl1q_u8(table, nibble),
        });
    }
    integers
}

/// The fourth vector of the nibbles of `q3`, from the top bits of the others. The top bits in the others do no harm, because levels
/// occur twice.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn fourth(values: &[u8], at: usize) -> uint8x16_t {
    let top = vdupq_n_u8(0x88);
    let [a, b, c] = each!(top; 3, v => vandq_u8(load_bytes(values, 32 * v + at), top));
    vorrq_u8(vorrq_u8(vshrq_n_u8::<3>(a), vshrq_n_u8::<2>(b)), vshrq_n_u8::<1>(c))
}

/// Words of `q2`, rotated right by `2v` bits.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn turned(words: uint8x16_t, v: usize) -> uint8x16_t {
    let words = vreinterpretq_u32_u8(words);
    vreinterpretq_u8_u32(match v {
        0 => words,
        1 => vshrq_n_u32::<2>(words),
        2 => vshrq_n_u32::<4>(words),
        _ => vsliq_n_u32::<26>(vshrq_n_u32::<6>(words), words),
    })
}

/// The scales with number `b`; those of `q4`, `q3` and `q2` over `UNIT`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn block_scales<const TY: u8>(scales: &[u8], b: usize) -> Lanes {
    match TY {
        Q8 => widen_f16(vreinterpretq_u16_u8(load_bytes(scales, 16 * b))),
        INT4 => widen_bf16(vreinterpretq_u16_u8(load_bytes(scales, 16 * b))),
        MXFP4 => {
            let codes = vmovl_u8(load_eight_bytes(scales, 8 * b));
            [power_of_two(vmovl_u16(vget_low_u16(codes))), power_of_two(vmovl_high_u16(codes))]
        }
        _ => {
            let codes = load_eight_bytes(scales, 32 + 8 * b);
            widen_f16(vshll_n_u8::<7>(vand_u8(codes, vdup_n_u8(31))))
        }
    }
}

/// e8m0 scales.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn power_of_two(e: uint32x4_t) -> float32x4_t {
    // Codes 0 and 255 are a subnormal and NaN: the exponent alone would say 0 and infinity.
    let odd = vorrq_u32(vceqzq_u32(e), vceqq_u32(e, vdupq_n_u32(255)));
    let fraction = vandq_u32(odd, vdupq_n_u32(0x0040_0000));
    vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32::<23>(e), fraction))
}

/// The offsets that belong to the scales with number `b`, for types that have offsets.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn offsets<const TY: u8>(scales: &[u8], b: usize) -> IntLanes {
    let (step, base) = match TY {
        Q4 => const { (codebook(Q4).step as i8, offset_base(Q4) as i8) },
        Q3 => const { (codebook(Q3).step as i8, offset_base(Q3) as i8) },
        Q2 => const { (codebook(Q2).step as i8, offset_base(Q2) as i8) },
        _ => return [vdupq_n_s32(-8); 2],
    };
    let steps = vreinterpret_s8_u8(vshr_n_u8::<5>(load_eight_bytes(scales, 32 + 8 * b)));
    let offsets = vmovl_s8(vsub_s8(vmul_s8(steps, vdup_n_s8(step)), vdup_n_s8(base)));
    [vmovl_s16(vget_low_s16(offsets)), vmovl_high_s16(offsets)]
}

/// Multiplies by the scales of the rows, for types that have them.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn times_row_scales<const TY: u8>(total: Lanes, scales: &[u8]) -> Lanes {
    if !const { has_codebook(TY) } {
        return total;
    }
    each!(total[0]; 2, h => vmulq_f32(total[h], vreinterpretq_f32_u8(load_bytes(scales, 16 * h))))
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn tile<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 2 {
        put(blocks::<TY, 2>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(blocks::<TY, 1>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn blocks<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[f32]; T]) -> [Lanes; T] {
    let mut total = [zero(); T];
    for (g, values) in w.values.chunks_exact(const { block_bytes(TY) }).enumerate() {
        let x = parts(&x, g * 32, 32);
        for part in 0..const { scales_per_block(TY) } {
            let b = g * const { scales_per_block(TY) } + part;
            let offset = offsets::<TY>(w.scales, b);
            let mut s = [[zero(); 4]; T];
            for half in halves::<TY>(part) {
                for v in 0..4 {
                    let offset = if const { has_offset(TY) } { Some(offset) } else { None };
                    let columns = byte_columns(integers::<TY>(values, half, v), offset);
                    for t in 0..T {
                        let four = x[t][16 * half + 4 * v..].first_chunk().expect("rows are padded");
                        add_columns(&mut s[t], &columns, load(four));
                    }
                }
            }
            let scale = block_scales::<TY>(w.scales, b);
            for t in 0..T {
                let sum = fold4(&s[t]);
                for h in 0..2 {
                    let sum = vmulq_n_f32(sum[h], const { factor(TY) });
                    total[t][h] = vfmaq_f32(total[t][h], sum, scale[h]);
                }
            }
        }
    }
    each!(zero(); T, t => times_row_scales::<TY>(total[t], w.scales))
}

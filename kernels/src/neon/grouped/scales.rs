//! Scales, offsets and biases of 256 columns, decoded into one form, in the order of `grouped::scales`.

use super::super::blocked::power_of_two;
use super::super::unblocked::e4m3_to_f16;
use super::super::{IntLanes, Lanes, load_bytes, load_eight_bytes, widen_bf16, widen_f16, zero};
use crate::grouped::unit;
use crate::matrix::Group;
use sluice_weights::{Codes, GroupSize, Grouped, ROW_GROUP, SUPER_BLOCK, ScaleType, Scales, Super, Zero};
use std::arch::aarch64::*;

/// Blocks of 16 columns of a super-block: the most that are decoded together.
const MOST: usize = SUPER_BLOCK / 16;

/// The factors and summands of the rows, for up to [`MOST`] blocks: `a·(integer + offset) + bias`.
pub(super) struct BlockScales {
    a: [Lanes; MOST],
    offset: [IntLanes; MOST],
    bias: [Lanes; MOST],
    has_bias: bool,
}

impl BlockScales {
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn new() -> Self {
        let offset = [[vdupq_n_s32(0); 2]; MOST];
        BlockScales { a: [zero(); MOST], offset, bias: [zero(); MOST], has_bias: false }
    }

    /// Scales, offsets, and biases if the type has them, of the `i`-th block.
    #[inline(always)]
    pub(super) fn of(&self, i: usize) -> (Lanes, IntLanes, Option<Lanes>) {
        (self.a[i], self.offset[i], self.has_bias.then_some(self.bias[i]))
    }

    /// Decodes those of the `n` blocks whose columns begin at `first`.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn decode(&mut self, ty: Grouped, w: &Group<'_>, first: usize, n: usize) {
        // 128 has been subtracted from integers of 8 bits.
        let offset = if ty.codes() == Codes::Uint(8) { 128 - ty.middle() } else { -ty.middle() };
        self.offset[..n].fill([vdupq_n_s32(offset); 2]);
        for i in 0..n {
            let column = first + i * ty.block();
            match ty.scales() {
                Scales::Groups { columns, scale, zero } => {
                    let group = match columns {
                        GroupSize::Columns(columns) => column / usize::from(columns),
                        GroupSize::Row => 0,
                    };
                    self.group(i, w.scales, group, scale, zero);
                }
                Scales::Super(scales) => self.super_block(i, ty.codes(), scales, w, column),
            }
        }
        let unit = unit(ty);
        if unit != 1.0 {
            for a in &mut self.a[..n] {
                *a = each!(a[0]; 2, h => vmulq_n_f32(a[h], unit));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn group(&mut self, i: usize, plane: &[u8], group: usize, scale: ScaleType, zero: Zero) {
        let factors = if scale == ScaleType::E4m3 { 4 * ROW_GROUP } else { 0 };
        let beside = match zero {
            Zero::None => 0,
            Zero::Byte => 1,
            Zero::Bias | Zero::Float => scale.len(),
        };
        let at = factors + group * ROW_GROUP * (scale.len() + beside);
        let a = numbers(plane, at, scale);
        let beside = at + ROW_GROUP * scale.len();
        self.a[i] = a;
        self.has_bias = matches!(zero, Zero::Bias | Zero::Float);
        match zero {
            Zero::None => {}
            Zero::Byte => {
                let z = widen(load_eight_bytes(plane, beside));
                self.offset[i] = each!(z[0]; 2, h => vsubq_s32(self.offset[i][h], z[h]));
            }
            Zero::Bias => self.bias[i] = numbers(plane, beside, scale),
            Zero::Float => {
                let z = numbers(plane, beside, scale);
                self.bias[i] = each!(a[0]; 2, h => vnegq_f32(vmulq_f32(a[h], z[h])));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn super_block(&mut self, i: usize, codes: Codes, scales: Super, w: &Group<'_>, first: usize) {
        let plane = &w.scales[first / SUPER_BLOCK * ROW_GROUP * scales.row_len()..];
        let d = numbers(plane, 0, ScaleType::F16);
        let units = if scales.has_min() { 4 * ROW_GROUP } else { 2 * ROW_GROUP };
        let column = first % SUPER_BLOCK;
        let integer = match scales.unit() {
            0 if scales == Super::Plain => [vdupq_n_s32(1); 2],
            0 => odd(in_records(codes, w.values, first / 32)),
            unit => {
                let at = units + column / unit * scales.unit_len() * ROW_GROUP;
                of_bytes(scales, load_eight_bytes(plane, at), column)
            }
        };
        self.a[i] = each!(d[0]; 2, h => vmulq_f32(d[h], vcvtq_f32_s32(integer[h])));
        self.has_bias = scales.has_min();
        if scales.has_min() {
            let m = match scales {
                Super::FourMin => vshr_n_u8::<4>(load_eight_bytes(plane, units + column / 16 * ROW_GROUP)),
                _ => load_eight_bytes(plane, units + (column / 32 * 2 + 1) * ROW_GROUP),
            };
            let (dmin, m) = (numbers(plane, 2 * ROW_GROUP, ScaleType::F16), widen(m));
            self.bias[i] = each!(d[0]; 2, h => vnegq_f32(vmulq_f32(dmin[h], vcvtq_f32_s32(m[h]))));
        }
    }
}

/// Eight numbers of a scale type.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn numbers(plane: &[u8], at: usize, ty: ScaleType) -> Lanes {
    match ty {
        ScaleType::F32 => each!(zero()[0]; 2, h => vreinterpretq_f32_u8(load_bytes(plane, at + 16 * h))),
        ScaleType::F16 => widen_f16(vreinterpretq_u16_u8(load_bytes(plane, at))),
        ScaleType::Bf16 => widen_bf16(vreinterpretq_u16_u8(load_bytes(plane, at))),
        ScaleType::E4m3 => {
            let over_256 = widen_f16(e4m3_to_f16(vreinterpret_s8_u8(load_eight_bytes(plane, at))));
            each!(over_256[0]; 2, h => vmulq_n_f32(over_256[h], 256.0))
        }
        ScaleType::E8m0 => {
            let codes = vmovl_u8(load_eight_bytes(plane, at));
            [power_of_two(vmovl_u16(vget_low_u16(codes))), power_of_two(vmovl_high_u16(codes))]
        }
    }
}

/// The factors of `d` in the bytes of a unit.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn of_bytes(scales: Super, bytes: uint8x8_t, column: usize) -> IntLanes {
    let shifted = |by: usize, mask: u8| vand_u8(vshl_u8(bytes, vdup_n_s8(-(by as i8))), vdup_n_u8(mask));
    match scales {
        Super::FourMin => widen(shifted(0, 15)),
        Super::SixBy16 | Super::SixBy32 => {
            let s = widen(bytes);
            each!(s[0]; 2, h => vsubq_s32(s[h], vdupq_n_s32(32)))
        }
        Super::Signed => {
            let s = vmovl_s8(vreinterpret_s8_u8(bytes));
            [vmovl_s16(vget_low_s16(s)), vmovl_high_s16(s)]
        }
        Super::Odd => odd(widen(shifted(column % 64 / 32 * 4, 15))),
        Super::Half => odd(widen(shifted(column % 32 / 16 * 4, 15))),
        Super::ShiftBy16 => odd(widen(shifted(column % 32 / 16 * 3, 7))),
        _ => widen(bytes),
    }
}

/// `2s + 1`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn odd(s: IntLanes) -> IntLanes {
    each!(s[0]; 2, h => vaddq_s32(vaddq_s32(s[h], s[h]), vdupq_n_s32(1)))
}

/// The scales in the records of block `b`: bits 12..15 of the last field of IQ1_S, else 28..32.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn in_records(codes: Codes, values: &[u8], b: usize) -> IntLanes {
    let records = &values[b * ROW_GROUP * codes.block_len()..][..ROW_GROUP * codes.block_len()];
    if codes == Codes::Iq1s {
        let words = vandq_u16(vshrq_n_u16::<12>(vreinterpretq_u16_u8(load_bytes(records, 32))), vdupq_n_u16(7));
        return [vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words))), vreinterpretq_s32_u32(vmovl_high_u16(words))];
    }
    let at = records.len() - 4 * ROW_GROUP;
    each!(vdupq_n_s32(0); 2, h => {
        vreinterpretq_s32_u32(vshrq_n_u32::<28>(vreinterpretq_u32_u8(load_bytes(records, at + 16 * h))))
    })
}

/// Eight bytes as integers.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn widen(bytes: uint8x8_t) -> IntLanes {
    let wide = vmovl_u8(bytes);
    [vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))), vreinterpretq_s32_u32(vmovl_high_u16(wide))]
}

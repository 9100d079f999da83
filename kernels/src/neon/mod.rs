//! Kernels for aarch64: NEON with `sdot`, and with `smmla` for several tokens of int8 where the CPU has i8mm.
//!
//! A row group is two vectors of four rows. Each function follows the operation of the same name in the `scalar` module;
//! lanes are rows, so each sum is formed in the same order.
//!
//! Instructions whose intrinsics are not in the oldest compiler that the crate supports are written as `asm!`, one each,
//! without memory, stack or flags, so that the compiler may move them like intrinsics.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

mod blocked;
mod chains;
mod grouped;
mod i8mm;
mod int8;
mod panels;
mod unblocked;
mod update;
mod vectors;

use crate::activations::Activations;
use crate::attention::{KeyBlock, QueryTile};
use crate::chains::Rows;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{Matrix, ROW_GROUP, WeightType};
use crate::update::{Stripes, TALL, UpdateTile, WIDE};
use crate::vector::*;
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

/// Proof that this CPU has NEON and the dot product of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon {
    i8mm: bool,
}

impl Neon {
    pub(crate) fn new() -> Option<Self> {
        let has = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
        // Planes are little-endian, and are loaded as they are.
        (cfg!(target_endian = "little") && has).then_some(Neon { i8mm: false })
    }

    /// With the products of matrices of bytes.
    pub(crate) fn with_i8mm() -> Option<Self> {
        Self::new().filter(|_| is_aarch64_feature_detected!("i8mm")).map(|_| Neon { i8mm: true })
    }

    /// `neon`, or with i8mm `i8mm`.
    pub(crate) fn name(self) -> &'static str {
        if self.i8mm { "i8mm" } else { "neon" }
    }

    /// Tokens of a tile.
    pub(crate) fn tile_tokens(self) -> usize {
        if self.i8mm { i8mm::TOKENS } else { 8 }
    }

    pub(crate) fn tile(self, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
        if self.i8mm && shape.int8 && shape.tokens > 1 {
            // SAFETY: the token proves the features that the function enables, i8mm because it says so.
            return unsafe { i8mm::tile(w, x, shape, out) };
        }
        // SAFETY: the token proves the features that the function enables.
        unsafe { tile(w, x, shape, out) }
    }

    pub(crate) fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { vectors::dot(a, b) }
    }

    pub(crate) fn axpy(self, a: f32, x: &[f32], y: &mut [f32]) {
        // SAFETY: as above.
        unsafe { vectors::axpy(a, x, y) }
    }

    pub(crate) fn row_products(self, rows: Rows<'_>, columns: &Stripes<WIDE>, out: (&mut [f32], usize), go_on: bool) {
        // SAFETY: as above.
        unsafe { chains::row_products(rows, columns, out, go_on) }
    }

    pub(crate) fn add_weighted_rows(self, weights: Rows<'_>, rows: Rows<'_>, alpha: &[f32], out: (&mut [f32], usize)) {
        // SAFETY: as above.
        unsafe { chains::add_weighted_rows(weights, rows, alpha, out) }
    }

    pub(crate) fn update_tile(self, a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
        // SAFETY: as above.
        unsafe { update::update_tile(a, b, tile) }
    }

    /// For rows of f32 numbers; returns false for others, which have no kernel of their own.
    pub(crate) fn score(self, tile: &mut QueryTile, block: &KeyBlock<'_>) -> bool {
        let Some(keys) = block.keys.all_plain() else { return false };
        // SAFETY: as above.
        unsafe { vectors::score(tile, block, keys) };
        true
    }

    /// Like [`score`](Self::score), but many queries have a kernel for rows of every type.
    pub(crate) fn attend_block(self, tile: &mut QueryTile, block: &KeyBlock<'_>) -> bool {
        if tile.is_in_panels() {
            // SAFETY: as above.
            unsafe { panels::attend_block(tile, block) };
            return true;
        }
        let (Some(keys), Some(values)) = (block.keys.all_plain(), block.values.all_plain()) else { return false };
        // SAFETY: as above.
        unsafe { vectors::attend_block(tile, block, keys, values) };
        true
    }
}

/// One number per row of a group.
type Lanes = [float32x4_t; 2];

/// One integer per row of a group.
type IntLanes = [int32x4_t; 2];

#[target_feature(enable = "neon,dotprod")]
fn tile(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    for g in 0..shape.groups {
        let group = w.group(shape.group + g);
        match (w.ty(), shape.int8) {
            (WeightType::F32, _) => unblocked::tile::<F32>(&group, x, shape, g, out),
            (WeightType::F16, _) => unblocked::tile::<F16>(&group, x, shape, g, out),
            (WeightType::Bf16, _) => unblocked::tile::<BF16>(&group, x, shape, g, out),
            (WeightType::Fp8, _) => unblocked::tile::<FP8>(&group, x, shape, g, out),
            (WeightType::Q8, false) => blocked::tile::<Q8>(&group, x, shape, g, out),
            (WeightType::Int4, false) => blocked::tile::<INT4>(&group, x, shape, g, out),
            (WeightType::Mxfp4, false) => blocked::tile::<MXFP4>(&group, x, shape, g, out),
            (WeightType::Q4, false) => blocked::tile::<Q4>(&group, x, shape, g, out),
            (WeightType::Q3, false) => blocked::tile::<Q3>(&group, x, shape, g, out),
            (WeightType::Q2, false) => blocked::tile::<Q2>(&group, x, shape, g, out),
            (WeightType::Q8, true) => int8::tile::<Q8>(&group, x, shape, g, out),
            (WeightType::Int4, true) => int8::tile::<INT4>(&group, x, shape, g, out),
            (WeightType::Mxfp4, true) => int8::tile::<MXFP4>(&group, x, shape, g, out),
            (WeightType::Q4, true) => int8::tile::<Q4>(&group, x, shape, g, out),
            (WeightType::Q3, true) => int8::tile::<Q3>(&group, x, shape, g, out),
            (WeightType::Q2, true) => int8::tile::<Q2>(&group, x, shape, g, out),
            (WeightType::Grouped(ty), _) => grouped::tile(ty, &group, x, shape, g, out),
        }
    }
}

/// Puts the rows of group `g` of a tile in their places.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn put<const T: usize>(rows: [Lanes; T], out: &mut [[f32; 2 * ROW_GROUP]], g: usize) {
    for (out, rows) in out.iter_mut().zip(rows) {
        let (four, _) = out[g * ROW_GROUP..].as_chunks_mut::<4>();
        store(&mut four[0], rows[0]);
        store(&mut four[1], rows[1]);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn zero() -> Lanes {
    [vdupq_n_f32(0.0); 2]
}

/// Adds four columns of weights times four columns of activations, column `i` to the `i`-th sum.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_columns(s: &mut [Lanes; 4], w: &[Lanes; 4], x: float32x4_t) {
    for h in 0..2 {
        s[0][h] = vfmaq_laneq_f32::<0>(s[0][h], w[0][h], x);
        s[1][h] = vfmaq_laneq_f32::<1>(s[1][h], w[1][h], x);
        s[2][h] = vfmaq_laneq_f32::<2>(s[2][h], w[2][h], x);
        s[3][h] = vfmaq_laneq_f32::<3>(s[3][h], w[3][h], x);
    }
}

/// Converts four columns of signed bytes, which lie side by side for each row, to numbers; adds `offset` to each row's integers.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn byte_columns(integers: [int8x16_t; 2], offset: Option<IntLanes>) -> [Lanes; 4] {
    let mut columns = [zero(); 4];
    for h in 0..2 {
        let v = vreinterpretq_s32_s8(integers[h]);
        let bytes = [
            vshrq_n_s32::<24>(vshlq_n_s32::<24>(v)),
            vshrq_n_s32::<24>(vshlq_n_s32::<16>(v)),
            vshrq_n_s32::<24>(vshlq_n_s32::<8>(v)),
            vshrq_n_s32::<24>(v),
        ];
        for i in 0..4 {
            let integer = if let Some(offset) = offset { vaddq_s32(bytes[i], offset[h]) } else { bytes[i] };
            columns[i][h] = vcvtq_f32_s32(integer);
        }
    }
    columns
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn fold4(s: &[Lanes; 4]) -> Lanes {
    each!(vdupq_n_f32(0.0); 2, h => vaddq_f32(vaddq_f32(s[0][h], s[1][h]), vaddq_f32(s[2][h], s[3][h])))
}

/// Eight binary16 numbers.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn widen_f16(bits: uint16x8_t) -> Lanes {
    let (low, high);
    // SAFETY: the instructions are part of NEON, which the function enables, and touch only the registers named.
    unsafe {
        asm!("fcvtl {low:v}.4s, {bits:v}.4h", low = lateout(vreg) low, bits = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {high:v}.4s, {bits:v}.8h", high = lateout(vreg) high, bits = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

/// Eight bfloat16 numbers: the upper halves of f32.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn widen_bf16(bits: uint16x8_t) -> Lanes {
    let zero = vdupq_n_u16(0);
    [vreinterpretq_f32_u16(vzip1q_u16(zero, bits)), vreinterpretq_f32_u16(vzip2q_u16(zero, bits))]
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bytes(from: &[u8], at: usize) -> uint8x16_t {
    // SAFETY: the reference covers the 16 bytes; the load has no alignment.
    unsafe { vld1q_u8(bytes::<16>(from, at).as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_eight_bytes(from: &[u8], at: usize) -> uint8x8_t {
    // SAFETY: the reference covers the 8 bytes; the load has no alignment.
    unsafe { vld1_u8(bytes::<8>(from, at).as_ptr()) }
}

/// Four words of four int8 values.
#[inline]
#[target_feature(enable = "neon")]
fn load_words(from: &[i32; 4]) -> int8x16_t {
    // SAFETY: the reference covers the 4 words; the load has no alignment beyond theirs.
    vreinterpretq_s8_s32(unsafe { vld1q_s32(from.as_ptr()) })
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &[f32; 4]) -> float32x4_t {
    // SAFETY: the reference covers the 4 numbers; the load has no alignment beyond theirs.
    unsafe { vld1q_f32(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(to: &mut [f32; 4], v: float32x4_t) {
    // SAFETY: the reference covers the 4 numbers; the store has no alignment beyond theirs.
    unsafe { vst1q_f32(to.as_mut_ptr(), v) }
}

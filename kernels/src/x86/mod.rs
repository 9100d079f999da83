//! Kernels for x86-64, and the tokens that prove that the CPU has their instructions.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

#[macro_use]
mod attention;
#[macro_use]
mod grouped;
mod ahead;
mod avx2;
mod avx512;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

use crate::activations::QuantisedBlock;
use crate::attention::KEY_BLOCK;
use crate::kv::KvType;
use crate::matrix::Group;
use crate::vector::*;
use std::iter::Zip;
use std::slice::ChunksExact;

/// Tokens of a tile that AVX2 takes together, except for grouped types.
pub(crate) const AVX2_TOKENS: usize = 32;

/// The type of cached numbers that a constant represents.
const fn kv_type(ty: u8) -> KvType {
    match ty {
        F32 => KvType::F32,
        F16 => KvType::F16,
        BF16 => KvType::Bf16,
        Q8 => KvType::Q8,
        _ => panic!("not a type of cached numbers"),
    }
}

/// Bytes of keys, as f32, that all queries meet before the next ones; they have to stay in the nearest cache.
const NEAR_BYTES: usize = 32 << 10;

/// Rows of `width` numbers that `queries` queries meet together: a single query gains nothing from portions.
const fn near_rows(width: usize, queries: usize) -> usize {
    if queries == 1 || width == 0 {
        return KEY_BLOCK;
    }
    let rows = NEAR_BYTES / (4 * width) / 4 * 4;
    if rows < 8 { 8 } else { rows }
}

/// How many bytes ahead of the arithmetic a stream is prefetched. Measured: one page is better than a quarter or two.
const AHEAD: usize = 4096;

/// Bytes of the scales of 32 columns of a row group of a blocked type.
const fn scale_bytes(ty: u8) -> usize {
    match ty {
        Q8 | INT4 | Q3 | Q2 => 16,
        MXFP4 | Q4 => 8,
        _ => panic!("not blocked"),
    }
}

/// The number that makes the integers of a blocked type unsigned.
const fn bias(ty: u8) -> i32 {
    match ty {
        Q8 => 128,
        INT4 => 8,
        MXFP4 => 12,
        _ => panic!("not blocked"),
    }
}

/// The number that makes levels unsigned.
const LEVEL_BIAS: i32 = 64;

/// Bytes before the scales of the first block.
const fn scales_from(ty: u8) -> usize {
    if has_codebook(ty) { 32 } else { 0 }
}

/// Values and scales of a row group, block by block. Pieces of known length need no bounds checks in the loops over them.
#[inline(always)]
fn blocks_of<'a, const TY: u8>(w: &Group<'a>) -> Zip<ChunksExact<'a, u8>, ChunksExact<'a, u8>> {
    let scales = &w.scales[const { scales_from(TY) }..];
    w.values.chunks_exact(const { block_bytes(TY) }).zip(scales.chunks_exact(const { scale_bytes(TY) }))
}

/// The first `len` blocks of each row: reads below `len` are not checked again.
#[inline(always)]
fn cut<'a, const T: usize>(x: &[&'a [QuantisedBlock]; T], len: usize) -> [&'a [QuantisedBlock]; T] {
    let mut cut = *x;
    for x in &mut cut {
        *x = &x[..len];
    }
    cut
}

/// Block `g` of each row.
#[inline(always)]
fn words<'a, const T: usize>(x: &[&'a [QuantisedBlock]; T], g: usize) -> [&'a [i32; 8]; T] {
    let mut words = [&[0; 8]; T];
    for t in 0..T {
        words[t] = &x[t][g].words;
    }
    words
}

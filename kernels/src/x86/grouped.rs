//! What the kernels of grouped types share.
//!
//! Kernels take 256 columns at a time, a strip. Before each, the terms of its blocks, which formats store in so many ways, are
//! decoded into one form ([`Terms`]), so that the loops over products know codes and the length of a block only. Where several
//! tokens meet the same weights, codes are unpacked into bytes before as well, and those loops need not know them either.

use crate::matrix::{BLOCK, Group};
use sluice_weights::{Codes, Grouped, SUPER_BLOCK, Scales, Super, Zero};
use std::arch::x86_64::*;

/// Blocks of 32 columns of a strip.
pub(super) const STRIP: usize = SUPER_BLOCK / BLOCK;

// Codes as constant parameters; integers go by their bits.
pub(super) const E2M1: u8 = 16;
pub(super) const IQ4NL: u8 = 17;

/// Bytes of the codes of a row group and 32 columns.
pub(super) const fn block_len(codes: u8) -> usize {
    match codes {
        E2M1 | IQ4NL => 128,
        bits => 32 * bits as usize,
    }
}

/// What is added to integers of grids to make them positive bytes: they are −62 to 62.
pub(super) const GRID_BIAS: i32 = 64;

/// Whether scales change within 32 columns.
pub(super) const fn has_halves(ty: Grouped) -> bool {
    ty.block() < BLOCK
}

/// Whether weights have a `B`; if not, they may have a `z`.
pub(super) const fn has_bias(ty: Grouped) -> bool {
    match ty.scales() {
        Scales::Groups { zero, .. } => matches!(zero, Zero::Bias | Zero::Float),
        Scales::Super(scales) => matches!(scales, Super::SixMin | Super::FourMin),
    }
}

/// What the blocks of a strip of one or two row groups multiply and add, by block of 16 or 32 columns and by row group.
pub(super) struct Terms {
    /// `A`.
    pub(super) a: [[__m256; 2]; 2 * STRIP],
    /// The bits of `B` where the type has it. Else, as a pair of 16-bit numbers, what multiplies the sum of the activations to
    /// take out `z` and what was added to the integers; the number is the lower one, and the upper one is 0. In the second block
    /// of 32 columns it is the other way round, so that both meet the pair of sums of the halves.
    pub(super) rest: [[__m256i; 2]; 2 * STRIP],
}

impl Terms {
    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn new() -> Self {
        Terms { a: [[_mm256_setzero_ps(); 2]; 2 * STRIP], rest: [[_mm256_setzero_si256(); 2]; 2 * STRIP] }
    }
}

/// Bytes of two row groups or one, scales and values, for each 32 columns of them; padding included.
pub(super) fn bytes_per_block<const N: usize>(groups: &[Group<'_>; N], blocks: usize) -> usize {
    let Group { scales, values, .. } = groups[0];
    let group = values.as_ptr().addr() - scales.as_ptr().addr() + values.len().next_multiple_of(64);
    (N * group).div_ceil(blocks.max(1))
}

/// The constant for codes that stand for one weight each and are multiplied as integers.
pub(super) fn constant(codes: Codes) -> Option<u8> {
    match codes {
        Codes::Uint(bits) => Some(bits),
        Codes::E2m1 => Some(E2M1),
        Codes::Iq4nl => Some(IQ4NL),
        _ => None,
    }
}

//! Code that the kernels of grouped types share.
//!
//! Kernels take 256 columns at a time, a strip. Before each strip, the terms of its blocks, which formats store in many ways, are
//! decoded into one form, so the loops over products need to know only the codes and the length of a block. If several tokens meet
//! the same weights, codes are unpacked into bytes first, and those loops need not know the codes either.
//!
//! Terms and bytes of all row groups that are multiplied side by side are decoded together: one group with AVX2, two with AVX-512.
//! This is written once, as macros, because functions take on the target features that they are written with, not those of their
//! type parameters.

#[macro_use]
mod terms;
#[macro_use]
mod unpack;

use crate::matrix::BLOCK;
use sluice_weights::{Codes, Grouped, SUPER_BLOCK, Scales, Super, Zero};

/// Blocks of 32 columns of a strip.
pub(super) const STRIP: usize = SUPER_BLOCK / BLOCK;

// Codes as constant parameters; integers are named by their number of bits.
pub(super) const E2M1: u8 = 16;
pub(super) const IQ4NL: u8 = 17;

/// Bytes of the codes of a row group and 32 columns.
pub(super) const fn block_len(codes: u8) -> usize {
    match codes {
        E2M1 | IQ4NL => 128,
        bits => 32 * bits as usize,
    }
}

/// The constant for codes that represent one weight each and are multiplied as integers.
pub(super) fn constant(codes: Codes) -> Option<u8> {
    match codes {
        Codes::Uint(bits) => Some(bits),
        Codes::E2m1 => Some(E2M1),
        Codes::Iq4nl => Some(IQ4NL),
        _ => None,
    }
}

// Formats of scales, and of the zeros and biases beside them, as constant parameters.
pub(super) const F16: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F32: u8 = 2;
pub(super) const E4M3: u8 = 3;
pub(super) const E8M0: u8 = 4;
pub(super) const NONE: u8 = 0;
pub(super) const BYTE: u8 = 1;
pub(super) const BIAS: u8 = 2;
pub(super) const FLOAT: u8 = 3;

/// Bytes of a scale.
pub(super) const fn scale_len(scale: u8) -> usize {
    match scale {
        F16 | BF16 => 2,
        F32 => 4,
        _ => 1,
    }
}

/// Bytes of a scale and its zero or bias.
pub(super) const fn group_len(scale: u8, zero: u8) -> usize {
    match zero {
        NONE => scale_len(scale),
        BYTE => scale_len(scale) + 1,
        _ => 2 * scale_len(scale),
    }
}

/// The number that makes integers of grids positive bytes; the integers are −62 to 62.
pub(super) const GRID_BIAS: i32 = 64;

/// Whether scales change within 32 columns.
pub(super) const fn has_halves(ty: Grouped) -> bool {
    ty.block() < BLOCK
}

/// Whether weights have a `B`; if they do not, they may have a `z`.
pub(super) const fn has_bias(ty: Grouped) -> bool {
    match ty.scales() {
        Scales::Groups { zero, .. } => matches!(zero, Zero::Bias | Zero::Float),
        Scales::Super(scales) => matches!(scales, Super::SixMin | Super::FourMin),
    }
}

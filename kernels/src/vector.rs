//! What the vector kernels of all architectures share: the layout as constants, and views of their operands.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

use crate::activations::{Activations, QuantisedBlock};
use crate::number::E2M1_DOUBLED;
use crate::quant::Codebook;
use std::array::from_fn;

/// An array of `n` values, one per index, as a plain loop.
///
/// `array::from_fn` and `map` are compiled without the caller's target features, so the code of their closures is not inlined into
/// a kernel.
macro_rules! each {
    ($init:expr; $n:expr, $i:ident => $value:expr) => {{
        let mut all = [$init; $n];
        for $i in 0..$n {
            all[$i] = $value;
        }
        all
    }};
}

// Weight types as constant parameters, because enums cannot be constant parameters yet: their codes in the file.
pub(crate) const F32: u8 = 1;
pub(crate) const F16: u8 = 2;
pub(crate) const BF16: u8 = 3;
pub(crate) const FP8: u8 = 4;
pub(crate) const Q8: u8 = 5;
pub(crate) const INT4: u8 = 6;
pub(crate) const MXFP4: u8 = 7;
pub(crate) const Q4: u8 = 8;
pub(crate) const Q3: u8 = 9;
pub(crate) const Q2: u8 = 10;

/// Bytes of four columns of a row group of an unblocked type.
pub(crate) const fn four_columns(ty: u8) -> usize {
    match ty {
        F32 => 128,
        F16 | BF16 => 64,
        FP8 => 32,
        _ => panic!("blocked"),
    }
}

/// Bytes of 32 columns of a row group of a blocked type.
pub(crate) const fn block_bytes(ty: u8) -> usize {
    match ty {
        Q8 => 256,
        INT4 | MXFP4 | Q4 => 128,
        Q3 => 96,
        Q2 => 64,
        _ => panic!("not blocked"),
    }
}

/// The integers of a blocked type are multiples of this unit.
pub(crate) const fn unit(ty: u8) -> f32 {
    if ty == MXFP4 { 0.5 } else { 1.0 }
}

/// The `N` bytes from `at`, for a load of their width.
#[inline(always)]
pub(crate) fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("planes hold whole vectors")
}

/// Doubled e2m1 values, plus `bias`.
pub(crate) const fn e2m1_table(bias: i8) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (E2M1_DOUBLED[i] + bias) as u8;
        i += 1;
    }
    table
}

/// Whether a type has a codebook, a scale for each row, and bytes with the scale and offset of a block.
pub(crate) const fn has_codebook(ty: u8) -> bool {
    matches!(ty, Q4 | Q3 | Q2)
}

/// Whether the halves of 32 columns have scales of their own.
pub(crate) const fn by_halves(ty: u8) -> bool {
    matches!(ty, Q3 | Q2)
}

/// The codebook of `q4`, `q3` or `q2`.
pub(crate) const fn codebook(ty: u8) -> &'static Codebook {
    match ty {
        Q4 => &Codebook::Q4,
        Q3 => &Codebook::Q3,
        Q2 => &Codebook::Q2,
        _ => panic!("no codebook"),
    }
}

/// The levels of a codebook, plus `bias`.
pub(crate) const fn levels(ty: u8, bias: i32) -> [u8; 16] {
    let mut levels = [0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = (codebook(ty).levels[i] as i32 + bias) as u8;
        i += 1;
    }
    levels
}

/// The difference between an offset and the lowest offset, whose byte is zero.
pub(crate) const fn offset_base(ty: u8) -> i32 {
    -codebook(ty).offset(0)
}

pub(crate) fn rows<const T: usize>(x: &Activations, first: usize) -> [&[f32]; T] {
    from_fn(|t| x.row(first + t))
}

pub(crate) fn padded_rows<const T: usize>(x: &Activations, first: usize) -> [&[f32]; T] {
    from_fn(|t| x.padded_row(first + t))
}

pub(crate) fn quantised_rows<const T: usize>(x: &Activations, first: usize) -> [&[QuantisedBlock]; T] {
    from_fn(|t| x.quantised_row(first + t))
}

/// Columns `first..first + len` of each row.
#[inline(always)]
pub(crate) fn parts<'a, const T: usize>(x: &[&'a [f32]; T], first: usize, len: usize) -> [&'a [f32]; T] {
    let mut parts = *x;
    for part in &mut parts {
        *part = &part[first..first + len];
    }
    parts
}

/// The first `len` columns of each row, in groups of four.
#[inline(always)]
pub(crate) fn in_fours<'a, const T: usize>(x: &[&'a [f32]; T], len: usize) -> [&'a [[f32; 4]]; T] {
    let mut fours: [&[[f32; 4]]; T] = [&[]; T];
    for t in 0..T {
        fours[t] = &x[t].as_chunks().0[..len / 4];
    }
    fours
}

//! Kernels for x86-64, and the tokens that prove the CPU has their instructions.

mod avx2;
mod avx512;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

use crate::matrix::WeightType;

// Weight types as constant parameters, which enums cannot be yet.
const F32: u8 = WeightType::F32 as u8;
const F16: u8 = WeightType::F16 as u8;
const BF16: u8 = WeightType::Bf16 as u8;
const FP8: u8 = WeightType::Fp8 as u8;
const Q8: u8 = WeightType::Q8 as u8;
const INT4: u8 = WeightType::Int4 as u8;
const MXFP4: u8 = WeightType::Mxfp4 as u8;

/// Bytes of four columns of a row group of an unblocked type.
const fn four_columns(ty: u8) -> usize {
    match ty {
        F32 => 128,
        F16 | BF16 => 64,
        FP8 => 32,
        _ => panic!("blocked"),
    }
}

/// Bytes of 32 columns of a row group of a blocked type.
const fn block_bytes(ty: u8) -> usize {
    match ty {
        Q8 => 256,
        INT4 | MXFP4 => 128,
        _ => panic!("not blocked"),
    }
}

/// What is added to the integers of a blocked type to make them unsigned.
const fn bias(ty: u8) -> i32 {
    match ty {
        Q8 => 128,
        INT4 => 8,
        MXFP4 => 12,
        _ => panic!("not blocked"),
    }
}

/// What the integers of a blocked type are multiples of.
const fn unit(ty: u8) -> f32 {
    if ty == MXFP4 { 0.5 } else { 1.0 }
}

/// The `N` bytes from `at`, for a load of their width.
#[inline(always)]
fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("planes hold whole vectors")
}

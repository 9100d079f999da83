//! Terms and bytes of one row group: four columns of eight rows per vector, eight vectors per block.
//!
//! Bytes are positive and below 128, so that they can be either operand of a product. Only integers of eight bits and the levels of
//! IQ4_NL are signed.

use super::super::{block_scales, e4m3_to_f16, load16, load32, widen_bf16};
use super::grids;
use crate::grouped::{IQ4NL as LEVELS, unit};
use crate::matrix::{Group, ROW_GROUP};
use crate::x86::grouped::*;
use crate::x86::{MXFP4, bytes, e2m1_table};
use sluice_weights::{Codes, GroupSize, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};
use std::arch::x86_64::*;
use std::arch::x86_64::{
    _mm256_add_epi32 as add_epi32, _mm256_and_si256 as and, _mm256_broadcastsi128_si256 as broadcast,
    _mm256_castps_si256 as cast, _mm256_castsi256_ps as cast_back, _mm256_cvtepi8_epi32 as cvtepi8_epi32,
    _mm256_cvtepi32_ps as cvtepi32_ps, _mm256_cvtepu8_epi32 as cvtepu8_epi32, _mm256_cvtepu16_epi32 as cvtepu16_epi32,
    _mm256_cvtph_ps as f16s, _mm256_mul_ps as mul_ps, _mm256_or_si256 as or, _mm256_set1_epi8 as set1_epi8,
    _mm256_set1_epi32 as set1_epi32, _mm256_set1_ps as set1_ps, _mm256_setzero_ps as setzero_ps,
    _mm256_setzero_si256 as setzero, _mm256_shuffle_epi8 as shuffle, _mm256_slli_epi16 as slli_epi16,
    _mm256_slli_epi32 as slli_epi32, _mm256_srli_epi16 as srli_epi16, _mm256_srli_epi32 as srli_epi32,
    _mm256_sub_epi32 as sub_epi32, _mm256_xor_si256 as xor,
};

const N: usize = 1;

/// The bytes of a block.
pub(super) type Bytes = [__m256i; 8];

/// The difference between a byte and the integer that the code represents.
pub(super) const fn bias(codes: Codes) -> i32 {
    match codes {
        Codes::Uint(8) => -128,
        Codes::E2m1 => 12,
        Codes::Uint(_) | Codes::E4m3 | Codes::Iq4nl => 0,
        _ => GRID_BIAS,
    }
}

terms!("avx2,fma,f16c", __m256, __m256i);
unpack!("avx2,fma,f16c", __m256i);

#[target_feature(enable = "avx2,fma,f16c")]
fn grid_blocks(codes: Codes, w: &[Group<'_>; N], strip: usize, out: &mut [Bytes; STRIP]) {
    grids::blocks(codes, &w[0].values[strip * STRIP * ROW_GROUP * codes.block_len()..], out);
}

#[inline]
#[target_feature(enable = "avx2")]
fn wide(w: &[&[u8]; N], at: usize) -> __m256i {
    load32(w[0], at)
}

#[inline]
#[target_feature(enable = "avx2")]
fn half(w: &[&[u8]; N], at: usize) -> __m128i {
    load16(w[0], at)
}

#[inline]
#[target_feature(enable = "avx2")]
fn quarter(w: &[&[u8]; N], at: usize) -> __m128i {
    _mm_cvtsi64_si128(i64::from_le_bytes(*bytes(w[0], at)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn two_quarters(w: &[&[u8]; N], at: usize) -> (__m128i, __m128i) {
    (quarter(w, at), quarter(w, at + 8))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bf16s(bits: __m128i) -> __m256 {
    cast_back(widen_bf16(bits))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3s(codes: __m128i) -> __m256 {
    mul_ps(f16s(_mm256_castsi256_si128(e4m3_to_f16::<true>(codes))), set1_ps(256.0))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn e8m0s(w: &[&[u8]; N], at: usize) -> __m256 {
    block_scales::<MXFP4>(&w[0][at..], 0)
}

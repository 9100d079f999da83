//! Terms and bytes of two row groups: four columns of sixteen rows per vector, eight vectors per block. Bytes have no sign.

use super::super::{block_scales, load8x2, load16, load16x2, load32x2, widen_bf16};
use super::grids;
use crate::grouped::{IQ4NL as LEVELS, unit};
use crate::matrix::{Group, ROW_GROUP};
use crate::x86::avx2::e4m3_to_f16;
use crate::x86::avx2::grouped as avx2;
use crate::x86::grouped::*;
use crate::x86::{MXFP4, e2m1_table};
use sluice_weights::{Codes, GroupSize, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};
use std::arch::x86_64::*;
use std::arch::x86_64::{
    _mm512_add_epi32 as add_epi32, _mm512_and_si512 as and, _mm512_broadcast_i32x4 as broadcast,
    _mm512_castps_si512 as cast, _mm512_castsi512_ps as cast_back, _mm512_cvtepi8_epi32 as cvtepi8_epi32,
    _mm512_cvtepi32_ps as cvtepi32_ps, _mm512_cvtepu8_epi32 as cvtepu8_epi32, _mm512_cvtepu16_epi32 as cvtepu16_epi32,
    _mm512_cvtph_ps as f16s, _mm512_mul_ps as mul_ps, _mm512_or_si512 as or, _mm512_set1_epi8 as set1_epi8,
    _mm512_set1_epi32 as set1_epi32, _mm512_set1_ps as set1_ps, _mm512_setzero_ps as setzero_ps,
    _mm512_setzero_si512 as setzero, _mm512_shuffle_epi8 as shuffle, _mm512_slli_epi16 as slli_epi16,
    _mm512_slli_epi32 as slli_epi32, _mm512_srli_epi16 as srli_epi16, _mm512_srli_epi32 as srli_epi32,
    _mm512_sub_epi32 as sub_epi32, _mm512_xor_si512 as xor,
};

const N: usize = 2;

/// The bytes of a block.
pub(super) type Bytes = [__m512i; 8];

/// The difference between a byte and the integer that the code represents.
const fn bias(codes: Codes) -> i32 {
    match codes {
        Codes::E2m1 => 12,
        Codes::Iq4nl => 127,
        Codes::Uint(_) | Codes::E4m3 => 0,
        _ => GRID_BIAS,
    }
}

terms!("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", __m512, __m512i);
unpack!("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", __m512i);

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn grid_blocks(codes: Codes, w: &[Group<'_>; N], strip: usize, out: &mut [Bytes; STRIP]) {
    if grids::strip(codes, w, strip, out) {
        return;
    }
    let mut halves = [[[_mm256_setzero_si256(); 8]; STRIP]; N];
    for (w, out) in w.iter().zip(&mut halves) {
        avx2::grid_blocks(codes, &w.values[strip * STRIP * ROW_GROUP * codes.block_len()..], out);
    }
    for (g, out) in out.iter_mut().enumerate() {
        for q in 0..8 {
            out[q] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(halves[0][g][q]), halves[1][g][q]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn wide(w: &[&[u8]; N], at: usize) -> __m512i {
    load32x2(w[0], w[1], at)
}

#[inline]
#[target_feature(enable = "avx2")]
fn half(w: &[&[u8]; N], at: usize) -> __m256i {
    load16x2(w[0], w[1], at)
}

#[inline]
#[target_feature(enable = "avx2")]
fn quarter(w: &[&[u8]; N], at: usize) -> __m128i {
    load8x2(w[0], w[1], at)
}

#[inline]
#[target_feature(enable = "avx2")]
fn two_quarters(w: &[&[u8]; N], at: usize) -> (__m128i, __m128i) {
    let (a, b) = (load16(w[0], at), load16(w[1], at));
    (_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn bf16s(bits: __m256i) -> __m512 {
    cast_back(widen_bf16(bits))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3s(codes: __m128i) -> __m512 {
    mul_ps(f16s(e4m3_to_f16::<true>(codes)), set1_ps(256.0))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e8m0s(w: &[&[u8]; N], at: usize) -> __m512 {
    block_scales::<MXFP4>(&w[0][at..], &w[1][at..])
}

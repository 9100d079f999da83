//! Attention over cached rows of every type: numbers become f32 in registers, from there on all types are one.

use super::super::{BF16, F16, F32, Q8, bytes, kv_type};
use super::{load, load16, store, widen_bf16};
use crate::kv::{KvRows, KvType, Row, u16_at};
use crate::matrix::BLOCK;
use crate::scalar::{DOT_LANES, fold_lanes};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 8;
/// Vectors of the lanes of one product.
const VECS: usize = DOT_LANES / WIDTH;
/// Keys that are multiplied together, as many as leave the sums in the registers.
const TOGETHER: usize = 2;
/// Columns of values that are summed together.
const COLUMNS: usize = 64;

attention!("avx2,fma,f16c", __m256, zero: _mm256_setzero_ps, fmadd: _mm256_fmadd_ps, splat: _mm256_set1_ps);

/// Folds the 32 lanes of a product in halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold_sums(s: [__m256; 4]) -> f32 {
    let eight = _mm256_add_ps(_mm256_add_ps(s[0], s[2]), _mm256_add_ps(s[1], s[3]));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// `N` vectors of numbers from `at` on, which is a multiple of a vector's width, and of a block if `N` is more than one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn vectors<const TY: u8, const N: usize>(row: &Row<'_>, at: usize) -> [__m256; N] {
    match TY {
        F32 => {
            let numbers = row.plain[at..][..WIDTH * N].as_chunks::<WIDTH>().0;
            each!(_mm256_setzero_ps(); N, i => load(&numbers[i]))
        }
        F16 => {
            let numbers = &row.values[2 * at..][..2 * WIDTH * N];
            each!(_mm256_setzero_ps(); N, i => _mm256_cvtph_ps(load16(numbers, 2 * WIDTH * i)))
        }
        BF16 => {
            let numbers = &row.values[2 * at..][..2 * WIDTH * N];
            each!(_mm256_setzero_ps(); N, i => _mm256_castsi256_ps(widen_bf16(load16(numbers, 2 * WIDTH * i))))
        }
        _ => {
            let codes = &row.values[at..][..WIDTH * N];
            let scales = &row.scales[at / BLOCK * 2..][..(WIDTH * N).div_ceil(BLOCK) * 2];
            each!(_mm256_setzero_ps(); N, i => {
                let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes(codes, WIDTH * i)))));
                _mm256_mul_ps(codes, scale(scales, WIDTH * i / BLOCK))
            })
        }
    }
}

/// Scale `i` in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale(scales: &[u8], i: usize) -> __m256 {
    _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16_at(scales, i)))))
}

//! Attention over cached rows of every type: numbers become f32 in registers, and from there all types share one code.

use super::super::{BF16, F16, F32, Q8, ahead, bytes, kv_type, near_rows};
use super::{load, load16, store, widen_bf16};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::{KvRows, KvType, Row, u16_at};
use crate::matrix::BLOCK;
use crate::scalar::{DOT_LANES, fold_lanes};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 8;
/// Vectors of the lanes of one product.
const VECS: usize = DOT_LANES / WIDTH;
/// Keys that are multiplied with one query together, as many as leave the sums in the registers.
const ALONE: usize = 2;
/// The same with two queries; also the vectors of their lanes that are summed at once.
const PAIRED: usize = 2;
const PAIRED_VECS: usize = 2;
/// Queries that share the loads of values.
const SHARED: usize = 2;
/// Columns of values that are summed together for these queries.
const COLUMNS: usize = 32;

attention!(
    "avx2,fma,f16c",
    __m256,
    zero: _mm256_setzero_ps,
    add: _mm256_add_ps,
    fmadd: _mm256_fmadd_ps,
    mul: _mm256_mul_ps,
    splat: _mm256_set1_ps
);

/// Folds four times 8 lanes in halves, down to one number each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold(s: [__m256; 4]) -> [f32; 4] {
    let four = |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    // The lanes of products 0 and 2, then of 1 and 3, so that the results are in order.
    let (even, odd) = (four(s[0], s[2]), four(s[1], s[3]));
    // For each product: lanes 0 + 2 of both, then lanes 1 + 3 of both.
    let two = _mm256_add_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
    let one = _mm256_add_ps(two, _mm256_permute_ps::<0b11_10_11_10>(two));
    let sums = _mm_movelh_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
    let mut out = [0.0; 4];
    // SAFETY: the reference covers the 4 numbers; the store has no alignment.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// `N` vectors of numbers, from `at` on. `at` is a multiple of a vector's width, and of a block if `N` is more than one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn vectors<const TY: u8, const N: usize>(row: &Row<'_>, at: usize) -> [__m256; N] {
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

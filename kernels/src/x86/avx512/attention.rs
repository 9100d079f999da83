//! Attention over cached rows of every type: numbers become f32 in registers, and from there all types share one code.

use super::super::{BF16, F16, F32, Q8, ahead, kv_type, near_rows};
use super::{load, load16, load32, store, widen_bf16};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::{KvRows, KvType, Row, u16_at};
use crate::matrix::BLOCK;
use crate::scalar::{DOT_LANES, fold_lanes};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 16;
/// Vectors of the lanes of one product.
const VECS: usize = DOT_LANES / WIDTH;
/// Keys that are multiplied with one query together, as many as leave the sums in the registers.
const ALONE: usize = 4;
/// The same with two queries; also the vectors of their lanes that are summed at once.
const PAIRED: usize = 4;
const PAIRED_VECS: usize = VECS;
/// Queries that share the loads of values.
const SHARED: usize = 4;
/// Columns of values that are summed together for these queries.
const COLUMNS: usize = 64;

attention!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
    __m512,
    zero: _mm512_setzero_ps,
    add: _mm512_add_ps,
    fmadd: _mm512_fmadd_ps,
    mul: _mm512_mul_ps,
    splat: _mm512_set1_ps
);

/// Folds four times 16 lanes in halves, down to one number each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fold(s: [__m512; 4]) -> [f32; 4] {
    let eight = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let (low, high) = (eight(s[0], s[1]), eight(s[2], s[3]));
    // A quarter of a vector for each product.
    let four = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(low, high), _mm512_shuffle_f32x4::<0xdd>(low, high));
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b11_10_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_movehdup_ps(two));
    let first_of_each = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_each, one));
    let mut out = [0.0; 4];
    // SAFETY: the reference covers the 4 numbers; the store has no alignment.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// `N` vectors of numbers, from `at` on. `at` is a multiple of a vector's width, and of a block if `N` is more than one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn vectors<const TY: u8, const N: usize>(row: &Row<'_>, at: usize) -> [__m512; N] {
    match TY {
        F32 => {
            let numbers = row.plain[at..][..WIDTH * N].as_chunks::<WIDTH>().0;
            each!(_mm512_setzero_ps(); N, i => load(&numbers[i]))
        }
        F16 => {
            let numbers = &row.values[2 * at..][..2 * WIDTH * N];
            each!(_mm512_setzero_ps(); N, i => _mm512_cvtph_ps(load32(numbers, 2 * WIDTH * i)))
        }
        BF16 => {
            let numbers = &row.values[2 * at..][..2 * WIDTH * N];
            each!(_mm512_setzero_ps(); N, i => _mm512_castsi512_ps(widen_bf16(load32(numbers, 2 * WIDTH * i))))
        }
        _ => {
            let codes = &row.values[at..][..WIDTH * N];
            let scales = &row.scales[at / BLOCK * 2..][..(WIDTH * N).div_ceil(BLOCK) * 2];
            each!(_mm512_setzero_ps(); N, i => {
                let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(codes, WIDTH * i)));
                _mm512_mul_ps(codes, scale(scales, WIDTH * i / BLOCK))
            })
        }
    }
}

/// Scale `i` in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scale(scales: &[u8], i: usize) -> __m512 {
    _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16_at(scales, i)))))
}

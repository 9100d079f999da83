//! Attention over cached rows of every type: numbers become f32 in registers, from there on all types are one.

use super::super::{BF16, F16, F32, Q8, kv_type};
use super::{load, load16, load32, store, widen_bf16};
use crate::kv::{KvRows, KvType, Row, u16_at};
use crate::matrix::BLOCK;
use crate::scalar::{DOT_LANES, fold_lanes};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 16;
/// Vectors of the lanes of one product.
const VECS: usize = DOT_LANES / WIDTH;
/// Keys that are multiplied together, as many as leave the sums in the registers.
const TOGETHER: usize = 4;
/// Columns of values that are summed together.
const COLUMNS: usize = 128;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dots(a: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
    match rows.ty() {
        KvType::F32 => dots_of::<F32>(a, rows, out),
        KvType::F16 => dots_of::<F16>(a, rows, out),
        KvType::Bf16 => dots_of::<BF16>(a, rows, out),
        KvType::Q8 => dots_of::<Q8>(a, rows, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn weighted_sum(p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
    match rows.ty() {
        KvType::F32 => weighted_sum_of::<F32>(p, rows, out),
        KvType::F16 => weighted_sum_of::<F16>(p, rows, out),
        KvType::Bf16 => weighted_sum_of::<BF16>(p, rows, out),
        KvType::Q8 => weighted_sum_of::<Q8>(p, rows, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dots_of<const TY: u8>(a: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
    let ty = const { kv_type(TY) };
    if !a.len().is_multiple_of(DOT_LANES) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = odd_dot::<TY>(a, rows.part(ty, j, 0, a.len()));
        }
        return;
    }
    let (several, rest) = out.as_chunks_mut::<TOGETHER>();
    let first_of_rest = TOGETHER * several.len();
    for (i, out) in several.iter_mut().enumerate() {
        let keys = each!(Row::NONE; TOGETHER, t => rows.part(ty, TOGETHER * i + t, 0, a.len()));
        let sums = several_dots::<TY, TOGETHER>(a, keys);
        *out = each!(0.0; TOGETHER, t => fold_sums(sums[t]));
    }
    for (j, out) in rest.iter_mut().enumerate() {
        let [sums] = several_dots::<TY, 1>(a, [rows.part(ty, first_of_rest + j, 0, a.len())]);
        *out = fold_sums(sums);
    }
}

/// The lanes of the products with several rows, without what is behind the last whole lanes: `a` is loaded once for all.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn several_dots<const TY: u8, const T: usize>(a: &[f32], keys: [Row<'_>; T]) -> [[__m512; VECS]; T] {
    let mut s = [[_mm512_setzero_ps(); VECS]; T];
    for (c, a) in a.as_chunks::<DOT_LANES>().0.iter().enumerate() {
        let a = a.as_chunks::<WIDTH>().0;
        for t in 0..T {
            let key = vectors::<TY, VECS>(&keys[t], c * DOT_LANES);
            for j in 0..VECS {
                s[t][j] = _mm512_fmadd_ps(load(&a[j]), key[j], s[t][j]);
            }
        }
    }
    s
}

/// The product with a row of any length.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn odd_dot<const TY: u8>(a: &[f32], key: Row<'_>) -> f32 {
    let [sums] = several_dots::<TY, 1>(a, [key]);
    let mut lanes = [0.0; DOT_LANES];
    for (lanes, sum) in lanes.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums) {
        store(lanes, sum);
    }
    let rest = a.as_chunks::<DOT_LANES>().1;
    let first = a.len() - rest.len();
    for (i, (lane, a)) in lanes.iter_mut().zip(rest).enumerate() {
        *lane = a.mul_add(key.value(const { kv_type(TY) }, first + i), *lane);
    }
    fold_lanes(lanes)
}

/// Folds the 32 lanes of a product in halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fold_sums(s: [__m512; 2]) -> f32 {
    let sixteen = _mm512_add_ps(s[0], s[1]);
    let eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), _mm512_extractf32x8_ps::<1>(sixteen));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn weighted_sum_of<const TY: u8>(p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
    let mut at = 0;
    let (wide, rest) = out.as_chunks_mut::<COLUMNS>();
    for out in wide {
        weighted_columns::<TY, { COLUMNS / WIDTH }>(p, rows, at, out);
        at += COLUMNS;
    }
    let (narrow, rest) = rest.as_chunks_mut::<WIDTH>();
    for out in narrow {
        weighted_columns::<TY, 1>(p, rows, at, out);
        at += WIDTH;
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = 0.0;
        for (j, &p) in p.iter().enumerate() {
            *out = p.mul_add(rows.part(const { kv_type(TY) }, j, at + i, 1).value(const { kv_type(TY) }, 0), *out);
        }
    }
}

/// `N` vectors of columns from `at` on, whose sums stay in registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn weighted_columns<const TY: u8, const N: usize>(p: &[f32], rows: &KvRows<'_>, at: usize, out: &mut [f32]) {
    let mut sums = [_mm512_setzero_ps(); N];
    for (j, &p) in p.iter().enumerate() {
        let values = vectors::<TY, N>(&rows.part(const { kv_type(TY) }, j, at, WIDTH * N), 0);
        let p = _mm512_set1_ps(p);
        for i in 0..N {
            sums[i] = _mm512_fmadd_ps(p, values[i], sums[i]);
        }
    }
    for (out, sum) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums) {
        store(out, sum);
    }
}

/// `N` vectors of numbers from `at` on, which is a multiple of a vector's width, and of a block if `N` is more than one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn vectors<const TY: u8, const N: usize>(row: &Row<'_>, at: usize) -> [__m512; N] {
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

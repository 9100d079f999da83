//! Attention of many queries over cached rows of every type.

use super::super::{BF16, F16, F32, Q8, kv_type};
use super::attention::vectors;
use super::{load, store};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::{KvRows, KvType};
use crate::panels::{FOLDS, Group, LANE_ORDER, NEAR, PANEL, Panels, Plain, Weights, union};
use crate::scalar::DOT_LANES;
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 8;
/// Keys and panels whose sums stay in the registers.
const KEYS: usize = 6;
const HALF: usize = KEYS / 2;
const TOGETHER: usize = 1;
/// Numbers.
const AHEAD: usize = 16 * PANEL;
/// Queries and vectors of columns whose sums stay in the registers.
const QUERIES: usize = 6;
const VECTORS: usize = 2;

panels!(
    "avx2,fma,f16c",
    __m256,
    zero: _mm256_setzero_ps,
    add: _mm256_add_ps,
    fmadd: _mm256_fmadd_ps,
    mul: _mm256_mul_ps,
    splat: _mm256_set1_ps
);

/// Asks for what lies so far behind `numbers` that it comes in time.
#[inline]
#[target_feature(enable = "sse")]
fn ask(numbers: &[f32; PANEL]) {
    _mm_prefetch::<_MM_HINT_T0>(numbers.as_ptr().wrapping_add(AHEAD).cast());
}

/// The first numbers of row `j`, as many as `out` has.
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(rows: &KvRows<'_>, j: usize, out: &mut [f32]) {
    match rows.ty() {
        KvType::F32 => widen_from::<F32>(rows, j, out),
        KvType::F16 => widen_from::<F16>(rows, j, out),
        KvType::Bf16 => widen_from::<BF16>(rows, j, out),
        KvType::Q8 => widen_from::<Q8>(rows, j, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen_from<const TY: u8>(rows: &KvRows<'_>, j: usize, out: &mut [f32]) {
    let row = rows.row(j, out.len());
    let whole = out.len() / DOT_LANES * DOT_LANES;
    let (wide, rest) = out.split_at_mut(whole);
    for (c, out) in wide.as_chunks_mut::<DOT_LANES>().0.iter_mut().enumerate() {
        let numbers = vectors::<TY, { DOT_LANES / WIDTH }>(&row, c * DOT_LANES);
        for (out, numbers) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(numbers) {
            store(out, numbers);
        }
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = row.value(const { kv_type(TY) }, whole + i);
    }
}

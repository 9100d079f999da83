//! Attention of many queries over cached rows of every type.

use super::attention::widen;
use super::{load, store};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::KvRows;
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

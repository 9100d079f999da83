//! Attention of many queries over cached rows of every type.

use super::attention::widen;
use super::{load, store};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::KvRows;
use crate::panels::{FOLDS, Group, LANE_ORDER, NEAR, PANEL, Panels, Plain, Weights, union};
use crate::scalar::DOT_LANES;
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 16;
/// Keys and panels whose sums stay in the registers.
const KEYS: usize = 8;
const HALF: usize = KEYS / 2;
const TOGETHER: usize = 2;
/// Numbers.
const AHEAD: usize = 16 * PANEL;
/// Queries and vectors of columns whose sums stay in the registers.
const QUERIES: usize = 8;
const VECTORS: usize = 2;

panels!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
    __m512,
    zero: _mm512_setzero_ps,
    add: _mm512_add_ps,
    fmadd: _mm512_fmadd_ps,
    mul: _mm512_mul_ps,
    splat: _mm512_set1_ps
);

/// Asks for what lies so far behind `numbers` that it comes in time.
#[inline]
#[target_feature(enable = "sse")]
fn ask(numbers: &[f32; PANEL]) {
    _mm_prefetch::<_MM_HINT_T0>(numbers.as_ptr().wrapping_add(AHEAD).cast());
}

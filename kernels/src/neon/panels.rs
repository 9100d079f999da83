//! Attention of many queries over cached rows of every type.

use super::{load, store};
use crate::attention::{KeyBlock, Part, QueryTile};
use crate::kv::KvRows;
use crate::panels::{FOLDS, Group, LANE_ORDER, NEAR, PANEL, Panels, Plain, Weights, union};
use crate::scalar::DOT_LANES;
use std::arch::aarch64::*;

/// Numbers of a vector.
const WIDTH: usize = 4;
/// Keys and panels whose sums stay in the registers.
const KEYS: usize = 6;
const HALF: usize = KEYS / 2;
const TOGETHER: usize = 1;
/// Queries and vectors of columns whose sums stay in the registers.
const QUERIES: usize = 6;
const VECTORS: usize = 4;

panels!("neon,dotprod", float32x4_t, zero: zero, add: vaddq_f32, fmadd: fmadd, mul: vmulq_f32, splat: vdupq_n_f32);

#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn zero() -> float32x4_t {
    vdupq_n_f32(0.0)
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn fmadd(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
    vfmaq_f32(c, a, b)
}

/// Leaves it to the processor what comes into its caches.
fn ask(_: &[f32; PANEL]) {}

/// The first numbers of row `j`, as many as `out` has.
fn widen(rows: &KvRows<'_>, j: usize, out: &mut [f32]) {
    rows.read(j, out);
}

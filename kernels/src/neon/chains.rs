//! Products of matrices in chains of fused multiply-adds.

use super::panels::{fmadd, zero};
use super::{load, store};
use crate::chains::Rows;
use crate::update::{Stripes, WIDE};
use std::arch::aarch64::*;

/// Numbers of a vector.
const WIDTH: usize = 4;
/// Rows and stripes whose sums stay in the registers.
const ROWS: usize = 6;
const TOGETHER: usize = 1;
/// Results and vectors of their columns whose sums stay in the registers.
const QUERIES: usize = 6;
const VECTORS: usize = 4;

chains!("neon,dotprod", float32x4_t, zero: zero, fmadd: fmadd, mul: vmulq_f32, splat: vdupq_n_f32);

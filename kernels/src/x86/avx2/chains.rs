//! Products of matrices in chains of fused multiply-adds.

use super::{load, store};
use crate::chains::Rows;
use crate::update::{Stripes, WIDE};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 8;
/// Rows and stripes whose sums stay in the registers.
const ROWS: usize = 6;
const TOGETHER: usize = 1;
/// Results and vectors of their columns whose sums stay in the registers.
const QUERIES: usize = 6;
const VECTORS: usize = 2;

chains!(
    "avx2,fma,f16c",
    __m256,
    zero: _mm256_setzero_ps,
    fmadd: _mm256_fmadd_ps,
    mul: _mm256_mul_ps,
    splat: _mm256_set1_ps
);

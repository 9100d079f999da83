//! Products of matrices in chains of fused multiply-adds.

use super::{load, store};
use crate::chains::Rows;
use crate::update::{Stripes, WIDE};
use std::arch::x86_64::*;

/// Numbers of a vector.
const WIDTH: usize = 16;
/// Rows and stripes whose sums stay in the registers.
const ROWS: usize = 8;
const TOGETHER: usize = 2;
/// Results and vectors of their columns whose sums stay in the registers.
const QUERIES: usize = 8;
const VECTORS: usize = 2;

chains!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
    __m512,
    zero: _mm512_setzero_ps,
    fmadd: _mm512_fmadd_ps,
    mul: _mm512_mul_ps,
    splat: _mm512_set1_ps
);

//! Sums of outer products.

use super::{load, store};
use crate::update::{TALL, UpdateTile, WIDE};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn update_tile(a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
    let mut sums = [_mm512_setzero_ps(); TALL];
    for i in 0..TALL {
        sums[i] = load(&tile[i]);
    }
    for (a, b) in a.iter().zip(b) {
        let b = load(b);
        for i in 0..TALL {
            sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), b, sums[i]);
        }
    }
    for i in 0..TALL {
        store(&mut tile[i], sums[i]);
    }
}

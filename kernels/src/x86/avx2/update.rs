//! Sums of outer products.

use super::{load, store};
use crate::update::{TALL, UpdateTile, WIDE};
use std::arch::x86_64::*;

/// Rows at once: with two vectors each, their sums leave four of the 16 registers free.
const ROWS: usize = 6;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn update_tile(a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
    for (part, rows) in tile.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        for i in 0..ROWS {
            let row = rows[i].as_chunks::<8>().0;
            sums[i] = [load(&row[0]), load(&row[1])];
        }
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (&a.as_chunks::<ROWS>().0[part], b.as_chunks::<8>().0);
            let b = [load(&b[0]), load(&b[1])];
            for i in 0..ROWS {
                let a = _mm256_set1_ps(a[i]);
                sums[i][0] = _mm256_fmadd_ps(a, b[0], sums[i][0]);
                sums[i][1] = _mm256_fmadd_ps(a, b[1], sums[i][1]);
            }
        }
        for i in 0..ROWS {
            let row = rows[i].as_chunks_mut::<8>().0;
            store(&mut row[0], sums[i][0]);
            store(&mut row[1], sums[i][1]);
        }
    }
}

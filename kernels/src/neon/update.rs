//! Sums of outer products.

use super::{load, store};
use crate::update::{TALL, UpdateTile, WIDE};
use std::arch::aarch64::*;

/// Rows at once: with four vectors each, their sums leave eight of the 32 registers free.
const ROWS: usize = 6;
/// Vectors of a row.
const VECTORS: usize = WIDE / 4;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn update_tile(a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
    for (part, rows) in tile.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
        for i in 0..ROWS {
            for (sum, row) in sums[i].iter_mut().zip(rows[i].as_chunks::<4>().0) {
                *sum = load(row);
            }
        }
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (&a.as_chunks::<ROWS>().0[part], b.as_chunks::<4>().0);
            for v in 0..VECTORS {
                let b = load(&b[v]);
                for i in 0..ROWS {
                    sums[i][v] = vfmaq_n_f32(sums[i][v], b, a[i]);
                }
            }
        }
        for i in 0..ROWS {
            for (sum, row) in sums[i].iter().zip(rows[i].as_chunks_mut::<4>().0) {
                store(row, *sum);
            }
        }
    }
}

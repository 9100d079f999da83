//! Inner products and weighted sums of rows of f32, the parts of attention.

use super::{load, store};
use crate::attention::{KeyBlock, QueryTile};
use crate::scalar::{DOT_LANES, fold_lanes};
use std::arch::aarch64::*;

/// Vectors that hold the lanes of [`dot`].
const VECTORS: usize = DOT_LANES / 4;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_vectors, a_rest) = a.as_chunks::<DOT_LANES>();
    let (b_vectors, b_rest) = b.as_chunks::<DOT_LANES>();
    let mut s = [vdupq_n_f32(0.0); VECTORS];
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        let (a, b) = (a.as_chunks::<4>().0, b.as_chunks::<4>().0);
        for j in 0..VECTORS {
            s[j] = vfmaq_f32(s[j], load(&a[j]), load(&b[j]));
        }
    }
    let mut lanes = [0.0; DOT_LANES];
    for (lanes, s) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(s) {
        store(lanes, s);
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(lanes)
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    let (x_vectors, x_rest) = x.as_chunks::<4>();
    let (y_vectors, y_rest) = y.as_chunks_mut::<4>();
    for (y, x) in y_vectors.iter_mut().zip(x_vectors) {
        store(y, vfmaq_n_f32(load(y), load(x), a));
    }
    for (y, &x) in y_rest.iter_mut().zip(x_rest) {
        *y = a.mul_add(x, *y);
    }
}

/// Stores the products with the rows that each query sees in `tile.scores`.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn score(tile: &mut QueryTile, block: &KeyBlock<'_>, keys: Plain<'_>) {
    for (i, (scores, part)) in tile.scores.iter_mut().zip(&tile.parts).enumerate() {
        if !part.is_empty() {
            let places = block.place(part.from)..block.place(part.to);
            dots(&tile.queries[i * tile.key..][..tile.key], keys, part.from, &mut scores[places]);
        }
    }
}

/// Attention over plain rows.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn attend_block(tile: &mut QueryTile, block: &KeyBlock<'_>, keys: Plain<'_>, values: Plain<'_>) {
    score(tile, block, keys);
    tile.weigh(block.place(0));
    for (i, part) in tile.parts.iter().enumerate() {
        if !part.is_empty() {
            let p = &tile.scores[i][block.place(part.from)..block.place(part.to)];
            let out = &mut tile.out[i * tile.value..][..tile.value];
            add_weighted(p, values, part.from, tile.factors[i], out);
        }
    }
}

/// Rows of f32 numbers, and the distance between them.
pub(super) type Plain<'a> = (&'a [f32], usize);

/// [`dot`] of `a` with the beginning of each row from `first` on, one per element of `out`.
#[target_feature(enable = "neon,dotprod")]
fn dots(a: &[f32], (rows, stride): Plain<'_>, first: usize, out: &mut [f32]) {
    let row = |j: usize| &rows[(first + j) * stride..][..a.len()];
    let whole = a.len().is_multiple_of(DOT_LANES);
    let (several, rest) = out.as_chunks_mut::<2>();
    let first_of_rest = 2 * several.len();
    for (i, out) in several.iter_mut().enumerate() {
        let keys = [row(2 * i), row(2 * i + 1)];
        *out = if whole { several_dots(a, keys) } else { [dot(a, keys[0]), dot(a, keys[1])] };
    }
    for (j, out) in rest.iter_mut().enumerate() {
        *out = dot(a, row(first_of_rest + j));
    }
}

/// The products of [`dot`] for vectors of whole lanes: `a` is loaded once for all rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn several_dots<const T: usize>(a: &[f32], keys: [&[f32]; T]) -> [f32; T] {
    let mut s = [[vdupq_n_f32(0.0); VECTORS]; T];
    for (c, a) in a.as_chunks::<DOT_LANES>().0.iter().enumerate() {
        let a = a.as_chunks::<4>().0;
        for t in 0..T {
            let key = keys[t][c * DOT_LANES..][..DOT_LANES].as_chunks::<4>().0;
            for j in 0..VECTORS {
                s[t][j] = vfmaq_f32(s[t][j], load(&a[j]), load(&key[j]));
            }
        }
    }
    each!(0.0; T, t => fold_sums(s[t]))
}

/// Folds the 32 lanes of [`dot`] in halves.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn fold_sums(s: [float32x4_t; VECTORS]) -> f32 {
    let sixteen = each!(s[0]; 4, j => vaddq_f32(s[j], s[j + 4]));
    let four = vaddq_f32(vaddq_f32(sixteen[0], sixteen[2]), vaddq_f32(sixteen[1], sixteen[3]));
    vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
}

/// `out = fma(out, alpha, Σ p[j]·row j · beta)` for the rows from `first` on, `j` ascending.
#[target_feature(enable = "neon,dotprod")]
fn add_weighted(p: &[f32], (rows, stride): Plain<'_>, first: usize, [alpha, beta]: [f32; 2], out: &mut [f32]) {
    let (rows, len) = (&rows[first * stride..], out.len());
    let mut at = 0;
    while len - at >= 64 {
        weighted_columns::<16>(p, (rows, stride), at, [alpha, beta], &mut out[at..]);
        at += 64;
    }
    while len - at >= 4 {
        weighted_columns::<1>(p, (rows, stride), at, [alpha, beta], &mut out[at..]);
        at += 4;
    }
    for (i, out) in out[at..].iter_mut().enumerate() {
        let mut sum = 0.0;
        for (j, &p) in p.iter().enumerate() {
            sum = p.mul_add(rows[j * stride + at + i], sum);
        }
        *out = out.mul_add(alpha, sum * beta);
    }
}

/// `N` vectors of columns, from column `at` on, whose sums stay in registers.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn weighted_columns<const N: usize>(
    p: &[f32],
    (rows, stride): Plain<'_>,
    at: usize,
    [alpha, beta]: [f32; 2],
    out: &mut [f32],
) {
    let out = &mut out.as_chunks_mut::<4>().0[..N];
    let mut sums = [vdupq_n_f32(0.0); N];
    for (j, &p) in p.iter().enumerate() {
        let row = rows[j * stride + at..][..4 * N].as_chunks::<4>().0;
        for i in 0..N {
            sums[i] = vfmaq_n_f32(sums[i], load(&row[i]), p);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        let sum = vfmaq_n_f32(vmulq_n_f32(sum, beta), load(out), alpha);
        store(out, sum);
    }
}

//! Codes of a few bits with scales per group of columns, in scalar code: the specification of their products, and their packing.
//!
//! `sluice_weights` describes the bytes. A weight is `A·(n − z) + B`: `n` is the integer of its code; `A`, `z` and `B` belong to
//! its row and block of 16 or 32 columns ([`Block`]). `A` includes the [`unit`] of the type, a power of two of which all its
//! integers are multiples.
//!
//! **With f32 activations**: per block, in order and including the padding of the last, `sum` is the sum over `(n − z)·x` of the
//! `scalar` module; then `total = fma(sum, A, total)` and, where the type has `B`, `total = fma(xsum, B, total)` with
//! `xsum = (t0 + t1) + (t2 + t3)`, where `t[k mod 4] = t[k mod 4] + x[k]` for k ascending. The result is `total`, times the row's
//! factor where rows have one.
//!
//! **With int8 activations**: for each 32 columns, number `g`, `t` is the sum over their one or two blocks, in order, of `dot·A`
//! and, if the type has `B`, `isum·B`, where `dot` is the exact dot product of `n − z` and the activations, and `isum` their exact
//! sum: `t = dot·A` for the first block, `t = fma(dot, A, t)` for the second, and after each `t = fma(isum, B, t)`. Then `s[g mod
//! 2] = fma(t, xscale, s[g mod 2])`. The result is `s0 + s1`, times the row's factor.

pub(crate) mod grids;
mod pack;
mod scales;

use crate::activations::QuantisedBlock;
use crate::matrix::{BLOCK, Group, ROW_GROUP};
use crate::number::{E2M1_DOUBLED, e4m3_over_256};
use crate::scalar::{Rows, f32_at, fold4};
pub use pack::{pack_row_group_grouped, pack_row_group_nibbles};
pub(crate) use scales::Block;
use sluice_weights::{Codes, Grouped, Scales, Super};

/// The levels of ggml's IQ4_NL (`ggml-common.h`, `kvalues_iq4nl`).
pub const IQ4NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The integers of a type are multiples of this unit.
pub(crate) const fn unit(ty: Grouped) -> f32 {
    match (ty.codes(), ty.scales()) {
        (Codes::E2m1, _) => 0.5,
        (Codes::E4m3, _) => 256.0,
        (Codes::Iq3xxs, _) => 0.25,
        (_, Scales::Super(Super::Half | Super::Shift | Super::ShiftBy16)) | (Codes::Iq2xxs, _) => 0.125,
        _ => 1.0,
    }
}

/// The numbers that the codes of column `k` represent, one per row, before zeros are subtracted: integers, except that numbers of
/// e4m3 are divided by 256.
pub(crate) fn numbers(ty: Grouped, w: &Group<'_>, k: usize) -> Rows {
    let middle = ty.middle() as f32;
    match ty.codes() {
        Codes::E4m3 => std::array::from_fn(|r| e4m3_over_256(w.values[k * ROW_GROUP + r])),
        Codes::E2m1 => nibbles(w.values, k, 128).map(|c| f32::from(E2M1_DOUBLED[usize::from(c)])),
        Codes::Iq4nl => nibbles(w.values, k, 128).map(|c| f32::from(IQ4NL[usize::from(c)])),
        Codes::Uint(bits) => codes(w.values, k, usize::from(bits)).map(|c| f32::from(c) - middle),
        grid => grids::numbers(grid, w.values, k),
    }
}

/// The nibbles of column `k`, one per row; `block` bytes hold 32 columns and begin with their nibbles.
fn nibbles(values: &[u8], k: usize, block: usize) -> [u8; ROW_GROUP] {
    let (g, q, i) = (k / BLOCK, k % BLOCK / 4, k % 4);
    std::array::from_fn(|r| values[g * block + q % 4 * 32 + r * 4 + i] >> (q / 4 * 4) & 15)
}

/// The codes of column `k`, one per row, assembled from planes of 4, 2 and 1 bits.
fn codes(values: &[u8], k: usize, bits: usize) -> [u8; ROW_GROUP] {
    let (g, q, i) = (k / BLOCK, k % BLOCK / 4, k % 4);
    let block = &values[g * 32 * bits..];
    if bits == 8 {
        return std::array::from_fn(|r| block[q * 32 + r * 4 + i]);
    }
    std::array::from_fn(|r| {
        let (mut code, mut shift, mut plane) = (0, 0, 0);
        for width in [4, 2, 1].into_iter().filter(|width| bits & width != 0) {
            // A byte of a plane holds as many codes as fit, each from a different part of the block.
            let vectors = width;
            let byte = block[plane + q % vectors * 32 + r * 4 + i];
            code |= (byte >> (q / vectors * width) & ((1 << width) - 1)) << shift;
            (shift, plane) = (shift + width, plane + 32 * width);
        }
        code
    })
}

/// The factors of the rows.
fn row_factors(ty: Grouped, w: &Group<'_>) -> Option<Rows> {
    ty.has_row_factor().then(|| std::array::from_fn(|r| f32_at(w.scales, r)))
}

/// A row group times a padded row of f32.
pub(crate) fn group_f32(ty: Grouped, w: &Group<'_>, x: &[f32]) -> Rows {
    let block = ty.block();
    let mut total = [0.0; ROW_GROUP];
    for (b, x) in x.chunks_exact(block).enumerate() {
        let scales = Block::new(ty, w, b);
        let mut s = [[0.0; ROW_GROUP]; 4];
        for (k, &x) in x.iter().enumerate() {
            let column = numbers(ty, w, b * block + k);
            for r in 0..ROW_GROUP {
                s[k % 4][r] = (column[r] - scales.zero[r]).mul_add(x, s[k % 4][r]);
            }
        }
        let sum = fold4(&s);
        for r in 0..ROW_GROUP {
            total[r] = sum[r].mul_add(scales.a[r], total[r]);
        }
        if let Some(bias) = scales.b {
            let mut t = [0.0f32; 4];
            x.iter().enumerate().for_each(|(k, x)| t[k % 4] += x);
            let sum = (t[0] + t[1]) + (t[2] + t[3]);
            for r in 0..ROW_GROUP {
                total[r] = sum.mul_add(bias[r], total[r]);
            }
        }
    }
    times_factors(ty, w, total)
}

/// A row group times a row of int8.
pub(crate) fn group_int8(ty: Grouped, w: &Group<'_>, x: &[QuantisedBlock]) -> Rows {
    let mut s = [[0.0; ROW_GROUP]; 2];
    for (g, x) in x.iter().enumerate() {
        let mut t = [0.0; ROW_GROUP];
        for first in (0..BLOCK).step_by(ty.block()) {
            let scales = Block::new(ty, w, (g * BLOCK + first) / ty.block());
            let (mut dot, mut sum) = ([0i32; ROW_GROUP], 0);
            for k in first..first + ty.block() {
                let x = i32::from(x.words[k / 4].to_le_bytes()[k % 4] as i8);
                let column = numbers(ty, w, g * BLOCK + k);
                sum += x;
                for r in 0..ROW_GROUP {
                    dot[r] += (column[r] - scales.zero[r]) as i32 * x;
                }
            }
            for r in 0..ROW_GROUP {
                let dot = dot[r] as f32;
                t[r] = if first == 0 { dot * scales.a[r] } else { dot.mul_add(scales.a[r], t[r]) };
                t[r] = scales.b.map_or(t[r], |b| (sum as f32).mul_add(b[r], t[r]));
            }
        }
        for r in 0..ROW_GROUP {
            s[g % 2][r] = t[r].mul_add(x.scale, s[g % 2][r]);
        }
    }
    times_factors(ty, w, std::array::from_fn(|r| s[0][r] + s[1][r]))
}

fn times_factors(ty: Grouped, w: &Group<'_>, rows: Rows) -> Rows {
    match row_factors(ty, w) {
        Some(factors) => std::array::from_fn(|r| rows[r] * factors[r]),
        None => rows,
    }
}

/// The numbers of column `k`, as the tools that publish the types compute them, except for one rounding.
pub(crate) fn unpack_column(ty: Grouped, w: &Group<'_>, k: usize) -> Rows {
    let scales = Block::new(ty, w, k / ty.block());
    let (numbers, factors) = (numbers(ty, w, k), row_factors(ty, w).unwrap_or([1.0; ROW_GROUP]));
    std::array::from_fn(|r| {
        let value = (numbers[r] - scales.zero[r]) * (scales.a[r] * factors[r]);
        scales.b.map_or(value, |b| value + b[r])
    })
}

/// Row `r` of the group, as [`unpack_column`] gives it.
pub(crate) fn unpack_row(ty: Grouped, w: &Group<'_>, r: usize, out: &mut [f32]) {
    let factor = row_factors(ty, w).map_or(1.0, |factors| factors[r]);
    for (b, out) in out.chunks_mut(ty.block()).enumerate() {
        let scales = Block::new(ty, w, b);
        let (a, zero, bias) = (scales.a[r] * factor, scales.zero[r], scales.b.map(|b| b[r]));
        for (i, out) in out.iter_mut().enumerate() {
            let value = (numbers(ty, w, b * ty.block() + i)[r] - zero) * a;
            *out = bias.map_or(value, |bias| value + bias);
        }
    }
}

//! The specification: what every kernel computes, operation by operation.
//!
//! `fma(a, b, c)` is `a·b + c` rounded once. All sums start at +0.
//!
//! **Product of one row with one token.**
//! - `f32`, `f16`, `bf16`: `s[k mod 4] = fma(w[k], x[k], s[k mod 4])` for k ascending; the result is
//!   `(s0 + s1) + (s2 + s3)`.
//! - `fp8`: per 128-column block, in order, that sum over the block's columns of `(w/256)·x`; then
//!   `total = fma(sum, 256·scale, total)`. The 256 is the difference of the exponent biases of e4m3 and binary16.
//! - `q8`, `int4`, `mxfp4` with f32 activations: per 32-column block, in order and including the padding of the last, that sum over
//!   integers `w`; then `total = fma(sum·unit, scale, total)`. `unit` is ½ for `mxfp4`, whose integers are twice the e2m1 values,
//!   and 1 for the others.
//! - `q8`, `int4`, `mxfp4` with int8 activations: per 32-column block `g` the dot product of integers, exact; then
//!   `s[g mod 2] = fma(dot, scale·(xscale·unit), s[g mod 2])`; the result is `s0 + s1`.
//!
//! - `q4`, `q3`, `q2` with f32 activations: per block of 32, 16 or 16 columns, in order, that sum over integers `w = C[n] + o`;
//!   then `total = fma(sum·2^17, s/2^17, total)`; the result is `total·S`. With int8 activations: per block `b` the dot product of
//!   integers, exact; then `s[b mod 2] = fma(dot, (s/2^17)·(xscale·2^17), s[b mod 2])`; the result is `(s0 + s1)·S`. The `quant`
//!   module defines the symbols; the factor 2^17 brings `s` into binary16's range.
//!
//! **`dot`**: `s[k mod 32] = fma(a[k], b[k], s[k mod 32])`; then 32 lanes are folded in halves, `s[i] + s[i + 16]`,
//! `s[i] + s[i + 8]`, down to one. **`axpy`**: `y[i] = fma(a, x[i], y[i])`.
//!
//! **Attention** reads every cached number as the f32 that it represents (`kv` module) and continues as if the cache held that. The
//! keys that a query sees are cut by position into blocks at multiples of [`KEY_BLOCK`]. Each block is computed by itself, and the
//! blocks are combined in ascending order: online softmax (arXiv:1805.02867) over blocks, as in FlashAttention (arXiv:2205.14135).
//! So keys can be distributed over threads, pages and instructions in any way that keeps blocks whole. Keys that are *chosen* are
//! cut by their place in the ascending list of chosen keys, not by position.
//!
//! - For a block `b` with query `q`, keys `k` and values `v`: `s[j] = dot(q, k[j])·scale`, rounded twice; `m_b = max s[j]`; `p[j] =
//!   exp(s[j] - m_b)` with the crate's own `exp`; `l_b = Σ p[j]`, where the key at place `i` of its whole block is added in lane `i
//!   mod 16`, and the lanes are folded in halves like those of `dot`; `o_b = Σ p[j]·v[j]` for `j` ascending, one `fma(p[j], v[j],
//!   o_b)` each.
//! - A query begins with `m = -∞`, `l = 0`, `o = 0`. With each block `m' = max(m, m_b)`, `α = exp(m - m')`,
//!   `β = exp(m_b - m')`, `l' = fma(l, α, l_b·β)`, `o' = fma(o, α, o_b·β)`.
//! - A sink, a logit without a value, comes after all blocks, like a block with `m_b = sink`, `l_b = 1` and no values: `o' = o·α`.
//! - The result is `o / l`. A query that sees no key and has no sink gets zeros.
//!
//! No comparison finds NaN larger, so NaN is never a maximum; but every sum or product with it is NaN, even times 0. So a NaN in a
//! key makes the whole result NaN, and a NaN in a value makes its column NaN. The weight of a score of `-∞` is 0, whatever the
//! maximum: if a maximum is `-∞`, 0 is subtracted instead of it. A query that sees only scores of `-∞` gets NaN, because `0 / 0` is
//! NaN; so does a query that sees `+∞`.

use crate::activations::{Activations, QuantisedBlock};
use crate::attention::{KEY_BLOCK, KeyBlock, Part};
use crate::kv::{KvRows, Row};
use crate::math::exp;
use crate::matrix::{BLOCK, FP8_BLOCK, Group, ROW_GROUP, WeightType};
use crate::number::{E2M1_DOUBLED, bf16_to_f32, e4m3_over_256, e8m0_to_f32, f16_to_f32};
use crate::{grouped, quant};

/// One value per row of a group.
pub(crate) type Rows = [f32; ROW_GROUP];

/// Lanes of [`dot`].
pub(crate) const DOT_LANES: usize = 32;

/// The product of a row group with token `t`; `int8` chooses the integer form for blocked types.
pub(crate) fn group(w: &Group<'_>, x: &Activations, t: usize, int8: bool) -> Rows {
    match w.ty {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => columns(w, x.row(t), 0),
        WeightType::Fp8 => fp8(w, x.row(t)),
        WeightType::Q4 | WeightType::Q3 | WeightType::Q2 if int8 => quant::group_int8(w, x.quantised_row(t)),
        WeightType::Q4 | WeightType::Q3 | WeightType::Q2 => quant::group_f32(w, x.padded_row(t)),
        WeightType::Grouped(ty) if int8 => grouped::group_int8(ty, w, x.quantised_row(t)),
        WeightType::Grouped(ty) => grouped::group_f32(ty, w, x.padded_row(t)),
        _ if int8 => blocks_int8(w, x.quantised_row(t)),
        _ => blocks_f32(w, x.padded_row(t)),
    }
}

/// The sum over columns `first..first + x.len()`.
fn columns(w: &Group<'_>, x: &[f32], first: usize) -> Rows {
    let mut s = [[0.0; ROW_GROUP]; 4];
    for (i, &x) in x.iter().enumerate() {
        let column = column(w, first + i);
        for r in 0..ROW_GROUP {
            s[i % 4][r] = column[r].mul_add(x, s[i % 4][r]);
        }
    }
    fold4(&s)
}

pub(crate) fn fold4(s: &[Rows; 4]) -> Rows {
    std::array::from_fn(|r| (s[0][r] + s[1][r]) + (s[2][r] + s[3][r]))
}

/// The eight weights of column `k`; those of `fp8` divided by 256 and without their scale.
pub(crate) fn column(w: &Group<'_>, k: usize) -> Rows {
    let value = |r: usize| k * ROW_GROUP + r;
    let u16_at = |i: usize| u16::from_le_bytes([w.values[2 * i], w.values[2 * i + 1]]);
    match w.ty {
        WeightType::F32 => std::array::from_fn(|r| f32_at(w.values, value(r))),
        WeightType::F16 => std::array::from_fn(|r| f16_to_f32(u16_at(value(r)))),
        WeightType::Bf16 => std::array::from_fn(|r| bf16_to_f32(u16_at(value(r)))),
        WeightType::Fp8 => std::array::from_fn(|r| e4m3_over_256(w.values[value(r)])),
        _ => unreachable!("blocked types are read by blocks"),
    }
}

/// The `i`-th little-endian f32.
pub(crate) fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

fn fp8(w: &Group<'_>, x: &[f32]) -> Rows {
    let mut total = [0.0; ROW_GROUP];
    for (c, x) in x.chunks(FP8_BLOCK).enumerate() {
        let sum = columns(w, x, c * FP8_BLOCK);
        let scale = 256.0 * f32_at(w.scales, c);
        for r in 0..ROW_GROUP {
            total[r] = sum[r].mul_add(scale, total[r]);
        }
    }
    total
}

/// The integers of a blocked type, before the scale, are multiples of this unit.
pub(crate) fn unit(ty: WeightType) -> f32 {
    if ty == WeightType::Mxfp4 { 0.5 } else { 1.0 }
}

/// The scales of block `g`.
pub(crate) fn block_scales(w: &Group<'_>, g: usize) -> Rows {
    let u16_at = |i: usize| u16::from_le_bytes([w.scales[2 * i], w.scales[2 * i + 1]]);
    match w.ty {
        WeightType::Q8 => std::array::from_fn(|r| f16_to_f32(u16_at(g * ROW_GROUP + r))),
        WeightType::Int4 => std::array::from_fn(|r| bf16_to_f32(u16_at(g * ROW_GROUP + r))),
        WeightType::Mxfp4 => std::array::from_fn(|r| e8m0_to_f32(w.scales[g * ROW_GROUP + r])),
        _ => unreachable!("only blocked types have a scale per block"),
    }
}

/// The integers of column `k` of block `g`, one per row.
pub(crate) fn block_column(w: &Group<'_>, g: usize, k: usize) -> [i8; ROW_GROUP] {
    let (q, i) = (k / 4, k % 4);
    if w.ty == WeightType::Q8 {
        return std::array::from_fn(|r| w.values[g * 256 + q * 32 + r * 4 + i] as i8);
    }
    let codes = nibbles(w, g, k);
    if w.ty == WeightType::Int4 { codes.map(|c| c as i8 - 8) } else { codes.map(|c| E2M1_DOUBLED[c as usize]) }
}

/// The nibbles of column `k` of block `g`, one per row.
pub(crate) fn nibbles(w: &Group<'_>, g: usize, k: usize) -> [u8; ROW_GROUP] {
    let (q, i) = (k / 4, k % 4);
    std::array::from_fn(|r| {
        let byte = w.values[g * 128 + (q % 4) * 32 + r * 4 + i];
        if q < 4 { byte & 15 } else { byte >> 4 }
    })
}

fn blocks_f32(w: &Group<'_>, x: &[f32]) -> Rows {
    let unit = unit(w.ty);
    let mut total = [0.0; ROW_GROUP];
    for (g, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
        let mut s = [[0.0; ROW_GROUP]; 4];
        for (k, &x) in x.iter().enumerate() {
            let column = block_column(w, g, k);
            for r in 0..ROW_GROUP {
                s[k % 4][r] = f32::from(column[r]).mul_add(x, s[k % 4][r]);
            }
        }
        let (sum, scale) = (fold4(&s), block_scales(w, g));
        for r in 0..ROW_GROUP {
            total[r] = (sum[r] * unit).mul_add(scale[r], total[r]);
        }
    }
    total
}

fn blocks_int8(w: &Group<'_>, x: &[QuantisedBlock]) -> Rows {
    let unit = unit(w.ty);
    let mut s = [[0.0; ROW_GROUP]; 2];
    for (g, x) in x.iter().enumerate() {
        let mut dot = [0i32; ROW_GROUP];
        for k in 0..BLOCK {
            let x = x.words[k / 4].to_le_bytes()[k % 4] as i8;
            let column = block_column(w, g, k);
            for r in 0..ROW_GROUP {
                dot[r] += i32::from(column[r]) * i32::from(x);
            }
        }
        let (scale, x_scale) = (block_scales(w, g), x.scale * unit);
        for r in 0..ROW_GROUP {
            s[g % 2][r] = (dot[r] as f32).mul_add(scale[r] * x_scale, s[g % 2][r]);
        }
    }
    std::array::from_fn(|r| s[0][r] + s[1][r])
}

pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; DOT_LANES];
    for (k, (&a, &b)) in a.iter().zip(b).enumerate() {
        lanes[k % DOT_LANES] = a.mul_add(b, lanes[k % DOT_LANES]);
    }
    fold_lanes(lanes)
}

/// Folds the lanes of [`dot`] in halves.
#[inline]
pub(crate) fn fold_lanes(mut lanes: [f32; DOT_LANES]) -> f32 {
    let mut half = DOT_LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

/// [`dot`] of `a` with the beginning of a cached row.
pub(crate) fn row_dot(a: &[f32], rows: &KvRows<'_>, j: usize) -> f32 {
    let row: Row<'_> = rows.row(j, a.len());
    let mut lanes = [0.0; DOT_LANES];
    for (k, &a) in a.iter().enumerate() {
        lanes[k % DOT_LANES] = a.mul_add(row.value(rows.ty(), k), lanes[k % DOT_LANES]);
    }
    fold_lanes(lanes)
}

/// The state of a query after the blocks so far: `m` and `l` of the definition above; `o` is kept beside them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Running {
    /// The state before the first block.
    pub(crate) const NONE: Self = Running { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Adds `m_b` and `l_b`, and returns `α` and `β`.
    #[inline(always)]
    pub(crate) fn combine(&mut self, block: Running) -> [f32; 2] {
        let max = if block.max > self.max { block.max } else { self.max };
        let zero = or_zero(max);
        let [alpha, beta] = [exp(self.max - zero), exp(block.max - zero)];
        *self = Running { max, sum: self.sum.mul_add(alpha, block.sum * beta) };
        [alpha, beta]
    }
}

/// The number that is subtracted from scores whose maximum is `max`.
#[inline(always)]
pub(crate) fn or_zero(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Lanes of the sum of a block's weights.
pub(crate) const WEIGHT_LANES: usize = 16;

/// Turns the scores of a block into weights `p`, and returns `m_b` and `l_b`. Places that the query does not see have `-∞`.
#[inline(always)]
pub(crate) fn weigh(scores: &mut [f32; KEY_BLOCK]) -> Running {
    let mut lanes = [f32::NEG_INFINITY; WEIGHT_LANES];
    for scores in scores.as_chunks::<WEIGHT_LANES>().0 {
        for i in 0..WEIGHT_LANES {
            lanes[i] = if scores[i] > lanes[i] { scores[i] } else { lanes[i] };
        }
    }
    let mut half = WEIGHT_LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    let max = lanes[0];
    let zero = or_zero(max);
    let mut lanes = [0.0; WEIGHT_LANES];
    for scores in scores.as_chunks_mut::<WEIGHT_LANES>().0 {
        for i in 0..WEIGHT_LANES {
            scores[i] = exp(scores[i] - zero);
            lanes[i] += scores[i];
        }
    }
    let mut half = WEIGHT_LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    Running { max, sum: lanes[0] }
}

/// One query meets the rows of a block that it sees: the definition above, step by step.
pub(crate) fn attend_block(
    query: &[f32],
    block: &KeyBlock<'_>,
    seen: Part,
    scale: f32,
    running: &mut Running,
    out: &mut [f32],
) {
    let mut p = [f32::NEG_INFINITY; KEY_BLOCK];
    for row in seen.rows() {
        p[block.place(row)] = row_dot(query, &block.keys, row) * scale;
    }
    let [alpha, beta] = running.combine(weigh(&mut p));
    for (column, out) in out.iter_mut().enumerate() {
        let mut sum = 0.0;
        for row in seen.rows() {
            let value = block.values.part(block.values.ty(), row, column, 1).value(block.values.ty(), 0);
            sum = p[block.place(row)].mul_add(value, sum);
        }
        *out = out.mul_add(alpha, sum * beta);
    }
}

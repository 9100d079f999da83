//! The specification of products with `q4`, `q3` and `q2`, in the order that the `scalar` module documents.

use super::codebook::{Codebook, UNIT, place, scale_over_unit};
use crate::activations::QuantisedBlock;
use crate::matrix::{BLOCK, Group, ROW_GROUP, WeightType};
use crate::scalar::{Rows, f32_at, fold4, nibbles};

/// The scale of each row.
fn row_scales(w: &Group<'_>) -> Rows {
    std::array::from_fn(|r| f32_at(w.scales, r))
}

/// The byte of each row for its `b`-th block.
fn block_bytes(w: &Group<'_>, b: usize) -> [u8; ROW_GROUP] {
    std::array::from_fn(|r| w.scales[(4 + b) * ROW_GROUP + r])
}

/// The level numbers of column `k`, one per row.
fn level_numbers(w: &Group<'_>, k: usize) -> [u8; ROW_GROUP] {
    let (g, k) = (k / BLOCK, k % BLOCK);
    if w.ty == WeightType::Q4 {
        return nibbles(w, g, k);
    }
    let (vector, i, high) = (k / 4 % 4, k % 4, k / 16 * 4);
    if w.ty == WeightType::Q2 {
        let word =
            |r: usize| u32::from_le_bytes(*w.values[g * 64 + k / 16 * 32 + r * 4..].first_chunk().expect("a word"));
        return std::array::from_fn(|r| (word(r).rotate_right(2 * place(k) as u32) & 15) as u8);
    }
    std::array::from_fn(|r| {
        let nibble = |v: usize| w.values[g * 96 + v * 32 + r * 4 + i] >> high & 15;
        // Three vectors hold three bits per nibble; their unused bits are the fourth vector.
        if vector < 3 { nibble(vector) & 7 } else { nibble(0) >> 3 | nibble(1) >> 3 << 1 | nibble(2) >> 3 << 2 }
    })
}

/// The integers of column `k`: level plus offset.
fn integers(w: &Group<'_>, book: &Codebook, bytes: &[u8; ROW_GROUP], k: usize) -> [i32; ROW_GROUP] {
    let numbers = level_numbers(w, k);
    std::array::from_fn(|r| i32::from(book.levels[usize::from(numbers[r])]) + book.offset(bytes[r]))
}

/// A row group times a padded row of f32.
pub(crate) fn group_f32(w: &Group<'_>, x: &[f32]) -> Rows {
    let book = Codebook::of(w.ty);
    let mut total = [0.0; ROW_GROUP];
    for (b, x) in x.chunks_exact(book.block).enumerate() {
        let bytes = block_bytes(w, b);
        let mut s = [[0.0; ROW_GROUP]; 4];
        for (k, &x) in x.iter().enumerate() {
            let column = integers(w, book, &bytes, b * book.block + k);
            for r in 0..ROW_GROUP {
                s[k % 4][r] = (column[r] as f32).mul_add(x, s[k % 4][r]);
            }
        }
        let sum = fold4(&s);
        for r in 0..ROW_GROUP {
            total[r] = (sum[r] * UNIT).mul_add(scale_over_unit(bytes[r]), total[r]);
        }
    }
    let scales = row_scales(w);
    std::array::from_fn(|r| total[r] * scales[r])
}

/// A row group times a row of int8.
pub(crate) fn group_int8(w: &Group<'_>, x: &[QuantisedBlock]) -> Rows {
    let book = Codebook::of(w.ty);
    let mut s = [[0.0; ROW_GROUP]; 2];
    for b in 0..x.len() * BLOCK / book.block {
        let (bytes, g) = (block_bytes(w, b), b * book.block / BLOCK);
        let mut dot = [0i32; ROW_GROUP];
        for k in b * book.block..(b + 1) * book.block {
            let x = x[g].words[k % BLOCK / 4].to_le_bytes()[k % 4] as i8;
            let column = integers(w, book, &bytes, k);
            for r in 0..ROW_GROUP {
                dot[r] += column[r] * i32::from(x);
            }
        }
        let x_scale = x[g].scale_times_unit;
        for r in 0..ROW_GROUP {
            s[b % 2][r] = (dot[r] as f32).mul_add(scale_over_unit(bytes[r]) * x_scale, s[b % 2][r]);
        }
    }
    let scales = row_scales(w);
    std::array::from_fn(|r| (s[0][r] + s[1][r]) * scales[r])
}

/// The numbers of column `k`, rounded once.
pub(crate) fn unpack_column(w: &Group<'_>, k: usize) -> Rows {
    let book = Codebook::of(w.ty);
    let (bytes, scales) = (block_bytes(w, k / book.block), row_scales(w));
    let column = integers(w, book, &bytes, k);
    std::array::from_fn(|r| scales[r] * (UNIT * scale_over_unit(bytes[r]) * column[r] as f32))
}

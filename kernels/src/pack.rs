//! Packing of row groups and unpacking of matrices, in scalar code.
//!
//! The converter checks the shapes of its input and reports errors; a wrong length here is a bug, and panics.

use crate::interleave::interleave;
use crate::math::ROUND;
use crate::matrix::{BLOCK, FP8_BLOCK, Group, Matrix, ROW_GROUP, WeightType};
use crate::number::{E2M1, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::{grouped, quant, scalar};

/// The two planes of a zeroed row group.
pub(crate) fn planes(ty: WeightType, n_rows: usize, cols: usize, src: usize, out: &mut [u8]) -> (&mut [u8], &mut [u8]) {
    assert!(n_rows <= ROW_GROUP, "a row group holds {ROW_GROUP} rows, not {n_rows}");
    assert_eq!(Some(src), n_rows.checked_mul(cols), "{n_rows} rows of {cols} columns");
    let planes = ty.planes(cols).expect("the source would not fit in memory either");
    assert_eq!(out.len(), planes.total, "bytes of a row group");
    out.fill(0);
    let (scales, values) = out.split_at_mut(planes.scales_padded);
    (&mut scales[..planes.scales], &mut values[..planes.values])
}

/// Packs one row group of type `f32`, `f16`, `bf16`, `q8`, `q4`, `q3` or `q2`.
///
/// `src` is row-major `[n_rows, cols]` with `n_rows ≤ 8`; missing rows become zero. `out` is all of the group,
/// [`row_group_len`](crate::row_group_len) bytes. `f16` and `bf16` round to nearest, ties to even.
///
/// `q8`: per row and 32 columns `scale = absmax/127` rounded to f16, `q = round_ties_even(w/scale)` within ±127. A block of zeros
/// has scale 0. If the rounded scale would clamp the largest weight, which can happen with subnormal scales, the next larger f16 is
/// used. Scales beyond f16 become its largest number, and weights beyond that saturate. A block with a NaN or an infinity has scale
/// NaN, so it cannot be mistaken for numbers.
///
/// `q4`, `q3` and `q2`: like [`pack_row_group_weighted`](crate::pack_row_group_weighted) with equal importance for all columns.
///
/// # Panics
/// For other types, more than 8 rows, or lengths that do not fit the shape.
pub fn pack_row_group(ty: WeightType, src: &[f32], n_rows: usize, cols: usize, out: &mut [u8]) {
    if ty.is_fitted() {
        return quant::pack_unweighted(ty, src, n_rows, cols, out);
    }
    let (scales, values) = planes(ty, n_rows, cols, src.len(), out);
    for r in 0..n_rows {
        let row = &src[r * cols..][..cols];
        match ty {
            WeightType::F32 => {
                let slots = values.as_chunks_mut::<4>().0.iter_mut().skip(r).step_by(ROW_GROUP);
                slots.zip(row).for_each(|(slot, w)| *slot = w.to_le_bytes());
            }
            WeightType::F16 | WeightType::Bf16 => {
                let narrow = if ty == WeightType::F16 { f32_to_f16 } else { f32_to_bf16 };
                let slots = values.as_chunks_mut::<2>().0.iter_mut().skip(r).step_by(ROW_GROUP);
                slots.zip(row).for_each(|(slot, &w)| *slot = narrow(w).to_le_bytes());
            }
            WeightType::Q8 => {
                for (g, block) in row.chunks(BLOCK).enumerate() {
                    let scale = q8_scale(block);
                    scales[(g * ROW_GROUP + r) * 2..][..2].copy_from_slice(&scale.to_le_bytes());
                    let scale = f16_to_f32(scale);
                    let block = q8_values(block, scale);
                    for (q, &four) in block.as_chunks::<4>().0.iter().enumerate() {
                        values[g * 256 + q * 32 + r * 4..][..4].copy_from_slice(&four);
                    }
                }
            }
            _ => panic!("{ty:?} is carried, not made from f32"),
        }
    }
}

/// The f16 bits of a block's scale.
pub(crate) fn q8_scale(block: &[f32]) -> u16 {
    const LARGEST: u16 = 0x7bff;
    const NAN: u16 = 0x7e00;
    if block.iter().any(|w| !w.is_finite()) {
        return NAN;
    }
    let absmax = block.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    if absmax == 0.0 {
        return 0;
    }
    let nearest = f32_to_f16(absmax / 127.0).min(LARGEST);
    // Half a step beyond ±127 still rounds to it.
    if nearest < LARGEST && f16_to_f32(nearest) * 127.5 < absmax { nearest + 1 } else { nearest }
}

/// The bytes of a block, with zeros beyond its end.
pub(crate) fn q8_values(block: &[f32], scale: f32) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    if scale != 0.0 && !scale.is_nan() {
        for (byte, &w) in bytes.iter_mut().zip(block) {
            // Clamps before rounding: the bounds are integers, so the order does not matter, and ROUND needs it.
            let i = ((w / scale).clamp(-127.0, 127.0) + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            *byte = i as i8 as u8;
        }
    }
    bytes
}

/// Packs one row group of `f16` or `bf16` bits, unchanged. `src` is row-major `[n_rows, cols]`.
///
/// # Panics
/// For more than 8 rows, or lengths that do not fit the shape.
pub fn pack_row_group_u16(src: &[u16], n_rows: usize, cols: usize, out: &mut [u8]) {
    let (_, values) = planes(WeightType::Bf16, n_rows, cols, src.len(), out);
    interleave(src, cols, values.as_chunks_mut::<2>().0, u16::to_le_bytes);
}

/// Packs one row group of e4m3 codes, unchanged. `codes` is row-major `[n_rows, cols]`, `scales` has one multiplier per
/// 128 columns.
///
/// # Panics
/// For more than 8 rows, or lengths that do not fit the shape.
pub fn pack_row_group_fp8(codes: &[u8], n_rows: usize, cols: usize, scales: &[f32], out: &mut [u8]) {
    assert_eq!(scales.len(), cols.div_ceil(FP8_BLOCK), "one scale per {FP8_BLOCK} columns");
    let (scale_plane, values) = planes(WeightType::Fp8, n_rows, cols, codes.len(), out);
    for (slot, scale) in scale_plane.as_chunks_mut::<4>().0.iter_mut().zip(scales) {
        *slot = scale.to_le_bytes();
    }
    interleave(codes, cols, values, |code| code);
}

/// Packs one row group of 8-bit integers, unchanged. `codes` is row-major `[n_rows, cols]`, two's complement; `scales_f16` is
/// `[n_rows, ceil(cols / 32)]`, the bytes of f16 numbers.
///
/// # Panics
/// For more than 8 rows, or lengths that do not fit the shape.
pub fn pack_row_group_q8(codes: &[u8], n_rows: usize, cols: usize, scales_f16: &[u8], out: &mut [u8]) {
    let blocks = cols.div_ceil(BLOCK);
    assert_eq!(scales_f16.len(), 2 * n_rows * blocks, "one scale per row and {BLOCK} columns");
    let (scales, values) = planes(WeightType::Q8, n_rows, cols, codes.len(), out);
    for r in 0..n_rows {
        let row = &codes[r * cols..][..cols];
        for (g, scale) in scales_f16.as_chunks::<2>().0[r * blocks..][..blocks].iter().enumerate() {
            scales[(g * ROW_GROUP + r) * 2..][..2].copy_from_slice(scale);
        }
        for (g, block) in row.chunks(BLOCK).enumerate() {
            for (q, four) in block.chunks(4).enumerate() {
                values[g * 256 + q * 32 + r * 4..][..four.len()].copy_from_slice(four);
            }
        }
    }
}

/// Packs one row group of 4-bit integers. `nibbles` is row-major `[n_rows, cols]`, one `value + 8` in 0..16 per byte;
/// `scales_bf16` is `[n_rows, ceil(cols / 32)]`, the bits of bf16 numbers.
///
/// # Panics
/// For more than 8 rows, lengths that do not fit the shape, or a value of 16 or more.
pub fn pack_row_group_int4(nibbles: &[u8], n_rows: usize, cols: usize, scales_bf16: &[u16], out: &mut [u8]) {
    let blocks = cols.div_ceil(BLOCK);
    assert_eq!(scales_bf16.len(), n_rows * blocks, "one scale per row and {BLOCK} columns");
    let (scales, values) = planes(WeightType::Int4, n_rows, cols, nibbles.len(), out);
    // Zero is nibble 8, also in padding.
    values.fill(0x88);
    for r in 0..n_rows {
        for g in 0..blocks {
            scales[(g * ROW_GROUP + r) * 2..][..2].copy_from_slice(&scales_bf16[r * blocks + g].to_le_bytes());
        }
    }
    put_nibbles(nibbles, n_rows, cols, values);
}

/// Packs one row group of e2m1 codes. `codes` is row-major `[n_rows, cols]`, one code in 0..16 per byte; `scales` is
/// `[n_rows, ceil(cols / 32)]` e8m0 codes.
///
/// # Panics
/// For more than 8 rows, lengths that do not fit the shape, or a code of 16 or more.
pub fn pack_row_group_mxfp4(codes: &[u8], n_rows: usize, cols: usize, scales: &[u8], out: &mut [u8]) {
    let blocks = cols.div_ceil(BLOCK);
    assert_eq!(scales.len(), n_rows * blocks, "one scale per row and {BLOCK} columns");
    let (scale_plane, values) = planes(WeightType::Mxfp4, n_rows, cols, codes.len(), out);
    for r in 0..n_rows {
        for g in 0..blocks {
            scale_plane[g * ROW_GROUP + r] = scales[r * blocks + g];
        }
    }
    put_nibbles(codes, n_rows, cols, values);
}

pub(crate) fn put_nibbles(nibbles: &[u8], n_rows: usize, cols: usize, values: &mut [u8]) {
    const HALF: usize = BLOCK / 2;
    assert!(nibbles.iter().fold(0, |all, nibble| all | nibble) < 16, "more than four bits");
    for r in 0..n_rows {
        let (blocks, rest) = nibbles[r * cols..][..cols].as_chunks::<BLOCK>();
        for (block, out) in blocks.iter().zip(values.chunks_exact_mut(HALF * ROW_GROUP)) {
            let bytes: [u8; HALF] = std::array::from_fn(|j| block[j] | block[j + HALF] << 4);
            for (word, out) in bytes.as_chunks::<4>().0.iter().zip(out.chunks_exact_mut(4 * ROW_GROUP)) {
                out[4 * r..][..4].copy_from_slice(word);
            }
        }
        // Codes beyond the end of a row stay zero.
        for (k, &nibble) in rest.iter().enumerate() {
            let byte = &mut values[blocks.len() * HALF * ROW_GROUP + k % HALF / 4 * 4 * ROW_GROUP + r * 4 + k % 4];
            *byte = if k < HALF { *byte & 0xf0 | nibble } else { *byte & 0x0f | nibble << 4 };
        }
    }
}

/// The numbers that a matrix represents, row-major `[rows, cols]`, rounded to f32 where a product is not exact.
pub fn unpack(w: Matrix<'_>) -> Vec<f32> {
    let mut out = vec![0.0; w.rows() * w.cols()];
    unpack_into(w, &mut out);
    out
}

/// As [`unpack`], into a buffer.
///
/// # Panics
/// If `out` does not have one number for each of the matrix.
pub fn unpack_into(w: Matrix<'_>, out: &mut [f32]) {
    let (rows, cols) = (w.rows(), w.cols());
    assert_eq!(Some(out.len()), rows.checked_mul(cols), "one number for each of {rows} × {cols}");
    for g in 0..w.groups() {
        let group = w.group(g);
        let first = g * ROW_GROUP;
        let n_rows = (rows - first).min(ROW_GROUP);
        for k in 0..cols {
            let column = unpack_column(&group, k);
            for r in 0..n_rows {
                out[(first + r) * cols + k] = column[r];
            }
        }
    }
}

/// Row `row` of a matrix, as [`unpack`] gives it: `out` has one number per column.
///
/// # Panics
/// If there is no such row, or `out.len() != w.cols()`.
pub fn unpack_row(w: Matrix<'_>, row: usize, out: &mut [f32]) {
    assert!(row < w.rows(), "row {row} of {}", w.rows());
    assert_eq!(out.len(), w.cols(), "one number per column");
    let (group, r) = (w.group(row / ROW_GROUP), row % ROW_GROUP);
    match w.ty() {
        WeightType::Grouped(ty) => grouped::unpack_row(ty, &group, r, out),
        _ => out.iter_mut().enumerate().for_each(|(k, out)| *out = unpack_column(&group, k)[r]),
    }
}

fn unpack_column(w: &Group<'_>, k: usize) -> scalar::Rows {
    match w.ty {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => scalar::column(w, k),
        WeightType::Q4 | WeightType::Q3 | WeightType::Q2 => quant::unpack_column(w, k),
        WeightType::Grouped(ty) => grouped::unpack_column(ty, w, k),
        WeightType::Fp8 => {
            let scale = scalar::f32_at(w.scales, k / FP8_BLOCK);
            scalar::column(w, k).map(|v| v * 256.0 * scale)
        }
        WeightType::Mxfp4 => {
            // Not through the integers, which have no negative zero.
            let (scales, codes) = (scalar::block_scales(w, k / BLOCK), scalar::nibbles(w, k / BLOCK, k % BLOCK));
            std::array::from_fn(|r| E2M1[codes[r] as usize] * scales[r])
        }
        WeightType::Q8 | WeightType::Int4 => {
            let (scales, values) = (scalar::block_scales(w, k / BLOCK), scalar::block_column(w, k / BLOCK, k % BLOCK));
            std::array::from_fn(|r| f32::from(values[r]) * scales[r])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding by addition gives the same bits as `round_ties_even`, including ties, signs and saturation.
    #[test]
    fn q8_rounds_to_nearest_even() {
        let plain = |w: f32, scale: f32| (w / scale).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
        let edges = (-300..300).map(|i| i as f32 / 2.0).chain([0.0, -0.0, 1e-40, -1e-40, f32::MAX, f32::MIN]);
        let near =
            edges.flat_map(|w| [w, f32::from_bits(w.to_bits() + 1), f32::from_bits(w.to_bits().saturating_sub(1))]);
        let values: Vec<f32> = near.filter(|w| w.is_finite()).collect();
        for scale in [1.0, 0.25, 6e-8, 65504.0, 0.3] {
            for block in values.chunks(BLOCK) {
                let bytes = q8_values(block, scale);
                assert!(block.iter().zip(bytes).all(|(&w, byte)| byte == plain(w, scale)), "{block:?} / {scale}");
            }
        }
        assert_eq!(q8_values(&[1.0; BLOCK], 0.0), [0; BLOCK]);
        assert_eq!(q8_values(&[1.0; BLOCK], f32::NAN), [0; BLOCK]);
    }

    #[test]
    fn one_row_is_a_row_of_all() {
        for ty in WeightType::all() {
            let (rows, cols) = (11, 256);
            let len = crate::packed_len(ty, rows, cols).unwrap();
            let bytes: Vec<u8> = (0..len).map(|i| (i * i * 31 + i * 7 + i / 251) as u8).collect();
            let matrix = Matrix::new(ty, rows, cols, &bytes).unwrap();
            let all = unpack(matrix);
            let mut one = vec![0.0; cols];
            for (row, expected) in all.chunks_exact(cols).enumerate() {
                unpack_row(matrix, row, &mut one);
                assert!(one.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{ty} row {row}");
            }
        }
    }
}

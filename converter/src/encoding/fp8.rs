//! e4m3 codes with scales: per block as in DeepSeek's checkpoints, per row and group of columns, per row, or one for the tensor.
//! Scales of DeepSeek-V4 and of MXFP8 are powers of two.

use std::sync::Arc;

use sluice_format::{FP8_BLOCK, ROW_GROUP, WeightType};
use sluice_kernels as kernels;
use sluice_weights::ScaleType;

use super::checks::{dtype_error, shape_error};
use super::grouped::{Code, Grouped, scale_values, wide_scale};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::fp8::{self, SCALE_BLOCK};
use crate::source::Checkpoint;

/// Most parts of a matrix with blocks of their own.
const MOST_SHARDS: usize = 64;

/// Columns that share a scale in MXFP8.
const MX_BLOCK: usize = 32;

/// Where the scales of an fp8 tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fp8 {
    scales: usize,
    scale_type: ScaleType,
    /// Rows of one matrix of a stack, or of one part of a matrix; the blocks of each start at its first row.
    matrix_rows: usize,
    /// Rows and columns that share one scale.
    block: [usize; 2],
    /// Scales of one matrix: rows and columns of them.
    grid: [usize; 2],
}

/// Derives the meaning of the scales from their shape. If no two rows share a scale, they are groups like those of other codes.
pub(super) fn resolve(
    checkpoint: &Checkpoint,
    block: [usize; 2],
    shape: &[usize],
    scales: usize,
) -> Result<Arc<dyn Encoding>, ConvertError> {
    let [stack @ .., rows, cols] = shape else { return Err(shape_error(checkpoint, scales, shape)) };
    let found = checkpoint.tensors[scales].shape.as_slice();
    let dtype = &checkpoint.tensors[scales].dtype;
    let is_power = matches!(dtype.name(), "U8" | "F8_E8M0");
    let scale_type = wide_scale(dtype).or(is_power.then_some(ScaleType::E8m0));
    let scale_type = scale_type.ok_or_else(|| dtype_error(checkpoint, scales, "BF16, F16, F32 and F8_E8M0"))?;
    let with = |grid: [usize; 2], block: [usize; 2]| -> Result<Arc<dyn Encoding>, ConvertError> {
        if block[0] == 1 && *rows > 1 && cols.is_multiple_of(block[1]) {
            let (code, group, cols) = (Code::E4m3, block[1], *cols);
            return Ok(Arc::new(Grouped {
                code,
                group,
                cols,
                scales,
                scale_type,
                biases: None,
                zeros: None,
                global: None,
            }));
        }
        Ok(Arc::new(Fp8 { scales, scale_type, matrix_rows: *rows, block: block.map(|n| n.max(1)), grid }))
    };
    // OCP MX: a power of two per 32 columns.
    if is_power && found == [stack, &[*rows, cols.div_ceil(MX_BLOCK)]].concat() {
        return with([*rows, cols.div_ceil(MX_BLOCK)], [1, MX_BLOCK]);
    }
    let blocks = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    if found == [stack, &blocks].concat() {
        return with(blocks, block);
    }
    if found == [stack, &[*rows, 1]].concat() || found == [stack, &[*rows]].concat() {
        return with([*rows, 1], [1, *cols]);
    }
    if stack.is_empty() && (found.is_empty() || found == [1] || found == [1, 1]) {
        return with([1, 1], [*rows, *cols]);
    }
    if let ([shards], []) = (shards(*rows, block[0], found, blocks[1]).as_slice(), stack) {
        let grid = [found[0] / shards, blocks[1]];
        let (block, matrix_rows) = (block.map(|n| n.max(1)), rows / shards);
        return Ok(Arc::new(Fp8 { scales, scale_type, matrix_rows, block, grid }));
    }
    Err(shape_error(checkpoint, scales, &[stack, &blocks].concat()))
}

/// Numbers of parts, two or more, into which a matrix could be divided so that its scales have the shape `found`. The parts are
/// equal and consecutive, and each has blocks of its own. MiMo-V2.5 stores its fused attention like that.
fn shards(rows: usize, block_rows: usize, found: &[usize], block_cols: usize) -> Vec<usize> {
    let [of_rows, of_cols] = *found else { return Vec::new() };
    if of_cols != block_cols {
        return Vec::new();
    }
    let fits = |&shards: &usize| {
        let (each, rest) = (rows / shards, rows % shards);
        rest == 0 && each > block_rows && each.div_ceil(block_rows.max(1)).checked_mul(shards) == Some(of_rows)
    };
    (2..=MOST_SHARDS).filter(fits).collect()
}

impl Fp8 {
    /// Index of an element's scale.
    fn index(&self, (row, col): (usize, usize)) -> usize {
        let (matrix, row) = (row / self.matrix_rows, row % self.matrix_rows);
        (matrix * self.grid[0] + row / self.block[0]) * self.grid[1] + col / self.block[1]
    }

    /// Whether every tile of 8 rows and 128 columns, which has one scale in the file, has only one scale in the source.
    fn fits_tiles(&self, selection: &Selection, [batch, rows, cols]: [usize; 3]) -> bool {
        let s = &selection.strides;
        // The common case: 8 divides the rows of a block, so row groups that begin at multiples of 8 of untransposed rows never
        // cross its border.
        let eights = |n: usize| n.is_multiple_of(selection.cols * ROW_GROUP);
        let [block_rows, block_cols] = self.block;
        let grid = block_rows.is_multiple_of(ROW_GROUP) && self.matrix_rows.is_multiple_of(ROW_GROUP);
        let same_rows = s.row_step == selection.cols && s.col_step == 1 && s.run.is_multiple_of(ROW_GROUP);
        if grid && block_cols.is_multiple_of(FP8_BLOCK) && same_rows && eights(s.start) && eights(s.run_step) {
            return true;
        }
        let scale = |row, col| self.index(selection.locate(row, col));
        (0..batch).all(|b| {
            (0..rows).step_by(ROW_GROUP).all(|first| {
                let group = first..(first + ROW_GROUP).min(rows);
                (0..cols).step_by(FP8_BLOCK).all(|c| {
                    let of_tile = scale(b * rows + first, c);
                    let last_col = (c + FP8_BLOCK).min(cols) - 1;
                    group.clone().all(|r| {
                        let row = b * rows + r;
                        scale(row, c) == of_tile && scale(row, last_col) == of_tile
                    })
                })
            })
        })
    }
}

impl Encoding for Fp8 {
    fn others(&self) -> Vec<usize> {
        vec![self.scales]
    }

    fn carried(&self) -> Option<WeightType> {
        Some(WeightType::Fp8)
    }

    fn fits(&self, selection: &Selection, shape: [usize; 3]) -> bool {
        self.fits_tiles(selection, shape)
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        let scales = scale_values(self.scale_type, &reader.all(self.scales)?);
        // A scale whose product with the largest code overflows is as bad as an infinite one.
        if scales.iter().any(|s| !(s * fp8::E4M3_MAX).is_finite()) {
            return Err(reader.not_finite(self.scales));
        }
        Ok(Box::new(Fp8Decoder { layout: self, selection, scales }))
    }
}

struct Fp8Decoder<'s> {
    layout: &'s Fp8,
    selection: &'s Selection,
    scales: Vec<f32>,
}

impl Fp8Decoder<'_> {
    /// The scale of an element.
    fn scale(&self, row: usize, col: usize) -> f32 {
        self.scales[self.layout.index(self.selection.locate(row, col))]
    }
}

impl Decoder for Fp8Decoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        out.clear();
        for (r, codes) in reader.raw(self.selection, 1, rows)?.chunks_exact(rows.cols).enumerate() {
            let scale = |c| self.scale(rows.first + r, c);
            out.extend(codes.iter().enumerate().map(|(c, &code)| fp8::E4M3[code as usize] * scale(c)));
        }
        Ok(())
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let codes = reader.raw(self.selection, 1, rows)?;
        let finite = !codes.iter().any(|&c| fp8::is_nan(c));
        let mut scales = Vec::new();
        for (g, codes) in codes.chunks(ROW_GROUP * rows.cols).enumerate() {
            // Each tile of the group lies in one source block, so any element of the tile has its scale.
            let row = rows.first + g * ROW_GROUP;
            scales.clear();
            scales.extend((0..rows.cols).step_by(SCALE_BLOCK).map(|c| self.scale(row, c)));
            kernels::pack_row_group_fp8(codes, codes.len() / rows.cols, rows.cols, &scales, groups.slot(g));
        }
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        reader.raw(self.selection, 1, rows).map(drop)
    }
}

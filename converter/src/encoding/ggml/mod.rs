//! The blocks of GGUF files: every row consists of whole blocks of a [`GgmlType`].

mod blocks;
mod values;

use sluice_format::{ROW_GROUP, WeightType};
use sluice_kernels as kernels;
use sluice_kernels::{bf16_to_f32, f16_to_f32};
use sluice_weights::{Grouped, ScaleType, Scales};

use self::blocks::Canonical;
use super::checks::{dtype_error, shape_error};
use super::lines::{Lines, pick, pieces};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::plan::form::Parts;
use crate::source::{Checkpoint, Dtype, GgmlType};

/// A matrix of blocks, or a stack of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ggml {
    ty: GgmlType,
    /// Bytes of a row.
    row_bytes: usize,
    /// The factors of NVFP4's scales, if there are any.
    factors: Option<Factors>,
}

/// One number for a tensor, or one for each matrix of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Factors {
    tensor: usize,
    /// Rows that share a factor.
    rows: usize,
}

/// The weight type with the same codes and scales; `None` for formats without blocks.
fn weight_type(ty: GgmlType) -> Option<WeightType> {
    match ty {
        GgmlType::Q8_0 => Some(WeightType::Q8),
        GgmlType::MXFP4 => Some(WeightType::Mxfp4),
        // TQ1_0 has the same numbers in fewer bytes, but no kernel could use that form.
        GgmlType::TQ1_0 => weight_type(GgmlType::TQ2_0),
        _ => {
            let name = ty.name().to_ascii_lowercase();
            let published = Grouped::PUBLISHED.iter().find(|(published, _)| *published == name);
            published.map(|(_, grouped)| WeightType::Grouped(*grouped))
        }
    }
}

/// Checks that a tensor has the bytes of its rows. `parts` are the tensor and, for NVFP4, the factors of its scales if it has them.
pub(super) fn resolve(
    checkpoint: &Checkpoint,
    shape: &[usize],
    parts: &Parts,
    ty: GgmlType,
) -> Result<Ggml, ConvertError> {
    let tensor = parts.tensors[0];
    let (cols, lead) = shape.split_last().expect("a view has columns");
    let rows = lead.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let row_bytes = ty.row_bytes(*cols).filter(|row| {
        let bytes = rows.and_then(|rows| rows.checked_mul(*row));
        bytes.is_some_and(|bytes| bytes as u64 == checkpoint.tensors[tensor].len)
    });
    let whole = cols.next_multiple_of(ty.block_cols());
    let row_bytes = row_bytes.ok_or_else(|| shape_error(checkpoint, tensor, &[lead, &[whole]].concat()))?;
    let factors = parts.tensors.get(1).map(|&scales| {
        if checkpoint.tensors[scales].dtype != Dtype::F32 {
            return Err(dtype_error(checkpoint, scales, "F32"));
        }
        let rows = rows.unwrap_or(0);
        let matrices = if lead.len() > 1 { lead[0] } else { 1 };
        match checkpoint.tensors[scales].shape.iter().product::<usize>() {
            1 => Ok(Factors { tensor: scales, rows: rows.max(1) }),
            n if n == matrices => Ok(Factors { tensor: scales, rows: (rows / matrices).max(1) }),
            _ => Err(shape_error(checkpoint, scales, &[matrices])),
        }
    });
    Ok(Ggml { ty, row_bytes, factors: factors.transpose()? })
}

impl Encoding for Ggml {
    fn others(&self) -> Vec<usize> {
        self.factors.iter().map(|factors| factors.tensor).collect()
    }

    fn carried(&self) -> Option<WeightType> {
        weight_type(self.ty)
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        let factors = self.factors.map(|factors| reader.floats(factors.tensor)).transpose()?.unwrap_or_default();
        if factors.iter().any(|factor| !factor.is_finite()) {
            return Err(reader.not_finite(self.factors.map_or(selection.tensor, |factors| factors.tensor)));
        }
        Ok(Box::new(GgmlDecoder { layout: *self, selection, factors }))
    }
}

struct GgmlDecoder<'s> {
    layout: Ggml,
    selection: &'s Selection,
    /// By index in [`Factors`]; empty if there is no factor.
    factors: Vec<f32>,
}

impl GgmlDecoder<'_> {
    fn lines(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        reader.lines(self.selection.tensor, self.layout.row_bytes, lines)
    }

    /// The factor of a row of the tensor.
    fn factor(&self, row: usize) -> f32 {
        match self.layout.factors {
            Some(Factors { rows, .. }) => self.factors[(row / rows).min(self.factors.len() - 1)],
            None => 1.0,
        }
    }

    /// The whole rows `lines` of the tensor as f32.
    fn line_values(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Vec<f32>, ConvertError> {
        let (ty, cols) = (self.layout.ty, self.selection.cols);
        let bytes = self.lines(lines, reader)?;
        let mut values = Vec::with_capacity(lines.count * cols);
        match weight_type(ty) {
            None => values::plain(ty, &bytes, &mut values),
            Some(_) => values::rows(ty, &Canonical::new(ty, &bytes), cols, &mut values),
        }
        if !self.factors.is_empty() {
            for (number, row) in lines.numbers().zip(values.chunks_exact_mut(cols)) {
                let factor = self.factor(number);
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
        Ok(values)
    }
}

impl Decoder for GgmlDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        out.clear();
        out.resize(rows.count * rows.cols, 0.0);
        let mut row = 0;
        for piece in pieces(self.selection, rows) {
            let values = self.line_values(piece, reader)?;
            row = pick(self.selection, piece, &values, 1, (out, rows.cols, row));
        }
        Ok(())
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let (mut bytes, mut factors) = (Vec::with_capacity(rows.count * self.layout.row_bytes), Vec::new());
        for piece in pieces(self.selection, rows) {
            bytes.extend(self.lines(piece, reader)?);
            factors.extend(piece.numbers().map(|row| self.factor(row)));
        }
        let row_groups = bytes.chunks(ROW_GROUP * self.layout.row_bytes).zip(factors.chunks(ROW_GROUP));
        let mut finite = true;
        for (g, (bytes, factors)) in row_groups.enumerate() {
            let canonical = Canonical::new(self.layout.ty, bytes);
            finite &= is_finite(self.layout.ty, &canonical.scales);
            pack(self.layout.ty, &canonical, rows.cols, factors, groups.slot(g));
        }
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        pieces(self.selection, rows).into_iter().try_for_each(|lines| self.lines(lines, reader).map(drop))
    }
}

/// Packs up to eight rows of `cols` columns with their `factors`.
fn pack(ty: GgmlType, canonical: &Canonical, cols: usize, factors: &[f32], out: &mut [u8]) {
    let n = factors.len();
    let Canonical { codes, scales } = canonical;
    match weight_type(ty) {
        Some(WeightType::Q8) => kernels::pack_row_group_q8(codes, n, cols, scales, out),
        Some(WeightType::Mxfp4) => kernels::pack_row_group_mxfp4(codes, n, cols, scales, out),
        Some(WeightType::Grouped(grouped)) => {
            let factors = if grouped.has_row_factor() { factors } else { &[] };
            kernels::pack_row_group_grouped(grouped, codes, n, cols, scales, factors, out);
        }
        other => unreachable!("{ty:?} is carried as {other:?}"),
    }
}

/// Whether all scales are finite. Then all values are too, because none exceeds the range of f32.
fn is_finite(ty: GgmlType, scales: &[u8]) -> bool {
    let half = |bytes: &[u8]| f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])).is_finite();
    match weight_type(ty) {
        Some(WeightType::Q8) => scales.chunks_exact(2).all(half),
        // Values reach six times the scale.
        Some(WeightType::Mxfp4) => scales.iter().all(|&s| (6.0 * kernels::e8m0_to_f32(s)).is_finite()),
        Some(WeightType::Grouped(grouped)) => match grouped.scales() {
            Scales::Groups { scale: ScaleType::F16, .. } => scales.chunks_exact(2).all(half),
            Scales::Groups { scale: ScaleType::Bf16, .. } => {
                scales.chunks_exact(2).all(|b| bf16_to_f32(u16::from_le_bytes([b[0], b[1]])).is_finite())
            }
            // NVFP4's scales were made finite before.
            Scales::Groups { .. } => true,
            Scales::Super(of_block) => {
                scales.chunks_exact(of_block.row_len()).all(|b| half(b) && (!of_block.has_min() || half(&b[2..])))
            }
        },
        _ => true,
    }
}

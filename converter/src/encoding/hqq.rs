//! HQQ: `W_q`, `scale` and `zero` of groups along rows (`axis` 1). A byte holds codes of rows that lie a half or a quarter of the
//! matrix apart, the first rows in the high bits; zeros are numbers like the scales
//! (<https://github.com/mobiusml/hqq>, `core/quantize.py` and `core/bitpack.py`).

use sluice_format::WeightType;
use sluice_weights::{Codes, ScaleType, Zero};

use super::carry::{Carrier, CodeRows};
use super::checks::{check_dtype, check_shape, dtype_error, shape_error};
use super::grouped::{scale_values, wide_scale};
use super::lines::{Lines, gather, of_rows, pieces};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::plan::form::Parts;
use crate::source::{Checkpoint, WIDE_FLOATS};

/// `value = (code − zero) · scale`, with scale and zero per row and `group` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hqq {
    /// Of a code: 2, 4 or 8.
    bits: usize,
    group: usize,
    /// Rows and columns of the matrix.
    shape: [usize; 2],
    scales: usize,
    zeros: usize,
    scale_type: ScaleType,
}

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Hqq, ConvertError> {
    let (codes, scales, zeros) = (parts.tensors[0], parts.tensors[1], parts.tensors[2]);
    check_dtype(checkpoint, codes, &["U8"], "U8: HQQ of 2, 4 and 8 bits")?;
    let &[rows, cols] = shape else { return Err(shape_error(checkpoint, codes, shape)) };
    let group = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    if group == 0 || !cols.is_multiple_of(group) {
        return Err(shape_error(checkpoint, codes, &[rows * cols / 64, 64]));
    }
    let (groups, bytes) = (rows * (cols / group), checkpoint.tensors[codes].len);
    let bits = [2, 4, 8].into_iter().find(|bits| (rows * cols * bits / 8) as u64 == bytes).unwrap_or(4);
    let apart = 8 / bits;
    if !rows.is_multiple_of(apart) {
        return Err(shape_error(checkpoint, codes, &[groups.div_ceil(apart), group]));
    }
    check_shape(checkpoint, codes, &[groups / apart, group])?;
    // Groups along columns would have one row of scales.
    check_shape(checkpoint, scales, &[groups, 1])?;
    check_shape(checkpoint, zeros, &[groups, 1])?;
    let scale_type = wide_scale(&checkpoint.tensors[scales].dtype);
    let scale_type = scale_type.ok_or_else(|| dtype_error(checkpoint, scales, WIDE_FLOATS))?;
    if checkpoint.tensors[zeros].dtype != checkpoint.tensors[scales].dtype {
        return Err(dtype_error(checkpoint, zeros, "the type of the scales"));
    }
    Ok(Hqq { bits, group, shape: [rows, cols], scales, zeros, scale_type })
}

impl Hqq {
    fn carrier(&self) -> Option<Carrier> {
        Carrier::new(Codes::Uint(self.bits as u8), (self.group, self.shape[1]), self.scale_type, Zero::Float)
    }
}

impl Encoding for Hqq {
    fn others(&self) -> Vec<usize> {
        vec![self.scales, self.zeros]
    }

    fn carried(&self) -> Option<WeightType> {
        self.carrier().map(|c| WeightType::Grouped(c.ty))
    }

    fn fits(&self, selection: &Selection, shape: [usize; 3]) -> bool {
        selection.whole_rows(shape[2])
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        _reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        Ok(Box::new(HqqDecoder { layout: *self, selection }))
    }
}

struct HqqDecoder<'s> {
    layout: Hqq,
    selection: &'s Selection,
}

impl HqqDecoder<'_> {
    /// Codes of whole rows, one per byte, and their scales and zeros as they are stored.
    fn read(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<[Vec<u8>; 3], ConvertError> {
        let Hqq { bits, group, shape: [rows, cols], scales, zeros, scale_type } = self.layout;
        let apart = rows / (8 / bits);
        let mut codes = Vec::with_capacity(lines.count * cols);
        for row in lines.numbers() {
            let line = Lines { first: row % apart, count: 1, step: 1, column: 0, rows: 1 };
            let shift = 8 - bits * (row / apart + 1);
            let bytes = reader.lines(self.selection.tensor, cols, line)?;
            codes.extend(bytes.iter().map(|byte| byte >> shift & (0xff >> (8 - bits))));
        }
        let width = cols / group * scale_type.len();
        Ok([codes, reader.lines(scales, width, lines)?, reader.lines(zeros, width, lines)?])
    }
}

impl Decoder for HqqDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let (group, ty) = (self.layout.group, self.layout.scale_type);
        gather(self.selection, rows, out, |piece, values| {
            let [codes, scales, zeros] = self.read(piece, reader)?;
            let groups = scale_values(ty, &scales).into_iter().zip(scale_values(ty, &zeros));
            values.clear();
            for (codes, (scale, zero)) in codes.chunks_exact(group).zip(groups) {
                values.extend(codes.iter().map(|&code| (f32::from(code) - zero) * scale));
            }
            Ok(())
        })
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let Carrier { ty, repeat } = self.layout.carrier().expect("it is carried");
        let (scale_type, mut out, mut finite) = (self.layout.scale_type, CodeRows::default(), true);
        for lines in of_rows(self.selection, rows) {
            let [mut codes, scales, zeros] = self.read(lines, reader)?;
            out.codes.append(&mut codes);
            let width = scale_type.len();
            for (scale, zero) in scales.chunks_exact(width).zip(zeros.chunks_exact(width)) {
                out.add_group(repeat, scale, zero);
            }
            let values = scale_values(scale_type, &scales).into_iter().zip(scale_values(scale_type, &zeros));
            finite &= values.into_iter().all(|(s, z)| (s.abs() * (256.0 + z.abs())).is_finite());
        }
        out.pack(ty, rows.cols, &mut groups);
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        pieces(self.selection, rows).into_iter().try_for_each(|lines| self.read(lines, reader).map(drop))
    }
}

//! HQQ: `W_q`, `scale` and `zero` for groups along rows (`axis` 1), or for groups of distant rows (`axis` 0). A byte holds codes of
//! elements that are half or a quarter of the matrix apart; a word of 32 bits holds ten codes of three bits. The first elements are
//! in the high bits. Zeros are numbers like the scales (<https://github.com/mobiusml/hqq>, `core/quantize.py` and
//! `core/bitpack.py`).

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

/// `value = (code − zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hqq {
    packing: Packing,
    groups: Along,
    /// Rows and columns of the matrix.
    shape: [usize; 2],
    scales: usize,
    zeros: usize,
    scale_type: ScaleType,
}

/// How codes share a stored number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packing {
    /// Bits of a code: 2, 3, 4 or 8.
    bits: usize,
    /// Bytes of a stored number: 4 for codes of 3 bits, otherwise 1.
    bytes: usize,
    /// Codes in a stored number.
    codes: usize,
    /// How many numbers are stored, which is also the distance between two elements whose codes share a number.
    numbers: usize,
}

/// Which elements share scale and zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Along {
    /// This many consecutive columns of a row: `axis` 1.
    Columns(usize),
    /// Elements of one column, in rows with this distance: `axis` 0.
    Rows(usize),
}

pub(super) fn resolve(checkpoint: &Checkpoint, shape: &[usize], parts: &Parts) -> Result<Hqq, ConvertError> {
    let (codes, scales, zeros) = (parts.tensors[0], parts.tensors[1], parts.tensors[2]);
    check_dtype(checkpoint, codes, &["U8", "I32"], "U8: HQQ of 2, 4 and 8 bits, or I32: of 3 bits")?;
    let &[rows, cols] = shape else { return Err(shape_error(checkpoint, codes, shape)) };
    // HQQ reshapes the matrix to rows of this length, and packs distant rows together.
    let width = checkpoint.tensors[codes].shape.last().copied().unwrap_or(0);
    let along = match checkpoint.tensors[scales].shape[..] {
        [1, columns] if columns > 1 && columns == width => Along::Rows(columns / cols.max(1)),
        _ => Along::Columns(width),
    };
    let whole = match along {
        Along::Columns(group) => group > 0 && cols.is_multiple_of(group),
        Along::Rows(apart) => width.is_multiple_of(cols) && rows.is_multiple_of(apart),
    };
    if !whole {
        return Err(shape_error(checkpoint, codes, &[rows * cols / 64, 64]));
    }
    let lines = rows * cols / width;
    let (bits, bytes) = if checkpoint.tensors[codes].dtype.name() == "I32" {
        (3, 4)
    } else {
        let len = checkpoint.tensors[codes].len;
        (([2, 4, 8].into_iter().find(|bits| (rows * cols * bits / 8) as u64 == len)).unwrap_or(4), 1)
    };
    // The last of ten codes may be padding.
    let in_number = 8 * bytes / bits;
    if bytes == 1 && !lines.is_multiple_of(in_number) {
        return Err(shape_error(checkpoint, codes, &[lines.div_ceil(in_number), width]));
    }
    check_shape(checkpoint, codes, &[lines.div_ceil(in_number), width])?;
    let grid = match along {
        Along::Columns(_) => [lines, 1],
        Along::Rows(_) => [1, width],
    };
    check_shape(checkpoint, scales, &grid)?;
    check_shape(checkpoint, zeros, &grid)?;
    let scale_type = wide_scale(&checkpoint.tensors[scales].dtype);
    let scale_type = scale_type.ok_or_else(|| dtype_error(checkpoint, scales, WIDE_FLOATS))?;
    if checkpoint.tensors[zeros].dtype != checkpoint.tensors[scales].dtype {
        return Err(dtype_error(checkpoint, zeros, "the type of the scales"));
    }
    let packing = Packing { bits, bytes, codes: in_number, numbers: lines.div_ceil(in_number) * width };
    Ok(Hqq { packing, groups: along, shape: [rows, cols], scales, zeros, scale_type })
}

impl Hqq {
    fn carrier(&self) -> Option<Carrier> {
        let Along::Columns(group) = self.groups else { return None };
        Carrier::new(Codes::Uint(self.packing.bits as u8), (group, self.shape[1]), self.scale_type, Zero::Float)
    }

    /// Columns of a row that share a scale.
    fn columns_together(&self) -> usize {
        match self.groups {
            Along::Columns(group) => group,
            Along::Rows(_) => 1,
        }
    }
}

impl Encoding for Hqq {
    fn others(&self) -> Vec<usize> {
        vec![self.scales, self.zeros]
    }

    fn carried(&self) -> Option<WeightType> {
        self.carrier().map(|c| WeightType::Grouped(c.ty))
    }

    fn obstacle(&self) -> Option<&'static str> {
        matches!(self.groups, Along::Rows(_)).then_some("HQQ with `axis` 0 gives a scale to rows that lie apart")
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
    /// Codes of whole rows, one per byte, with their stored scales and zeros, row by row.
    fn read(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<[Vec<u8>; 3], ConvertError> {
        let Hqq { shape: [_, cols], scales, zeros, scale_type, groups, .. } = self.layout;
        let mut codes = Vec::with_capacity(lines.count * cols);
        for row in lines.numbers() {
            self.codes(row * cols, cols, reader, &mut codes)?;
        }
        let width = cols / self.layout.columns_together() * scale_type.len();
        let lines = match groups {
            Along::Columns(_) => lines,
            Along::Rows(apart) => {
                let mut of_rows = [Vec::new(), Vec::new()];
                for row in lines.numbers() {
                    let line = Lines { first: row % apart, count: 1, ..lines };
                    for (of_rows, tensor) in of_rows.iter_mut().zip([scales, zeros]) {
                        of_rows.append(&mut reader.lines(tensor, width, line)?);
                    }
                }
                let [scales, zeros] = of_rows;
                return Ok([codes, scales, zeros]);
            }
        };
        Ok([codes, reader.lines(scales, width, lines)?, reader.lines(zeros, width, lines)?])
    }

    /// Appends the codes of `count` elements from `first` on.
    fn codes(
        &self,
        first: usize,
        count: usize,
        reader: &mut Reader<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), ConvertError> {
        let Packing { bits, bytes, codes, numbers } = self.layout.packing;
        let (mut at, end) = (first, first + count);
        while at < end {
            let (part, number) = (at / numbers, at % numbers);
            let taken = (numbers - number).min(end - at);
            let mut read = vec![0; taken * bytes];
            reader.read(self.selection.tensor, (number * bytes) as u64, &mut read)?;
            let shift = bits * (codes - 1 - part);
            let mask = 0xff >> (8 - bits);
            match bytes {
                1 => out.extend(read.iter().map(|byte| byte >> shift & mask)),
                _ => {
                    let words = read.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
                    out.extend(words.map(|word| (word >> shift) as u8 & mask));
                }
            }
            at += taken;
        }
        Ok(())
    }
}

impl Decoder for HqqDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let (group, ty) = (self.layout.columns_together(), self.layout.scale_type);
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

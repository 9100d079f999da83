//! Codes of a few bits, row by row, with a scale per row and group of columns: what several encodings have in common.

use sluice_format::{BLOCK, ROW_GROUP, WeightType};
use sluice_kernels::{self as kernels, E2M1, bf16_to_f32, e8m0_to_f32, f16_to_f32};

use super::checks::{check_dtype, check_shape, shape_error};
use super::lines::{Lines, of_rows, pick, pieces};
use super::reader::halves;
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::fp8;
use crate::source::{Checkpoint, Dtype};

/// `value = code · scale · global + bias`, with scale and bias per row and `group` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grouped {
    pub(super) code: Code,
    pub(super) group: usize,
    pub(super) scales: usize,
    pub(super) scale_type: ScaleType,
    pub(super) biases: Option<usize>,
    pub(super) global: Option<Global>,
}

/// What a code of a few bits means. Codes fill bytes from the low bits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// Four bits, eight more than the value.
    Offset4,
    /// Eight bits, 128 more than the value.
    Offset8,
    /// Eight bits, two's complement.
    Signed8,
    /// Four bits: the float e2m1.
    E2m1,
    /// Eight bits: the float e4m3.
    E4m3,
    /// An integer from 0 on.
    Unsigned { bits: usize },
}

impl Code {
    pub(super) fn bits(self) -> usize {
        match self {
            Code::Offset4 | Code::E2m1 => 4,
            Code::E4m3 | Code::Offset8 | Code::Signed8 => 8,
            Code::Unsigned { bits } => bits,
        }
    }

    fn value(self, code: u8) -> f32 {
        match self {
            Code::Offset4 => f32::from(code) - 8.0,
            Code::Offset8 => f32::from(code) - 128.0,
            Code::Signed8 => f32::from(code as i8),
            Code::E2m1 => E2M1[usize::from(code & 15)],
            Code::E4m3 => fp8::E4M3[usize::from(code)],
            Code::Unsigned { .. } => f32::from(code),
        }
    }
}

/// Format of scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleType {
    F32,
    F16,
    Bf16,
    E4m3,
    /// A power of two.
    E8m0,
}

impl ScaleType {
    /// The wide formats.
    pub(super) fn wide(dtype: &Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(ScaleType::F32),
            Dtype::F16 => Some(ScaleType::F16),
            Dtype::Bf16 => Some(ScaleType::Bf16),
            Dtype::F8E4M3 | Dtype::Ggml(_) | Dtype::Other(_) => None,
        }
    }

    /// Bytes of a scale.
    fn len(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::F16 | ScaleType::Bf16 => 2,
            ScaleType::E4m3 | ScaleType::E8m0 => 1,
        }
    }

    /// Scales as numbers.
    fn values(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            ScaleType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            ScaleType::F16 => halves(bytes).map(f16_to_f32).collect(),
            ScaleType::Bf16 => halves(bytes).map(bf16_to_f32).collect(),
            ScaleType::E4m3 => bytes.iter().map(|&b| fp8::E4M3[b as usize]).collect(),
            ScaleType::E8m0 => bytes.iter().map(|&b| e8m0_to_f32(b)).collect(),
        }
    }
}

/// One number for a whole matrix, or one per matrix of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Global {
    pub(super) tensor: usize,
    /// Whether scales are divided by it instead of multiplied.
    pub(super) divides: bool,
}

/// How many columns share a scale, from the shapes of the codes' matrix and of the scales. `per_row`: one scale per row may
/// stand without a dimension of its own.
pub(super) fn group_of(
    checkpoint: &Checkpoint,
    shape: &[usize],
    scales: usize,
    per_row: bool,
) -> Result<usize, ConvertError> {
    let (cols, lead) = shape.split_last().expect("a view has columns");
    let scale_shape = &checkpoint.tensors[scales].shape;
    let per_row = per_row && scale_shape == lead;
    let groups = if per_row { 1 } else { scale_shape.last().copied().unwrap_or(0) };
    let fits = per_row || scale_shape.len() == shape.len() && scale_shape.starts_with(lead);
    if !fits || groups == 0 || !cols.is_multiple_of(groups) {
        return Err(shape_error(checkpoint, scales, &[lead, &[cols.div_ceil(32)]].concat()));
    }
    Ok(cols / groups)
}

/// Checks that codes lie in whole words of `word` bytes and the format `dtype`, along rows.
pub(super) fn check_codes(
    checkpoint: &Checkpoint,
    shape: &[usize],
    codes: usize,
    code: Code,
    (word, dtype): (usize, &str),
) -> Result<(), ConvertError> {
    check_dtype(checkpoint, codes, &[dtype], "U8 or 32-bit words of packed codes")?;
    let (cols, lead) = shape.split_last().expect("a view has columns");
    let row_bits = cols * code.bits();
    if !row_bits.is_multiple_of(8 * word) {
        return Err(shape_error(checkpoint, codes, &[lead, &[row_bits.div_ceil(8 * word)]].concat()));
    }
    check_shape(checkpoint, codes, &[lead, &[row_bits / 8 / word]].concat())
}

impl Encoding for Grouped {
    fn others(&self) -> Vec<usize> {
        let others = [Some(self.scales), self.biases, self.global.map(|g| g.tensor)];
        others.into_iter().flatten().collect()
    }

    fn carried(&self) -> Option<WeightType> {
        // A scale of more columns is repeated for each block of the file.
        let blocks = self.group.is_multiple_of(BLOCK) && self.global.is_none() && self.biases.is_none();
        match (self.code, self.scale_type) {
            (Code::Offset4, ScaleType::Bf16) if blocks => Some(WeightType::Int4),
            (Code::E2m1, ScaleType::E8m0) if blocks => Some(WeightType::Mxfp4),
            _ => None,
        }
    }

    fn fits(&self, selection: &Selection, shape: [usize; 3]) -> bool {
        selection.whole_rows(shape[2])
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        let global = match self.global {
            None => 1.0,
            Some(global) => {
                let value = reader.floats(global.tensor)?[0];
                let factor = if global.divides { 1.0 / value } else { value };
                if !factor.is_finite() {
                    return Err(reader.not_finite(global.tensor));
                }
                factor
            }
        };
        let value = std::array::from_fn(|code| self.code.value(code as u8));
        Ok(Box::new(GroupedDecoder { layout: self, selection, global, value }))
    }
}

struct GroupedDecoder<'s> {
    layout: &'s Grouped,
    selection: &'s Selection,
    global: f32,
    /// Of each code.
    value: [f32; 256],
}

impl GroupedDecoder<'_> {
    /// Packed codes and scales of whole rows.
    fn lines(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<(Vec<u8>, Vec<u8>), ConvertError> {
        let (g, cols) = (self.layout, self.selection.cols);
        let codes = reader.lines(self.selection.tensor, cols * g.code.bits() / 8, lines)?;
        Ok((codes, reader.lines(g.scales, cols / g.group * g.scale_type.len(), lines)?))
    }

    /// Biases of the groups of whole rows, where there are any.
    fn biases(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Option<Vec<u8>>, ConvertError> {
        let g = self.layout;
        let row = self.selection.cols / g.group * g.scale_type.len();
        g.biases.map(|biases| reader.lines(biases, row, lines)).transpose()
    }

    /// Whole rows as f32.
    fn line_values(&self, lines: Lines, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let g = self.layout;
        let (packed, scales) = self.lines(lines, reader)?;
        let biases = self.biases(lines, reader)?.map(|b| g.scale_type.values(&b));
        let scales = g.scale_type.values(&scales);
        let mut codes = Vec::new();
        unpack_codes(g.code.bits(), &packed, &mut codes);
        out.clear();
        for (i, codes) in codes.chunks_exact(g.group).enumerate() {
            let scale = scales[i] * self.global;
            match &biases {
                Some(biases) => out.extend(codes.iter().map(|&c| self.value[c as usize] * scale + biases[i])),
                None => out.extend(codes.iter().map(|&c| self.value[c as usize] * scale)),
            }
        }
        Ok(())
    }

    /// Codes of `rows`, one per byte, and their scales as the source stores them.
    fn codes(&self, rows: Rows, reader: &mut Reader<'_>) -> Result<(Vec<u8>, Vec<u8>), ConvertError> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for lines in of_rows(self.selection, rows) {
            let (packed, of_groups) = self.lines(lines, reader)?;
            unpack_codes(self.layout.code.bits(), &packed, &mut codes);
            scales.extend_from_slice(&of_groups);
        }
        Ok((codes, scales))
    }
}

impl Decoder for GroupedDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let mut lines = Vec::new();
        out.clear();
        out.resize(rows.count * rows.cols, 0.0);
        let mut row = 0;
        for piece in pieces(self.selection, rows) {
            self.line_values(piece, reader, &mut lines)?;
            row = pick(self.selection, piece, &lines, 1, (out, rows.cols, row));
        }
        Ok(())
    }

    /// Four-bit codes whose scales the type has too. A scale of more than 32 columns is repeated.
    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let (codes, scales) = self.codes(rows, reader)?;
        let repeat = self.layout.group / BLOCK;
        let blocks = rows.cols / BLOCK;
        let finite = if self.layout.code == Code::Offset4 {
            let scales: Vec<u16> = halves(&scales).flat_map(|s| std::iter::repeat_n(s, repeat)).collect();
            let row_groups = codes.chunks(ROW_GROUP * rows.cols).zip(scales.chunks(ROW_GROUP * blocks));
            for (g, (codes, scales)) in row_groups.enumerate() {
                let n = codes.len() / rows.cols;
                kernels::pack_row_group_int4(codes, n, rows.cols, scales, groups.slot(g));
            }
            // Values reach eight times the scale.
            scales.iter().all(|&s| (8.0 * bf16_to_f32(s)).is_finite())
        } else {
            let scales: Vec<u8> = scales.iter().flat_map(|&s| std::iter::repeat_n(s, repeat)).collect();
            let row_groups = codes.chunks(ROW_GROUP * rows.cols).zip(scales.chunks(ROW_GROUP * blocks));
            for (g, (codes, scales)) in row_groups.enumerate() {
                let n = codes.len() / rows.cols;
                kernels::pack_row_group_mxfp4(codes, n, rows.cols, scales, groups.slot(g));
            }
            // Values reach six times the scale.
            scales.iter().all(|&s| (6.0 * e8m0_to_f32(s)).is_finite())
        };
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn skim(&self, rows: Rows, carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        let pieces = if carried { of_rows(self.selection, rows) } else { pieces(self.selection, rows) };
        pieces.into_iter().try_for_each(|lines| {
            self.lines(lines, reader)?;
            if carried { Ok(()) } else { self.biases(lines, reader).map(drop) }
        })
    }
}

/// Appends codes, one per byte. Those of 3, 5 and 6 bits run across the bytes of a row; a row has whole bytes.
pub(super) fn unpack_codes(bits: usize, packed: &[u8], out: &mut Vec<u8>) {
    let mask = ((1u32 << bits) - 1) as u8;
    if !8usize.is_multiple_of(bits) {
        // `bits` bytes hold eight codes, in whole words as in whole rows.
        for bytes in packed.chunks(bits) {
            let word = bytes.iter().rev().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
            out.extend((0..bytes.len() * 8 / bits).map(|i| (word >> (i * bits)) as u8 & mask));
        }
        return;
    }
    out.extend(packed.iter().flat_map(|byte| (0..8 / bits).map(move |i| byte >> (i * bits) & mask)));
}

//! Codes of a few bits, row by row, with a scale per row and group of columns: the common part of several encodings.

use sluice_format::{BLOCK, ROW_GROUP, WeightType};
use sluice_kernels::{self as kernels, E2M1, bf16_to_f32, e8m0_to_f32, f16_to_f32};
use sluice_weights::{Codes, ScaleType, Zero};

use super::carry::{Carrier, CodeRows};
use super::checks::{check_dtype, check_shape, shape_error};
use super::lines::{Lines, gather, of_rows, pieces};
use super::reader::halves;
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::fp8;
use crate::source::{Checkpoint, Dtype};

/// `value = (code − zero) · scale · global + bias`, with scale, zero and bias per row and `group` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grouped {
    pub(super) code: Code,
    pub(super) group: usize,
    /// Columns of the tensor.
    pub(super) cols: usize,
    pub(super) scales: usize,
    pub(super) scale_type: ScaleType,
    pub(super) biases: Option<usize>,
    pub(super) zeros: Option<Zeros>,
    pub(super) global: Option<Global>,
}

/// The meaning of a code of a few bits. Codes fill bytes from the low bits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// An integer with this many bits, stored as the value plus half of its range.
    Offset(usize),
    /// Eight bits, two's complement.
    Signed8,
    /// Four bits: the float e2m1.
    E2m1,
    /// Eight bits: the float e4m3.
    E4m3,
    /// An integer with this many bits, from 0 on.
    Unsigned(usize),
}

impl Code {
    pub(super) fn bits(self) -> usize {
        match self {
            Code::E2m1 => 4,
            Code::E4m3 | Code::Signed8 => 8,
            Code::Offset(bits) | Code::Unsigned(bits) => bits,
        }
    }

    fn value(self, code: u8) -> f32 {
        match self {
            Code::Offset(_) => f32::from(code) - self.middle(),
            Code::Signed8 => f32::from(code as i8),
            Code::E2m1 => E2M1[usize::from(code & 15)],
            Code::E4m3 => fp8::E4M3[usize::from(code)],
            Code::Unsigned(_) => f32::from(code),
        }
    }

    /// Half of an integer's range.
    fn middle(self) -> f32 {
        (1u32 << (self.bits() - 1)) as f32
    }

    /// The weight type's kind of codes.
    fn codes(self) -> Codes {
        match self {
            Code::Offset(bits) | Code::Unsigned(bits) => Codes::Uint(bits as u8),
            Code::Signed8 => Codes::Uint(8),
            Code::E2m1 => Codes::E2m1,
            Code::E4m3 => Codes::E4m3,
        }
    }

    /// An upper bound for the magnitude of values.
    fn reach(self) -> f32 {
        match self {
            Code::E2m1 => 6.0,
            Code::E4m3 => fp8::E4M3_MAX,
            Code::Signed8 => 128.0,
            Code::Offset(bits) | Code::Unsigned(bits) => (1u32 << bits) as f32,
        }
    }
}

/// Zeros of integer codes, stored as integers like these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zeros {
    pub(super) tensor: usize,
    /// Whether they are packed along rows, one column of groups after the other, `[words of all rows, groups]`; otherwise they are
    /// bytes, `[rows, groups]`, less half of the codes' range.
    pub(super) packed: bool,
}

/// The wide formats of scales.
pub(super) fn wide_scale(dtype: &Dtype) -> Option<ScaleType> {
    match dtype {
        Dtype::F32 => Some(ScaleType::F32),
        Dtype::F16 => Some(ScaleType::F16),
        Dtype::Bf16 => Some(ScaleType::Bf16),
        Dtype::F8E4M3 | Dtype::Ggml(_) | Dtype::Other(_) => None,
    }
}

/// Scales as numbers.
pub(super) fn scale_values(ty: ScaleType, bytes: &[u8]) -> Vec<f32> {
    match ty {
        ScaleType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        ScaleType::F16 => halves(bytes).map(f16_to_f32).collect(),
        ScaleType::Bf16 => halves(bytes).map(bf16_to_f32).collect(),
        ScaleType::E4m3 => bytes.iter().map(|&b| fp8::E4M3[b as usize]).collect(),
        ScaleType::E8m0 => bytes.iter().map(|&b| e8m0_to_f32(b)).collect(),
    }
}

/// One number for a whole matrix, or one per matrix of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Global {
    pub(super) tensor: usize,
    /// Whether scales are divided by it, not multiplied.
    pub(super) divides: bool,
}

/// The number of columns that share a scale, derived from the shapes of codes and scales. `per_row`: one scale per row may come
/// without a dimension of its own.
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

/// Checks that codes lie along rows in whole words of `word` bytes, in the format `dtype`.
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

impl Grouped {
    /// The type that takes the unchanged codes, with groups of their size.
    fn carrier(&self) -> Option<Carrier> {
        let zero = match (self.biases, self.zeros) {
            (Some(_), None) => Zero::Bias,
            (None, Some(_)) => Zero::Byte,
            (None, None) if matches!(self.code, Code::Unsigned(_)) => return None,
            (None, None) => Zero::None,
            (Some(_), Some(_)) => return None,
        };
        if self.global.is_some() && self.scale_type != ScaleType::E4m3 {
            return None;
        }
        Carrier::new(self.code.codes(), (self.group, self.cols), self.scale_type, zero)
    }

    /// One of the types with a form of their own, if scales are per 32 columns; scales of 64 or more would have to be repeated.
    fn own_type(&self) -> Option<WeightType> {
        let alone = self.biases.is_none() && self.zeros.is_none() && self.global.is_none();
        match (self.code, self.scale_type) {
            (Code::Offset(4), ScaleType::Bf16) if alone && self.group == BLOCK => Some(WeightType::Int4),
            (Code::E2m1, ScaleType::E8m0) if alone && self.group == BLOCK => Some(WeightType::Mxfp4),
            _ => None,
        }
    }
}

impl Encoding for Grouped {
    fn others(&self) -> Vec<usize> {
        let others = [Some(self.scales), self.biases, self.zeros.map(|z| z.tensor), self.global.map(|g| g.tensor)];
        others.into_iter().flatten().collect()
    }

    fn carried(&self) -> Option<WeightType> {
        self.own_type().or_else(|| self.carrier().map(|c| WeightType::Grouped(c.ty)))
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
        let zeros = self.zeros.map(|zeros| self.read_zeros(zeros, reader)).transpose()?;
        let value = std::array::from_fn(|code| self.code.value(code as u8));
        Ok(Box::new(GroupedDecoder { layout: self, selection, global, zeros, value }))
    }
}

impl Grouped {
    /// The zero of each group, row by row.
    fn read_zeros(&self, zeros: Zeros, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        let (bytes, groups, bits) = (reader.all(zeros.tensor)?, self.cols / self.group, self.code.bits());
        if !zeros.packed {
            return Ok(bytes.iter().map(|&z| z.wrapping_add(1 << (bits - 1))).collect());
        }
        // Each column of words is the stream of bits of one group of all rows.
        let words = bytes.len() / 4 / groups;
        let rows = words * 32 / bits;
        let mut unpacked = vec![0; rows * groups];
        let (mut stream, mut codes) = (Vec::new(), Vec::new());
        for group in 0..groups {
            stream.clear();
            (0..words).for_each(|word| stream.extend_from_slice(&bytes[(word * groups + group) * 4..][..4]));
            codes.clear();
            unpack_codes(bits, &stream, &mut codes);
            codes.iter().take(rows).enumerate().for_each(|(row, &zero)| unpacked[row * groups + group] = zero);
        }
        Ok(unpacked)
    }
}

struct GroupedDecoder<'s> {
    layout: &'s Grouped,
    selection: &'s Selection,
    global: f32,
    /// Zeros of all rows, by group, plus half of the codes' range.
    zeros: Option<Vec<u8>>,
    /// The value of each code.
    value: [f32; 256],
}

/// The data of some whole rows, as read.
struct Read {
    packed: Vec<u8>,
    scales: Vec<u8>,
    biases: Option<Vec<u8>>,
}

impl GroupedDecoder<'_> {
    /// Packed codes, scales and biases of whole rows.
    fn read(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Read, ConvertError> {
        let (g, cols) = (self.layout, self.selection.cols);
        let scale_row = cols / g.group * g.scale_type.len();
        let packed = reader.lines(self.selection.tensor, cols * g.code.bits() / 8, lines)?;
        let scales = reader.lines(g.scales, scale_row, lines)?;
        let biases = g.biases.map(|biases| reader.lines(biases, scale_row, lines)).transpose()?;
        Ok(Read { packed, scales, biases })
    }

    /// Zeros of the groups of whole rows.
    fn zeros_of(&self, lines: Lines) -> Option<Vec<u8>> {
        let groups = self.selection.cols / self.layout.group;
        let zeros = self.zeros.as_ref()?;
        Some(lines.numbers().flat_map(|row| zeros[row * groups..][..groups].iter().copied()).collect())
    }

    /// Whole rows as f32.
    fn line_values(&self, lines: Lines, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let g = self.layout;
        let read = self.read(lines, reader)?;
        let biases = read.biases.map(|b| scale_values(g.scale_type, &b));
        let zeros = self.zeros_of(lines);
        let scales = scale_values(g.scale_type, &read.scales);
        let mut codes = Vec::new();
        unpack_codes(g.code.bits(), &read.packed, &mut codes);
        out.clear();
        for (i, codes) in codes.chunks_exact(g.group).enumerate() {
            let scale = scales[i] * self.global;
            match (&biases, &zeros) {
                (Some(biases), _) => out.extend(codes.iter().map(|&c| self.value[c as usize] * scale + biases[i])),
                (None, Some(zeros)) => {
                    let zero = f32::from(zeros[i]) - g.code.middle();
                    out.extend(codes.iter().map(|&c| (self.value[c as usize] - zero) * scale));
                }
                (None, None) => out.extend(codes.iter().map(|&c| self.value[c as usize] * scale)),
            }
        }
        Ok(())
    }

    /// Rows with their scales, repeated if the type has smaller groups, and whether all values are finite.
    fn code_rows(&self, rows: Rows, repeat: usize, reader: &mut Reader<'_>) -> Result<(CodeRows, bool), ConvertError> {
        let g = self.layout;
        // Only with whole bytes, so that rows have whole bytes too.
        let nibbles = g.code.bits() == 4 && g.own_type().is_none() && rows.cols.is_multiple_of(2);
        let mut out = CodeRows { factor: self.global, nibbles, ..CodeRows::default() };
        let mut finite = true;
        for lines in of_rows(self.selection, rows) {
            let read = self.read(lines, reader)?;
            if nibbles {
                out.codes.extend_from_slice(&read.packed);
            } else {
                unpack_codes(g.code.bits(), &read.packed, &mut out.codes);
            }
            let (width, zeros) = (g.scale_type.len(), self.zeros_of(lines));
            for (i, scale) in read.scales.chunks_exact(width).enumerate() {
                let beside = match (&read.biases, &zeros) {
                    (Some(biases), _) => &biases[i * width..][..width],
                    (None, Some(zeros)) => &zeros[i..=i],
                    (None, None) => &[],
                };
                out.add_group(repeat, scale, beside);
            }
            let (reach, scales) = (g.code.reach() * self.global, scale_values(g.scale_type, &read.scales));
            finite &= match read.biases.map(|b| scale_values(g.scale_type, &b)) {
                Some(biases) => scales.iter().zip(&biases).all(|(s, b)| ((s * reach).abs() + b.abs()).is_finite()),
                None => scales.iter().all(|s| (s * reach).is_finite()),
            };
        }
        match g.code {
            Code::Signed8 => out.codes.iter_mut().for_each(|code| *code ^= 0x80),
            Code::E4m3 => finite &= !out.codes.iter().any(|&code| fp8::is_nan(code)),
            _ => {}
        }
        Ok((out, finite))
    }
}

impl Decoder for GroupedDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        gather(self.selection, rows, out, |piece, values| self.line_values(piece, reader, values))
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let (own, carrier) = (self.layout.own_type(), self.layout.carrier());
        let repeat = if own.is_some() { 1 } else { carrier.map_or(1, |c| c.repeat) };
        let (code_rows, finite) = self.code_rows(rows, repeat, reader)?;
        if !finite {
            return Err(reader.not_finite(self.selection.tensor));
        }
        let (group_codes, group_blocks) = (ROW_GROUP * rows.cols, ROW_GROUP * rows.cols / BLOCK);
        let row_groups = code_rows.codes.chunks(group_codes).enumerate();
        match (own, carrier) {
            (Some(WeightType::Int4), _) => {
                let scales: Vec<u16> = halves(&code_rows.scales).collect();
                for ((g, codes), scales) in row_groups.zip(scales.chunks(group_blocks)) {
                    kernels::pack_row_group_int4(codes, codes.len() / rows.cols, rows.cols, scales, groups.slot(g));
                }
            }
            (Some(_), _) => {
                for ((g, codes), scales) in row_groups.zip(code_rows.scales.chunks(group_blocks)) {
                    kernels::pack_row_group_mxfp4(codes, codes.len() / rows.cols, rows.cols, scales, groups.slot(g));
                }
            }
            (None, carrier) => code_rows.pack(carrier.expect("it is carried").ty, rows.cols, &mut groups),
        }
        Ok(())
    }

    fn skim(&self, rows: Rows, carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        let pieces = if carried { of_rows(self.selection, rows) } else { pieces(self.selection, rows) };
        pieces.into_iter().try_for_each(|lines| self.read(lines, reader).map(drop))
    }
}

/// Appends codes, one per byte. Codes of 3, 5 and 6 bits cross byte borders within a row; a row has whole bytes.
pub(super) fn unpack_codes(bits: usize, packed: &[u8], out: &mut Vec<u8>) {
    match bits {
        8 => out.extend_from_slice(packed),
        4 => unpack_bytes::<2>(packed, out),
        2 => unpack_bytes::<4>(packed, out),
        3 => unpack_streams::<3>(packed, out),
        5 => unpack_streams::<5>(packed, out),
        6 => unpack_streams::<6>(packed, out),
        _ => unreachable!("the plan refuses {bits} bits"),
    }
}

/// `N` codes in a byte.
fn unpack_bytes<const N: usize>(packed: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + packed.len() * N, 0);
    let (bits, mask) = (8 / N, ((1u32 << (8 / N)) - 1) as u8);
    for (byte, codes) in packed.iter().zip(out[start..].as_chunks_mut::<N>().0) {
        *codes = std::array::from_fn(|i| byte >> (i * bits) & mask);
    }
}

/// Eight codes in `BITS` bytes, for whole words and for whole rows.
fn unpack_streams<const BITS: usize>(packed: &[u8], out: &mut Vec<u8>) {
    let mask = ((1u32 << BITS) - 1) as u8;
    let (whole, rest) = packed.as_chunks::<BITS>();
    let start = out.len();
    out.resize(start + whole.len() * 8, 0);
    let word_of = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    for (bytes, codes) in whole.iter().zip(out[start..].as_chunks_mut::<8>().0) {
        let word = word_of(bytes);
        *codes = std::array::from_fn(|i| (word >> (i * BITS)) as u8 & mask);
    }
    let word = word_of(rest);
    out.extend((0..rest.len() * 8 / BITS).map(|i| (word >> (i * BITS)) as u8 & mask));
}

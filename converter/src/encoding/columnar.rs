//! AWQ and GPTQ: `qweight`, `qzeros` and `scales`, whose rows are input features. GPTQ may have the group of each input in
//! `g_idx` (<https://github.com/casper-hansen/AutoAWQ>, <https://github.com/AutoGPTQ/AutoGPTQ>,
//! <https://github.com/ModelCloud/GPTQModel>).

use sluice_format::WeightType;

use super::checks::{check_dtype, check_shape, dtype_error, shape_error};
use super::lines::{Lines, pick, pieces};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::plan::form::Parts;
use crate::plan::scheme::Scheme;
use crate::source::{Checkpoint, WIDE_FLOATS};

/// Formats that hold input features as rows and output features as columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columnar {
    /// AWQ: eight outputs in a word, in an order of their own.
    Awq,
    /// GPTQ: several inputs in a word. The stored zero plus this is the zero: version 1 stores one less.
    Gptq { zero_offset: u8 },
}

/// The tensors of an AWQ or GPTQ matrix: `value = (code - zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ColumnarMatrix {
    kind: Columnar,
    /// Of a code: 2, 4 or 8.
    bits: usize,
    zeros: usize,
    scales: usize,
    /// Group of each input feature; `None`: groups follow one another.
    groups: Option<usize>,
    /// Number of groups.
    count: usize,
    /// Output features.
    outputs: usize,
}

pub(super) fn resolve(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    shape: &[usize],
    parts: &Parts,
) -> Result<ColumnarMatrix, ConvertError> {
    let (codes, zeros, scales) = (parts.tensors[0], parts.tensors[1], parts.tensors[2]);
    let &[outputs, inputs] = shape else { return Err(shape_error(checkpoint, codes, shape)) };
    let count = checkpoint.tensors[scales].shape.first().copied().unwrap_or(0);
    if count == 0 || !inputs.is_multiple_of(count) || !outputs.is_multiple_of(8) || !inputs.is_multiple_of(8) {
        return Err(shape_error(checkpoint, scales, &[inputs.div_ceil(128), outputs]));
    }
    let found = checkpoint.tensors[codes].shape.as_slice();
    // The shape tells AWQ, which packs along the other axis. It does not tell the versions of GPTQ apart.
    let awq_by_shape = (found == [inputs, outputs / 8]).then_some(Columnar::Awq);
    let Some(kind) = awq_by_shape.or(scheme.columnar) else {
        let supported = "`qweight` of GPTQ where `quantization_config` says that it is, with `quant_method`";
        return Err(dtype_error(checkpoint, codes, supported));
    };
    let awq = kind == Columnar::Awq;
    let rows = found.first().copied().unwrap_or(0);
    // GPTQ may have other widths for some layers, which its shape tells.
    let bits = match rows.saturating_mul(32) / inputs {
        bits @ (2 | 8) if !awq => bits,
        _ => 4,
    };
    check_shape(checkpoint, scales, &[count, outputs])?;
    check_shape(checkpoint, zeros, &[count, outputs * bits / 32])?;
    match kind {
        Columnar::Awq => check_shape(checkpoint, codes, &[inputs, outputs / 8])?,
        Columnar::Gptq { .. } => check_shape(checkpoint, codes, &[inputs * bits / 32, outputs])?,
    }
    // Codes of two bits are sixteen in a word.
    if !inputs.is_multiple_of(32 / bits) || !outputs.is_multiple_of(32 / bits) {
        return Err(shape_error(checkpoint, codes, &[inputs.div_ceil(32 / bits), outputs]));
    }
    let groups = parts.tensors.get(3).copied();
    groups.map_or(Ok(()), |groups| check_shape(checkpoint, groups, &[inputs]))?;
    for tensor in [Some(codes), Some(zeros), groups].into_iter().flatten() {
        check_dtype(checkpoint, tensor, &["I32", "U32"], "I32")?;
    }
    check_dtype(checkpoint, scales, &["F16", "BF16", "F32"], WIDE_FLOATS)?;
    Ok(ColumnarMatrix { kind, bits, zeros, scales, groups, count, outputs })
}

/// AWQ: nibble `i` of a word belongs to this output of eight.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Code `i` of a word.
fn code_of(word: u32, i: usize, bits: usize) -> u16 {
    ((word >> (bits * i)) & ((1 << bits) - 1)) as u16
}

impl ColumnarMatrix {
    /// Zeros, one each, out of their words.
    fn unpack_zeros(&self, words: &[u32]) -> Vec<u16> {
        let (bits, per_word) = (self.bits, 32 / self.bits);
        let mut unpacked = vec![0; words.len() * per_word];
        for (word, out) in words.iter().zip(unpacked.chunks_exact_mut(per_word)) {
            for i in 0..per_word {
                match self.kind {
                    Columnar::Awq => out[AWQ_ORDER[i]] = code_of(*word, i, bits),
                    Columnar::Gptq { zero_offset } => out[i] = code_of(*word, i, bits) + u16::from(zero_offset),
                }
            }
        }
        unpacked
    }
}

impl Encoding for ColumnarMatrix {
    fn others(&self) -> Vec<usize> {
        [Some(self.zeros), Some(self.scales), self.groups].into_iter().flatten().collect()
    }

    fn carried(&self) -> Option<WeightType> {
        None
    }

    fn fits(&self, _selection: &Selection, _shape: [usize; 3]) -> bool {
        false
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        let (zeros, scales) = (reader.words(self.zeros)?, reader.floats(self.scales)?);
        let inputs = selection.cols;
        let size = inputs / self.count;
        let groups: Vec<usize> = match self.groups {
            None => (0..inputs).map(|i| i / size).collect(),
            Some(groups) => reader.words(groups)?.iter().map(|&g| g as usize).collect(),
        };
        if let (Some(tensor), Some(group)) = (self.groups, groups.iter().find(|&&g| g >= self.count)) {
            return Err(reader.damaged(tensor, &format!("names group {group} of {}", self.count)));
        }
        Ok(Box::new(ColumnarDecoder { layout: self, selection, zeros: self.unpack_zeros(&zeros), scales, groups }))
    }
}

/// Zeros and scales, `[group, output]`, and the group of each input.
struct ColumnarDecoder<'s> {
    layout: &'s ColumnarMatrix,
    selection: &'s Selection,
    /// Up to 256: version 1 of GPTQ stores one less.
    zeros: Vec<u16>,
    scales: Vec<f32>,
    groups: Vec<usize>,
}

/// The words that hold some outputs of a matrix: a piece of each row of the tensor.
struct Words {
    rows: usize,
    row_bytes: usize,
    start: usize,
    line_bytes: usize,
    first_output: usize,
}

impl ColumnarDecoder<'_> {
    /// Where the outputs `lines` are. AWQ packs outputs in words, GPTQ inputs.
    fn words(&self, lines: Lines) -> Words {
        let (layout, inputs) = (self.layout, self.selection.cols);
        let last = lines.first + (lines.count - 1) * lines.step;
        let (first_output, end) = (lines.first / 8 * 8, (last + 1).next_multiple_of(8));
        let (rows, per_word) = match layout.kind {
            Columnar::Awq => (inputs, 8),
            Columnar::Gptq { .. } => (inputs * layout.bits / 32, 1),
        };
        Words {
            rows,
            row_bytes: layout.outputs / per_word * 4,
            start: first_output / per_word * 4,
            line_bytes: (end - first_output) / per_word * 4,
            first_output,
        }
    }

    fn read(&self, words: &Words, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; words.rows * words.line_bytes];
        for (row, line) in bytes.chunks_exact_mut(words.line_bytes).enumerate() {
            reader.read(self.selection.tensor, (row * words.row_bytes + words.start) as u64, line)?;
        }
        Ok(bytes)
    }

    /// Outputs `lines`, `[lines, inputs]`, as f32.
    fn line_values(&self, lines: Lines, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let words = self.words(lines);
        let bytes = self.read(&words, reader)?;
        let (layout, inputs) = (self.layout, self.selection.cols);
        out.clear();
        out.resize(lines.count * inputs, 0.0);
        let awq_place: [usize; 8] =
            std::array::from_fn(|output| AWQ_ORDER.iter().position(|&o| o == output).expect("a permutation"));
        let (bits, per_word) = (layout.bits, 32 / layout.bits);
        let word_at = |row: usize, word: usize| {
            let at = row * words.line_bytes + word * 4;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        for (output, out) in lines.numbers().zip(out.chunks_exact_mut(inputs)) {
            let local = output - words.first_output;
            for (input, out) in out.iter_mut().enumerate() {
                let code = match layout.kind {
                    Columnar::Awq => code_of(word_at(input, local / 8), awq_place[local % 8], bits),
                    Columnar::Gptq { .. } => code_of(word_at(input / per_word, local), input % per_word, bits),
                };
                let at = self.groups[input] * layout.outputs + output;
                *out = (f32::from(code) - f32::from(self.zeros[at])) * self.scales[at];
            }
        }
        Ok(())
    }
}

impl Decoder for ColumnarDecoder<'_> {
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

    fn carry(&self, _rows: Rows, _reader: &mut Reader<'_>, _groups: Groups<'_>) -> Result<(), ConvertError> {
        unreachable!("no type carries it")
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        pieces(self.selection, rows).into_iter().try_for_each(|lines| self.read(&self.words(lines), reader).map(drop))
    }
}

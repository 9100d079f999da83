//! Packed codes of a few bits as numbers.

use sluice_kernels::{E2M1, bf16_to_f32, e8m0_to_f32, f16_to_f32};

use crate::fp8;
use crate::load::Rows;
use crate::plan::Source;
use crate::plan::resolve::{Code, ColumnarTensors, Grouped, ScaleType};
use crate::plan::scheme::Columnar;

/// Whole rows of a packed source, and what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lines {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) step: usize,
    /// First column that is wanted.
    pub(crate) column: usize,
    /// Rows of the result that they hold.
    pub(crate) rows: usize,
}

/// The source rows that hold `rows` of an untransposed source: one piece per run.
pub(crate) fn lines_of_rows(source: &Source, rows: Rows) -> Vec<Lines> {
    pieces(source, rows, |first, column, rows| Lines {
        first,
        count: rows,
        step: (source.strides.row_step / source.cols).max(1),
        column,
        rows,
    })
}

/// The source rows that hold all columns of `rows` of a transposed source: one piece per run.
pub(crate) fn lines_of_columns(source: &Source, rows: Rows) -> Vec<Lines> {
    pieces(source, rows, |first, column, count| Lines {
        first,
        count: rows.cols,
        step: (source.strides.col_step / source.cols).max(1),
        column,
        rows: count,
    })
}

fn pieces(source: &Source, rows: Rows, piece: impl Fn(usize, usize, usize) -> Lines) -> Vec<Lines> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < rows.count {
        let first = rows.first + done;
        let count = (source.strides.run - first % source.strides.run).min(rows.count - done);
        let (line, column) = source.locate(first, 0);
        pieces.push(piece(line, column, count));
        done += count;
    }
    pieces
}

/// Bytes of a scale.
pub(crate) fn scale_len(ty: ScaleType) -> usize {
    match ty {
        ScaleType::F32 => 4,
        ScaleType::F16 | ScaleType::Bf16 => 2,
        ScaleType::E4m3 | ScaleType::E8m0 => 1,
    }
}

/// Appends codes, one per byte. Those of 3, 5 and 6 bits run across the bytes of a row; a row has whole bytes.
pub(crate) fn unpack_codes(code: Code, packed: &[u8], out: &mut Vec<u8>) {
    let bits = code.bits();
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

/// Scales as numbers.
fn scale_values(ty: ScaleType, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    match ty {
        ScaleType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        ScaleType::F16 => halves().map(f16_to_f32).collect(),
        ScaleType::Bf16 => halves().map(bf16_to_f32).collect(),
        ScaleType::E4m3 => bytes.iter().map(|&b| fp8::E4M3[b as usize]).collect(),
        ScaleType::E8m0 => bytes.iter().map(|&b| e8m0_to_f32(b)).collect(),
    }
}

/// Whole rows of grouped codes as f32.
pub(crate) fn grouped(
    g: &Grouped,
    global: f32,
    packed: &[u8],
    scales: &[u8],
    biases: Option<&[u8]>,
    out: &mut Vec<f32>,
) {
    let value: [f32; 256] = std::array::from_fn(|code| match g.code {
        Code::Offset4 => code as f32 - 8.0,
        Code::Offset8 => code as f32 - 128.0,
        Code::Signed8 => f32::from(code as u8 as i8),
        Code::E2m1 => E2M1[code & 15],
        Code::E4m3 => fp8::E4M3[code],
        Code::Unsigned { .. } => code as f32,
    });
    let mut codes = Vec::new();
    unpack_codes(g.code, packed, &mut codes);
    let scales = scale_values(g.scale_type, scales);
    let biases = biases.map(|b| scale_values(g.scale_type, b));
    out.clear();
    for (i, codes) in codes.chunks_exact(g.group).enumerate() {
        let scale = scales[i] * global;
        match &biases {
            Some(biases) => out.extend(codes.iter().map(|&c| value[c as usize] * scale + biases[i])),
            None => out.extend(codes.iter().map(|&c| value[c as usize] * scale)),
        }
    }
}

/// Zeros and scales of an AWQ or GPTQ matrix, `[group, output]`, and the group of each input.
#[derive(Debug)]
pub(crate) struct ColumnarScales {
    /// Up to 256: version 1 of GPTQ stores one less.
    zeros: Vec<u16>,
    scales: Vec<f32>,
    groups: Vec<usize>,
}

/// AWQ: nibble `i` of a word belongs to this output of eight.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Code `i` of a word.
fn code_of(word: u32, i: usize, bits: usize) -> u16 {
    ((word >> (bits * i)) & ((1 << bits) - 1)) as u16
}

impl ColumnarScales {
    /// From the tensors' content; `Err` says what is wrong with the groups.
    pub(crate) fn new(
        tensors: &ColumnarTensors,
        inputs: usize,
        zeros: &[u32],
        scales: Vec<f32>,
        groups: Option<&[u32]>,
    ) -> Result<Self, String> {
        let (bits, per_word) = (tensors.bits, 32 / tensors.bits);
        let mut unpacked = vec![0; zeros.len() * per_word];
        for (word, out) in zeros.iter().zip(unpacked.chunks_exact_mut(per_word)) {
            for i in 0..per_word {
                match tensors.kind {
                    Columnar::Awq => out[AWQ_ORDER[i]] = code_of(*word, i, bits),
                    Columnar::Gptq { zero_offset } => out[i] = code_of(*word, i, bits) + u16::from(zero_offset),
                }
            }
        }
        let size = inputs / tensors.count;
        let groups = match groups {
            None => (0..inputs).map(|i| i / size).collect(),
            Some(groups) => groups.iter().map(|&g| g as usize).collect::<Vec<_>>(),
        };
        match groups.iter().find(|&&g| g >= tensors.count) {
            Some(g) => Err(format!("names group {g} of {}", tensors.count)),
            None => Ok(ColumnarScales { zeros: unpacked, scales, groups }),
        }
    }
}

/// The words that hold some outputs of an AWQ or GPTQ matrix: a piece of each row of the tensor.
pub(crate) struct ColumnarWords {
    rows: usize,
    row_bytes: usize,
    start: usize,
    pub(crate) line_bytes: usize,
    first_output: usize,
}

impl ColumnarWords {
    /// Number of pieces.
    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    /// Byte offsets of the pieces in the tensor.
    pub(crate) fn offsets(&self) -> impl Iterator<Item = u64> + use<> {
        let (row_bytes, start) = (self.row_bytes, self.start);
        (0..self.rows).map(move |row| (row * row_bytes + start) as u64)
    }
}

/// Where the outputs `lines` are. AWQ packs outputs in words, GPTQ inputs.
pub(crate) fn columnar_words(tensors: &ColumnarTensors, inputs: usize, lines: Lines) -> ColumnarWords {
    let last = lines.first + (lines.count - 1) * lines.step;
    let (first_output, end) = (lines.first / 8 * 8, (last + 1).next_multiple_of(8));
    let (rows, per_word) = match tensors.kind {
        Columnar::Awq => (inputs, 8),
        Columnar::Gptq { .. } => (inputs * tensors.bits / 32, 1),
    };
    ColumnarWords {
        rows,
        row_bytes: tensors.outputs / per_word * 4,
        start: first_output / per_word * 4,
        line_bytes: (end - first_output) / per_word * 4,
        first_output,
    }
}

/// Outputs `lines` of an AWQ or GPTQ matrix, `[lines, inputs]`, as f32.
pub(crate) fn columnar(
    tensors: &ColumnarTensors,
    scales: &ColumnarScales,
    words: &ColumnarWords,
    bytes: &[u8],
    lines: Lines,
    inputs: usize,
    out: &mut Vec<f32>,
) {
    out.clear();
    out.resize(lines.count * inputs, 0.0);
    let awq_place: [usize; 8] =
        std::array::from_fn(|output| AWQ_ORDER.iter().position(|&o| o == output).expect("a permutation"));
    let (bits, per_word) = (tensors.bits, 32 / tensors.bits);
    let word_at = |row: usize, word: usize| {
        let at = row * words.line_bytes + word * 4;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    for (i, out) in out.chunks_exact_mut(inputs).enumerate() {
        let output = lines.first + i * lines.step;
        let local = output - words.first_output;
        for (input, out) in out.iter_mut().enumerate() {
            let code = match tensors.kind {
                Columnar::Awq => code_of(word_at(input, local / 8), awq_place[local % 8], bits),
                Columnar::Gptq { .. } => code_of(word_at(input / per_word, local), input % per_word, bits),
            };
            let at = scales.groups[input] * tensors.outputs + output;
            *out = (f32::from(code) - f32::from(scales.zeros[at])) * scales.scales[at];
        }
    }
}

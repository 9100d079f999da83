//! AWQ and GPTQ: `qweight`, `qzeros` and `scales`, whose rows are input features. GPTQ may have the group of each input in
//! `g_idx` (<https://github.com/casper-hansen/AutoAWQ>, <https://github.com/AutoGPTQ/AutoGPTQ>,
//! <https://github.com/ModelCloud/GPTQModel>).

use sluice_checksum::Xxh3;
use sluice_format::{MAX_ORDERED_COLS, WeightType};
use sluice_kernels as kernels;
use sluice_weights::{Codes, ScaleType, Zero};

use super::carry::{Carrier, CodeRows};
use super::checks::{check_dtype, check_shape, dtype_error, shape_error};
use super::grouped::{scale_values, unpack_codes, wide_scale};
use super::lines::{Lines, gather, of_rows, pieces};
use super::{ColumnOrder, Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::plan::form::Parts;
use crate::plan::scheme::Scheme;
use crate::source::{Checkpoint, WIDE_FLOATS};

/// Formats with input features as rows and output features as columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columnar {
    /// AWQ: a word holds eight outputs, in an order of its own.
    Awq,
    /// GPTQ: a word holds several inputs. The zero is the stored zero plus this offset: version 1 stores one less.
    Gptq { zero_offset: u8 },
}

/// The tensors of an AWQ or GPTQ matrix: `value = (code - zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ColumnarMatrix {
    kind: Columnar,
    /// Bits of a code: 2, 3, 4 or 8.
    bits: usize,
    zeros: usize,
    scales: usize,
    scale_type: ScaleType,
    /// The tensor with the group of each input feature; `None`: groups are consecutive.
    groups: Option<usize>,
    columns: Columns,
    /// Whether every zero fits into a byte.
    byte_zeros: bool,
    /// Number of groups.
    count: usize,
    /// Output and input features.
    shape: [usize; 2],
}

/// How the columns are divided into groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Columns {
    /// Groups are consecutive.
    InOrder,
    /// Columns are not in the order of their groups, as after GPTQ's activation order (`desc_act`). The groups are equally large:
    /// after sorting by group, they are consecutive.
    Disorder(ColumnOrder),
    /// Some have more columns than others.
    Uneven,
}

impl Columns {
    /// `groups`: the group of each column, of `count` groups. The first invalid group is an error.
    fn of(groups: &[u32], count: usize) -> Result<Columns, u32> {
        let size = groups.len() / count;
        if follow_one_another(groups, size) {
            return Ok(Columns::InOrder);
        }
        let mut sizes = vec![0; count];
        for &group in groups {
            *sizes.get_mut(group as usize).ok_or(group)? += 1;
        }
        if sizes.iter().any(|&s| s != size) {
            return Ok(Columns::Uneven);
        }
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        let mut hash = Xxh3::new();
        hash.update(&bytes);
        Ok(Columns::Disorder(ColumnOrder(hash.digest128())))
    }

    fn order(self) -> Option<ColumnOrder> {
        if let Columns::Disorder(order) = self { Some(order) } else { None }
    }
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
    // The shape reveals AWQ, which packs along the other axis, but not the version of GPTQ.
    let awq_by_shape = (found == [inputs, outputs / 8]).then_some(Columnar::Awq);
    let Some(kind) = awq_by_shape.or(scheme.columnar) else {
        let supported = "`qweight` of GPTQ where `quantization_config` says that it is, with `quant_method`";
        return Err(dtype_error(checkpoint, codes, supported));
    };
    let awq = kind == Columnar::Awq;
    let rows = found.first().copied().unwrap_or(0);
    // GPTQ may have other widths for some layers; the shape shows them.
    let bits = match rows.saturating_mul(32) / inputs {
        bits @ (2 | 3 | 8) if !awq => bits,
        _ => 4,
    };
    // Codes fill whole words; codes of three bits fill three words at a time.
    let whole = if bits == 3 { 32 } else { 32 / bits };
    if !inputs.is_multiple_of(whole) || !outputs.is_multiple_of(whole) {
        return Err(shape_error(checkpoint, codes, &[inputs.div_ceil(whole), outputs]));
    }
    check_shape(checkpoint, scales, &[count, outputs])?;
    check_shape(checkpoint, zeros, &[count, outputs * bits / 32])?;
    match kind {
        Columnar::Awq => check_shape(checkpoint, codes, &[inputs, outputs / 8])?,
        Columnar::Gptq { .. } => check_shape(checkpoint, codes, &[inputs * bits / 32, outputs])?,
    }
    let groups = parts.tensors.get(3).copied();
    groups.map_or(Ok(()), |groups| check_shape(checkpoint, groups, &[inputs]))?;
    for tensor in [Some(codes), Some(zeros), groups].into_iter().flatten() {
        check_dtype(checkpoint, tensor, &["I32", "U32"], "I32")?;
    }
    let scale_type = wide_scale(&checkpoint.tensors[scales].dtype);
    let scale_type = scale_type.ok_or_else(|| dtype_error(checkpoint, scales, WIDE_FLOATS))?;
    let columns = match groups {
        Some(groups) if scheme.act_order => {
            Columns::of(&all_words(checkpoint, groups)?, count).map_err(|group| ConvertError::Damaged {
                path: checkpoint.path_of(groups).to_owned(),
                problem: format!("`{}` {}", checkpoint.tensors[groups].name, no_group(group, count)),
            })?
        }
        _ => Columns::InOrder,
    };
    // Only the largest zero of eight bits may not fit, because one less than it is stored in a byte.
    let byte_zeros = bits != 8
        || !matches!(kind, Columnar::Gptq { zero_offset: 1.. })
        || !all_words(checkpoint, zeros)?.iter().any(|word| word.to_le_bytes().contains(&255));
    let shape = [outputs, inputs];
    Ok(ColumnarMatrix { kind, bits, zeros, scales, scale_type, groups, columns, byte_zeros, count, shape })
}

/// The message about a group that is not one of `count`. Tools write signed numbers.
fn no_group(group: u32, count: usize) -> String {
    format!("names group {} of {count}", group.cast_signed())
}

/// All words of a small tensor, for planning.
fn all_words(checkpoint: &Checkpoint, tensor: usize) -> Result<Vec<u32>, ConvertError> {
    let mut bytes = vec![0; checkpoint.tensors[tensor].len as usize];
    checkpoint.read(tensor, 0, &mut bytes, &mut Xxh3::new())?;
    Ok(words(&bytes))
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// Whether input `i` is in group `i / size`.
fn follow_one_another(groups: &[u32], size: usize) -> bool {
    groups.iter().enumerate().all(|(i, &group)| group as usize == i / size)
}

/// AWQ: the nibble of a word that belongs to each of its eight outputs.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Up to this many bytes of codes, a thread keeps those of a matrix and reads it once from end to end. For larger matrices, it
/// reads the words of some outputs at a time.
const WHOLE: usize = 64 << 20;

impl ColumnarMatrix {
    /// Unpacks zeros, `[group, output]`; they reach up to 256.
    fn unpack_zeros(&self, bytes: &[u8]) -> Vec<u16> {
        let mut codes = Vec::new();
        unpack_codes(self.bits, bytes, &mut codes);
        match self.kind {
            Columnar::Awq => codes.as_chunks::<8>().0.iter().flat_map(|c| AWQ_PLACE.map(|p| c[p].into())).collect(),
            Columnar::Gptq { zero_offset } => codes.iter().map(|&c| u16::from(c) + u16::from(zero_offset)).collect(),
        }
    }

    fn outputs(&self) -> usize {
        self.shape[0]
    }

    /// The type that takes the codes, transposed.
    fn carrier(&self) -> Option<Carrier> {
        let [_, inputs] = self.shape;
        let group = (inputs / self.count, inputs);
        // Every float type can represent all integers up to 256.
        let zero = if self.byte_zeros { Zero::Byte } else { Zero::Float };
        let carrier = Carrier::new(Codes::Uint(self.bits as u8), group, self.scale_type, zero);
        carrier.filter(|_| match self.columns {
            Columns::InOrder => true,
            Columns::Disorder(_) => inputs <= MAX_ORDERED_COLS,
            Columns::Uneven => false,
        })
    }

    /// A zero in the form of the carrier.
    fn zero_bytes(&self, zero: u16, out: &mut Vec<u8>) {
        out.clear();
        match (self.byte_zeros, self.scale_type) {
            (true, _) => out.push(zero as u8),
            (false, ScaleType::F16) => out.extend(kernels::f32_to_f16(f32::from(zero)).to_le_bytes()),
            (false, ScaleType::Bf16) => out.extend(kernels::f32_to_bf16(f32::from(zero)).to_le_bytes()),
            (false, _) => out.extend(f32::from(zero).to_le_bytes()),
        }
    }

    /// Rows of words, and words of a row that hold eight outputs. AWQ packs outputs into words, GPTQ inputs.
    fn words(&self) -> (usize, usize) {
        match self.kind {
            Columnar::Awq => (self.shape[1], 1),
            Columnar::Gptq { .. } => (self.shape[1] * self.bits / 32, 8),
        }
    }
}

impl Encoding for ColumnarMatrix {
    fn others(&self) -> Vec<usize> {
        [Some(self.zeros), Some(self.scales), self.groups].into_iter().flatten().collect()
    }

    fn carried(&self) -> Option<WeightType> {
        self.carrier().map(|c| WeightType::Grouped(c.ty))
    }

    fn order(&self) -> Option<ColumnOrder> {
        self.columns.order()
    }

    fn obstacle(&self) -> Option<&'static str> {
        match self.columns {
            Columns::InOrder => None,
            Columns::Uneven => Some("`g_idx` gives some of their groups more columns than others"),
            Columns::Disorder(_) if self.shape[1] > MAX_ORDERED_COLS => {
                Some("their groups are in disorder (`desc_act`), and they have more than 65536 columns")
            }
            Columns::Disorder(_) => None,
        }
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        let zeros = reader.all(self.zeros)?;
        let scales = reader.all(self.scales)?;
        let size = selection.cols / self.count;
        let groups = match self.groups {
            None => (0..selection.cols).map(|i| i / size).collect(),
            Some(tensor) => {
                let found = words(&reader.all(tensor)?);
                let columns = Columns::of(&found, self.count);
                let columns = columns.map_err(|group| reader.damaged(tensor, &no_group(group, self.count)))?;
                if columns != self.columns {
                    // If the columns may be out of order, `g_idx` has been read before; it can have changed since then.
                    let problem = match self.columns {
                        Columns::InOrder => {
                            "has groups in disorder, although `desc_act` of the configuration is false, or has changed"
                        }
                        _ => "has changed since the conversion was planned",
                    };
                    return Err(reader.damaged(tensor, problem));
                }
                found.iter().map(|&g| g as usize).collect::<Vec<_>>()
            }
        };
        let order = self.columns.order().filter(|_| selection.cols <= MAX_ORDERED_COLS).map(|_| {
            let mut order: Vec<u16> = (0..=u16::MAX).take(selection.cols).collect();
            // A stable sort: columns of a group stay in order.
            order.sort_by_key(|&column| groups[usize::from(column)]);
            order
        });
        let (rows, per_eight) = self.words();
        let bytes = rows * self.outputs() / 8 * per_eight * 4;
        let codes = (bytes <= WHOLE).then(|| reader.all(selection.tensor)).transpose()?;
        let scale_bytes = scales;
        let scales = scale_values(self.scale_type, &scale_bytes);
        let zeros = self.unpack_zeros(&zeros);
        Ok(Box::new(ColumnarDecoder { layout: self, selection, codes, zeros, scales, scale_bytes, groups, order }))
    }
}

/// Zeros and scales, `[group, output]`, and the group of each input.
struct ColumnarDecoder<'s> {
    layout: &'s ColumnarMatrix,
    selection: &'s Selection,
    /// All stored codes, if there are not too many.
    codes: Option<Vec<u8>>,
    zeros: Vec<u16>,
    scales: Vec<f32>,
    /// The stored bytes of the scales.
    scale_bytes: Vec<u8>,
    groups: Vec<usize>,
    /// The columns by group, if they are not in that order.
    order: Option<Vec<u16>>,
}

/// The codes of `8 · words` outputs, `[outputs, inputs]`, from `words` words for each input.
fn awq_outputs(bytes: &[u8], words: usize, inputs: usize) -> Vec<u8> {
    let mut out = vec![0; 8 * words * inputs];
    let (all, _) = bytes.as_chunks::<4>();
    for word in 0..words {
        let outputs = &mut out[word * 8 * inputs..][..8 * inputs];
        // Eight inputs at a time; their number is a multiple of eight.
        for (tile, rows) in all.chunks_exact(8 * words).enumerate() {
            let codes: [u32; 8] = std::array::from_fn(|i| u32::from_le_bytes(rows[i * words + word]));
            for (output, place) in AWQ_PLACE.iter().enumerate() {
                let of_output: [u8; 8] = codes.map(|code| (code >> (4 * place) & 15) as u8);
                outputs[output * inputs + 8 * tile..][..8].copy_from_slice(&of_output);
            }
        }
    }
    out
}

impl ColumnarDecoder<'_> {
    /// The words of the outputs from `first`, a multiple of eight, to `end`, for one piece of the tensor's rows after the other.
    fn read(&self, first: usize, end: usize, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        let (rows, per_eight) = self.layout.words();
        let row_bytes = self.layout.outputs() / 8 * per_eight * 4;
        let (start, line_bytes) = (first / 8 * per_eight * 4, (end - first) / 8 * per_eight * 4);
        let mut bytes = vec![0; rows * line_bytes];
        for (row, line) in bytes.chunks_exact_mut(line_bytes).enumerate() {
            let at = row * row_bytes + start;
            match &self.codes {
                Some(codes) => line.copy_from_slice(&codes[at..][..line_bytes]),
                None => reader.read(self.selection.tensor, at as u64, line)?,
            }
        }
        Ok(bytes)
    }

    /// Codes of the outputs `lines`, `[lines, inputs]`.
    fn line_codes(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        let (layout, inputs) = (self.layout, self.selection.cols);
        let last = lines.first + (lines.count - 1) * lines.step;
        let (first, end) = (lines.first / 8 * 8, (last + 1).next_multiple_of(8));
        let bytes = self.read(first, end, reader)?;
        let mut out = vec![0; lines.count * inputs];
        match layout.kind {
            Columnar::Awq => {
                let all = awq_outputs(&bytes, (end - first) / 8, inputs);
                for (output, out) in lines.numbers().zip(out.chunks_exact_mut(inputs)) {
                    out.copy_from_slice(&all[(output - first) * inputs..][..inputs]);
                }
            }
            Columnar::Gptq { .. } => {
                let (mut stream, mut codes) = (Vec::new(), Vec::new());
                for (i, output) in lines.numbers().enumerate() {
                    stream.clear();
                    let rows = bytes.chunks_exact(4 * (end - first));
                    rows.for_each(|row| stream.extend_from_slice(&row[(output - first) * 4..][..4]));
                    codes.clear();
                    unpack_codes(layout.bits, &stream, &mut codes);
                    out[i * inputs..][..inputs].copy_from_slice(&codes);
                }
            }
        }
        Ok(out)
    }

    /// Outputs `lines`, `[lines, inputs]`, as f32.
    fn line_values(&self, lines: Lines, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let (outputs, inputs) = (self.layout.outputs(), self.selection.cols);
        let codes = self.line_codes(lines, reader)?;
        out.clear();
        for (output, codes) in lines.numbers().zip(codes.chunks_exact(inputs)) {
            let value = |(&code, &group): (&u8, &usize)| {
                let at = group * outputs + output;
                (f32::from(code) - f32::from(self.zeros[at])) * self.scales[at]
            };
            out.extend(codes.iter().zip(&self.groups).map(value));
        }
        Ok(())
    }
}

impl Decoder for ColumnarDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        gather(self.selection, rows, out, |piece, values| self.line_values(piece, reader, values))
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        let Carrier { ty, repeat } = self.layout.carrier().expect("it is carried");
        let (outputs, width) = (self.layout.outputs(), self.layout.scale_type.len());
        let (mut code_rows, mut zero) = (CodeRows::default(), Vec::new());
        // The magnitude of a value is at most two to the number of bits, or the zero, times the scale.
        let reach = 256.0f32;
        let mut finite = true;
        for lines in of_rows(self.selection, rows) {
            let codes = self.line_codes(lines, reader)?;
            match &self.order {
                None => code_rows.codes.extend_from_slice(&codes),
                Some(order) => code_rows.codes.extend(
                    codes.chunks_exact(rows.cols).flat_map(|row| order.iter().map(|&column| row[usize::from(column)])),
                ),
            }
            for output in lines.numbers() {
                for at in (0..self.layout.count).map(|group| group * outputs + output) {
                    finite &= (self.scales[at] * reach).is_finite();
                    self.layout.zero_bytes(self.zeros[at], &mut zero);
                    code_rows.add_group(repeat, &self.scale_bytes[at * width..][..width], &zero);
                }
            }
        }
        code_rows.pack(ty, rows.cols, &mut groups);
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn order(&self) -> Option<&[u16]> {
        self.order.as_deref()
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        if self.codes.is_some() {
            return Ok(());
        }
        pieces(self.selection, rows).into_iter().try_for_each(|lines| {
            let last = lines.first + (lines.count - 1) * lines.step;
            self.read(lines.first / 8 * 8, (last + 1).next_multiple_of(8), reader).map(drop)
        })
    }
}

//! Bytes of the checkpoint as rows of numbers.

use sluice_checksum::Xxh3;

use sluice_kernels::{bf16_to_f32, f16_to_f32};

use crate::contents::{Contents, Follower};
use crate::decode::{self, ColumnarScales, ColumnarWords, Lines};
use crate::error::ConvertError;
use crate::fp8;
use crate::plan::resolve::{Fp8Scales, Grouped};
use crate::plan::{Source, Storage};
use crate::source::{Checkpoint, Dtype};

/// What belongs to a tensor as a whole and is read before its rows.
#[derive(Debug)]
pub(crate) enum Scales {
    None,
    Fp8(BlockScales),
    /// Factor on all scales of grouped codes.
    Global(f32),
    Columnar(ColumnarScales),
}

/// Scales of an fp8 tensor.
#[derive(Debug)]
pub(crate) struct BlockScales {
    values: Vec<f32>,
    layout: Fp8Scales,
}

impl BlockScales {
    /// The scale of a source element.
    pub(crate) fn at(&self, element: (usize, usize)) -> f32 {
        self.values[self.layout.index(element)]
    }
}

/// Reads rows of sources, counts and hashes the bytes. Buffers are reused.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    follower: Follower<'a>,
    raw: Vec<u8>,
    segment: Vec<u8>,
    lines: Vec<f32>,
    digest: Xxh3,
    bytes: u64,
}

/// A range of rows of a tensor; those of a batch are counted through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Columns of the matrix.
    pub(crate) cols: usize,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, contents: &'a Contents<'a>) -> Self {
        let (raw, segment, lines) = (Vec::new(), Vec::new(), Vec::new());
        let follower = Follower::new(contents);
        Loader { checkpoint, follower, raw, segment, lines, digest: Xxh3::new(), bytes: 0 }
    }

    /// Digest (xxh3-128) and number of the bytes read since the last call.
    pub(crate) fn take_digest(&mut self) -> (u128, u64) {
        self.follower.reset();
        let digest = std::mem::take(&mut self.digest).digest128();
        (digest, std::mem::take(&mut self.bytes))
    }

    /// The error that a value of this source is not a number.
    pub(crate) fn not_finite(&self, tensor: usize) -> ConvertError {
        ConvertError::NotFinite {
            path: self.checkpoint.path_of(tensor).to_owned(),
            tensor: self.checkpoint.tensors[tensor].name.clone(),
        }
    }

    /// The scales of a source that are read as a whole.
    pub(crate) fn scales(&mut self, source: &Source) -> Result<Scales, ConvertError> {
        match source.storage {
            Storage::F32 | Storage::F16 | Storage::Bf16 => Ok(Scales::None),
            Storage::Fp8(layout) => {
                let values = self.floats(layout.tensor)?;
                // A scale whose product with the largest code overflows is as bad as an infinite one.
                if values.iter().any(|s| !(s * fp8::E4M3_MAX).is_finite()) {
                    return Err(self.not_finite(layout.tensor));
                }
                Ok(Scales::Fp8(BlockScales { values, layout }))
            }
            Storage::Grouped(Grouped { global: Some(global), .. }) => {
                let value = self.floats(global.tensor)?[0];
                let factor = if global.divides { 1.0 / value } else { value };
                if factor.is_finite() { Ok(Scales::Global(factor)) } else { Err(self.not_finite(global.tensor)) }
            }
            Storage::Grouped(_) => Ok(Scales::Global(1.0)),
            Storage::Columnar(tensors) => {
                let (zeros, scales) = (self.words(tensors.zeros)?, self.floats(tensors.scales)?);
                let groups = tensors.groups.map(|t| self.words(t)).transpose()?;
                let made = ColumnarScales::new(&tensors, source.cols, &zeros, scales, groups.as_deref());
                made.map(Scales::Columnar).map_err(|problem| ConvertError::Damaged {
                    path: self.checkpoint.path_of(source.tensor).to_owned(),
                    problem: format!("`{}` {problem}", self.checkpoint.tensors[tensors.groups.unwrap_or(0)].name),
                })
            }
        }
    }

    /// Elements of `rows`, row-major, as the source stores them: numbers or fp8 codes.
    pub(crate) fn raw(&mut self, source: &Source, rows: Rows) -> Result<&[u8], ConvertError> {
        let element = element_len(source.storage);
        let mut raw = std::mem::take(&mut self.raw);
        raw.resize(rows.count * rows.cols * element, 0);
        let mut done = 0;
        while done < rows.count {
            // Rows up to the end of a run have one step from each to the next.
            let first = rows.first + done;
            let count = (source.strides.run - first % source.strides.run).min(rows.count - done);
            let run = Rows { first, count, cols: rows.cols };
            let out = &mut raw[done * rows.cols * element..][..count * rows.cols * element];
            self.gather(source, run, element, out)?;
            done += count;
        }
        self.raw = raw;
        Ok(&self.raw)
    }

    /// Codes of `rows`, one per byte, and their scales as the source stores them, of a source with whole rows.
    pub(crate) fn codes(
        &mut self,
        source: &Source,
        grouped: &Grouped,
        rows: Rows,
    ) -> Result<(Vec<u8>, Vec<u8>), ConvertError> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for lines in decode::lines_of_rows(source, rows) {
            let (packed, of_groups) = self.grouped_lines(source, grouped, lines)?;
            decode::unpack_codes(grouped.code, &packed, &mut codes);
            scales.extend_from_slice(&of_groups);
        }
        Ok((codes, scales))
    }

    /// Elements of `rows`, row-major, as f32.
    pub(crate) fn f32(
        &mut self,
        source: &Source,
        scales: &Scales,
        rows: Rows,
        out: &mut Vec<f32>,
    ) -> Result<(), ConvertError> {
        match (source.storage, scales) {
            (Storage::F32, _) => widen(self.raw(source, rows)?, &Dtype::F32, out),
            (Storage::F16, _) => widen(self.raw(source, rows)?, &Dtype::F16, out),
            (Storage::Bf16, _) => widen(self.raw(source, rows)?, &Dtype::Bf16, out),
            (Storage::Fp8(_), Scales::Fp8(scales)) => {
                out.clear();
                for (r, codes) in self.raw(source, rows)?.chunks_exact(rows.cols).enumerate() {
                    let at = |c| scales.at(source.locate(rows.first + r, c));
                    out.extend(codes.iter().enumerate().map(|(c, &code)| fp8::E4M3[code as usize] * at(c)));
                }
            }
            _ => self.decoded(source, scales, rows, out)?,
        }
        if source.plus_one {
            out.iter_mut().for_each(|v| *v += 1.0);
        }
        if out.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(self.not_finite(source.tensor)) }
    }

    /// Reads what [`Loader::codes`] (for `codes`), [`Loader::raw`] or [`Loader::f32`] read for these rows, in the same order, for
    /// the digest alone.
    pub(crate) fn skim(&mut self, source: &Source, codes: bool, rows: Rows) -> Result<(), ConvertError> {
        match source.storage {
            Storage::F32 | Storage::F16 | Storage::Bf16 | Storage::Fp8(_) => self.raw(source, rows).map(drop),
            Storage::Grouped(grouped) => {
                let pieces = if codes { decode::lines_of_rows(source, rows) } else { pieces(source, rows) };
                pieces.into_iter().try_for_each(|lines| {
                    self.grouped_lines(source, &grouped, lines)?;
                    if codes { Ok(()) } else { self.bias_lines(source, &grouped, lines).map(drop) }
                })
            }
            Storage::Columnar(tensors) => pieces(source, rows).into_iter().try_for_each(|lines| {
                let words = decode::columnar_words(&tensors, source.cols, lines);
                self.read_words(source, &words).map(drop)
            }),
        }
    }

    /// Elements of packed sources: decodes the source's rows that hold them, then picks.
    fn decoded(
        &mut self,
        source: &Source,
        scales: &Scales,
        rows: Rows,
        out: &mut Vec<f32>,
    ) -> Result<(), ConvertError> {
        let mut lines = std::mem::take(&mut self.lines);
        out.clear();
        out.resize(rows.count * rows.cols, 0.0);
        let transposed = is_transposed(source);
        let mut row = 0;
        for piece in pieces(source, rows) {
            self.line_values(source, scales, piece, &mut lines)?;
            let values = lines.chunks_exact(source.cols);
            if transposed {
                // A piece holds every column of some rows, which are columns of the source.
                let count = piece.rows;
                for (c, line) in values.enumerate() {
                    for r in 0..count {
                        out[(row + r) * rows.cols + c] = line[piece.column + r * source.strides.row_step];
                    }
                }
                row += count;
            } else {
                for line in values {
                    out[row * rows.cols..][..rows.cols].copy_from_slice(&line[piece.column..][..rows.cols]);
                    row += 1;
                }
            }
        }
        self.lines = lines;
        Ok(())
    }

    /// Whole rows of a packed source as f32.
    fn line_values(
        &mut self,
        source: &Source,
        scales: &Scales,
        lines: Lines,
        out: &mut Vec<f32>,
    ) -> Result<(), ConvertError> {
        match (source.storage, scales) {
            (Storage::Grouped(grouped), Scales::Global(global)) => {
                let (packed, of_groups) = self.grouped_lines(source, &grouped, lines)?;
                let biases = self.bias_lines(source, &grouped, lines)?;
                decode::grouped(&grouped, *global, &packed, &of_groups, biases.as_deref(), out);
            }
            (Storage::Columnar(tensors), Scales::Columnar(scales)) => {
                let words = decode::columnar_words(&tensors, source.cols, lines);
                let bytes = self.read_words(source, &words)?;
                decode::columnar(&tensors, scales, &words, &bytes, lines, source.cols, out);
            }
            _ => unreachable!("scales are read for the storage of their source"),
        }
        Ok(())
    }

    /// Biases of the groups of whole rows, where there are any.
    fn bias_lines(
        &mut self,
        source: &Source,
        grouped: &Grouped,
        lines: Lines,
    ) -> Result<Option<Vec<u8>>, ConvertError> {
        let row = source.cols / grouped.group * decode::scale_len(grouped.scale_type);
        grouped.biases.map(|biases| self.read_lines(biases, row, lines)).transpose()
    }

    fn read_words(&mut self, source: &Source, words: &ColumnarWords) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; words.len() * words.line_bytes];
        for (at, line) in words.offsets().zip(bytes.chunks_exact_mut(words.line_bytes)) {
            self.read(source.tensor, at, line)?;
        }
        Ok(bytes)
    }

    /// Packed codes and scales of whole rows.
    fn grouped_lines(
        &mut self,
        source: &Source,
        grouped: &Grouped,
        lines: Lines,
    ) -> Result<(Vec<u8>, Vec<u8>), ConvertError> {
        let codes = self.read_lines(source.tensor, source.cols * grouped.code.bits() / 8, lines)?;
        let scale_row = source.cols / grouped.group * decode::scale_len(grouped.scale_type);
        Ok((codes, self.read_lines(grouped.scales, scale_row, lines)?))
    }

    fn read_lines(&mut self, tensor: usize, line_bytes: usize, lines: Lines) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; line_bytes * lines.count];
        if lines.step == 1 {
            self.read(tensor, (lines.first * line_bytes) as u64, &mut bytes)?;
            return Ok(bytes);
        }
        for (i, line) in bytes.chunks_exact_mut(line_bytes).enumerate() {
            self.read(tensor, ((lines.first + i * lines.step) * line_bytes) as u64, line)?;
        }
        Ok(bytes)
    }

    /// Elements of rows of one run. Reads along the source's memory: row by row, or column by column where columns are what
    /// lies together; many at once where little lies between them.
    fn gather(&mut self, source: &Source, rows: Rows, element: usize, out: &mut [u8]) -> Result<(), ConvertError> {
        let s = &source.strides;
        // A strip is what lies together; `within` and `across` are its step and the step from strip to strip.
        let by_column = s.col_step > s.row_step;
        let (strips, length, across, within) = if by_column {
            (rows.cols, rows.count, s.col_step, s.row_step)
        } else {
            (rows.count, rows.cols, s.row_step, s.col_step)
        };
        let start = s.at(rows.first, 0);
        if !by_column && within == 1 && (across == length || strips == 1) {
            return self.read(source.tensor, (start * element) as u64, out);
        }
        let span = (length - 1) * within + 1;
        // One read for all, unless most of it would be thrown away.
        let at_once = if 2 * span >= across { strips } else { 1 };
        let mut segment = std::mem::take(&mut self.segment);
        for first in (0..strips).step_by(at_once) {
            let count = at_once.min(strips - first);
            segment.resize(((count - 1) * across + span) * element, 0);
            self.read(source.tensor, ((start + first * across) * element) as u64, &mut segment)?;
            for strip in 0..count {
                for i in 0..length {
                    let from = (strip * across + i * within) * element;
                    let (row, col) = if by_column { (i, first + strip) } else { (first + strip, i) };
                    let to = (row * rows.cols + col) * element;
                    out[to..to + element].copy_from_slice(&segment[from..from + element]);
                }
            }
        }
        self.segment = segment;
        Ok(())
    }

    fn floats(&mut self, tensor: usize) -> Result<Vec<f32>, ConvertError> {
        let bytes = self.all(tensor)?;
        let mut values = Vec::new();
        widen(&bytes, &self.checkpoint.tensors[tensor].dtype, &mut values);
        Ok(values)
    }

    fn words(&mut self, tensor: usize) -> Result<Vec<u32>, ConvertError> {
        let bytes = self.all(tensor)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    fn all(&mut self, tensor: usize) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; self.checkpoint.tensors[tensor].len as usize];
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.bytes += out.len() as u64;
        self.checkpoint.read(tensor, at, out, &mut self.digest)?;
        self.follower.read(self.checkpoint.part_of(tensor), at, out);
        Ok(())
    }
}

/// Whether the columns of a packed source are what lies together.
fn is_transposed(source: &Source) -> bool {
    source.strides.col_step != 1
}

/// The source rows that hold `rows` of a packed source.
fn pieces(source: &Source, rows: Rows) -> Vec<Lines> {
    if is_transposed(source) { decode::lines_of_columns(source, rows) } else { decode::lines_of_rows(source, rows) }
}

fn element_len(storage: Storage) -> usize {
    match storage {
        Storage::F32 => 4,
        Storage::F16 | Storage::Bf16 => 2,
        Storage::Fp8(_) => 1,
        Storage::Grouped(_) | Storage::Columnar(_) => unreachable!("packed codes are not read one by one"),
    }
}

/// Little-endian numbers of a wide format as f32.
fn widen(bytes: &[u8], dtype: &Dtype, out: &mut Vec<f32>) {
    out.clear();
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    match dtype {
        Dtype::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::F16 => out.extend(halves().map(f16_to_f32)),
        Dtype::Bf16 => out.extend(halves().map(bf16_to_f32)),
        Dtype::F8E4M3 | Dtype::Other(_) => unreachable!("the plan refuses {} here", dtype.name()),
    }
}

//! Bytes of a checkpoint's rows.

use sluice_checksum::Xxh3;
use sluice_kernels::{bf16_to_f32, f16_to_f32};

use super::lines::{Lines, pick, pieces};
use super::{Rows, Selection};
use crate::contents::{Contents, Follower};
use crate::error::ConvertError;
use crate::source::{Checkpoint, Dtype, RowOrder};

/// Reads rows of tensors, and counts and hashes their bytes. Buffers are reused.
pub(crate) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    follower: Follower<'a>,
    raw: Vec<u8>,
    segment: Vec<u8>,
    digest: Xxh3,
    bytes: u64,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, contents: &'a Contents<'a>) -> Self {
        let (raw, segment) = (Vec::new(), Vec::new());
        let follower = Follower::new(contents);
        Reader { checkpoint, follower, raw, segment, digest: Xxh3::new(), bytes: 0 }
    }

    /// Digest (xxh3-128) and number of the bytes read since the last call.
    pub(crate) fn take_digest(&mut self) -> (u128, u64) {
        self.follower.reset();
        let digest = std::mem::take(&mut self.digest).digest128();
        (digest, std::mem::take(&mut self.bytes))
    }

    /// The error that a value of this tensor is not finite.
    pub(crate) fn not_finite(&self, tensor: usize) -> ConvertError {
        ConvertError::NotFinite {
            path: self.checkpoint.path_of(tensor).to_owned(),
            tensor: self.checkpoint.tensors[tensor].name.clone(),
        }
    }

    /// The error that a tensor of the same file as `tensor` has impossible contents.
    pub(super) fn damaged(&self, tensor: usize, problem: &str) -> ConvertError {
        ConvertError::Damaged {
            path: self.checkpoint.path_of(tensor).to_owned(),
            problem: format!("`{}` {problem}", self.checkpoint.tensors[tensor].name),
        }
    }

    /// Elements of `rows`, row-major, as stored in the source; an element has `element` bytes.
    pub(super) fn raw(&mut self, selection: &Selection, element: usize, rows: Rows) -> Result<&[u8], ConvertError> {
        let mut raw = std::mem::take(&mut self.raw);
        raw.resize(rows.count * rows.cols * element, 0);
        if self.checkpoint.tensors[selection.tensor].order == RowOrder::AsStored {
            let mut done = 0;
            while done < rows.count {
                // Up to the end of a run, rows are equally far apart.
                let first = rows.first + done;
                let count = (selection.strides.run - first % selection.strides.run).min(rows.count - done);
                let run = Rows { first, count, cols: rows.cols };
                let out = &mut raw[done * rows.cols * element..][..count * rows.cols * element];
                self.gather(selection, run, element, out)?;
                done += count;
            }
        } else {
            let mut row = 0;
            for piece in pieces(selection, rows) {
                let lines = self.lines(selection.tensor, selection.cols * element, piece)?;
                row = pick(selection, piece, &lines, element, (&mut raw, rows.cols, row));
            }
        }
        self.raw = raw;
        Ok(&self.raw)
    }

    /// Whole rows of a tensor, of `line_bytes` bytes each, in the order of the model.
    pub(super) fn lines(&mut self, tensor: usize, line_bytes: usize, lines: Lines) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; line_bytes * lines.count];
        match (self.checkpoint.tensors[tensor].order, lines.step) {
            (RowOrder::AsStored, 1) => self.read(tensor, (lines.first * line_bytes) as u64, &mut bytes)?,
            (RowOrder::Interleaved { head_rows }, 1) => {
                // Reads the whole heads that hold them, because their rows are interleaved.
                let begin = lines.first / head_rows * head_rows;
                let end = (lines.first + lines.count).next_multiple_of(head_rows);
                let mut heads = vec![0; (end - begin) * line_bytes];
                self.read(tensor, (begin * line_bytes) as u64, &mut heads)?;
                let order = RowOrder::Interleaved { head_rows };
                for (number, line) in lines.numbers().zip(bytes.chunks_exact_mut(line_bytes)) {
                    line.copy_from_slice(&heads[(order.stored(number) - begin) * line_bytes..][..line_bytes]);
                }
            }
            (order, _) => {
                for (number, line) in lines.numbers().zip(bytes.chunks_exact_mut(line_bytes)) {
                    self.read(tensor, (order.stored(number) * line_bytes) as u64, line)?;
                }
            }
        }
        Ok(bytes)
    }

    /// Elements of rows of one run. Reads in the order of the source: row by row, or column by column if columns are contiguous; in
    /// one read if the gaps are small.
    fn gather(
        &mut self,
        selection: &Selection,
        rows: Rows,
        element: usize,
        out: &mut [u8],
    ) -> Result<(), ConvertError> {
        let s = &selection.strides;
        // A strip is contiguous; `within` is the step inside it, `across` the step from strip to strip.
        let by_column = s.col_step > s.row_step;
        let (strips, length, across, within) = if by_column {
            (rows.cols, rows.count, s.col_step, s.row_step)
        } else {
            (rows.count, rows.cols, s.row_step, s.col_step)
        };
        let start = s.at(rows.first, 0);
        if !by_column && within == 1 && (across == length || strips == 1) {
            return self.read(selection.tensor, (start * element) as u64, out);
        }
        let span = (length - 1) * within + 1;
        // One read for all, unless most of it would be discarded.
        let at_once = if 2 * span >= across { strips } else { 1 };
        let mut segment = std::mem::take(&mut self.segment);
        for first in (0..strips).step_by(at_once) {
            let count = at_once.min(strips - first);
            segment.resize(((count - 1) * across + span) * element, 0);
            self.read(selection.tensor, ((start + first * across) * element) as u64, &mut segment)?;
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

    /// All numbers of a tensor of a wide format.
    pub(super) fn floats(&mut self, tensor: usize) -> Result<Vec<f32>, ConvertError> {
        let bytes = self.all(tensor)?;
        let mut values = Vec::new();
        widen(&bytes, &self.checkpoint.tensors[tensor].dtype, &mut values);
        Ok(values)
    }

    /// All bytes of a tensor.
    pub(super) fn all(&mut self, tensor: usize) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; self.checkpoint.tensors[tensor].len as usize];
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Bytes of a tensor from byte `at` on, as stored.
    pub(super) fn read(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.bytes += out.len() as u64;
        self.checkpoint.read(tensor, at, out, &mut self.digest)?;
        if let Some(part) = self.checkpoint.part_of(tensor) {
            self.follower.read(part, at, out);
        }
        Ok(())
    }
}

/// Little-endian numbers of a wide format as f32.
pub(super) fn widen(bytes: &[u8], dtype: &Dtype, out: &mut Vec<f32>) {
    out.clear();
    match dtype {
        Dtype::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::F16 => out.extend(halves(bytes).map(f16_to_f32)),
        Dtype::Bf16 => out.extend(halves(bytes).map(bf16_to_f32)),
        other => unreachable!("the plan refuses {} here", other.name()),
    }
}

/// Little-endian numbers of 16 bits.
pub(super) fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b))
}

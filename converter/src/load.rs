//! Bytes of the checkpoint as rows of numbers.

use xxhash_rust::xxh3::Xxh3;

use sluice_kernels::{bf16_to_f32, f16_to_f32};

use crate::error::ConvertError;
use crate::fp8;
use crate::plan::resolve::SCALE_BLOCK;
use crate::plan::{Source, Storage};
use crate::source::{Checkpoint, Dtype};

/// Scales of an fp8 tensor, row-major, one per 128×128 block.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockScales {
    values: Vec<f32>,
    cols: usize,
}

impl BlockScales {
    /// The scale of a source element.
    pub(crate) fn at(&self, (row, col): (usize, usize)) -> f32 {
        self.values[row / SCALE_BLOCK * self.cols + col / SCALE_BLOCK]
    }
}

/// Reads rows of sources, counts and hashes the bytes. Buffers are reused.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    raw: Vec<u8>,
    segment: Vec<u8>,
    digest: Xxh3,
    bytes: u64,
}

/// A range of rows of one matrix of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) batch: usize,
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Columns of the matrix.
    pub(crate) cols: usize,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Self {
        Loader { checkpoint, raw: Vec::new(), segment: Vec::new(), digest: Xxh3::new(), bytes: 0 }
    }

    /// Digest (xxh3-128) and number of the bytes read since the last call.
    pub(crate) fn take_digest(&mut self) -> (u128, u64) {
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

    /// The scales of an fp8 source; none for others.
    pub(crate) fn scales(&mut self, source: &Source) -> Result<BlockScales, ConvertError> {
        let Storage::Fp8 { scales } = source.storage else { return Ok(BlockScales::default()) };
        let t = &self.checkpoint.tensors[scales];
        let mut bytes = vec![0; t.len as usize];
        self.read(scales, 0, &mut bytes)?;
        let mut values = Vec::new();
        widen(&bytes, &self.checkpoint.tensors[scales].dtype, &mut values);
        // A scale whose product with the largest code overflows is as bad as an infinite one.
        if values.iter().any(|s| !(s * fp8::E4M3_MAX).is_finite()) {
            return Err(self.not_finite(scales));
        }
        Ok(BlockScales { values, cols: source.cols.div_ceil(SCALE_BLOCK) })
    }

    /// Elements of `rows`, row-major, as the source stores them.
    pub(crate) fn raw(&mut self, source: &Source, rows: Rows) -> Result<&[u8], ConvertError> {
        let element = element_len(source.storage);
        let mut raw = std::mem::take(&mut self.raw);
        raw.resize(rows.count * rows.cols * element, 0);
        let result = if source.transposed {
            self.read_transposed(source, rows, element, &mut raw)
        } else {
            let (row, _) = source.locate(rows.batch, rows.first, 0);
            self.read(source.tensor, (row * source.cols * element) as u64, &mut raw)
        };
        self.raw = raw;
        result.map(|()| self.raw.as_slice())
    }

    /// Elements of `rows`, row-major, as f32.
    pub(crate) fn f32(
        &mut self,
        source: &Source,
        scales: &BlockScales,
        rows: Rows,
        out: &mut Vec<f32>,
    ) -> Result<(), ConvertError> {
        let raw = self.raw(source, rows)?;
        match source.storage {
            Storage::F32 => widen(raw, &Dtype::F32, out),
            Storage::F16 => widen(raw, &Dtype::F16, out),
            Storage::Bf16 => widen(raw, &Dtype::Bf16, out),
            Storage::Fp8 { .. } => {
                out.clear();
                for (r, codes) in raw.chunks_exact(rows.cols).enumerate() {
                    let at = |c| scales.at(source.locate(rows.batch, rows.first + r, c));
                    out.extend(codes.iter().enumerate().map(|(c, &code)| fp8::E4M3[code as usize] * at(c)));
                }
            }
        }
        if out.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(self.not_finite(source.tensor)) }
    }

    /// Output row `r` is source column `r`: reads a rectangle of the source, segment by segment, and turns it.
    fn read_transposed(
        &mut self,
        source: &Source,
        rows: Rows,
        element: usize,
        out: &mut [u8],
    ) -> Result<(), ConvertError> {
        let mut segment = std::mem::take(&mut self.segment);
        let whole = rows.count == source.cols;
        // Whole rows of the source follow one another: one read brings all of them.
        let (per_read, reads) = if whole { (rows.cols, 1) } else { (1, rows.cols) };
        segment.resize(rows.count * element * per_read, 0);
        for first in (0..reads).map(|i| i * per_read) {
            let (row, col) = source.locate(rows.batch, rows.first, first);
            self.read(source.tensor, ((row * source.cols + col) * element) as u64, &mut segment)?;
            for (i, line) in segment.chunks_exact(rows.count * element).enumerate() {
                for (r, value) in line.chunks_exact(element).enumerate() {
                    out[(r * rows.cols + first + i) * element..][..element].copy_from_slice(value);
                }
            }
        }
        self.segment = segment;
        Ok(())
    }

    fn read(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.bytes += out.len() as u64;
        self.checkpoint.read(tensor, at, out, &mut self.digest)
    }
}

fn element_len(storage: Storage) -> usize {
    match storage {
        Storage::F32 => 4,
        Storage::F16 | Storage::Bf16 => 2,
        Storage::Fp8 { .. } => 1,
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

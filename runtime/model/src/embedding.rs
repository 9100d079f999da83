//! Token embedding: rows are read from disk when they are needed. The table of a large model takes gigabytes, a token needs one
//! row.

use sluice_format::{ExtentKind, ExtentRecord, FormatError, ModelFile, WeightType};

use sluice_kernels::{Matrix, unpack_row};

use super::ModelError;

/// Parts that stay in memory. Text repeats its words, and a part has at most a few hundred KiB.
const CACHED_PARTS: usize = 64;

/// The embedding table and the parts of it that were used last.
#[derive(Debug)]
pub struct Embedding {
    parts: Vec<Part>,
    rows_per_part: usize,
    width: usize,
    cached: Vec<CachedPart>,
    clock: u64,
    bytes_read: u64,
}

#[derive(Debug)]
struct Part {
    extent: ExtentRecord,
    offset: usize,
    len: usize,
    rows: usize,
    ty: WeightType,
}

#[derive(Debug)]
struct CachedPart {
    part: usize,
    used: u64,
    bytes: Vec<u8>,
}

/// Most bytes that the cached parts can take if there are `parts` parts and the longest has `longest` bytes.
pub fn cache_memory(parts: usize, longest: u64) -> u64 {
    longest * parts.min(CACHED_PARTS) as u64
}

impl Embedding {
    /// The table of a file: the model's own, or that of a prediction layer. Reads nothing yet.
    pub fn new(file: &ModelFile, layer: u32) -> Self {
        let mut rows_per_part = 1;
        let parts = file.parts_of(ExtentKind::Embedding, layer).enumerate().map(|(i, (extent, tensor))| {
            if i == 0 {
                rows_per_part = tensor.shape[1] as usize;
            }
            let (offset, len, rows) = (tensor.offset as usize, tensor.len as usize, tensor.shape[1] as usize);
            Part { extent: *extent, offset, len, rows, ty: tensor.weight_type }
        });
        let parts = parts.collect();
        Embedding { parts, rows_per_part, width: file.spec().hidden_size, cached: Vec::new(), clock: 0, bytes_read: 0 }
    }

    /// Forgets the parts that are in memory.
    pub fn give_back(&mut self) {
        self.cached = Vec::new();
    }

    /// Bytes read from the file so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Writes the rows of `tokens` to `out`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`ModelError::Token`] for an id outside the vocabulary; [`ModelError::Format`] when a part cannot be read or is damaged.
    pub fn rows(&mut self, file: &ModelFile, tokens: &[u32], out: &mut [f32]) -> Result<(), ModelError> {
        let vocab = file.spec().vocab_size;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(ModelError::Token { token, vocab });
        }
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(self.width)) {
            let (part, row) = (token as usize / self.rows_per_part, token as usize % self.rows_per_part);
            let cached = self.load(file, part)?;
            let Part { offset, len, rows, ty, .. } = self.parts[part];
            let bytes = &self.cached[cached].bytes[offset..offset + len];
            match ty.plain_element_len().map(|element| element * self.width) {
                Some(len) => widen(ty, &bytes[row * len..][..len], out),
                None => {
                    let matrix = Matrix::new(ty, rows, self.width, bytes);
                    unpack_row(matrix.expect("the file's reader has compared shape and length"), row, out);
                }
            }
        }
        Ok(())
    }

    /// Index in `cached` of a part, which is read now if necessary.
    fn load(&mut self, file: &ModelFile, part: usize) -> Result<usize, FormatError> {
        self.clock += 1;
        let found = match self.cached.iter().position(|c| c.part == part) {
            Some(found) => found,
            None => {
                let extent = self.parts[part].extent;
                let slot = self.slot_to_fill();
                // Forget the old part first: a failed read must not leave its bytes under a valid number.
                self.cached[slot].part = usize::MAX;
                file.read_extent(&extent, &mut self.cached[slot].bytes)?;
                self.bytes_read += extent.stored_len;
                self.cached[slot].part = part;
                slot
            }
        };
        self.cached[found].used = self.clock;
        Ok(found)
    }

    fn slot_to_fill(&mut self) -> usize {
        if self.cached.len() < CACHED_PARTS.min(self.parts.len()) {
            self.cached.push(CachedPart { part: usize::MAX, used: 0, bytes: Vec::new() });
            return self.cached.len() - 1;
        }
        let oldest = self.cached.iter().enumerate().min_by_key(|(_, c)| c.used);
        oldest.map_or(0, |(i, _)| i)
    }
}

/// Widens little-endian numbers of a plain tensor to f32, exactly.
pub fn widen(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    match ty {
        WeightType::F32 => {
            for (b, o) in bytes.chunks_exact(4).zip(out) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        WeightType::F16 => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
    }
}

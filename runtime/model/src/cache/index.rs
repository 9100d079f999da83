//! Index keys of sparse attention: f32 whatever keys and values are, since they decide what is attended to.

use std::ops::Range;

use sluice_format::IndexerSpec;

/// Index keys of one layer and one sequence, `[max_tokens, index_head_dim]`.
#[derive(Debug)]
pub struct IndexCache {
    keys: Vec<f32>,
    width: usize,
}

impl IndexCache {
    /// An empty cache for `max_tokens` positions.
    pub fn new(spec: &IndexerSpec, max_tokens: usize) -> Self {
        let width = width(spec);
        IndexCache { keys: vec![0.0; width * max_tokens], width }
    }

    /// Keys at `positions`, `[positions, index_head_dim]`: ask for
    /// those of one block of keys at a time.
    ///
    /// # Panics
    /// If there are fewer positions.
    pub fn keys(&self, positions: Range<usize>) -> &[f32] {
        &self.keys[positions.start * self.width..positions.end * self.width]
    }

    /// The key of a position, to write it.
    pub fn key_mut(&mut self, position: usize) -> &mut [f32] {
        &mut self.keys[position * self.width..][..self.width]
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        4 * self.keys.len()
    }

    /// A copy that has the keys before `position`.
    pub fn fork(&self, position: usize) -> Self {
        let mut keys = vec![0.0; self.keys.len()];
        let seen = position * self.width;
        keys[..seen].copy_from_slice(&self.keys[..seen]);
        IndexCache { keys, width: self.width }
    }

    /// Bytes of one key: none in a layer that uses what another one chose.
    pub fn row_len(&self) -> usize {
        4 * self.width
    }

    /// Writes the key of a position, little-endian.
    pub fn row_to_bytes(&self, position: usize, out: &mut [u8]) {
        let key = &self.keys[position * self.width..][..self.width];
        out.as_chunks_mut::<4>().0.iter_mut().zip(key).for_each(|(out, v)| *out = v.to_le_bytes());
    }

    /// Puts the key of a position back.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let key = &mut self.keys[position * self.width..][..self.width];
        key.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
    }
}

/// f32 values that the cache holds per token.
pub fn width(spec: &IndexerSpec) -> usize {
    if spec.shared { 0 } else { spec.index_head_dim }
}

//! Latents of multi-head latent attention, and the index keys beside them.

use std::ops::Range;

use sluice_format::MlaSpec;
use sluice_kernels::{KvBuffer, KvRows, KvType};

use super::index::{self, IndexCache};

/// Keys and values of one layer and one sequence: `[max_tokens, kv_lora_rank + qk_rope_head_dim]`.
#[derive(Debug)]
pub struct LatentCache {
    rows: KvBuffer,
    /// Keys of the indexer, in layers that have one.
    index: Option<IndexCache>,
}

impl LatentCache {
    /// An empty cache for `max_tokens` positions.
    pub fn new(spec: &MlaSpec, max_tokens: usize, ty: KvType) -> Self {
        let index = spec.indexer.as_ref().map(|i| IndexCache::new(i, max_tokens));
        LatentCache { rows: KvBuffer::new(ty, max_tokens, latent_width(spec)), index }
    }

    /// Latents with their rotated keys at `positions`, oldest first: ask for
    /// those of one block of keys at a time.
    ///
    /// # Panics
    /// If there are fewer positions.
    pub fn rows(&self, positions: Range<usize>) -> KvRows<'_> {
        self.rows.rows(positions)
    }

    /// Puts the latent of a position with its rotated key in.
    pub fn set(&mut self, position: usize, latent: &[f32]) {
        self.rows.set(position, latent);
    }

    /// Keys of the layer's own indexer.
    pub fn index(&self) -> &IndexCache {
        self.index.as_ref().expect("a layer with an indexer has index keys")
    }

    pub fn index_mut(&mut self) -> &mut IndexCache {
        self.index.as_mut().expect("a layer with an indexer has index keys")
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        self.rows.bytes() + self.index.as_ref().map_or(0, IndexCache::bytes)
    }

    /// A copy that has the rows before `position`.
    pub fn fork(&self, position: usize) -> Self {
        let mut rows = self.rows.empty_like();
        rows.copy_rows(&self.rows, 0..position);
        LatentCache { rows, index: self.index.as_ref().map(|index| index.fork(position)) }
    }

    /// Bytes of one position: the latent with its rotated key, then the index key of a layer that has an indexer of its own.
    pub fn row_len(&self) -> usize {
        self.rows.row_len() + self.index.as_ref().map_or(0, IndexCache::row_len)
    }

    /// Writes the row of a position.
    pub fn row_to_bytes(&self, position: usize, out: &mut [u8]) {
        let (latent, key) = out.split_at_mut(self.rows.row_len());
        self.rows.row_to_bytes(position, latent);
        if let Some(index) = &self.index {
            index.row_to_bytes(position, key);
        }
    }

    /// Puts the row of a position back.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let (latent, key) = bytes.split_at(self.rows.row_len());
        self.rows.row_from_bytes(position, latent);
        if let Some(index) = &mut self.index {
            index.row_from_bytes(position, key);
        }
    }
}

/// Bytes that the cache holds per token. Index keys are f32 whatever `ty` is: they decide what is attended to.
pub fn bytes_per_token(spec: &MlaSpec, ty: KvType) -> usize {
    KvBuffer::row_bytes(ty, latent_width(spec)) + 4 * spec.indexer.as_ref().map_or(0, index::width)
}

/// Width of a latent with its rotated key.
pub fn latent_width(spec: &MlaSpec) -> usize {
    spec.kv_lora_rank + spec.qk_rope_head_dim
}

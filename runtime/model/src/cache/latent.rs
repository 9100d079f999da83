//! Latents of multi-head latent attention, and the index keys of sparse attention.

use std::ops::Range;

use sluice_format::{IndexerSpec, MlaSpec};
use sluice_kernels::KvRows;

use super::index::{IndexCache, IndexPlace};
use super::layout::Rows;
use super::page::Page;
use super::table::RowTable;

/// Place of a layer's latents and index keys in a page.
#[derive(Clone, Copy, Debug)]
pub struct LatentPlace {
    pub(super) rows: Rows,
    pub(super) index: IndexPlace,
}

/// Latents, with their rotated keys, of one layer and one sequence.
#[derive(Clone, Copy, Debug)]
pub struct LatentCache<'a> {
    pub(super) table: &'a RowTable,
    pub(super) place: LatentPlace,
}

/// The same, to write them.
#[derive(Debug)]
pub struct LatentCacheMut<'a> {
    pub(super) table: &'a mut RowTable,
    pub(super) place: LatentPlace,
}

/// Width of a latent with its rotated key.
pub fn latent_width(spec: &MlaSpec) -> usize {
    spec.kv_lora_rank + spec.qk_rope_head_dim
}

/// Numbers of the index key that a layer keeps for each token.
pub fn index_width(spec: &IndexerSpec) -> usize {
    if spec.shared { 0 } else { spec.index_head_dim }
}

impl<'a> LatentCache<'a> {
    /// Latents, with their rotated keys, at `positions`, oldest first. A caller asks for the rows of one block of keys at a time.
    ///
    /// # Panics
    /// If there are fewer positions, or they are not in one block.
    pub fn rows(self, positions: Range<usize>) -> KvRows<'a> {
        let (page, places) = self.table.block(positions);
        let rows = self.place.rows;
        page.rows[rows.buffer].rows(rows.at(0, places.start)..rows.at(0, places.end))
    }

    /// Keys of the layer's own indexer.
    pub fn index(self) -> IndexCache<'a> {
        IndexCache { table: self.table, place: self.place.index }
    }

    /// Writes the row of a position: the latent with its rotated key, then its index key.
    pub fn row_to_bytes(&self, position: usize, out: &mut [u8]) {
        let (page, place) = self.table.page(position);
        let buffer = &page.rows[self.place.rows.buffer];
        let (latent, key) = out.split_at_mut(buffer.row_len());
        buffer.row_to_bytes(self.place.rows.at(0, place), latent);
        self.place.index.to_bytes(&page.numbers, place, key);
    }
}

impl LatentCacheMut<'_> {
    /// Stores the latent of a position with its rotated key.
    ///
    /// # Panics
    /// If the sequence was not prepared for it.
    pub fn set(&mut self, position: usize, latent: &[f32]) {
        let (page, place) = self.table.page_mut(position);
        page.rows[self.place.rows.buffer].set(self.place.rows.at(0, place), latent);
    }

    /// The index key of a position, to write it.
    ///
    /// # Panics
    /// If the sequence was not prepared for it.
    pub fn index_key_mut(&mut self, position: usize) -> &mut [f32] {
        let (page, place) = self.table.page_mut(position);
        &mut page.numbers[self.place.index.numbers(place..place + 1)]
    }

    /// Restores the row of a position.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let (page, place) = self.table.page_mut(position);
        let Page { rows, numbers, .. } = page;
        let buffer = &mut rows[self.place.rows.buffer];
        let (latent, key) = bytes.split_at(buffer.row_len());
        buffer.row_from_bytes(self.place.rows.at(0, place), latent);
        self.place.index.put_bytes(numbers, place, key);
    }
}

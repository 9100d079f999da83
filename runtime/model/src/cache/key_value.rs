//! Keys and values of grouped-query attention, and the index keys by which blocks of keys are chosen.

use std::ops::Range;

use sluice_kernels::KvRows;

use super::index::{IndexCache, IndexPlace};
use super::layout::Rows;
use super::page::Page;
use super::table::RowTable;

/// Place of a layer's keys and values in a page, and the number of heads.
#[derive(Clone, Copy, Debug)]
pub struct KeyValuePlace {
    pub(super) keys: Rows,
    pub(super) values: Rows,
    pub(super) kv_heads: usize,
    pub(super) index: IndexPlace,
}

/// Keys and values of one layer and one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KeyValueCache<'a> {
    pub(super) table: &'a RowTable,
    pub(super) place: KeyValuePlace,
}

/// The same, to write them.
#[derive(Debug)]
pub struct KeyValueCacheMut<'a> {
    pub(super) table: &'a mut RowTable,
    pub(super) place: KeyValuePlace,
}

impl<'a> KeyValueCache<'a> {
    /// Keys and values of a head at `positions`, oldest first. Only this function knows where rows lie. A caller asks for the rows
    /// of one block of keys at a time.
    ///
    /// # Panics
    /// If there are fewer positions, or they are not in one block.
    pub fn rows(self, head: usize, positions: Range<usize>) -> (KvRows<'a>, KvRows<'a>) {
        let (page, places) = self.table.block(positions);
        let rows = |rows: Rows| page.rows[rows.buffer].rows(rows.at(head, places.start)..rows.at(head, places.end));
        (rows(self.place.keys), rows(self.place.values))
    }

    /// Keys by which blocks of keys are chosen.
    pub fn index(self) -> IndexCache<'a> {
        IndexCache { table: self.table, place: self.place.index }
    }

    /// Writes the rows of a position: keys, values, and the index key.
    pub fn row_to_bytes(&self, position: usize, out: &mut [u8]) {
        let (page, place) = self.table.page(position);
        let KeyValuePlace { keys, values, kv_heads, index } = self.place;
        let (of_keys, rest) = out.split_at_mut(kv_heads * page.rows[keys.buffer].row_len());
        let (of_values, of_index) = rest.split_at_mut(kv_heads * page.rows[values.buffer].row_len());
        index.to_bytes(&page.numbers, place, of_index);
        for (rows, out) in [(keys, of_keys), (values, of_values)] {
            let buffer = &page.rows[rows.buffer];
            for (head, out) in out.chunks_exact_mut(buffer.row_len()).enumerate() {
                buffer.row_to_bytes(rows.at(head, place), out);
            }
        }
    }
}

impl KeyValueCacheMut<'_> {
    /// Stores the keys `[kv_heads, head_dim]` and values `[kv_heads, v_head_dim]` of a position.
    ///
    /// # Panics
    /// If the sequence was not prepared for it.
    pub fn set(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        let (page, place) = self.table.page_mut(position);
        for (rows, x) in [(self.place.keys, keys), (self.place.values, values)] {
            let buffer = &mut page.rows[rows.buffer];
            for (head, x) in x.chunks_exact(x.len() / self.place.kv_heads).enumerate() {
                buffer.set(rows.at(head, place), x);
            }
        }
    }

    /// The index key of a position, to write it.
    ///
    /// # Panics
    /// If the sequence was not prepared for it.
    pub fn index_key_mut(&mut self, position: usize) -> &mut [f32] {
        let (page, place) = self.table.page_mut(position);
        &mut page.numbers[self.place.index.numbers(place..place + 1)]
    }

    /// Restores the rows of a position.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let (page, place) = self.table.page_mut(position);
        let KeyValuePlace { keys, values, kv_heads, index } = self.place;
        let Page { rows: buffers, numbers, .. } = page;
        let (of_keys, rest) = bytes.split_at(kv_heads * buffers[keys.buffer].row_len());
        let (of_values, of_index) = rest.split_at(kv_heads * buffers[values.buffer].row_len());
        index.put_bytes(numbers, place, of_index);
        for (rows, bytes) in [(keys, of_keys), (values, of_values)] {
            let buffer = &mut buffers[rows.buffer];
            for (head, bytes) in bytes.chunks_exact(buffer.row_len()).enumerate() {
                buffer.row_from_bytes(rows.at(head, place), bytes);
            }
        }
    }
}

//! The f32 numbers that layers keep of tokens that are not compressed yet, one row per token.

use super::table::RowTable;

/// Place of a layer's rows among a page's numbers.
#[derive(Clone, Copy, Debug)]
pub struct RawPlace {
    /// First of the page's numbers that belong to them.
    pub(super) first: usize,
    /// Numbers of a row.
    pub(super) width: usize,
}

impl RawPlace {
    fn row(self, place: usize) -> std::ops::Range<usize> {
        self.first + place * self.width..self.first + (place + 1) * self.width
    }
}

/// The rows of one layer and one sequence.
#[derive(Clone, Copy, Debug)]
pub struct RawCache<'a> {
    pub(super) table: &'a RowTable,
    pub(super) place: RawPlace,
}

/// The same, to write them.
#[derive(Debug)]
pub struct RawCacheMut<'a> {
    pub(super) table: &'a mut RowTable,
    pub(super) place: RawPlace,
}

impl<'a> RawCache<'a> {
    /// The row of a position.
    ///
    /// # Panics
    /// If the row is not stored.
    pub fn row(self, position: usize) -> &'a [f32] {
        let (page, place) = self.table.page(position);
        &page.numbers[self.place.row(place)]
    }

    /// Writes the row of a position, little-endian.
    pub fn row_to_bytes(self, position: usize, out: &mut [u8]) {
        let row = self.row(position);
        out.as_chunks_mut::<4>().0.iter_mut().zip(row).for_each(|(out, v)| *out = v.to_le_bytes());
    }
}

impl RawCacheMut<'_> {
    /// The row of a position, to write it.
    ///
    /// # Panics
    /// If the sequence was not prepared for it.
    pub fn row_mut(&mut self, position: usize) -> &mut [f32] {
        let (page, place) = self.table.page_mut(position);
        &mut page.numbers[self.place.row(place)]
    }

    /// Restores the row of a position.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let row = self.row_mut(position);
        row.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
    }
}

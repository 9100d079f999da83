//! Index keys, which are scored to choose the tokens that a layer attends to. They are f32 whatever the type of the other rows,
//! because they decide which tokens are attended to.

use std::ops::Range;

use super::table::RowTable;

/// Place of a layer's index keys among the numbers of a page.
#[derive(Clone, Copy, Debug)]
pub struct IndexPlace {
    /// First of the page's numbers that belong to them.
    pub(super) first: usize,
    /// Numbers of a key: none in a layer that chooses nothing, or that uses the choice of another layer.
    pub(super) width: usize,
}

impl IndexPlace {
    /// The numbers of the keys at these places of a page.
    pub(super) fn numbers(self, places: Range<usize>) -> Range<usize> {
        self.first + places.start * self.width..self.first + places.end * self.width
    }

    /// Writes the key at a place of a page's `numbers`.
    pub(super) fn to_bytes(self, numbers: &[f32], place: usize, out: &mut [u8]) {
        let numbers = &numbers[self.numbers(place..place + 1)];
        out.as_chunks_mut::<4>().0.iter_mut().zip(numbers).for_each(|(out, v)| *out = v.to_le_bytes());
    }

    /// Restores a key that [`IndexPlace::to_bytes`] wrote.
    pub(super) fn put_bytes(self, numbers: &mut [f32], place: usize, bytes: &[u8]) {
        let numbers = &mut numbers[self.numbers(place..place + 1)];
        numbers.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
    }
}

/// Index keys of one layer and one sequence.
#[derive(Clone, Copy, Debug)]
pub struct IndexCache<'a> {
    pub(super) table: &'a RowTable,
    pub(super) place: IndexPlace,
}

impl<'a> IndexCache<'a> {
    /// Index keys at `positions`, `[positions, index_head_dim]`. A caller asks for the keys of one block at a time.
    ///
    /// # Panics
    /// If there are fewer positions, or they are not in one block.
    pub fn keys(self, positions: Range<usize>) -> &'a [f32] {
        let (page, places) = self.table.block(positions);
        &page.numbers[self.place.numbers(places)]
    }
}

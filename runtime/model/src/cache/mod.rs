//! What layers remember of a sequence: it is stored in pages of one pool. Attention asks for rows by position and does not know
//! where they lie.
//!
//! A page has the rows of [`PAGE_TOKENS`] tokens in all layers of a kind ([`PageKind`]), or the states of all recurrent layers
//! after one token. The pool is planned and made with the engine; sequences take pages as they grow and give them back. A sequence
//! shares pages with its forks, and with its marks, which keep pages that it would otherwise give back. A sequence that is about to
//! write to a shared page copies it first, so a shared page is never written.

mod index;
mod key_value;
mod latent;
mod layout;
mod page;
mod raw;
mod table;

use std::ops::Range;

pub use self::index::IndexCache;
pub use self::key_value::{KeyValueCache, KeyValueCacheMut};
pub use self::latent::{LatentCache, LatentCacheMut, latent_width};
pub use self::layout::{Layout, PAGE_TOKENS, PageKind, PageLayout, Place, WINDOW_SLACK};
pub use self::page::{Held, PageCount, PagePool, PagesFull};
pub use self::raw::{RawCache, RawCacheMut};
pub use self::table::Table;
use crate::recurrent::{State, StateMut};

/// Why a cache always has the kind that its layer expects.
const OF_ITS_SPEC: &str = "a cache is made from the spec of its layer";

/// What one layer remembers of the tokens of one sequence, or one part of it if the layer has several stores.
#[derive(Clone, Copy, Debug)]
pub struct LayerCache<'a> {
    table: &'a Table,
    place: Place,
    record_len: usize,
}

/// The same, to write it.
#[derive(Debug)]
pub struct LayerCacheMut<'a> {
    table: &'a mut Table,
    place: Place,
    record_len: usize,
}

impl<'a> LayerCache<'a> {
    /// The cache of store `index`, whose pages are those of `table`.
    pub fn new(layout: &Layout, index: usize, table: &'a Table) -> Self {
        LayerCache { table, place: layout.place(index).1, record_len: layout.record_len(index) }
    }

    /// Its place in its pages.
    pub fn place(self) -> Place {
        self.place
    }

    /// Keys and values.
    ///
    /// # Panics
    /// If the cache is of another kind; so do the following methods.
    pub fn key_value(self) -> KeyValueCache<'a> {
        let Place::KeyValue(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        KeyValueCache { table: self.table.rows(), place }
    }

    /// Latents, or entries.
    pub fn latent(self) -> LatentCache<'a> {
        let (Place::Latent(place) | Place::Entries(place)) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        LatentCache { table: self.table.rows(), place }
    }

    /// Index keys of blocks of keys.
    pub fn block_keys(self) -> IndexCache<'a> {
        let Place::BlockKeys(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        IndexCache { table: self.table.rows(), place }
    }

    /// Numbers of tokens that are not compressed yet.
    pub fn raw(self) -> RawCache<'a> {
        let Place::Raw(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        RawCache { table: self.table.rows(), place }
    }

    /// Numbers of the records that a saved sequence of `position` tokens has of this layer: the positions of rows that later tokens
    /// can see, all entries, or the one state.
    pub fn records(self, position: usize) -> Range<usize> {
        match self.table {
            Table::Rows(rows) => rows.seen_from(position),
            Table::State(_) => position.saturating_sub(1)..position,
        }
    }

    /// Records that belong to the tokens at these positions, in a layer that remembers everything.
    pub fn records_of(self, positions: Range<usize>) -> Range<usize> {
        let ratio = self.table.rows().ratio();
        positions.start / ratio..positions.end / ratio
    }

    /// Bytes of each record.
    pub fn record_len(self) -> usize {
        self.record_len
    }

    /// Writes a record. A state's record has the number of the position after its token.
    pub fn record_to_bytes(self, record: usize, out: &mut [u8]) {
        match self.place {
            Place::Latent(_) | Place::Entries(_) => self.latent().row_to_bytes(record, out),
            Place::BlockKeys(place) => {
                let (page, at) = self.table.rows().page(record);
                place.to_bytes(&page.numbers, at, out);
            }
            Place::Raw(_) => self.raw().row_to_bytes(record, out),
            Place::KeyValue(_) => self.key_value().row_to_bytes(record, out),
            Place::State(place) => {
                let page = self.table.state().now().expect("the last complete step has left a state");
                State::new(place.shape(), &page.numbers[place.numbers()]).to_bytes(out);
            }
        }
    }
}

impl<'a> LayerCacheMut<'a> {
    /// The cache of store `index`, whose pages are those of `table`.
    pub fn new(layout: &Layout, index: usize, table: &'a mut Table) -> Self {
        LayerCacheMut { table, place: layout.place(index).1, record_len: layout.record_len(index) }
    }

    /// The same, to read it.
    pub fn as_ref(&self) -> LayerCache<'_> {
        LayerCache { table: self.table, place: self.place, record_len: self.record_len }
    }

    /// Keys and values.
    ///
    /// # Panics
    /// If the cache is of another kind; so do the following methods.
    pub fn key_value_mut(self) -> KeyValueCacheMut<'a> {
        let Place::KeyValue(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        KeyValueCacheMut { table: self.table.rows_mut(), place }
    }

    /// Latents, or entries.
    pub fn latent_mut(self) -> LatentCacheMut<'a> {
        let (Place::Latent(place) | Place::Entries(place)) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        LatentCacheMut { table: self.table.rows_mut(), place }
    }

    /// The index key of a block of keys, to write it.
    pub fn block_key_mut(self, block: usize) -> &'a mut [f32] {
        let Place::BlockKeys(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        let (page, at) = self.table.rows_mut().page_mut(block);
        &mut page.numbers[place.numbers(at..at + 1)]
    }

    /// Numbers of tokens that are not compressed yet.
    pub fn raw_mut(self) -> RawCacheMut<'a> {
        let Place::Raw(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        RawCacheMut { table: self.table.rows_mut(), place }
    }

    /// The states that a step reads, and the states that it writes.
    pub fn state_mut(self) -> (State<'a>, StateMut<'a>) {
        let Place::State(place) = self.place else { unreachable!("{OF_ITS_SPEC}") };
        let (from, to) = self.table.state_mut().step();
        let from = State::new(place.shape(), &from.numbers[place.numbers()]);
        (from, StateMut::new(place.shape(), &mut to.numbers[place.numbers()]))
    }

    /// Restores a record.
    pub fn record_from_bytes(&mut self, record: usize, bytes: &[u8]) {
        let LayerCacheMut { table, place, .. } = self;
        match *place {
            Place::Latent(place) | Place::Entries(place) => {
                LatentCacheMut { table: table.rows_mut(), place }.row_from_bytes(record, bytes);
            }
            Place::BlockKeys(place) => {
                let (page, at) = table.rows_mut().page_mut(record);
                place.put_bytes(&mut page.numbers, at, bytes);
            }
            Place::Raw(place) => RawCacheMut { table: table.rows_mut(), place }.row_from_bytes(record, bytes),
            Place::KeyValue(place) => KeyValueCacheMut { table: table.rows_mut(), place }.row_from_bytes(record, bytes),
            Place::State(place) => {
                let page = table.restored_state();
                StateMut::new(place.shape(), &mut page.numbers[place.numbers()]).put_bytes(bytes);
            }
        }
    }
}

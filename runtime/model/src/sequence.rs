//! A sequence: the tokens so far, and what the layers remember of them.
//!
//! Keys and values are rows by position: to forget the last tokens is to count fewer. A window loses its oldest rows as it moves
//! on, and a recurrent state has taken all tokens in and cannot give one back; so marks keep what layers would otherwise lose, and
//! a sequence goes back to a mark.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_format::ModelSpec;
use sluice_kernels::KvType;

use super::cache::{Kept, LayerCache, LayerCacheMut, Layout, PagePool, PagesFull, Table};
use super::session::Binding;

/// A place in a sequence that one can go back to, as long as the sequence has not gone back beyond it. A fork has the marks of
/// the sequence that it was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    position: usize,
    id: u64,
}

impl Mark {
    /// Tokens before the mark.
    pub fn position(self) -> usize {
        self.position
    }

    fn new(position: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Mark { position, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

/// Why a sequence cannot be marked, or go where it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewindError {
    /// The mark is another sequence's, the sequence has since gone back beyond it, or newer ones have taken its place.
    #[error("the sequence no longer has the mark at token {position}: set it again, or go to a position")]
    NoSuchMark {
        /// Where the mark was.
        position: usize,
    },
    /// There are not so many tokens.
    #[error("the sequence has {position} tokens and cannot go to token {wanted}")]
    Beyond {
        /// Tokens of the sequence.
        position: usize,
        /// Where it is to go.
        wanted: usize,
    },
    /// The memory plan has no room for what a mark keeps.
    #[error(
        "a mark in this model takes {bytes} bytes, and the memory plan has room for none: open the model with room for marks"
    )]
    NoMarks {
        /// Bytes of what a mark keeps.
        bytes: u64,
    },
}

/// A mark with what it keeps of each kind of page. Forks share that.
#[derive(Clone, Debug)]
struct Snapshot {
    mark: Mark,
    kept: Arc<[Kept]>,
}

impl Snapshot {
    fn costs(&self) -> bool {
        self.kept.iter().any(|kept| !matches!(kept, Kept::Nothing))
    }
}

/// What the layers remember of the tokens of one sequence, in pages of the pool of the engine that made it.
#[derive(Debug)]
pub struct Sequence {
    pool: Arc<PagePool>,
    /// One for each kind of page.
    tables: Vec<Table>,
    tokens: Vec<u32>,
    capacity: usize,
    /// Those that still stand, in the order in which they were made.
    marks: Vec<Snapshot>,
    /// Most marks that keep pages.
    most_marks: usize,
    binding: Binding,
}

impl Sequence {
    /// An empty sequence that can hold `capacity` tokens, with pages of `pool`, of the model and with the type of keys and values
    /// that `binding` says. In a model with windows or recurrent layers it keeps `marks` marks.
    pub(crate) fn new(pool: &Arc<PagePool>, capacity: usize, binding: Binding, marks: usize) -> Self {
        let kinds = pool.layout().pages().iter().enumerate();
        Sequence {
            tables: kinds.map(|(number, page)| Table::new(number, page.kind(), capacity)).collect(),
            pool: Arc::clone(pool),
            tokens: Vec::with_capacity(capacity),
            capacity,
            marks: Vec::new(),
            most_marks: marks,
            binding,
        }
    }

    /// Bytes of the pages of a sequence of `capacity` tokens between two steps, without marks.
    pub fn memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        let layout = Layout::new(spec, ty);
        let pages = layout.pages().iter().map(|page| page.kind().most(1, capacity, 0, 0).saturating_mul(page.bytes()));
        pages.fold(0, u64::saturating_add)
    }

    /// Bytes of keys, values and states that the token at `position` reads.
    pub fn touched(spec: &ModelSpec, position: usize, ty: KvType) -> u64 {
        Layout::new(spec, ty).touched(position)
    }

    /// Bytes of the pages that a mark keeps at most: recurrent states and windows; none in models that have neither.
    pub fn mark_memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        Layout::new(spec, ty).mark_bytes(capacity)
    }

    /// Pages that it has, those that it shares included.
    pub fn pages(&self) -> usize {
        self.tables.iter().map(|table| table.pages().count()).sum()
    }

    /// Pages that would be free if it were dropped: nobody shares them. Those that only its marks keep are not counted.
    pub fn own_pages(&self) -> usize {
        self.tables.iter().flat_map(Table::pages).filter(|page| !page.is_shared()).count()
    }

    /// Bytes of its pages, without what only its marks keep.
    pub fn bytes(&self) -> u64 {
        let kinds = self.tables.iter().zip(self.pool.layout().pages());
        let pages = kinds.map(|(table, page)| table.pages().count() as u64 * page.bytes());
        pages.sum()
    }

    /// Pages that have to be taken from the pool before it can take `count` more tokens, in one pass.
    pub fn pages_for(&self, count: usize) -> usize {
        self.tables.iter().map(|table| table.wanted(self.position(), count)).sum()
    }

    /// What its numbers depend on beside its tokens.
    pub fn binding(&self) -> Binding {
        self.binding
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens seen so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.go_to(0);
    }

    /// Marks where the sequence is. A mark costs nothing, except in models with windows or recurrent layers: there it keeps pages
    /// ([`Sequence::mark_memory`]), and the oldest mark goes when there are more than the sequence was made for.
    ///
    /// # Errors
    /// [`RewindError::NoMarks`] where it was made for none.
    pub fn mark(&mut self) -> Result<Mark, RewindError> {
        let position = self.position();
        if let Some(snapshot) = self.marks.iter().find(|s| s.mark.position == position) {
            return Ok(snapshot.mark);
        }
        // At the beginning there is nothing to keep.
        let tables = if position > 0 { &self.tables[..] } else { &[] };
        let snapshot = Snapshot { mark: Mark::new(position), kept: tables.iter().map(|t| t.keep(position)).collect() };
        if snapshot.costs() {
            if self.most_marks == 0 {
                return Err(RewindError::NoMarks { bytes: self.pool.layout().mark_bytes(self.capacity) });
            }
            if self.marks.iter().filter(|s| s.costs()).count() >= self.most_marks {
                let oldest = self.marks.iter().position(Snapshot::costs).expect("there is at least one");
                self.marks.remove(oldest);
            }
        }
        let mark = snapshot.mark;
        self.marks.push(snapshot);
        Ok(mark)
    }

    /// The marks that stand, oldest first.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        self.marks.iter().map(|snapshot| snapshot.mark)
    }

    /// Gives up a mark and its memory, if it still stands.
    pub fn unmark(&mut self, mark: Mark) {
        self.marks.retain(|snapshot| snapshot.mark != mark);
    }

    /// Forgets the tokens behind a mark. The mark stays, later ones do not.
    ///
    /// # Errors
    /// [`RewindError::NoSuchMark`]; the sequence is then as it was.
    pub fn rewind(&mut self, mark: Mark) -> Result<(), RewindError> {
        if !self.marks().any(|own| own == mark) {
            return Err(RewindError::NoSuchMark { position: mark.position });
        }
        self.go_to(mark.position);
        Ok(())
    }

    /// Forgets the tokens from `position` on, or from the nearest earlier position that there is a way back to, and says which
    /// one it is. Where layers see everything that is `position` itself. Layers with a window keep it and a little more: as far as
    /// that reaches ([`WINDOW_SLACK`](crate::WINDOW_SLACK)), `position` itself, too. Recurrent layers can go where the last step or
    /// the one before it ended. Otherwise it is a mark, or the beginning.
    ///
    /// # Errors
    /// [`RewindError::Beyond`] if there are fewer tokens; the sequence is then as it was.
    pub fn rewind_to(&mut self, position: usize) -> Result<usize, RewindError> {
        let reached = self.reachable(position)?;
        self.go_to(reached);
        Ok(reached)
    }

    /// Where [`Sequence::rewind_to`] would go.
    ///
    /// # Errors
    /// As there.
    pub fn reachable(&self, position: usize) -> Result<usize, RewindError> {
        if position > self.position() {
            return Err(RewindError::Beyond { position: self.position(), wanted: position });
        }
        let reaches = |at: usize| {
            let marked = self.marks.iter().any(|s| s.mark.position == at);
            marked || self.tables.iter().all(|table| table.reaches(at))
        };
        let marked = self.marks.iter().map(|s| s.mark.position);
        let states = self.tables.iter().flat_map(Table::state_positions);
        let candidates = marked.chain(states).chain([0, position]);
        Ok(candidates.filter(|&at| at <= position && reaches(at)).max().unwrap_or(0))
    }

    /// Goes back to where all layers can go.
    fn go_to(&mut self, position: usize) {
        if position < self.position() {
            let snapshot = self.marks.iter().find(|s| s.mark.position == position);
            for (i, table) in self.tables.iter_mut().enumerate() {
                table.rewind(position, snapshot.and_then(|s| s.kept.get(i)));
            }
        }
        self.tokens.truncate(position);
        self.marks.retain(|s| s.mark.position <= position);
    }

    /// A sequence of the same tokens that goes on by itself. Both share what they have: only the page in whose middle they part is
    /// copied, when one of them goes on.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut tokens = Vec::with_capacity(self.capacity);
        tokens.extend_from_slice(&self.tokens);
        Sequence {
            pool: Arc::clone(&self.pool),
            tables: self.tables.iter().map(Table::fork).collect(),
            tokens,
            capacity: self.capacity,
            marks: self.marks.clone(),
            most_marks: self.most_marks,
            binding: self.binding,
        }
    }

    pub(crate) fn pool(&self) -> &Arc<PagePool> {
        &self.pool
    }

    pub(crate) fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Takes the pages for a pass of `count` rows.
    pub(crate) fn prepare(&mut self, count: usize) -> Result<(), PagesFull> {
        let position = self.position();
        self.tables.iter_mut().try_for_each(|table| table.prepare(&self.pool, position, count))
    }

    /// All layers have seen these tokens.
    pub(crate) fn advance(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        let position = self.position();
        self.tables.iter_mut().for_each(|table| table.advance(position));
    }

    /// Gives back what was taken for a pass that was not completed.
    pub(crate) fn settle(&mut self) {
        let position = self.position();
        self.tables.iter_mut().for_each(|table| table.settle(position));
    }

    /// Makes room in an empty sequence for what a saved one of `position` tokens has.
    pub(crate) fn make_room(&mut self, position: usize) -> Result<(), PagesFull> {
        self.tables.iter_mut().try_for_each(|table| table.restore(&self.pool, position))
    }

    /// The tokens of a restored sequence, whose layers have been filled.
    pub(crate) fn restored(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    pub(crate) fn layers(&self) -> usize {
        self.pool.layout().layers()
    }

    /// Bytes of a record of a layer.
    pub(crate) fn record_len(&self, layer: usize) -> usize {
        self.pool.layout().record_len(layer)
    }

    pub(crate) fn layer(&self, index: usize) -> LayerCache<'_> {
        let (number, place) = self.pool.layout().layer(index);
        LayerCache::new(&self.tables[number], place)
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> LayerCacheMut<'_> {
        let (number, place) = self.pool.layout().layer(index);
        LayerCacheMut::new(&mut self.tables[number], place)
    }

    /// A sequence that counts tokens and remembers nothing.
    #[cfg(test)]
    pub(crate) fn without_layers(capacity: usize) -> Self {
        Sequence::new(&PagePool::new(Layout::empty(), &[]), capacity, Binding::default(), 0)
    }
}

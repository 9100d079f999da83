//! A sequence: the tokens so far, and what the layers remember of them.
//!
//! Keys and values are rows by position, so forgetting the last tokens means counting fewer. But a window loses its oldest rows as
//! it moves on, and a recurrent state has absorbed all tokens and cannot give one back. So marks keep what layers would otherwise
//! lose, and a sequence goes back to a mark.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_format::ModelSpec;
use sluice_kernels::KvType;

use super::cache::{LayerCache, LayerCacheMut, Layout, PageKind, PageLayout, PagePool, PagesFull, Table};
use super::prompt_attention::GENERATED;
use super::rows::Phase;
use super::session::Binding;

/// A place to which a sequence can go back, until it goes back further. A fork has the marks of the sequence from which it was
/// made.
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

/// Why a sequence cannot be marked, or cannot go to a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewindError {
    /// The mark belongs to another sequence, the sequence has gone back beyond it, or newer marks have replaced it.
    #[error("the sequence no longer has the mark at token {position}: set it again, or go to a position")]
    NoSuchMark {
        /// Where the mark was.
        position: usize,
    },
    /// The sequence has fewer tokens.
    #[error("the sequence has {position} tokens and cannot go to token {wanted}")]
    Beyond {
        /// Tokens of the sequence.
        position: usize,
        /// Position to which it should go.
        wanted: usize,
    },
    /// The memory plan has no room for the pages that a mark keeps.
    #[error(
        "a mark in this model takes {bytes} bytes, and the memory plan has room for none: open the model with room for marks"
    )]
    NoMarks {
        /// Bytes that a mark keeps.
        bytes: u64,
    },
}

/// A mark, and the pages that it keeps of each kind. Forks share it.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    mark: Mark,
    kept: Arc<[Option<Table>]>,
    /// Whether it was made automatically while a prompt was read, and not for a caller.
    automatic: bool,
}

/// How many marks a sequence can keep, and how often it makes one automatically.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MarkLimits {
    /// Most marks that keep pages.
    pub most: usize,
    /// The fewest tokens of a prompt between two automatic marks.
    pub every: usize,
}

impl Snapshot {
    fn costs(&self) -> bool {
        self.kept.iter().any(Option::is_some)
    }

    /// Tokens before the mark.
    pub(crate) fn position(&self) -> usize {
        self.mark.position
    }

    /// Whether it was made automatically while a prompt was read, and not for a caller.
    pub(crate) fn is_automatic(&self) -> bool {
        self.automatic
    }
}

/// What the layers remember of the tokens of one sequence, in pages of the pool of the engine that made it.
#[derive(Debug)]
pub struct Sequence {
    pool: Arc<PagePool>,
    /// One for each kind of page.
    tables: Vec<Table>,
    tokens: Vec<u32>,
    /// The tokens with their phases, where these are told apart; otherwise empty.
    phased: Vec<u32>,
    capacity: usize,
    /// The marks that have not been given up, in the order in which they were made.
    marks: Vec<Snapshot>,
    limits: MarkLimits,
    binding: Binding,
}

impl Sequence {
    /// An empty sequence for up to `capacity` tokens, with pages from `pool`, for the model and the type of keys and values in
    /// `binding`.
    pub(crate) fn new(pool: &Arc<PagePool>, capacity: usize, binding: Binding, limits: MarkLimits) -> Self {
        let kinds = pool.layout().pages().iter().enumerate();
        Sequence {
            tables: kinds.map(|(number, page)| Table::new(number, page.kind(), capacity)).collect(),
            pool: Arc::clone(pool),
            tokens: Vec::with_capacity(capacity),
            phased: Vec::with_capacity(if binding.prompt_attention.tells_phases_apart() { capacity } else { 0 }),
            capacity,
            marks: Vec::new(),
            limits,
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

    /// The most bytes that the pages of a mark take, for recurrent states and windows; 0 in models that have neither.
    pub fn mark_memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        Layout::new(spec, ty).mark_bytes(capacity)
    }

    /// Pages that it has, including shared ones.
    pub fn pages(&self) -> usize {
        self.tables.iter().map(|table| table.pages().count()).sum()
    }

    /// Pages that would become free if it were dropped, not counting those that only its marks keep.
    pub fn own_pages(&self) -> usize {
        self.tables.iter().flat_map(Table::pages).filter(|page| !page.is_shared()).count()
    }

    /// Bytes of its pages, not counting those that only its marks keep.
    pub fn bytes(&self) -> u64 {
        let kinds = self.tables.iter().zip(self.pool.layout().pages());
        let pages = kinds.map(|(table, page)| table.pages().count() as u64 * page.bytes());
        pages.sum()
    }

    /// Pages that it has to take from the pool before it can take `count` more tokens in one pass.
    pub fn pages_for(&self, count: usize) -> usize {
        self.tables.iter().map(|table| table.wanted(self.position(), count)).sum()
    }

    /// What its numbers depend on, besides its tokens.
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

    /// What tells it from other sequences of the same [binding](Self::binding): its tokens, and where the numbers of a token that was
    /// read differ from those of one that was generated ([`PromptAttention`](crate::PromptAttention)), generated ones have their highest
    /// bit set ([`GENERATED`]). Sequences with the same beginning here have the same numbers there.
    pub fn phased(&self) -> &[u32] {
        if self.tells_phases_apart() { &self.phased } else { &self.tokens }
    }

    fn tells_phases_apart(&self) -> bool {
        self.binding.prompt_attention.tells_phases_apart()
    }

    /// The id of a token with its phase.
    pub(crate) fn id_of(&self, phased: u32) -> u32 {
        if self.tells_phases_apart() { phased & !GENERATED } else { phased }
    }

    /// Appends tokens with their phases.
    fn push(&mut self, phased: &[u32]) {
        if self.tells_phases_apart() {
            self.tokens.extend(phased.iter().map(|token| token & !GENERATED));
            self.phased.extend_from_slice(phased);
        } else {
            self.tokens.extend_from_slice(phased);
        }
    }

    /// The most tokens that it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.go_to(0);
    }

    /// Marks the current position. A mark costs nothing, except in models with windows or recurrent layers. There it keeps pages
    /// ([`Sequence::mark_memory`]), and the oldest mark is given up when there are more than the memory plan has room for.
    ///
    /// # Errors
    /// [`RewindError::NoMarks`] if the memory plan has room for none.
    pub fn mark(&mut self) -> Result<Mark, RewindError> {
        let position = self.position();
        if let Some(snapshot) = self.marks.iter_mut().find(|s| s.mark.position == position) {
            snapshot.automatic = false;
            return Ok(snapshot.mark);
        }
        let snapshot = self.snapshot(false);
        if snapshot.costs() {
            if self.limits.most == 0 {
                return Err(RewindError::NoMarks { bytes: self.pool.layout().mark_bytes(self.capacity) });
            }
            self.forget_marks(self.limits.most - 1);
        }
        let mark = snapshot.mark;
        self.marks.push(snapshot);
        Ok(mark)
    }

    /// The pages that a mark here keeps.
    fn snapshot(&self, automatic: bool) -> Snapshot {
        let position = self.position();
        // At the beginning, there is nothing to keep.
        let tables = if position > 0 { &self.tables[..] } else { &[] };
        let kept = tables.iter().map(|table| table.keep(position)).collect();
        Snapshot { mark: Mark::new(position), kept, automatic }
    }

    /// Gives up the oldest marks that keep pages, automatic ones first, until at most `most` remain.
    fn forget_marks(&mut self, most: usize) {
        while self.costly_marks() > most {
            let costly = || self.marks.iter().enumerate().filter(|(_, s)| s.costs());
            let oldest = costly().find(|(_, s)| s.automatic).or_else(|| costly().next());
            let (oldest, _) = oldest.expect("there is at least one");
            self.marks.remove(oldest);
        }
    }

    fn costly_marks(&self) -> usize {
        self.marks.iter().filter(|s| s.costs()).count()
    }

    /// Makes an automatic mark after a part of a prompt has been read, if enough tokens have been read since the last mark. It can
    /// replace an earlier automatic mark, but not one that a caller made.
    pub(crate) fn mark_prompt(&mut self) {
        let (position, MarkLimits { most, every }) = (self.position(), self.limits);
        let last = self.marks.iter().map(|s| s.mark.position).max().unwrap_or(0);
        if most == 0 || position - last < every {
            return;
        }
        let snapshot = self.snapshot(true);
        if !snapshot.costs() {
            return;
        }
        if self.costly_marks() >= most {
            let Some(oldest) = self.marks.iter().position(|s| s.automatic) else { return };
            self.marks.remove(oldest);
        }
        self.marks.push(snapshot);
    }

    /// Gives up the automatic marks.
    pub(crate) fn forget_automatic_marks(&mut self) {
        self.marks.retain(|snapshot| !snapshot.automatic);
    }

    /// The marks that callers made and that have not been given up, oldest first.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        self.marks.iter().filter(|snapshot| !snapshot.automatic).map(|snapshot| snapshot.mark)
    }

    /// Gives up a mark and its memory. Does nothing if it has been given up already.
    pub fn unmark(&mut self, mark: Mark) {
        self.marks.retain(|snapshot| snapshot.mark != mark);
    }

    /// Forgets the tokens after a mark. The mark stays; later ones do not.
    ///
    /// # Errors
    /// [`RewindError::NoSuchMark`]; the sequence is then unchanged.
    pub fn rewind(&mut self, mark: Mark) -> Result<(), RewindError> {
        if !self.marks().any(|own| own == mark) {
            return Err(RewindError::NoSuchMark { position: mark.position });
        }
        self.go_to(mark.position);
        Ok(())
    }

    /// Forgets the tokens from `position` on, or from the nearest earlier position that it can reach, and returns that position. A
    /// sequence whose layers all see everything can go to any `position`. One with windows can go back by at least
    /// [`WINDOW_SLACK`](crate::WINDOW_SLACK) tokens, one with recurrent layers to where the last pass began. To go back further, it
    /// needs the marks, including those made while a prompt was read (`EngineOptions::mark_every`), or it goes to the beginning.
    ///
    /// # Errors
    /// [`RewindError::Beyond`] if there are fewer tokens; the sequence is then unchanged.
    pub fn rewind_to(&mut self, position: usize) -> Result<usize, RewindError> {
        let reached = self.reachable(position)?;
        self.go_to(reached);
        Ok(reached)
    }

    /// Whether it can forget its latest tokens, [`WINDOW_SLACK`](crate::WINDOW_SLACK) at least, and need not read any of the others again:
    /// not if a layer is recurrent.
    pub fn gives_back(&self) -> bool {
        self.tables.iter().all(|table| !table.is_state())
    }

    /// The position to which [`Sequence::rewind_to`] would go.
    ///
    /// # Errors
    /// As for [`Sequence::rewind_to`].
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

    /// Goes back to `position`, which all layers can reach.
    fn go_to(&mut self, position: usize) {
        if position < self.position() {
            let snapshot = self.marks.iter().find(|s| s.mark.position == position);
            for (i, table) in self.tables.iter_mut().enumerate() {
                table.rewind(position, snapshot.and_then(|s| s.kept.get(i)?.as_ref()));
            }
        }
        self.tokens.truncate(position);
        self.phased.truncate(position);
        self.marks.retain(|s| s.mark.position <= position);
    }

    /// A sequence of the same tokens that continues independently. Both share their pages. Only the page within which they diverge
    /// is copied, when one of them continues.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut fork = Sequence {
            tables: self.tables.iter().map(Table::fork).collect(),
            marks: self.marks.clone(),
            ..Sequence::new(&self.pool, self.capacity, self.binding, self.limits)
        };
        fork.push(self.phased());
        fork
    }

    /// A sequence of the first `position` tokens, a whole number of pages, which it shares. It lacks what layers with windows and
    /// states remember there; that has to be filled in before it continues.
    pub(crate) fn beginning(&self, position: usize) -> Self {
        let kinds = self.pool.layout().pages().iter().enumerate().zip(&self.tables);
        let tables = kinds.map(|((number, page), table)| match page.kind() {
            PageKind::Rows | PageKind::Entries(_) => {
                let mut table = table.fork();
                table.rewind(position, None);
                table
            }
            kind => Table::new(number, kind, self.capacity),
        });
        let mut beginning = Sequence {
            tables: tables.collect(),
            marks: self.marks.iter().filter(|mark| mark.position() < position).cloned().collect(),
            ..Sequence::new(&self.pool, self.capacity, self.binding, self.limits)
        };
        beginning.push(&self.phased()[..position]);
        beginning
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

    /// All layers have seen these tokens, in this phase.
    pub(crate) fn advance(&mut self, tokens: &[u32], phase: Phase) {
        self.tokens.extend_from_slice(tokens);
        if self.tells_phases_apart() {
            let mark = if phase == Phase::Prompt { 0 } else { GENERATED };
            self.phased.extend(tokens.iter().map(|token| token | mark));
        }
        let position = self.position();
        self.tables.iter_mut().for_each(|table| table.advance(position));
    }

    /// Returns the pages that were taken for a pass that was not completed.
    pub(crate) fn settle(&mut self) {
        let position = self.position();
        self.tables.iter_mut().for_each(|table| table.settle(position));
    }

    /// Takes the pages for a saved sequence of `position` tokens.
    pub(crate) fn make_room(&mut self, position: usize) -> Result<(), PagesFull> {
        let there = self.position();
        self.tables.iter_mut().try_for_each(|table| table.restore(&self.pool, there, position))
    }

    /// The tokens with their phases of a restored sequence, whose layers have been filled.
    pub(crate) fn restored(&mut self, phased: &[u32]) {
        self.push(phased);
    }

    /// The marks, oldest first.
    pub(crate) fn snapshots(&self) -> &[Snapshot] {
        &self.marks
    }

    /// A mark at `position`, to be filled with what was saved for it; it is the `newest`-th from the end. `None` if there is no
    /// room for what it keeps.
    pub(crate) fn room_for_mark(&self, newest: usize, position: usize, automatic: bool) -> Option<Snapshot> {
        let kinds = self.pool.layout().pages().iter().enumerate();
        let room = |(number, page): (usize, &PageLayout)| {
            if position == 0 || page.kind().marked(position) == 0 {
                return Some(None);
            }
            let mut table = Table::new(number, page.kind(), 0);
            let fits = newest <= self.limits.most && table.restore(&self.pool, 0, position).is_ok();
            fits.then_some(Some(table))
        };
        let kept = kinds.map(room).collect::<Option<Arc<[_]>>>()?;
        Some(Snapshot { mark: Mark::new(position), kept, automatic })
    }

    /// Adds a mark that has been filled, after all others.
    pub(crate) fn restore_mark(&mut self, mark: Snapshot) {
        self.marks.push(mark);
    }

    /// Gives up the oldest restored marks, if there are more than the memory plan has room for.
    pub(crate) fn limit_marks(&mut self) {
        self.forget_marks(self.limits.most);
    }

    /// Stores of the model: what each layer keeps, layer by layer. Most layers have one, some several.
    pub(crate) fn stores(&self) -> usize {
        self.pool.layout().stores()
    }

    /// The layer that a store belongs to.
    pub(crate) fn layer_of(&self, store: usize) -> usize {
        self.pool.layout().layer_of(store)
    }

    /// Store `number` of a layer.
    pub(crate) fn store_of(&self, layer: usize, number: usize) -> usize {
        self.pool.layout().first_store(layer) + number
    }

    /// The last store of a layer.
    pub(crate) fn last_store_of(&self, layer: usize) -> usize {
        self.pool.layout().last_store(layer)
    }

    /// Whether a mark keeps anything of a store.
    pub(crate) fn forgets(&self, store: usize) -> bool {
        let layout = self.pool.layout();
        layout.pages()[layout.place(store).0].kind().forgets()
    }

    /// The stores that remember a token as long as the sequence has it.
    pub(crate) fn remembering_stores(&self) -> impl Iterator<Item = usize> {
        (0..self.stores()).filter(|&store| !self.forgets(store))
    }

    /// The stores with windows or recurrent states.
    pub(crate) fn forgetting_stores(&self) -> impl Iterator<Item = usize> {
        (0..self.stores()).filter(|&store| self.forgets(store))
    }

    pub(crate) fn store(&self, index: usize) -> LayerCache<'_> {
        let layout = self.pool.layout();
        LayerCache::new(layout, index, &self.tables[layout.place(index).0])
    }

    pub(crate) fn store_mut(&mut self, index: usize) -> LayerCacheMut<'_> {
        let layout = self.pool.layout();
        LayerCacheMut::new(layout, index, &mut self.tables[layout.place(index).0])
    }

    /// The pages that a mark keeps of a store.
    pub(crate) fn store_at<'a>(&'a self, mark: &'a Snapshot, index: usize) -> Option<LayerCache<'a>> {
        let layout = self.pool.layout();
        Some(LayerCache::new(layout, index, mark.kept.get(layout.place(index).0)?.as_ref()?))
    }

    /// The same, to fill it.
    pub(crate) fn store_at_mut<'a>(&'a self, mark: &'a mut Snapshot, index: usize) -> Option<LayerCacheMut<'a>> {
        let layout = self.pool.layout();
        let kept = Arc::get_mut(&mut mark.kept)?.get_mut(layout.place(index).0)?;
        Some(LayerCacheMut::new(layout, index, kept.as_mut()?))
    }

    /// A sequence that counts tokens and remembers nothing.
    #[cfg(test)]
    pub(crate) fn without_layers(capacity: usize) -> Self {
        Sequence::new(&PagePool::new(Layout::empty(), &[]), capacity, Binding::default(), MarkLimits::default())
    }
}

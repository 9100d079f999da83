//! The pages of one kind that a sequence has.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::layout::{PAGE_TOKENS, PageKind, WINDOW_SLACK};
use super::page::{Held, Page, PagePool, PagesFull};

/// The pages of one kind, of a sequence or of a mark in it.
#[derive(Clone, Debug)]
pub enum Table {
    /// Rows by position.
    Rows(RowTable),
    /// Recurrent states.
    State(StateTable),
}

/// Pages of rows, one for each [`PAGE_TOKENS`] rows. A row belongs to one token, and its number is the token's position; or it is
/// an entry for several tokens, which exists once the last of them has been computed.
#[derive(Clone, Debug)]
pub struct RowTable {
    kind: usize,
    /// Tokens that a row represents.
    ratio: usize,
    window: Option<usize>,
    pages: VecDeque<Held>,
    /// Number of the first page that is stored: its contents begin at row `first · PAGE_TOKENS`.
    first: usize,
    /// The first row that is stored: in a restored sequence, the first in the window.
    from: usize,
}

impl RowTable {
    fn new(number: usize, kind: PageKind, capacity: usize) -> Self {
        let ratio = kind.ratio();
        let window = if let PageKind::Window(window) = kind { Some(window) } else { None };
        // One more than the rows need, for the copy of a shared page.
        let pages = VecDeque::with_capacity((capacity / ratio).div_ceil(PAGE_TOKENS) + 1);
        RowTable { kind: number, ratio, window, pages, first: 0, from: 0 }
    }

    /// Tokens that a row represents.
    pub fn ratio(&self) -> usize {
        self.ratio
    }

    /// The page of the rows at `positions`, and their places in it.
    ///
    /// # Panics
    /// If some of them are not stored, or they lie in more than one block of keys.
    pub fn block(&self, positions: Range<usize>) -> (&Page, Range<usize>) {
        let (page, place) = self.page(positions.start);
        let places = place..place + positions.len();
        assert!(places.end <= PAGE_TOKENS, "keys are read block by block");
        (page, places)
    }

    /// The page of a row, and its place there. `position`: the number of the row.
    ///
    /// # Panics
    /// If the row is not stored.
    pub fn page(&self, position: usize) -> (&Page, usize) {
        (self.pages[position / PAGE_TOKENS - self.first].get(), position % PAGE_TOKENS)
    }

    /// The same, to write it.
    ///
    /// # Panics
    /// If the row is not stored, or its page is shared.
    pub fn page_mut(&mut self, position: usize) -> (&mut Page, usize) {
        (self.pages[position / PAGE_TOKENS - self.first].get_mut(), position % PAGE_TOKENS)
    }

    /// Rows of tokens before `position` that the token at `position` and later ones can see.
    pub fn seen_from(&self, position: usize) -> Range<usize> {
        // The window includes the token itself, so it has one earlier row less.
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position / self.ratio
    }

    fn reaches(&self, position: usize) -> bool {
        position == 0 || self.seen_from(position).start >= self.from
    }

    /// Whether a sequence of `position` tokens ends in the middle of a page that is shared.
    fn copies(&self, position: usize) -> bool {
        let last = self.pages.back();
        !(position / self.ratio).is_multiple_of(PAGE_TOKENS) && last.is_some_and(Held::is_shared)
    }

    /// The page that must be copied before a sequence of `position` tokens continues.
    fn copied(&self, position: usize) -> Option<&Held> {
        self.pages.back().filter(|_| self.copies(position))
    }

    fn wanted(&self, position: usize, count: usize) -> usize {
        let there = if self.pages.is_empty() { self.begins(position) } else { self.first + self.pages.len() };
        self.ends(position + count).saturating_sub(there) + usize::from(self.copies(position))
    }

    fn prepare(&mut self, pool: &Arc<PagePool>, position: usize, count: usize) -> Result<(), PagesFull> {
        if self.copies(position)
            && let Some(last) = self.pages.back_mut()
        {
            *last = last.own()?;
        }
        if self.pages.is_empty() {
            self.first = self.begins(position);
        }
        while self.first + self.pages.len() < self.ends(position + count) {
            self.pages.push_back(pool.take(self.kind)?);
        }
        Ok(())
    }

    /// Number of the page with the next row after `position` tokens.
    fn begins(&self, position: usize) -> usize {
        position / self.ratio / PAGE_TOKENS
    }

    /// Number of pages that hold all rows of `position` tokens.
    fn ends(&self, position: usize) -> usize {
        (position / self.ratio).div_ceil(PAGE_TOKENS)
    }

    /// Gives back the pages after `position`.
    fn truncate(&mut self, position: usize) {
        self.pages.truncate(self.ends(position).saturating_sub(self.first));
        if position == 0 {
            (self.first, self.from) = (0, 0);
        }
    }

    /// Gives back the pages that neither the token at `position` nor a later one sees, except for [`WINDOW_SLACK`].
    fn trim(&mut self, position: usize) {
        let keep = self.seen_from(position).start.saturating_sub(WINDOW_SLACK);
        while (self.first + 1) * PAGE_TOKENS <= keep && self.pages.pop_front().is_some() {
            self.first += 1;
            self.from = self.first * PAGE_TOKENS;
        }
    }

    /// The pages of the window before `position`, shared and not copied.
    fn keep(&self, position: usize) -> Self {
        let from = self.seen_from(position).start;
        let skip = (from / PAGE_TOKENS).saturating_sub(self.first);
        let pages = self.pages.iter().skip(skip).cloned().collect();
        RowTable { pages, first: self.first + skip, from: from.max(self.from), ..*self }
    }

    /// Replaces the pages by those that a mark has kept.
    fn replace(&mut self, kept: &RowTable) {
        self.pages.clear();
        self.pages.extend(kept.pages.iter().cloned());
        (self.first, self.from) = (kept.first, kept.from);
    }

    /// The same pages, shared, with room for as many tokens.
    fn fork(&self) -> Self {
        let mut pages = VecDeque::with_capacity(self.pages.capacity());
        pages.extend(self.pages.iter().cloned());
        RowTable { pages, ..*self }
    }
}

/// Recurrent states after the last pass, and one more page for the next pass to write. Until then, that page has the states before
/// the last pass. So a pass that fails can be repeated, and the last pass can be undone.
#[derive(Clone, Debug)]
pub struct StateTable {
    kind: usize,
    /// The states after the last pass, and their position; `None` before the first token.
    now: Option<(usize, Held)>,
    /// The states before the last pass, or half-written ones.
    other: Option<Held>,
    /// The position of `other`, if its states are complete.
    before: Option<usize>,
}

impl StateTable {
    /// The states that a pass reads, and the states that it writes. Before the first token, the former are zeros.
    ///
    /// # Panics
    /// If the sequence was not prepared for a step.
    pub fn step(&mut self) -> (&Page, &mut Page) {
        let (Some((_, now)), Some(other)) = (&self.now, &mut self.other) else { unreachable!("a step was prepared") };
        (now.get(), other.get_mut())
    }

    /// The states after the last pass; `None` before the first token.
    pub fn now(&self) -> Option<&Page> {
        self.now.as_ref().map(|(_, page)| page.get())
    }

    /// Whether the next pass needs another page to write, because there is none or it is shared.
    fn writes_new(&self) -> bool {
        self.other.as_ref().is_none_or(Held::is_shared)
    }

    /// The shared pages that new pages replace when `count` tokens are appended.
    fn replaced(&self, count: usize) -> impl Iterator<Item = &Held> {
        // A page that is read in the first pass of a step is written in the second.
        let again = self.now.iter().map(|now| &now.1).filter(move |_| count > 1);
        self.other.iter().chain(again).filter(|page| page.is_shared())
    }

    fn wanted(&self, count: usize) -> usize {
        usize::from(self.now.is_none()) + usize::from(self.other.is_none()) + self.replaced(count).count()
    }

    fn prepare(&mut self, pool: &Arc<PagePool>) -> Result<(), PagesFull> {
        if self.now.is_none() {
            let mut zeros = pool.take(self.kind)?;
            zeros.get_mut().numbers.fill(0.0);
            self.now = Some((0, zeros));
        }
        if self.writes_new() {
            self.other = None;
            self.other = Some(pool.take(self.kind)?);
        }
        // Until the pass is complete, `other` has neither the old states nor the new ones.
        self.before = None;
        Ok(())
    }

    fn advance(&mut self, position: usize) {
        if let (Some((now, page)), Some(other)) = (&mut self.now, &mut self.other) {
            self.before = Some(*now);
            *now = position;
            std::mem::swap(page, other);
        }
    }

    /// The positions to which it can go.
    fn positions(&self) -> impl Iterator<Item = usize> {
        let now = self.now.as_ref().map(|now| now.0);
        now.into_iter().chain(self.before)
    }

    fn rewind(&mut self, position: usize, kept: Option<&Held>) {
        if position == 0 {
            (self.now, self.other, self.before) = (None, None, None);
        } else if self.before == Some(position) {
            if let (Some((now, page)), Some(other)) = (&mut self.now, &mut self.other) {
                *now = position;
                std::mem::swap(page, other);
            }
            self.before = None;
        } else if let Some(kept) = kept
            && self.now.as_ref().is_none_or(|now| now.0 != position)
        {
            self.now = Some((position, kept.clone()));
            self.before = None;
        }
    }

    fn fork(&self) -> Self {
        StateTable { kind: self.kind, now: self.now.clone(), other: None, before: None }
    }
}

impl Table {
    /// A table without pages, for a sequence of up to `capacity` tokens.
    pub fn new(number: usize, kind: PageKind, capacity: usize) -> Self {
        match kind {
            PageKind::Rows | PageKind::Window(_) | PageKind::Entries(_) => {
                Table::Rows(RowTable::new(number, kind, capacity))
            }
            PageKind::State => Table::State(StateTable { kind: number, now: None, other: None, before: None }),
        }
    }

    /// Pages that a sequence of `position` tokens must take before it can append `count` more, if it gives none back meanwhile.
    pub fn wanted(&self, position: usize, count: usize) -> usize {
        match self {
            Table::Rows(rows) => rows.wanted(position, count),
            Table::State(state) => state.wanted(count),
        }
    }

    /// The shared pages for which [`wanted`](Self::wanted) counts a copy. If all sequences that share a page continue, the last one
    /// needs no copy, because it is then the only owner of the page.
    pub fn replaced(&self, position: usize, count: usize) -> impl Iterator<Item = &Held> {
        let (rows, state) = match self {
            Table::Rows(rows) => (rows.copied(position), None),
            Table::State(state) => (None, Some(state.replaced(count))),
        };
        rows.into_iter().chain(state.into_iter().flatten())
    }

    /// Takes the pages for a pass of `count` rows, and copies shared pages that the pass will write.
    ///
    /// # Errors
    /// [`PagesFull`]; the sequence has lost nothing.
    pub fn prepare(&mut self, pool: &Arc<PagePool>, position: usize, count: usize) -> Result<(), PagesFull> {
        match self {
            Table::Rows(rows) => rows.prepare(pool, position, count),
            Table::State(state) => state.prepare(pool),
        }
    }

    /// Gives back the pages that no later token sees, after a pass has brought the sequence to `position`.
    pub fn advance(&mut self, position: usize) {
        match self {
            Table::Rows(rows) => rows.trim(position),
            Table::State(state) => state.advance(position),
        }
    }

    /// Gives back pages that were taken for a pass that was not completed.
    pub fn settle(&mut self, position: usize) {
        if let Table::Rows(rows) = self {
            rows.truncate(position);
        }
    }

    /// Whether what is remembered of the first `position` tokens is still there.
    pub fn reaches(&self, position: usize) -> bool {
        match self {
            Table::Rows(rows) => rows.reaches(position),
            Table::State(state) => position == 0 || state.positions().any(|at| at == position),
        }
    }

    /// The pages that a mark at `position`, where the sequence is, has to keep; `None` if rows stay as long as their tokens do.
    /// Pages are shared, not copied: a sequence that continues copies a shared page before it writes.
    pub fn keep(&self, position: usize) -> Option<Self> {
        match self {
            Table::Rows(rows) => rows.window.map(|_| Table::Rows(rows.keep(position))),
            Table::State(state) => Some(Table::State(state.fork())),
        }
    }

    /// Forgets the tokens from `position` on. `kept`: the pages that a mark at `position` has kept.
    pub fn rewind(&mut self, position: usize, kept: Option<&Self>) {
        match (self, kept) {
            (Table::Rows(rows), Some(Table::Rows(kept))) if !rows.reaches(position) => rows.replace(kept),
            (Table::Rows(rows), _) => rows.truncate(position),
            (Table::State(state), Some(Table::State(kept))) => {
                state.rewind(position, kept.now.as_ref().map(|now| &now.1))
            }
            (Table::State(state), _) => state.rewind(position, None),
        }
    }

    /// The table of a fork.
    pub fn fork(&self) -> Self {
        match self {
            Table::Rows(rows) => Table::Rows(rows.fork()),
            Table::State(state) => Table::State(state.fork()),
        }
    }

    /// Whether it keeps a recurrent state, in which no token can be told from those before it.
    pub fn is_state(&self) -> bool {
        matches!(self, Table::State(_))
    }

    /// The positions to which a recurrent state can go.
    pub fn state_positions(&self) -> impl Iterator<Item = usize> {
        let state = if let Table::State(state) = self { Some(state) } else { None };
        state.into_iter().flat_map(StateTable::positions)
    }

    /// Its pages.
    pub fn pages(&self) -> impl Iterator<Item = &Held> {
        let (rows, state) = match self {
            Table::Rows(rows) => (Some(&rows.pages), None),
            Table::State(state) => (None, Some(state)),
        };
        let state = state.into_iter().flat_map(|state| state.now.iter().map(|now| &now.1).chain(&state.other));
        rows.into_iter().flatten().chain(state)
    }

    /// Rows of positions.
    ///
    /// # Panics
    /// If the table has states.
    pub fn rows(&self) -> &RowTable {
        let Table::Rows(rows) = self else { unreachable!("{}", super::OF_ITS_SPEC) };
        rows
    }

    /// The same, to write them.
    ///
    /// # Panics
    /// If the table has states.
    pub fn rows_mut(&mut self) -> &mut RowTable {
        let Table::Rows(rows) = self else { unreachable!("{}", super::OF_ITS_SPEC) };
        rows
    }

    /// Recurrent states.
    ///
    /// # Panics
    /// If the table has rows.
    pub fn state(&self) -> &StateTable {
        let Table::State(state) = self else { unreachable!("{}", super::OF_ITS_SPEC) };
        state
    }

    /// The same, to write them.
    ///
    /// # Panics
    /// If the table has rows.
    pub fn state_mut(&mut self) -> &mut StateTable {
        let Table::State(state) = self else { unreachable!("{}", super::OF_ITS_SPEC) };
        state
    }

    /// Takes the pages for a saved sequence of `position` tokens. In layers that remember everything, the first `there` tokens are
    /// stored already.
    ///
    /// # Errors
    /// [`PagesFull`].
    pub fn restore(&mut self, pool: &Arc<PagePool>, there: usize, position: usize) -> Result<(), PagesFull> {
        match self {
            Table::Rows(rows) if rows.window.is_none() => rows.prepare(pool, there, position - there),
            Table::Rows(rows) => {
                rows.from = rows.seen_from(position).start;
                rows.prepare(pool, rows.from, position - rows.from)
            }
            Table::State(state) if position > 0 => {
                state.now = Some((position, pool.take(state.kind)?));
                Ok(())
            }
            Table::State(_) => Ok(()),
        }
    }

    /// The states of a restored sequence, to be filled.
    pub fn restored_state(&mut self) -> &mut Page {
        let Table::State(StateTable { now: Some((_, page)), .. }) = self else {
            unreachable!("{}", super::OF_ITS_SPEC)
        };
        page.get_mut()
    }
}

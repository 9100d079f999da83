//! Collects the pieces of an answer.

use std::collections::BTreeSet;

use super::Piece;
use super::ids::{fresh_seed, letters};
use crate::syntax::Ids;

/// Pieces that wait to be passed on, and the numbers of calls.
#[derive(Debug, Clone)]
pub(super) struct Output {
    pieces: Vec<Piece>,
    calls: usize,
    ids: Ids,
    /// Ids that the model gave.
    given: BTreeSet<String>,
    seed: u64,
}

impl Output {
    pub(super) fn new(ids: Ids) -> Self {
        Self { pieces: Vec::new(), calls: 0, ids, given: BTreeSet::new(), seed: fresh_seed() }
    }

    pub(super) fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    pub(super) fn calls(&self) -> usize {
        self.calls
    }

    pub(super) fn take(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.pieces)
    }

    /// Takes the pieces of an output that began as a copy of this one.
    pub(super) fn adopt(&mut self, pieces: Vec<Piece>, calls: usize) {
        self.pieces.extend(pieces);
        self.calls = calls;
    }

    pub(super) fn text(&mut self, more: &str) {
        match self.pieces.last_mut() {
            _ if more.is_empty() => {}
            Some(Piece::Text(text)) => text.push_str(more),
            _ => self.pieces.push(Piece::Text(more.to_owned())),
        }
    }

    pub(super) fn thinking(&mut self, more: &str) {
        match self.pieces.last_mut() {
            _ if more.is_empty() => {}
            Some(Piece::Thinking(text)) => text.push_str(more),
            _ => self.pieces.push(Piece::Thinking(more.to_owned())),
        }
    }

    /// Begins a call. The model's own id is used if it has not occurred before.
    pub(super) fn call(&mut self, name: &str, own_id: Option<&str>) {
        let index = self.calls;
        self.calls += 1;
        let id = match (own_id.filter(|id| !id.is_empty()), self.ids) {
            (Some(own), _) if self.given.insert(own.to_owned()) => own.to_owned(),
            (_, Ids::Nine) => letters(self.seed, index, 9),
            (_, Ids::Long | Ids::Own) => format!("call_{}", letters(self.seed, index, 24)),
        };
        self.pieces.push(Piece::Call { index, id, name: name.to_owned() });
    }

    /// Adds arguments to the call that began last.
    pub(super) fn arguments(&mut self, more: &str) {
        let last = self.calls.saturating_sub(1);
        match self.pieces.last_mut() {
            _ if more.is_empty() => {}
            Some(Piece::Arguments { index, delta }) if *index == last => delta.push_str(more),
            _ => self.pieces.push(Piece::Arguments { index: last, delta: more.to_owned() }),
        }
    }
}

//! Least frequently used.

use super::tournament::Candidates;
use super::{Key, Pass, Policy, PolicyKind, Shape};

/// Evicts the key that was used least often, counted from the start and kept after eviction; of several, the one that was
/// used longest ago.
///
/// For comparison: it has no cliff, but it never forgets what was popular before.
#[derive(Clone, Debug)]
pub struct Lfu {
    shape: Shape,
    counts: Vec<u32>,
    /// Pass of the last use.
    last: Vec<u32>,
    /// Scored by (rarity, age).
    order: Candidates,
    pass: u32,
}

impl Lfu {
    /// Nothing is resident.
    pub fn new(shape: Shape) -> Self {
        let n = shape.keys();
        Lfu { shape, counts: vec![0; n], last: vec![0; n], order: Candidates::new(n), pass: 0 }
    }

    fn score(&self, key: Key) -> u64 {
        u64::from(u32::MAX - self.counts[key.index()]) << 32 | u64::from(u32::MAX - self.last[key.index()])
    }
}

impl Policy for Lfu {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Lfu
    }

    fn begin_pass(&mut self, pass: &Pass<'_>) {
        self.pass = self.pass.saturating_add(1);
        for choice in pass.choices {
            let key = self.shape.key(pass.layer, choice.expert);
            self.counts[key.index()] = self.counts[key.index()].saturating_add(1);
            self.last[key.index()] = self.pass;
            self.order.rescore(key, self.score(key));
        }
    }

    fn hit(&mut self, _key: Key) {}

    fn insert(&mut self, key: Key) {
        self.order.insert(key, self.score(key));
    }

    fn evict(&mut self, key: Key) {
        self.order.remove(key);
    }

    fn pin(&mut self, key: Key) {
        self.order.pin(key);
    }

    fn unpin(&mut self, key: Key) {
        self.order.unpin(key, self.score(key));
    }

    fn classify(&mut self, classes: &[u8]) {
        self.order.classify(self.shape, classes);
    }

    fn victim_in(&mut self, class: u8) -> Option<Key> {
        self.order.winner(class)
    }

    fn lateness(&self, key: Key) -> Option<u64> {
        (self.counts[key.index()] > 0).then(|| self.score(key))
    }
}

//! The optimum, for replays.

use super::tournament::Candidates;
use super::{Key, Pass, Policy, PolicyKind, Shape};

/// Evicts the key whose next use is latest (Bélády's rule).
///
/// It follows the same rules as the others: every chosen expert is read, and all experts of a pass stay until it ends.
/// Under these rules no policy has fewer misses, provided that the slots hold the experts of one pass.
#[derive(Clone, Debug)]
pub struct Belady {
    shape: Shape,
    /// For every use, in order of time: the pass in which the same expert is used next; `u32::MAX`: never.
    next_uses: Vec<u32>,
    /// How many have happened.
    done: usize,
    /// Next use of every key as of now.
    next: Vec<u32>,
    /// Scored by the next use.
    order: Candidates,
}

impl Belady {
    /// `future`: the layer and the experts of every pass that [`Policy::begin_pass`] will be called with, in order.
    pub fn new<'a>(shape: Shape, future: impl DoubleEndedIterator<Item = (u32, &'a [u32])>) -> Self {
        let mut next = vec![u32::MAX; shape.keys()];
        let mut next_uses = Vec::new();
        // From the end to the start; passes are numbered from the end here, and the numbers are reversed below.
        let mut passes = 0;
        for (layer, experts) in future.rev() {
            passes += 1;
            for &expert in experts.iter().rev() {
                next_uses.push(std::mem::replace(&mut next[shape.key(layer, expert).index()], passes));
            }
        }
        next_uses.reverse();
        for n in &mut next_uses {
            *n = if *n == u32::MAX { u32::MAX } else { passes - *n };
        }
        let keys = shape.keys();
        next.fill(u32::MAX);
        Belady { shape, next_uses, done: 0, next, order: Candidates::new(keys) }
    }

    fn score(&self, key: Key) -> u64 {
        u64::from(self.next[key.index()]) + 1
    }
}

impl Policy for Belady {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Belady
    }

    fn begin_pass(&mut self, pass: &Pass<'_>) {
        for choice in pass.choices {
            let key = self.shape.key(pass.layer, choice.expert);
            self.next[key.index()] = self.next_uses.get(self.done).copied().unwrap_or(u32::MAX);
            self.done += 1;
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
}

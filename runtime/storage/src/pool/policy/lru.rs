//! Least recently used.

use super::{Key, Pass, Policy, PolicyKind, Shape};

/// End of the list.
const NONE: u32 = u32::MAX;

/// Evicts the key that was used longest ago.
///
/// For comparison: a model goes through its layers in a circle, so a cache smaller than one token cycle loses every key
/// just before it is needed and never hits. Evictable keys form a doubly linked list in order of use; every call is O(1).
#[derive(Clone, Debug)]
pub struct Lru {
    /// Neighbours of every key; the last entry is the list's head.
    links: Vec<Link>,
    pinned: Vec<bool>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl Lru {
    /// Nothing is resident.
    pub fn new(shape: Shape) -> Self {
        let head = shape.keys() as u32;
        let mut links = vec![Link { older: NONE, newer: NONE }; shape.keys() + 1];
        links[head as usize] = Link { older: head, newer: head };
        Lru { links, pinned: vec![false; shape.keys()] }
    }

    fn head(&self) -> u32 {
        (self.links.len() - 1) as u32
    }

    fn unlink(&mut self, key: Key) {
        let Link { older, newer } = self.links[key.index()];
        if older != NONE {
            self.links[older as usize].newer = newer;
            self.links[newer as usize].older = older;
            self.links[key.index()] = Link { older: NONE, newer: NONE };
        }
    }

    fn append(&mut self, key: Key) {
        self.unlink(key);
        let head = self.head();
        let newest = self.links[head as usize].older;
        self.links[key.index()] = Link { older: newest, newer: head };
        self.links[newest as usize].newer = key.0;
        self.links[head as usize].older = key.0;
    }
}

impl Policy for Lru {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Lru
    }

    fn begin_pass(&mut self, _pass: &Pass<'_>) {}

    fn hit(&mut self, key: Key) {
        if self.links[key.index()].older != NONE {
            self.append(key);
        }
    }

    fn insert(&mut self, key: Key) {
        self.pinned[key.index()] = false;
        self.append(key);
    }

    fn evict(&mut self, key: Key) {
        self.pinned[key.index()] = false;
        self.unlink(key);
    }

    fn pin(&mut self, key: Key) {
        if self.links[key.index()].older != NONE {
            self.pinned[key.index()] = true;
            self.unlink(key);
        }
    }

    fn unpin(&mut self, key: Key) {
        if std::mem::take(&mut self.pinned[key.index()]) {
            self.append(key);
        }
    }

    fn victim(&mut self) -> Option<Key> {
        let head = self.head();
        let oldest = self.links[head as usize].newer;
        (oldest != head).then_some(Key(oldest))
    }
}

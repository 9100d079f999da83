//! Least recently used.

use super::{Key, Pass, Policy, PolicyKind, Shape};

/// End of the list.
const NONE: u32 = u32::MAX;

/// Evicts the key that was used longest ago.
///
/// For comparison: a model goes through its layers in a circle, so a cache smaller than one token cycle loses every key
/// just before it is needed and never hits. Evictable keys form a doubly linked list in order of use, one for each size
/// class; every call is O(1).
#[derive(Clone, Debug)]
pub struct Lru {
    shape: Shape,
    /// Neighbours of every key; behind them, the head of the list of each size class.
    links: Vec<Link>,
    pinned: Vec<bool>,
    /// The size class of each layer; empty while there is only one.
    classes: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl Lru {
    /// Nothing is resident.
    pub fn new(shape: Shape) -> Self {
        let mut lru = Lru {
            shape,
            links: vec![Link { older: NONE, newer: NONE }; shape.keys()],
            pinned: vec![false; shape.keys()],
            classes: Vec::new(),
        };
        lru.add_heads(1);
        lru
    }

    /// Adds empty lists.
    fn add_heads(&mut self, count: usize) {
        for _ in 0..count {
            let head = self.links.len() as u32;
            self.links.push(Link { older: head, newer: head });
        }
    }

    fn head(&self, class: u8) -> u32 {
        self.shape.keys() as u32 + u32::from(class)
    }

    fn class(&self, key: Key) -> u8 {
        self.classes.get(self.shape.expert(key).0 as usize).copied().unwrap_or(0)
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
        let head = self.head(self.class(key));
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

    fn classify(&mut self, classes: &[u8]) {
        self.links.truncate(self.shape.keys());
        self.classes = classes.to_vec();
        self.add_heads(1 + classes.iter().max().map_or(0, |&class| usize::from(class)));
    }

    fn victim_in(&mut self, class: u8) -> Option<Key> {
        let head = self.head(class);
        let oldest = self.links[head as usize].newer;
        (oldest != head).then_some(Key(oldest))
    }
}

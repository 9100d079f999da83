//! Least recently used: the yardstick for every other policy.
//!
//! When not to use it: with fewer slots than one token routes to, over all layers, each expert
//! is evicted just before it is needed again, and the hit rate is exactly 0. It also lets a
//! prefill sweep replace everything.

use super::{EvictionPolicy, ExpertIndex, PassInfo};

/// Evicts the expert whose last access is the longest ago.
///
/// A doubly linked list in two arrays: accesses, insertions and evictions cost O(1), a victim
/// O(experts in use).
#[derive(Debug)]
pub struct Lru {
    /// `links[e]` are the neighbours of expert `e`; the last entry is the list's head.
    links: Vec<Link>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl Lru {
    /// A policy for a model with this many experts in all.
    #[must_use]
    pub fn new(experts: u32) -> Self {
        let alone = |index| Link { older: index, newer: index };
        Self { links: (0..=experts).map(alone).collect() }
    }

    fn head(&self) -> u32 {
        (self.links.len() - 1) as u32
    }

    /// An expert outside the list is linked to itself.
    fn is_linked(&self, expert: u32) -> bool {
        self.links[expert as usize].older != expert
    }

    fn unlink(&mut self, expert: u32) {
        let Link { older, newer } = self.links[expert as usize];
        self.links[older as usize].newer = newer;
        self.links[newer as usize].older = older;
        self.links[expert as usize] = Link { older: expert, newer: expert };
    }

    fn link_newest(&mut self, expert: u32) {
        let head = self.head();
        let newest = self.links[head as usize].older;
        self.links[expert as usize] = Link { older: newest, newer: head };
        self.links[newest as usize].newer = expert;
        self.links[head as usize].older = expert;
    }
}

impl EvictionPolicy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn begin_pass(&mut self, _pass: PassInfo) {}

    fn access(&mut self, expert: ExpertIndex) {
        if self.is_linked(expert) {
            self.unlink(expert);
            self.link_newest(expert);
        }
    }

    fn insert(&mut self, expert: ExpertIndex) {
        assert!(!self.is_linked(expert), "inserted twice");
        self.link_newest(expert);
    }

    fn evict(&mut self, expert: ExpertIndex) {
        assert!(self.is_linked(expert), "evicted without a slot");
        self.unlink(expert);
    }

    fn victim(&mut self, evictable: &dyn Fn(ExpertIndex) -> bool) -> Option<ExpertIndex> {
        let head = self.head();
        let mut expert = self.links[head as usize].newer;
        while expert != head && !evictable(expert) {
            expert = self.links[expert as usize].newer;
        }
        (expert != head).then_some(expert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_access_goes_first() {
        let mut lru = Lru::new(4);
        assert_eq!(lru.victim(&|_| true), None);
        for expert in [2, 0, 3] {
            lru.access(expert);
            lru.insert(expert);
        }
        lru.access(2);
        assert_eq!(lru.victim(&|_| true), Some(0));
        assert_eq!(lru.victim(&|expert| expert != 0), Some(3));
        assert_eq!(lru.victim(&|_| false), None);
        lru.evict(0);
        lru.evict(3);
        assert_eq!(lru.victim(&|_| true), Some(2));
        lru.evict(2);
        assert_eq!(lru.victim(&|_| true), None);
    }
}

//! A tournament over keys, which finds the largest score.

use std::cmp::Reverse;
use std::ops::Range;

use super::{Key, Shape};

/// A binary tree over all keys in which every node knows the winner below it.
///
/// Setting a score costs O(log keys), a run of neighbouring scores O(run + log keys), the winner O(1). Score 0 means "does
/// not take part"; among equals the lowest key wins. Nothing is allocated after [`Tournament::new`].
#[derive(Clone, Debug)]
pub(crate) struct Tournament {
    /// Scores of the keys, padded to a power of two.
    scores: Vec<u64>,
    /// `winners[1]` is the root; the children of node `i` are `2 i` and `2 i + 1`; the lowest level names keys.
    winners: Vec<u32>,
}

impl Tournament {
    /// A tournament in which no key takes part yet.
    pub(crate) fn new(keys: usize) -> Self {
        let leaves = keys.next_power_of_two().max(2);
        let mut winners = vec![0; leaves];
        for i in (1..leaves).rev() {
            winners[i] = if 2 * i >= leaves { (2 * i - leaves) as u32 } else { winners[2 * i] };
        }
        Tournament { scores: vec![0; leaves], winners }
    }

    /// The key with the largest score.
    pub(crate) fn winner(&self) -> Option<Key> {
        let winner = self.winners[1];
        (self.scores[winner as usize] > 0).then_some(Key(winner))
    }

    /// The key in `range` with the largest score.
    fn winner_in(&self, range: &Range<usize>) -> Option<Key> {
        let leaves = self.scores.len();
        let mut best: Option<(u64, Reverse<u32>)> = None;
        let mut play = |key: u32| {
            let score = self.scores[key as usize];
            best = best.max((score > 0).then_some((score, Reverse(key))));
        };
        // Walks up on both sides of the range; what lies between its ends is covered by whole subtrees.
        let (mut start, mut end) = (range.start + leaves, range.end + leaves);
        let winner = |node: usize| if node >= leaves { (node - leaves) as u32 } else { self.winners[node] };
        while start < end {
            if start % 2 == 1 {
                play(winner(start));
                start += 1;
            }
            if end % 2 == 1 {
                end -= 1;
                play(winner(end));
            }
            (start, end) = (start / 2, end / 2);
        }
        best.map(|(_, Reverse(key))| Key(key))
    }

    /// Changes the score of one key.
    pub(crate) fn set(&mut self, key: Key, score: u64) {
        if self.scores[key.index()] == score {
            return;
        }
        self.scores[key.index()] = score;
        let mut node = (key.index() + self.scores.len()) / 2;
        while node >= 1 {
            self.winners[node] = self.play(node);
            node /= 2;
        }
    }

    /// Changes the scores of the keys in `range`: `score` maps a key and its old score to the new one.
    pub(crate) fn update(&mut self, range: Range<usize>, mut score: impl FnMut(Key, u64) -> u64) {
        if range.is_empty() {
            return;
        }
        for i in range.clone() {
            self.scores[i] = score(Key(i as u32), self.scores[i]);
        }
        let leaves = self.scores.len();
        let (mut first, mut last) = ((range.start + leaves) / 2, (range.end - 1 + leaves) / 2);
        while first >= 1 {
            for node in first..=last {
                self.winners[node] = self.play(node);
            }
            (first, last) = (first / 2, last / 2);
        }
    }

    fn play(&self, node: usize) -> u32 {
        let leaves = self.scores.len();
        let (a, b) = match 2 * node {
            left if left >= leaves => ((left - leaves) as u32, (left + 1 - leaves) as u32),
            left => (self.winners[left], self.winners[left + 1]),
        };
        if self.scores[b as usize] > self.scores[a as usize] { b } else { a }
    }
}

/// The resident keys, and those of them that may be evicted, ordered by score.
#[derive(Clone, Debug)]
pub(crate) struct Candidates {
    state: Vec<State>,
    /// Resident keys without pin; scores are at least 1.
    order: Tournament,
    /// For every size class, the keys of its layers; empty while there is only one class.
    classes: Vec<Vec<Range<usize>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    Free,
    Pinned,
}

impl Candidates {
    /// Nothing is resident.
    pub(crate) fn new(keys: usize) -> Self {
        Candidates { state: vec![State::Absent; keys], order: Tournament::new(keys), classes: Vec::new() }
    }

    /// `key` becomes resident.
    pub(crate) fn insert(&mut self, key: Key, score: u64) {
        self.state[key.index()] = State::Free;
        self.order.set(key, score.max(1));
    }

    /// `key` is gone.
    pub(crate) fn remove(&mut self, key: Key) {
        self.state[key.index()] = State::Absent;
        self.order.set(key, 0);
    }

    /// `key` stays, if it is resident.
    pub(crate) fn pin(&mut self, key: Key) {
        if self.state[key.index()] == State::Free {
            self.state[key.index()] = State::Pinned;
            self.order.set(key, 0);
        }
    }

    /// `key` may go, if it was pinned.
    pub(crate) fn unpin(&mut self, key: Key, score: u64) {
        if self.state[key.index()] == State::Pinned {
            self.insert(key, score);
        }
    }

    /// Gives `key` a new score if it takes part.
    pub(crate) fn rescore(&mut self, key: Key, score: u64) {
        if self.state[key.index()] == State::Free {
            self.order.set(key, score.max(1));
        }
    }

    /// Gives those keys in `range` that take part a new score.
    pub(crate) fn rescore_all(&mut self, range: Range<usize>, mut score: impl FnMut(Key) -> u64) {
        self.order.update(range, |key, old| if old > 0 { score(key).max(1) } else { 0 });
    }

    /// `classes`: the size class of each layer.
    pub(crate) fn classify(&mut self, shape: Shape, classes: &[u8]) {
        let count = classes.iter().max().map_or(0, |&class| usize::from(class) + 1);
        self.classes = vec![Vec::new(); if count > 1 { count } else { 0 }];
        for (layer, &class) in classes.iter().enumerate() {
            let Some(ranges) = self.classes.get_mut(usize::from(class)) else { continue };
            let experts = shape.experts as usize;
            let keys = layer * experts..(layer + 1) * experts;
            match ranges.last_mut() {
                Some(last) if last.end == keys.start => last.end = keys.end,
                _ => ranges.push(keys),
            }
        }
    }

    /// The key of a size class with the largest score among those that may go. O(runs of neighbouring layers × log keys).
    pub(crate) fn winner(&self, class: u8) -> Option<Key> {
        let Some(ranges) = self.classes.get(usize::from(class)) else { return self.order.winner() };
        let winners = ranges.iter().filter_map(|range| self.order.winner_in(range));
        winners.max_by_key(|&key| (self.order.scores[key.index()], Reverse(key)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_winner_is_the_largest(keys in 1usize..70, ops in prop::collection::vec((0usize..70, 0usize..70, 0u64..9), 1..80)) {
            let mut tree = Tournament::new(keys);
            let mut plain = vec![0; keys];
            for (a, b, score) in ops {
                let (a, b) = (a % keys, b % keys);
                if a < b {
                    tree.update(a..b, |key, old| { assert_eq!(old, plain[key.index()]); score + key.index() as u64 % 3 });
                    plain.iter_mut().enumerate().take(b).skip(a).for_each(|(i, s)| *s = score + i as u64 % 3);
                } else {
                    tree.set(Key(a as u32), score);
                    plain[a] = score;
                }
                let best = (0..keys).filter(|&i| plain[i] > 0).max_by_key(|&i| (plain[i], usize::MAX - i));
                prop_assert_eq!(tree.winner().map(Key::index), best);
                let (from, to) = (a.min(b), a.max(b));
                let best = (from..to).filter(|&i| plain[i] > 0).max_by_key(|&i| (plain[i], usize::MAX - i));
                prop_assert_eq!(tree.winner_in(&(from..to)).map(Key::index), best);
                prop_assert!((0..keys).all(|i| tree.scores[i] == plain[i]));
            }
        }
    }
}

//! The segments in memory: which text each has, which segment it continues, and which is needed least.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_model::PAGE_TOKENS;
use sluice_model::session::{Binding, PrefixHash, SegmentInfo};

use crate::name::SegmentId;

/// A segment on the drive.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: SegmentId,
    pub(crate) info: SegmentInfo,
    /// Bytes on the drive.
    pub(crate) bytes: u64,
}

impl Segment {
    pub(crate) fn new(info: SegmentInfo, bytes: u64) -> Self {
        Segment { id: SegmentId::new(info.binding, info.start, info.text), info, bytes }
    }

    /// The page boundary at which it begins.
    fn begin(&self) -> Boundary {
        (self.info.binding, self.info.start, self.info.before)
    }

    /// The page boundaries inside it and at its end.
    fn boundaries(&self) -> impl Iterator<Item = Boundary> {
        let SegmentInfo { binding, start, before, ref tokens, .. } = self.info;
        before.pages(tokens).enumerate().map(move |(i, hash)| (binding, start + (i + 1) * PAGE_TOKENS, hash))
    }

    /// The last place up to `agreed` from which a sequence can continue.
    fn reaches(&self, agreed: usize) -> Option<usize> {
        if !self.info.forgets || agreed >= self.info.position {
            return Some(agreed.min(self.info.position));
        }
        self.info.marks.iter().rev().copied().find(|&mark| mark <= agreed)
    }
}

/// A page boundary of a text: the model that computes the text, the tokens before the boundary, and their hash.
type Boundary = (Binding, usize, PrefixHash);

/// What happened to a segment.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct History {
    pub(crate) created: SystemTime,
    pub(crate) used: SystemTime,
    pub(crate) uses: u32,
    pub(crate) title: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) segment: Arc<Segment>,
    pub(crate) parent: Option<SegmentId>,
    pub(crate) children: Vec<SegmentId>,
    pub(crate) history: History,
}

/// How far a text is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    /// Tokens that are stored.
    pub(crate) matched: usize,
    /// Tokens up to the last page boundary among them.
    pub(crate) covered: usize,
    /// The segment with which most tokens can be restored, and how many.
    pub(crate) best: Option<(SegmentId, usize)>,
}

/// All segments that can be used.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    nodes: HashMap<SegmentId, Node>,
    /// The segments that begin at a page boundary.
    hanging: HashMap<Boundary, Vec<SegmentId>>,
    /// The segments that contain a page boundary.
    having: HashMap<Boundary, Vec<SegmentId>>,
    bytes: u64,
}

impl Tree {
    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn nodes(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.nodes.values()
    }

    pub(crate) fn get(&self, id: SegmentId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: SegmentId) -> Option<&mut Node> {
        self.nodes.get_mut(&id)
    }

    /// Walks along a text.
    pub(crate) fn walk(&self, binding: Binding, tokens: &[u32]) -> Walk {
        let (mut walk, mut at, mut hash) = (Walk::default(), 0, PrefixHash::default());
        loop {
            for &id in self.hanging.get(&(binding, at, hash)).into_iter().flatten() {
                let segment = &self.nodes[&id].segment;
                let same =
                    segment.info.tokens.iter().zip(&tokens[at..]).take_while(|(stored, wanted)| stored == wanted);
                let agreed = at + same.count();
                walk.matched = walk.matched.max(agreed);
                walk.covered = walk.covered.max(agreed / PAGE_TOKENS * PAGE_TOKENS);
                let reached = segment.reaches(agreed).filter(|&reached| reached > walk.best.map_or(0, |best| best.1));
                walk.best = reached.map(|reached| (id, reached)).or(walk.best);
            }
            if at + PAGE_TOKENS > walk.covered {
                return walk;
            }
            hash = hash.then(&tokens[at..at + PAGE_TOKENS]);
            at += PAGE_TOKENS;
        }
    }

    /// A segment and those that it continues, in the order of their tokens.
    pub(crate) fn chain(&self, id: SegmentId) -> Vec<Arc<Segment>> {
        let up = std::iter::successors(self.nodes.get(&id), |node| node.parent.and_then(|id| self.nodes.get(&id)));
        let mut chain: Vec<_> = up.map(|node| Arc::clone(&node.segment)).collect();
        chain.reverse();
        chain
    }

    /// A segment that contains the page boundary.
    pub(crate) fn parent_at(&self, binding: Binding, start: usize, before: PrefixHash) -> Option<SegmentId> {
        self.having.get(&(binding, start, before))?.first().copied()
    }

    /// Whether a segment could be inserted.
    fn belongs(&self, segment: &Segment) -> bool {
        let (binding, start, before) = segment.begin();
        !self.nodes.contains_key(&segment.id) && (start == 0 || self.parent_at(binding, start, before).is_some())
    }

    /// Adds a segment. Gives it back if it exists already, or if the segment that it continues does not.
    pub(crate) fn insert(&mut self, segment: Segment, history: History) -> Option<Segment> {
        if !self.belongs(&segment) {
            return Some(segment);
        }
        let (id, begin) = (segment.id, segment.begin());
        let parent = if begin.1 == 0 { None } else { self.parent_at(begin.0, begin.1, begin.2) };
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children.push(id);
        }
        self.hanging.entry(begin).or_default().push(id);
        segment.boundaries().for_each(|boundary| self.having.entry(boundary).or_default().push(id));
        self.bytes += segment.bytes;
        let node = Node { segment: Arc::new(segment), parent, children: Vec::new(), history };
        self.nodes.insert(id, node);
        None
    }

    /// Removes a segment that no other one continues.
    fn remove_leaf(&mut self, id: SegmentId) -> Option<Arc<Segment>> {
        let Node { segment, parent, .. } = self.nodes.remove(&id)?;
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children.retain(|&child| child != id);
        }
        let Tree { hanging, having, bytes, .. } = self;
        forget(hanging, segment.begin(), id);
        segment.boundaries().for_each(|boundary| forget(having, boundary, id));
        *bytes -= segment.bytes;
        Some(segment)
    }

    /// A segment and all that continue it; those come later.
    pub(crate) fn with_continuations(&self, id: SegmentId) -> Vec<SegmentId> {
        let (mut order, mut next) = (Vec::new(), vec![id]);
        while let Some(id) = next.pop() {
            order.push(id);
            next.extend(self.nodes.get(&id).into_iter().flat_map(|node| &node.children));
        }
        order
    }

    /// Removes a segment and all that continue it; those come first.
    pub(crate) fn remove(&mut self, id: SegmentId) -> Vec<Arc<Segment>> {
        self.with_continuations(id).into_iter().rev().filter_map(|id| self.remove_leaf(id)).collect()
    }

    /// Segments that no other one continues and that are not in use.
    fn idle_leaves(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| node.children.is_empty() && Arc::strong_count(&node.segment) == 1)
    }

    /// Removes the segment that is needed least: of the idle leaves, the one with the largest ratio of the time since its last use to
    /// the number of its uses, and among equals the largest.
    pub(crate) fn remove_least_useful(&mut self, now: SystemTime) -> Option<Arc<Segment>> {
        let rank = |node: &Node| {
            let idle = now.duration_since(node.history.used).unwrap_or_default().as_secs_f64();
            (idle / (1.0 + f64::from(node.history.uses)), node.segment.bytes)
        };
        let least = self.idle_leaves().map(|node| (rank(node), node.segment.id));
        let (_, id) = least.max_by(|(a, x), (b, y)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(x.cmp(y)))?;
        self.remove_leaf(id)
    }

    /// Bytes of the segments that could be removed, if `kept` and the segments that those continue stay.
    pub(crate) fn removable(&self, kept: &[Arc<Segment>]) -> u64 {
        let used = self.nodes.values().filter(|node| Arc::strong_count(&node.segment) > 1).map(|node| node.segment.id);
        let mut stay: HashSet<SegmentId> = HashSet::new();
        for id in used.chain(kept.iter().map(|segment| segment.id)) {
            let mut next = Some(id);
            while let Some(id) = next.filter(|&id| stay.insert(id)) {
                next = self.nodes.get(&id).and_then(|node| node.parent);
            }
        }
        let removable = self.nodes.iter().filter(|(id, _)| !stay.contains(id));
        removable.map(|(_, node)| node.segment.bytes).sum()
    }

    /// Removes the idle leaves that were not used for so long, then those that have become leaves thereby.
    pub(crate) fn remove_expired(&mut self, now: SystemTime, after: Duration) -> Vec<Arc<Segment>> {
        let mut removed = Vec::new();
        loop {
            let is_old = |node: &&Node| now.duration_since(node.history.used).is_ok_and(|idle| idle >= after);
            let expired: Vec<_> = self.idle_leaves().filter(is_old).map(|node| node.segment.id).collect();
            if expired.is_empty() {
                return removed;
            }
            removed.extend(expired.into_iter().filter_map(|id| self.remove_leaf(id)));
        }
    }

    /// Notes a use of a segment and of all that it continues.
    pub(crate) fn touch(&mut self, id: SegmentId, now: SystemTime) {
        let mut next = Some(id);
        while let Some(node) = next.and_then(|id| self.nodes.get_mut(&id)) {
            node.history.used = node.history.used.max(now);
            node.history.uses = node.history.uses.saturating_add(1);
            next = node.parent;
        }
    }
}

/// Removes an id from a list, and the list if it is then empty.
fn forget(lists: &mut HashMap<Boundary, Vec<SegmentId>>, boundary: Boundary, id: SegmentId) {
    if let Some(list) = lists.get_mut(&boundary) {
        list.retain(|&other| other != id);
        if list.is_empty() {
            lists.remove(&boundary);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// A history that was last used at a time, and how often.
    fn used(seconds: u64, uses: u32) -> History {
        History { created: at(0), used: at(seconds), uses, title: None }
    }

    /// Stores a text as the writing thread does: from the last stored page boundary on.
    fn store(tree: &mut Tree, text: &[u32], marks: &[usize], history: History) -> Option<SegmentId> {
        let binding = Binding::default();
        let walk = tree.walk(binding, text);
        if walk.best.is_some_and(|best| best.1 == text.len()) {
            return None;
        }
        let start = walk.covered.min((text.len() - 1) / PAGE_TOKENS * PAGE_TOKENS);
        let info = SegmentInfo {
            binding,
            forgets: !marks.is_empty(),
            start,
            position: text.len(),
            before: PrefixHash::of(&text[..start]),
            text: PrefixHash::of(text),
            tokens: text[start..].to_vec(),
            marks: marks.iter().copied().filter(|&mark| mark >= start).collect(),
            bytes: 0,
        };
        let segment = Segment::new(info, 100 * (text.len() - start) as u64);
        let id = segment.id;
        assert!(tree.insert(segment, history).is_none());
        Some(id)
    }

    fn text(len: usize, parts_at: usize, tail: u32) -> Vec<u32> {
        (0..len).map(|i| if i < parts_at { 7 } else { tail }).collect()
    }

    #[test]
    fn a_branch_hangs_at_the_last_boundary_before_it_parts() {
        let mut tree = Tree::default();
        let trunk = store(&mut tree, &text(200, 200, 0), &[], used(0, 0)).unwrap();
        let branch = store(&mut tree, &text(300, 150, 1), &[], used(0, 0)).unwrap();
        let longer = store(&mut tree, &text(250, 250, 0), &[], used(0, 0)).unwrap();
        let starts = [trunk, branch, longer].map(|id| tree.get(id).unwrap().segment.info.start);
        assert_eq!(starts, [0, 128, 192]);
        assert_eq!(tree.get(trunk).unwrap().children, [branch, longer]);
        let walk = tree.walk(Binding::default(), &text(400, 150, 1));
        assert_eq!(walk, Walk { matched: 300, covered: 256, best: Some((branch, 300)) });
        assert_eq!(tree.chain(branch).iter().map(|segment| segment.id).collect::<Vec<_>>(), [trunk, branch]);
        assert_eq!(tree.walk(Binding { exact: true, ..Binding::default() }, &text(400, 150, 1)), Walk::default());
        assert_eq!(tree.walk(Binding::default(), &[]).best, None);
        assert_eq!(tree.bytes(), 100 * (200 + 172 + 58));
        let removed: Vec<_> = tree.remove(trunk).iter().map(|segment| segment.id).collect();
        assert_eq!((removed.len(), removed[2], tree.bytes()), (3, trunk, 0));
        assert!(tree.hanging.is_empty() && tree.having.is_empty());
    }

    #[test]
    fn layers_that_forget_go_on_only_at_marks_and_ends() {
        let mut tree = Tree::default();
        let trunk = store(&mut tree, &text(200, 200, 0), &[70, 130], used(0, 0)).unwrap();
        for (wanted, reached) in [(300, 200), (200, 200), (199, 130), (130, 130), (129, 70)] {
            let walk = tree.walk(Binding::default(), &text(wanted, wanted, 0));
            assert_eq!((walk.matched, walk.best), (wanted.min(200), Some((trunk, reached))));
        }
        let walk = tree.walk(Binding::default(), &text(69, 69, 0));
        assert_eq!((walk.matched, walk.best), (69, None));
        // A text that is stored can still be worth writing, for its states.
        let middle = store(&mut tree, &text(150, 150, 0), &[140], used(0, 0)).unwrap();
        assert_eq!(tree.walk(Binding::default(), &text(160, 160, 0)).best, Some((middle, 150)));
    }

    #[test]
    fn the_least_useful_leaf_goes_first() {
        let mut tree = Tree::default();
        let trunk = store(&mut tree, &text(128, 128, 0), &[], used(0, 0)).unwrap();
        let old = store(&mut tree, &text(200, 128, 1), &[], used(10, 0)).unwrap();
        let often = store(&mut tree, &text(200, 128, 2), &[], used(10, 9)).unwrap();
        let new = store(&mut tree, &text(200, 128, 3), &[], used(90, 0)).unwrap();
        let larger = store(&mut tree, &text(250, 128, 4), &[], used(90, 0)).unwrap();
        let held = tree.chain(old);
        assert_eq!(tree.removable(&[]), 100 * (72 * 2 + 122));
        let mut order = Vec::new();
        let mut next = |tree: &mut Tree| tree.remove_least_useful(at(100)).map(|segment| order.push(segment.id));
        (0..3).for_each(|_| assert!(next(&mut tree).is_some()));
        assert!(next(&mut tree).is_none(), "what is held stays");
        drop(held);
        while next(&mut tree).is_some() {}
        assert_eq!(order, [larger, new, often, old, trunk]);
    }

    #[test]
    fn what_has_expired_goes_with_what_it_leaves_behind() {
        let mut tree = Tree::default();
        let trunk = store(&mut tree, &text(128, 128, 0), &[], used(5, 0)).unwrap();
        let old = store(&mut tree, &text(200, 128, 1), &[], used(10, 0)).unwrap();
        assert!(tree.remove_expired(at(100), Duration::from_secs(91)).is_empty());
        let young = store(&mut tree, &text(200, 128, 2), &[], used(80, 0)).unwrap();
        let removed = tree.remove_expired(at(100), Duration::from_secs(50));
        assert_eq!(removed.iter().map(|segment| segment.id).collect::<Vec<_>>(), [old]);
        tree.touch(young, at(120));
        assert_eq!(tree.get(trunk).unwrap().history, used(120, 1));
        assert_eq!(tree.remove_expired(at(200), Duration::from_secs(50)).len(), 2);
    }

    proptest! {
        /// The tree finds the same as a search through all texts, also after segments have been removed.
        #[test]
        fn the_longest_match_is_found(
            texts in prop::collection::vec((1..300_usize, 0..300_usize, 0..3_u32), 1..12),
            wanted in (1..300_usize, 0..300_usize, 0..3_u32),
            evictions in 0..6_usize,
        ) {
            let mut tree = Tree::default();
            for &(len, parts_at, tail) in &texts {
                store(&mut tree, &text(len, parts_at, tail), &[], used(u64::from(tail), 0));
            }
            (0..evictions).for_each(|_| drop(tree.remove_least_useful(at(10))));
            let stored: Vec<Vec<u32>> = tree.nodes().map(|node| {
                let chain = tree.chain(node.segment.id);
                assert_eq!(chain[0].info.start, 0);
                chain.iter().fold(Vec::new(), |mut text, segment| {
                    assert!(segment.info.start <= text.len());
                    text.truncate(segment.info.start);
                    text.extend(&segment.info.tokens);
                    text
                })
            }).collect();
            let wanted = text(wanted.0, wanted.1, wanted.2);
            let common = |text: &Vec<u32>| text.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
            let walk = tree.walk(Binding::default(), &wanted);
            prop_assert_eq!(walk.matched, stored.iter().map(common).max().unwrap_or(0));
            prop_assert_eq!(walk.best.map_or(0, |best| best.1), walk.matched);
            prop_assert_eq!(tree.bytes(), tree.nodes().map(|node| node.segment.bytes).sum::<u64>());
        }
    }
}

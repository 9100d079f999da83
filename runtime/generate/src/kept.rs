//! Sequences of generations that have ended. A later request that begins with the same tokens continues from one of them instead of
//! reading its prompt from the beginning.
//!
//! They hold only pages that nothing else needs. When pages are needed, the least useful sequence loses its last tokens, or all of
//! them if it cannot go back; pages that it shares stay with the other sequences.

use sluice_model::{PAGE_TOKENS, PageKind, PagesFull, Sequence};

/// Fewer tokens than this are computed again, which takes less time than managing one more sequence.
pub(super) const FEWEST: usize = 16;

/// Each use makes a sequence as useful as one that was used this much later, up to [`MOST_USES`] times.
const USE: u64 = 4;
const MOST_USES: u64 = 16;

struct Entry {
    sequence: Sequence,
    /// The time of its last use, counted in uses of all sequences.
    used: u64,
    uses: u64,
}

impl Entry {
    fn worth(&self) -> u64 {
        self.used + USE * self.uses.min(MOST_USES)
    }
}

/// The sequences that are kept.
pub(super) struct Kept {
    entries: Vec<Entry>,
    most: usize,
    clock: u64,
}

impl Kept {
    /// Room for `most` sequences.
    pub(super) fn new(most: usize) -> Self {
        Kept { entries: Vec::new(), most, clock: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Tokens of all sequences.
    pub(super) fn tokens(&self) -> usize {
        self.sequences().map(Sequence::position).sum()
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.entries.iter().map(|entry| &entry.sequence)
    }

    /// Gives up all sequences.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    /// Gives up those whose tokens, with their phases, are such.
    pub(super) fn forget(&mut self, is_such: impl Fn(&[u32]) -> bool) {
        self.entries.retain(|entry| !is_such(entry.sequence.phased()));
    }

    /// The sequence that can continue as a sequence of `tokens` with the most tokens already seen, and the number of these tokens.
    pub(super) fn best(&self, tokens: &[u32]) -> Option<(usize, usize)> {
        let each = self.sequences().enumerate().map(|(number, sequence)| (number, reach(sequence, tokens)));
        each.filter(|best| best.1 >= FEWEST).max_by_key(|best| best.1)
    }

    /// A sequence that continues from one of them, at a position that it can reach.
    pub(super) fn fork(&mut self, number: usize, position: usize) -> Sequence {
        self.clock += 1;
        let entry = &mut self.entries[number];
        (entry.used, entry.uses) = (self.clock, entry.uses + 1);
        fork_at(&entry.sequence, position)
    }

    /// Keeps a sequence. If two begin with the same tokens, one of them is enough if it can go back to the end of the other.
    pub(super) fn insert(&mut self, sequence: Sequence) {
        if self.most == 0 || sequence.position() < FEWEST {
            return;
        }
        self.clock += 1;
        let is_longer = |entry: &&mut Entry| entry.sequence.position() > sequence.position();
        let longer = self.entries.iter_mut().filter(is_longer).find(|entry| covers(&entry.sequence, &sequence));
        if let Some(entry) = longer {
            entry.used = self.clock;
            return;
        }
        let covered = self.entries.extract_if(.., |entry| covers(&sequence, &entry.sequence));
        let uses = covered.map(|entry| entry.uses).sum();
        if self.entries.len() >= self.most
            && let Some(least) = (0..self.entries.len()).min_by_key(|&number| self.entries[number].worth())
        {
            self.entries.swap_remove(least);
        }
        self.entries.push(Entry { sequence, used: self.clock, uses });
    }

    /// Whether giving up one of them frees pages.
    pub(super) fn has_pages(&self) -> bool {
        self.sequences().any(|sequence| sequence.own_pages() > 0)
    }

    /// Frees pages: the least useful sequence gives up as many as are missing, or all that it has. A sequence that shares all of
    /// its pages is given up only if there are no others. False if no sequence is left.
    pub(super) fn shed(&mut self, full: &PagesFull) -> bool {
        let own: Vec<usize> = self.sequences().map(Sequence::own_pages).collect();
        let least = (0..own.len()).min_by_key(|&number| (own[number] == 0, self.entries[number].worth()));
        let Some(least) = least else { return false };
        let sequence = &mut self.entries[least].sequence;
        let cut = full.wanted.saturating_sub(full.free).min(own[least]).max(1);
        let tokens = PAGE_TOKENS * full.kind.ratio();
        let left = sequence.position().div_ceil(tokens).saturating_sub(cut) * tokens;
        let reached = match full.kind {
            PageKind::Rows | PageKind::Entries(_) => sequence.reachable(left).unwrap_or(0),
            // Pages of layers with windows and states do not become fewer with fewer tokens.
            PageKind::Window(_) | PageKind::State => 0,
        };
        let goes = own[least] == 0 || reached < PAGE_TOKENS || sequence.rewind_to(reached).is_err();
        let entry = self.entries.swap_remove(least);
        if !goes && !self.sequences().any(|other| covers(other, &entry.sequence)) {
            self.entries.push(entry);
        }
        true
    }
}

/// How many of `tokens` a sequence that continues from this one has already seen. At least one is left, because its logits are
/// needed.
pub(super) fn reach(sequence: &Sequence, tokens: &[u32]) -> usize {
    sequence.reachable(shared(sequence.phased(), tokens)).unwrap_or(0)
}

/// Number of tokens with which both begin, excluding the last of `wanted`.
pub(super) fn shared(tokens: &[u32], wanted: &[u32]) -> usize {
    const BLOCK: usize = 64;
    let equal = tokens.chunks_exact(BLOCK).zip(wanted.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count() * BLOCK;
    let rest = tokens[equal..].iter().zip(&wanted[equal..]).take_while(|(a, b)| a == b).count();
    (equal + rest).min(wanted.len().saturating_sub(1))
}

/// A sequence of the first `position` tokens, to which this one can go back.
pub(super) fn fork_at(sequence: &Sequence, position: usize) -> Sequence {
    let mut fork = sequence.fork();
    // This does nothing if the sequence has fewer tokens; then it need not go back.
    let _ = fork.rewind_to(position.min(sequence.position()));
    fork
}

/// Whether the longer one makes the other superfluous.
fn covers(longer: &Sequence, other: &Sequence) -> bool {
    longer.phased().starts_with(other.phased()) && longer.reachable(other.position()) == Ok(other.position())
}

#[cfg(test)]
mod tests {
    use super::shared;

    #[test]
    fn what_two_sequences_begin_with_leaves_one_token_to_compute() {
        let tokens: Vec<u32> = (0..300).collect();
        assert_eq!(shared(&tokens, &tokens), 299);
        assert_eq!(shared(&tokens[..200], &tokens), 200);
        assert_eq!(shared(&tokens, &tokens[..200]), 199);
        for at in [0, 1, 63, 64, 65, 127, 128, 255] {
            let mut other = tokens.clone();
            other[at] = 999;
            assert_eq!(shared(&tokens, &other), at);
        }
        assert_eq!((shared(&[], &tokens), shared(&tokens, &[])), (0, 0));
        assert_eq!(shared(&tokens[..1], &tokens[..1]), 0);
    }
}

//! Attention of queries over cached keys and values, block by block. The `scalar` module is its specification.

use std::ops::Range;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Isa;
use crate::isa::Kernels;
use crate::kv::KvRows;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::panels::Panels;
use crate::scalar::{self, Running};

/// Keys of a block. It is a part of the definition of attention: another number gives other bits.
pub const KEY_BLOCK: usize = 64;

/// The blocks into which `positions` are cut, in ascending order: at multiples of [`KEY_BLOCK`].
pub fn key_blocks(positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let blocks =
        if positions.is_empty() { 0..0 } else { positions.start / KEY_BLOCK..positions.end.div_ceil(KEY_BLOCK) };
    blocks.map(move |b| (b * KEY_BLOCK).max(positions.start)..((b + 1) * KEY_BLOCK).min(positions.end))
}

/// Cached keys of one block, or of some adjacent rows of it, and their values.
#[derive(Clone, Debug)]
pub struct KeyBlock<'a> {
    positions: Range<usize>,
    pub(crate) keys: KvRows<'a>,
    pub(crate) values: KvRows<'a>,
    /// Keys of the block that is met afterwards.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 asks for them"))]
    pub(crate) next: Option<KvRows<'a>>,
}

impl<'a> KeyBlock<'a> {
    /// The keys and values at `positions`, which are the first rows of `keys` and `values`; both may be the same rows, as in latent
    /// attention. If keys are chosen, `positions` are places in the list of chosen keys.
    ///
    /// # Panics
    /// If `positions` is empty, or does not lie in one block.
    pub fn new(positions: Range<usize>, keys: KvRows<'a>, values: KvRows<'a>) -> Self {
        let one = !positions.is_empty() && positions.start / KEY_BLOCK == (positions.end - 1) / KEY_BLOCK;
        assert!(one, "positions {positions:?} are not of one block of {KEY_BLOCK}");
        KeyBlock { positions, keys, values, next: None }
    }

    /// The same block; the queries meet the block that begins with these keys afterwards, so they are fetched meanwhile.
    #[must_use]
    pub fn before(self, next: Option<KvRows<'a>>) -> Self {
        KeyBlock { next, ..self }
    }

    /// Whether values are other rows than keys.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_values(&self) -> bool {
        self.keys.place(0) != self.values.place(0)
    }

    /// Rows that have a key.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Place of a row in its whole block.
    #[inline(always)]
    pub(crate) fn place(&self, row: usize) -> usize {
        self.positions.start % KEY_BLOCK + row
    }
}

/// The rows of a block that one query sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl Part {
    #[inline(always)]
    pub(crate) fn rows(self) -> Range<usize> {
        self.from..self.to
    }

    #[inline(always)]
    pub(crate) fn is_empty(self) -> bool {
        self.from >= self.to
    }

    /// The rows from the first to the last that either query sees.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    pub(crate) fn or(self, other: Part) -> Part {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other,
            (_, true) => self,
            _ => Part { from: self.from.min(other.from), to: self.to.max(other.to) },
        }
    }
}

/// One number for each key of a block, by its place.
pub type Scores = [f32; KEY_BLOCK];

/// Queries that meet the same keys together, so that these come from memory once, and the results so far of each query. Neither a
/// query's result nor the order of its operations depends on the other queries of its tile. All buffers are reused.
#[derive(Debug, Default)]
pub struct QueryTile {
    /// Length of a key, and of a value.
    pub(crate) key: usize,
    pub(crate) value: usize,
    pub(crate) scale: f32,
    /// `[n, key]`.
    pub(crate) queries: Vec<f32>,
    /// Positions that each query sees, and its sink.
    sees: Vec<(Range<usize>, Option<f32>)>,
    /// Whether each query saw a key before the last [`go_on`](Self::go_on).
    has_seen: Vec<bool>,
    pub(crate) running: Vec<Running>,
    /// `[n, value]`: the sums that will be divided by `l`.
    pub(crate) out: Vec<f32>,
    /// For each query, in the current block: the rows that it sees, its scores, which become weights, and `α` and `β`.
    pub(crate) parts: Vec<Part>,
    pub(crate) scores: Vec<Scores>,
    pub(crate) factors: Vec<[f32; 2]>,
    /// What takes the place of `scores` if there are many queries.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) panels: Panels,
    /// Positions before this one have been met.
    met: usize,
}

impl QueryTile {
    /// Forgets all queries. The next queries have `key` numbers each, their results have `value`, and their scores are multiplied
    /// by `scale`.
    pub fn begin(&mut self, key: usize, value: usize, scale: f32) {
        (self.key, self.value, self.scale, self.met) = (key, value, scale, 0);
        self.queries.clear();
        self.sees.clear();
        self.has_seen.clear();
        self.running.clear();
        self.out.clear();
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        self.panels.forget();
    }

    /// Adds a query that sees the keys at `positions`, and returns its numbers, zeros to be filled in. A `sink` is an additional
    /// logit, already scaled, that takes its part of the softmax and has no value (gpt-oss).
    pub fn add(&mut self, positions: Range<usize>, sink: Option<f32>) -> &mut [f32] {
        let at = self.queries.len();
        self.queries.resize(at + self.key, 0.0);
        self.out.resize(self.out.len() + self.value, 0.0);
        self.sees.push((positions, sink));
        self.has_seen.push(false);
        self.running.push(Running::NONE);
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        self.panels.forget();
        &mut self.queries[at..]
    }

    /// The queries continue with other keys, which have positions of their own: query `i` sees those at `sees(i)`. The sums so far
    /// stay, and belong to the same softmax.
    pub fn go_on(&mut self, sees: impl Fn(usize) -> Range<usize>) {
        self.met = 0;
        for (i, ((positions, _), has_seen)) in self.sees.iter_mut().zip(&mut self.has_seen).enumerate() {
            *has_seen |= positions.start < positions.end;
            *positions = sees(i);
        }
    }

    /// Number of queries.
    pub fn len(&self) -> usize {
        self.sees.len()
    }

    /// Whether there are no queries.
    pub fn is_empty(&self) -> bool {
        self.sees.is_empty()
    }

    /// The positions from the first to the last that any query sees; the queries must meet their [`key_blocks`].
    pub fn positions(&self) -> Range<usize> {
        let seen = || self.sees.iter().map(|(positions, _)| positions).filter(|p| !p.is_empty());
        let start = seen().map(|p| p.start).min().unwrap_or(0);
        start..seen().map(|p| p.end).max().unwrap_or(start)
    }

    /// Results `[n, value]`, after [`finish`](Self::finish).
    pub fn results(&self) -> &[f32] {
        &self.out
    }

    /// Adds sinks and divides, once all blocks have been met.
    pub fn finish(&mut self) {
        let outs = self.out.chunks_exact_mut(self.value.max(1));
        let sees = self.sees.iter().zip(&self.has_seen);
        for ((out, running), ((positions, sink), has_seen)) in outs.zip(&mut self.running).zip(sees) {
            if let Some(sink) = *sink {
                let [alpha, _] = running.combine(Running { max: sink, sum: 1.0 });
                out.iter_mut().for_each(|o| *o *= alpha);
            } else if positions.is_empty() && !has_seen {
                continue;
            }
            out.iter_mut().for_each(|o| *o /= running.sum);
        }
    }

    /// Records which rows of a block each query sees, and returns whether any query sees one.
    fn meet(&mut self, block: &KeyBlock<'_>) -> bool {
        let all = &block.positions;
        assert!(all.start >= self.met, "blocks are met in ascending order, each as a whole");
        self.met = (all.start / KEY_BLOCK + 1) * KEY_BLOCK;
        let whole = all.start / KEY_BLOCK * KEY_BLOCK..self.met;
        self.parts.clear();
        for (sees, _) in &self.sees {
            let (start, end) = (sees.start.max(whole.start), sees.end.min(whole.end));
            self.parts.push(if start >= end {
                Part { from: 0, to: 0 }
            } else {
                assert!(all.start <= start && end <= all.end, "{start}..{end} is seen, and {all:?} is there");
                Part { from: start - all.start, to: end - all.start }
            });
        }
        if self.scores.len() < self.len() {
            self.scores.resize(self.len(), [0.0; KEY_BLOCK]);
        }
        self.factors.resize(self.len(), [0.0; 2]);
        self.parts.iter().any(|part| !part.is_empty())
    }
}

impl Kernels {
    /// The queries of `tile` meet the keys and values of one block, on the calling thread. Blocks come in ascending order, each
    /// with all rows that any query sees. The result has the bits that f32 rows with the same numbers would give.
    ///
    /// # Panics
    /// If a block comes too late or lacks a part, or rows are shorter than the tile's keys and values.
    pub fn attend_block(&self, tile: &mut QueryTile, block: &KeyBlock<'_>) {
        if !tile.meet(block) {
            return;
        }
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.attend_block(tile, block),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.attend_block(tile, block),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) if isa.attend_block(tile, block) => {}
            _ => tile.attend_block_scalar(block),
        }
    }
}

impl Kernels {
    /// The products ([`dot`](Self::dot)) of each query of `tile` with the keys of a block that it sees, by their place in the
    /// block. The contents of other places are unspecified.
    ///
    /// # Panics
    /// Like [`attend_block`](Self::attend_block).
    pub fn score_block<'t>(&self, tile: &'t mut QueryTile, block: &KeyBlock<'_>) -> &'t [Scores] {
        if tile.meet(block) {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2(isa) => isa.score(tile, block),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512(isa) => isa.score(tile, block),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon(isa) if isa.score(tile, block) => {}
                _ => tile.score_scalar(block),
            }
        }
        &tile.scores[..tile.len()]
    }
}

impl QueryTile {
    /// The products of every query, one by one.
    fn score_scalar(&mut self, block: &KeyBlock<'_>) {
        for (i, (seen, scores)) in self.parts.iter().zip(&mut self.scores).enumerate() {
            for row in seen.rows() {
                scores[block.place(row)] = scalar::row_dot(&self.queries[i * self.key..][..self.key], &block.keys, row);
            }
        }
    }

    /// The specification, query by query.
    fn attend_block_scalar(&mut self, block: &KeyBlock<'_>) {
        for (i, (&seen, running)) in self.parts.iter().zip(&mut self.running).enumerate() {
            if !seen.is_empty() {
                let query = &self.queries[i * self.key..][..self.key];
                let out = &mut self.out[i * self.value..][..self.value];
                scalar::attend_block(query, block, seen, self.scale, running, out);
            }
        }
    }

    /// Turns the dot products in `scores` into weights, and updates maxima and sums; the same code for all vectors.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    pub(crate) fn weigh(&mut self, place: usize) {
        for (((scores, part), running), factors) in
            self.scores.iter_mut().zip(&self.parts).zip(&mut self.running).zip(&mut self.factors)
        {
            if part.is_empty() {
                continue;
            }
            for score in &mut *scores {
                *score *= self.scale;
            }
            scores[..place + part.from].fill(f32::NEG_INFINITY);
            scores[place + part.to..].fill(f32::NEG_INFINITY);
            *factors = running.combine(scalar::weigh(scores));
        }
    }
}

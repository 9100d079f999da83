//! Prefetches weights into caches before they are needed.

use super::avx2::cpuid;
use super::grouped::{STRIP, block_len};
use super::{AHEAD, block_bytes};
use crate::kv::KvRows;
use crate::matrix::{Group, ROW_GROUP};
use sluice_weights::Codes;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of a first-level cache that can hold what is asked for a pair of row groups ahead, beside what is being multiplied.
const LARGE: u32 = 48 << 10;

/// Whether this is a processor of AMD's with a large first-level cache of data, so that requests go there; else they go to the
/// second level.
///
/// A request to the second level waits in a buffer of the first all the same, and is loaded from there later on. With 48 KiB
/// (Zen 5, one thread, a pair of 36 KiB) 4-bit types read 1.15 to 1.2 times as fast with requests to the first level; with 32 KiB
/// they read half as fast. Those of others have not been measured.
fn is_large() -> bool {
    static LARGE_CACHE: OnceLock<bool> = OnceLock::new();
    *LARGE_CACHE.get_or_init(|| cache_bytes(FIRST_LEVEL) >= LARGE)
}

/// A cache as `cpuid` names it: its kind in the lowest five bits, 1 for data and 3 for everything, then three bits of level.
const FIRST_LEVEL: u32 = 0b001_00001;
const SECOND_LEVEL: u32 = 0b010_00011;

/// Bytes of a cache, as AMD's processors say it; 0 for others.
fn cache_bytes(cache: u32) -> u32 {
    const EXTENDED: u32 = 0x8000_0000;
    const CACHES: u32 = 0x8000_001d;
    if cpuid(EXTENDED, 0).eax < CACHES {
        return 0;
    }
    (0..4)
        .map(|sub| cpuid(CACHES, sub))
        .find(|of| of.eax & 0xff == cache)
        .map_or(0, |of| ((of.ebx >> 22) + 1) * (((of.ebx >> 12) & 0x3ff) + 1) * ((of.ebx & 0xfff) + 1) * (of.ecx + 1))
}

const LINE: usize = 64;

/// Asks for a line.
#[inline]
#[target_feature(enable = "sse")]
fn ask(large: bool, line: *const u8) {
    #[cfg(test)]
    tests::note(line);
    if large {
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    } else {
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
}

/// Asks for the lines of so many bytes.
#[inline]
#[target_feature(enable = "sse")]
fn ask_bytes(large: bool, from: *const u8, len: usize) {
    for line in (0..len).step_by(LINE) {
        ask(large, from.wrapping_add(line));
    }
}

/// Asks for as many bytes as these, a little after them, for kernels that compute much.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn near(bytes: &[u8]) {
    ask_bytes(true, bytes.as_ptr().wrapping_add(AHEAD), bytes.len());
}

/// Asks for cached rows.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn cached(rows: &KvRows<'_>, range: Range<usize>) {
    let (first, bytes) = rows.place(range.start);
    ask_bytes(false, first, bytes * range.len());
}

/// How far ahead one stream asks, and small row groups are asked for at least. With groups of 2 KiB (`q4`, 512 columns), Zen 4 reads
/// 1.4 times as fast as if only the next one is asked for. A quarter as far is slower, four times as far is no faster.
const NEAREST: usize = 16 << 10;

/// From here, groups of `bytes` are asked for while `N` are read: the next `N`, or later ones if those are too near.
#[inline(always)]
fn later<const N: usize>(group: &Group<'_>, bytes: usize) -> *const u8 {
    group.scales.as_ptr().wrapping_add(bytes * NEAREST.div_ceil(bytes.max(1)).max(N))
}

/// Bytes before the values of a group, and bytes of all of it, padding included.
#[inline(always)]
fn sizes(group: &Group<'_>) -> (usize, usize) {
    let before = group.values.as_ptr().addr() - group.scales.as_ptr().addr();
    (before, before + group.values.len().next_multiple_of(LINE))
}

/// Addresses of the row groups that will be read after the present ones, `N` side by side. A prefetch beyond the last one has no
/// effect.
///
/// They are asked for in the order of their addresses, scales and values alike, at the pace at which the groups before them
/// are read: memory gives a little more to one long stream than to several that take turns (Zen 4, 2 threads: int4 1.03 to
/// 1.11, the others 0.93 to 1.11). Into the second-level cache, unless the first [`is_large`]: the few requests that the first
/// can have outstanding would then be all there are, and one core read half as fast (4-bit types: 13 against 25 GB/s of 31).
///
/// Every line is asked for. One that is not costs a whole latency of memory, since the processor does not predict what is asked
/// for otherwise: with one such line in each group of 2 KiB, Zen 4 read half as fast.
pub(super) struct Ahead {
    next: *const u8,
    large: bool,
}

impl Ahead {
    /// Asks for what is beside the values.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn new<const N: usize, const TOKENS: usize>(groups: &[Group<'_>; N]) -> Self {
        let (_, group) = sizes(&groups[0]);
        let (from, beside) = (later::<N>(&groups[0], group), N * (group - groups[0].values.len()));
        let large = TOKENS == 1 && is_large();
        ask_bytes(large, from, beside);
        Ahead { next: from.wrapping_add(beside), large }
    }

    /// Asks for as much as the values of block `g` of type `TY` take in `N` groups.
    ///
    /// Several `TOKENS` are bound by arithmetic: they save the question where to.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn block<const TY: u8, const N: usize, const TOKENS: usize>(&self, g: usize) {
        let len = const { N * block_bytes(TY) };
        ask_bytes(TOKENS == 1 && self.large, self.next.wrapping_add(g * len), len);
    }
}

/// Like [`Ahead`], for grouped types: values block by block, and scales and zeros at the beginning of each strip.
pub(super) struct Stream {
    next: *const u8,
    /// Bytes of a strip's scales and zeros, padding included.
    scales: usize,
    groups: usize,
    large: bool,
}

impl Stream {
    pub(super) fn new<const N: usize>(groups: &[Group<'_>; N], blocks: usize) -> Self {
        let (before, group) = sizes(&groups[0]);
        let scales = (N * before * STRIP).div_ceil(blocks.max(1)).next_multiple_of(LINE);
        Stream { next: later::<N>(&groups[0], group), scales, groups: N, large: is_large() }
    }

    /// For groups without strips; asks for what is beside all their values.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn whole<const N: usize>(groups: &[Group<'_>; N]) -> Self {
        let mut stream = Stream::new(groups, STRIP);
        stream.scales();
        stream
    }

    /// Prefetches the scales and zeros of a strip.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn scales(&mut self) {
        self.bytes(self.scales);
    }

    /// Prefetches the values of a block.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn values<const C: u8, const N: usize>(&mut self) {
        self.bytes(const { N * block_len(C) });
    }

    /// Prefetches a whole strip.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn strip(&mut self, codes: Codes) {
        self.bytes(self.scales + self.groups * STRIP * ROW_GROUP * codes.block_len());
    }

    /// The next lines, as many as `len` bytes take, for whoever asks for them one by one.
    pub(super) fn lines(&mut self, len: usize) -> Lines {
        let lines = Lines { next: self.next, large: self.large };
        self.next = self.next.wrapping_add(len);
        lines
    }

    /// Asks for so many bytes.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn bytes(&mut self, len: usize) {
        ask_bytes(self.large, self.next, len);
        self.next = self.next.wrapping_add(len);
    }
}

/// Lines that are asked for one by one, where all at once would hold up the arithmetic.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    next: *const u8,
    large: bool,
}

impl Lines {
    /// Asks for line `i`.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn ask(self, i: usize) {
        ask(self.large, self.next.wrapping_add(LINE * i));
    }
}

/// How far ahead [`Streams`] ask: few enough bytes to wait in the second-level cache.
const SPAN: usize = 64 << 10;
const STREAMS: usize = 4;

/// Bytes of a second-level cache, from which on one stream is faster than [`STREAMS`].
const ROOMY: u32 = 1 << 20;

/// Prefetches the next span while this one is read, for types whose kernels compute little.
///
/// The lines of a span are asked for alternately in four parts, because one core of Zen 3 is faster with four streams than with one
/// (one thread: `q8` 0.98 to 1.33, bf16 1.25 to 1.37, f32 1.17 to 1.30 of one stream, f16 the same; two threads 1.0 to 1.2). Types of 4
/// bits and `fp8`, whose kernels compute more, gain nothing. On Zen 4, one stream is the faster one (AVX2, `q8`: 1.6 times with one
/// thread, 1.2 times with two).
#[derive(Clone, Copy)]
pub(super) struct Streams {
    one: bool,
}

impl Streams {
    pub(super) fn new() -> Self {
        static ONE: OnceLock<bool> = OnceLock::new();
        Streams { one: *ONE.get_or_init(|| !is_large() && cache_bytes(SECOND_LEVEL) >= ROOMY) }
    }

    /// Asks for as many bytes of the next span as `bytes` has.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn ask(self, bytes: &[u8]) {
        for line in (0..bytes.len()).step_by(LINE) {
            let at = bytes.as_ptr().wrapping_add(line);
            if self.one {
                ask(false, at.wrapping_add(NEAREST));
                continue;
            }
            let from = at.addr() % SPAN / LINE;
            let to = from % STREAMS * (SPAN / LINE / STREAMS) + from / STREAMS;
            ask(false, at.wrapping_add(SPAN + LINE * to).wrapping_sub(LINE * from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::{TILE_TOKENS, Tile, TileShape};
    use crate::{Activations, Kernels, Matrix, Precision, WeightType, row_group_len};
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    thread_local! {
        /// Lines that were asked for.
        static ASKED: RefCell<Option<BTreeSet<usize>>> = const { RefCell::new(None) };
    }

    pub(super) fn note(line: *const u8) {
        ASKED.with_borrow_mut(|asked| asked.as_mut().map(|asked| asked.insert(line.addr() / LINE)));
    }

    /// The lines of a matrix that no product of `tokens` tokens asks for, except for its beginning.
    fn unasked(kernels: &Kernels, w: &Matrix<'_>, data: &[u8], tokens: usize, precision: Precision) -> usize {
        let mut x = Activations::new(precision);
        x.set(&vec![0.5; tokens * w.cols()], tokens, w.cols());
        let int8 = x.quantised() && w.ty().is_blocked();
        let mut tile: Tile = [[0.0; 2 * ROW_GROUP]; TILE_TOKENS];
        ASKED.set(Some(BTreeSet::new()));
        for group in (0..w.groups()).step_by(2) {
            let groups = (w.groups() - group).min(2);
            kernels.tile(w, &x, TileShape { group, groups, token: 0, tokens, int8 }, &mut tile);
        }
        let asked = ASKED.take().expect("it was set");
        // The first span, and the rest of the one in which the matrix begins.
        let lines = (data.as_ptr().addr() + 2 * SPAN) / LINE..(data.as_ptr().addr() + data.len()) / LINE;
        lines.filter(|line| !asked.contains(line)).count()
    }

    /// A line that is not asked for costs as much time as hundreds that are.
    #[test]
    fn every_line_is_asked_for() {
        for (ty, cols) in WeightType::all().flat_map(|ty| [512, 768, 2048].map(|cols| (ty, cols))) {
            let group = row_group_len(ty, cols).expect("small");
            let groups = (4 * SPAN).div_ceil(group);
            let buffer = vec![0; groups * group + LINE];
            let data = &buffer[buffer.as_ptr().align_offset(LINE)..][..groups * group];
            let w = Matrix::new(ty, groups * ROW_GROUP, cols, data).expect("sized to fit");
            for kernels in Kernels::available().iter().filter(|kernels| kernels.isa_name() != "scalar") {
                for (tokens, precision) in [(1, Precision::Int8), (4, Precision::Int8), (1, Precision::Exact)] {
                    if precision == Precision::Exact && matches!(ty, WeightType::Grouped(_)) {
                        // Asks for nothing, so the processor predicts.
                        continue;
                    }
                    let unasked = unasked(kernels, &w, data, tokens, precision);
                    assert_eq!(
                        unasked,
                        0,
                        "{ty}, {cols} columns, {}, {tokens} tokens, {precision:?}",
                        kernels.isa_name()
                    );
                }
            }
        }
    }
}

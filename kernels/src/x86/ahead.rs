//! Prefetches weights into caches before they are needed.

use super::avx2::cpuid;
use super::grouped::{STRIP, block_len};
use super::{block_bytes, scale_bytes};
use crate::matrix::{Group, ROW_GROUP};
use sluice_weights::Codes;
use std::arch::x86_64::*;
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

/// Asks for a line.
#[inline]
#[target_feature(enable = "sse")]
fn ask(large: bool, line: *const u8) {
    if large {
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    } else {
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
}

/// Addresses of the row groups that will be read after the present ones, `N` side by side. A prefetch beyond the last one has no
/// effect.
///
/// They are asked for in the order of their addresses, scales and values alike, at the pace at which the groups before them
/// are read: memory gives a little more to one long stream than to several that take turns (Zen 4, 2 threads: int4 1.03 to
/// 1.11, the others 0.93 to 1.11). Into the second-level cache, unless the first [`is_large`]: the few requests that the first
/// can have outstanding would then be all there are, and one core read half as fast (4-bit types: 13 against 25 GB/s of 31).
pub(super) struct Ahead {
    next: *const u8,
    large: bool,
}

impl Ahead {
    #[inline(always)]
    pub(super) fn new<const N: usize>(groups: &[Group<'_>; N]) -> Self {
        let Group { scales, values, .. } = groups[0];
        let group = values.as_ptr().addr() - scales.as_ptr().addr() + values.len().next_multiple_of(64);
        Ahead { next: scales.as_ptr().wrapping_add(N * group), large: is_large() }
    }

    /// Asks for as much as block `g` of type `TY` takes in `N` groups. Padding and the scales of rows are no part of a block:
    /// of the last value plane, as many bytes are left to the CPU's own prediction.
    ///
    /// Several `TOKENS` are bound by arithmetic: they save the question where to.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn block<const TY: u8, const N: usize, const TOKENS: usize>(&self, g: usize) {
        let len = const { N * (block_bytes(TY) + scale_bytes(TY)) };
        for line in (0..len).step_by(64) {
            ask(TOKENS == 1 && self.large, self.next.wrapping_add(g * len + line));
        }
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
        let Group { scales, values, .. } = groups[0];
        let before = values.as_ptr().addr() - scales.as_ptr().addr();
        let group = before + values.len().next_multiple_of(64);
        let scales = (N * before * STRIP).div_ceil(blocks.max(1)).next_multiple_of(64);
        Stream { next: groups[0].scales.as_ptr().wrapping_add(N * group), scales, groups: N, large: is_large() }
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
        for line in (0..len).step_by(64) {
            ask(self.large, self.next.wrapping_add(line));
        }
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
        ask(self.large, self.next.wrapping_add(64 * i));
    }
}

/// How far ahead [`Streams`] ask: few enough bytes to wait in the second-level cache.
const SPAN: usize = 64 << 10;
const STREAMS: usize = 4;

/// How far ahead one stream asks. A quarter as far is slower, four times as far is no faster, and the beginning of a task is not asked for.
const SHORT: usize = 16 << 10;

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
        for line in (0..bytes.len()).step_by(64) {
            let at = bytes.as_ptr().wrapping_add(line);
            if self.one {
                _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(SHORT).cast());
                continue;
            }
            let from = at.addr() % SPAN / 64;
            let to = from % STREAMS * (SPAN / 64 / STREAMS) + from / STREAMS;
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(SPAN + 64 * to).wrapping_sub(64 * from).cast());
        }
    }
}

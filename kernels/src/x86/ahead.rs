//! Prefetches weights into caches before they are needed.

use super::grouped::{STRIP, block_len};
use super::{block_bytes, scale_bytes};
use crate::matrix::{Group, ROW_GROUP};
use sluice_weights::Codes;
use std::arch::x86_64::*;

/// Addresses of the row groups that will be read after the present ones, `N` side by side. A prefetch beyond the last one has no
/// effect.
///
/// They are asked for in the order of their addresses, scales and values alike, at the pace at which the groups before them
/// are read: memory gives a little more to one long stream than to several that take turns (Zen 4, 2 threads: int4 1.03 to
/// 1.11, the others 0.93 to 1.11). Into the second-level cache: the few requests that the first can have outstanding would
/// then be all there are, and one core read half as fast (4-bit types: 13 against 25 GB/s of 31).
pub(super) struct Ahead {
    next: *const u8,
}

impl Ahead {
    #[inline(always)]
    pub(super) fn new<const N: usize>(groups: &[Group<'_>; N]) -> Self {
        let Group { scales, values, .. } = groups[0];
        let group = values.as_ptr().addr() - scales.as_ptr().addr() + values.len().next_multiple_of(64);
        Ahead { next: scales.as_ptr().wrapping_add(N * group) }
    }

    /// Prefetches as many bytes as block `g` of type `TY` takes in `N` groups. Padding and the scales of rows are no part of a
    /// block; the CPU's own prediction must fetch as many bytes at the end of the last value plane.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn block<const TY: u8, const N: usize>(&self, g: usize) {
        let len = const { N * (block_bytes(TY) + scale_bytes(TY)) };
        for line in (0..len).step_by(64) {
            _mm_prefetch::<_MM_HINT_T1>(self.next.wrapping_add(g * len + line).cast());
        }
    }
}

/// Like [`Ahead`], for grouped types: values block by block, and scales and zeros at the beginning of each strip.
pub(super) struct Stream {
    next: *const u8,
    /// Bytes of a strip's scales and zeros, padding included.
    scales: usize,
    groups: usize,
}

impl Stream {
    pub(super) fn new<const N: usize>(groups: &[Group<'_>; N], blocks: usize) -> Self {
        let Group { scales, values, .. } = groups[0];
        let before = values.as_ptr().addr() - scales.as_ptr().addr();
        let group = before + values.len().next_multiple_of(64);
        let scales = (N * before * STRIP).div_ceil(blocks.max(1)).next_multiple_of(64);
        Stream { next: groups[0].scales.as_ptr().wrapping_add(N * group), scales, groups: N }
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

    #[inline]
    #[target_feature(enable = "sse")]
    fn bytes(&mut self, len: usize) {
        for line in (0..len).step_by(64) {
            _mm_prefetch::<_MM_HINT_T1>(self.next.wrapping_add(line).cast());
        }
        self.next = self.next.wrapping_add(len);
    }
}

/// How far ahead [`in_streams`] asks: few enough bytes to wait in the second-level cache.
const SPAN: usize = 64 << 10;
const STREAMS: usize = 4;

/// Prefetches as many bytes of the next span as `bytes` has. Their lines alternate among the four parts of that span, because one
/// core is faster with four streams than with one (Zen 3, one thread: `q8` 0.98 to 1.33, bf16 1.25 to 1.37, f32 1.17 to 1.30 of one
/// stream, f16 the same; two threads 1.0 to 1.2). Types of 4 bits and `fp8`, whose kernels compute more, gain nothing.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn in_streams(bytes: &[u8]) {
    for line in (0..bytes.len()).step_by(64) {
        let at = bytes.as_ptr().wrapping_add(line);
        let from = at.addr() % SPAN / 64;
        let to = from % STREAMS * (SPAN / 64 / STREAMS) + from / STREAMS;
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(SPAN + 64 * to).wrapping_sub(64 * from).cast());
    }
}

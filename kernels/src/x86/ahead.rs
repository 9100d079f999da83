//! Asking for weights before they are needed.

use crate::matrix::Group;
use std::arch::x86_64::*;

/// How far ahead blocked types are asked for, in each row group that is being read. Into the second-level cache: the few
/// requests that the first can have outstanding would then be all there are, and one core read half as fast (Zen 4, 4-bit
/// types: 13 against 25 GB/s of 31). Half or twice the distance makes no difference that shows.
const BLOCKED_AHEAD: usize = 8192;

/// Where the bytes are that will be needed soon. `N` groups are read side by side, then the `N` behind them: what lies a
/// certain distance ahead is in the same groups or, beyond their end, in those. Behind the last it is a hint to nowhere.
pub(super) struct Ahead {
    /// Blocks before which it is in the same groups.
    near: usize,
    /// From a value to the one to ask for, there and behind.
    distances: [usize; 2],
    /// From a group to the one that takes its place.
    next: usize,
}

impl Ahead {
    /// For blocks of `block` bytes.
    #[inline(always)]
    pub(super) fn new<const N: usize>(groups: &[Group<'_>; N], block: usize) -> Self {
        let Group { scales, values, .. } = groups[0];
        let next = N * (values.as_ptr().addr() - scales.as_ptr().addr() + values.len().next_multiple_of(64));
        let distance = BLOCKED_AHEAD.min(values.len());
        Ahead { near: (values.len() - distance) / block, distances: [distance, distance + next - values.len()], next }
    }

    /// Asks for what the values of block `g` in each group are to be followed by.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn values<const N: usize>(&self, g: usize, values: [&[u8]; N]) {
        let distance = self.distances[usize::from(g >= self.near)];
        for values in values {
            for line in (0..values.len()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().wrapping_add(distance + line).cast());
            }
        }
    }

    /// Asks for what will be in the place of these scales.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(super) fn scales<const N: usize>(&self, scales: [&[u8]; N]) {
        for scales in scales {
            _mm_prefetch::<_MM_HINT_T0>(scales.as_ptr().wrapping_add(self.next).cast());
        }
    }
}

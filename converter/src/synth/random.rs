//! Random bits that depend on a seed and a place, not on the order of requests.

use sluice_checksum::xxh3_64_with_seed;

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): a counter through a mixer, so iterations of a loop are independent and
/// keep the whole core busy.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    /// Starts at `place`, such as kind, layer and index of an extent.
    pub(super) fn new(seed: u64, place: [u32; 3]) -> Self {
        let mut bytes = [0; 12];
        for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(place) {
            *bytes = word.to_le_bytes();
        }
        Random { state: xxh3_64_with_seed(&bytes, seed) }
    }

    /// The next 64 bits.
    #[inline]
    pub(super) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1. The bias of 2^-32 · bound does not matter here.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (((self.bits() >> 32) * bound as u64) >> 32) as usize
    }

    /// Fills `out` with words of eight bytes that `map` makes from random ones; the last may be truncated.
    #[inline]
    pub(super) fn fill(&mut self, out: &mut [u8], map: impl Fn(u64) -> u64) {
        let (words, rest) = out.as_chunks_mut::<8>();
        for word in words {
            *word = map(self.bits()).to_le_bytes();
        }
        let last = map(self.bits()).to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// Four numbers, uniform over [-1, 1).
    #[inline]
    pub(super) fn uniform(&mut self) -> [f32; 4] {
        let bits = self.bits();
        [0, 16, 32, 48].map(|shift| f32::from((bits >> shift) as u16 as i16) * (1.0 / 32768.0))
    }
}

//! Random choices that follow from a seed: libFuzzer repeats a mutation by repeating its seed.

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if that is 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.next().checked_rem(n as u64).unwrap_or(0) as usize
    }

    /// True in one of `n` cases.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        list.get(self.below(list.len()))
    }

    /// A new value for a number of `bytes` bytes: near the old one, or one that arithmetic trips over.
    pub(crate) fn number(&mut self, old: u64) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_neg(),
            3 => self.below(16) as u64,
            4 => old.wrapping_shl(1 + self.below(8) as u32),
            5 => old >> (1 + self.below(8)),
            _ => {
                let step = [1i64, -1, 2, -2, 8, -8, 64, -64, 4096, -4096, 16384];
                old.wrapping_add_signed(self.pick(&step).copied().unwrap_or(1))
            }
        }
    }
}

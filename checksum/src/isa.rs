//! Operations on blocks, by instruction set. Scalar code is the specification.

use crate::blocks::{BLOCK_BYTES, BlockSum};
use crate::constants::{PRIME32, SECRET_BYTES, u64_at};

/// Bytes that are added to the accumulators at once.
pub(crate) const STRIPE: usize = 64;
/// Where the secret of the scrambling begins.
pub(crate) const SCRAMBLE_SECRET: usize = SECRET_BYTES - STRIPE;

/// The eight words that are combined with eight words of input, or with the accumulators.
pub(crate) type Secret = [u8; SECRET_BYTES];

/// A value of a variant permits its instructions: the tokens inside exist only where the CPU has them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(crate::avx2::Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(crate::neon::Neon),
}

impl Isa {
    /// The fastest set that this CPU has. Cheap, because the standard library remembers the CPU's features.
    #[inline]
    pub(crate) fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = crate::avx2::Avx2::new() {
            return Isa::Avx2(token);
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(token) = crate::neon::Neon::new() {
            return Isa::Neon(token);
        }
        Isa::Scalar
    }

    /// What each whole block adds to the accumulators.
    pub(crate) fn sums(self, secret: &Secret, blocks: &[[u8; BLOCK_BYTES]], sums: &mut [BlockSum]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.sums(secret, blocks, sums),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.sums(secret, blocks, sums),
            Isa::Scalar => blocks.iter().zip(sums).for_each(|(block, sum)| *sum = block_sum(secret, block)),
        }
    }

    /// Adds the sums of blocks to the accumulators, and scrambles them after each.
    pub(crate) fn absorb(self, secret: &Secret, state: &mut BlockSum, sums: &[BlockSum]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.absorb(secret, state, sums),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.absorb(secret, state, sums),
            Isa::Scalar => sums.iter().for_each(|sum| scramble(secret, state, sum)),
        }
    }

    /// Sums blocks and adds them in one loop: scrambling is a chain of dependent steps, and summing the next block hides its
    /// latency.
    pub(crate) fn update(self, secret: &Secret, state: &mut BlockSum, blocks: &[[u8; BLOCK_BYTES]]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.update(secret, state, blocks),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.update(secret, state, blocks),
            Isa::Scalar => blocks.iter().for_each(|block| scramble(secret, state, &block_sum(secret, block))),
        }
    }
}

/// Adds the sum of one stripe to `sum`. `at` is its place in the secret.
#[inline(always)]
pub(crate) fn add_stripe(secret: &Secret, at: usize, stripe: &[u8; STRIPE], sum: &mut BlockSum) {
    let keys: &[u8; STRIPE] = secret[at..].first_chunk().expect("inside the secret");
    let word = |bytes: &[u8; STRIPE], i: usize| u64_at(bytes, 8 * i);
    let products: BlockSum = std::array::from_fn(|i| {
        let keyed = word(stripe, i) ^ word(keys, i);
        (keyed & 0xffff_ffff) * (keyed >> 32)
    });
    for (i, (sum, product)) in sum.iter_mut().zip(products).enumerate() {
        // Each word is added to its neighbour's accumulator.
        *sum = sum.wrapping_add(product).wrapping_add(word(stripe, i ^ 1));
    }
}

fn block_sum(secret: &Secret, block: &[u8; BLOCK_BYTES]) -> BlockSum {
    let mut sum = [0; 8];
    for (i, stripe) in block.as_chunks().0.iter().enumerate() {
        add_stripe(secret, 8 * i, stripe, &mut sum);
    }
    sum
}

fn scramble(secret: &Secret, state: &mut BlockSum, sum: &BlockSum) {
    for i in 0..8 {
        let word = state[i].wrapping_add(sum[i]);
        let key = u64_at(secret, SCRAMBLE_SECRET + 8 * i);
        state[i] = (word ^ (word >> 47) ^ key).wrapping_mul(PRIME32[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constants::SECRET;
    use proptest::prelude::*;

    proptest! {
        /// The CPU's instructions give what the specification gives, with any secret.
        #[test]
        fn instruction_sets_agree(
            bytes in proptest::collection::vec(any::<u8>(), BLOCK_BYTES..6 * BLOCK_BYTES),
            state in any::<BlockSum>(),
            key in any::<u8>(),
        ) {
            let secret = SECRET.map(|byte| byte ^ key);
            let blocks = bytes.as_chunks().0;
            let run = |isa: Isa| {
                let mut sums = vec![[0; 8]; blocks.len()];
                isa.sums(&secret, blocks, &mut sums);
                let (mut absorbed, mut updated) = (state, state);
                isa.absorb(&secret, &mut absorbed, &sums);
                isa.update(&secret, &mut updated, blocks);
                (sums, absorbed, updated)
            };
            let (sums, absorbed, updated) = run(Isa::Scalar);
            prop_assert_eq!(absorbed, updated);
            prop_assert_eq!(run(Isa::detect()), (sums, absorbed, updated));
        }
    }
}

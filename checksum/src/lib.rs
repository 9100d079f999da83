//! xxh3, the checksum of everything that Sluice writes: of bytes at once ([`xxh3_64`], [`xxh3_128`]), of a stream ([`Xxh3`]), and
//! of blocks, whose sums threads can form in any order ([`block_sums`], [`BlockHash`]).
//!
//! The blocks are the reason not to use a library. For each kibibyte of its input, XXH3 adds sums that depend on that kibibyte alone
//! to eight accumulators, and then scrambles these. So a thread that has just multiplied weights can form the sums of their blocks
//! from its cache, and scrambling takes microseconds for a whole expert. No library exposes these sums. Since they are the part of
//! the algorithm that takes time, the rest is implemented here as well: one implementation instead of two.
//!
//! The algorithm is specified in `doc/xxhash_spec.md` of the [xxHash](https://github.com/Cyan4973/xxHash) repository; the constants
//! have its names. The instruction set is chosen at run time; all of them give the same checksums.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod blocks;
mod constants;
mod isa;
mod long;
#[cfg(target_arch = "aarch64")]
mod neon;
mod short;
mod stream;

pub use blocks::{BLOCK_BYTES, BlockHash, BlockSum, block_sums};
pub use stream::Xxh3;

use constants::SHORT_MAX;

/// xxh3-64 of `bytes`.
#[must_use]
pub fn xxh3_64(bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, 0)
}

/// xxh3-64 of `bytes` with a seed.
#[must_use]
pub fn xxh3_64_with_seed(bytes: &[u8], seed: u64) -> u64 {
    if bytes.len() <= SHORT_MAX {
        short::hash64(bytes, seed)
    } else {
        let secret = long::secret(seed);
        long::merge64(&long::accumulate(bytes, &secret), &secret, bytes.len() as u64)
    }
}

/// xxh3-128 of `bytes`.
#[must_use]
pub fn xxh3_128(bytes: &[u8]) -> u128 {
    if bytes.len() <= SHORT_MAX {
        short::hash128(bytes, 0)
    } else {
        let secret = long::secret(0);
        long::merge128(&long::accumulate(bytes, &secret), &secret, bytes.len() as u64)
    }
}

//! Inputs of more than [`SHORT_MAX`](crate::constants::SHORT_MAX) bytes: eight accumulators.

use std::borrow::Cow;

use crate::blocks::{BLOCK_BYTES, BlockSum};
use crate::constants::*;
use crate::isa::{Isa, STRIPE, Secret, add_stripe};

/// Where the secret of the last stripe of an input begins.
pub(crate) const LAST_STRIPE_SECRET: usize = SECRET_BYTES - STRIPE - 7;
/// Where the secret of the merging begins, and that of the merging for the upper half.
const MERGE_SECRET: usize = 11;
const MERGE_HIGH_SECRET: usize = SECRET_BYTES - STRIPE - MERGE_SECRET;

/// Initial values of the accumulators.
pub(crate) const START: BlockSum =
    [PRIME32[2], PRIME64[0], PRIME64[1], PRIME64[2], PRIME64[3], PRIME32[1], PRIME64[4], PRIME32[0]];

/// The secret that belongs to a seed.
pub(crate) fn secret(seed: u64) -> Cow<'static, Secret> {
    if seed == 0 {
        return Cow::Borrowed(&SECRET);
    }
    let mut secret = SECRET;
    for (i, word) in secret.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let value = u64::from_le_bytes(*word);
        let value = if i % 2 == 0 { value.wrapping_add(seed) } else { value.wrapping_sub(seed) };
        *word = value.to_le_bytes();
    }
    Cow::Owned(secret)
}

/// The accumulators after all `bytes`.
pub(crate) fn accumulate(bytes: &[u8], secret: &Secret) -> BlockSum {
    // The last block is not scrambled, even if it is whole.
    let (before, rest) = bytes.split_at((bytes.len() - 1) / BLOCK_BYTES * BLOCK_BYTES);
    let mut state = START;
    Isa::detect().update(secret, &mut state, before.as_chunks().0);
    add_rest(secret, &mut state, rest, bytes.last_chunk().expect("longer than a stripe"));
    state
}

/// Adds `rest`, at most a block: the bytes after the last block that is scrambled. `last`: the last stripe of the input.
pub(crate) fn add_rest(secret: &Secret, state: &mut BlockSum, rest: &[u8], last: &[u8; STRIPE]) {
    let stripes = rest[..rest.len() - 1].as_chunks().0;
    stripes.iter().enumerate().for_each(|(i, stripe)| add_stripe(secret, 8 * i, stripe, state));
    add_stripe(secret, LAST_STRIPE_SECRET, last, state);
}

/// From the accumulators after all `len` bytes to xxh3-64.
pub(crate) fn merge64(state: &BlockSum, secret: &Secret, len: u64) -> u64 {
    merge(state, secret, MERGE_SECRET, len.wrapping_mul(PRIME64[0]))
}

/// From the accumulators after all `len` bytes to xxh3-128.
pub(crate) fn merge128(state: &BlockSum, secret: &Secret, len: u64) -> u128 {
    join(merge64(state, secret, len), merge(state, secret, MERGE_HIGH_SECRET, !len.wrapping_mul(PRIME64[1])))
}

fn merge(state: &BlockSum, secret: &Secret, at: usize, start: u64) -> u64 {
    let pairs = state.as_chunks::<2>().0.iter().enumerate();
    avalanche(pairs.fold(start, |hash, (i, pair)| {
        let key = |half: usize| u64_at(secret, at + 16 * i + 8 * half);
        hash.wrapping_add(folded_product(pair[0] ^ key(0), pair[1] ^ key(1)))
    }))
}

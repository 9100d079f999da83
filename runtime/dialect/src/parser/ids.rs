//! Ids of calls.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A seed that no other parser has, and that is unknown outside.
pub(super) fn fresh_seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // The keys of `RandomState` are random.
    RandomState::new().hash_one(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `length` letters and digits, derived from the seed and the number of a call.
pub(crate) fn letters(seed: u64, index: usize, length: usize) -> String {
    let mut state = mix(seed ^ mix(index as u64));
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        char::from(ALPHABET[(mix(state) % 62) as usize])
    };
    (0..length).map(|_| next()).collect()
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

//! Inputs of at most [`SHORT_MAX`] bytes: one formula for each range of lengths.

use crate::constants::*;

/// xxh3-64 of a short input.
pub(crate) fn hash64(bytes: &[u8], seed: u64) -> u64 {
    let len = bytes.len();
    match len {
        0 => avalanche64(seed ^ secret_pair(56)),
        1..=3 => avalanche64(u64::from(combined(bytes)) ^ secret_pair32(0).wrapping_add(seed)),
        4..=8 => {
            let value = u64::from(u32_at(bytes, len - 4)) | u64::from(u32_at(bytes, 0)) << 32;
            let keyed = value ^ secret_pair(8).wrapping_sub(spread(seed));
            // `XXH3_rrmxmx`.
            let hash = (keyed ^ keyed.rotate_left(49) ^ keyed.rotate_left(24)).wrapping_mul(PRIME_MX2);
            let hash = (hash ^ (hash >> 35).wrapping_add(len as u64)).wrapping_mul(PRIME_MX2);
            hash ^ (hash >> 28)
        }
        9..=16 => {
            let low = u64_at(bytes, 0) ^ secret_pair(24).wrapping_add(seed);
            let high = u64_at(bytes, len - 8) ^ secret_pair(40).wrapping_sub(seed);
            let sum = (len as u64).wrapping_add(low.swap_bytes()).wrapping_add(high);
            avalanche(sum.wrapping_add(folded_product(low, high)))
        }
        17..=128 => {
            let mut sum = (len as u64).wrapping_mul(PRIME64[0]);
            for i in 0..(len - 1) / 32 + 1 {
                sum = sum.wrapping_add(mix(bytes, 16 * i, 32 * i, seed));
                sum = sum.wrapping_add(mix(bytes, len - 16 * (i + 1), 32 * i + 16, seed));
            }
            avalanche(sum)
        }
        _ => {
            let mut sum = (len as u64).wrapping_mul(PRIME64[0]);
            for i in 0..8 {
                sum = sum.wrapping_add(mix(bytes, 16 * i, 16 * i, seed));
            }
            sum = avalanche(sum);
            for i in 8..len / 16 {
                sum = sum.wrapping_add(mix(bytes, 16 * i, 16 * (i - 8) + 3, seed));
            }
            avalanche(sum.wrapping_add(mix(bytes, len - 16, 136 - 17, seed)))
        }
    }
}

/// xxh3-128 of a short input.
pub(crate) fn hash128(bytes: &[u8], seed: u64) -> u128 {
    let len = bytes.len();
    match len {
        0 => join(avalanche64(seed ^ secret_pair(64)), avalanche64(seed ^ secret_pair(80))),
        1..=3 => {
            let low = combined(bytes);
            let high = low.swap_bytes().rotate_left(13);
            join(
                avalanche64(u64::from(low) ^ secret_pair32(0).wrapping_add(seed)),
                avalanche64(u64::from(high) ^ secret_pair32(8).wrapping_sub(seed)),
            )
        }
        4..=8 => hash128_of_8(bytes, seed),
        9..=16 => hash128_of_16(bytes, seed),
        17..=128 => {
            let mut sums = [(len as u64).wrapping_mul(PRIME64[0]), 0];
            for i in (0..(len - 1) / 32 + 1).rev() {
                mix_pair(&mut sums, bytes, [16 * i, len - 16 * (i + 1)], 32 * i, seed);
            }
            finish128(sums, len, seed)
        }
        _ => {
            let mut sums = [(len as u64).wrapping_mul(PRIME64[0]), 0];
            for i in 0..4 {
                mix_pair(&mut sums, bytes, [32 * i, 32 * i + 16], 32 * i, seed);
            }
            sums = sums.map(avalanche);
            for i in 4..len / 32 {
                mix_pair(&mut sums, bytes, [32 * i, 32 * i + 16], 32 * (i - 4) + 3, seed);
            }
            mix_pair(&mut sums, bytes, [len - 16, len - 32], 136 - 17 - 16, seed.wrapping_neg());
            finish128(sums, len, seed)
        }
    }
}

fn hash128_of_8(bytes: &[u8], seed: u64) -> u128 {
    let len = bytes.len();
    let value = u64::from(u32_at(bytes, 0)) | u64::from(u32_at(bytes, len - 4)) << 32;
    let keyed = value ^ secret_pair(16).wrapping_add(spread(seed));
    let (low, high) = product(keyed, PRIME64[0].wrapping_add((len as u64) << 2));
    let high = high.wrapping_add(low << 1);
    let low = low ^ (high >> 3);
    let low = (low ^ (low >> 35)).wrapping_mul(PRIME_MX2);
    join(low ^ (low >> 28), avalanche(high))
}

fn hash128_of_16(bytes: &[u8], seed: u64) -> u128 {
    let len = bytes.len();
    let (first, last) = (u64_at(bytes, 0), u64_at(bytes, len - 8));
    let (low, high) = product(first ^ last ^ secret_pair(32).wrapping_sub(seed), PRIME64[0]);
    let low = low.wrapping_add((len as u64 - 1) << 54);
    let last = last ^ secret_pair(48).wrapping_add(seed);
    let high = high.wrapping_add(last).wrapping_add((last & 0xffff_ffff).wrapping_mul(PRIME32[1] - 1));
    let low = low ^ high.swap_bytes();
    let (low, carry) = product(low, PRIME64[1]);
    join(avalanche(low), avalanche(carry.wrapping_add(high.wrapping_mul(PRIME64[1]))))
}

fn finish128(sums: [u64; 2], len: usize, seed: u64) -> u128 {
    let low = sums[0].wrapping_add(sums[1]);
    let high = sums[0].wrapping_mul(PRIME64[0]).wrapping_add(sums[1].wrapping_mul(PRIME64[3]));
    let high = high.wrapping_add((len as u64).wrapping_sub(seed).wrapping_mul(PRIME64[1]));
    join(avalanche(low), avalanche(high).wrapping_neg())
}

/// `XXH64_avalanche`.
fn avalanche64(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 33)).wrapping_mul(PRIME64[1]);
    let hash = (hash ^ (hash >> 29)).wrapping_mul(PRIME64[2]);
    hash ^ (hash >> 32)
}

/// One to three bytes and their number.
#[inline(always)]
fn combined(bytes: &[u8]) -> u32 {
    let len = bytes.len();
    let [first, middle, last] = [bytes[0], bytes[len >> 1], bytes[len - 1]].map(u32::from);
    first << 16 | middle << 24 | last | (len as u32) << 8
}

/// The seed's lower half, its bytes reversed, in its upper half too.
#[inline(always)]
fn spread(seed: u64) -> u64 {
    seed ^ u64::from((seed as u32).swap_bytes()) << 32
}

#[inline(always)]
fn secret_pair(at: usize) -> u64 {
    u64_at(&SECRET, at) ^ u64_at(&SECRET, at + 8)
}

#[inline(always)]
fn secret_pair32(at: usize) -> u64 {
    u64::from(u32_at(&SECRET, at) ^ u32_at(&SECRET, at + 4))
}

/// `XXH3_mix16B`.
#[inline(always)]
fn mix(bytes: &[u8], at: usize, secret: usize, seed: u64) -> u64 {
    folded_product(
        u64_at(bytes, at) ^ u64_at(&SECRET, secret).wrapping_add(seed),
        u64_at(bytes, at + 8) ^ u64_at(&SECRET, secret + 8).wrapping_sub(seed),
    )
}

/// `XXH128_mix32B`.
#[inline(always)]
fn mix_pair(sums: &mut [u64; 2], bytes: &[u8], at: [usize; 2], secret: usize, seed: u64) {
    for i in 0..2 {
        let other = at[1 - i];
        let sum = sums[i].wrapping_add(mix(bytes, at[i], secret + 16 * i, seed));
        sums[i] = sum ^ u64_at(bytes, other).wrapping_add(u64_at(bytes, other + 8));
    }
}

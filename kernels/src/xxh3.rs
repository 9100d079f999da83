//! xxh3-64 in pieces: sums of blocks that can be formed in any order and on any thread, and the checksum that they make.
//!
//! XXH3 (specification: `doc/xxhash_spec.md` of the xxHash repository, "XXH3 Algorithm for long inputs") adds to eight
//! accumulators, for each kibibyte of an input, sums that depend on that kibibyte alone, and then scrambles them. Only the
//! scrambling has an order. So whoever has just multiplied weights can form the sums of their blocks out of its cache, and the
//! scrambling of a whole expert takes microseconds.

#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::isa::Kernels;

/// Bytes of a block.
pub const XXH3_BLOCK_BYTES: usize = 1024;
/// Bytes that meet the accumulators at once.
const STRIPE: usize = 64;
/// Where the secret of the last stripe of an input begins.
const LAST_STRIPE_SECRET: usize = 192 - STRIPE - 7;
/// Where the secret of the scrambling begins.
pub(crate) const SCRAMBLE_SECRET: usize = 192 - STRIPE;
/// Where the secret of the merging begins.
const MERGE_SECRET: usize = 11;

pub(crate) const PRIME32: [u64; 3] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d];
const PRIME64: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63, 0x27d4_eb2f_1656_67c5];
const PRIME_MX1: u64 = 0x1656_6791_9e37_79f9;

/// The secret of the specification, which belongs to the seed 0.
#[rustfmt::skip]
pub(crate) const SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// What one block adds to the accumulators.
pub type Xxh3Sum = [u64; 8];

impl Kernels {
    /// The sums of consecutive blocks. `ends`: whether the last of them is the last of its input, which has a secret of its own.
    ///
    /// # Panics
    /// If `bytes` are not as many blocks as there are `sums`.
    pub fn xxh3_sums(&self, bytes: &[u8], ends: bool, sums: &mut [Xxh3Sum]) {
        let (blocks, rest) = bytes.as_chunks();
        assert!(rest.is_empty() && blocks.len() == sums.len(), "{} bytes for {} sums", bytes.len(), sums.len());
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.xxh3_sums(blocks, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.xxh3_sums(blocks, sums),
            _ => blocks.iter().zip(&mut *sums).for_each(|(block, sum)| *sum = block_sum(block, false)),
        }
        if let (true, Some(block), Some(sum)) = (ends, blocks.last(), sums.last_mut()) {
            *sum = block_sum(block, true);
        }
    }
}

/// The specification of what kernels do with one block.
fn block_sum(block: &[u8; XXH3_BLOCK_BYTES], is_last: bool) -> Xxh3Sum {
    let mut products = [0u64; 8];
    let mut values = [0u64; 8];
    for (i, stripe) in block.as_chunks::<STRIPE>().0.iter().enumerate() {
        let last = is_last && i == XXH3_BLOCK_BYTES / STRIPE - 1;
        let secret = &SECRET[if last { LAST_STRIPE_SECRET } else { 8 * i }..];
        let words = stripe.as_chunks().0.iter().zip(secret.as_chunks().0);
        for (j, (value, key)) in words.enumerate() {
            let value = u64::from_le_bytes(*value);
            let keyed = value ^ u64::from_le_bytes(*key);
            products[j] = products[j].wrapping_add((keyed & 0xffff_ffff).wrapping_mul(keyed >> 32));
            values[j] = values[j].wrapping_add(value);
        }
    }
    std::array::from_fn(|j| products[j].wrapping_add(values[j ^ 1]))
}

fn secret_word(at: usize) -> u64 {
    u64::from_le_bytes(*SECRET[at..].first_chunk().expect("inside the secret"))
}

/// The specification of what kernels do with the sums of blocks that are not the last: they are added and scrambled.
fn absorb(state: &mut Xxh3Sum, sums: &[Xxh3Sum]) {
    let keys: [u64; 8] = std::array::from_fn(|j| secret_word(SCRAMBLE_SECRET + 8 * j));
    for sum in sums {
        for j in 0..8 {
            let word = state[j].wrapping_add(sum[j]);
            state[j] = (word ^ (word >> 47) ^ keys[j]).wrapping_mul(PRIME32[0]);
        }
    }
}

/// A checksum in the making: what the first blocks of an input have left in the accumulators.
#[derive(Clone, Debug)]
pub struct Xxh3State {
    state: Xxh3Sum,
    blocks: usize,
}

impl Default for Xxh3State {
    fn default() -> Self {
        let [p1, p2, p3, p4, p5] = PRIME64;
        Xxh3State { state: [PRIME32[2], p1, p2, p3, p4, PRIME32[1], p5, PRIME32[0]], blocks: 0 }
    }
}

impl Xxh3State {
    /// Blocks whose sums have been absorbed.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The checksum of an input that ends with one more block, whose sums these are.
    pub fn finish(mut self, last: Xxh3Sum) -> u64 {
        self.state.iter_mut().zip(last).for_each(|(word, sum)| *word = word.wrapping_add(sum));
        merge(&self.state, ((self.blocks + 1) * XXH3_BLOCK_BYTES) as u64)
    }
}

impl Kernels {
    /// Takes the sums of the next blocks, none of which is the last of the input.
    pub fn xxh3_absorb(&self, hash: &mut Xxh3State, sums: &[Xxh3Sum]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.xxh3_absorb(&mut hash.state, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.xxh3_absorb(&mut hash.state, sums),
            _ => absorb(&mut hash.state, sums),
        }
        hash.blocks += sums.len();
    }

    /// Takes the next blocks themselves, none of which is the last of the input: as if their sums were absorbed, but in less
    /// time.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks.
    pub fn xxh3_update(&self, hash: &mut Xxh3State, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks();
        assert!(rest.is_empty(), "{} bytes are not whole blocks", bytes.len());
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.xxh3_update(&mut hash.state, blocks),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.xxh3_update(&mut hash.state, blocks),
            _ => blocks.iter().for_each(|block| absorb(&mut hash.state, &[block_sum(block, false)])),
        }
        hash.blocks += blocks.len();
    }
}

/// From the accumulators after the last block of `len` bytes to the checksum.
fn merge(state: &Xxh3Sum, len: u64) -> u64 {
    let mut hash = len.wrapping_mul(PRIME64[0]);
    for (i, pair) in state.as_chunks::<2>().0.iter().enumerate() {
        let at = MERGE_SECRET + 16 * i;
        let product = u128::from(pair[0] ^ secret_word(at)) * u128::from(pair[1] ^ secret_word(at + 8));
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(PRIME_MX1);
    hash ^ (hash >> 32)
}

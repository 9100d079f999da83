//! Checksums of bytes that come piece by piece.

use std::borrow::Cow;
use std::fmt;

use crate::blocks::{BLOCK_BYTES, BlockSum};
use crate::constants::{SECRET_BYTES, SHORT_MAX};
use crate::isa::{Isa, STRIPE};
use crate::{long, short};

/// xxh3 of a stream. Allocates nothing.
#[derive(Clone)]
pub struct Xxh3 {
    seed: u64,
    secret: Cow<'static, [u8; SECRET_BYTES]>,
    /// The accumulators after all bytes but the kept ones.
    state: BlockSum,
    /// Bytes in all.
    len: u64,
    /// The last stripe that was taken into the accumulators, then the bytes that were not. The last block is not scrambled, even if it is
    /// whole, so it stays here until there is more.
    kept: [u8; STRIPE + BLOCK_BYTES],
    kept_len: usize,
}

impl Default for Xxh3 {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Xxh3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Xxh3").field("seed", &self.seed).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Xxh3 {
    /// An empty stream, with seed 0.
    #[must_use]
    pub fn new() -> Self {
        Self::with_seed(0)
    }

    /// An empty stream.
    #[must_use]
    pub fn with_seed(seed: u64) -> Self {
        Xxh3 {
            seed,
            secret: long::secret(seed),
            state: long::START,
            len: 0,
            kept: [0; STRIPE + BLOCK_BYTES],
            kept_len: 0,
        }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        let mut rest = bytes;
        if self.kept_len + rest.len() > BLOCK_BYTES {
            if self.kept_len > 0 {
                let (head, tail) = rest.split_at(BLOCK_BYTES - self.kept_len);
                self.keep(head);
                rest = tail;
                let block = self.kept.last_chunk().expect("as long as a block");
                Isa::detect().update(&self.secret, &mut self.state, std::slice::from_ref(block));
                self.kept.copy_within(BLOCK_BYTES.., 0);
                self.kept_len = 0;
            }
            let (whole, tail) = rest.split_at((rest.len() - 1) / BLOCK_BYTES * BLOCK_BYTES);
            Isa::detect().update(&self.secret, &mut self.state, whole.as_chunks().0);
            if let Some(stripe) = whole.last_chunk() {
                *self.kept.first_chunk_mut::<STRIPE>().expect("longer than a stripe") = *stripe;
            }
            rest = tail;
        }
        self.keep(rest);
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.kept[STRIPE + self.kept_len..][..bytes.len()].copy_from_slice(bytes);
        self.kept_len += bytes.len();
    }

    /// xxh3-64 of all bytes so far.
    #[must_use]
    pub fn digest(&self) -> u64 {
        match self.finish() {
            Err(bytes) => short::hash64(bytes, self.seed),
            Ok(state) => long::merge64(&state, &self.secret, self.len),
        }
    }

    /// xxh3-128 of all bytes so far.
    #[must_use]
    pub fn digest128(&self) -> u128 {
        match self.finish() {
            Err(bytes) => short::hash128(bytes, self.seed),
            Ok(state) => long::merge128(&state, &self.secret, self.len),
        }
    }

    /// The accumulators after all bytes, or the bytes themselves if they are few.
    fn finish(&self) -> Result<BlockSum, &[u8]> {
        let end = STRIPE + self.kept_len;
        if self.len <= SHORT_MAX as u64 {
            return Err(&self.kept[STRIPE..end]);
        }
        let mut state = self.state;
        let last = self.kept[..end].last_chunk().expect("a stripe and more");
        long::add_rest(&self.secret, &mut state, &self.kept[STRIPE..end], last);
        Ok(state)
    }
}

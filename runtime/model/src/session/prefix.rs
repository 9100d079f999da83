//! The name of a text: a hash of tokens that can be continued at page boundaries.

use std::fmt;

use sluice_checksum::xxh3_128;

use crate::cache::PAGE_TOKENS;

/// Hash of all tokens before a position. It is computed page by page: the hash after a page is the xxh3-128 of the hash before the
/// page (16 bytes, little-endian) and the page's tokens (4 bytes each). Before the first token it is zero.
///
/// It distinguishes texts, but it is neither secret nor protection against forgery: code that has the tokens compares those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixHash(pub u128);

impl PrefixHash {
    /// Hash of a text.
    pub fn of(tokens: &[u32]) -> Self {
        PrefixHash::default().then(tokens)
    }

    /// Hash of a longer text: `self` is the hash of its first tokens, a whole number of pages, and `tokens` are the others.
    #[must_use]
    pub fn then(self, tokens: &[u32]) -> Self {
        tokens.chunks(PAGE_TOKENS).fold(self, PrefixHash::page)
    }

    /// The hashes after each whole page of `tokens`, if `self` is the hash of the tokens before them.
    pub fn pages(self, tokens: &[u32]) -> impl Iterator<Item = Self> {
        tokens.chunks_exact(PAGE_TOKENS).scan(self, |hash, page| {
            *hash = hash.page(page);
            Some(*hash)
        })
    }

    fn page(self, tokens: &[u32]) -> Self {
        let mut bytes = [0; 16 + 4 * PAGE_TOKENS];
        bytes[..16].copy_from_slice(&self.0.to_le_bytes());
        let ids = bytes[16..].chunks_exact_mut(4).zip(tokens);
        ids.for_each(|(bytes, token)| bytes.copy_from_slice(&token.to_le_bytes()));
        PrefixHash(xxh3_128(&bytes[..16 + 4 * tokens.len()]))
    }
}

impl fmt::Display for PrefixHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

//! Digests that the hub states for files: SHA-256 for large files (Git LFS), and git's own digest for small ones.

use std::fmt;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// The digest that the hub states for a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Digest {
    /// Of the bytes of a file that Git LFS or Xet keeps.
    Sha256([u8; 32]),
    /// SHA-1 over `blob LENGTH\0` and the bytes: git's digest of a file that it keeps itself. Not every server that replaces
    /// the hub states it correctly.
    Git([u8; 20]),
    /// None is stated.
    Unstated,
}

impl Digest {
    /// Reads hexadecimal digits: 64 are SHA-256, 40 are git's. Quotes and the mark of weak tags around them are those of an
    /// `ETag`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches("W/").trim_matches('"');
        match text.len() {
            64 => hex(text).map(Digest::Sha256),
            40 => hex(text).map(Digest::Git),
            _ => None,
        }
    }

    /// What kind of digest it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Digest::Sha256(_) => "SHA-256",
            Digest::Git(_) => "git blob id",
            Digest::Unstated => "digest",
        }
    }

    /// Whether `bytes` have this digest; true if none is stated.
    pub fn is_of(&self, bytes: &[u8]) -> bool {
        self.is(&self.computed(bytes))
    }

    /// The digest of this kind of the bytes.
    pub(crate) fn computed(&self, bytes: &[u8]) -> Vec<u8> {
        let mut hasher = Hasher::new(self, bytes.len() as u64);
        hasher.update(bytes);
        hasher.finish()
    }

    /// Whether a computed digest is this one.
    pub(crate) fn is(&self, computed: &[u8]) -> bool {
        *self == Digest::Unstated || computed == self.bytes()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Digest::Sha256(bytes) => bytes,
            Digest::Git(bytes) => bytes,
            Digest::Unstated => &[],
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// Computes the digest of a file's bytes, front to back.
#[derive(Clone)]
pub(crate) struct Hasher(Context);

impl Hasher {
    /// For a digest of the kind of `expected`, of a file of `len` bytes.
    pub(crate) fn new(expected: &Digest, len: u64) -> Self {
        match expected {
            Digest::Sha256(_) | Digest::Unstated => Hasher(Context::new(&SHA256)),
            Digest::Git(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {len}\0").as_bytes());
                Hasher(context)
            }
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of the bytes so far.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.finish().as_ref().to_vec()
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_sha256sum() {
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let git = "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f";
        assert!(Digest::parse(sha256).unwrap().is_of(b"abc"));
        assert!(Digest::parse(&format!("W/\"{git}\"")).unwrap().is_of(b"abc"));
        assert!(!Digest::parse(git).unwrap().is_of(b"abd"));
        assert_eq!(Digest::parse(sha256).unwrap().to_string(), sha256);
        for text in ["", "zz", &"g".repeat(64), &"é".repeat(20), &sha256[1..]] {
            assert_eq!(Digest::parse(text), None);
        }
    }
}

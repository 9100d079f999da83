//! Saved sequences in a folder: found by the longest match of tokens, bounded by bytes, safe against a kill at any moment.
//!
//! Each file is a segment: what the layers remember of the tokens from a page boundary on (`docs/SESSIONS.md`). Segments form a
//! tree. A segment that continues another one, at its end or at a page boundary inside it, names the tokens before it by their hash.
//! So a prefix that many sessions share is written once, and a later turn writes only what is new.

mod entry;
mod error;
mod folder;
mod name;
mod store;
mod tree;
mod writer;

pub use entry::{SessionEntry, StoreOptions, Usage};
pub use error::StoreError;
pub use store::{Found, Store};

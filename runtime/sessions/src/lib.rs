//! Saved sequences in a folder: found by the longest match of tokens, bounded by bytes, safe against a kill at any moment.
//!
//! Each file is a segment: what the layers remember of the tokens from a page boundary on (`docs/SESSIONS.md`). Segments are a tree.
//! One that goes on where another ends, or at a page boundary inside of it, names what stands before by the hash of those tokens, so
//! a prefix that many sessions have is written once, and a later turn writes only what is new.

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

//! Storage: bytes off a drive into memory, verified, and which of them stay there.
//!
//! [`io`] reads extents and knows neither the pool nor the model; [`pool`] keeps them in slots and decides who leaves.

pub mod io;
pub mod pool;

//! Storage: reads extents from a drive into memory, verified, and decides which of them stay there.
//!
//! [`io`] reads extents and knows neither the pool nor the model; [`pool`] keeps experts in slots and decides which of them leave.

pub mod io;
pub mod pool;

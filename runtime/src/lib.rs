//! placeholder
pub mod io;
pub mod pool;

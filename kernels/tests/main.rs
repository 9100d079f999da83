//! All integration tests of this crate in one program: it links once, and its tests share the cores.

mod common;

mod attention;
mod expanded;
mod feedback;
mod grids;
mod grouped;
#[cfg(unix)]
mod guard_pages;
mod pack;
mod quant;
mod same_bits;

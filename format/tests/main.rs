//! All integration tests of this crate in one program: it links once, and its tests share the cores.

mod support;

mod damage;
mod format_doc;
mod golden;
mod hostile;
mod importance;
mod mutations;
mod planes;
mod prediction;
mod roundtrip;
mod stripes;
mod volumes;

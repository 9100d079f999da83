//! All integration tests of this crate in one program: it links once, and its tests share the cores.

mod common;

mod drafts;
mod forms;
mod hostile;
mod schemas;

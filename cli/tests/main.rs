//! All integration tests of this crate in one program: it links once, and its tests share the cores.

mod common;
#[path = "../../hub/tests/common/mod.rs"]
mod hub_common;
#[path = "common/pty.rs"]
mod pty;

mod bench;
mod chat_pty;
mod compute;
mod dense;
mod files;
mod habits;
mod hub;
mod named_volumes;
#[cfg(target_os = "linux")]
mod optional;
mod overnight;
mod resume;
mod set;
mod stripes;
mod synth;
mod terminal;
mod text;
mod usage;
mod volume_places;

//! All integration tests of this crate in one program: it links once, and its tests share the cores.

mod common;

mod anthropic;
mod checks;
mod ollama;
mod responses;
mod sockets;

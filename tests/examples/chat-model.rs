//! Writes the model that tests of the server use, for scripts.
//!
//!     cargo run -p sluice-tests --example chat-model -- OUT.sluice [full|windows|states]

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use sluice_tests::chat_model::{Layers, chat_model};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (out, layers) = match arguments.as_slice() {
        [out] => (out, Some(Layers::Full)),
        [out, layers] => (out, Layers::named(layers)),
        _ => return usage(),
    };
    let Some(layers) = layers else { return usage() };
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    fs::copy(chat_model(folder.path(), layers), PathBuf::from(out)).expect("the model file can be written");
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("usage: chat-model OUT.sluice [full|windows|states]");
    ExitCode::from(2)
}

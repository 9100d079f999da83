//! Writes the model that the server's tests use, for scripts.
//!
//!     cargo run -p sluice-tests --example chat-model -- OUT.sluice [full|windows|states [CHECKPOINT]]
//!
//! With a third argument, the checkpoint from which the model is made stays in that folder.

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use sluice_tests::chat_model::{Layers, chat_model};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (out, layers, checkpoint) = match arguments.as_slice() {
        [out] => (out, Some(Layers::Full), None),
        [out, layers] => (out, Layers::named(layers), None),
        [out, layers, checkpoint] => (out, Layers::named(layers), Some(checkpoint)),
        _ => return usage(),
    };
    let Some(layers) = layers else { return usage() };
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    fs::copy(chat_model(folder.path(), layers), out).expect("the model file can be written");
    if let Some(checkpoint) = checkpoint {
        fs::create_dir_all(checkpoint).expect("the folder of the checkpoint can be created");
        for file in fs::read_dir(folder.path().join("checkpoint")).expect("the checkpoint") {
            let file = file.expect("a file of the checkpoint");
            fs::copy(file.path(), Path::new(checkpoint).join(file.file_name())).expect("it can be written");
        }
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("usage: chat-model OUT.sluice [full|windows|states [CHECKPOINT]]");
    ExitCode::from(2)
}

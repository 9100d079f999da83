//! Code that the tests of the program share: calling it, and a converted demo model.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{OpenptyResult, Winsize, openpty};
use serde_json::Value;

/// The folder of the demo checkpoint.
pub fn demo_checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/demo-model")
}

/// Copies its files with these names, or all, to a folder that is created if necessary.
pub fn copy_checkpoint(to: &Path, names: Option<&[&str]>) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(demo_checkpoint()).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        if names.is_none_or(|names| names.contains(&name)) {
            fs::copy(&file, to.join(name)).unwrap();
        }
    }
}

/// The results of the reference implementation for it.
pub fn expected() -> Value {
    serde_json::from_slice(&fs::read(demo_checkpoint().join("expected.json")).unwrap()).unwrap()
}

pub fn sluice(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sluice")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs the program with this standard input.
pub fn sluice_with_input(args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that refuses its arguments does not wait for its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Standard output of a run that must succeed.
pub fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap()
}

/// Asserts failure with this code and, after any notes, one paragraph that contains all of `words`.
pub fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.lines().any(|line| line.starts_with("error: ")), "{message}");
    assert!(!message.contains("panicked") && !message.contains("RUST_BACKTRACE"), "{message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

/// The demo model in f32, converted once for all tests of a file.
pub fn demo_model() -> &'static str {
    static MODEL: OnceLock<(tempfile::TempDir, String)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.sluice").to_str().unwrap().to_owned();
        let checkpoint = demo_checkpoint();
        let args = ["convert", checkpoint.to_str().unwrap(), &path, "--type", "f32", "--dense-type", "f32"];
        stdout(&sluice(&args));
        (folder, path)
    });
    path
}

/// A pseudo-terminal that is not inherited by programs that other tests start meanwhile.
pub fn open_terminal(size: Option<&Winsize>) -> OpenptyResult {
    let terminal = openpty(size, None).unwrap();
    for end in [&terminal.master, &terminal.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    }
    terminal
}

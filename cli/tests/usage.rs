//! The command line itself: help, exit codes, closed pipes.

mod common;

use std::io::Read as _;
use std::process::{Command, Stdio};

use common::{assert_fails, demo_model, sluice, sluice_with_input, stdout};

const COMMANDS: [&str; 12] = [
    "convert",
    "inspect",
    "verify",
    "run",
    "logits",
    "perplexity",
    "calibrate",
    "bench",
    "trace",
    "demo",
    "plan",
    "synth",
];

#[test]
fn help() {
    let all = stdout(&sluice(&["--help"]));
    for command in COMMANDS {
        assert!(all.contains(command), "{command}: {all}");
        let help = stdout(&sluice(&[command, "--help"]));
        assert!(help.contains("Usage: sluice") && help.contains("Examples:"), "{help}");
        assert!(help.contains(&format!("sluice {command}")), "{help}");
    }
    assert!(stdout(&sluice(&["--version"])).starts_with("sluice "));
}

#[test]
fn wrong_usage_is_2() {
    let model = demo_model();
    let cases: [(&[&str], &[&str]); 13] = [
        (&["no-such-command"], &["no-such-command"]),
        (&["run"], &["<FILE>"]),
        (&["run", model, "--budget", "4XB", "--prompt", "x"], &["4XB", "4GiB"]),
        (&["run", model, "--prompt-ids", "1,x"], &["`x`", "1,2,3"]),
        (&["run", model, "--prompt-ids", "1,99999"], &["99999", "vocabulary"]),
        (&["run", model, "--prompt", "a", "--prompt-ids", "1"], &["cannot be used with"]),
        (&["run", model, "--prompt", ""], &["prompt is empty"]),
        (&["run", model, "--prompt", "a", "--threads", "0"], &["threads"]),
        (&["run", model, "--prompt", "a", "--temperature", "nan"], &["temperature"]),
        (&["run", model, "--prompt", "a", "--stop", ""], &["stop string"]),
        (&["run", model, "--prompt-ids", "1,2,3", "--context", "2"], &["3 tokens", "--context"]),
        (&["logits", model, "--ids", "1536", "--out", "/dev/null"], &["1536", "vocabulary"]),
        (&["perplexity", model, "--text", "/dev/null", "--window", "0"], &["window"]),
    ];
    for (args, words) in cases {
        assert_fails(&sluice(args), 2, words);
    }
    assert_eq!(sluice(&[]).status.code(), Some(2));
}

#[test]
fn failures_are_1() {
    let model = demo_model();
    assert_fails(&sluice(&["run", model, "--prompt", "a", "--budget", "1MiB"]), 1, &["budget of 1.0 MiB", "at least"]);
    assert_fails(&sluice(&["run", model, "--prompt-file", "/no/such/file"]), 1, &["/no/such/file"]);
    assert_fails(&sluice(&["perplexity", model, "--text", "/no/such/file"]), 1, &["/no/such/file"]);
    let calibrate = [
        "calibrate",
        model,
        "--text",
        concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        "--out",
        "/no/such/folder/imatrix.bin",
    ];
    assert_fails(&sluice(&calibrate), 1, &["imatrix.bin"]);
    let convert =
        ["convert", "/no/such/folder", "/dev/null", "--imatrix", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")];
    assert_fails(&sluice(&convert), 1, &["/no/such/folder"]);
    assert_fails(&sluice(&["logits", model, "--ids", "1", "--out", "/no/such/folder/f.npy"]), 1, &["f.npy"]);
    assert_fails(&sluice_with_input(&["run", model], &[0xff, 0xfe]), 1, &["standard input"]);
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(["inspect", demo_model(), "--extents", "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert_eq!(said, "");
}

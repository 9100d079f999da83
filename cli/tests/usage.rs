//! The command line itself: help, exit codes, closed pipes.

use crate::common;

use std::io::Read as _;
use std::process::{Command, Stdio};

use crate::common::{assert_fails, demo_model, sluice, sluice_with_input, stderr, stdout};

const COMMANDS: [&str; 13] = [
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
    "set",
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
fn what_may_have_been_meant_is_said() {
    assert_fails(&sluice(&["help", "bathc"]), 2, &["'bathc'", "'batch'"]);
    assert_fails(&sluice(&["bathc"]), 2, &["'bathc'", "'batch'"]);
    assert_fails(&sluice(&["rnu", "m.sluice"]), 2, &["'rnu'", "tip:", "'run'", "Usage: sluice"]);
    assert_fails(&sluice(&["bench", "dics"]), 2, &["'dics'", "'disk'"]);
    assert_fails(&sluice(&["models"]), 2, &["'models'", "tip:", "'sluice list'"]);
    assert_fails(&sluice(&["version"]), 2, &["'version'", "'sluice --version'"]);
    assert!(!stderr(&sluice(&["version"])).contains("'verify'"));
    assert_fails(&sluice(&["m.sluice", "Hello"]), 2, &["'m.sluice'", "'sluice run m.sluice --prompt"]);
    assert_fails(&sluice(&["plan", "deepseek-r2"]), 2, &["did you mean deepseek-r1?", "kimi-k2"]);
    let model = demo_model();
    assert_fails(&sluice(&["run", model, "--prompt", "A", "--top-k-experts", "0"]), 2, &["at least one expert"]);
    assert_fails(&sluice(&["run", model, "--prompt", "A", "--expert-preference", "-1"]), 2, &["from 0.0001 to 1"]);
}

#[test]
fn wrong_usage_is_2() {
    let model = demo_model();
    let cases: [(&[&str], &[&str]); 15] = [
        (&["no-such-command"], &["no-such-command"]),
        (&["run"], &["<FILE>"]),
        (&["run", model, "--budget", "4XB", "--prompt", "x"], &["4XB", "4GiB"]),
        (&["run", model, "--budget", "4", "--prompt", "x"], &["4 bytes", "write 4GiB"]),
        (&["plan", "deepseek-r1", "--ram", "64"], &["64 bytes", "write 64GiB"]),
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
fn what_has_no_end_is_refused() {
    let model = demo_model();
    let limit = &["/dev/zero", "more than 8.0 MiB"];
    assert_fails(&sluice(&["run", model, "--prompt-file", "/dev/zero"]), 1, limit);
    assert_fails(&sluice(&["perplexity", model, "--text", "/dev/zero"]), 1, limit);
    assert_fails(&sluice(&["calibrate", model, "--text", "/dev/zero", "--out", "/dev/null"]), 1, limit);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    let endless = command.args(["run", model]).stdin(std::fs::File::open("/dev/zero").unwrap()).output().unwrap();
    assert_fails(&endless, 1, &["standard input", "more than 8.0 MiB"]);
    assert_fails(&sluice(&["trace", "stats", "/dev/zero"]), 1, &["/dev/zero"]);
    assert_fails(&sluice(&["plan", "/dev/zero"]), 1, &["/dev/zero"]);
    assert_fails(&sluice(&["synth", "/dev/zero", "/no/such/folder/f"]), 1, &["/dev/zero"]);
}

#[test]
fn a_pipe_in_the_place_of_counts_is_neither_waited_for_nor_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m.sluice");
    std::fs::copy(demo_model(), &model).unwrap();
    let counts = folder.path().join("m.sluice.counts");
    assert!(Command::new("mkfifo").arg(&counts).status().unwrap().success());
    let output = sluice(&["run", model.to_str().unwrap(), "--prompt", "a", "-n", "3"]);
    stdout(&output);
    let said = stderr(&output);
    assert!(said.contains("m.sluice.counts is there already") && said.lines().count() == 1, "{said}");
    assert!(!counts.symlink_metadata().unwrap().is_file());
}

#[test]
fn words_of_the_command_line_are_shown_not_obeyed() {
    let output = sluice(&["verify", "a", "b\u{1b}]0;owned\u{7}"]);
    assert_fails(&output, 2, &["unexpected argument"]);
    assert!(!output.stderr.contains(&0x1b) && !output.stderr.contains(&7));
    let long = "x".repeat(100_000);
    let output = sluice(&["inspect", &long]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.len() < 3000, "{}", output.stderr.len());
}

#[test]
fn a_full_context_can_drop_its_oldest_tokens() {
    let run = |args: &[&str]| {
        let fixed =
            ["run", demo_model(), "--prompt-ids", "5,6,7", "--ignore-eos", "--forget", "--json", "--context", "12"];
        sluice(&[&fixed, args].concat())
    };
    let output = run(&["-n", "30", "--when-full", "drop-oldest", "--keep", "2"]);
    let report = common::json(&output);
    assert_eq!((&report["finish"], report["ids"].as_array().unwrap().len()), (&"length".into(), 30));
    // 13 tokens are one too many: 5 of the 11 others are dropped, and again whenever 5 more have come.
    assert_eq!(report["dropped_tokens"], 20);
    assert!(stderr(&output).contains("of the oldest tokens 20 were dropped"), "{}", stderr(&output));
    assert_eq!(common::json(&run(&["-n", "9"]))["dropped_tokens"], 0);
    assert_fails(&run(&["--keep", "2"]), 2, &["--when-full drop-oldest"]);
    assert_fails(&run(&["--when-full", "drop-oldest", "--keep", "12"]), 2, &["--keep 12", "--context"]);
}

#[test]
fn as_many_tokens_as_there_is_room_for() {
    let run = |args: &[&str]| {
        let fixed = ["run", demo_model(), "--prompt-ids", "5", "--ignore-eos", "--forget", "--json"];
        sluice(&[&fixed, args].concat())
    };
    let output = run(&["-n", "-1", "--context", "12"]);
    let report = common::json(&output);
    assert_eq!((&report["finish"], report["ids"].as_array().unwrap().len()), (&"context".into(), 12));
    assert!(stderr(&output).contains("--context makes it longer"), "{}", stderr(&output));
    let output = run(&["--max-tokens", "-1"]);
    let report = common::json(&output);
    let limit = common::json(&sluice(&["inspect", demo_model(), "--json"]))["max_positions"].as_u64().unwrap();
    assert_eq!((&report["finish"], report["ids"].as_array().unwrap().len() as u64), (&"context".into(), limit));
    let said = stderr(&output);
    assert!(said.contains("the model's limit") && !said.contains("--context"), "{said}");
    assert_fails(&run(&["-n", "-2"]), 2, &["-1 for no limit"]);
}

#[test]
fn the_demo_keeps_what_it_finds() {
    let folder = tempfile::tempdir().unwrap();
    let keep = folder.path().to_str().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("checkpoint")).unwrap();
    for name in ["demo.sluice", "checkpoint/config.json"] {
        std::fs::write(path(name), "mine").unwrap();
        assert_fails(&sluice(&["demo", "--keep", keep]), 2, &[name, "not the demo's"]);
        assert_eq!(std::fs::read(path(name)).unwrap(), b"mine");
        std::fs::remove_file(path(name)).unwrap();
    }
    std::os::unix::fs::symlink("elsewhere", path("checkpoint/config.json")).unwrap();
    assert_fails(&sluice(&["demo", "--keep", keep]), 2, &["checkpoint/config.json"]);
    assert!(!path("checkpoint/elsewhere").exists());
    std::fs::remove_file(path("checkpoint/config.json")).unwrap();
    // Its own files do not prevent it.
    for _ in 0..2 {
        stdout(&sluice(&["demo", "--keep", keep]));
    }
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

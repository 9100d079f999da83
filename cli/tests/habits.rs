//! What every command has in common: versions, suggestions, quiet, progress for programs, colours.

use std::fs;
use std::io::Read as _;
use std::process::{Command, Output, Stdio};

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, open_terminal, sluice, stderr, stdout};
use serde_json::Value;

#[test]
fn versions_say_what_a_bug_report_needs() {
    let short = stdout(&sluice(&["-V"]));
    assert_eq!(short, format!("sluice {}\n", env!("CARGO_PKG_VERSION")));
    let long = stdout(&sluice(&["--version"]));
    assert!(long.starts_with(short.trim_end()), "{long}");
    for word in ["commit", "instructions", "scalar", "model files", "sessions"] {
        assert!(long.contains(word), "{word}: {long}");
    }
}

#[test]
fn the_program_alone_names_five_commands() {
    let output = sluice(&[]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    let examples: Vec<_> = said.lines().filter(|line| line.starts_with("  sluice ")).collect();
    assert_eq!(examples.len(), 5, "{said}");
    let help = stdout(&sluice(&["--help"]));
    for example in examples {
        let command = example.split_whitespace().nth(1).unwrap();
        assert!(help.contains(&format!("\n  {command} ")), "{command}: {help}");
    }
}

#[test]
fn the_nearest_command_option_and_file_are_suggested() {
    assert_fails(&sluice(&["convrt"]), 2, &["similar", "convert"]);
    assert_fails(&sluice(&["run", "x", "--temprature", "1"]), 2, &["similar", "--temperature"]);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::copy(demo_model(), path("demo.sluice")).unwrap();
    for command in ["inspect", "verify", "doctor"] {
        assert_fails(&sluice(&[command, &path("demo.sluce")]), 1, &["did you mean", "/demo.sluice?"]);
    }
    fs::create_dir(path("checkpoint")).unwrap();
    assert_fails(&sluice(&["convert", &path("chekpoint"), &path("new.sluice")]), 1, &["/checkpoint?"]);
    // Where nothing is alike, nothing is suggested.
    let output = sluice(&["inspect", &path("zzz")]);
    assert!(!stderr(&output).contains("did you mean"), "{}", stderr(&output));
}

#[test]
fn shells_and_manuals_know_every_command() {
    let help = stdout(&sluice(&["--help"]));
    let list = help.split("Commands:").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands: Vec<_> = list.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    let commands: Vec<_> = commands.into_iter().filter(|name| !name.is_empty()).collect();
    assert!(commands.contains(&"convert") && commands.len() > 15, "{commands:?}");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = stdout(&sluice(&["completions", shell]));
        for command in &commands {
            assert!(script.contains(command), "{shell} lacks {command}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    stdout(&sluice(&["man", folder.path().to_str().unwrap()]));
    for command in commands.iter().filter(|command| **command != "help") {
        let page = fs::read_to_string(folder.path().join(format!("sluice-{command}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains("Examples"), "{command}: {page}");
    }
    assert!(stdout(&sluice(&["man"])).contains(".TH sluice 1"));
}

/// Converts the demo's checkpoint with options before the command's name.
fn convert(options: &[&str]) -> (tempfile::TempDir, Output) {
    let folder = tempfile::tempdir().unwrap();
    let (source, model) = (demo_checkpoint(), folder.path().join("m.sluice"));
    let args = ["convert", source.to_str().unwrap(), model.to_str().unwrap(), "--type", "q8"];
    let output = sluice(&[options, &args].concat());
    (folder, output)
}

fn lines(output: &Output) -> Vec<Value> {
    stderr(output).lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn progress_is_lines_of_json_for_programs() {
    let (folder, output) = convert(&["--progress", "json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = lines(&output);
    let finished = said.iter().find(|line| line["event"] == "finished").expect("the end is said");
    assert_eq!((&finished["what"], &finished["unit"]), (&"converting".into(), &"bytes".into()));
    assert!(finished["total"].as_u64() > Some(0) && finished["done"] == finished["total"], "{finished}");
    assert!(said.iter().any(|line| line["event"] == "progress"), "{said:?}");

    // What a command prints stays what it was.
    let model = folder.path().join("m.sluice");
    let output = sluice(&["verify", model.to_str().unwrap(), "--json", "--progress=json"]);
    assert_eq!(json(&output)["intact"], true);
    let said = lines(&output);
    assert_eq!(said.last().unwrap()["what"], "verifying", "{said:?}");

    // Errors are lines as well.
    let output = sluice(&["inspect", "/no/such/file", "--progress", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let said = lines(&output);
    assert!(said[0]["event"] == "error" && said[0]["message"].as_str().unwrap().contains("/no/such/file"), "{said:?}");
}

#[test]
fn quiet_leaves_nothing_but_errors() {
    let loud = ["run", demo_model(), "--prompt", "a", "-n", "2", "--forget", "--kv-type", "q8"];
    assert!(stderr(&sluice(&loud)).contains("note: "));
    for quiet in ["-q", "--quiet"] {
        let output = sluice(&[&loud[..], &[quiet]].concat());
        assert!(!stdout(&output).is_empty());
        assert_eq!(stderr(&output), "");
    }
    let (_folder, output) = convert(&["--quiet", "--progress", "json"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
    assert_fails(&sluice(&["-q", "inspect", "/no/such/file"]), 1, &["/no/such/file"]);
}

/// What a command writes to a terminal on its standard error, with these variables.
fn on_a_terminal(args: &[&str], variables: &[(&str, &str)]) -> String {
    let terminal = open_terminal(None);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm-256color").envs(variables.iter().copied());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(terminal.slave);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut shown = Vec::new();
    // On Linux it ends with an error.
    let _ = fs::File::from(terminal.master).read_to_end(&mut shown);
    child.wait().unwrap();
    String::from_utf8(shown).unwrap()
}

#[test]
fn colours_follow_terminals_and_variables() {
    let args = ["inspect", "/no/such/file"];
    let red = "\u{1b}[1;31m";
    assert!(on_a_terminal(&args, &[]).contains(red));
    for variable in [("NO_COLOR", "1"), ("CLICOLOR", "0"), ("TERM", "dumb")] {
        let shown = on_a_terminal(&args, &[variable]);
        assert!(shown.contains("/no/such/file") && !shown.contains('\u{1b}'), "{variable:?}: {shown:?}");
    }
    let piped = |name: &str, value: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        stderr(&command.args(args).env_remove("NO_COLOR").env(name, value).output().unwrap())
    };
    assert!(!piped("CLICOLOR", "1").contains(red));
    assert!(piped("CLICOLOR_FORCE", "1").contains(red));
}

#[test]
fn bars_are_for_terminals_that_can_show_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m.sluice");
    let source = demo_checkpoint();
    let args = ["convert", source.to_str().unwrap(), model.to_str().unwrap(), "--overwrite"];
    assert!(on_a_terminal(&args, &[("NO_COLOR", "1")]).contains("converting"));
    for silent in [&[("TERM", "dumb")][..], &[]] {
        let more: &[&str] = if silent.is_empty() { &["--progress", "none"] } else { &[] };
        let shown = on_a_terminal(&[&args, more].concat(), silent);
        assert!(!shown.contains("converting"), "{shown:?}");
    }
}

#[test]
fn a_doctor_says_how_to_mend_what_it_finds() {
    let report = json(&sluice(&["doctor", demo_model(), "--json"]));
    let findings = report["findings"].as_array().unwrap();
    let of: Vec<_> = findings.iter().map(|finding| finding["of"].as_str().unwrap()).collect();
    for name in ["memory", "io_uring", "direct reads", "calibration", "processor", "instructions", "model"] {
        assert!(of.contains(&name), "{name}: {of:?}");
    }
    for finding in findings {
        let is_ok = finding["verdict"] == "ok";
        assert!(is_ok == finding["mend"].is_null() && finding["verdict"] != "wrong", "{finding}");
    }
    // What is wrong is said, and is the exit code.
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.sluice");
    fs::write(&broken, "no model").unwrap();
    let output = sluice(&["doctor", broken.to_str().unwrap()]);
    assert_fails(&output, 1, &["one thing is wrong"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.lines().any(|line| line.starts_with("wrong") && line.contains("model")), "{said}");
    // A folder is looked at without a model, and left as it was.
    fs::remove_file(&broken).unwrap();
    let said = stdout(&sluice(&["doctor", folder.path().to_str().unwrap()]));
    assert!(said.contains("direct reads") && !said.contains("\nwrong"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_profile_can_be_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("time.svg");
    let args =
        ["run", demo_model(), "--prompt", "a", "-n", "4", "--forget", "--profile-svg", picture.to_str().unwrap()];
    stdout(&sluice(&args));
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("A token of the answer") && svg.contains("tokens/s"), "{svg}");
    assert_fails(
        &sluice(&["run", demo_model(), "--prompt", "a", "--profile-svg", demo_model()]),
        2,
        &["a file that is read"],
    );
}

//! The inputs that once broke a parser break it no longer, and the fuzzing targets still take what is sound. The fuzzer itself
//! is a workspace of its own (`fuzz/`); its targets are compiled into this test.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

#[path = "../../fuzz/src/targets/mod.rs"]
#[allow(dead_code, unreachable_pub, reason = "the fuzzer uses more of it")]
mod targets;

use targets::{TARGETS, Target};

/// The fuzzer allows 10 seconds, but other tests run beside this one.
const TIME_MAX: Duration = Duration::from_secs(60);

fn run(target: &Target, name: &str, input: &[u8], folder: &Path) {
    let started = Instant::now();
    (target.run)(input, folder);
    let taken = started.elapsed();
    assert!(taken < TIME_MAX, "{} takes {taken:?} for {name}", target.name);
}

#[test]
fn no_fault_comes_back() {
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions");
    for entry in fs::read_dir(&regressions).unwrap() {
        let folder = entry.unwrap().path();
        let target = TARGETS.iter().find(|target| folder.ends_with(target.name));
        let target = target.unwrap_or_else(|| panic!("{} is no target", folder.display()));
        let scratch = tempfile::tempdir().unwrap();
        let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        for file in files {
            run(target, &file.display().to_string(), &fs::read(&file).unwrap(), scratch.path());
        }
    }
}

#[test]
fn sound_inputs_are_taken() {
    for target in &TARGETS {
        let scratch = tempfile::tempdir().unwrap();
        for (name, input) in (target.seeds)(scratch.path()) {
            run(target, &name, &input, scratch.path());
            // What a broken download leaves.
            run(target, &name, &input[..input.len() / 2], scratch.path());
        }
    }
}

#[test]
fn the_script_knows_every_target() {
    let script = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/run.sh")).unwrap();
    let names = TARGETS.each_ref().map(|target| target.name).join(" ");
    assert!(script.contains(&format!("TARGETS=({names})")), "fuzz/run.sh lacks one of {names}");
}

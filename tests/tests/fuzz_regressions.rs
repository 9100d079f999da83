//! Inputs that once broke a parser no longer do, and the fuzzing targets still accept valid input. The fuzzer itself is a separate
//! workspace (`fuzz/`); its targets are compiled into this test.

use std::fs;
use std::path::Path;

#[path = "../../fuzz/src/targets/mod.rs"]
#[allow(dead_code, unreachable_pub, reason = "the fuzzer uses more of it")]
mod targets;

use targets::TARGETS;

/// A single test, because a target keeps its files in the first folder that it gets.
#[test]
fn no_fault_comes_back_and_what_is_sound_is_taken() {
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions");
    let mut replayed = 0;
    for target in &TARGETS {
        let scratch = tempfile::tempdir().unwrap();
        let files = fs::read_dir(regressions.join(target.name)).into_iter().flatten();
        for file in files.map(|file| file.unwrap().path()) {
            (target.run)(&fs::read(file).unwrap(), scratch.path());
            replayed += 1;
        }
        for (_, input) in (target.seeds)(scratch.path()) {
            (target.run)(&input, scratch.path());
            // What an interrupted download leaves.
            (target.run)(&input[..input.len() / 2], scratch.path());
        }
    }
    let folders = fs::read_dir(&regressions).unwrap().map(|folder| folder.unwrap().path());
    let kept: usize = folders.map(|folder| fs::read_dir(folder).unwrap().count()).sum();
    assert_eq!(replayed, kept, "a folder in fuzz/regressions is not named as a target");
}

#[test]
fn the_script_knows_every_target() {
    let script = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/run.sh")).unwrap();
    let names = TARGETS.each_ref().map(|target| target.name).join(" ");
    assert!(script.contains(&format!("TARGETS=({names})")), "fuzz/run.sh lacks one of {names}");
}

//! Where volumes are looked for, what is said of those that are missing or damaged, and commands that are repeated after a kill.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

struct Drives {
    dir: tempfile::TempDir,
}

impl Drives {
    /// The demo model as `m.sluice`, striped over the folders `a` and `b`, which its first volume names relative to its own.
    fn new() -> Self {
        let drives = Drives { dir: tempfile::tempdir().unwrap() };
        ["a", "b", "other"].iter().for_each(|name| fs::create_dir(drives.at(name)).unwrap());
        fs::copy(demo_model(), drives.at("m.sluice")).unwrap();
        stdout(&drives.run(&["restripe", "m.sluice", "--volumes", "a,b", "--shares", "1,1"]));
        drives
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn run(&self, args: &[&str]) -> Output {
        self.with_volumes("", args)
    }

    /// Runs a command in the folder, with these as `SLUICE_VOLUMES`.
    fn with_volumes(&self, folders: &str, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(args).env("SLUICE_VOLUMES", folders).current_dir(self.dir.path()).stdin(Stdio::null());
        command.output().unwrap()
    }
}

const FIRST: &str = "a/m-00001-of-00002.sluice";
const SECOND: &str = "b/m-00002-of-00002.sluice";
const SECOND_NAME: &str = "m-00002-of-00002.sluice";

#[test]
fn places_that_have_something_else_hide_no_better_one() {
    let drives = Drives::new();
    fs::write(drives.at("file"), "a file").unwrap();
    fs::create_dir_all(drives.at("folder") + "/" + SECOND_NAME).unwrap();
    // Another model's volume of that name.
    stdout(&drives.run(&["restripe", "m.sluice", "--volumes", "other,other/..", "--shares", "5,1"]));
    fs::rename(drives.at(SECOND_NAME), drives.at("other") + "/" + SECOND_NAME).unwrap();
    fs::create_dir(drives.at("empty")).unwrap();
    fs::write(drives.at("empty") + "/" + SECOND_NAME, "").unwrap();
    for folders in ["file", "folder", "other", "empty", "nowhere", "file:folder:other:empty:nowhere"] {
        assert_eq!(json(&drives.with_volumes(folders, &["inspect", FIRST, "--json"]))["page_size"], 4096, "{folders}");
    }
    // Where none fits, the first that is not only missing is named.
    fs::rename(drives.at(SECOND), drives.at("hidden")).unwrap();
    let inspect = ["inspect", FIRST];
    assert_fails(&drives.with_volumes("file:other", &inspect), 1, &["other/m-00002", "not of the same model"]);
    assert_fails(
        &drives.with_volumes("nowhere:empty", &inspect),
        1,
        &["empty/m-00002", "volume 2 of 2", "it is empty"],
    );
    assert_fails(&drives.with_volumes("file:nowhere", &inspect), 1, &["is missing", "file and nowhere"]);
    fs::write(drives.at(SECOND), "").unwrap();
    let refused = drives.run(&inspect);
    assert_fails(&refused, 1, &[SECOND, "is damaged", "volume 2 of 2", "it is empty"]);
    assert!(!stderr(&refused).contains("Hugging Face"), "{}", stderr(&refused));
}

#[test]
fn links_to_the_first_volume_lead_to_the_others() {
    let drives = Drives::new();
    fs::create_dir_all(drives.at("deep/links")).unwrap();
    for name in ["deep/links/m-00001-of-00002.sluice", "deep/links/model.sluice"] {
        std::os::unix::fs::symlink(drives.at(FIRST), drives.at(name)).unwrap();
        assert_eq!(json(&drives.run(&["inspect", name, "--json"]))["page_size"], 4096, "{name}");
    }
}

#[test]
fn a_volume_that_a_model_needs_is_not_replaced_by_one_file() {
    let drives = Drives::new();
    let before = fs::read(drives.at(SECOND)).unwrap();
    let source = demo_checkpoint();
    let words = ["name of volume 2 of 2", "Choose another name"];
    assert_fails(&drives.run(&["restripe", "m.sluice", "--into", SECOND, "--overwrite"]), 2, &words);
    assert_fails(&drives.run(&["convert", source.to_str().unwrap(), SECOND, "--overwrite"]), 2, &words);
    assert_fails(&drives.run(&["synth", source.to_str().unwrap(), SECOND, "--overwrite"]), 2, &words);
    assert!(fs::read(drives.at(SECOND)).unwrap() == before);
}

/// What is left by a program that was killed when all was written is removed, and what it did not come to is done.
#[test]
fn a_repeated_restripe_has_nothing_to_do() {
    let drives = Drives::new();
    stdout(&drives.run(&["run", "m.sluice", "--prompt-ids", "5,6,7", "-n", "2"]));
    fs::write(drives.at("a/m.sluice.partial.journal"), b"SLJRNL\x04\n").unwrap();
    fs::write(drives.at("a/m.sluice.counts.77-0"), "").unwrap();
    let again = stdout(&drives.run(&["restripe", "m.sluice", "--volumes", "a,b", "--shares", "1,1"]));
    assert!(again.contains("nothing to do") && again.contains(FIRST), "{again}");
    let names = fs::read_dir(drives.at("a")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(names, ["m-00001-of-00002.sluice", "m.sluice.counts"]);
    assert_eq!(fs::read(drives.at("a/m.sluice.counts")).unwrap(), fs::read(drives.at("m.sluice.counts")).unwrap());
}

/// A name without a folder can be one of the folder of models too, which must not hide that a volume is missing.
#[test]
fn of_a_bare_name_too_the_missing_volume_is_named() {
    let drives = Drives::new();
    let first = "m-00001-of-00002.sluice";
    fs::create_dir_all(drives.at("home/models")).unwrap();
    fs::rename(drives.at(SECOND), drives.at("b/n-00002-of-00002.sluice")).unwrap();
    let run = |name: &str, words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(["run", name, "--prompt-ids", "5"]).env("SLUICE_HOME", drives.at("home"));
        let output = command.current_dir(drives.at("b")).stdin(Stdio::null()).output().unwrap();
        assert_fails(&output, 1, words);
    };
    run(first, &[first, "SLUICE_VOLUMES"]);
    run("n.sluice", &["n-00001-of-00002.sluice", "SLUICE_VOLUMES"]);
    run("m.sluice", &["no model of that name"]);
    fs::rename(drives.at("b/n-00002-of-00002.sluice"), drives.at("home/models/m-00002-of-00002.sluice")).unwrap();
    run("m.sluice", &[&format!("home/models/{first}"), "SLUICE_VOLUMES"]);
    run("m", &[&format!("home/models/{first}"), "SLUICE_VOLUMES"]);
    run("n", &["no model of that name"]);
}

#[test]
fn what_cannot_be_done_is_said_as_it_is() {
    let drives = Drives::new();
    let fails = |args: &[&str], words: &[&str]| {
        let output = drives.run(args);
        assert_ne!(output.status.code(), Some(0), "{args:?}");
        words.iter().for_each(|word| assert!(stderr(&output).contains(word), "{args:?}: {}", stderr(&output)));
        stderr(&output)
    };
    fails(&["restripe", "m.sluice", "--volumes", "a,m.sluice"], &["m.sluice is not a folder"]);
    let into = fails(&["restripe", "m.sluice", "--into", "nodir/x.sluice"], &["the folder nodir does not exist"]);
    assert!(!into.contains("partial"), "{into}");
    let twice = fails(&["restripe", "m.sluice", "--volumes", "a,./a/"], &["named twice"]);
    assert!(!twice.contains("measured"), "{twice}");
    fs::write(drives.at("n.sluice.partial"), "").unwrap();
    let unfinished =
        fails(&["run", "n.sluice", "--prompt-ids", "5"], &["n.sluice is not finished", "same command again"]);
    assert!(!unfinished.contains("did you mean"), "{unfinished}");
    fails(
        &["run", "m.sluice", "--prompt-ids", "5", "--drafts", "off", "--draft-tokens", "3"],
        &["--draft-tokens 3 would change nothing", "--drafts lookup"],
    );
    // The last table of a volume; each volume has a copy of it.
    let mut second = fs::read(drives.at(SECOND)).unwrap();
    let table = second.len() - 4096;
    second[table] ^= 1;
    fs::write(drives.at(SECOND), second).unwrap();
    let verified = drives.run(&["verify", FIRST]);
    let said = stderr(&verified);
    assert!(said.contains("1 table of its volumes is damaged") && !said.contains("extent"), "{said}");
    let damaged = format!("the metadata of {}", Path::new("a/../b").join(SECOND_NAME).display());
    let said = String::from_utf8(verified.stdout).unwrap();
    assert!(said.contains(&damaged), "{said}");
}

#[test]
fn shares_that_pages_cannot_give_are_said_to_be_rounded() {
    let drives = Drives::new();
    let made = drives.run(&["restripe", "m.sluice", "--volumes", "other,b", "--shares", "100,1"]);
    assert_fails(&made, 2, &["exists already"]);
    fs::create_dir(drives.at("c")).unwrap();
    let made = drives.run(&["restripe", "m.sluice", "--volumes", "other,c", "--shares", "100,1"]);
    assert!(
        stderr(&made).contains("whole pages of 4096 bytes") && stderr(&made).contains("1 volume only"),
        "{}",
        stderr(&made)
    );
    let said = stdout(&drives.run(&["inspect", "other/m-00001-of-00002.sluice"]));
    assert!(
        said.contains("of 2 volumes, because experts are divided in whole pages") && !said.contains("uses all"),
        "{said}"
    );
    let said = stdout(&sluice(&["inspect", &drives.at(FIRST)]));
    assert!(said.contains("each read uses all volumes"), "{said}");
}

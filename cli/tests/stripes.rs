//! Models that are striped over folders, from the command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

struct Drives {
    dir: tempfile::TempDir,
}

impl Drives {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        ["a", "b"].iter().for_each(|name| fs::create_dir(dir.path().join(name)).unwrap());
        Drives { dir }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn list(&self) -> String {
        format!("{},{}", self.at("a"), self.at("b"))
    }
}

const RUN: [&str; 5] = ["--prompt-ids", "5,6,7", "-n", "6", "--ids"];

fn ids(model: &str) -> String {
    stdout(&sluice(&[&["run", model], &RUN[..]].concat()))
}

#[test]
fn there_and_back() {
    let drives = Drives::new();
    let whole = drives.at("m.sluice");
    fs::copy(demo_model(), &whole).unwrap();
    let want = ids(&whole);
    let restriped = sluice(&["restripe", &whole, "--volumes", &drives.list(), "--shares", "2,1"]);
    assert!(stdout(&restriped).contains("m-00001-of-00002.sluice"));
    assert!(!stderr(&restriped).contains("equal shares"));
    let on_one = format!("{} and {} are on one drive", drives.at("a"), drives.at("b"));
    assert_eq!(stderr(&restriped).matches(&on_one).count(), 1, "{}", stderr(&restriped));
    let (first, second) = (drives.at("a/m-00001-of-00002.sluice"), drives.at("b/m-00002-of-00002.sluice"));
    assert_eq!(ids(&first), want);
    let again = stdout(&sluice(&["restripe", &first, "--volumes", &drives.list(), "--shares", "2,1"]));
    assert!(again.contains("nothing to do"), "{again}");

    let inspected = json(&sluice(&["inspect", &first, "--extents", "--json"]));
    assert_eq!(inspected["volumes"], serde_json::json!([first, second]));
    let shares = inspected["expert_shares"].as_array().unwrap();
    assert!((shares[0].as_f64().unwrap() - 2.0 / 3.0).abs() < 0.05, "{shares:?}");
    let striped = inspected["extents"].as_array().unwrap().iter().filter(|e| e["stripes"].is_array()).count();
    assert!(striped > 0);
    let said = stdout(&sluice(&["inspect", &first, "--extents"]));
    assert!(said.contains("each read uses all volumes") && said.contains("  in volume 2"), "{said}");
    assert_eq!(json(&sluice(&["verify", &first, "--json"]))["intact"], true);
    stdout(&sluice(&["plan", &first]));
    let examined = sluice(&["doctor", &first, "--json"]);
    let findings = serde_json::from_slice::<serde_json::Value>(&examined.stdout).unwrap()["findings"].clone();
    for volume in [&first, &second] {
        let of_volume = |finding: &&serde_json::Value| finding["volume"] == **volume && finding["of"] == "direct reads";
        assert_eq!(findings.as_array().unwrap().iter().filter(of_volume).count(), 1, "{volume}: {findings}");
    }

    let joined = drives.at("joined.sluice");
    stdout(&sluice(&["restripe", &first, "--into", &joined]));
    assert!(fs::read(&joined).unwrap() == fs::read(&whole).unwrap());
    assert_fails(&sluice(&["restripe", &first]), 2, &["--into", "--volumes <DIR1,DIR2…>"]);
    assert_fails(&sluice(&["restripe", &first, "--into", "x", "--volumes", "a,b"]), 2, &["--into"]);
}

#[test]
fn converted_so_and_named_without_numbers() {
    let drives = Drives::new();
    let source = demo_checkpoint();
    let source = source.to_str().unwrap();
    let types = ["--type", "f32", "--dense-type", "f32"];
    let convert = |dst: &str, more: &[&str]| sluice(&[&["convert", source, dst], &types[..], more].concat());
    let list = drives.list();
    // Whoever runs this may have measured the drive.
    let mut unmeasured = Command::new(env!("CARGO_BIN_EXE_sluice"));
    unmeasured.env("XDG_CACHE_HOME", drives.at("cache")).env("HOME", drives.at("home")).stdin(Stdio::null());
    unmeasured.args(["convert", source, "m.sluice", "--volumes", &list, "--json"]).args(types);
    let made = unmeasured.output().unwrap();
    assert!(stderr(&made).contains("has not been measured, so all drives get equal shares"), "{}", stderr(&made));
    let files = json(&made)["files"].clone();
    assert_eq!(
        files,
        serde_json::json!([drives.at("a/m-00001-of-00002.sluice"), drives.at("b/m-00002-of-00002.sluice")])
    );
    assert_eq!(ids(&drives.at("a/m.sluice")), ids(demo_model()));
    assert_fails(&convert("m.sluice", &["--volumes", &list]), 2, &["exists already"]);
    // What makes no sense.
    assert_fails(&convert(&drives.at("m.sluice"), &["--volumes", &list]), 2, &["without a folder"]);
    let nowhere = format!("{},{}", drives.at("a"), drives.at("nowhere"));
    assert_fails(&convert("n.sluice", &["--volumes", &nowhere]), 1, &["nowhere"]);
    assert_fails(&convert("n.sluice", &["--volumes", &drives.at("a")]), 2, &["one folder", "2 to 16"]);
    let twice = format!("{0},{0}", drives.at("a"));
    assert_fails(&convert("n.sluice", &["--volumes", &twice, "--shares", "1,1"]), 2, &["named twice"]);
    assert_fails(
        &convert("n.sluice", &["--volumes", &list, "--shares", "1,2,3"]),
        2,
        &["3 shares for 2 folders", "--shares 1,1"],
    );
    assert_fails(&convert("n.sluice", &["--volumes", &list, "--shares", "1"]), 2, &["1 share for 2 folders"]);
    assert_fails(&convert("n.sluice", &["--volumes", &list, "--shares", "0,1"]), 2, &["--shares"]);
    assert_fails(&convert("n.sluice", &["--shares", "1,1"]), 2, &["--volumes"]);
    assert_fails(&convert("n.sluice", &["--volumes", &list, "--split-size", "1GB"]), 2, &["--split-size"]);
    let names = fs::read_dir(drives.at("a")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.into_iter().any(|name| name.starts_with('n')), "nothing is left of what was refused");
}

#[test]
fn a_volume_that_is_missing_moved_foreign_or_damaged_is_named() {
    let drives = Drives::new();
    let made = |name: &str, shares: &str| {
        let whole = drives.at(name);
        fs::copy(demo_model(), &whole).unwrap();
        stdout(&sluice(&["restripe", &whole, "--volumes", &drives.list(), "--shares", shares]));
    };
    made("m.sluice", "1,1");
    let (first, second) = (drives.at("a/m-00001-of-00002.sluice"), drives.at("b/m-00002-of-00002.sluice"));
    let want = ids(&first);
    // Its drive is mounted elsewhere.
    fs::rename(drives.at("b"), drives.at("c")).unwrap();
    assert_fails(&sluice(&["inspect", &first]), 1, &[&second, "is missing", "SLUICE_VOLUMES"]);
    assert_fails(&sluice(&["inspect", &second]), 1, &[&second, "it is one of the 2 volumes", "SLUICE_VOLUMES"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    let folders = format!("{}:{}", drives.at("nowhere"), drives.at("c"));
    command.args(["run", &first]).args(RUN).env("SLUICE_VOLUMES", folders).stdin(Stdio::null());
    assert_eq!(stdout(&command.output().unwrap()), want);
    // So are both, and the first is named as it was, with its number or without.
    fs::rename(drives.at("a"), drives.at("d")).unwrap();
    for named in [&first, &drives.at("a/m.sluice"), &drives.at("m.sluice")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        let folders = format!("{}:{}", drives.at("c"), drives.at("d"));
        command.args(["run", named]).args(RUN).env("SLUICE_VOLUMES", folders).stdin(Stdio::null());
        assert_eq!(stdout(&command.output().unwrap()), want, "{named}");
    }
    assert_fails(&sluice(&["inspect", &first]), 1, &[&first]);
    fs::rename(drives.at("d"), drives.at("a")).unwrap();
    fs::rename(drives.at("c"), drives.at("b")).unwrap();
    // Damaged: volume and offset.
    let file = json(&sluice(&["inspect", &first, "--extents", "--json"]));
    let extent = file["extents"].as_array().unwrap().iter().rfind(|e| e["stripes"].is_array()).unwrap();
    let offset = extent["stripes"][1]["offset"].as_u64().unwrap();
    let sound = fs::read(&second).unwrap();
    let mut damaged = sound.clone();
    damaged[offset as usize + 9] ^= 1;
    fs::write(&second, &damaged).unwrap();
    let verified = sluice(&["verify", &first]);
    assert_eq!(verified.status.code(), Some(1));
    let said = String::from_utf8(verified.stdout).unwrap();
    let expect = format!("damaged: {} at offset {offset} of {second}", extent["name"].as_str().unwrap());
    assert!(said.contains(&expect), "{said}");
    // Of another conversion.
    made("n.sluice", "2,1");
    fs::copy(drives.at("b/n-00002-of-00002.sluice"), &second).unwrap();
    assert_fails(&sluice(&["run", &first, "--prompt-ids", "5"]), 1, &[&second, "not of the same model"]);
    fs::write(&second, sound).unwrap();
    assert_eq!(ids(&first), want);
}

/// `list` counts the volumes on other drives, and `rm` removes them; of a model that is not whole, only what is known to be its own.
#[test]
fn listed_and_removed_with_all_volumes() {
    let drives = Drives::new();
    let home = drives.at("home");
    let models = PathBuf::from(&home).join("models");
    fs::create_dir_all(&models).unwrap();
    fs::copy(demo_model(), drives.at("m.sluice")).unwrap();
    let list = format!("{},{}", models.display(), drives.at("b"));
    stdout(&sluice(&["restripe", &drives.at("m.sluice"), "--volumes", &list, "--shares", "1,1"]));
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(args).env("SLUICE_HOME", &home).stdin(Stdio::null()).output().unwrap()
    };
    let listed = json(&run(&["list", "--json"]));
    let bytes = listed["models"][0]["bytes"].as_u64().unwrap();
    let first = models.join("m-00001-of-00002.sluice");
    let of_first = fs::metadata(&first).unwrap().len();
    assert!(bytes > of_first * 3 / 2, "{bytes} of {of_first}");
    let second = drives.at("b/m-00002-of-00002.sluice");
    assert!(Path::new(&second).exists());
    // Another model of that name: which one is meant has to be said.
    let whole = models.join("m.sluice");
    fs::copy(demo_model(), &whole).unwrap();
    let listed = stdout(&run(&["list"]));
    assert!([&first, &whole].iter().all(|path| listed.contains(path.to_str().unwrap())), "{listed}");
    assert_fails(&run(&["rm", "m", "--yes"]), 2, &["several models", first.to_str().unwrap(), whole.to_str().unwrap()]);
    assert!(first.exists() && Path::new(&second).exists() && whole.exists());
    stdout(&run(&["rm", whole.to_str().unwrap(), "--yes"]));
    assert!(!whole.exists() && !stdout(&run(&["list"])).contains(first.to_str().unwrap()));
    stdout(&run(&["rm", "m", "--yes"]));
    assert!(!first.exists() && !Path::new(&second).exists());
}

/// What a link leads to stays, and so do the volumes of a copy that `SLUICE_VOLUMES` names.
#[test]
fn what_lies_behind_a_link_or_belongs_to_a_copy_is_not_removed() {
    let drives = Drives::new();
    let home = drives.at("home");
    let models = PathBuf::from(&home).join("models");
    fs::create_dir_all(&models).unwrap();
    fs::copy(demo_model(), drives.at("m.sluice")).unwrap();
    stdout(&sluice(&["restripe", &drives.at("m.sluice"), "--volumes", &drives.list(), "--shares", "1,1"]));
    let [first, second] = ["a/m-00001-of-00002.sluice", "b/m-00002-of-00002.sluice"].map(|name| drives.at(name));
    let beside = drives.at("a/m-00002-of-00002.sluice");
    fs::copy(&second, &beside).unwrap();
    let remove = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(["rm", "m", "--yes"]).env("SLUICE_HOME", &home).env("SLUICE_VOLUMES", drives.at("a"));
        let removed = command.stdin(Stdio::null()).output().unwrap();
        assert!([&first, &second, &beside].iter().all(|file| Path::new(file).exists()), "{removed:?}");
        (stdout(&removed), String::from_utf8(removed.stderr).unwrap())
    };
    let [link, other] = ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"].map(|name| models.join(name));
    for other_is_linked in [false, true] {
        std::os::unix::fs::symlink(&first, &link).unwrap();
        if other_is_linked {
            std::os::unix::fs::symlink(&second, &other).unwrap();
        }
        let (said, noted) = remove();
        assert!(said.contains(", 0 B") && noted.contains("m-00001-of-00002.sluice and 1 more"), "{said}{noted}");
        assert_eq!(fs::read_dir(&models).unwrap().count(), 0);
    }
    // A copy, whose own second volume is beside its first.
    fs::copy(&first, &link).unwrap();
    fs::copy(&second, &other).unwrap();
    remove();
    assert_eq!(fs::read_dir(&models).unwrap().count(), 0);
}

/// The simulated drive of each volume works at the same time; what that gives is measured, not tested.
#[test]
fn simulated_drives_are_one_for_each_volume() {
    let drives = Drives::new();
    let geometry = demo_checkpoint();
    let whole = drives.at("m.sluice");
    stdout(&sluice(&["synth", geometry.to_str().unwrap(), &whole]));
    stdout(&sluice(&["restripe", &whole, "--volumes", &drives.list(), "--shares", "2,1"]));
    let first = drives.at("a/m-00001-of-00002.sluice");
    let bench =
        |more: &[&str]| sluice(&[&["bench", "decode", &first, "-n", "2", "--warm-up", "1", "--json"], more].concat());
    let found = json(&bench(&["--drive", "4GB/s", "--drive", "2GB/s"]));
    assert_eq!(found[0]["drive"]["drives"], 2);
    let rate = found[0]["drive"]["bytes_per_second"].as_f64().unwrap();
    // These experts have few pages, which cannot be divided by two and one.
    assert!((4.5e9..6.1e9).contains(&rate), "{rate}");
    assert_eq!(json(&bench(&["--drive", "4GB/s"]))[0]["drive"]["drives"], 2);
    let three = ["--drive", "4GB/s", "--drive", "2GB/s", "--drive", "2GB/s"];
    assert_fails(&bench(&three), 2, &["given 3 times"]);
}

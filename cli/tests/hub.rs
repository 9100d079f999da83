//! The program and the hub: a server on this machine that does what lines and servers do, and a program that is killed.

use crate::common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::common::{assert_fails, demo_checkpoint, json, stderr, stdout};
use crate::hub_common::server::{Faults, Files, Server};
use crate::hub_common::shards;
use crate::hub_common::watch::Watch;

/// A program that knows this server, with a folder of models of its own.
fn command(server: &Server, home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    for variable in [
        "HF_TOKEN",
        "HF_HOME",
        "HF_TOKEN_PATH",
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
        "XDG_DATA_HOME",
    ] {
        command.env_remove(variable);
    }
    command.env("HF_ENDPOINT", &server.address).env("SLUICE_HOME", home).env("HOME", home).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn sluice(server: &Server, home: &Path, args: &[&str]) -> Output {
    command(server, home, args).output().unwrap()
}

/// The demo model in several files.
fn files(count: usize) -> Files {
    shards::of_folder(&demo_checkpoint(), count)
}

/// What a conversion of the same files in a folder writes.
fn local(files: &Files, folder: &Path) -> Vec<u8> {
    let src = folder.join("checkpoint");
    fs::create_dir_all(&src).unwrap();
    files.iter().for_each(|(path, bytes)| fs::write(src.join(path), bytes).unwrap());
    let dst = folder.join("local.sluice");
    stdout(&common::sluice(&["convert", src.to_str().unwrap(), dst.to_str().unwrap()]));
    fs::read(dst).unwrap()
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().unwrap())
}

/// 20 kills on a line that breaks (`SLUICE_HUB_KILLS` for more), each while files are downloaded and converted; in the end the branch
/// moves on. The result is that of a local conversion, and no more than three files were here at once.
#[test]
fn a_conversion_that_is_killed_again_and_again_is_the_local_one() {
    let kills = number("SLUICE_HUB_KILLS", 20);
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files(12));
    let expected = local(&files, folder.path());
    server.commit("a/b", files.clone());
    server.faults(Faults { cut: 50, busy: 20, failing: 20, wrong_length: 20, expired: 20 });
    let dst = folder.path().join("killed.sluice");
    let source = folder.path().join("killed.sluice.partial.source");
    let args = ["convert", "hf:a/b", dst.to_str().unwrap()];
    let watch = Watch::new(source.clone());
    server.slow_down(1000);
    let (mut whole, mut killed) = (0, 0);
    while killed < kills {
        server.damage(&format!("model-{:05}-of-00012.safetensors", killed % 12 + 1), 1);
        let seen = || server.seen().requests.load(Ordering::Relaxed);
        let pin = || source.join(".sluice-download").metadata().and_then(|m| m.modified()).ok();
        let before = pin();
        let mut child = command(&server, folder.path(), &args).spawn().unwrap();
        while pin() == before && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_micros(200));
        }
        // What it was planned by has been read, and it has noted its commit: it begins. After some more requests, it ends.
        let last = seen() + killed * 7 % 40;
        while seen() < last && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_micros(200));
        }
        // The last kill leaves something to do.
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            killed += u64::from(!child.wait().unwrap().success());
        }
        if dst.exists() {
            assert!(fs::read(&dst).unwrap() == expected, "after {killed} kills");
            fs::remove_file(&dst).unwrap();
            let _ = fs::remove_dir_all(&source);
            whole += 1;
        }
    }
    server.slow_down(0);
    let was_pinned = source.join(".sluice-download").metadata().is_ok_and(|m| m.len() > 0);
    if was_pinned {
        server.commit("a/b", self::files(3));
    }
    let output = sluice(&server, folder.path(), &args);
    stdout(&output);
    assert!(!was_pinned || stderr(&output).contains("has moved on"), "{}", stderr(&output));
    let most = watch.most();
    assert!(fs::read(&dst).unwrap() == expected, "after {killed} kills");
    let weights = files.iter().filter(|(path, _)| path.contains(".safetensors"));
    let mut sizes: Vec<u64> = weights.map(|(_, bytes)| bytes.len() as u64).collect();
    sizes.sort_unstable();
    // Lists of pieces are counted too.
    let allowed = sizes.iter().rev().take(3).sum::<u64>() + 3 * 4096;
    println!(
        "{killed} kills, {whole} conversions whole in between, at most {most} bytes of downloads, {allowed} allowed"
    );
    assert!(most <= allowed, "{most} bytes of downloads at once, {allowed} at most, after {killed} kills");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn names_of_the_hub_stand_for_model_files() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start();
    server.commit("a/b", files(3));
    let run = |args: &[&str]| sluice(&server, home.path(), args);
    assert_fails(&run(&["run", "hf:a/b", "--prompt", "To be"]), 1, &["hf:a/b", "sluice convert hf:a/b", "--yes"]);
    assert_fails(&run(&["inspect", "hf:a b"]), 2, &["is no name"]);
    let dry = run(&["convert", "hf:a/b", "--dry-run"]);
    for word in ["download", "model file", "memory", "at least"] {
        assert!(stdout(&dry).contains(word), "{}", stdout(&dry));
    }
    let text = stdout(&run(&["run", "hf:a/b", "--yes", "--prompt", "To be", "-n", "4", "--temperature", "0"]));
    assert!(!text.is_empty());
    let requests = server.seen().requests.load(Ordering::Relaxed);
    assert_eq!(stdout(&run(&["run", "hf:a/b", "--prompt", "To be", "-n", "4", "--temperature", "0"])), text);
    stdout(&run(&["inspect", "hf:a/b"]));
    stdout(&run(&["verify", "hf:a/b"]));
    stdout(&run(&["plan", "hf:a/b"]));
    let text = home.path().join("text.txt");
    fs::write(&text, "To be, or not to be, that is the question.").unwrap();
    stdout(&run(&["compare", "hf:a/b", "hf:a/b", "--text", text.to_str().unwrap()]));
    stdout(&run(&["upgrade", "hf:a/b"]));
    assert_eq!(server.seen().requests.load(Ordering::Relaxed), requests, "what is here is not asked for");
    let list = json(&run(&["list", "--json"]));
    assert_eq!(list["models"][0]["name"], "hf:a/b");
    assert!(stdout(&run(&["list"])).contains("hf:a/b"));
    stdout(&run(&["convert", "hf:a/b", "--dense-type", "q8"]));
    assert_eq!(json(&run(&["list", "--json"]))["models"].as_array().unwrap().len(), 2);
    stdout(&run(&["rm", "hf:a/b", "--yes"]));
    assert_fails(&run(&["rm", "hf:a/b", "--yes"]), 1, &["no model called", "sluice list"]);
    assert_eq!(json(&run(&["list", "--json"]))["models"].as_array().unwrap().len(), 1);
}

#[test]
fn pull_makes_a_folder_that_convert_takes() {
    let home = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files(3));
    let expected = local(&files, home.path());
    server.commit("a/b", files.clone());
    server.gate("a/b");
    let to = home.path().join("b");
    let args = ["pull", "a/b", "--to", to.to_str().unwrap()];
    assert_fails(&sluice(&server, home.path(), &args), 1, &["gated", "HF_TOKEN"]);
    let offline = command(&server, home.path(), &args).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_fails(&offline, 1, &["HF_HUB_OFFLINE"]);
    let pulled =
        command(&server, home.path(), &args).env("HF_TOKEN", crate::hub_common::server::TOKEN).output().unwrap();
    assert!(stdout(&pulled).contains("verified"), "{}", stdout(&pulled));
    assert!(!server.seen().token_leaked.load(Ordering::Relaxed));
    let dst = home.path().join("pulled.sluice");
    stdout(&sluice(&server, home.path(), &["convert", to.to_str().unwrap(), dst.to_str().unwrap()]));
    assert!(fs::read(dst).unwrap() == expected);
    let some = home.path().join("some");
    let args = ["pull", "hf:a/b", "--to", some.to_str().unwrap(), "--include", "*.json", "--exclude", "tok*", "--json"];
    let pulled =
        command(&server, home.path(), &args).env("HF_TOKEN", crate::hub_common::server::TOKEN).output().unwrap();
    let wanted = files.keys().filter(|p| p.ends_with(".json") && !p.starts_with("tok")).count();
    assert_eq!(json(&pulled)["files"], wanted);
}

/// What is measured on the way reads each layer before its extents are made: of files that are fetched, too.
#[test]
fn a_conversion_that_measures_is_the_local_one() {
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files(5));
    local(&files, folder.path());
    server.commit("a/b", files);
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let types = ["--dense-type", "q4"];
    stdout(&common::sluice(&[&["convert", &at("checkpoint"), &at("here.sluice")], &types[..]].concat()));
    let there = at("there.sluice");
    let args = [&["convert", "hf:a/b", &there], &types[..]].concat();
    // Killed when it has measured and converted some: a line that is slow leaves the time to see it.
    server.slow_down(2000);
    let mut child = command(&server, folder.path(), &args).spawn().unwrap();
    let journal = folder.path().join("there.sluice.partial.journal");
    while journal.metadata().map_or(0, |found| found.len()) == 0 && child.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    child.wait().unwrap();
    server.slow_down(0);
    if !folder.path().join("there.sluice").exists() {
        stdout(&sluice(&server, folder.path(), &args));
    }
    assert!(fs::read(at("there.sluice")).unwrap() == fs::read(at("here.sluice")).unwrap());
}

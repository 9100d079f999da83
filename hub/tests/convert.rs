//! Conversions straight from the hub write what conversions of the same files on the drive write.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::server::{Faults, Files, Server};
use common::{client, shards};
use sluice_converter::{ConvertError, Options, convert, convert_plan, plan_source};
use sluice_hub::{HubConversion, HubError};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");

/// A checkpoint of the fixtures, its weights distributed over shards.
fn files(name: &str, count: usize) -> Files {
    shards::of_folder(&Path::new(GOLDEN).join(name), count)
}

/// What a conversion of the same files in a folder writes.
fn local(files: &Files, folder: &Path) -> Vec<u8> {
    let src = folder.join("local");
    fs::create_dir_all(&src).unwrap();
    for (path, bytes) in files {
        fs::write(src.join(path), bytes).unwrap();
    }
    convert(&src, &folder.join("local.sluice"), &Options::default(), &()).unwrap();
    fs::read(folder.join("local.sluice")).unwrap()
}

fn remote(server: &Server, dst: &Path, keep: bool) -> Result<Option<PathBuf>, String> {
    let reference = "hf:a/b".parse().unwrap();
    let hub = HubConversion::prepare(client(server), &reference, dst, keep, Arc::new(())).map_err(|e| e.to_string())?;
    let plan = plan_source(hub.source(), &Options::default()).map_err(|e| e.to_string())?;
    hub.begin().map_err(|e| e.to_string())?;
    convert_plan(&plan, dst, &()).map_err(|e| e.to_string())?;
    hub.finish(dst).map_err(|e| e.to_string())
}

fn shard_bytes(files: &Files) -> Vec<u64> {
    files.iter().filter(|(p, _)| p.ends_with(".safetensors")).map(|(_, b)| b.len() as u64).collect()
}

/// Watches how much of the folder's downloads is on the drive, until it is dropped.
struct Watch {
    over: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    fn new(folder: PathBuf) -> Watch {
        let (over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, peak) = (Arc::clone(&over), Arc::clone(&most));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
                let bytes = entries.filter(|e| e.file_name().to_string_lossy().contains(".safetensors"));
                let bytes = bytes.filter_map(|e| e.metadata().ok()).map(|m| m.len().max(m.blocks() * 512)).sum();
                peak.fetch_max(bytes, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(200));
            }
        });
        Watch { over, most, thread: Some(thread) }
    }

    fn most(mut self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.most.load(Ordering::Relaxed)
    }
}

#[test]
fn the_result_is_that_of_a_local_conversion_and_few_files_are_here_at_once() {
    for name in ["mixtral", "qwen3_moe", "deepseek_v3"] {
        let folder = tempfile::tempdir().unwrap();
        let (server, files) = (Server::start(), files(name, 7));
        server.commit("a/b", files.clone());
        server.faults(Faults { cut: 50, busy: 20, failing: 20, wrong_length: 20, expired: 20 });
        let dst = folder.path().join("remote.sluice");
        let watch = Watch::new(folder.path().join("remote.sluice.partial.source"));
        remote(&server, &dst, false).unwrap();
        let most = watch.most();
        assert!(fs::read(&dst).unwrap() == local(&files, folder.path()), "{name}");
        let mut sizes = shard_bytes(&files);
        sizes.sort_unstable();
        // Lists of pieces, and what filesystems round up.
        let allowed = sizes.iter().rev().take(3).sum::<u64>() + 3 * (16 << 10);
        assert!(most <= allowed, "{name}: {most} bytes of downloads at once, {allowed} at most");
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }
}

#[test]
fn kept_files_are_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files("mixtral", 3));
    server.commit("a/b", files.clone());
    let kept = remote(&server, &folder.path().join("m.sluice"), true).unwrap().unwrap();
    assert_eq!(kept, folder.path().join("m.sluice.source"));
    for (path, bytes) in &files {
        assert!(fs::read(kept.join(path)).unwrap() == *bytes, "{path}");
    }
    assert_eq!(fs::read_dir(kept).unwrap().count(), files.len());
}

#[test]
fn a_failed_conversion_goes_on_with_its_commit() {
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files("mixtral", 5));
    server.commit("a/b", files.clone());
    let dst = folder.path().join("m.sluice");
    server.damage("model-00004-of-00005.safetensors", 99);
    let error = remote(&server, &dst, false).unwrap_err();
    assert!(error.contains("model-00004") && error.contains("SHA-256"), "{error}");
    // Another model has taken the name.
    server.commit("a/b", self::files("qwen3_moe", 2));
    server.damage("model-00004-of-00005.safetensors", 0);
    let before = server.seen().bytes.load(Ordering::Relaxed);
    remote(&server, &dst, false).unwrap();
    assert!(fs::read(&dst).unwrap() == local(&files, folder.path()));
    let again = server.seen().bytes.load(Ordering::Relaxed) - before;
    let (all, heads) = (shard_bytes(&files).iter().sum::<u64>(), 5 * (128 << 10) + (64 << 10));
    assert!(again < all + heads, "{again} of {all} bytes came again");
}

#[test]
fn repositories_that_are_no_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start();
    let dst = folder.path().join("m.sluice");
    let mut files = files("mixtral", 2);
    files.remove("config.json");
    server.commit("a/b", files);
    assert!(remote(&server, &dst, false).unwrap_err().contains("config.json"));
    server.commit("a/b", Files::from([("README.md".to_owned(), b"x".to_vec())]));
    assert!(remote(&server, &dst, false).unwrap_err().contains("no safetensors or GGUF"));
    let mut torn = self::files("mixtral", 2);
    torn.insert("model-00001-of-00002.safetensors".into(), b"<html>".to_vec());
    server.commit("a/b", torn);
    assert!(remote(&server, &dst, false).unwrap_err().contains("model-00001"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was begun");
    let _: fn(HubError) -> ConvertError = |e| ConvertError::Fetch(Arc::new(e));
}

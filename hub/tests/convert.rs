//! Conversions straight from the hub write what conversions of the same files on the drive write.

mod common;

use std::fs;
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
    remote_of(server, "hf:a/b", dst, keep)
}

fn remote_of(server: &Server, name: &str, dst: &Path, keep: bool) -> Result<Option<PathBuf>, String> {
    let reference = name.parse().unwrap();
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
                let named: u64 = bytes.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum();
                let bytes = named + unnamed(&folder);
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

/// Bytes of files of a folder that have been deleted and are still open, which keeps their space.
fn unnamed(folder: &Path) -> u64 {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten().map(|e| e.path());
    let is_deleted = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default().to_string_lossy().into_owned();
        target.starts_with(folder.to_str().unwrap())
            && target.ends_with(" (deleted)")
            && target.contains(".safetensors")
    };
    entries.filter(is_deleted).filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum()
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
        // With lists of pieces.
        let allowed = sizes.iter().rev().take(3).sum::<u64>();
        println!("{name}: {most} bytes of downloads at once, {} in all", sizes.iter().sum::<u64>());
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

/// A text as GGUF has it.
fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Two parts of a GGUF model: a dense one of two layers in f32.
fn gguf() -> Files {
    let (width, inner, vocabulary) = (32u64, 64u64, 40u64);
    let mut tensors = vec![("token_embd.weight".to_owned(), vec![width, vocabulary])];
    for layer in 0..2 {
        let shapes: [(&str, &[u64]); 9] = [
            ("attn_norm", &[width]),
            ("attn_q", &[width, width]),
            ("attn_k", &[width, width]),
            ("attn_v", &[width, width]),
            ("attn_output", &[width, width]),
            ("ffn_norm", &[width]),
            ("ffn_gate", &[width, inner]),
            ("ffn_up", &[width, inner]),
            ("ffn_down", &[inner, width]),
        ];
        tensors.extend(shapes.map(|(name, shape)| (format!("blk.{layer}.{name}.weight"), shape.to_vec())));
    }
    tensors.push(("output_norm.weight".to_owned(), vec![width]));
    tensors.push(("output.weight".to_owned(), vec![width, vocabulary]));
    let part = |number: u16, own: &[(String, Vec<u64>)]| {
        let mut keys: Vec<u8> = Vec::new();
        let mut count = 0u64;
        let mut key = |name: &str, kind: u32, value: &dyn Fn(&mut Vec<u8>)| {
            text(&mut keys, name);
            keys.extend(kind.to_le_bytes());
            value(&mut keys);
            count += 1;
        };
        if number == 0 {
            key("general.architecture", 8, &|out| text(out, "llama"));
            for (name, value) in [
                ("block_count", 2u32),
                ("context_length", 64),
                ("embedding_length", width as u32),
                ("feed_forward_length", inner as u32),
                ("attention.head_count", 2),
                ("attention.head_count_kv", 2),
                ("rope.dimension_count", 16),
                ("vocab_size", vocabulary as u32),
            ] {
                key(&format!("llama.{name}"), 4, &|out| out.extend(value.to_le_bytes()));
            }
            key("llama.attention.layer_norm_rms_epsilon", 6, &|out| out.extend(1e-5f32.to_le_bytes()));
        }
        key("split.no", 2, &|out| out.extend(number.to_le_bytes()));
        key("split.count", 2, &|out| out.extend(2u16.to_le_bytes()));
        key("split.tensors.count", 5, &|out| out.extend((tensors.len() as i32).to_le_bytes()));
        let mut out = [b"GGUF".as_slice(), &3u32.to_le_bytes(), &(own.len() as u64).to_le_bytes()].concat();
        out.extend(count.to_le_bytes());
        out.extend(keys);
        let mut data: Vec<u8> = Vec::new();
        for (name, shape) in own {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            let values = 0..shape.iter().product::<u64>();
            data.extend(values.flat_map(|i| (((i * 37 + name.len() as u64) % 101) as f32 / 100.0 - 0.5).to_le_bytes()));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        [out, data].concat()
    };
    let (first, second) = tensors.split_at(12);
    let name = |number: usize| format!("F32/tiny-F32-0000{number}-of-00002.gguf");
    Files::from([(name(1), part(0, first)), (name(2), part(1, second)), ("README.md".to_owned(), b"tiny".to_vec())])
}

#[test]
fn gguf_files_of_the_hub_are_those_of_the_drive() {
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), gguf());
    server.commit("a/b", files.clone());
    server.faults(Faults { cut: 50, busy: 20, failing: 20, wrong_length: 20, expired: 20 });
    let src = folder.path().join("src");
    fs::create_dir(&src).unwrap();
    for (path, bytes) in files.iter().filter(|(path, _)| path.ends_with(".gguf")) {
        fs::write(src.join(path.rsplit('/').next().unwrap()), bytes).unwrap();
    }
    let local = folder.path().join("local.sluice");
    convert(&src.join("tiny-F32-00001-of-00002.gguf"), &local, &Options::default(), &()).unwrap();
    let dst = folder.path().join("remote.sluice");
    remote_of(&server, "hf:a/b:f32", &dst, false).unwrap();
    assert!(fs::read(&dst).unwrap() == fs::read(&local).unwrap());
}

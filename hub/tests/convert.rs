//! Conversions straight from the hub write what conversions of the same files on the drive write.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::common::server::{Faults, Files, Server};
use crate::common::watch::Peak;
use crate::common::{client, shards};
use sluice_converter::{ConvertError, Options, convert, convert_plan, plan_source};
use sluice_hub::{Client, HubConversion, HubError, Observer};

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
    observed(client(server), name, dst, keep, Arc::new(()))
}

fn observed(
    client: Arc<Client>,
    name: &str,
    dst: &Path,
    keep: bool,
    observer: Arc<dyn Observer>,
) -> Result<Option<PathBuf>, String> {
    let reference = name.parse().unwrap();
    let hub = HubConversion::prepare(client, &reference, dst, keep, observer).map_err(|e| e.to_string())?;
    let plan = plan_source(hub.source(), &Options::default()).map_err(|e| e.to_string())?;
    hub.begin().map_err(|e| e.to_string())?;
    convert_plan(&plan, dst, &()).map_err(|e| e.to_string())?;
    hub.finish(dst).map_err(|e| e.to_string())
}

fn shard_bytes(files: &Files) -> Vec<u64> {
    files.iter().filter(|(p, _)| p.ends_with(".safetensors")).map(|(_, b)| b.len() as u64).collect()
}

#[test]
fn the_result_is_that_of_a_local_conversion_and_few_files_are_here_at_once() {
    for name in ["mixtral", "qwen3_moe", "deepseek_v3"] {
        let folder = tempfile::tempdir().unwrap();
        let (server, files) = (Server::start(), files(name, 7));
        server.commit("a/b", files.clone());
        server.faults(Faults { cut: 50, busy: 20, failing: 20, wrong_length: 20, expired: 20 });
        let dst = folder.path().join("remote.sluice");
        let peak = Peak::of(folder.path().join("remote.sluice.partial.source"));
        observed(client(&server), "hf:a/b", &dst, false, Arc::clone(&peak) as Arc<dyn Observer>).unwrap();
        let most = peak.most();
        assert!(fs::read(&dst).unwrap() == local(&files, folder.path()), "{name}");
        let mut sizes = shard_bytes(&files);
        sizes.sort_unstable();
        // Lists of pieces are counted too.
        let allowed = sizes.iter().rev().take(3).sum::<u64>() + 3 * 4096;
        println!("{name}: {most} bytes of downloads at once, {} in all", sizes.iter().sum::<u64>());
        assert!(most > 0 && most <= allowed, "{name}: {most} bytes of downloads at once, {allowed} at most");
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

/// Killed when the model file is complete, a conversion leaves its downloads: the next one knows what they are.
#[test]
fn what_is_left_of_a_complete_conversion_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (server, files) = (Server::start(), files("mixtral", 3));
    server.commit("a/b", files.clone());
    let dst = folder.path().join("m.sluice");
    let prepare = |keep| {
        let reference = "hf:a/b".parse().unwrap();
        HubConversion::prepare(client(&server), &reference, &dst, keep, Arc::new(())).unwrap()
    };
    for keep in [false, true] {
        // All but the end of `remote`.
        let hub = prepare(keep);
        let plan = plan_source(hub.source(), &Options::default()).unwrap();
        assert!(!hub.is_unfinished(&dst), "nothing was begun");
        hub.begin().unwrap();
        convert_plan(&plan, &dst, &()).unwrap();
        drop((plan, hub));
        let again = prepare(keep);
        assert!(again.is_unfinished(&dst));
        assert_eq!(again.finish(&dst).unwrap().is_some(), keep);
        assert!(!again.is_unfinished(&dst));
        fs::remove_file(&dst).unwrap();
    }
    let kept = folder.path().join("m.sluice.source");
    assert!(files.iter().all(|(path, bytes)| fs::read(kept.join(path)).unwrap() == *bytes));
    assert_eq!(fs::read_dir(kept).unwrap().count(), files.len());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
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
    let mut without = self::files("mixtral", 2);
    without.remove("model-00002-of-00002.safetensors");
    server.commit("a/b", without);
    let error = remote(&server, &dst, false).unwrap_err();
    assert!(error.contains("model-00002") && error.contains("tell its authors"), "{error}");
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

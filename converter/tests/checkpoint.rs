//! Which files make a checkpoint, and what is said when they do not agree or are something else.

use crate::common;

use std::fs;
use std::path::Path;

use crate::common::safetensors::{Tensor, Tensors, encode, write_dir};
use crate::common::{Content, Synthetic, content, options};
use serde_json::{Value, json};
use sluice_converter::synth::Geometry;
use sluice_converter::{ConvertError, Options, Summary, convert, no_model, plan};

const INDEX: &str = "model.safetensors.index.json";
const HEAD: &str = "lm_head.weight";
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258\
                       daaa5e2ca24d17e2393\nsize 4976698672\n";

/// A checkpoint of two shards with an index.
fn two_shards() -> (tempfile::TempDir, Synthetic, Tensors) {
    let (dir, shape) = (tempfile::tempdir().unwrap(), Synthetic::default());
    let tensors = shape.write(dir.path(), 2);
    (dir, shape, tensors)
}

fn read_index(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(INDEX)).unwrap()).unwrap()
}

fn change_index(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let mut index = read_index(dir);
    change(index["weight_map"].as_object_mut().unwrap());
    fs::write(dir.join(INDEX), index.to_string()).unwrap();
}

fn converted(dir: &Path) -> Result<(Summary, Content), ConvertError> {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("m");
    let summary = convert(dir, &file, &options("keep", "keep"), &())?;
    Ok((summary, content(&file)))
}

fn error(dir: &Path) -> ConvertError {
    plan(dir, &Options::default()).map(|_| ()).unwrap_err()
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    words.iter().for_each(|w| assert!(text.contains(w), "{text} lacks {w}"));
    assert!(!text.contains('\n'), "{text}");
}

/// The one remark.
fn note(summary: &Summary) -> &str {
    let [note] = summary.notes.as_slice() else { panic!("{:?}", summary.notes) };
    note
}

#[test]
fn what_the_index_does_not_name_is_used_or_named() {
    let (dir, ..) = two_shards();
    let (_, want) = converted(dir.path()).unwrap();
    change_index(dir.path(), |map| assert!(map.remove(HEAD).is_some()));
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["used all the same", INDEX, HEAD]);

    // What nobody knows, not even the index, is left out by name; in the index it is an error.
    let (dir, _, mut tensors) = two_shards();
    tensors.insert("extra.weight".into(), Tensor::f32(&[2], [1.0, 2.0]));
    write_dir(dir.path(), &Synthetic::default().config(), &tensors, 2);
    assert!(matches!(error(dir.path()), ConvertError::UnknownTensors { .. }));
    change_index(dir.path(), |map| assert!(map.remove("extra.weight").is_some()));
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["left out", "`extra.weight`"]);
    assert_eq!((summary.left_out[0].tensors, summary.left_out[0].bytes), (1, 8));
}

#[test]
fn an_untied_head_that_is_missing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut tensors = shape.tensors();
    tensors.remove(HEAD);
    for (said, word) in [(json!(false), "false"), (json!(null), "not given"), (Value::Null, "not given")] {
        let mut config = shape.config();
        config["tie_word_embeddings"] = said.clone();
        if said.is_null() {
            config.as_object_mut().unwrap().remove("tie_word_embeddings");
        }
        write_dir(dir.path(), &config, &tensors, 1);
        let error = error(dir.path());
        assert!(matches!(error, ConvertError::NoHead { .. }), "{error}");
        assert_says(&error.to_string(), &[HEAD, word, "`\"tie_word_embeddings\": true`", "config.json"]);
    }
    let mut config = shape.config();
    config["tie_word_embeddings"] = json!(true);
    write_dir(dir.path(), &config, &tensors, 1);
    assert!(converted(dir.path()).unwrap().0.notes.is_empty());
    // Where it may be is said.
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &shape.config(), &tensors, 2);
    change_index(dir.path(), |map| drop(map.insert(HEAD.into(), json!("model-00001-of-000002.safetensors"))));
    assert_says(&error(dir.path()).to_string(), &[HEAD, "places", "model-00001-of-000002.safetensors"]);
    change_index(dir.path(), |map| drop(map.remove(HEAD)));
    fs::write(dir.path().join("head.safetensors"), encode([].into_iter())).unwrap();
    assert_says(&error(dir.path()).to_string(), &[HEAD, INDEX, "does not name `head.safetensors`"]);
}

/// As transformers 5 decides it: a tensor of other numbers is a head of its own, whatever the configuration says.
#[test]
fn a_tied_head_that_differs() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut config = shape.config();
    config["tie_word_embeddings"] = json!(true);
    let mut tensors = shape.tensors();
    write_dir(dir.path(), &shape.config(), &tensors, 1);
    let (_, want) = converted(dir.path()).unwrap();
    write_dir(dir.path(), &config, &tensors, 1);
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["`tie_word_embeddings` is true", HEAD, "other numbers", "transformers 5"]);
    tensors.insert(HEAD.into(), tensors["model.embed_tokens.weight"].clone());
    write_dir(dir.path(), &config, &tensors, 1);
    assert_says(note(&converted(dir.path()).unwrap().0), &[HEAD, "is ignored"]);
    // The last number of many counts too.
    let mut head = tensors[HEAD].clone();
    *head.bytes.last_mut().unwrap() ^= 1;
    tensors.insert(HEAD.into(), head);
    write_dir(dir.path(), &config, &tensors, 1);
    assert_says(note(&converted(dir.path()).unwrap().0), &["other numbers"]);
}

#[test]
fn damaged_files_are_counted() {
    let (dir, shape) = (tempfile::tempdir().unwrap(), Synthetic::default());
    shape.write(dir.path(), 4);
    for n in [1, 3, 4] {
        let path = dir.path().join(format!("model-{n:05}-of-000004.safetensors"));
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    }
    let error = error(dir.path()).to_string();
    assert_says(
        &error,
        &["model-00001-of-000004.safetensors is damaged", "2 more of the 4", "`model-00003", "`model-00004"],
    );
}

#[test]
fn a_single_file_comes_before_an_index() {
    let (dir, shape, _) = two_shards();
    // Other numbers than the shards have.
    let merged: Tensors = shape
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let halved: Vec<f32> = t.values().iter().map(|v| v * 0.5).collect();
            (name, Tensor::bf16(&t.shape, halved))
        })
        .collect();
    fs::write(dir.path().join("model.safetensors"), encode(merged.iter())).unwrap();
    let (summary, both) = converted(dir.path()).unwrap();
    assert_says(note(&summary), &["`model.safetensors` is the model", INDEX, "model-00001-of-000002", "not used"]);
    let alone = tempfile::tempdir().unwrap();
    write_dir(alone.path(), &shape.config(), &merged, 1);
    let (summary, want) = converted(alone.path()).unwrap();
    assert!(both == want && summary.notes.is_empty());

    // The shards of the stale index are gone, or it is damaged.
    fs::remove_file(dir.path().join("model-00001-of-000002.safetensors")).unwrap();
    assert!(converted(dir.path()).unwrap().1 == want);
    fs::write(dir.path().join(INDEX), "{").unwrap();
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &[INDEX, "not used", "not valid"]);
    // MLX writes an index of the one file.
    fs::write(dir.path().join(INDEX), json!({"weight_map": {HEAD: "model.safetensors"}}).to_string()).unwrap();
    assert!(converted(dir.path()).unwrap().0.notes.is_empty());
    // A single file that is not all of the model.
    let part = merged.iter().filter(|(name, _)| !name.contains("layers.2"));
    fs::write(dir.path().join("model.safetensors"), encode(part)).unwrap();
    write_dir(alone.path(), &shape.config(), &merged, 2);
    fs::copy(alone.path().join(INDEX), dir.path().join(INDEX)).unwrap();
    assert_says(&error(dir.path()).to_string(), &["layers.2", "are missing", INDEX, "move `model.safetensors` away"]);
}

#[test]
fn files_whose_tensors_would_all_be_left_out_need_not_be_there() {
    let (dir, ..) = two_shards();
    let (_, want) = converted(dir.path()).unwrap();
    let add = |map: &mut serde_json::Map<String, Value>, name: &str| {
        drop(map.insert(name.into(), json!("extra.safetensors")))
    };
    change_index(dir.path(), |map| {
        add(map, "mtp.layers.0.norm.weight");
        add(map, "model.layers.3.eh_proj.weight");
        add(map, "model.layers.3.self_attn.o_proj.weight");
    });
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(
        note(&summary),
        &["`extra.safetensors` is not there and not needed", "3 tensors", "multi-token prediction"],
    );
    // Whatever is not known to be left out makes it a part of the model.
    change_index(dir.path(), |map| add(map, "model.layers.2.self_attn.new_proj.weight"));
    let error = error(dir.path());
    assert!(matches!(error, ConvertError::Incomplete { missing: 1, total: 3, .. }), "{error}");
    assert_says(&error.to_string(), &["1 of 3", "`extra.safetensors`", "hf download"]);
}

#[test]
fn what_an_index_promises_and_no_file_holds() {
    let (dir, ..) = two_shards();
    let (_, want) = converted(dir.path()).unwrap();
    // It is in the other shard.
    change_index(dir.path(), |map| {
        let other = |file: &str| if file.contains("00001") { "00002" } else { "00001" };
        let new = format!("model-{}-of-000002.safetensors", other(map[HEAD].as_str().unwrap()));
        map.insert(HEAD.into(), json!(new));
    });
    assert!(converted(dir.path()).unwrap().1 == want);
    // Or so far that nothing is left for the file that the index names.
    change_index(dir.path(), |map| drop(map.insert(HEAD.into(), json!("moved.safetensors"))));
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["`moved.safetensors` is not there", "other files"]);
    change_index(dir.path(), |map| drop(map.insert(HEAD.into(), json!("model-00001-of-000002.safetensors"))));
    // It is nowhere, and nobody needs it, or somebody does.
    change_index(dir.path(), |map| drop(map.insert("mtp.norm.weight".into(), map[HEAD].clone())));
    assert!(converted(dir.path()).unwrap().1 == want);
    let (dir, shape, mut tensors) = two_shards();
    let name = "model.layers.1.self_attn.o_proj.weight";
    let index = read_index(dir.path());
    tensors.remove(name);
    write_dir(dir.path(), &shape.config(), &tensors, 2);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    let place = index["weight_map"][name].as_str().unwrap();
    assert_says(&error(dir.path()).to_string(), &[name, "places", place, "does not hold it"]);
}

#[test]
fn a_tensor_in_two_files() {
    let (dir, _, tensors) = two_shards();
    let (_, want) = converted(dir.path()).unwrap();
    let shard = |n: usize| format!("model-{n:05}-of-000002.safetensors");
    let holder = read_index(dir.path())["weight_map"][HEAD].as_str().unwrap().to_owned();
    let other = if holder == shard(1) { 2 } else { 1 };
    let mut second = Tensors::new();
    common::safetensors::read_file(&dir.path().join(shard(other)), &mut second);
    let zeros = vec![0.0; tensors[HEAD].values().len()];
    second.insert(HEAD.into(), Tensor::bf16(&tensors[HEAD].shape, zeros));
    fs::write(dir.path().join(shard(other)), encode(second.iter())).unwrap();
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["in several files", INDEX, HEAD]);
    // Nobody decides.
    change_index(dir.path(), |map| drop(map.remove(HEAD)));
    let error = error(dir.path());
    assert!(matches!(&error, ConvertError::Double { tensor, .. } if tensor == HEAD), "{error}");
    assert_says(&error.to_string(), &[&shard(1), &shard(2)]);
    // An index that contradicts itself.
    let text = format!("{{\"weight_map\": {{\"{HEAD}\": \"{}\", \"{HEAD}\": \"{}\"}}}}", shard(1), shard(2));
    fs::write(dir.path().join(INDEX), text).unwrap();
    assert_says(&self::error(dir.path()).to_string(), &[INDEX, HEAD, &shard(1), &shard(2)]);
}

#[test]
fn unfinished_downloads_say_how_much_is_missing() {
    let (dir, shape) = (tempfile::tempdir().unwrap(), Synthetic::default());
    shape.write(dir.path(), 5);
    let (_, want) = converted(dir.path()).unwrap();
    let shard = |n: usize| dir.path().join(format!("model-{n:05}-of-000005.safetensors"));
    for n in [2, 4] {
        fs::remove_file(shard(n)).unwrap();
    }
    let cache = dir.path().join(".cache/huggingface/download");
    fs::create_dir_all(&cache).unwrap();
    fs::write(cache.join("model-00002-of-000005.safetensors.0a1b.incomplete"), "half").unwrap();
    fs::write(cache.join("model-00001-of-000005.safetensors.metadata"), "").unwrap();
    let words = ["2 of 5", "model-00002-of-000005", "model-00004-of-000005", "not ended: 1, `.cache/", "hf download"];
    assert_says(&error(dir.path()).to_string(), &words);
    // An index of other shards than those that are there.
    fs::rename(shard(3), dir.path().join("model-00001-of-000007.safetensors")).unwrap();
    assert_says(&error(dir.path()).to_string(), &["3 of 5", "does not name `model-00001-of-000007.safetensors`"]);
    fs::rename(dir.path().join("model-00001-of-000007.safetensors"), shard(3)).unwrap();
    // Without an index, their names tell.
    fs::remove_file(dir.path().join(INDEX)).unwrap();
    assert_says(&error(dir.path()).to_string(), &words);
    shape.write(dir.path(), 5);
    fs::remove_file(dir.path().join(INDEX)).unwrap();
    let (summary, found) = converted(dir.path()).unwrap();
    assert!(found == want);
    assert_says(note(&summary), &["no `model.safetensors.index.json`", "5 files"]);
    // Nothing but what is under way.
    for n in 1..=5 {
        fs::remove_file(shard(n)).unwrap();
    }
    assert_says(&error(dir.path()).to_string(), &["neither", "not ended: 1, `.cache/huggingface/download/model-00002"]);
    fs::write(dir.path().join("model.safetensors.part"), "half").unwrap();
    assert_says(&error(dir.path()).to_string(), &["not ended: 2, `model.safetensors.part`"]);
}

#[test]
fn git_lfs_pointers_are_recognised_wherever_they_are() {
    let (dir, ..) = two_shards();
    let write = |name: &str| fs::write(dir.path().join(name), POINTER).unwrap();
    write("model-00002-of-000002.safetensors");
    assert_says(&error(dir.path()).to_string(), &["1 of 2", "Git LFS", "model-00002", "git lfs pull"]);
    for name in [INDEX, "tokenizer.json", "config.json"] {
        let (dir, ..) = two_shards();
        fs::write(dir.path().join(name), POINTER).unwrap();
        assert_says(&error(dir.path()).to_string(), &[name, "Git LFS pointer", "git lfs pull"]);
    }
    let single = tempfile::tempdir().unwrap();
    Synthetic::default().write(single.path(), 1);
    fs::write(single.path().join("model.safetensors"), POINTER).unwrap();
    assert_says(&error(single.path()).to_string(), &["model.safetensors is a Git LFS pointer"]);
    let config = dir.path().join("config.json");
    fs::write(&config, POINTER).unwrap();
    let planned = Geometry::load(config.to_str().unwrap(), None).unwrap_err().to_string();
    assert_says(&planned, &["config.json is a Git LFS pointer"]);
}

#[test]
fn sources_that_are_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("m.gguf"), b"GGUF\x03\0\0\0rest").unwrap();
    fs::write(path("m.bin"), b"PK\x03\x04rest").unwrap();
    fs::write(path("m.html"), b"<!DOCTYPE html><html></html>").unwrap();
    fs::write(path("pointer"), POINTER).unwrap();
    fs::write(path("other"), b"nothing known").unwrap();
    let says = |name: &str, words: &[&str]| assert_says(&error(&path(name)).to_string(), words);
    says("m.gguf", &["m.gguf", "damaged", "before byte 8"]);
    says("m.bin", &["PyTorch", "save_pretrained"]);
    says("m.html", &["web page", "hf auth login"]);
    says("pointer", &["Git LFS"]);
    says("other", &["not a folder"]);
    says("missing", &["there is no such folder"]);
    says("missing.gguf", &["there is no such file"]);
    fs::write(path("bom.GGUF"), b"\xef\xbb\xbfGGUF\x03\0\0\0").unwrap();
    says("bom.GGUF", &["does not begin as GGUF files do"]);
    assert!(no_model(&path("m.gguf")).is_some() && no_model(&path("other")).is_none());

    let checkpoint = path("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    Synthetic::default().write(&checkpoint, 1);
    for name in ["checkpoint/config.json", "checkpoint/model.safetensors"] {
        says(name, &["it is a file", "Name the folder", checkpoint.to_str().unwrap()]);
    }
    assert_says(&no_model(&checkpoint.join("model.safetensors")).unwrap().to_string(), &["Name the folder"]);
    says("", &["has no `config.json`", checkpoint.to_str().unwrap()]);
    let model = path("m.sluice");
    convert(&checkpoint, &model, &Options::default(), &()).unwrap();
    says("m.sluice", &["model file of this program already", "sluice run"]);
    assert!(no_model(&model).is_none());

    let hub = error(Path::new("some-owner/Some-Model-7B")).to_string();
    assert_says(&hub, &["`hf:some-owner/Some-Model-7B`"]);
    let hub = Geometry::load("some-owner/Some-Model-7B", None).unwrap_err().to_string();
    assert_says(&hub, &["`sluice pull some-owner/Some-Model-7B --include config.json --to Some-Model-7B`"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
        says("link", &["a link to something that is not there"]);
    }
}

#[test]
fn folders_with_other_weights() {
    for (file, words) in [
        ("pytorch_model-00001-of-00002.bin", ["PyTorch", "save_pretrained"]),
        ("pytorch_model.bin.index.json", ["PyTorch", "save_pretrained"]),
        ("adapter_model.safetensors", ["adapter", "merge_and_unload"]),
        ("model-q4.gguf", ["GGUF", "Name one of them"]),
        ("weights.safetensors", ["neither", "`weights.safetensors`"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), Synthetic::default().config().to_string()).unwrap();
        fs::write(dir.path().join(file), "x").unwrap();
        assert_says(&error(dir.path()).to_string(), &words);
    }
    // The hub's cache, one level up from what is wanted.
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("snapshots/0123abcd");
    fs::create_dir_all(&snapshot).unwrap();
    Synthetic::default().write(&snapshot, 1);
    assert_says(&error(dir.path()).to_string(), &["config.json", snapshot.to_str().unwrap()]);
}

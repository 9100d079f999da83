//! Text as users meet it: what the files beside tokenizer.json change, special tokens, and `sluice tokenize`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{
    assert_fails, copy_checkpoint, demo_checkpoint, demo_model, json, sluice, sluice_with_input, stdout,
};
use serde_json::{Value, json};

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The demo's file of this name.
fn demo(name: &str) -> Value {
    read(&demo_checkpoint().join(name))
}

/// The demo checkpoint with other text files, converted.
struct Model {
    folder: tempfile::TempDir,
}

impl Model {
    fn with(files: &[(&str, Value)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = Model { folder };
        copy_checkpoint(&model.checkpoint(), None);
        for (name, value) in files {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            fs::write(model.checkpoint().join(name), text).unwrap();
        }
        stdout(&sluice(&["convert", model.checkpoint().to_str().unwrap(), &model.file()]));
        model
    }

    fn checkpoint(&self) -> PathBuf {
        self.folder.path().join("checkpoint")
    }

    fn file(&self) -> String {
        self.folder.path().join("model.sluice").to_str().unwrap().to_owned()
    }

    /// What `run --json` says, greedy.
    fn run(&self, more: &[&str]) -> Value {
        let file = self.file();
        json(&sluice(&[&["run", &file, "--json", "--forget", "--temperature", "0"], more].concat()))
    }
}

/// The demo's tokenizer in which token 17 (`.`, which the model writes often) is an added token.
fn with_marker(content: &str, special: bool) -> Value {
    let mut tokenizer = demo("tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let dot = vocab.iter().find(|(_, id)| **id == 17).map(|(token, _)| token.clone()).unwrap();
    vocab.remove(&dot);
    vocab.insert(content.into(), 17.into());
    let has_dot = |merge: &Value| match merge.as_str() {
        Some(text) => text.split(' ').any(|part| part == dot),
        None => merge.as_array().unwrap().iter().any(|part| *part == dot.as_str()),
    };
    tokenizer["model"]["merges"].as_array_mut().unwrap().retain(|merge| !has_dot(merge));
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({"id": 17, "content": content,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special}));
    tokenizer
}

const PROMPT: [&str; 4] = ["--prompt", "ROMEO:", "-n", "40"];

#[test]
fn a_stop_string_may_be_a_special_token() {
    let plain = Model::with(&[("tokenizer.json", with_marker("<|im_end|>", false))]);
    let special = Model::with(&[("tokenizer.json", with_marker("<|im_end|>", true))]);
    let stop = ["--stop", "<|im_end|>"];
    let want = plain.run(&[&PROMPT[..], &stop].concat());
    assert_eq!(want["finish"], "stop_string");
    let got = special.run(&[&PROMPT[..], &stop].concat());
    assert_eq!((&got["finish"], &got["text"], &got["ids"]), (&want["finish"], &want["text"], &want["ids"]));
    // Also with text around it, which is cut then.
    let text = got["text"].as_str().unwrap();
    let (before, tail) = text.split_at(text.len() - 4);
    let longer = special.run(&[&PROMPT[..], &["--stop", &format!("{tail}<|im_end|>")]].concat());
    assert_eq!((longer["finish"].as_str(), longer["text"].as_str()), (Some("stop_string"), Some(before)));

    // Nothing to stop at: the token is in the ids and, unless asked for, not in the text.
    let hidden = special.run(&PROMPT);
    let shown = special.run(&[&PROMPT[..], &["--special"]].concat());
    assert_eq!(hidden["ids"], shown["ids"]);
    assert!(hidden["ids"].as_array().unwrap().contains(&17.into()));
    assert!(!hidden["text"].as_str().unwrap().contains("im_end"));
    assert_eq!(shown["text"].as_str().unwrap().replace("<|im_end|>", ""), hidden["text"].as_str().unwrap());
}

#[test]
fn an_end_token_that_only_the_tokenizer_names_ends() {
    let mut config = demo("tokenizer_config.json");
    config["eos_token"] = "<|im_end|>".into();
    let model = Model::with(&[("tokenizer.json", with_marker("<|im_end|>", true)), ("tokenizer_config.json", config)]);
    let ended = model.run(&PROMPT);
    assert_eq!(ended["finish"], "end_token");
    assert_eq!(ended["ids"].as_array().unwrap().last(), Some(&17.into()));
    let shown = model.run(&[&PROMPT[..], &["--special"]].concat());
    assert_eq!(shown["text"].as_str().unwrap(), format!("{}<|im_end|>", ended["text"].as_str().unwrap()));
    assert_eq!(model.run(&[&PROMPT[..], &["--ignore-eos"]].concat())["finish"], "length");
}

#[test]
fn raw_text_begins_with_bos_where_the_model_was_trained_so() {
    let mut tokenizer = demo("tokenizer.json");
    tokenizer["post_processor"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let mut config = demo("tokenizer_config.json");
    config["add_bos_token"] = true.into();
    config["tokenizer_class"] = "LlamaTokenizerFast".into();
    let model = Model::with(&[("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]);
    let ids = |more: &[&str]| json(&sluice(&[&["tokenize", &model.file(), "--json"], more].concat()))["ids"].clone();
    let with = ids(&["--text", "ROMEO:"]);
    assert_eq!(with[0], 0);
    assert_eq!(with.as_array().unwrap()[1..], *ids(&["--text", "ROMEO:", "--no-special"]).as_array().unwrap());
    assert_eq!(model.run(&PROMPT)["prompt_tokens"], with.as_array().unwrap().len());
}

#[test]
fn files_beside_tokenizer_json_are_carried_and_count() {
    let mut config = demo("tokenizer_config.json");
    config.as_object_mut().unwrap().remove("bos_token");
    let model = Model::with(&[
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", json!({"bos_token": "<|begin|>", "additional_special_tokens": ["<|user|>"]})),
        ("chat_template.jinja", json!("{{ bos_token }}{{ messages[0].content }}<|user|>")),
    ]);
    let out = json(&sluice(&["tokenize", &model.file(), "--text", "hi", "--chat", "--json"]));
    assert_eq!(out["text"], "<|begin|>hi<|user|>");
    assert_eq!((&out["ids"][0], &out["tokens"][0]), (&0.into(), &"<|begin|>".into()));
    assert_eq!(out["ids"].as_array().unwrap().last(), Some(&2.into()));
    assert_eq!(model.run(&["--prompt", "hi", "--chat", "-n", "1"])["prompt_tokens"], 3);

    // Contradictions are found before anything is written.
    fs::write(model.checkpoint().join("added_tokens.json"), r#"{"<|other|>": 2}"#).unwrap();
    let target = model.folder.path().join("other.sluice");
    let refused = sluice(&["convert", model.checkpoint().to_str().unwrap(), target.to_str().unwrap()]);
    assert_fails(&refused, 1, &["added_tokens.json", "tokenizer.json", "<|other|>"]);
    assert!(!target.exists());
}

#[test]
fn hostile_tokenizers_are_refused_at_convert() {
    let folder = tempfile::tempdir().unwrap();
    copy_checkpoint(folder.path(), None);
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    for (part, value) in [
        ("normalizer", json!({"type": "Sequence", "normalizers": vec![replace.clone(); 24]})),
        ("decoder", json!({"type": "Sequence", "decoders": vec![replace; 24]})),
        // These make the library panic, which is nobody's business.
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        (
            "model",
            json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "abc": 2}, "merges": ["a b"],
            "continuing_subword_prefix": "x".repeat(1000)}),
        ),
    ] {
        let mut tokenizer = demo("tokenizer.json");
        tokenizer[part] = value;
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let target = folder.path().join("model.sluice");
        let refused = sluice(&["convert", folder.path().to_str().unwrap(), target.to_str().unwrap()]);
        assert_fails(&refused, 1, &["tokenizer"]);
        assert!(!target.exists());
    }
}

#[test]
fn tokenize_shows_ids_and_text() {
    let checkpoint = demo_checkpoint();
    let (folder, model) = (checkpoint.to_str().unwrap(), demo_model());
    let text = "ROMEO:\nO, it is my love! <|end|> ";
    let of_model = json(&sluice(&["tokenize", model, "--text", text, "--json"]));
    assert_eq!(of_model, json(&sluice(&["tokenize", folder, "--text", text, "--json"])));
    assert_eq!(of_model, json(&sluice_with_input(&["tokenize", folder, "--json"], text.as_bytes())));
    assert_eq!(of_model["text"], text);
    let ids: Vec<String> = of_model["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert!(ids.contains(&"1".to_owned()));
    assert_eq!(of_model["tokens"].as_array().unwrap().len(), ids.len());

    let lines = stdout(&sluice(&["tokenize", model, "--text", text]));
    assert_eq!(lines.lines().count(), ids.len());
    assert!(lines.lines().zip(&ids).all(|(line, id)| line.trim_start().starts_with(&format!("{id} "))), "{lines}");

    let ids = ids.join(",");
    assert_eq!(stdout(&sluice(&["tokenize", model, "--ids", &ids, "--special"])), format!("{text}\n"));
    let hidden = json(&sluice(&["tokenize", model, "--ids", &ids, "--json"]));
    assert_eq!(hidden["text"], text.replace("<|end|>", ""));
    assert_eq!(hidden["ids"], of_model["ids"]);
    assert_eq!(json(&sluice(&["tokenize", model, "--ids", "999999", "--json"]))["tokens"], json!([null]));
    assert_eq!(json(&sluice(&["tokenize", model, "--text", "-n", "--json"]))["text"], "-n");
    assert_eq!(json(&sluice(&["tokenize", model, "--text", "", "--json"]))["ids"], json!([]));
}

#[test]
fn tokenize_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_fails(&sluice(&["tokenize", path, "--text", "hi"]), 1, &["has no tokenizer"]);
    assert_fails(&sluice(&["tokenize", "no/such/file", "--text", "hi"]), 1, &["no/such/file"]);
    assert_fails(&sluice(&["tokenize", demo_model(), "--text", "hi", "--chat"]), 2, &["chat template"]);
    assert_fails(&sluice(&["tokenize", demo_model(), "--ids", "1", "--text", "a"]), 2, &["--ids"]);
    assert_fails(&sluice(&["tokenize", demo_model(), "--text-file", "/dev/zero"]), 1, &["bytes"]);
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert_fails(&sluice(&["tokenize", path, "--text", "hi"]), 1, &["tokenizer.json"]);
}

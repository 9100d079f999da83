//! Compares tokenizers made from metadata, as llama.cpp's converter writes it, with the original tokenizers.
//!
//! `tests/fixtures/gguf_tokenizers/make_metadata.py` makes both: small ones, which are stored beside it, and folders of published
//! ones, which [`tokenizers_give_the_ids_that_are_stored_with_them`] compares if `SLUICE_TOKENIZERS` names them.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value as Json, json};
use sluice_text::{GenerationDefaults, Tokenizer};

use super::super::metadata::{Kind, Metadata, Numbers, Problem, Strings, Value};
use super::{TextFiles, text_files};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf_tokenizers")
}

/// A value of the metadata from its JSON: lists of numbers are f32 if one of them has a fraction or exponent.
fn value(json: &Json) -> Value {
    match json {
        Json::Bool(b) => Value::Bool(*b),
        Json::String(s) => Value::String(s.as_bytes().to_vec()),
        Json::Number(n) => n.as_i64().map_or_else(|| Value::Float(n.as_f64().unwrap()), |i| Value::Integer(i.into())),
        Json::Array(list) if list.iter().all(Json::is_string) => {
            Value::Strings(list.iter().map(|s| s.as_str().unwrap().as_bytes()).collect())
        }
        Json::Array(list) if list.iter().all(Json::is_i64) => {
            let bytes = list.iter().flat_map(|n| (n.as_i64().unwrap() as i32).to_le_bytes());
            Value::Numbers(Numbers::new(Kind::I32, bytes.collect()))
        }
        Json::Array(list) => {
            let bytes = list.iter().flat_map(|n| (n.as_f64().unwrap() as f32).to_le_bytes());
            Value::Numbers(Numbers::new(Kind::F32, bytes.collect()))
        }
        other => panic!("{other} is no metadata"),
    }
}

fn metadata(json: &Json) -> Metadata {
    json.as_object().unwrap().iter().map(|(key, json)| (key.clone(), value(json))).collect()
}

fn file<'f>(files: &'f TextFiles, name: &str) -> Option<&'f [u8]> {
    files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.as_slice())
}

fn tokenizer(files: &TextFiles) -> Tokenizer {
    Tokenizer::find(|name| file(files, name)).unwrap().unwrap()
}

/// Texts and their expected ids.
type Expected = Vec<(String, Vec<u32>)>;

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn expected(texts: &Json, all: &Json) -> Expected {
    let (texts, all) = (texts.as_array().unwrap(), all.as_array().unwrap());
    assert_eq!(texts.len(), all.len());
    texts.iter().map(|text| text.as_str().unwrap().to_owned()).zip(all.iter().map(ids)).collect()
}

/// Compares the tokenizer of some metadata, on texts alone or with the tokens around them. Returns the texts with other ids.
fn others(tokenizer: &Tokenizer, expected: &Expected, around: bool) -> Vec<String> {
    let got = |text: &str| tokenizer.encode(text, around).unwrap();
    let wrong = expected.iter().filter(|(text, want)| got(text) != *want);
    wrong.map(|(text, want)| format!("{text:?}: {:?}, expected {want:?}", got(text))).collect()
}

fn stored(name: &str) -> Json {
    serde_json::from_slice(&fs::read(fixtures().join(format!("{name}.json"))).unwrap()).unwrap()
}

/// The tokenizers of `tests/fixtures/tokenizers`, after llama.cpp's converter, give the ids that transformers gives for the files
/// themselves.
#[test]
fn small_tokenizers_give_the_same_ids() {
    let goldens = fs::read(fixtures().join("../tokenizers/goldens.json")).unwrap();
    let goldens: Json = serde_json::from_slice(&goldens).unwrap();
    for kind in ["qwen2", "llama3", "deepseek", "gpt_oss", "kimi"] {
        let metadata = metadata(&stored(kind)["metadata"]);
        let tokenizer = tokenizer(&text_files(&metadata).unwrap());
        tokenizer.check().unwrap();
        let mut expected = expected(&goldens["texts"], &goldens["kinds"][kind]["4"]);
        if kind == "deepseek" {
            // Its post-processor does nothing, and for the converter that takes precedence over `add_bos_token`.
            assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token"), Ok(Some(false)));
            for (_, ids) in &mut expected {
                ids.remove(0);
            }
        }
        let others = others(&tokenizer, &expected, true);
        assert!(others.is_empty(), "{kind}: {} of {}: {others:#?}", others.len(), expected.len());
    }
}

/// Files with texts and ids: a SentencePiece model, whose merges are derived from its scores, and those of published tokenizers in
/// the folder `SLUICE_TOKENIZERS`, if it is set.
#[test]
fn tokenizers_give_the_ids_that_are_stored_with_them() {
    let folder = std::env::var_os("SLUICE_TOKENIZERS").map(|folder| fs::read_dir(folder).unwrap());
    let mut files: Vec<PathBuf> = folder.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.push(fixtures().join("llama.json"));
    let mut wrong = Vec::new();
    for path in files {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let stored: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let files = text_files(&metadata(&stored["metadata"])).unwrap();
        let tokenizer = match Tokenizer::find(|name| file(&files, name)) {
            Ok(tokenizer) => tokenizer.unwrap(),
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let expected = expected(&stored["texts"], &stored["ids"]);
        let mut others = others(&tokenizer, &expected, false);
        if let Some(around) = stored.get("around") {
            others.extend(self::others(&tokenizer, &vec![(expected[0].0.clone(), ids(around))], true));
        }
        println!("{name}: {} of {} texts get other ids", others.len(), expected.len());
        wrong.extend(others.first().map(|first| format!("{name}: {}", first.chars().take(600).collect::<String>())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sentencepiece_s_spaces_come_back() {
    let tokenizer = tokenizer(&text_files(&metadata(&stored("llama")["metadata"])).unwrap());
    let text = "  two spaces, ünïcödé 🦀\n";
    assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap(), true).unwrap(), text);
}

/// The error message for the stored metadata of `kind` after a change.
fn refused(kind: &str, change: impl FnOnce(&mut Json)) -> Problem {
    let mut stored = stored(kind);
    change(&mut stored["metadata"]);
    text_files(&metadata(&stored["metadata"])).unwrap_err()
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

#[test]
fn damaged_metadata_is_named() {
    let set = |name: &'static str, value: Json| move |metadata: &mut Json| metadata[key(name)] = value;
    let remove =
        |name: &'static str| move |metadata: &mut Json| drop(metadata.as_object_mut().unwrap().remove(&key(name)));
    let problems = [
        (refused("qwen2", set("model", json!("t5"))), "model", "t5"),
        (refused("qwen2", set("model", json!(7))), "model", "7"),
        (refused("qwen2", set("pre", json!("qwen99"))), "pre", "qwen99"),
        (refused("qwen2", remove("pre")), "pre", "missing"),
        (refused("qwen2", remove("tokens")), "tokens", "missing"),
        (refused("qwen2", set("tokens", json!([]))), "tokens", "0 tokens"),
        (refused("qwen2", set("tokens", json!([1, 2]))), "tokens", "2 numbers"),
        (refused("qwen2", set("token_type", json!([1, 1]))), "token_type", "2 entries"),
        (refused("qwen2", set("token_type", json!(["a"]))), "token_type", "1 texts"),
        (refused("qwen2", remove("merges")), "merges", "missing"),
        (refused("qwen2", |m| m[key("merges")][3] = json!("one")), "merges", "entry 3"),
        (refused("qwen2", |m| m[key("merges")][3] = json!(" ")), "merges", "entry 3"),
        (refused("qwen2", |m| m[key("merges")][3] = json!("nosuch thing")), "merges", "nosuch"),
        (refused("qwen2", |m| m[key("tokens")][5] = m[key("tokens")][6].clone()), "tokens", "5 and 6"),
        (refused("qwen2", |m| m[key("tokens")][5] = json!("x".repeat(20_000))), "tokens", "20000 bytes"),
        (refused("qwen2", set("eos_token_id", json!(1_000_000))), "eos_token_id", "1000000"),
        (refused("qwen2", set("eot_token_id", json!(-1))), "eot_token_id", "-1"),
        (refused("llama", set("scores", json!([0.5]))), "scores", "1 entries"),
        (refused("llama", set("add_space_prefix", json!(3))), "add_space_prefix", "true or false"),
        (refused("kimi", |m| m[key("token_type")][9] = json!(3)), "tokens", "256"),
        (refused("kimi", |m| m[key("tokens")][9] = json!("日")), "tokens", "日"),
    ];
    for (problem, name, words) in problems {
        assert_eq!(problem.key, key(name), "{problem}");
        assert!(problem.problem.contains(words) && problem.problem.len() < 400, "{problem}");
    }
    let bos_nowhere = refused("qwen2", |m| {
        m[key("add_bos_token")] = json!(true);
        m.as_object_mut().unwrap().remove(&key("bos_token_id"));
    });
    assert_eq!(bos_nowhere.key, key("bos_token_id"));
    let mut template = stored("qwen2");
    template["metadata"]["tokenizer.chat_templates"] = json!(["tool_use"]);
    assert_eq!(text_files(&metadata(&template["metadata"])).unwrap_err().key, "tokenizer.chat_template.tool_use");
}

#[test]
fn a_file_without_a_tokenizer_has_none() {
    assert_eq!(text_files(&Metadata::default()), Ok(Vec::new()));
    let none = [(key("model"), Value::String(b"none".to_vec()))].into_iter().collect();
    assert_eq!(text_files(&none), Ok(Vec::new()));
}

#[test]
fn templates_ends_and_sampling_are_in_the_files() {
    let mut stored = stored("qwen2");
    let json = &mut stored["metadata"];
    json["tokenizer.chat_template"] = json!("default {{ bos_token }}");
    json["tokenizer.chat_templates"] = json!(["tool_use"]);
    json["tokenizer.chat_template.tool_use"] = json!("tools");
    json["general.sampling.temp"] = json!(0.6);
    json["general.sampling.top_k"] = json!(20);
    let id = |text: &str| {
        let tokens = json[key("tokens")].as_array().unwrap();
        u32::try_from(tokens.iter().position(|token| token == text).unwrap()).unwrap()
    };
    let (end, text_end) = (id("<|im_end|>"), id("<|endoftext|>"));
    json[key("eos_token_id")] = json!(end);
    let files = text_files(&metadata(json)).unwrap();
    let config: Json = serde_json::from_slice(file(&files, "tokenizer_config.json").unwrap()).unwrap();
    assert_eq!(config["eos_token"], "<|im_end|>");
    let named =
        json!([{"name": "default", "template": "default {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]);
    assert_eq!(config["chat_template"], named);
    let defaults = GenerationDefaults::parse(file(&files, "generation_config.json"), None).unwrap();
    assert_eq!(defaults.eos, [end, text_end].into_iter().collect());
    assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.6), Some(20), None));
    assert_eq!(tokenizer(&files).end_token(), Some(end));
}

/// In harmony, `<|end|>` ends a message, and the answer continues.
#[test]
fn the_end_of_a_message_is_not_the_end_of_an_answer() {
    let files = text_files(&metadata(&stored("gpt_oss")["metadata"])).unwrap();
    let tokenizer = tokenizer(&files);
    let defaults = GenerationDefaults::parse(file(&files, "generation_config.json"), None).unwrap();
    let ends = |text: &str| defaults.eos.contains(&tokenizer.token_id(text).unwrap());
    assert!(ends("<|return|>") && ends("<|call|>") && ends("<|endoftext|>") && !ends("<|end|>"));
}

/// Ids that only fill the vocabulary have no token, and an added token keeps its id in any place.
#[test]
fn added_tokens_keep_their_ids() {
    let mut stored = stored("qwen2");
    let json = &mut stored["metadata"];
    let count = json[key("tokens")].as_array().unwrap().len();
    for (offset, (text, kind)) in [("[PAD]", 4), ("<late>", 4), ("<|later|>", 3)].into_iter().enumerate() {
        let text = if text == "[PAD]" { format!("[PAD{}]", count + offset) } else { text.to_owned() };
        json[key("tokens")].as_array_mut().unwrap().push(json!(text));
        json[key("token_type")].as_array_mut().unwrap().push(json!(kind));
    }
    let tokenizer = tokenizer(&text_files(&metadata(json)).unwrap());
    let id = |offset: usize| u32::try_from(count + offset).unwrap();
    assert_eq!(tokenizer.encode("<late><|later|>", false).unwrap(), [id(1), id(2)]);
    assert!(tokenizer.is_special(id(2)) && !tokenizer.is_special(id(1)));
    let plain = self::tokenizer(&text_files(&metadata(&self::stored("qwen2")["metadata"])).unwrap());
    let last = u32::try_from(count - 1).unwrap();
    assert_eq!((plain.token_text(last), plain.vocab_size() < count), (None, true));
}

/// A vocabulary of a few tokens, for random changes.
fn few() -> Vec<(String, Value)> {
    let texts = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "ab", "\u{2581}a", "\u{2581}ab", "  "];
    let kinds: [i32; 10] = [2, 3, 3, 1, 1, 1, 1, 1, 1, 4];
    let scores = (0..10).flat_map(|i| (-(i as f32)).to_le_bytes()).collect();
    vec![
        (key("model"), Value::String(b"llama".to_vec())),
        (key("pre"), Value::String(b"default".to_vec())),
        (key("tokens"), Value::Strings(texts.iter().collect())),
        (
            key("token_type"),
            Value::Numbers(Numbers::new(Kind::I32, kinds.iter().flat_map(|k| k.to_le_bytes()).collect())),
        ),
        (key("scores"), Value::Numbers(Numbers::new(Kind::F32, scores))),
        (key("merges"), Value::Strings(["a b", "\u{2581} a"].iter().collect())),
        (key("bos_token_id"), Value::Integer(1)),
    ]
}

fn any_value() -> impl Strategy<Value = Value> {
    let strings = prop::collection::vec("[ab\u{2581} <>]{0,4}", 0..12);
    prop_oneof![
        any::<i64>().prop_map(|i| Value::Integer(i.into())),
        (0..12i128).prop_map(Value::Integer),
        any::<f64>().prop_map(Value::Float),
        any::<bool>().prop_map(Value::Bool),
        prop::sample::select(vec!["gpt2", "gemma4", "llama", "qwen2", "kimi-k2", "tekken", "x"])
            .prop_map(|s| Value::String(s.as_bytes().to_vec())),
        prop::collection::vec(any::<u8>(), 0..8).prop_map(Value::String),
        strings.prop_map(|list| Value::Strings(list.iter().collect::<Strings>())),
        prop::collection::vec(0..8u8, 0..16).prop_map(|bytes| Value::Numbers(Numbers::new(Kind::U8, bytes))),
        prop::collection::vec(any::<[u8; 4]>(), 0..16)
            .prop_map(|words| Value::Numbers(Numbers::new(Kind::F32, words.concat()))),
    ]
}

proptest! {
    #[test]
    fn changed_metadata_never_panics(
        changes in prop::collection::vec((0..9usize, prop::option::of(any_value())), 1..4),
    ) {
        let mut entries = few();
        for (at, value) in changes {
            let names = ["add_bos_token", "eot_token_id"];
            let name = entries.get(at).map_or_else(|| key(names[at % 2]), |(name, _)| name.clone());
            entries.retain(|(other, _)| *other != name);
            entries.extend(value.map(|value| (name, value)));
        }
        if let Ok(files) = text_files(&entries.into_iter().collect())
            && let Ok(Some(tokenizer)) = Tokenizer::find(|name| file(&files, name))
        {
            let _ = tokenizer.encode("a ab  b</s>", true);
        }
    }
}

//! A model for tests of the server, with long contexts, a chat template, thinking, tools, and weights that need no space in the
//! repository.
//!
//! It is a golden checkpoint with another vocabulary. `tests/fixtures/chat-model/README.md` describes its parts.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sluice_converter::{Options, convert};

use crate::{Silent, fixture};

/// What the model's layers remember of a sequence. This decides how a sequence can go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// Keys and values of all tokens (the shape of Qwen3 MoE): a sequence can go back to any position.
    Full,
    /// Some layers see a sliding window of 128 tokens (the shape of gpt-oss): beyond it, a sequence can go back only to marks.
    Windows,
    /// Some layers have a recurrent state (the shape of Qwen3-Next): a sequence can go back only to marks.
    States,
}

impl Layers {
    /// The golden checkpoint with such layers.
    fn golden(self) -> &'static str {
        match self {
            Layers::Full => "qwen3_moe",
            Layers::Windows => "gpt_oss",
            Layers::States => "qwen3_next",
        }
    }

    /// The variant that a command line calls `full`, `windows` or `states`.
    pub fn named(name: &str) -> Option<Layers> {
        match name {
            "full" => Some(Layers::Full),
            "windows" => Some(Layers::Windows),
            "states" => Some(Layers::States),
            _ => None,
        }
    }
}

/// Rows of the embedding and of the output head: one for each token, and some without a token.
const VOCABULARY: usize = 1552;
/// Standard deviation of the embedding, as in the golden checkpoints.
const EMBEDDING: f32 = 1.0;
/// Standard deviation of the output head. That of the logits is then about 3, so a few tokens share most of the probability.
const HEAD: f32 = 0.4;
/// Token ids that the model never writes by itself: rows without a token, and control tokens of the demo's tokenizer and of
/// `added_tokens.json`, except `<|im_end|>`.
const SILENT: [std::ops::Range<usize>; 3] = [0..4, 1536..1538, 1539..VOCABULARY];

/// Writes the checkpoint to `folder/checkpoint`, converts it to `folder/chat-model.sluice`, and returns the path of the latter.
pub fn chat_model(folder: &Path, layers: Layers) -> PathBuf {
    let (checkpoint, model) = (folder.join("checkpoint"), folder.join("chat-model.sluice"));
    fs::create_dir_all(&checkpoint).unwrap();
    write_checkpoint(&checkpoint, layers);
    convert(&checkpoint, &model, &Options { overwrite: true, ..Options::default() }, &Silent).unwrap();
    model
}

fn write_checkpoint(folder: &Path, layers: Layers) {
    let (ours, golden) = (fixture("chat-model"), fixture("golden").join(layers.golden()));
    let write_json = |name: &str, value: &Value| fs::write(folder.join(name), value.to_string()).unwrap();
    let mut config = json_file(&golden.join("config.json"));
    config.as_object_mut().unwrap().extend(object(json_file(&ours.join("config.json"))));
    if layers == Layers::Windows {
        config["sliding_window"] = json!(128);
    }
    write_json("config.json", &config);
    write_json("tokenizer.json", &tokenizer(&ours));
    for name in ["generation_config.json", "tokenizer_config.json"] {
        fs::copy(ours.join(name), folder.join(name)).unwrap();
    }
    fs::copy(fixture("chat").join("templates/qwen3.jinja"), folder.join("chat_template.jinja")).unwrap();
    let weights = with_vocabulary(&fs::read(golden.join("model.safetensors")).unwrap());
    fs::write(folder.join("model.safetensors"), weights).unwrap();
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => panic!("{other} is no object"),
    }
}

/// The demo model's tokenizer with our tokens after its own.
fn tokenizer(ours: &Path) -> Value {
    let mut tokenizer = json_file(&fixture("demo-model").join("tokenizer.json"));
    let first = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let added = json_file(&ours.join("added_tokens.json"));
    let added = added.as_array().unwrap().iter().zip(first..).map(|(token, id)| {
        let mut token = object(token.clone());
        let flags = ["single_word", "lstrip", "rstrip", "normalized"];
        token.extend(flags.map(|flag| (flag.to_owned(), json!(false))));
        token.insert("id".to_owned(), json!(id));
        Value::Object(token)
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().extend(added);
    tokenizer
}

/// A safetensors file with embedding and output head for our vocabulary; everything else is unchanged.
fn with_vocabulary(file: &[u8]) -> Vec<u8> {
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    let old = &file[8 + header_len..];
    let (mut new_header, mut data) = (Map::new(), Vec::new());
    for (name, mut entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let begin = data.len();
        let width = entry["shape"].as_array().unwrap().last().unwrap().as_u64().unwrap() as usize;
        match name.as_str() {
            "model.embed_tokens.weight" => data.extend(bf16(&random(1, width, EMBEDDING))),
            "lm_head.weight" => data.extend(bf16(&head(width))),
            _ => {
                let offset = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
                data.extend(&old[offset(0)..offset(1)]);
            }
        }
        if ["model.embed_tokens.weight", "lm_head.weight"].contains(&name.as_str()) {
            assert_eq!(entry["dtype"], "BF16", "{name}");
            entry["shape"] = json!([VOCABULARY, width]);
        }
        entry["data_offsets"] = json!([begin, data.len()]);
        new_header.insert(name, entry);
    }
    let mut header = Value::Object(new_header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn head(width: usize) -> Vec<f32> {
    let mut head = random(2, width, HEAD);
    for token in SILENT.into_iter().flatten() {
        head[token * width..(token + 1) * width].fill(0.0);
    }
    head
}

/// A row for each token of our vocabulary: uniform around zero, with this standard deviation.
fn random(seed: u64, width: usize, deviation: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        // splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    (0..VOCABULARY * width).map(|_| (2.0 * next() - 1.0) * 3f32.sqrt() * deviation).collect()
}

/// Rounded to nearest, little-endian.
fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| (((v.to_bits() + 0x8000) >> 16) as u16).to_le_bytes()).collect()
}

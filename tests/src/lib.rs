//! Helpers for the whole-system tests: fixtures, conversion into a temporary folder, comparison.

pub mod chat_model;
pub mod house;
pub mod models_table;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sluice_converter::{Options, Progress, TypeChoice, convert};
use sluice_format::WeightType;
use sluice_model::{Engine, EngineOptions, RuntimeError};
use tempfile::TempDir;

/// One golden model for each kind of attention: latents; latents with an indexer; latents with an indexer that layers share;
/// windows with sinks; windows; keys beside recurrent states; stretches; windows with heads of their own; windows with compressed
/// entries; latents beside recurrent states; chosen blocks of keys; keys beside recurrent states of another kind; blocks chosen by
/// their mean, beside tables of n-grams; wider heads whose values are keys, beside windows.
pub const ATTENTIONS: [&str; 14] = [
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "gpt_oss",
    "mixtral_swa",
    "qwen3_next",
    "llama4_text",
    "mimo_v2_flash",
    "deepseek_v4",
    "kimi_linear",
    "minimax_m3",
    "gemma4",
    "nemotron_h",
    "qwen4_exp",
];

/// Whether a family of [`ATTENTIONS`] has sequences that cannot go back to any token.
pub fn forgets(family: &str) -> bool {
    !["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minimax_m3"].contains(&family)
}

/// The folder of a fixture, such as `golden/deepseek_v3` or `demo-model`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// An f32 array of a golden file, row-major.
#[derive(Clone, Debug)]
pub struct Array {
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: Vec<f32>,
}

impl Array {
    /// Row `i` of a two-dimensional array.
    pub fn row(&self, i: usize) -> &[f32] {
        let width = self.shape[1];
        &self.data[i * width..(i + 1) * width]
    }
}

/// What Hugging Face transformers computes from a golden checkpoint in f32.
#[derive(Debug)]
pub struct Golden {
    json: Value,
    header: Value,
    bytes: Vec<u8>,
}

impl Golden {
    /// Loads `golden.json` and `golden.safetensors` of a family.
    pub fn load(family: &str) -> Golden {
        let folder = fixture("golden").join(family);
        let json = serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let raw = fs::read(folder.join("golden.safetensors")).unwrap();
        let header_len = u64::from_le_bytes(raw[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&raw[8..8 + header_len]).unwrap();
        Golden { json, header, bytes: raw[8 + header_len..].to_vec() }
    }

    /// Token ids under a key of `golden.json`.
    pub fn ids(&self, key: &str) -> Vec<u32> {
        self.json[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    }

    /// An f32 array.
    pub fn array(&self, name: &str) -> Array {
        let entry = &self.header[name];
        assert_eq!(entry["dtype"], "F32", "{name}");
        let offset = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
        let bytes = &self.bytes[offset(0)..offset(1)];
        Array {
            shape: entry["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect(),
            data: bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        }
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

/// A converted model in a temporary folder.
#[derive(Debug)]
pub struct Converted {
    /// The model file.
    pub path: PathBuf,
    _folder: TempDir,
}

struct Silent;

impl Progress for Silent {
    fn started(&self, _: u64, _: u64) {}
    fn advanced(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

impl Converted {
    /// Converts a fixture with the same type for experts and dense parts; `None` keeps the types of the source.
    pub fn new(fixture_name: &str, ty: Option<WeightType>) -> Converted {
        let choice = ty.map_or(TypeChoice::Keep, TypeChoice::Type);
        Self::with(fixture_name, &Options { expert_type: choice, dense_type: choice, ..Options::default() })
    }

    /// Converts a fixture with any options.
    pub fn with(fixture_name: &str, options: &Options) -> Converted {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.sluice");
        convert(&fixture(fixture_name), &path, options, &Silent).unwrap();
        Converted { path, _folder: folder }
    }

    /// The smallest budget for a sequence of the usual length.
    pub fn least_budget(&self) -> u64 {
        self.least_budget_for(&EngineOptions::default())
    }

    /// The smallest budget that works with these options.
    pub fn least_budget_for(&self, options: &EngineOptions) -> u64 {
        match Engine::open(&self.path, &EngineOptions { budget: Some(1), ..options.clone() }) {
            Err(RuntimeError::Budget(e)) => e.least,
            Err(other) => panic!("a budget of one byte: {other}"),
            Ok(_) => panic!("a budget of one byte was accepted"),
        }
    }

    /// Opens the model.
    pub fn open(&self, options: &EngineOptions) -> Engine {
        Engine::open(&self.path, options).unwrap()
    }
}

/// Index of the largest logit; the first one if several are equal.
pub fn argmax(logits: &[f32]) -> u32 {
    let best =
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &l)| if l > best.1 { (i, l) } else { best });
    best.0 as u32
}

/// Greedy continuation of `prompt` by `count` tokens, and the logits after each.
pub fn greedy(engine: &mut Engine, prompt: &[u32], count: usize) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut sequence = engine.new_sequence();
    let mut logits = Vec::new();
    engine.forward(&mut sequence, prompt, &mut logits).unwrap();
    let (mut ids, mut rows) = (Vec::new(), Vec::new());
    for i in 0..count {
        rows.push(logits.clone());
        ids.push(argmax(&logits));
        if i + 1 < count {
            engine.decode(&mut sequence, ids[i], &mut logits).unwrap();
        }
    }
    (ids, rows)
}

//! GGUF files give the same models as the checkpoints from which they were made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::gguf::{Described, Origin, Value, Written, file, read_head, with_metadata_of};
use crate::common::safetensors::{Tensor, Tensors, read_dir, read_file, values, write_dir};
use crate::common::{Content, Noise, content, fixture, joined};
use proptest::prelude::*;
use serde_json::json;
use sluice_converter::provenance::Comparison;
use sluice_converter::{ConvertError, Options, Plan, convert, plan};
use sluice_format::{AttentionSpec, ExtentKind, ModelFile, ModelSpec, RopeScaling};

const F32: u32 = 0;
const MXFP4: u32 = 39;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Removes from a configuration what GGUF cannot express (as in `tests/fixtures/gguf/make_heads.py`).
fn edited(family: &str, mut config: serde_json::Value) -> serde_json::Value {
    match family {
        "deepseek_v2" => config["rope_scaling"]["mscale"] = json!(1.0),
        "gpt_oss" => config["swiglu_limit"] = json!(7.0),
        "mistral" => config["sliding_window"] = json!(null),
        "hunyuan_v1_moe" => {
            config["rope_scaling"] = json!(null);
            config["moe_intermediate_size"] = json!([32, 32]);
            config["num_shared_expert"] = json!([1, 1]);
        }
        "llama4_text" => {
            let text = &mut config["text_config"];
            text["attention_chunk_size"] = json!(8192);
            text["floor_scale"] = json!(8192);
            text["rope_scaling"]["original_max_position_embeddings"] = json!(8192);
        }
        "olmoe" => {
            config["clip_qkv"] = json!(null);
            config["rms_norm_eps"] = json!(1e-5);
        }
        _ => {}
    }
    config
}

/// The file that llama.cpp's converter makes from a golden checkpoint: its head, and the data.
fn of_llama_cpp(family: &str, config: &serde_json::Value, tensors: &Tensors) -> Vec<u8> {
    let head = fs::read(fixture(&format!("gguf/{family}.head"))).unwrap();
    let (described, begin) = read_head(&head);
    let (mut out, mut kept) = (head[..begin].to_vec(), &head[begin..]);
    let text = config.get("text_config").unwrap_or(config);
    let around = ["model.language_model.", "language_model.model."];
    let prefix = around.into_iter().find(|prefix| tensors.keys().any(|n| n.starts_with(prefix))).unwrap_or("model.");
    let origin = Origin { tensors, config: text, prefix };
    for Described { name, ty, shape, offset } in described {
        assert_eq!(out.len(), begin + offset, "{family}: {name}");
        let elements: usize = shape.iter().product();
        if name.ends_with(".ssm_a") || name == "rope_freqs.weight" {
            let (own, rest) = kept.split_at(4 * elements);
            out.extend(own);
            kept = rest;
        } else if ty == MXFP4 {
            out.extend(origin.mxfp4(&name));
        } else {
            assert_eq!(ty, F32, "{family}: {name}");
            let numbers = origin.data(&name);
            assert_eq!(numbers.len(), elements, "{family}: {name}");
            out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        }
        out.resize(out.len().next_multiple_of(32), 0);
    }
    out
}

fn converted(source: &Path) -> (ModelSpec, Content) {
    converted_as(source, &Options::default())
}

fn converted_as(source: &Path, options: &Options) -> (ModelSpec, Content) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    convert(source, &path, options, &()).unwrap_or_else(|e| panic!("{e}"));
    (plan(source, options).unwrap().spec().clone(), content(&path))
}

/// Options that match llama.cpp's converter: it leaves out DeepSeek-V3's prediction layer.
fn as_llama_cpp(family: &str) -> Options {
    Options { mtp: family != "deepseek_v3", ..Options::default() }
}

/// The specifications are the same, except for what GGUF cannot express and for the order of value heads.
fn assert_same_model(family: &str, found: &ModelSpec, expected: &ModelSpec) {
    let mut found = found.clone();
    // Only the pre-tokenizer would tell families with the same computation apart.
    found.family.clone_from(&expected.family);
    for layer in &mut found.layers {
        if let AttentionSpec::Delta(delta) = &mut layer.attention {
            assert_eq!(delta.value_heads_tiled, family == "qwen3_5_moe");
            delta.value_heads_tiled = false;
        }
    }
    assert_eq!(found, *expected, "{family}");
}

fn assert_same_numbers(family: &str, found: &Content, expected: &Content) {
    let spread = |content: &Content| {
        // Parts of embedding and head have another height for another type.
        let layers = content.iter().filter(|(key, _)| !matches!(key.0, ExtentKind::Embedding | ExtentKind::Head));
        let mut all: BTreeMap<_, _> = layers.map(|(key, (_, numbers))| (key.clone(), numbers.clone())).collect();
        for kind in [ExtentKind::Embedding, ExtentKind::Head] {
            all.insert((kind, 0, 0, "all".into()), joined(content, kind));
        }
        all
    };
    let (found, expected) = (spread(found), spread(expected));
    assert_eq!(found.len(), expected.len(), "{family}");
    for (key, numbers) in &expected {
        let tiled = family == "qwen3_5_moe" && key.0 == ExtentKind::Attention && !found[key].is_empty();
        let ours = &found[key];
        assert_eq!(ours.len(), numbers.len(), "{family}: {key:?}");
        if tiled && key.1 != 3 {
            // In another order: the sums show that they are the same numbers.
            let sum = |all: &[f32]| all.iter().map(|&n| f64::from(n)).sum::<f64>();
            assert!((sum(ours) - sum(numbers)).abs() < 1e-4, "{family}: {key:?}");
            continue;
        }
        let near = |(a, b): (&f32, &f32)| a == b || key.3 == "a_log" && (a - b).abs() < 1e-6;
        assert!(ours.iter().zip(numbers).all(near), "{family}: {key:?}");
    }
}

#[test]
fn files_of_llama_cpp_hold_the_models_of_their_checkpoints() {
    let digests: BTreeMap<String, String> =
        serde_json::from_slice(&fs::read(fixture("gguf/digests.json")).unwrap()).unwrap();
    assert_eq!(digests.len(), 26);
    for (family, digest) in &digests {
        let golden = fixture(&format!("golden/{family}"));
        let config: serde_json::Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
        let (config, tensors) = (edited(family, config), read_dir(&golden));
        let folder = tempfile::tempdir().unwrap();
        let bytes = of_llama_cpp(family, &config, &tensors);
        assert_eq!(
            format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes)),
            *digest,
            "{family}: llama.cpp writes another file"
        );
        let path = folder.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let checkpoint = folder.path().join("checkpoint");
        fs::create_dir(&checkpoint).unwrap();
        write_dir(&checkpoint, &config, &tensors, 1);
        let (found, numbers) = converted(&path);
        let (spec, expected) = converted_as(&checkpoint, &as_llama_cpp(family));
        assert_same_model(family, &found, &spec);
        assert_eq!(found.prediction.is_some(), family == "glm4_moe", "{family}");
        assert_same_numbers(family, &numbers, &expected);
    }
}

fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// The same models with the names and arrangements of older converters, or of optional settings.
#[test]
fn other_arrangements_hold_the_same_models() {
    for family in ["mixtral", "qwen3_moe", "deepseek_v3"] {
        let golden = fixture(&format!("golden/{family}"));
        let config: serde_json::Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
        let tensors = read_dir(&golden);
        let origin = Origin { tensors: &tensors, config: &config, prefix: "model." };
        let head = fs::read(fixture(&format!("gguf/{family}.head"))).unwrap();
        let mut written: Vec<Written> = Vec::new();
        for Described { name, shape, .. } in read_head(&head).0 {
            let stem = name.rsplit_once('.').unwrap().0.to_owned();
            let whole = |name: &str| floats(&origin.data(name));
            match family {
                // One tensor for each expert.
                "mixtral" if stem.ends_with("_exps") => {
                    let data = whole(&name);
                    for (expert, data) in data.chunks(data.len() / shape[0]).enumerate() {
                        let name = format!("{}.{expert}.weight", stem.trim_end_matches("_exps"));
                        written.push((name, F32, shape[1..].to_vec(), data.to_vec()));
                    }
                }
                // Gate and up in one tensor.
                "qwen3_moe" if stem.ends_with("_up_exps") => {}
                "qwen3_moe" if stem.ends_with("_gate_exps") => {
                    let (gate, up) = (whole(&name), whole(&name.replace("_gate_", "_up_")));
                    let of_expert = gate.len() / shape[0];
                    let pairs = gate.chunks(of_expert).zip(up.chunks(of_expert));
                    let data = pairs.flat_map(|(gate, up)| [gate, up].concat()).collect();
                    let shape = vec![shape[0], 2 * shape[1], shape[2]];
                    written.push((name.replace("_gate_", "_gate_up_"), F32, shape, data));
                }
                // Keys and values as in the release.
                "deepseek_v3" if stem.ends_with("attn_v_b") => {}
                "deepseek_v3" if stem.ends_with("attn_k_b") => {
                    let layer = stem.split('.').nth(1).unwrap();
                    let release = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
                    let data = floats(&values(&tensors, &release));
                    written.push((name.replace("k_b", "kv_b"), F32, tensors[&release].shape.clone(), data));
                }
                _ => written.push((name.clone(), F32, shape, whole(&name))),
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, with_metadata_of(&head, &written)).unwrap();
        assert_same_numbers(family, &converted(&path).1, &converted_as(&golden, &as_llama_cpp(family)).1);
    }
}

/// llama.cpp's converter does not write a Qwen2-MoE with a dense layer, but the family has them.
#[test]
fn qwen2_moe_has_biases_a_gated_shared_expert_and_dense_layers() {
    let golden = fixture("golden/qwen2_moe");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    let tensors = read_dir(&golden);
    let origin = Origin { tensors: &tensors, config: &config, prefix: "model." };
    let count = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
    let metadata = [
        ("general.architecture", Value::Text("qwen2moe")),
        ("qwen2moe.block_count", count("num_hidden_layers")),
        ("qwen2moe.context_length", count("max_position_embeddings")),
        ("qwen2moe.embedding_length", count("hidden_size")),
        ("qwen2moe.feed_forward_length", count("intermediate_size")),
        ("qwen2moe.attention.head_count", count("num_attention_heads")),
        ("qwen2moe.attention.head_count_kv", count("num_key_value_heads")),
        ("qwen2moe.rope.freq_base", Value::F32(config["rope_theta"].as_f64().unwrap() as f32)),
        ("qwen2moe.attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32)),
        ("qwen2moe.expert_count", count("num_experts")),
        ("qwen2moe.expert_used_count", count("num_experts_per_tok")),
        ("qwen2moe.expert_feed_forward_length", count("moe_intermediate_size")),
        ("qwen2moe.expert_shared_feed_forward_length", count("shared_expert_intermediate_size")),
    ];
    let metadata: Vec<_> = metadata.map(|(key, value)| (key.to_owned(), value)).to_vec();
    let hidden = config["hidden_size"].as_u64().unwrap() as usize;
    let mut written: Vec<Written> = Vec::new();
    let mut add = |name: String, of_stack: usize, cols: usize| {
        let data = origin.data(&name);
        let shape = match (name.ends_with("norm.weight") || name.ends_with(".bias"), of_stack) {
            (true, _) => vec![data.len()],
            (_, 1) => vec![data.len() / cols, cols],
            (_, n) => vec![n, data.len() / n / cols, cols],
        };
        written.push((name, F32, shape, floats(&data)));
    };
    ["token_embd", "output", "output_norm"].iter().for_each(|name| add(format!("{name}.weight"), 1, hidden));
    for layer in 0..config["num_hidden_layers"].as_u64().unwrap() {
        let sparse = tensors.contains_key(&format!("model.layers.{layer}.mlp.gate.weight"));
        let mlp = |part: &str| tensors[&format!("model.layers.{layer}.mlp.{part}.weight")].shape[1];
        let mut of_layer = |rest: &str, stack: usize, cols: usize| add(format!("blk.{layer}.{rest}"), stack, cols);
        ["attn_norm.weight", "ffn_norm.weight"].iter().for_each(|rest| of_layer(rest, 1, hidden));
        for part in ["attn_q", "attn_k", "attn_v"] {
            of_layer(&format!("{part}.weight"), 1, hidden);
            of_layer(&format!("{part}.bias"), 1, hidden);
        }
        of_layer("attn_output.weight", 1, hidden);
        if !sparse {
            ["gate", "up"].iter().for_each(|part| of_layer(&format!("ffn_{part}.weight"), 1, hidden));
            of_layer("ffn_down.weight", 1, mlp("down_proj"));
            continue;
        }
        of_layer("ffn_gate_inp.weight", 1, hidden);
        of_layer("ffn_gate_inp_shexp.weight", 1, hidden);
        for (part, cols) in [("gate", hidden), ("up", hidden), ("down", mlp("shared_expert.down_proj"))] {
            of_layer(&format!("ffn_{part}_shexp.weight"), 1, cols);
        }
        let experts = config["num_experts"].as_u64().unwrap() as usize;
        for (part, cols) in [("gate", hidden), ("up", hidden), ("down", mlp("experts.0.down_proj"))] {
            of_layer(&format!("ffn_{part}_exps.weight"), experts, cols);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file(&metadata, &written)).unwrap();
    let ((found, numbers), (spec, expected)) = (converted(&path), converted(&golden));
    assert_same_model("qwen2_moe", &found, &spec);
    assert_same_numbers("qwen2_moe", &numbers, &expected);
}

/// A small Llama whose matrices `matrix` makes: name, rows, columns → type number and data.
fn small(mut matrix: impl FnMut(&str, usize, usize) -> (u32, Vec<u8>)) -> (Vec<(String, Value)>, Vec<Written>) {
    let metadata = [
        ("general.architecture", Value::Text("llama")),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(256)),
        ("llama.feed_forward_length", Value::U32(256)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    let mut tensors = Vec::new();
    for (name, rows) in [
        ("token_embd", 16),
        ("output", 16),
        ("blk.0.attn_q", 256),
        ("blk.0.attn_k", 128),
        ("blk.0.attn_v", 128),
        ("blk.0.attn_output", 256),
        ("blk.0.ffn_gate", 256),
        ("blk.0.ffn_up", 256),
        ("blk.0.ffn_down", 256),
    ] {
        let (ty, data) = matrix(name, rows, 256);
        tensors.push((format!("{name}.weight"), ty, vec![rows, 256], data));
    }
    let ones: Vec<u8> = (0..256).flat_map(|_| 1f32.to_le_bytes()).collect();
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
        tensors.push((format!("{name}.weight"), F32, vec![256], ones.clone()));
    }
    (metadata.map(|(key, value)| (key.to_owned(), value)).to_vec(), tensors)
}

fn zeros(_: &str, rows: usize, cols: usize) -> (u32, Vec<u8>) {
    (F32, vec![0; 4 * rows * cols])
}

fn write_small(folder: &Path) -> PathBuf {
    let (metadata, tensors) = small(zeros);
    let path = folder.join("m.gguf");
    fs::write(&path, file(&metadata, &tensors)).unwrap();
    path
}

/// Name, type number in files, and the weight type that carries it.
const BLOCK_TYPES: [(&str, u32, &str); 23] = [
    ("Q4_0", 2, "q4_0"),
    ("Q4_1", 3, "q4_1"),
    ("Q5_0", 6, "q5_0"),
    ("Q5_1", 7, "q5_1"),
    ("Q8_0", 8, "q8"),
    ("Q2_K", 10, "q2_k"),
    ("Q3_K", 11, "q3_k"),
    ("Q4_K", 12, "q4_k"),
    ("Q5_K", 13, "q5_k"),
    ("Q6_K", 14, "q6_k"),
    ("IQ2_XXS", 16, "iq2_xxs"),
    ("IQ2_XS", 17, "iq2_xs"),
    ("IQ3_XXS", 18, "iq3_xxs"),
    ("IQ1_S", 19, "iq1_s"),
    ("IQ4_NL", 20, "iq4_nl"),
    ("IQ3_S", 21, "iq3_s"),
    ("IQ2_S", 22, "iq2_s"),
    ("IQ4_XS", 23, "iq4_xs"),
    ("IQ1_M", 29, "iq1_m"),
    ("TQ1_0", 34, "tq2_0"),
    ("TQ2_0", 35, "tq2_0"),
    ("MXFP4", 39, "mxfp4"),
    ("NVFP4", 40, "nvfp4"),
];

/// Every block type is carried into the weight type with the same name, and there represents the numbers that the public `gguf`
/// package computes for the same blocks (`ggml/make_blocks.py`).
#[test]
fn block_types_are_carried_at_their_own_size() {
    let mut blocks = Tensors::new();
    read_file(&data("ggml/blocks.safetensors"), &mut blocks);
    for (name, id, weight_type) in BLOCK_TYPES {
        let (codes, numbers) = (&blocks[&format!("{name}.blocks")], values(&blocks, &format!("{name}.values")));
        let per_block = numbers.len() / codes.shape[0];
        let mut noise = Noise(7 + u64::from(id));
        let mut expected: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let (metadata, tensors) = small(|matrix, rows, cols| {
            let (mut data, mut all) = (Vec::new(), Vec::new());
            for _ in 0..rows * cols / per_block {
                let b = noise.bits() as usize % codes.shape[0];
                data.extend_from_slice(&codes.bytes[b * codes.shape[1]..][..codes.shape[1]]);
                all.extend_from_slice(&numbers[b * per_block..][..per_block]);
            }
            expected.insert(matrix.to_owned(), all);
            (id, data)
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, file(&metadata, &tensors)).unwrap();
        let (_, found) = converted(&path);
        let of = |kind, tensor: &str| {
            let (ty, numbers) = &found[&(kind, 0, 0, tensor.to_owned())];
            assert_eq!(ty.to_string(), weight_type, "{name}");
            numbers.clone()
        };
        let same = |found: &[f32], expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs().max(1e-30);
            found.iter().zip(expected).all(near)
        };
        assert!(same(&of(ExtentKind::Attention, "v"), &expected["blk.0.attn_v"]), "{name}: v");
        assert!(same(&of(ExtentKind::Attention, "o"), &expected["blk.0.attn_output"]), "{name}: o");
        let pair = [expected["blk.0.ffn_gate"].clone(), expected["blk.0.ffn_up"].clone()].concat();
        assert!(same(&of(ExtentKind::Dense, "gate_up"), &pair), "{name}: gate and up");
        // Rows of keys and queries are permuted back, whatever their type.
        let back = |rows: &[f32]| {
            let source = |row: usize| row / 64 * 64 + row % 32 * 2 + row % 64 / 32;
            (0..rows.len() / 256).flat_map(|row| rows[source(row) * 256..][..256].to_vec()).collect::<Vec<_>>()
        };
        assert!(same(&of(ExtentKind::Attention, "q"), &back(&expected["blk.0.attn_q"])), "{name}: q");
        assert!(same(&of(ExtentKind::Attention, "k"), &back(&expected["blk.0.attn_k"])), "{name}: k");
        assert!(same(&joined(&found, ExtentKind::Head), &expected["output"]), "{name}: head");
        assert!(same(&joined(&found, ExtentKind::Embedding), &expected["token_embd"]), "{name}: embedding");
    }
}

/// Dynamic quantisations give gate and up of one layer different types: both are carried.
#[test]
fn gate_and_up_may_have_different_types() {
    let mut noise = Noise(11);
    let (metadata, tensors) = small(|matrix, rows, cols| {
        let numbers: Vec<f32> = (0..rows * cols).map(|_| noise.value()).collect();
        match matrix {
            // ggml's type number of bf16.
            "blk.0.ffn_up" => (30, numbers.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()),
            _ => (F32, numbers.iter().flat_map(|v| v.to_le_bytes()).collect()),
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file(&metadata, &tensors)).unwrap();
    let (_, found) = converted(&path);
    let matrix = |name: &str| &found[&(ExtentKind::Dense, 0, 0, name.to_owned())];
    let stored = |name: &str| &tensors.iter().find(|t| t.0 == format!("blk.0.{name}.weight")).unwrap().3;
    assert_eq!((matrix("gate").0, matrix("up").0), (sluice_format::WeightType::F32, sluice_format::WeightType::Bf16));
    let gate: Vec<u8> = matrix("gate").1.iter().flat_map(|v| v.to_le_bytes()).collect();
    let up: Vec<u8> = matrix("up").1.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    assert!(&gate == stored("ffn_gate") && &up == stored("ffn_up"));
}

#[test]
fn queries_keys_and_values_may_be_in_one_tensor() {
    let mut noise = Noise(3);
    let (metadata, tensors) =
        small(|_, rows, cols| (F32, (0..rows * cols).flat_map(|_| noise.value().to_le_bytes()).collect()));
    let folder = tempfile::tempdir().unwrap();
    let (apart, fused) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    fs::write(&apart, file(&metadata, &tensors)).unwrap();
    let (parts, mut rest): (Vec<_>, Vec<_>) =
        tensors.into_iter().partition(|t| ["attn_q.", "attn_k.", "attn_v."].iter().any(|part| t.0.contains(part)));
    let rows = parts.concat_rows();
    rest.push(("blk.0.attn_qkv.weight".into(), F32, vec![rows.len() / 1024, 256], rows));
    fs::write(&fused, file(&metadata, &rest)).unwrap();
    assert_same_numbers("fused", &converted(&fused).1, &converted(&apart).1);
}

trait ConcatRows {
    fn concat_rows(&self) -> Vec<u8>;
}

impl ConcatRows for Vec<Written> {
    fn concat_rows(&self) -> Vec<u8> {
        self.iter().flat_map(|(.., data)| data.clone()).collect()
    }
}

#[test]
fn a_model_in_parts_is_named_by_any_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write_small(folder.path());
    let (metadata, tensors) = small(zeros);
    let name = |number: usize| folder.path().join(format!("big-{number:05}-of-00003.gguf"));
    for (number, of_part) in tensors.chunks(4).enumerate() {
        let mut keys = if number == 0 { metadata.clone() } else { Vec::new() };
        keys.push(("split.no".into(), Value::U32(number as u32)));
        keys.push(("split.count".into(), Value::U32(3)));
        keys.push(("split.tensors.count".into(), Value::U32(12)));
        fs::write(name(number + 1), file(&keys, of_part)).unwrap();
    }
    let expected = converted(&whole);
    for number in 1..=3 {
        assert_eq!(converted(&name(number)), expected, "named by part {number}");
    }
    // Another name hides the other parts.
    let alone = folder.path().join("alone.gguf");
    fs::copy(name(2), &alone).unwrap();
    let error = error_of(&alone);
    assert!(error.contains("split.count") && error.contains("00001-of-00003"), "{error}");
    let mut keys = vec![("general.architecture".to_owned(), Value::Text("qwen3"))];
    keys.extend([("split.no", 2), ("split.count", 3)].map(|(key, n)| (key.to_owned(), Value::U32(n))));
    fs::rename(name(3), &alone).unwrap();
    fs::write(name(3), file(&keys, &tensors[8..])).unwrap();
    let error = error_of(&name(1));
    assert!(error.contains("general.architecture") && error.contains("big-00003"), "{error}");
    fs::rename(&alone, name(3)).unwrap();
    fs::copy(name(3), name(2)).unwrap();
    let error = error_of(&name(1));
    assert!(error.contains("split.no") && error.contains("part 3"), "{error}");
    fs::remove_file(name(2)).unwrap();
    let error = plan(&name(3), &Options::default()).unwrap_err();
    assert!(matches!(error, ConvertError::MissingParts { missing: 1, total: 3, .. }), "{error}");
    assert!(error.to_string().contains("big-00002-of-00003.gguf"), "{error}");
}

#[test]
fn a_model_file_is_compared_with_its_gguf_file() {
    let mut noise = Noise(5);
    let (metadata, tensors) =
        small(|_, rows, cols| (F32, (0..rows * cols).flat_map(|_| noise.value().to_le_bytes()).collect()));
    let folder = tempfile::tempdir().unwrap();
    let (source, model) = (folder.path().join("m.gguf"), folder.path().join("m.sluice"));
    let mut bytes = file(&metadata, &tensors);
    fs::write(&source, &bytes).unwrap();
    convert(&source, &model, &Options::default(), &()).unwrap();
    let differences = |named: &Path| {
        let comparison = Comparison::new(&ModelFile::open(&model).unwrap(), named).unwrap();
        let all = comparison.run(&|_| ()).unwrap();
        all.into_iter().filter(|file| file.difference.is_some()).collect::<Vec<_>>()
    };
    for named in [source.as_path(), folder.path()] {
        assert_eq!(differences(named), []);
    }
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&source, &bytes).unwrap();
    let found = differences(&source);
    assert_eq!((found.len(), found[0].tensors.as_slice()), (1, &["model.norm.weight".to_owned()][..]), "{found:?}");
    bytes[30] ^= 1;
    fs::write(&source, &bytes).unwrap();
    assert_eq!(differences(&source)[0].name, "m.gguf");
}

fn error_of(path: &Path) -> String {
    plan(path, &Options::default()).map(|_: Plan| ()).unwrap_err().to_string()
}

/// The error about the small model after a change of its keys and tensors.
fn error_after(change: impl FnOnce(&mut Vec<(String, Value)>, &mut Vec<Written>)) -> String {
    let (mut metadata, mut tensors) = small(zeros);
    change(&mut metadata, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file(&metadata, &tensors)).unwrap();
    error_of(&path)
}

#[test]
fn what_is_not_supported_is_named_with_its_key() {
    let set = |key: &'static str, value: Value| {
        error_after(|keys, _| {
            keys.retain(|(k, _)| k != key);
            keys.push((key.to_owned(), value));
        })
    };
    for (error, words) in [
        (set("general.architecture", Value::Text("mamba")), &["general.architecture", "mamba", "qwen3moe"][..]),
        (set("general.type", Value::Text("adapter")), &["general.type", "adapter"]),
        (set("general.alignment", Value::U32(33)), &["general.alignment", "33"]),
        (set("llama.block_count", Value::U32(1 << 31)), &["llama.block_count", "12 tensors"]),
        (set("llama.block_count", Value::Text("one")), &["llama.block_count", "one"]),
        (set("llama.attention.head_count", Value::U32(0)), &["head_count"]),
        (set("llama.rope.scaling.type", Value::Text("longrope")), &["rope.scaling.type", "longrope"]),
        (set("llama.attention.causal", Value::Bool(false)), &["attention.causal"]),
        (set("llama.logit_scale", Value::F32(0.5)), &["logit_scale", "0.5"]),
        (set("llama.embedding_length", Value::U32(128)), &["embedding_length", "256"]),
        (
            error_after(|keys, _| keys.retain(|(k, _)| k != "llama.context_length")),
            &["llama.context_length", "missing"],
        ),
        (error_after(|_, t| t.retain(|t| t.0 != "blk.0.ffn_up.weight")), &["missing", "blk.0.ffn_up.weight"]),
        (error_after(|_, t| t.push(("blk.0.what.weight".into(), F32, vec![1], vec![0; 4]))), &["blk.0.what.weight"]),
        (error_after(|_, t| t.push(("a\u{1b}[31m".into(), F32, vec![1], vec![0; 4]))), &["\\u{1b}[31m", "control"]),
        (error_after(|_, t| t[3].1 = 4), &["blk.0.attn_k.weight", "gave up"]),
        (error_after(|_, t| t[3].1 = 99), &["blk.0.attn_k.weight", "99"]),
        (error_after(|_, t| t.push(t[3].clone())), &["blk.0.attn_k.weight", "twice"]),
        (error_after(|k, _| k.push(k[1].clone())), &["llama.block_count", "twice"]),
        (error_after(|_, t| (t[3].1, t[3].2) = (2, vec![128, 250])), &["before byte", "Q4_0", "multiples of 32"]),
    ] {
        words.iter().for_each(|word| assert!(error.contains(word), "{error} lacks {word}"));
    }
}

/// Frequencies that are divided by one number, by Llama 3's and by others, and invalid divisors.
#[test]
fn divided_frequencies() {
    let spec_of = |keys: &[(&str, Value)], factors: &[f32]| {
        let (mut metadata, mut tensors) = small(zeros);
        metadata.extend(keys.iter().map(|(key, value)| (format!("llama.rope.{key}"), value.clone())));
        if !factors.is_empty() {
            tensors.push(("rope_freqs.weight".into(), F32, vec![factors.len()], floats(factors)));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, file(&metadata, &tensors)).unwrap();
        let spec = plan(&path, &Options::default()).map_err(|error| error.to_string())?.spec().clone();
        let AttentionSpec::Gqa(gqa) = &spec.layers[0].attention else { panic!("{spec:?}") };
        Ok::<_, String>(gqa.rope.as_ref().unwrap().scaling.clone())
    };
    let linear = [("scaling.type", Value::Text("linear")), ("scaling.factor", Value::F32(4.0))];
    assert_eq!(spec_of(&linear, &[]).unwrap(), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(spec_of(&[("scale_linear", Value::F32(2.0))], &[]).unwrap(), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(spec_of(&linear[1..], &[]).unwrap(), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(spec_of(&[("scaling.type", Value::Text("linear"))], &[]).unwrap(), RopeScaling::None);
    let none = [("scaling.type", Value::Text("none")), linear[1].clone()];
    assert_eq!(spec_of(&none, &[]).unwrap(), RopeScaling::None);
    let divisors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 / 8.0).collect();
    assert_eq!(
        spec_of(&[], &divisors).unwrap(),
        RopeScaling::Divided { divisors: divisors.clone(), attention_factor: 1.0 }
    );
    assert_eq!(spec_of(&[], &[1.0; 32]).unwrap(), RopeScaling::None);
    let both = divisors.iter().map(|d| d * 4.0).collect();
    assert_eq!(spec_of(&linear, &divisors).unwrap(), RopeScaling::Divided { divisors: both, attention_factor: 1.0 });
    for (keys, factors, words) in [
        (&[][..], &divisors[1..], ["divisors", "31 numbers"]),
        (&[], &[f32::NAN; 32], ["rope_freqs.weight", "NaN"]),
        (&[], &[0.0; 32], ["rope_freqs.weight", "positive"]),
        (&[("scaling.attn_factor", Value::F32(2.0))], &[], ["rope.scaling.attn_factor", "is 2"]),
    ] {
        let error = spec_of(keys, factors).unwrap_err();
        words.iter().for_each(|word| assert!(error.contains(word), "{error} lacks {word}"));
    }
}

#[test]
fn other_versions_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_small(folder.path());
    let bytes = fs::read(&path).unwrap();
    for (version, words) in [
        (1u32, ["version 1", "2023"]),
        (3u32.swap_bytes(), ["big-endian", "little-endian"]),
        (4, ["version 4", "2 and 3"]),
    ] {
        fs::write(&path, [b"GGUF", &version.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
        let error = error_of(&path);
        words.iter().for_each(|word| assert!(error.contains(word), "{error} lacks {word}"));
    }
    fs::write(&path, [b"GGUF", &2u32.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    plan(&path, &Options::default()).unwrap();
}

/// A tool that removes experts leaves the count in the keys.
#[test]
fn tensors_are_right_about_the_number_of_experts() {
    let head = fs::read(fixture("gguf/qwen3_moe.head")).unwrap();
    let golden = fixture("golden/qwen3_moe");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    let mut bytes = of_llama_cpp("qwen3_moe", &config, &read_dir(&golden));
    let key = b"qwen3moe.expert_count";
    let at = head.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&77u32.to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    let plan = plan(&path, &Options::default()).unwrap();
    assert_eq!(plan.spec().layers[0].ffn.moe.as_ref().unwrap().experts, 8);
    assert!(plan.notes().iter().any(|note| note.contains("expert_count") && note.contains("77")), "{:?}", plan.notes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever is changed in a head, the file is planned, or refused with its name.
    #[test]
    fn damaged_heads_are_refused(
        family in prop::sample::select(vec!["llama", "deepseek_v3", "qwen3_next", "gpt_oss_mxfp4", "glm_moe_dsa"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..8u32), 0..6),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let mut bytes = fs::read(fixture(&format!("gguf/{family}.head"))).unwrap();
        for (place, byte, bit) in changes {
            let at = place.index(bytes.len() - 4) + 4;
            bytes[at] = if byte < 128 { byte } else { bytes[at] ^ 1 << bit };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(4));
        } else {
            bytes.resize(2 << 20, 0);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        if let Err(error) = plan(&path, &Options::default()) {
            prop_assert!(error.to_string().contains("m.gguf"), "{error}");
        }
    }
}

/// Every test of this file uses these, except the following.
#[test]
fn the_writer_of_tests_writes_what_it_says() {
    let tensor = Tensor::f32(&[1, 2], [1.0, 2.0]);
    let bytes = file(&[("a".into(), Value::Bools(vec![true, false]))], &[("t".into(), F32, vec![1, 2], tensor.bytes)]);
    let (described, begin) = read_head(&bytes);
    assert_eq!((described[0].name.as_str(), described[0].shape.clone(), described[0].offset), ("t", vec![1, 2], 0));
    assert_eq!(bytes[begin..begin + 8], [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat());
}

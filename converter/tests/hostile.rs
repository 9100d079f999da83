//! Checkpoints that are incomplete, damaged or malicious: always an error that names the file or tensor, never a panic.

use std::path::Path;

use crate::common::safetensors::{Tensor, Tensors, encode, read_dir, write_dir};
use crate::common::{Synthetic, fixture, options};
use proptest::prelude::*;
use serde_json::{Value, json};
use sluice_converter::{ConvertError, Options, TypeChoice, convert, plan};
use sluice_format::WeightType;

/// The error of converting a synthetic checkpoint whose tensors were changed.
fn error_after(dtype: &'static str, change: impl FnOnce(&mut Tensors)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { dtype, ..Synthetic::default() };
    let mut tensors = shape.tensors();
    change(&mut tensors);
    write_dir(dir.path(), &shape.config(), &tensors, 2);
    let out = tempfile::tempdir().unwrap();
    convert(dir.path(), &out.path().join("m"), &options("keep", "keep"), &()).unwrap_err().to_string()
}

const UP: &str = "model.layers.2.mlp.experts.4.up_proj.weight";

#[track_caller]
fn assert_names(error: &str, words: &[&str]) {
    words.iter().for_each(|w| assert!(error.contains(w), "{error} lacks {w}"));
}

#[test]
fn missing_unknown_and_misshapen_tensors_are_named() {
    let error = error_after("BF16", |t| {
        t.remove(UP);
        t.remove("model.layers.0.self_attn.kv_b_proj.weight");
    });
    assert_names(&error, &["2 tensors", UP, "kv_b_proj", "missing"]);
    let error = error_after("BF16", |t| {
        for i in 0..9 {
            t.insert(format!("model.layers.1.extra.{i}"), Tensor::f32(&[1], [0.0]));
        }
    });
    assert_names(&error, &["9 tensors", "`model.layers.1.extra.0`", "…"]);
    let error = error_after("BF16", |t| {
        t.insert(UP.into(), Tensor::bf16(&[41, 72], vec![0.0; 41 * 72]));
    });
    assert_names(&error, &[UP, "[41, 72]", "[40, 72]", ".safetensors"]);
}

#[test]
fn layers_that_the_configuration_does_not_count_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut tensors = shape.tensors();
    let mut config = shape.config();
    config["num_hidden_layers"] = json!(2);
    // Whatever is announced: layer 2 has no mark of a prediction layer.
    for announced in [json!(null), json!(0), json!(1)] {
        config["num_nextn_predict_layers"] = announced;
        write_dir(dir.path(), &config, &tensors, 1);
        let error = plan(dir.path(), &Options::default()).unwrap_err();
        assert!(matches!(error, ConvertError::SurplusLayers { layers: 2, .. }), "{error}");
        assert_names(&error.to_string(), &["`model.layers.2.", "num_hidden_layers", "config.json"]);
    }
    tensors.insert("model.layers.2.eh_proj.weight".into(), Tensor::f32(&[1], [0.0]));
    for announced in [json!(null), json!(0), json!(1)] {
        config["num_nextn_predict_layers"] = announced;
        write_dir(dir.path(), &config, &tensors, 1);
        let plan = plan(dir.path(), &Options::default()).unwrap();
        assert_eq!(plan.left_out()[0].reason, "multi-token prediction layers");
    }
}

#[test]
fn types_that_are_not_supported_are_named_with_those_that_are() {
    let error = error_after("BF16", |t| {
        t.insert(UP.into(), Tensor { dtype: "I8".into(), shape: vec![40, 72], bytes: vec![0; 40 * 72] });
    });
    assert_names(&error, &[UP, "I8", "BF16", "F8_E4M3"]);
    let error = error_after("BF16", |t| {
        let norm = Tensor { dtype: "F8_E4M3".into(), shape: vec![72], bytes: vec![0; 72] };
        t.insert("model.norm.weight".into(), norm);
        t.insert("model.norm.weight_scale_inv".into(), Tensor::f32(&[1], [1.0]));
    });
    assert_names(&error, &["model.norm.weight", "F8_E4M3"]);
    let error = error_after("F8_E4M3", |t| {
        t.remove(&format!("{UP}_scale_inv"));
    });
    assert_names(&error, &["_scale_inv", "missing"]);
    let error = error_after("F8_E4M3", |t| {
        t.insert(format!("{UP}_scale_inv"), Tensor::f32(&[2, 1], [1.0, 1.0]));
    });
    assert_names(&error, &["_scale_inv", "[2, 1]", "[1, 1]"]);
    for ty in [WeightType::F16, WeightType::Int4, WeightType::Mxfp4] {
        let options = Options { dense_type: TypeChoice::Type(ty), ..Options::default() };
        let error = plan(Path::new("nowhere"), &options).unwrap_err().to_string();
        assert_names(&error, &[ty.name(), "dense", "q8"]);
    }
    assert!("f16".parse::<TypeChoice>().unwrap_err().contains("bf16"));
}

#[test]
fn what_is_not_a_number_is_named() {
    for (value, dtype) in [(f32::NAN, "BF16"), (f32::INFINITY, "F16"), (f32::NEG_INFINITY, "F32")] {
        let error = error_after(dtype, |t| {
            let tensor = t.get_mut(UP).unwrap();
            let mut values = tensor.values();
            values[100] = value;
            *tensor = match dtype {
                "BF16" => Tensor::bf16(&[40, 72], values),
                "F16" => Tensor::f16(&[40, 72], values),
                _ => Tensor::f32(&[40, 72], values),
            };
        });
        assert_names(&error, &[UP, "not a number"]);
    }
    for code in [0x7f, 0xff] {
        let error = error_after("F8_E4M3", |t| t.get_mut(UP).unwrap().bytes[2879] = code);
        assert_names(&error, &[UP, "not a number"]);
    }
    let error = error_after("F8_E4M3", |t| {
        t.insert(format!("{UP}_scale_inv"), Tensor::f32(&[1, 1], [f32::INFINITY]));
    });
    assert_names(&error, &["_scale_inv", "not a number"]);
}

/// What a token would be refused for days after the conversion.
#[test]
fn tables_that_name_no_expert_are_refused() {
    let folder = fixture("golden/deepseek_v4");
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let (tensors, dir) = (read_dir(&folder), tempfile::tempdir().unwrap());
    let experts = config["n_routed_experts"].as_i64().unwrap();
    let (name, table) =
        tensors.iter().find(|(name, _)| name.ends_with("ffn.gate.tid2eid")).expect("layers with tables");
    assert_eq!(table.dtype, "I64");
    let cols = table.shape[1];
    let listed = |at: usize| i64::from_le_bytes(table.bytes[8 * at..][..8].try_into().unwrap());
    let at = 17 * cols + 1;
    for (value, word) in [(experts, ""), (-1, ""), (i64::MAX, ""), (listed(at - 1), " twice")] {
        let mut damaged = tensors.clone();
        damaged.get_mut(name).unwrap().bytes[8 * at..][..8].copy_from_slice(&value.to_le_bytes());
        let source = dir.path().join(format!("source{value}"));
        std::fs::create_dir(&source).unwrap();
        write_dir(&source, &config, &damaged, 2);
        let error = convert(&source, &dir.path().join(format!("m{value}")), &options("keep", "keep"), &()).unwrap_err();
        assert!(matches!(error, ConvertError::Damaged { .. }), "{error}");
        let said = format!("`{name}` has {}{word} in row 17,", value as f64);
        assert_names(&error.to_string(), &[&said, &format!("from 0 to {}", experts - 1), ".safetensors"]);
    }
}

#[test]
fn what_does_not_fit_the_type_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { dtype: "F32", ..Synthetic::default() };
    let mut tensors = shape.tensors();
    tensors.insert(UP.into(), Tensor::f32(&[40, 72], vec![f32::MAX; 40 * 72]));
    write_dir(dir.path(), &shape.config(), &tensors, 1);
    let dst = dir.path().join("m");
    let error = convert(dir.path(), &dst, &options("bf16", "keep"), &()).unwrap_err();
    assert!(matches!(error, ConvertError::TooLarge { .. }), "{error}");
    assert_names(&error.to_string(), &[UP, "bf16"]);
    let dst = dir.path().join("q");
    // Half a step beyond ±127 times f16's largest number is the last that q8 holds.
    for (value, holds) in [(8_351_760.0, true), (8_351_761.0, false)] {
        tensors.insert(UP.into(), Tensor::f32(&[40, 72], vec![value; 40 * 72]));
        write_dir(dir.path(), &shape.config(), &tensors, 1);
        match convert(dir.path(), &dst, &Options { overwrite: true, ..options("q8", "keep") }, &()) {
            Ok(summary) => assert!(holds && summary.notes.is_empty(), "{:?}", summary.notes),
            Err(error) => {
                assert!(!holds && matches!(error, ConvertError::TooLarge { .. }), "{error}");
                assert_names(&error.to_string(), &[UP, "q8"]);
            }
        }
    }
}

#[test]
fn weights_that_are_too_small_for_q8_are_counted_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { dtype: "F32", ..Synthetic::default() };
    let mut tensors = shape.tensors();
    // Three blocks of each row of 72: one that becomes zero, one that is zero, one that stays.
    let row = [vec![2e-8; 32], vec![0.0; 32], vec![5e-8; 8]].concat();
    tensors.insert(UP.into(), Tensor::f32(&[40, 72], row.repeat(40)));
    write_dir(dir.path(), &shape.config(), &tensors, 1);
    let summary = convert(dir.path(), &dir.path().join("m"), &options("q8", "keep"), &()).unwrap();
    let [note] = summary.notes.as_slice() else { panic!("{:?}", summary.notes) };
    assert_names(note, &["40 blocks", "q8", "`layer 2 expert 4 gate_up`"]);
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    for file in ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b"] {
        let dir = tempfile::tempdir().unwrap();
        Synthetic::default().write(dir.path(), 2);
        let index = json!({"weight_map": {"model.norm.weight": file}}).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let error = plan(dir.path(), &Options::default()).unwrap_err().to_string();
        assert_names(&error, &["index.json", "not a name of a file"]);
    }
}

#[test]
fn folders_that_are_no_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let fail = || plan(dir.path(), &Options::default()).unwrap_err().to_string();
    assert_names(&fail(), &["not a Hugging Face checkpoint", "config.json"]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    assert_names(&fail(), &["neither", "model.safetensors.index.json"]);
    std::fs::write(dir.path().join("model.safetensors"), encode([].into_iter())).unwrap();
    assert_names(&fail(), &["config.json", "not a JSON object"]);
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_names(&fail(), &["`model_type` is missing", "deepseek_v3"]);
}

#[test]
fn side_files_that_are_no_json_are_named() {
    let dir = tempfile::tempdir().unwrap();
    Synthetic::default().write(dir.path(), 1);
    for name in ["tokenizer.json", "generation_config.json", "tokenizer_config.json"] {
        for broken in ["", "[1]", "{\"a\": [1, 2"] {
            std::fs::write(dir.path().join(name), broken).unwrap();
            let error = plan(dir.path(), &Options::default()).unwrap_err();
            assert!(matches!(error, ConvertError::Damaged { .. }), "{error}");
            assert_names(&error.to_string(), &[name, "JSON object"]);
        }
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    plan(dir.path(), &Options::default()).unwrap();
}

/// A tiny checkpoint in one file, for mutations.
fn tiny() -> (Synthetic, Vec<u8>) {
    let shape = Synthetic { layers: 2, experts: 2, hidden: 8, width: 8, vocab: 9, ..Synthetic::default() };
    let bytes = encode(shape.tensors().iter());
    (shape, bytes)
}

/// Plans and, if that works, converts; whatever happens, it is no panic.
fn survive(config: &[u8], bytes: &[u8]) -> Result<(), ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    convert(dir.path(), &dir.path().join("m"), &options("q8", "keep"), &()).map(|_| ())
}

#[test]
fn every_truncation_is_refused() {
    let (shape, bytes) = tiny();
    let config = shape.config().to_string().into_bytes();
    assert!(survive(&config, &bytes).is_ok());
    for len in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        let error = survive(&config, &bytes[..len]).unwrap_err().to_string();
        assert_names(&error, &["model.safetensors"]);
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let header = |json: &str, data: usize| {
        [(json.len() as u64).to_le_bytes().as_slice(), json.as_bytes(), &vec![0; data]].concat()
    };
    let (shape, _) = tiny();
    let config = shape.config().to_string().into_bytes();
    for (bytes, word) in [
        (u64::MAX.to_le_bytes().to_vec(), "header claims"),
        (header("{", 0), "not valid"),
        (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4), "does not explain"),
        (header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4), "before it begins"),
        (header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 3), "only 3"),
        (header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 5), "the file at"),
        (
            header(r#"{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,1]}}"#, 1),
            "does not explain",
        ),
        (
            header(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
            ),
            "twice",
        ),
        (
            header(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                3,
            ),
            "predecessor",
        ),
    ] {
        let error = survive(&config, &bytes).unwrap_err().to_string();
        assert_names(&error, &[word, "model.safetensors"]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn mutated_headers_never_panic(edits in prop::collection::vec((0usize..6000, any::<u8>()), 1..6)) {
        let (shape, mut bytes) = tiny();
        for (at, value) in edits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let _ = survive(shape.config().to_string().as_bytes(), &bytes);
    }

    #[test]
    fn mutated_digits_never_panic(edits in prop::collection::vec((0usize..500, 0u8..10), 1..4)) {
        let (shape, mut bytes) = tiny();
        let digits: Vec<usize> = (8..6000).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (at, digit) in edits {
            bytes[digits[at % digits.len()]] = b'0' + digit;
        }
        let _ = survive(shape.config().to_string().as_bytes(), &bytes);
    }

    #[test]
    fn mutated_configurations_never_panic(edits in prop::collection::vec((0usize..500, any::<u8>()), 1..4)) {
        let (shape, bytes) = tiny();
        let mut config = shape.config().to_string().into_bytes();
        for (at, value) in edits {
            let at = at % config.len();
            config[at] = if value < 128 { b'0' + value % 10 } else { value };
        }
        let _ = survive(&config, &bytes);
    }
}

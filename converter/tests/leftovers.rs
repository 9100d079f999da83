//! What tools leave in published checkpoints: it changes nothing where the tensors say all, and is refused by name where
//! leaving it out would change the model.

use crate::common;

use crate::common::safetensors::{Tensor, Tensors, read_dir, write_dir};
use crate::common::{Content, Noise, Synthetic, content, fixture, options};
use serde_json::{Value, json};
use sluice_converter::{ConvertError, Summary, convert, plan};

fn converted(config: &Value, tensors: &Tensors) -> Result<(Summary, Content), ConvertError> {
    let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_dir(src.path(), config, tensors, 2);
    let file = dst.path().join("m");
    let summary = convert(src.path(), &file, &options("f32", "f32"), &())?;
    Ok((summary, content(&file)))
}

/// What comes of a checkpoint with one more file.
fn converted_beside(config: &Value, tensors: &Tensors, beside: (&str, &Value)) -> Result<Content, ConvertError> {
    let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_dir(src.path(), config, tensors, 2);
    std::fs::write(src.path().join(beside.0), beside.1.to_string()).unwrap();
    let file = dst.path().join("m");
    convert(src.path(), &file, &options("f32", "f32"), &())?;
    Ok(content(&file))
}

fn golden(name: &str) -> (Value, Tensors) {
    let folder = fixture(&format!("golden/{name}"));
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    (config, read_dir(&folder))
}

/// Biases beside all `qweight`, as AutoGPTQ wrote them.
fn with_biases(tensors: &Tensors) -> Tensors {
    let mut all = tensors.clone();
    for (name, t) in tensors {
        if let Some(stem) = name.strip_suffix(".qweight") {
            let zeros = (0..t.shape[1]).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 });
            all.insert(format!("{stem}.bias"), Tensor::f16(&[t.shape[1]], zeros));
        }
    }
    all
}

#[test]
fn biases_of_zeros_are_left_out_and_others_are_refused_by_name() {
    let (config, tensors) = golden("qwen3_moe_gptq");
    let (_, want) = converted(&config, &tensors).unwrap();
    let mut biased = with_biases(&tensors);
    let (summary, found) = converted(&config, &biased).unwrap();
    assert!(found == want);
    let left_out = summary.left_out.iter().find(|l| l.reason.contains("zero")).unwrap();
    assert_eq!(left_out.tensors, biased.len() - tensors.len());

    let name = biased.keys().rfind(|n| n.ends_with("down_proj.bias")).unwrap().clone();
    biased.get_mut(&name).unwrap().bytes[3] = 0x3c;
    let error = converted(&config, &biased).unwrap_err();
    assert!(matches!(&error, ConvertError::NotZero { tensor, .. } if *tensor == name), "{error}");
    assert!(error.to_string().contains(&name) && error.to_string().contains(".safetensors"), "{error}");

    // Whose zeros they are cannot be told without the configuration.
    let mut silent = config.clone();
    silent.as_object_mut().unwrap().remove("quantization_config");
    let error = converted(&silent, &tensors).unwrap_err().to_string();
    assert!(error.contains("qweight") && error.contains("`quant_method`"), "{error}");

    // The file that tools wrote before `config.json` had such a section says it too; where both speak, they complete another.
    for (section, beside) in [
        (None, json!({"bits": 4, "group_size": 64, "desc_act": false})),
        (Some(json!({"quant_method": "gptq", "bits": 4})), json!({"bits": 4, "checkpoint_format": "gptq"})),
        (Some(json!({"checkpoint_format": "gptq", "bits": 4})), json!({"checkpoint_format": "gptq_v2"})),
    ] {
        let mut config = silent.clone();
        if let Some(section) = section {
            config["quantization_config"] = section;
        }
        let found = converted_beside(&config, &tensors, ("quantize_config.json", &beside)).unwrap();
        assert!(found == want, "{beside}");
    }
    let second = json!({"bits": 4, "checkpoint_format": "gptq_v2"});
    let found = converted_beside(&silent, &tensors, ("quantize_config.json", &second)).unwrap();
    assert!(found != want, "other zeros are other weights");

    // A bias of what the model does not have is unknown, zero or not.
    let mut stray = tensors.clone();
    stray.insert("model.layers.0.extra.bias".into(), Tensor::f32(&[1], [0.0]));
    assert!(matches!(converted(&config, &stray), Err(ConvertError::UnknownTensors { .. })));
}

/// Every spelling of `quantization_config` beside tensors that are not quantised, or that say how.
#[test]
fn quantisation_that_tensors_do_not_have_is_not_asked_for() {
    let shape = Synthetic::default();
    let fp8 = Synthetic { dtype: "F8_E4M3", hidden: 256, width: 128, ..Synthetic::default() };
    for shape in [shape, fp8] {
        let (_, want) = converted(&shape.config(), &shape.tensors()).unwrap();
        for leftover in [
            json!({}),
            json!(null),
            json!({"quant_method": null}),
            json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
            json!({"quant_method": "FP8", "fmt": "E4M3", "activation_scheme": "Dynamic"}),
            json!({"quant_method": "fp8", "fmt": "float8_e4m3fnuz"}),
            json!({"quant_method": "Compressed-Tensors", "format": "naive-quantized"}),
            json!({"quant_method": "compressed-tensors", "format": "int-quantized",
                "config_groups": {"group_0": {"weights": {"symmetric": false, "type": "int", "num_bits": 8}}}}),
            json!({"producer": {"name": "modelopt"}, "quant_method": "modelopt",
                "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}),
            json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
            json!({"_load_in_4bit": false, "_load_in_8bit": false, "quant_method": "bitsandbytes"}),
            json!({"quant_method": "awq", "bits": 8, "version": "marlin"}),
            json!({"quant_method": "gptq", "bits": 3, "checkpoint_format": "marlin"}),
            json!({"quant_method": "hqq"}),
        ] {
            let mut config = shape.config();
            config["quantization_config"] = leftover.clone();
            let (_, found) = converted(&config, &shape.tensors()).unwrap_or_else(|e| panic!("{leftover}: {e}"));
            assert!(found == want, "{leftover}");
        }
    }
}

/// As programs leave it that reserve a file's space before they download it.
#[test]
fn matrices_of_zeros_are_named() {
    let shape = Synthetic::default();
    let (summary, _) = converted(&shape.config(), &shape.tensors()).unwrap();
    assert!(!summary.notes.iter().any(|n| n.contains("zeros")), "{:?}", summary.notes);
    let mut tensors = shape.tensors();
    let name = tensors.keys().rfind(|n| n.ends_with("down_proj.weight")).unwrap().clone();
    tensors.get_mut(&name).unwrap().bytes.fill(0);
    let (summary, _) = converted(&shape.config(), &tensors).unwrap();
    let noted = |n: &String| n.contains("nothing but zeros") && n.contains(&name) && n.contains("download");
    assert!(summary.notes.iter().any(noted), "{:?}", summary.notes);
}

#[test]
fn scales_of_activations_and_caches_are_left_out() {
    let shape = Synthetic { dtype: "F8_E4M3", hidden: 256, width: 128, ..Synthetic::default() };
    let (_, want) = converted(&shape.config(), &shape.tensors()).unwrap();
    let mut tensors = shape.tensors();
    let ends = [
        "self_attn.kv_scale",
        "self_attn.k_proj.k_scale",
        "self_attn.v_proj.v_scale",
        "self_attn.attn.q_scale",
        "self_attn.o_proj.output_scale",
        "self_attn.o_proj.input_scale",
        "self_attn.o_proj.input_scale_ub",
        "mlp.shared_experts.down_proj.activation_scale",
    ];
    for end in ends {
        tensors.insert(format!("model.layers.1.{end}"), Tensor::f32(&[1], [0.5]));
    }
    let (summary, found) = converted(&shape.config(), &tensors).unwrap();
    assert!(found == want);
    assert_eq!((summary.left_out.len(), summary.left_out[0].tensors), (1, ends.len()));
}

/// Scales per block of another size are read as the configuration says: shapes do not always tell.
#[test]
fn blocks_of_fp8_may_have_other_sizes() {
    let shape = Synthetic { hidden: 192, width: 96, ..Synthetic::default() };
    let (name, mut noise) = ("model.layers.1.mlp.experts.0.down_proj.weight", Noise(5));
    let codes: Vec<u8> = (0..192 * 96).map(|_| (noise.bits() >> 40) as u8 & 0x77).collect();
    let scales: Vec<f32> = (0..2 * 2).map(|_| noise.value().abs() + 0.1).collect();
    let mut tensors = shape.tensors();
    // Two rows of scales for 192 rows: of 96 each, not of 128 and 64.
    let value = |(i, code): (usize, &u8)| common::safetensors::e4m3(*code) * scales[i / 96 / 96 * 2 + i % 96 / 48];
    tensors.insert(name.into(), Tensor::f32(&[192, 96], codes.iter().enumerate().map(value)));
    let (_, want) = converted(&shape.config(), &tensors).unwrap();
    tensors.insert(name.into(), Tensor { dtype: "F8_E4M3".into(), shape: vec![192, 96], bytes: codes });
    tensors.insert(format!("{name}_scale_inv"), Tensor::f32(&[2, 2], scales));
    let mut config = shape.config();
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [96, 48]});
    let (_, found) = converted(&config, &tensors).unwrap();
    assert!(found == want);
    for wrong in [json!([96]), json!([0, 48]), json!(["a", 1])] {
        config["quantization_config"]["weight_block_size"] = wrong;
        let error = converted(&config, &tensors).unwrap_err().to_string();
        assert!(error.contains("weight_block_size"), "{error}");
    }
}

#[test]
fn bitsandbytes_is_named() {
    let shape = Synthetic::default();
    let mut tensors = shape.tensors();
    let name = "model.layers.0.self_attn.o_proj.weight";
    let codes = Tensor { dtype: "U8".into(), shape: vec![10, 1], bytes: vec![0; 10] };
    tensors.insert(name.into(), codes.clone());
    tensors.insert(format!("{name}.quant_state.bitsandbytes__nf4"), codes);
    let error = converted(&shape.config(), &tensors).unwrap_err().to_string();
    assert!(error.contains("bitsandbytes") && error.contains("quantization_config"), "{error}");
}

#[test]
fn words_of_python_in_json_do_no_harm_where_nobody_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    shape.write(dir.path(), 2);
    let config = shape.config().to_string();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let with = |end: &str| format!("{}, {end}}}", config.strip_suffix('}').unwrap());
    write("config.json", &with(r#""time_step_limit": [0.0, Infinity], "x": NaN, "y": {"z": -Infinity}"#));
    write("generation_config.json", r#"{"repetition_penalty": 1.0, "max_time": Infinity}"#);
    write("tokenizer_config.json", r#"{"model_max_length": Infinity, "pad_token": "NaN"}"#);
    let index = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap().replace("\"total_size\":0", "\"total_size\":NaN");
    assert!(text.contains("NaN"));
    std::fs::write(&index, text).unwrap();
    plan(dir.path(), &options("keep", "keep")).unwrap();
    write("config.json", &config.replace("\"rope_theta\":10000", "\"rope_theta\":Infinity"));
    let error = plan(dir.path(), &options("keep", "keep")).unwrap_err().to_string();
    assert!(error.contains("`rope_theta` is \"Infinity\"") && error.contains("number"), "{error}");
}

//! Prediction layers: carried where they are whole and understood, left out with a remark where they are not.

use std::path::Path;

use crate::common::safetensors::{Tensor, Tensors, read_dir, write_dir};
use crate::common::{Content, content, fixture, options};
use serde_json::Value;
use sluice_converter::{Options, Plan, convert, plan};
use sluice_format::{AttentionSpec, ExtentKind, ModelFile, ModelSpec};

const UP: &str = "model.layers.3.mlp.experts.7.up_proj.weight";

/// Configuration and tensors of a golden checkpoint.
fn golden(name: &str) -> (Value, Tensors) {
    let folder = fixture("golden").join(name);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    (serde_json::from_slice(&config).unwrap(), read_dir(&folder))
}

fn planned(config: &Value, tensors: &Tensors) -> Plan {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), config, tensors, 2);
    plan(dir.path(), &Options::default()).unwrap()
}

fn converted(config: &Value, tensors: &Tensors, options: &Options) -> (ModelSpec, Content) {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), config, tensors, 2);
    let dst = dir.path().join("m.sluice");
    convert(dir.path(), &dst, options, &()).unwrap();
    (ModelFile::open(&dst).unwrap().spec().clone(), content(&dst))
}

/// The layer is left out, with a remark that says this, and the rest is as without it.
fn left_out(config: &Value, tensors: &Tensors, says: &[&str]) {
    let plan = planned(config, tensors);
    let [note] = plan.notes() else { panic!("{:?}", plan.notes()) };
    for part in [&["multi-token prediction is left out"], says].concat() {
        assert!(note.contains(part), "{part}: {note}");
    }
    assert_eq!(plan.left_out()[0].reason, "multi-token prediction layers");
    assert!(plan.spec().prediction.is_none() && plan.extents().iter().all(|e| plan.spec().decodes(e)));
    let without = Options { mtp: false, ..Options::default() };
    assert!(converted(config, tensors, &Options::default()) == converted(config, tensors, &without));
}

#[test]
fn what_is_incomplete_or_not_understood_is_left_out() {
    let (config, whole) = golden("deepseek_v3");
    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole.clone();
        change(&mut tensors);
        tensors
    };
    let missing = changed(&|t| drop(t.remove(UP)));
    left_out(&config, &missing, &["does not have", UP]);
    let no_norm = changed(&|t| drop(t.remove("model.layers.3.shared_head.norm.weight")));
    left_out(&config, &no_norm, &["`model.layers.3.shared_head.norm.weight`"]);
    let unknown = changed(&|t| drop(t.insert("model.layers.3.self_attn.new.weight".into(), Tensor::f32(&[1], [0.0]))));
    left_out(&config, &unknown, &["`model.layers.3.self_attn.new.weight`", "does not know"]);
    let bias = |value| Tensor::f32(&[64], vec![value; 64]);
    let name = "model.layers.3.self_attn.o_proj.bias";
    left_out(&config, &changed(&|t| drop(t.insert(name.into(), bias(0.5)))), &[name]);
    // What changes nothing is no reason, nor are scales of activations.
    let harmless = changed(&|t| {
        t.insert(name.into(), bias(0.0));
        t.insert("model.layers.3.self_attn.o_proj.input_scale".into(), Tensor::f32(&[1], [1.0]));
    });
    let plan = planned(&config, &harmless);
    assert!(plan.spec().prediction.is_some() && plan.notes().is_empty(), "{:?}", plan.notes());
    assert_eq!(plan.left_out().iter().map(|l| l.tensors).sum::<usize>(), 2, "{:?}", plan.left_out());
}

#[test]
fn of_several_the_first_is_carried() {
    let (config, mut tensors) = golden("deepseek_v3");
    let one = converted(&config, &tensors, &Options::default());
    let second = tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix("model.layers.3.")?, t.clone())));
    let second: Vec<_> = second.map(|(rest, t)| (format!("model.layers.4.{rest}"), t)).collect();
    let count = second.len();
    tensors.extend(second);
    let plan = planned(&config, &tensors);
    let [left_out] = plan.left_out() else { panic!("{:?}", plan.left_out()) };
    assert_eq!((left_out.reason.as_str(), left_out.tensors), ("multi-token prediction layers", count));
    assert!(converted(&config, &tensors, &Options::default()) == one);
}

#[test]
fn what_is_announced_and_not_there_is_not_missed() {
    let (mut config, mut tensors) = golden("deepseek_v3");
    tensors.retain(|name, _| !name.starts_with("model.layers.3."));
    for announced in [0, 1, 3] {
        config["num_nextn_predict_layers"] = announced.into();
        let plan = planned(&config, &tensors);
        assert!(plan.notes().is_empty() && plan.left_out().is_empty() && plan.spec().prediction.is_none());
    }
}

#[test]
fn an_embedding_and_a_head_that_differ_are_carried_too() {
    let (config, whole) = golden("glm4_moe");
    for (name, kind) in [("embed_tokens", ExtentKind::Embedding), ("shared_head.head", ExtentKind::Head)] {
        let name = format!("model.layers.3.{name}.weight");
        let mut tensors = whole.clone();
        let last = tensors[&name].bytes.len() - 2;
        tensors.get_mut(&name).unwrap().bytes[last] ^= 1;
        let (spec, found) = converted(&config, &tensors, &options("keep", "bf16"));
        let prediction = spec.prediction.unwrap();
        let own = [prediction.own_embedding, prediction.own_head];
        assert_eq!(own, [kind == ExtentKind::Embedding, kind == ExtentKind::Head]);
        let stored = &found[&(kind, 3, 0, kind.name().to_owned())].1;
        assert!(*stored == tensors[&name].values(), "{name}");

        // One in another type cannot be compared, and is the layer's own.
        let mut tensors = whole.clone();
        let t = &whole[&name];
        tensors.insert(name.clone(), Tensor::f32(&t.shape, t.values()));
        let prediction = planned(&config, &tensors).spec().prediction.clone().unwrap();
        assert!(prediction.own_embedding != prediction.own_head);

        // One that is not there is the model's.
        tensors.remove(&name);
        let prediction = planned(&config, &tensors).spec().prediction.clone().unwrap();
        assert!(!prediction.own_embedding && !prediction.own_head);
    }
}

fn with_qwen(name: &str) -> (Value, Tensors) {
    let (config, mut tensors) = golden(name);
    let folder = tempfile::tempdir().unwrap();
    let file = fixture("mtp").join(name).join("mtp.safetensors");
    std::fs::copy(file, folder.path().join("model-mtp.safetensors")).unwrap();
    tensors.extend(read_dir(folder.path()));
    (config, tensors)
}

#[test]
fn qwens_have_a_module_of_their_own() {
    for name in ["qwen3_next", "qwen3_5_moe"] {
        let (config, tensors) = with_qwen(name);
        let (spec, found) = converted(&config, &tensors, &Options::default());
        let layer = &spec.prediction.as_ref().unwrap().layer;
        assert!(matches!(&layer.attention, AttentionSpec::Gqa(gqa) if gqa.output_gate));
        assert_eq!(layer.ffn, spec.layers[0].ffn);
        let values = |name: &str| tensors[name].values();
        let stored = |kind, name: &str| &found[&(kind, 4, 0, name.to_owned())].1;
        assert!(*stored(ExtentKind::Prediction, "projection") == values("mtp.fc.weight"));
        // Norms are stored around zero.
        for (name, source) in [
            ("embedding_norm", "mtp.pre_fc_norm_embedding.weight"),
            ("hidden_norm", "mtp.pre_fc_norm_hidden.weight"),
            ("norm", "mtp.norm.weight"),
        ] {
            let expected: Vec<f32> = values(source).iter().map(|v| v + 1.0).collect();
            assert!(*stored(ExtentKind::Prediction, name) == expected, "{name}");
        }
        assert!(*stored(ExtentKind::Expert, "down") == values("mtp.layers.0.mlp.experts.0.down_proj.weight"));
        let mut tensors = tensors.clone();
        tensors.insert("mtp.layers.1.input_layernorm.weight".into(), Tensor::f32(&[64], vec![0.0; 64]));
        left_out(&config, &tensors, &["`mtp.layers.1.input_layernorm.weight`"]);
    }
}

#[test]
fn norms_of_a_prediction_layer_in_an_arrangement_of_mlx_are_left_alone() {
    let (config, mut tensors) = with_qwen("qwen3_next");
    // As mlx-lm saves it: norms of the decoder plus one, convolutions with the width before the channel.
    for (name, tensor) in &mut tensors {
        if name.starts_with("model.") && name.ends_with("norm.weight") && !name.contains("linear_attn") {
            *tensor = Tensor::bf16(&tensor.shape.clone(), tensor.values().into_iter().map(|v| v + 1.0));
        }
        if name.ends_with("conv1d.weight") {
            tensor.shape.swap(1, 2);
        }
    }
    left_out(&config, &tensors, &["MLX"]);
}

#[test]
fn a_damaged_one_is_an_error_that_names_it() {
    let (config, mut tensors) = golden("deepseek_v3");
    tensors.insert("model.layers.3.eh_proj.weight".into(), Tensor::f32(&[64, 64], vec![0.0; 64 * 64]));
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &config, &tensors, 1);
    let refused = |options: &Options| plan(Path::new(dir.path()), options).map(drop);
    let error = refused(&Options::default()).unwrap_err().to_string();
    assert!(error.contains("model.layers.3.eh_proj.weight") && error.contains("[64, 64]"), "{error}");
    refused(&Options { mtp: false, ..Options::default() }).unwrap();
}

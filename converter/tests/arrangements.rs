//! What mlx-lm makes of a checkpoint before it saves it, family by family: converted, it is the same file content.

use crate::common::safetensors::{Tensor, Tensors, read_dir, write_dir};
use crate::common::{Content, Noise, Synthetic, content, fixture, options};
use serde_json::{Value, json};
use sluice_converter::{ConvertError, Summary, convert};

fn golden(name: &str) -> (Value, Tensors) {
    let folder = fixture(&format!("golden/{name}"));
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    (config, read_dir(&folder))
}

fn converted(config: &Value, tensors: &Tensors, choice: &str) -> Result<(Summary, Content), ConvertError> {
    let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_dir(src.path(), config, tensors, 1);
    let file = dst.path().join("m");
    let summary = convert(src.path(), &file, &options(choice, choice), &())?;
    Ok((summary, content(&file)))
}

/// Removes the experts of a layer one by one, and adds them stacked.
fn stack_experts(tensors: &mut Tensors) {
    let names: Vec<String> = tensors.keys().filter(|n| n.contains(".experts.0.")).cloned().collect();
    for first in names {
        let mut parts = Vec::new();
        while let Some(part) = tensors.remove(&first.replace(".experts.0.", &format!(".experts.{}.", parts.len()))) {
            parts.push(part);
        }
        let shape = [&[parts.len()], parts[0].shape.as_slice()].concat();
        let bytes = parts.iter().flat_map(|t| t.bytes.clone()).collect();
        let stack = Tensor { dtype: parts[0].dtype.clone(), shape, bytes };
        tensors.insert(first.replace(".experts.0.", ".switch_mlp."), stack);
    }
}

/// Rows `first`, `first + step`, … of every matrix of a stack.
fn rows(t: &Tensor, first: usize, step: usize) -> Tensor {
    let count = t.shape[1];
    let row = t.bytes.len() / t.shape[0] / count;
    let mut shape = t.shape.clone();
    shape[1] = count / step;
    let of_matrix = |m: usize| (first..count).step_by(step).map(move |r| (m * count + r) * row);
    let bytes = (0..t.shape[0]).flat_map(of_matrix).flat_map(|at| t.bytes[at..at + row].to_vec()).collect();
    Tensor { dtype: t.dtype.clone(), shape, bytes }
}

#[test]
fn experts_of_gpt_oss_with_gate_and_up_apart() {
    let (mut config, tensors) = golden("gpt_oss_mxfp4");
    let (summary, want) = converted(&config, &tensors, "keep").unwrap();
    let mut saved = Tensors::new();
    for (name, mut t) in tensors {
        let new = name.replace("_blocks", ".weight").replace("_scales", ".scales").replace("proj_bias", "proj.bias");
        if name.ends_with("_blocks") {
            t.dtype = "U32".into();
            t.shape = vec![t.shape[0], t.shape[1], t.shape[2] * t.shape[3] / 4];
        }
        if new.contains("gate_up_proj") {
            saved.insert(new.replace("gate_up_", "gate_"), rows(&t, 0, 2));
            saved.insert(new.replace("gate_up_", "up_"), rows(&t, 1, 2));
        } else {
            saved.insert(new, t);
        }
    }
    config.as_object_mut().unwrap().remove("quantization_config");
    config["quantization"] = json!({"group_size": 32, "bits": 4, "mode": "mxfp4"});
    let (ours, found) = converted(&config, &saved, "keep").unwrap();
    assert!(found == want);
    assert_eq!((&ours.types, &ours.types["expert.down"]), (&summary.types, &vec!["mxfp4".to_owned()]));
}

/// The halves of `kv_b_proj`, head by head, that of keys transposed: `[heads, rank, nope]` and `[heads, v, rank]`.
fn halves(values: &[f32], [nope, v, rank]: [usize; 3]) -> [Vec<f32>; 2] {
    let mut out = [Vec::new(), Vec::new()];
    for head in values.chunks((nope + v) * rank) {
        out[0].extend((0..rank).flat_map(|r| (0..nope).map(move |n| head[n * rank + r])));
        out[1].extend(&head[nope * rank..]);
    }
    out
}

#[test]
fn keys_and_values_of_latent_attention_apart() {
    let shape = Synthetic { nope: 32, v: 64, kv_lora: 64, dtype: "F32", ..Synthetic::default() };
    let (nope, v, rank, heads) = (shape.nope, shape.v, shape.kv_lora, 5);
    for bits in [32, 4, 8] {
        let (mut plain, mut saved, mut noise) = (shape.tensors(), shape.tensors(), Noise(11));
        for layer in 0..shape.layers {
            let name = |module: &str, end: &str| format!("model.layers.{layer}.self_attn.{module}.{end}");
            let kv_b = saved.remove(&name("kv_b_proj", "weight")).unwrap();
            let [mut keys, mut values] = halves(&kv_b.values(), [nope, v, rank]);
            let stacks = [("embed_q", [heads, rank, nope], &mut keys), ("unembed_out", [heads, v, rank], &mut values)];
            for (module, stack, numbers) in stacks {
                if bits == 32 {
                    saved.insert(name(module, "weight"), Tensor::f32(&stack, numbers.clone()));
                    continue;
                }
                // Along the last axis of each, which for keys is another than that of `kv_b_proj`.
                let groups = numbers.len() / 32;
                let code = |_| (noise.bits() >> 40) as u32 & ((1 << bits) - 1);
                let codes: Vec<u32> = (0..numbers.len()).map(code).collect();
                let scale: Vec<f32> = (0..groups).map(|g| 0.25 + g as f32).collect();
                *numbers = codes.iter().enumerate().map(|(i, &c)| c as f32 * scale[i / 32] - 0.5).collect();
                let words = codes.chunks(32 / bits).map(|c| c.iter().rev().fold(0u32, |w, c| w << bits | c));
                let bytes = words.flat_map(u32::to_le_bytes).collect();
                let [h, r, c] = stack;
                let packed = Tensor { dtype: "U32".into(), shape: vec![h, r, c * bits / 32], bytes };
                saved.insert(name(module, "weight"), packed);
                saved.insert(name(module, "scales"), Tensor::f32(&[h, r, c / 32], scale));
                saved.insert(name(module, "biases"), Tensor::f32(&[h, r, c / 32], vec![-0.5; groups]));
            }
            // The same numbers as one matrix again.
            let mut all = Vec::new();
            for head in 0..heads {
                let key = |n: usize, r: usize| keys[(head * rank + r) * nope + n];
                all.extend((0..nope).flat_map(|n| (0..rank).map(move |r| key(n, r))));
                all.extend(&values[head * v * rank..][..v * rank]);
            }
            plain.insert(name("kv_b_proj", "weight"), Tensor::f32(&kv_b.shape, all));
        }
        let (_, want) = converted(&shape.config(), &plain, "f32").unwrap();
        stack_experts(&mut saved);
        let (_, found) = converted(&shape.config(), &saved, "f32").unwrap_or_else(|e| panic!("{bits} bits: {e}"));
        assert!(found == want, "{bits} bits");
    }
}

/// What of a checkpoint is as MLX saves it.
#[derive(Clone, Copy, Debug)]
struct Saved {
    norms: bool,
    conv: bool,
    stacked: bool,
}

const NORMS: [&str; 6] = [
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    "language_model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
];

fn save(tensors: &Tensors, saved: Saved) -> Tensors {
    let mut out = Tensors::new();
    for (name, t) in tensors {
        let mut t = t.clone();
        if name.starts_with("mtp.") || name.contains("visual") {
            continue;
        }
        if saved.conv && name.contains("conv1d") {
            t.shape = vec![t.shape[0], t.shape[2], t.shape[1]];
        }
        if saved.norms && NORMS.iter().any(|end| name.ends_with(end)) {
            t = Tensor::f32(&t.shape, t.values().into_iter().map(|v| v + 1.0));
        }
        out.insert(name.clone(), t);
    }
    if saved.stacked {
        stack_experts(&mut out);
    }
    out
}

/// Norms are read by what they are; where that contradicts who wrote the file, nothing is assumed.
#[test]
fn shifted_norms_and_transposed_convolutions_of_qwen3_next() {
    let (config, tensors) = golden("qwen3_next");
    let (_, want) = converted(&config, &tensors, "f32").unwrap();
    let saved = |norms, conv, stacked| save(&tensors, Saved { norms, conv, stacked });
    for (norms, conv, stacked) in [(true, true, true), (false, false, true), (true, false, true), (true, true, false)] {
        let (_, found) = converted(&config, &saved(norms, conv, stacked), "f32").unwrap();
        assert!(found == want, "norms {norms}, conv {conv}, stacked {stacked}");
    }
    for (norms, conv, stacked) in [(false, true, true), (false, true, false), (true, false, false)] {
        let error = converted(&config, &saved(norms, conv, stacked), "f32").unwrap_err();
        assert!(matches!(error, ConvertError::Mixture { .. }), "{norms} {conv} {stacked}: {error}");
    }
    // One convolution, or the norms of one layer, of another kind than the rest.
    let mut mixed = saved(true, true, true);
    let name = "model.layers.0.linear_attn.conv1d.weight";
    mixed.insert(name.into(), tensors[name].clone());
    assert!(matches!(converted(&config, &mixed, "f32"), Err(ConvertError::Mixture { .. })));
    let mut mixed = saved(true, true, true);
    let name = "model.layers.3.self_attn.q_norm.weight";
    mixed.insert(name.into(), tensors[name].clone());
    assert!(matches!(converted(&config, &mixed, "f32"), Err(ConvertError::Mixture { .. })));
    // Norms of a model that has not been trained.
    let mut untrained = tensors.clone();
    for (name, t) in &mut untrained {
        if NORMS.iter().any(|end| name.ends_with(end)) {
            t.bytes.fill(0);
        }
    }
    converted(&config, &untrained, "f32").unwrap();
}

#[test]
fn qwen3_5_under_the_names_of_mlx() {
    let (config, tensors) = golden("qwen3_5_moe");
    let (_, want) = converted(&config, &tensors, "f32").unwrap();
    let mut saved = Tensors::new();
    for (name, t) in save(&tensors, Saved { norms: true, conv: true, stacked: false }) {
        let new = match name.strip_prefix("model.language_model.") {
            Some(rest) => format!("language_model.model.{rest}"),
            None => format!("language_model.{name}"),
        };
        if let Some(module) = new.strip_suffix("experts.gate_up_proj") {
            let half = t.shape[1] / 2;
            let part = |first: usize| {
                let row = t.bytes.len() / t.shape[0] / t.shape[1];
                let of = |m: usize| t.bytes[(m * 2 * half + first) * row..][..half * row].to_vec();
                let shape = vec![t.shape[0], half, t.shape[2]];
                Tensor { dtype: t.dtype.clone(), shape, bytes: (0..t.shape[0]).flat_map(of).collect() }
            };
            saved.insert(format!("{module}switch_mlp.gate_proj.weight"), part(0));
            saved.insert(format!("{module}switch_mlp.up_proj.weight"), part(half));
        } else {
            saved.insert(new.replace("experts.down_proj", "switch_mlp.down_proj.weight"), t);
        }
    }
    saved.insert("vision_tower.blocks.0.norm1.weight".into(), Tensor::f32(&[1], [1.0]));
    let (summary, found) = converted(&config, &saved, "f32").unwrap();
    assert!(found == want);
    assert_eq!(summary.left_out.len(), 1);
}

//! Every form of weights that checkpoints are published in means the numbers that its description says: each is written
//! here by code of its own, next to a checkpoint that holds the same numbers in f32.

mod common;

use common::safetensors::{Tensor, Tensors, e4m3, write_dir};
use common::{Content, Noise, Synthetic, content, options};
use serde_json::{Value, json};
use sluice_converter::{ConvertError, Summary, convert};
use sluice_format::{ExtentKind, WeightType};

const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
const AWQ: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Tensors that replace `NAME.weight`, by what follows NAME, and the numbers that they stand for.
type Encoded = (Vec<(&'static str, Tensor)>, Vec<f32>);

/// Makes such tensors of a shape.
type Encoder<'a> = &'a dyn Fn(&mut Noise, [usize; 2]) -> Encoded;

fn shape() -> Synthetic {
    Synthetic {
        hidden: 128,
        width: 64,
        kv_lora: 64,
        q_lora: Some(128),
        nope: 16,
        v: 64,
        dtype: "F32",
        ..Synthetic::default()
    }
}

fn tensor(dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    Tensor { dtype: dtype.into(), shape: shape.to_vec(), bytes }
}

fn words(dtype: &str, shape: &[usize], words: Vec<u32>) -> Tensor {
    tensor(dtype, shape, words.iter().flat_map(|w| w.to_le_bytes()).collect())
}

/// Codes of `bits` bits as one stream of bits, the first in the low bits of the first word.
fn pack(codes: &[u32], bits: usize) -> Vec<u32> {
    let mut words = vec![0; (codes.len() * bits).div_ceil(32)];
    for bit in 0..codes.len() * bits {
        words[bit / 32] |= (codes[bit / bits] >> (bit % bits) & 1) << (bit % 32);
    }
    words
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn codes(noise: &mut Noise, n: usize, bits: usize) -> Vec<u32> {
    (0..n).map(|_| (noise.bits() >> 33) as u32 & ((1 << bits) - 1)).collect()
}

/// Positive bf16 numbers.
fn scales(noise: &mut Noise, n: usize) -> Vec<f32> {
    (0..n).map(|_| half::bf16::from_f32(noise.value().abs() * 0.1 + 0.01).to_f32()).collect()
}

fn e2m1(code: u32) -> f32 {
    if code & 8 == 0 { E2M1[code as usize] } else { -E2M1[code as usize & 7] }
}

/// A code that is a number.
fn fp8_codes(noise: &mut Noise, n: usize) -> Vec<u8> {
    codes(noise, n, 8).into_iter().map(|c| if c & 0x7f == 0x7f { 0 } else { c as u8 }).collect()
}

fn packed_int4(noise: &mut Noise, [r, c]: [usize; 2], group: usize) -> Encoded {
    let group = group.min(c);
    let (q, s) = (codes(noise, r * c, 4), scales(noise, r * c / group));
    let values = q.iter().enumerate().map(|(i, &q)| (q as f32 - 8.0) * s[i / group]).collect();
    let shape = words("I32", &[2], vec![r as u32, c as u32]);
    let parts = vec![
        (".weight_packed", words("I32", &[r, c / 8], pack(&q, 4))),
        (".weight_scale", Tensor::bf16(&[r, c / group], s)),
        (".weight_shape", shape),
    ];
    (parts, values)
}

fn mxfp4(noise: &mut Noise, [r, c]: [usize; 2], mlx: bool) -> Encoded {
    let (q, e) = (codes(noise, r * c, 4), codes(noise, r * c / 32, 3));
    let values = q.iter().enumerate().map(|(i, &q)| e2m1(q) * 2f32.powi(e[i / 32] as i32 - 7)).collect();
    let scales = tensor("U8", &[r, c / 32], e.iter().map(|e| *e as u8 + 120).collect());
    let packed = pack(&q, 4);
    let parts = if mlx {
        vec![(".weight", words("U32", &[r, c / 8], packed)), (".scales", scales)]
    } else {
        vec![(".weight_packed", tensor("U8", &[r, c / 2], bytes_of(&packed))), (".weight_scale", scales)]
    };
    (parts, values)
}

fn nvfp4(noise: &mut Noise, [r, c]: [usize; 2], compressed: bool) -> Encoded {
    let (q, s) = (codes(noise, r * c, 4), fp8_codes(noise, r * c / 16));
    let global = 0.003f32;
    let factor = if compressed { 1.0 / (1.0 / global) } else { global };
    let values = q.iter().enumerate().map(|(i, &q)| e2m1(q) * (e4m3(s[i / 16]) * factor)).collect();
    let packed = tensor("U8", &[r, c / 2], bytes_of(&pack(&q, 4)));
    let scale = tensor("F8_E4M3", &[r, c / 16], s);
    let parts = if compressed {
        let global = Tensor::f32(&[1], [1.0 / global]);
        vec![(".weight_packed", packed), (".weight_scale", scale), (".weight_global_scale", global)]
    } else {
        let (global, input) = (Tensor::f32(&[], [global]), Tensor::f32(&[], [0.01]));
        vec![(".weight", packed), (".weight_scale", scale), (".weight_scale_2", global), (".input_scale", input)]
    };
    (parts, values)
}

fn mlx_affine(noise: &mut Noise, [r, c]: [usize; 2], bits: usize) -> Encoded {
    let q = codes(noise, r * c, bits);
    let (s, b) = (scales(noise, r * c / 32), scales(noise, r * c / 32));
    let values = q.iter().enumerate().map(|(i, &q)| q as f32 * s[i / 32] + b[i / 32]).collect();
    let parts = vec![
        (".weight", words("U32", &[r, c * bits / 32], pack(&q, bits))),
        (".scales", Tensor::bf16(&[r, c / 32], s)),
        (".biases", Tensor::bf16(&[r, c / 32], b)),
    ];
    (parts, values)
}

fn mlx_nvfp4(noise: &mut Noise, [r, c]: [usize; 2]) -> Encoded {
    let (q, s) = (codes(noise, r * c, 4), fp8_codes(noise, r * c / 16));
    let values = q.iter().enumerate().map(|(i, &q)| e2m1(q) * e4m3(s[i / 16])).collect();
    let parts = vec![(".weight", words("U32", &[r, c / 8], pack(&q, 4))), (".scales", tensor("U8", &[r, c / 16], s))];
    (parts, values)
}

/// Eight bits per integer and a scale per row: packed, with 128 added, or as they are.
fn int8(noise: &mut Noise, [r, c]: [usize; 2], packed: bool) -> Encoded {
    let (q, s) = (codes(noise, r * c, 8), scales(noise, r));
    let values = q.iter().enumerate().map(|(i, &q)| (q as f32 - 128.0) * s[i / c]).collect();
    let scale = (".weight_scale", Tensor::bf16(&[r, 1], s));
    let parts = if packed {
        let shape = words("I32", &[2], vec![r as u32, c as u32]);
        vec![(".weight_packed", words("I32", &[r, c / 4], pack(&q, 8))), scale, (".weight_shape", shape)]
    } else {
        let bytes = q.iter().map(|&q| (q as i32 - 128) as i8 as u8).collect();
        vec![(".weight", tensor("I8", &[r, c], bytes)), scale]
    };
    (parts, values)
}

/// One scale per row, or one in all.
fn fp8(noise: &mut Noise, [r, c]: [usize; 2], per_row: bool) -> Encoded {
    let (q, s) = (fp8_codes(noise, r * c), scales(noise, if per_row { r } else { 1 }));
    let values = q.iter().enumerate().map(|(i, &q)| e4m3(q) * s[if per_row { i / c } else { 0 }]).collect();
    let scale = if per_row { Tensor::bf16(&[r, 1], s) } else { Tensor::f32(&[], s) };
    (vec![(".weight", tensor("F8_E4M3", &[r, c], q)), (".weight_scale", scale)], values)
}

fn awq(noise: &mut Noise, [out, inputs]: [usize; 2]) -> Encoded {
    let groups = inputs / 32;
    let (q, z) = (codes(noise, inputs * out, 4), codes(noise, groups * out, 4));
    let s: Vec<f32> = scales(noise, groups * out);
    let at = |o: usize, i: usize| (q[i * out + o] as f32 - z[i / 32 * out + o] as f32) * s[i / 32 * out + o];
    let values = (0..out).flat_map(|o| (0..inputs).map(move |i| at(o, i))).collect();
    let shuffled = |codes: &[u32]| codes.chunks(8).flat_map(|c| AWQ.map(|o| c[o])).collect::<Vec<_>>();
    let parts = vec![
        (".qweight", words("I32", &[inputs, out / 8], pack(&shuffled(&q), 4))),
        (".qzeros", words("I32", &[groups, out / 8], pack(&shuffled(&z), 4))),
        (".scales", Tensor::f16(&[groups, out], s)),
    ];
    (parts, values)
}

/// `offset`: what version 1 subtracts from zeros. The groups are in disorder, as `desc_act` makes them.
fn gptq(noise: &mut Noise, [out, inputs]: [usize; 2], bits: usize, offset: u32) -> Encoded {
    let (groups, per_word) = (inputs / 32, 32 / bits);
    let (q, z) = (codes(noise, inputs * out, bits), codes(noise, groups * out, bits));
    let s: Vec<f32> = scales(noise, groups * out);
    let group: Vec<usize> = (0..inputs).map(|i| (i * 7 + 3) % groups).collect();
    let at = |o: usize, i: usize| {
        let g = group[i] * out + o;
        (q[i * out + o] as f32 - (z[g] + offset) as f32) * s[g]
    };
    let values = (0..out).flat_map(|o| (0..inputs).map(move |i| at(o, i))).collect();
    // Several inputs in a word.
    let word = |i: usize, o: usize| (0..per_word).fold(0, |w, k| w | q[(per_word * i + k) * out + o] << (bits * k));
    let packed = (0..inputs / per_word).flat_map(|i| (0..out).map(move |o| word(i, o))).collect();
    let parts = vec![
        (".qweight", words("I32", &[inputs / per_word, out], packed)),
        (".qzeros", words("I32", &[groups, out / per_word], pack(&z, bits))),
        (".scales", Tensor::f16(&[groups, out], s)),
        (".g_idx", words("I32", &[inputs], group.iter().map(|g| *g as u32).collect())),
    ];
    (parts, values)
}

fn convert_to_content(config: &Value, tensors: &Tensors, choice: &str) -> Result<(Summary, Content), ConvertError> {
    let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_dir(src.path(), config, tensors, 2);
    let file = dst.path().join("m");
    let summary = convert(src.path(), &file, &options(choice, choice), &())?;
    Ok((summary, content(&file)))
}

/// Replaces the projections by the form, converts, and compares with the same numbers in f32. Returns the types.
fn check(name: &str, quantisation: &Value, encode: Encoder<'_>) -> Summary {
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let (mut packed, mut plain) = (shape().tensors(), Tensors::new());
    for (tensor, t) in shape().tensors() {
        let Some(stem) = tensor.strip_suffix(".weight").filter(|s| s.contains("_proj") && t.shape.len() == 2) else {
            plain.insert(tensor, t);
            continue;
        };
        let shape = [t.shape[0], t.shape[1]];
        // Shapes that the form cannot hold stay as they are, as in real checkpoints.
        if !shape[0].is_multiple_of(8) || !shape[1].is_multiple_of(64) {
            plain.insert(tensor, t);
            continue;
        }
        let (parts, values) = encode(&mut noise, shape);
        packed.remove(&tensor);
        packed.extend(parts.into_iter().map(|(end, part)| (format!("{stem}{end}"), part)));
        plain.insert(tensor, Tensor::f32(&shape, values));
    }
    let mut config = shape().config();
    let (_, want) = convert_to_content(&config, &plain, "f32").unwrap();
    for (key, value) in quantisation.as_object().unwrap() {
        config[key] = value.clone();
    }
    let (summary, kept) = convert_to_content(&config, &packed, "keep").unwrap_or_else(|e| panic!("{name}: {e}"));
    let (_, widened) = convert_to_content(&config, &packed, "f32").unwrap();
    for (key, (_, want)) in &want {
        let differs = |found: &[f32]| found.iter().zip(want).position(|(a, b)| a != b);
        assert_eq!(differs(&kept[key].1), None, "{name}, kept: {key:?}");
        assert_eq!(differs(&widened[key].1), None, "{name}, widened: {key:?}");
        assert_eq!(kept[key].1.len(), want.len());
    }
    let (lossy, _) = convert_to_content(&config, &packed, "q8").unwrap();
    assert!(lossy.errors["expert.down"] > 0.0 && lossy.errors["expert.down"] < 0.02, "{name}: {:?}", lossy.errors);
    summary
}

fn method(name: &str) -> Value {
    json!({"quantization_config": {"quant_method": name}})
}

fn compressed(format: &str) -> Value {
    let weights = json!({"num_bits": 4, "symmetric": true, "type": "int"});
    json!({"quantization_config":
        {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}})
}

/// The types of matrices that were carried and of one that cannot be, because a transposed part of it is stored.
fn assert_types(summary: &Summary, carried: &str, transposed: &str) {
    for group in ["expert.gate_up", "expert.down", "attention.o", "attention.v_b", "dense.down"] {
        assert_eq!(summary.types[group], [carried], "{group}");
    }
    assert_eq!(summary.types["attention.k_b"], [transposed]);
}

#[test]
fn forms_that_a_type_fits_are_carried() {
    for group in [32, 64] {
        let summary = check("int4", &compressed("pack-quantized"), &|noise, shape| packed_int4(noise, shape, group));
        assert_types(&summary, "int4", "f32");
        assert!(summary.widened.iter().all(|w| w.contains("k_b")), "{:?}", summary.widened);
    }
    let summary = check("mxfp4", &compressed("mxfp4-pack-quantized"), &|noise, shape| mxfp4(noise, shape, false));
    assert_types(&summary, "mxfp4", "f32");
    let mlx = json!({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}});
    assert_types(&check("mlx mxfp4", &mlx, &|noise, shape| mxfp4(noise, shape, true)), "mxfp4", "f32");
    // One scale for all: it is the scale of every tile, also of transposed ones.
    let summary = check("fp8 per tensor", &method("fp8"), &|noise, shape| fp8(noise, shape, false));
    assert_types(&summary, "fp8", "fp8");
}

#[test]
fn forms_that_no_type_fits_are_widened_and_named() {
    let forms: [(&str, Value, Encoder<'_>); 24] = [
        ("fp8 per row", compressed("float-quantized"), &|noise, shape| fp8(noise, shape, true)),
        (
            "nvfp4",
            json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
            &|noise, shape| nvfp4(noise, shape, false),
        ),
        ("nvfp4 compressed", compressed("nvfp4-pack-quantized"), &|noise, shape| nvfp4(noise, shape, true)),
        ("mlx 2", json!({"quantization": {"bits": 2}}), &|noise, shape| mlx_affine(noise, shape, 2)),
        ("mlx 4", json!({"quantization": {"bits": 4}}), &|noise, shape| mlx_affine(noise, shape, 4)),
        ("mlx 8", json!({"quantization": {"bits": 8}}), &|noise, shape| mlx_affine(noise, shape, 8)),
        ("mlx 3", json!({"quantization": {"bits": 3}}), &|noise, shape| mlx_affine(noise, shape, 3)),
        ("mlx 5", json!({"quantization": {"bits": 5}}), &|noise, shape| mlx_affine(noise, shape, 5)),
        ("mlx 6", json!({"quantization": {"bits": 6}}), &|noise, shape| mlx_affine(noise, shape, 6)),
        ("mlx nvfp4", json!({"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}), &mlx_nvfp4),
        // Widths that the configuration gives for most layers are not those of all.
        ("mlx 8 among 4", json!({"quantization": {"bits": 4}}), &|noise, shape| mlx_affine(noise, shape, 8)),
        ("gptq 8 among 4", json!({"quantization_config": {"quant_method": "GPTQ", "bits": 4}}), &|n, s| {
            gptq(n, s, 8, 1)
        }),
        ("gptq 2", json!({"quantization_config": {"quant_method": "gptq", "bits": 2}}), &|n, s| gptq(n, s, 2, 1)),
        ("gptq that does not say so", json!({"quantization_config": {"bits": 4}}), &|n, s| gptq(n, s, 4, 1)),
        ("int8 packed", compressed("pack-quantized"), &|noise, shape| int8(noise, shape, true)),
        ("int8", compressed("int-quantized"), &|noise, shape| int8(noise, shape, false)),
        ("awq that does not say so", json!({"quantization_config": {"bits": 4, "zero_point": true}}), &awq),
        ("awq", method("AWQ"), &awq),
        ("gptq", method("gptq"), &|noise, shape| gptq(noise, shape, 4, 1)),
        (
            "gptq v2",
            json!({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}),
            &|n, s| gptq(n, s, 4, 0),
        ),
        // As newer files of GPTQModel have it.
        (
            "gptq v2 by its newer names",
            json!({"quantization_config": {"method": "gptq", "format": "gptq_v2", "bits": 4}}),
            &|n, s| gptq(n, s, 4, 0),
        ),
        ("auto-round as gptq", auto_round("auto_round:auto_gptq"), &|n, s| gptq(n, s, 4, 1)),
        ("auto-round as awq", auto_round("auto_round:auto_awq"), &awq),
        ("auto-round's own", auto_round("auto_round"), &|n, s| gptq(n, s, 4, 0)),
    ];
    for (name, quantisation, encode) in forms {
        let summary = check(name, &quantisation, encode);
        assert_types(&summary, "f32", "f32");
        assert!(summary.widened.iter().any(|w| w.contains("expert.down")), "{name}: {:?}", summary.widened);
    }
}

fn auto_round(packing: &str) -> Value {
    json!({"quantization_config": {"quant_method": "auto-round", "bits": 4, "sym": false, "packing_format": packing}})
}

/// Experts one by one, fused as by transformers, stacked as by MLX: the same file content.
#[test]
fn experts_of_every_arrangement_are_the_same() {
    let single = Synthetic { dtype: "BF16", ..shape() };
    let (_, want) = convert_to_content(&single.config(), &single.tensors(), "keep").unwrap();
    for fused in [true, false] {
        let mut tensors = single.tensors();
        for layer in single.dense_layers..single.layers {
            let mut take = |part: &str| -> Vec<Tensor> {
                let name = |e| format!("model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight");
                (0..single.experts).map(|e| tensors.remove(&name(e)).unwrap()).collect()
            };
            let [gate, up, down] = ["gate", "up", "down"].map(&mut take);
            let stack = |parts: &[&Tensor], rows: usize| {
                let bytes = parts.iter().flat_map(|t| t.bytes.clone()).collect();
                tensor("BF16", &[single.experts, rows, parts[0].shape[1]], bytes)
            };
            let all = |parts: &[Tensor]| stack(&parts.iter().collect::<Vec<_>>(), parts[0].shape[0]);
            let prefix = format!("model.layers.{layer}.mlp");
            if fused {
                let pairs: Vec<&Tensor> = gate.iter().zip(&up).flat_map(|(g, u)| [g, u]).collect();
                tensors.insert(format!("{prefix}.experts.gate_up_proj"), stack(&pairs, 2 * single.width));
                tensors.insert(format!("{prefix}.experts.down_proj"), all(&down));
            } else {
                for (part, t) in [("gate", &gate), ("up", &up), ("down", &down)] {
                    tensors.insert(format!("{prefix}.switch_mlp.{part}_proj.weight"), all(t));
                }
            }
        }
        let (_, found) = convert_to_content(&single.config(), &tensors, "keep").unwrap();
        assert!(found == want, "fused: {fused}");
        assert!(found.iter().any(|(k, v)| k.0 == ExtentKind::Expert && v.0 == WeightType::Bf16));
    }
}

/// What is wrong with a packed tensor is an error that names it.
#[test]
fn broken_forms_are_refused() {
    type Change = fn(&mut Tensors, &mut Value);
    const X: &str = "model.layers.1.mlp.experts.0.down_proj";
    let cases: [(Change, &str); 6] = [
        (|t, _| drop(t.remove(&format!("{X}.weight_scale"))), "down_proj.weight_scale"),
        (|t, _| t.get_mut(&format!("{X}.weight_packed")).unwrap().shape = vec![64, 16], "down_proj.weight_packed"),
        (|t, _| t.get_mut(&format!("{X}.weight_scale")).unwrap().shape = vec![64, 4], "down_proj.weight_scale"),
        (|t, _| t.get_mut(&format!("{X}.weight_scale")).unwrap().bytes.fill(0x7f), "down_proj.weight"),
        (|t, _| drop(t.insert(format!("{X}.weight_zero_point"), Tensor::f32(&[1], [2.0]))), "weight_zero_point"),
        (
            |_, c| c["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false),
            "symmetric",
        ),
    ];
    for (change, word) in cases {
        let mut noise = Noise(77);
        let mut tensors = shape().tensors();
        tensors.remove(&format!("{X}.weight"));
        let parts = packed_int4(&mut noise, [128, 64], 32).0;
        tensors.extend(parts.into_iter().map(|(end, part)| (format!("{X}{end}"), part)));
        let mut config = shape().config();
        config["quantization_config"] = compressed("pack-quantized")["quantization_config"].clone();
        change(&mut tensors, &mut config);
        let error = convert_to_content(&config, &tensors, "keep").unwrap_err().to_string();
        assert!(error.contains(word) && !error.contains('\n'), "{word}: {error}");
    }
}

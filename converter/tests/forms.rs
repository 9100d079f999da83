//! Every form of weights that checkpoints are published in means the numbers that its description says: each is written
//! here by code of its own, next to a checkpoint that holds the same numbers in f32.

use crate::common::safetensors::{Tensor, Tensors, e4m3, write_dir};
use crate::common::{Content, Noise, Synthetic, content, options};
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

fn mlx_affine(noise: &mut Noise, [r, c]: [usize; 2], bits: usize, group: usize) -> Encoded {
    let q = codes(noise, r * c, bits);
    let (s, b) = (scales(noise, r * c / group), scales(noise, r * c / group));
    let values = q.iter().enumerate().map(|(i, &q)| q as f32 * s[i / group] + b[i / group]).collect();
    let parts = vec![
        (".weight", words("U32", &[r, c * bits / 32], pack(&q, bits))),
        (".scales", Tensor::bf16(&[r, c / group], s)),
        (".biases", Tensor::bf16(&[r, c / group], b)),
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

/// MXFP8, as MLX has it or beside fp8 weights.
fn mxfp8(noise: &mut Noise, [r, c]: [usize; 2], mlx: bool) -> Encoded {
    let (q, e) = (fp8_codes(noise, r * c), codes(noise, r * c / 32, 3));
    let values = q.iter().enumerate().map(|(i, &q)| e4m3(q) * 2f32.powi(e[i / 32] as i32 - 7)).collect();
    let scales = tensor("U8", &[r, c / 32], e.iter().map(|e| *e as u8 + 120).collect());
    let parts = if mlx {
        let words = q.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        vec![(".weight", self::words("U32", &[r, c / 4], words)), (".scales", scales)]
    } else {
        vec![(".weight", tensor("F8_E4M3", &[r, c], q)), (".weight_scale", scales)]
    };
    (parts, values)
}

/// DeepSeek-V4: pairs of e2m1 codes, or e4m3 codes by block, with powers of two beside them.
fn deepseek_v4(noise: &mut Noise, [r, c]: [usize; 2], four: bool) -> Encoded {
    let power = |e: u32| 2f32.powi(e as i32 - 7);
    let scales = |shape: &[usize], e: &[u32]| tensor("F8_E8M0", shape, e.iter().map(|e| *e as u8 + 120).collect());
    if four {
        let (q, e) = (codes(noise, r * c, 4), codes(noise, r * c / 32, 3));
        let values = q.iter().enumerate().map(|(i, &q)| e2m1(q) * power(e[i / 32])).collect();
        let packed = tensor("I8", &[r, c / 2], bytes_of(&pack(&q, 4)));
        return (vec![(".weight", packed), (".scale", scales(&[r, c / 32], &e))], values);
    }
    let grid = [r.div_ceil(128), c.div_ceil(128)];
    let (q, e) = (fp8_codes(noise, r * c), codes(noise, grid[0] * grid[1], 3));
    let at = |i: usize| power(e[i / c / 128 * grid[1] + i % c / 128]);
    let values = q.iter().enumerate().map(|(i, &q)| e4m3(q) * at(i)).collect();
    (vec![(".weight", tensor("F8_E4M3", &[r, c], q)), (".scale", scales(&grid, &e))], values)
}

/// Packed integers with zero points, which are packed along the other dimension, or bytes.
fn asymmetric(noise: &mut Noise, [r, c]: [usize; 2], bits: usize, packed: bool) -> Encoded {
    let groups = c / 32;
    let (q, z) = (codes(noise, r * c, bits), codes(noise, r * groups, bits));
    let s = scales(noise, r * groups);
    let at = |i: usize| (q[i] as f32 - z[i / 32] as f32) * s[i / 32];
    let values = (0..r * c).map(at).collect();
    let scale = (".weight_scale", Tensor::bf16(&[r, groups], s.clone()));
    if !packed {
        let bytes = |codes: &[u32]| codes.iter().map(|&q| (q as i32 - 128) as i8 as u8).collect();
        let zeros = tensor("I8", &[r, groups], bytes(&z));
        return (vec![(".weight", tensor("I8", &[r, c], bytes(&q))), scale, (".weight_zero_point", zeros)], values);
    }
    let columns: Vec<Vec<u32>> =
        (0..groups).map(|g| pack(&z.iter().skip(g).step_by(groups).copied().collect::<Vec<_>>(), bits)).collect();
    let zeros: Vec<u32> = (0..columns[0].len()).flat_map(|w| columns.iter().map(move |column| column[w])).collect();
    let parts = vec![
        (".weight_packed", words("I32", &[r, c * bits / 32], pack(&q, bits))),
        scale,
        (".weight_shape", words("I32", &[2], vec![r as u32, c as u32])),
        (".weight_zero_point", words("I32", &[columns[0].len(), groups], zeros)),
    ];
    (parts, values)
}

/// HQQ with the settings that it saves: codes of distant elements share a byte or a word, zeros are halves of integers.
fn hqq(noise: &mut Noise, [r, c]: [usize; 2], bits: usize, axis: usize) -> Encoded {
    let groups = r * c / 64;
    let (q, s) = (codes(noise, r * c, bits), scales(noise, groups));
    let z: Vec<f32> = codes(noise, groups, bits.min(6)).iter().map(|&z| z as f32 + 0.5).collect();
    // The matrix as rows of a group each, or as columns of one.
    let (lines, width, grid) = if axis == 1 { (groups, 64, [groups, 1]) } else { (64, groups, [1, groups]) };
    let group = |i: usize| if axis == 1 { i / width } else { i % width };
    let values = q.iter().enumerate().map(|(i, &q)| (q as f32 - z[group(i)]) * s[group(i)]).collect();
    let apart = if bits == 3 { 10 } else { 8 / bits };
    let rows = lines.div_ceil(apart);
    let code = |i: usize| q.get(i).copied().unwrap_or(0);
    let number = |i: usize| (0..apart).fold(0, |number, part| number << bits | code(part * rows * width + i));
    let numbers: Vec<u32> = (0..rows * width).map(number).collect();
    let packed = match bits {
        3 => words("I32", &[rows, width], numbers),
        _ => tensor("U8", &[rows, width], numbers.iter().map(|&n| n as u8).collect()),
    };
    let parts = vec![
        (".W_q", packed),
        (".scale", Tensor::bf16(&grid, s)),
        (".zero", Tensor::bf16(&grid, z)),
        (".nbits", words("I32", &[], vec![bits as u32])),
        (".axis", words("I32", &[], vec![axis as u32])),
        (".packing", tensor("U8", &[7], b"4bit_u8".to_vec())),
    ];
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

/// `offset`: what version 1 subtracts from zeros. `act_order`: the groups are in disorder, as `desc_act` makes them.
fn gptq(noise: &mut Noise, [out, inputs]: [usize; 2], bits: usize, offset: u32, act_order: bool) -> Encoded {
    let groups = inputs / 32;
    let (q, mut z) = (codes(noise, inputs * out, bits), codes(noise, groups * out, bits));
    // A byte holds no zero of 256.
    z.iter_mut().filter(|z| **z == 255).for_each(|z| *z = 7);
    let s: Vec<f32> = scales(noise, groups * out);
    let group: Vec<usize> = (0..inputs).map(|i| if act_order { (i * 7 + 3) % groups } else { i / 32 }).collect();
    let at = |o: usize, i: usize| {
        let g = group[i] * out + o;
        (q[i * out + o] as f32 - (z[g] + offset) as f32) * s[g]
    };
    let values = (0..out).flat_map(|o| (0..inputs).map(move |i| at(o, i))).collect();
    // The inputs of each output are a stream of bits.
    let stream = |o: usize| pack(&(0..inputs).map(|i| q[i * out + o]).collect::<Vec<_>>(), bits);
    let columns: Vec<Vec<u32>> = (0..out).map(stream).collect();
    let packed = (0..columns[0].len()).flat_map(|w| columns.iter().map(move |column| column[w])).collect();
    let parts = vec![
        (".qweight", words("I32", &[inputs * bits / 32, out], packed)),
        (".qzeros", words("I32", &[groups, out * bits / 32], pack(&z, bits))),
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
        let multiple = match name {
            _ if name.contains("gptq") => 32,
            _ if name.contains("axis 0") => 64,
            _ => 8,
        };
        if !shape[0].is_multiple_of(multiple) || !shape[1].is_multiple_of(64) {
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

/// The types of matrices that were carried, by their columns, and of one that cannot be, because a transposed part of it is
/// stored.
fn assert_types(name: &str, summary: &Summary, carried: impl Fn(usize) -> String, transposed: &str) {
    let columns = [("expert.gate_up", 128), ("expert.down", 64), ("attention.o", 320), ("dense.down", 192)];
    for (group, cols) in columns {
        // The dense layer and the shared experts, whose down projection has 128 columns, are one group.
        let types = &summary.types[group];
        let expected = [carried(cols), carried(128)];
        assert!(
            types.contains(&expected[0]) && types.iter().all(|t| expected.contains(t)),
            "{name}: {group} {types:?}"
        );
    }
    assert_eq!(summary.types["attention.k_b"], [transposed], "{name}");
    assert!(summary.widened.iter().all(|w| w.contains("k_b")), "{name}: {:?}", summary.widened);
}

#[test]
fn forms_that_a_type_fits_are_carried() {
    let all = |name: &'static str| move |_: usize| name.to_owned();
    let summary = check("int4", &compressed("pack-quantized"), &|noise, shape| packed_int4(noise, shape, 32));
    assert_types("int4", &summary, all("int4"), "f32");
    let summary = check("int4 by 64", &compressed("pack-quantized"), &|noise, shape| packed_int4(noise, shape, 64));
    assert_types("int4 by 64", &summary, all("u4-g64-bf16"), "f32");
    let summary = check("mxfp4", &compressed("mxfp4-pack-quantized"), &|noise, shape| mxfp4(noise, shape, false));
    assert_types("mxfp4", &summary, all("mxfp4"), "f32");
    let mlx = json!({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}});
    assert_types("mlx mxfp4", &check("mlx mxfp4", &mlx, &|n, s| mxfp4(n, s, true)), all("mxfp4"), "f32");
    // One scale for all: it is the scale of every tile, also of transposed ones.
    let summary = check("fp8 per tensor", &method("fp8"), &|noise, shape| fp8(noise, shape, false));
    assert_types("fp8", &summary, all("fp8"), "fp8");
    let v4 = method("fp8");
    assert_types("v4", &check("v4", &v4, &|n, s| deepseek_v4(n, s, true)), all("mxfp4"), "f32");
    assert_types("v4 fp8", &check("v4 fp8", &v4, &|n, s| deepseek_v4(n, s, false)), all("fp8"), "fp8");
    // A scale per row is one per group where a type has groups of that many columns.
    let by_row = |codes: &'static str| {
        move |cols: usize| if cols <= 128 { format!("{codes}-g{cols}-bf16") } else { format!("{codes}-row-bf16") }
    };
    let summary = check("fp8 per row", &compressed("float-quantized"), &|noise, shape| fp8(noise, shape, true));
    assert_types("fp8 per row", &summary, by_row("e4m3"), "f32");
    for packed in [true, false] {
        let format = if packed { "pack-quantized" } else { "int-quantized" };
        let summary = check(format, &compressed(format), &|noise, shape| int8(noise, shape, packed));
        assert_types(format, &summary, by_row("u8"), "f32");
    }
}

/// Forms that are one description of codes and scales: each in the type that its bits are.
/// Makes the tensors of a matrix of so many rows and columns.
type Encode = Box<dyn Fn(&mut Noise, [usize; 2]) -> Encoded>;

#[test]
fn groups_of_codes_are_carried() {
    let gptq_of = |bits: usize| json!({"quantization_config": {"quant_method": "gptq", "bits": bits}});
    let mut asymmetric_config = compressed("pack-quantized");
    asymmetric_config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false);
    let ordered = json!({"quantization_config": {"quant_method": "gptq", "desc_act": false}});
    let v2 = json!({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}});
    let modelopt = json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}});
    let nv = json!({"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}});
    let mut forms: Vec<(String, Value, Encode, String)> = Vec::new();
    let mut add = |name: &str, config: &Value, encode: Encode, ty: &str| {
        forms.push((name.to_owned(), config.clone(), encode, ty.to_owned()));
    };
    for bits in [2, 3, 4, 5, 6, 8] {
        let config = json!({"quantization": {"bits": bits}});
        let name = format!("mlx {bits}");
        add(&name, &config, Box::new(move |n, s| mlx_affine(n, s, bits, 32)), &format!("u{bits}-g32-bf16-bias"));
        let name = format!("asymmetric {bits}");
        let ty = format!("u{bits}-g32-bf16-zero");
        add(&name, &asymmetric_config, Box::new(move |n, s| asymmetric(n, s, bits, true)), &ty);
    }
    for bits in [2, 3, 4, 8] {
        let ty = format!("u{bits}-g32-f16-zero");
        let name = format!("gptq {bits}");
        add(&name, &gptq_of(bits), Box::new(move |n, s| gptq(n, s, bits, 1, false)), &ty);
        add(&name, &ordered, Box::new(move |n, s| gptq(n, s, bits, 1, false)), &ty);
        add(&name, &v2, Box::new(move |n, s| gptq(n, s, bits, 0, false)), &ty);
        let name = format!("gptq {bits} by activation order");
        add(&name, &gptq_of(bits), Box::new(move |n, s| gptq(n, s, bits, 1, true)), &ty);
    }
    add("mlx 4 by 64", &json!({"quantization": {}}), Box::new(|n, s| mlx_affine(n, s, 4, 64)), "u4-g64-bf16-bias");
    add("asymmetric bytes", &asymmetric_config, Box::new(|n, s| asymmetric(n, s, 8, false)), "u8-g32-bf16-zero");
    add("awq", &method("awq"), Box::new(awq), "u4-g32-f16-zero");
    add("nvfp4", &modelopt, Box::new(|n, s| nvfp4(n, s, false)), "nvfp4");
    add("nvfp4 compressed", &compressed("nvfp4-pack-quantized"), Box::new(|n, s| nvfp4(n, s, true)), "nvfp4");
    add("mlx nvfp4", &nv, Box::new(mlx_nvfp4), "nvfp4");
    add("mxfp8", &method("fp8"), Box::new(|n, s| mxfp8(n, s, false)), "mxfp8");
    add("mlx mxfp8", &json!({"quantization": {"mode": "mxfp8"}}), Box::new(|n, s| mxfp8(n, s, true)), "mxfp8");
    for bits in [2, 3, 4, 8] {
        let name = format!("hqq {bits}");
        add(&name, &method("hqq"), Box::new(move |n, s| hqq(n, s, bits, 1)), &format!("u{bits}-g64-bf16-float-zero"));
    }
    for (name, config, encode, ty) in forms {
        let summary = check(&name, &config, &*encode);
        assert_types(&name, &summary, |_| ty.clone(), "f32");
    }
}

/// What a configuration says, says in another way, or does not say, and what the tensors themselves say.
#[test]
fn forms_are_known_by_what_there_is() {
    let forms: [(&str, Value, Encoder<'_>); 9] = [
        // Widths that the configuration gives for most layers are not those of all.
        ("mlx 8 among 4", json!({"quantization": {"bits": 4}}), &|noise, shape| mlx_affine(noise, shape, 8, 32)),
        ("gptq 8 among 4", json!({"quantization_config": {"quant_method": "GPTQ", "bits": 4}}), &|n, s| {
            gptq(n, s, 8, 1, false)
        }),
        ("gptq that does not say so", json!({"quantization_config": {"bits": 4}}), &|n, s| gptq(n, s, 4, 1, false)),
        ("awq that does not say so", json!({"quantization_config": {"bits": 4, "zero_point": true}}), &awq),
        ("awq in capitals", method("AWQ"), &awq),
        // As newer files of GPTQModel have it.
        (
            "gptq v2 by its newer names",
            json!({"quantization_config": {"method": "gptq", "format": "gptq_v2", "bits": 4}}),
            &|n, s| gptq(n, s, 4, 0, false),
        ),
        ("auto-round as gptq", auto_round("auto_round:auto_gptq"), &|n, s| gptq(n, s, 4, 1, false)),
        ("auto-round as awq", auto_round("auto_round:auto_awq"), &awq),
        ("auto-round's own gptq", auto_round("auto_round"), &|n, s| gptq(n, s, 4, 0, false)),
    ];
    for (name, quantisation, encode) in forms {
        check(name, &quantisation, encode);
    }
}

/// A zero that a byte does not hold is a number beside the scale.
#[test]
fn zeros_of_256_are_carried() {
    let encode: Encoder<'_> = &|n, s| {
        let (mut parts, mut values) = gptq(n, s, 8, 1, false);
        // The first output's zeros: stored 255, so 256.
        let zeros = &mut parts[1].1;
        let (row, old) = (zeros.shape[1] * 4, zeros.bytes[0]);
        zeros.bytes[0] = 255;
        let (inputs, scale) = (s[1], f16_at(&parts[2].1.bytes, 0));
        assert!(row > 0 && inputs >= 32);
        for value in &mut values[..32] {
            let code = (*value / scale).round() + f32::from(old) + 1.0;
            *value = (code - 256.0) * scale;
        }
        (parts, values)
    };
    let summary = check("gptq with large zeros", &method("gptq"), encode);
    assert_types("gptq with large zeros", &summary, |_| "u8-g32-f16-float-zero".to_owned(), "f32");
}

/// A scale for rows that lie apart is not one that a type has.
#[test]
fn hqq_of_axis_0_is_widened_and_named() {
    for bits in [2, 3, 4, 8] {
        let name = format!("hqq {bits}, axis 0");
        let summary = check(&name, &method("hqq"), &|n, s| hqq(n, s, bits, 0));
        assert!(summary.widened.iter().any(|w| w.contains("expert.gate_up")), "{name}: {:?}", summary.widened);
        assert!(summary.notes.iter().any(|n| n.contains("HQQ with `axis` 0")), "{name}: {:?}", summary.notes);
    }
}

/// The checkpoint of [`shape`] with GPTQ's tensors in the place of some weights, by the ends of their names.
fn with_gptq(noise: &mut Noise, ends: &[&str]) -> (Value, Tensors) {
    let (mut config, mut tensors) = (shape().config(), shape().tensors());
    config["quantization_config"] = method("gptq")["quantization_config"].clone();
    for (name, t) in shape().tensors() {
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        if ends.iter().any(|end| stem.ends_with(end)) {
            tensors.remove(&name);
            let parts = gptq(noise, [t.shape[0], t.shape[1]], 4, 1, true).0;
            tensors.extend(parts.into_iter().map(|(end, part)| (format!("{stem}{end}"), part)));
        }
    }
    (config, tensors)
}

/// Whether two files have the same numbers, also where gate and up stand apart.
fn assert_same_numbers(found: &Content, want: &Content) {
    for (key, (_, want)) in want {
        let apart = |name: &str| found.get(&(key.0, key.1, key.2, name.to_owned())).map(|t| t.1.clone());
        let numbers = apart(&key.3).or_else(|| Some([apart("gate")?, apart("up")?].concat()));
        assert!(numbers.as_ref() == Some(want), "{key:?}");
    }
}

fn set_groups(tensors: &mut Tensors, stem: &str, group: impl Fn(usize) -> u32) {
    let t = tensors.get_mut(&format!("{stem}.g_idx")).unwrap();
    t.bytes = (0..t.shape[0]).flat_map(|i| group(i).to_le_bytes()).collect();
}

/// Groups in disorder are carried with the order of their columns; gate and up with different ones apart.
#[test]
fn columns_in_disorder_have_an_order_of_their_own() {
    const EXPERT: &str = "model.layers.1.mlp.experts.0";
    let layouts = |config: &Value, tensors: &Tensors| {
        let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_dir(src.path(), config, tensors, 2);
        let file = dst.path().join("m");
        let summary = convert(src.path(), &file, &options("keep", "keep"), &()).unwrap();
        let model = sluice_format::ModelFile::open(&file).unwrap();
        let matrices = model.tensors_in(ExtentKind::Expert, 1, 0);
        let found: Vec<String> = matrices.map(|t| format!("{} {}", t.name, t.layout.name())).collect();
        (found, summary, content(&file))
    };
    let experts = ["gate_proj", "up_proj", "down_proj"];
    let (config, tensors) = with_gptq(&mut Noise(9), &experts);
    let together = ["gate_up tiled-pair-ordered", "down tiled-ordered"];
    assert_eq!(layouts(&config, &tensors).0, together);
    // Nothing is stored of an order that nobody needs.
    let mut in_order = tensors.clone();
    for name in tensors.keys().filter_map(|name| name.strip_suffix(".g_idx")) {
        set_groups(&mut in_order, name, |i| i as u32 / 32);
    }
    assert_eq!(layouts(&config, &in_order).0, ["gate_up tiled-pair", "down tiled"]);
    // One expert in order among others, and another order: each has its own.
    let mut mixed = tensors.clone();
    for part in ["gate_proj", "up_proj"] {
        set_groups(&mut mixed, &format!("{EXPERT}.{part}"), |i| i as u32 / 32);
        set_groups(&mut mixed, &format!("model.layers.1.mlp.experts.1.{part}"), |i| 3 - i as u32 / 32);
    }
    let (found, _, kept) = layouts(&config, &mixed);
    assert_eq!(found, together);
    let (_, want) = convert_to_content(&config, &mixed, "f32").unwrap();
    assert!(kept.iter().all(|(key, value)| value.1 == want[key].1));
    // Gate and up meet one input.
    set_groups(&mut mixed, &format!("{EXPERT}.up_proj"), |i| 3 - i as u32 / 32);
    let (found, summary, kept) = layouts(&config, &mixed);
    assert_eq!(found, ["gate tiled-ordered", "up tiled-ordered", "down tiled-ordered"]);
    assert!(!summary.widened.iter().any(|w| w.contains("expert")), "{:?}", summary.widened);
    let (_, want) = convert_to_content(&config, &mixed, "f32").unwrap();
    assert_same_numbers(&kept, &want);
    // One of them in no order at all: the other is carried.
    set_groups(&mut mixed, &format!("{EXPERT}.up_proj"), |i| u32::from(i == 3));
    let (found, summary, kept) = layouts(&config, &mixed);
    assert_eq!(found, ["gate tiled-ordered", "up tiled", "down tiled-ordered"]);
    assert!(summary.widened.iter().any(|w| w.contains("layer 1 expert.up")), "{:?}", summary.widened);
    let (_, want) = convert_to_content(&config, &mixed, "f32").unwrap();
    assert_same_numbers(&kept, &want);
}

/// Groups of which no order makes equal ones become f32 with a note; groups that do not exist are an error that names the tensor.
#[test]
fn hostile_groups_are_widened_or_refused() {
    const DOWN: &str = "model.layers.1.mlp.experts.0.down_proj";
    let (mut config, tensors) = with_gptq(&mut Noise(5), &["experts.0.down_proj"]);
    let of = |group: &dyn Fn(usize) -> u32| {
        let mut tensors = tensors.clone();
        set_groups(&mut tensors, DOWN, group);
        tensors
    };
    for (group, word) in [(2, "group 2 of 2"), (u32::MAX, "group -1 of 2"), (1 << 31, "group -2147483648 of 2")] {
        for choice in ["keep", "q8"] {
            let tensors = of(&|i| if i == 40 { group } else { i as u32 / 32 });
            let error = convert_to_content(&config, &tensors, choice).unwrap_err();
            assert!(matches!(error, ConvertError::Damaged { .. }), "{error}");
            let error = error.to_string();
            assert!(error.contains(&format!("{DOWN}.g_idx")) && error.contains(word), "{error}");
        }
    }
    for uneven in [of(&|i| u32::from(i == 7)), of(&|_| 1), of(&|i| u32::from(i < 31))] {
        let (summary, kept) = convert_to_content(&config, &uneven, "keep").unwrap();
        assert!(summary.notes.iter().any(|n| n.contains("g_idx") && n.contains("f32")), "{:?}", summary.notes);
        let (_, want) = convert_to_content(&config, &uneven, "f32").unwrap();
        assert!(kept.iter().all(|(key, value)| value.1 == want[key].1));
    }
    // Said to be in order, and not.
    config["quantization_config"]["desc_act"] = json!(false);
    let error = convert_to_content(&config, &tensors, "keep").unwrap_err().to_string();
    assert!(error.contains("g_idx") && error.contains("desc_act"), "{error}");
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
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

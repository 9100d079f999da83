//! Finds the tensors of a checkpoint that together hold one tensor of the model, in every published form.

use crate::source::{Checkpoint, Dtype, GgmlType};

/// A way to store a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A single tensor, of numbers or of a type that no form has.
    Single,
    /// e4m3 codes and their scales: per 128×128 block, per row, per row and group of columns, or one for the tensor.
    Fp8,
    /// compressed-tensors: packed integers and a scale per group; the third tensor is the shape, the fourth the zero points.
    PackedInt,
    /// compressed-tensors: e2m1 codes and power-of-two scales.
    PackedMxfp4,
    /// compressed-tensors: e2m1 codes, e4m3 scales, and one number by which those are divided.
    PackedNvfp4,
    /// modelopt: e2m1 codes, e4m3 scales, and one number by which those are multiplied.
    Nvfp4,
    /// compressed-tensors: eight-bit integers, and a scale per row or group; the third tensor is the zero points.
    Int8,
    /// DeepSeek-V4: pairs of e2m1 codes in bytes whose type is an integer, and power-of-two scales.
    Pairs,
    /// gpt-oss: e2m1 codes in blocks and power-of-two scales.
    Blocks,
    /// MLX: integers, scales and, unless the scales are powers of two, biases per group.
    Mlx,
    /// AWQ and GPTQ: integers, zeros, scales and, in GPTQ, the group of each input.
    Columnar,
    /// HQQ: bytes of codes, scales and zeros; then its saved settings, which also follow from the shapes.
    Hqq,
    /// GGUF: rows of whole blocks; for NVFP4 also one factor, or one per matrix, if there is any.
    Ggml,
}

/// What HQQ saves in addition to codes, scales and zeros (`HQQLinear.state_dict_keys`).
const HQQ_SETTINGS: [&str; 16] = [
    ".nbits",
    ".group_size",
    ".shape",
    ".axis",
    ".packing",
    ".unpack_view_dtype",
    ".view_as_float",
    ".quant_scale",
    ".quant_zero",
    ".compute_dtype",
    ".offload_meta",
    ".encoded_state_dict",
    ".stores_quant_config",
    ".channel_wise",
    ".optimize",
    ".round_zero",
];

/// The tensors that hold one tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) form: Form,
    /// Indices of the tensors, in the order in which [`Form`] lists them.
    pub(crate) tensors: Vec<usize>,
    /// Another one that should exist but does not.
    pub(crate) missing: Option<String>,
}

/// Finds what holds the tensor with this name; `None`: nothing does.
pub(crate) fn find(checkpoint: &Checkpoint, name: &str) -> Option<Parts> {
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    if let Some(tensor) = checkpoint.find(name) {
        return Some(found(checkpoint, name, stem, tensor));
    }
    let of_stem = |end: &str| format!("{stem}{end}");
    if let Some(tensor) = checkpoint.find(&of_stem(".weight_packed")) {
        let scale = of_stem(".weight_scale");
        return Some(if checkpoint.tensors[tensor].dtype.name() == "I32" {
            let mut parts = parts(checkpoint, Form::PackedInt, tensor, &[scale, of_stem(".weight_shape")]);
            parts.tensors.extend(zero_point(checkpoint, stem));
            parts
        } else if let global @ Some(_) = checkpoint.find(&of_stem(".weight_global_scale")) {
            let mut parts = parts(checkpoint, Form::PackedNvfp4, tensor, &[scale]);
            parts.tensors.extend(global);
            parts
        } else {
            parts(checkpoint, Form::PackedMxfp4, tensor, &[scale])
        });
    }
    if let Some(tensor) = checkpoint.find(&of_stem(".W_q")) {
        let mut parts = parts(checkpoint, Form::Hqq, tensor, &[of_stem(".scale"), of_stem(".zero")]);
        parts.tensors.extend(HQQ_SETTINGS.iter().filter_map(|end| checkpoint.find(&of_stem(end))));
        return Some(parts);
    }
    let tensor = checkpoint.find(&of_stem(".qweight"))?;
    let mut parts = parts(checkpoint, Form::Columnar, tensor, &[of_stem(".qzeros"), of_stem(".scales")]);
    parts.tensors.extend(checkpoint.find(&of_stem(".g_idx")));
    Some(parts)
}

fn found(checkpoint: &Checkpoint, name: &str, stem: &str, tensor: usize) -> Parts {
    let after = |end: &str| format!("{name}{end}");
    match &checkpoint.tensors[tensor].dtype {
        Dtype::F8E4M3 => {
            let known = [after("_scale_inv"), after("_scale"), format!("{stem}.scale")];
            let scale = known.iter().find(|n| checkpoint.find(n).is_some()).unwrap_or(&known[0]);
            parts(checkpoint, Form::Fp8, tensor, std::slice::from_ref(scale))
        }
        Dtype::Other(dtype) if dtype == "U8" && name.ends_with("_blocks") => {
            let scales = format!("{}_scales", name.trim_end_matches("_blocks"));
            parts(checkpoint, Form::Blocks, tensor, &[scales])
        }
        Dtype::Other(dtype) if dtype == "U8" => {
            parts(checkpoint, Form::Nvfp4, tensor, &[after("_scale"), after("_scale_2")])
        }
        Dtype::Other(dtype) if dtype == "I8" && checkpoint.find(&after("_scale")).is_some() => {
            let mut parts = parts(checkpoint, Form::Int8, tensor, &[after("_scale")]);
            parts.tensors.extend(zero_point(checkpoint, stem));
            parts
        }
        Dtype::Other(dtype) if dtype == "I8" && checkpoint.find(&format!("{stem}.scale")).is_some() => {
            parts(checkpoint, Form::Pairs, tensor, &[format!("{stem}.scale")])
        }
        Dtype::Other(dtype) if dtype == "U32" => {
            let mut parts = parts(checkpoint, Form::Mlx, tensor, &[format!("{stem}.scales")]);
            parts.tensors.extend(checkpoint.find(&format!("{stem}.biases")));
            parts
        }
        Dtype::Ggml(ty) => {
            let mut parts = parts(checkpoint, Form::Ggml, tensor, &[]);
            if *ty == GgmlType::NVFP4 {
                parts.tensors.extend(checkpoint.find(&format!("{stem}.scale")));
            }
            parts
        }
        _ => parts(checkpoint, Form::Single, tensor, &[]),
    }
}

/// The zero points of compressed-tensors, if they are used. Packed ones always are, because their zero is not all bits zero.
fn zero_point(checkpoint: &Checkpoint, stem: &str) -> Option<usize> {
    let tensor = checkpoint.find(&format!("{stem}.weight_zero_point"))?;
    match checkpoint.tensors[tensor].dtype.name() {
        "I32" => Some(tensor),
        "I8" if checkpoint.has_zero_points => Some(tensor),
        _ => None,
    }
}

fn parts(checkpoint: &Checkpoint, form: Form, first: usize, others: &[String]) -> Parts {
    let mut parts = Parts { form, tensors: vec![first], missing: None };
    for name in others {
        match checkpoint.find(name) {
            Some(tensor) => parts.tensors.push(tensor),
            None => parts.missing = parts.missing.or_else(|| Some(name.clone())),
        }
    }
    parts
}

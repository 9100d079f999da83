//! MiMo-V2-Flash, V2.5 and V2.5-Pro: layers with a window have a sink, and other key and value heads and another rotation than
//! layers without one.

use serde_json::Value;
use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{AttentionSpec, GqaSpec, LayerSpec, ModelSpec, RopePairing, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, Unused, gqa, moe, rope, usually_unused};
use crate::error::ConvertError;

/// The family.
pub(crate) struct MiMoV2Flash;

const DEFAULTS: Defaults = Defaults {
    vocab: 152_576,
    hidden: 4096,
    intermediate: 16_384,
    layers: 48,
    heads: 64,
    kv_heads: Some(4),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 5e6,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 8, width: 2048, shared: 0, groups: 1, groups_kept: 1, scale: 1.0 };

const HEAD_DIM: usize = 192;
const VALUE_DIM: usize = 128;
const ROTARY_FACTOR: f64 = 0.334;
const SLIDING_THETA: f64 = 1e4;
const WINDOW: usize = 129;
const VALUE_FACTOR: f64 = 0.707;

impl Family for MiMoV2Flash {
    fn model_types(&self) -> &'static [&'static str] {
        &["mimo_v2_flash", NEWER]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let mut decoder = Decoder::read(config, &DEFAULTS)?;
        if !config.has("rms_norm_eps") {
            decoder.norm_eps = config.f32_or("layernorm_epsilon", DEFAULTS.norm_eps)?;
        }
        let full = attention(&decoder, &FULL)?;
        let sliding = GqaSpec { window: Some(window(config)?), ..attention(&decoder, &SLIDING)? };
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        let slides = match decoder.layer_list("layer_types", ["sliding_attention", "full_attention"])? {
            Some(slides) => slides,
            None => flags(&decoder, "hybrid_layer_pattern", |i| i != 0 && (i + 1) % 6 != 0)?,
        };
        let is_sparse = match decoder.layer_list("mlp_layer_types", ["sparse", "dense"])? {
            Some(is_sparse) => is_sparse,
            None => flags(&decoder, "moe_layer_freq", |i| i != 0)?,
        };
        let layer = |(slides, is_sparse): (bool, bool)| LayerSpec {
            attention: AttentionSpec::Gqa(if slides { sliding.clone() } else { full.clone() }),
            ffn: if is_sparse { sparse.clone() } else { decoder.dense() },
        };
        decoder.model(slides.into_iter().zip(is_sparse).map(layer).collect())
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        match tensor.name {
            "q" | "k" | "v" => match &spec.layers[place.layer].attention {
                AttentionSpec::Gqa(gqa) => {
                    let fused = fused(gqa, names, place, tensor);
                    [names.origin(spec, place, tensor), vec![vec![fused]]].concat()
                }
                _ => names.origin(spec, place, tensor),
            },
            "sinks" => {
                [names.vector(place, "self_attn.attention_sink_bias", tensor), names.origin(spec, place, tensor)]
                    .concat()
            }
            _ => names.origin(spec, place, tensor),
        }
    }

    /// Releases in FP8 store the fused projection in parts, one for each of several devices, with blocks of its own. The number of
    /// parts shows in a layer where a part is not a whole number of blocks.
    fn arranged(&self, names: Names, spec: &ModelSpec, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Names {
        let of_layer = |(layer, spec): (usize, &LayerSpec)| {
            let AttentionSpec::Gqa(gqa) = &spec.attention else { return None };
            let scales = shape_of(&names.layer(layer, &format!("{FUSED}_scale_inv")))?;
            let rows = fused_rows(gqa);
            let fits = |&shards: &usize| {
                divides(gqa, shards) && scales.first() == Some(&((rows / shards).div_ceil(BLOCK) * shards))
            };
            let possible: Vec<usize> = (1..=gqa.kv_heads).filter(fits).collect();
            // If one part would fit as well, the shape does not show anything.
            (possible.len() == 1).then(|| possible[0])
        };
        let known = spec.layers.iter().enumerate().find_map(of_layer);
        let whole = |&shards: &usize| {
            spec.layers.iter().all(|layer| matches!(&layer.attention, AttentionSpec::Gqa(gqa) if divides(gqa, shards)))
        };
        Names { qkv_shards: known.filter(whole).unwrap_or(1), ..names }
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["visual.", "audio_encoder.", "speech_embeddings."].iter().any(|part| name.starts_with(part));
        if vision { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

/// Queries, keys and values in one tensor, and the rows of its FP8 blocks.
const FUSED: &str = "self_attn.qkv_proj.weight";
const BLOCK: usize = 128;

/// The `model_type` of V2.5 and V2.5-Pro, whose configuration class has fewer defaults.
const NEWER: &str = "mimo_v2";

/// Whether the heads can be divided into this many equal parts.
fn divides(gqa: &GqaSpec, shards: usize) -> bool {
    gqa.kv_heads.is_multiple_of(shards) && gqa.heads.is_multiple_of(shards)
}

fn fused_rows(gqa: &GqaSpec) -> usize {
    (gqa.heads + gqa.kv_heads) * gqa.head_dim + gqa.kv_heads * gqa.v_head_dim
}

/// Rows of the queries, keys or values in each part of the fused tensor.
fn fused(gqa: &GqaSpec, names: Names, place: Place, tensor: &TensorShape) -> View {
    let [_, rows, cols] = tensor.shape;
    let (all, shards) = (fused_rows(gqa), names.qkv_shards);
    let (query, key) = (gqa.heads * gqa.head_dim / shards, gqa.kv_heads * gqa.head_dim / shards);
    let first = match tensor.name {
        "q" => 0,
        "k" => query,
        _ => query + key,
    };
    let run_step = all / shards * cols;
    let strides = Strides { start: first * cols, run: rows / shards, run_step, row_step: cols, col_step: 1 };
    View::new(names.layer(place.layer, FUSED), &[all, cols], strides)
}

/// The keys and defaults of one kind of layer.
struct Kind {
    /// Its name in the lists of transformers 5.
    name: &'static str,
    /// In the files of the release: heads of queries, of keys and values, widths of keys and values, theta, and sinks.
    keys: [&'static str; 6],
    /// Key and value heads for each one that `num_key_value_heads` counts.
    kv_factor: usize,
    theta: f64,
    sinks: bool,
}

const FULL: Kind = Kind {
    name: "full_attention",
    keys: [
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "v_head_dim",
        "rope_theta",
        "add_full_attention_sink_bias",
    ],
    kv_factor: 1,
    theta: DEFAULTS.theta,
    sinks: false,
};

const SLIDING: Kind = Kind {
    name: "sliding_attention",
    keys: [
        "swa_num_attention_heads",
        "swa_num_key_value_heads",
        "swa_head_dim",
        "swa_v_head_dim",
        "swa_rope_theta",
        "add_swa_attention_sink_bias",
    ],
    kv_factor: 2,
    theta: SLIDING_THETA,
    sinks: true,
};

fn attention(decoder: &Decoder<'_>, kind: &Kind) -> Result<GqaSpec, ConvertError> {
    let config = decoder.config;
    let [heads_key, kv_key, dim_key, value_key, theta_key, sinks_key] = kind.keys;
    let heads = config.size_or(heads_key, decoder.heads, MAX_WIDTH)?;
    // Both kinds have the widths of the first, unless the second has keys of its own.
    let width = |key: &str, common: &str, default| {
        let common = config.size_or(common, default, MAX_WIDTH / heads)?;
        config.size_or(key, common, MAX_WIDTH / heads)
    };
    let head_dim = width(dim_key, "head_dim", HEAD_DIM)?;
    let v_head_dim = width(value_key, "v_head_dim", VALUE_DIM)?;
    let kv_heads = match config.opt_usize_or(kv_key, None)? {
        // The common key has the number for layers without a window.
        Some(count) => count,
        None => decoder.kv_heads.saturating_mul(kind.kv_factor),
    };
    let kv_heads = config.check_size(kv_key, kv_heads, heads)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.refuse(kv_key, format!("is {kv_heads}, which does not divide the {heads} heads")));
    }
    let nested = match config.section("rope_parameters")? {
        Some(section) => section.section(kind.name)?,
        None => None,
    };
    let place = nested.as_ref().unwrap_or(config);
    let theta = config.f64_or(theta_key, kind.theta)?;
    let newer = config.opt_str("model_type")? == Some(NEWER);
    let rotated = rope::width(place, head_dim, if newer { 1.0 } else { ROTARY_FACTOR })?;
    let rope = match &nested {
        Some(section) => rope::of_section(section, rotated, RopePairing::Half, theta, decoder.max_positions)?.spec,
        None => {
            let plain = rope::read(config, rotated, RopePairing::Half, theta, decoder.max_positions)?.spec;
            // `rope_theta` is that of layers without a window.
            sluice_format::RopeSpec { theta: config.check_above(theta_key, theta, 1.0)?, ..plain }
        }
    };
    let value_factor = config
        .opt_f64_or("attention_value_scale", if newer { None } else { Some(VALUE_FACTOR) })?
        .map(|factor| factor as f32);
    Ok(GqaSpec {
        heads,
        kv_heads,
        head_dim,
        v_head_dim,
        softmax_scale: (head_dim as f64).powf(-0.5) as f32,
        rope: Some(rope),
        value_factor: value_factor.filter(|&factor| factor != 1.0),
        value_norm: None,
        value_is_key: false,
        qkv_bias: config.bool_or("attention_bias", false)?,
        sinks: config.bool_or(sinks_key, kind.sinks)?,
        ..gqa::plain()
    })
}

/// Number of keys that a query sees. `sliding_window` includes the query's own, `sliding_window_size` does not. If newer models
/// have both, their published code uses the first.
fn window(config: &Config) -> Result<usize, ConvertError> {
    if config.opt_str("model_type")? == Some(NEWER) && config.has("sliding_window") {
        return config.size_or("sliding_window", WINDOW, MAX_LENGTH);
    }
    match config.opt_size_or("sliding_window_size", None, MAX_LENGTH - 1)? {
        Some(before) => Ok(before + 1),
        None => config.size_or("sliding_window", WINDOW, MAX_LENGTH),
    }
}

/// A list of zeros and ones with one entry per layer; if it is missing, `default`.
fn flags(decoder: &Decoder<'_>, key: &str, default: impl Fn(usize) -> bool) -> Result<Vec<bool>, ConvertError> {
    let config = decoder.config;
    let Some(list) = config.opt_list(key)? else { return Ok((0..decoder.layers).map(default).collect()) };
    if list.len() != decoder.layers {
        return Err(config.refuse(key, format!("has {} entries for {} layers", list.len(), decoder.layers)));
    }
    let flag = |value: &Value| match value.as_u64() {
        Some(flag @ (0 | 1)) => Ok(flag == 1),
        _ => Err(config.refuse(key, format!("holds {value}, expected 0 or 1"))),
    };
    list.iter().map(flag).collect()
}

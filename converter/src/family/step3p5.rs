//! Step 3.5 and 3.7: layers with a window have other numbers of heads and another rotation than layers without one. All heads are
//! gated.

use serde_json::Value;
use sluice_format::limits::{MAX_EXPERTS, MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, ExtentKind, FfnSpec, GqaSpec, LayerSpec, ModelSpec, QkNormScope, RopePairing,
    RopeScaling, RopeSpec, RouterScore, RouterSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, View};
use super::{Family, Place, Unused, gqa, moe, rope, usually_unused};
use crate::error::ConvertError;

/// The text model.
pub(crate) struct Step3p5;

/// The text model inside a vision model.
pub(crate) struct Step3p7;

const DEFAULTS: Defaults = Defaults {
    vocab: 128_815,
    hidden: 4096,
    intermediate: 11_264,
    layers: 45,
    heads: 64,
    kv_heads: Some(8),
    max_positions: 128_000,
    norm_eps: 1e-5,
    theta: 1e4,
};

const HEAD_DIM: usize = 128;
const EXPERTS: usize = 288;
const TOP_K: usize = 8;
const EXPERT_WIDTH: usize = 1280;
const SHARED_WIDTH: usize = 1280;
/// Layers without experts at the beginning, if there is no such key.
const DENSE_LAYERS: usize = 3;

impl Family for Step3p5 {
    fn model_types(&self) -> &'static [&'static str] {
        &["step3p5"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        spec(config)
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        origin(names, spec, place, tensor)
    }
}

impl Family for Step3p7 {
    fn model_types(&self) -> &'static [&'static str] {
        &["step3p7"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        spec(config)
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn spellings(&self) -> Vec<Names> {
        vec![NAMES, Names { prefix: "model.language_model.", ..NAMES }]
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        origin(names, spec, place, tensor)
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let parts = ["vision_model.", "vit_large_projector.", "multi_modal_projector."];
        let name = name.strip_prefix("model.").unwrap_or(name);
        if parts.iter().any(|part| name.starts_with(part)) { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

const NAMES: Names = Names { moe: &["moe", "mlp"], zero_centred: true, ..Names::USUAL };

fn spec(config: &Config) -> Result<ModelSpec, ConvertError> {
    let supported = [("attention_bias", false), ("mlp_bias", false), ("use_qk_norm", true), ("zero_centered", true)];
    for (key, supported) in supported.into_iter().chain([("sink", false), ("use_mfa", false)]) {
        config.require_bool(key, supported)?;
    }
    let mut decoder = Decoder::read(config, &DEFAULTS)?;
    let kv_heads = config.first_of(&["num_attention_groups", "num_key_value_heads"]);
    decoder.kv_heads = config.size_or(kv_heads, decoder.kv_heads, decoder.heads)?;
    let slides = slides(&decoder)?;
    let is_sparse = sparse_layers(&decoder)?;
    let (limits, shared_limits) = (limits(&decoder, "swiglu_limits")?, limits(&decoder, "swiglu_limits_shared")?);
    let sparse = experts(&decoder)?;
    let layer = |i: usize| -> Result<LayerSpec, ConvertError> {
        // The bound on the shared expert also applies to a network without experts.
        let dense_activation = activation(shared_limits[i]);
        let ffn = match is_sparse[i] {
            false => FfnSpec { activation: dense_activation, ..decoder.dense() },
            true => {
                let routed = activation(limits[i]);
                let other = (routed != dense_activation).then_some(dense_activation);
                FfnSpec { activation: routed, dense_activation: other, ..sparse.clone() }
            }
        };
        Ok(LayerSpec { attention: AttentionSpec::Gqa(attention(&decoder, i, slides[i])?), ffn })
    };
    decoder.model((0..decoder.layers).map(layer).collect::<Result<_, _>>()?)
}

/// The list under `key` with one entry per layer. Entries for layers that predict further tokens may follow.
fn per_layer<'a>(decoder: &Decoder<'a>, key: &str) -> Result<Option<&'a [Value]>, ConvertError> {
    let config = decoder.config;
    let Some(list) = config.opt_list(key)? else { return Ok(None) };
    let predicting = config.usize_or("num_nextn_predict_layers", 0)?;
    if list.len() != decoder.layers && list.len() != decoder.layers.saturating_add(predicting) {
        return Err(config.refuse(key, format!("has {} entries for {} layers", list.len(), decoder.layers)));
    }
    Ok(Some(&list[..decoder.layers]))
}

/// A number of each layer.
fn numbers(decoder: &Decoder<'_>, key: &str) -> Result<Option<Vec<f64>>, ConvertError> {
    let Some(list) = per_layer(decoder, key)? else { return Ok(None) };
    let number = |value: &Value| match value {
        Value::Null => Ok(0.0),
        value => value.as_f64().ok_or_else(|| decoder.config.refuse(key, format!("holds {value}, expected numbers"))),
    };
    list.iter().map(number).collect::<Result<_, _>>().map(Some)
}

fn slides(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    const KEY: &str = "layer_types";
    let Some(list) = per_layer(decoder, KEY)? else { return Ok(vec![false; decoder.layers]) };
    let slides = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(decoder.config.refuse(KEY, format!("holds {value}; supported: full_attention, sliding_attention"))),
    };
    list.iter().map(slides).collect()
}

/// Which layers have experts: `moe_layers_enum` is a list of their numbers, or a text with commas between them.
fn sparse_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    const KEY: &str = "moe_layers_enum";
    let config = decoder.config;
    if let Some(list) = per_layer(decoder, "mlp_layer_types")? {
        let sparse = |value: &Value| match value.as_str() {
            Some("sparse") => Ok(true),
            Some("dense") => Ok(false),
            _ => Err(config.refuse("mlp_layer_types", format!("holds {value}; supported: sparse, dense"))),
        };
        return list.iter().map(sparse).collect();
    }
    if !config.has(KEY) {
        return Ok((0..decoder.layers).map(|layer| layer >= DENSE_LAYERS).collect());
    }
    let numbers: Vec<Option<u64>> = match config.list(KEY) {
        Some(list) => list.iter().map(Value::as_u64).collect(),
        None => {
            let text = config.opt_str(KEY)?.unwrap_or_default();
            text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(|part| part.parse().ok()).collect()
        }
    };
    if numbers.contains(&None) {
        return Err(config.refuse(KEY, "holds something else than numbers of layers"));
    }
    Ok((0..decoder.layers as u64).map(|layer| numbers.contains(&Some(layer))).collect())
}

/// Bounds of the activation; 0 means none.
fn limits(decoder: &Decoder<'_>, key: &str) -> Result<Vec<f64>, ConvertError> {
    let limits = numbers(decoder, key)?.unwrap_or_else(|| vec![0.0; decoder.layers]);
    match limits.iter().find(|limit| **limit < 0.0) {
        Some(limit) => Err(decoder.config.refuse(key, format!("holds {limit}, expected bounds, or 0 for none"))),
        None => Ok(limits),
    }
}

fn activation(limit: f64) -> ActivationSpec {
    if limit > 0.0 { ActivationSpec::SiluBounded { limit: limit as f32 } } else { ActivationSpec::Silu }
}

/// Attention of a layer. `attention_other_setting` has the differences of layers with a window.
fn attention(decoder: &Decoder<'_>, layer: usize, slides: bool) -> Result<GqaSpec, ConvertError> {
    let config = decoder.config;
    let other = if slides { config.section("attention_other_setting")? } else { None };
    let mut heads = decoder.heads;
    if slides {
        heads = config.opt_size_or("num_sliding_attention_heads", Some(heads), MAX_WIDTH)?.unwrap_or(heads);
    }
    let (mut kv_heads, mut head_dim) = (decoder.kv_heads, config.size_or("head_dim", HEAD_DIM, MAX_WIDTH)?);
    if let Some(other) = &other {
        other.require_str("attention_type", &["sliding_attention"])?;
        heads = other.size_or("num_attention_heads", heads, MAX_WIDTH)?;
        kv_heads = other.size_or("num_attention_groups", kv_heads, heads)?;
        head_dim = other.size_or("head_dim", head_dim, MAX_WIDTH)?;
    }
    config.check_size("head_dim", head_dim, MAX_WIDTH / heads)?;
    if !heads.is_multiple_of(kv_heads) {
        let problem = format!("is {kv_heads}, which does not divide the {heads} heads");
        return Err(config.refuse("num_attention_groups", problem));
    }
    let window = if slides { config.opt_size_or("sliding_window", None, MAX_LENGTH)? } else { None };
    if slides && window.is_none() {
        return Err(config.refuse("sliding_window", "is missing, and there are layers with a window"));
    }
    let scalar = config.opt_f64("query_pre_attn_scalar")?.unwrap_or(head_dim as f64);
    Ok(GqaSpec {
        heads,
        kv_heads,
        head_dim,
        v_head_dim: head_dim,
        softmax_scale: config.check_above("query_pre_attn_scalar", scalar, 0.0)?.powf(-0.5) as f32,
        rope: Some(rotation(decoder, layer, slides, head_dim)?),
        window,
        qk_norm: gqa::qk_norm(decoder, QkNormScope::Head),
        head_gate: config.bool_or("use_head_wise_attn_gate", true)?,
        ..gqa::plain()
    })
}

/// The rotation of a layer. `rope_scaling` applies to layers without a window.
fn rotation(decoder: &Decoder<'_>, layer: usize, slides: bool, head_dim: usize) -> Result<RopeSpec, ConvertError> {
    let config = decoder.config;
    let kind = if slides { "sliding_attention" } else { "full_attention" };
    let nested = config.section("rope_parameters")?.map(|section| section.section(kind)).transpose()?.flatten();
    let (pairing, positions) = (RopePairing::Half, decoder.max_positions);
    if let Some(section) = &nested {
        let dim = rope::width(section, head_dim, 1.0)?;
        return Ok(rope::of_section(section, dim, pairing, decoder.theta, positions)?.spec);
    }
    let theta = match config.list("rope_theta") {
        Some(_) => numbers(decoder, "rope_theta")?.map_or(decoder.theta, |list| list[layer]),
        None => config.opt_f64("rope_theta")?.unwrap_or(decoder.theta),
    };
    config.check_above("rope_theta", theta, 1.0)?;
    let factor = numbers(decoder, "partial_rotary_factors")?.map_or(1.0, |list| list[layer]);
    let dim = rope::part(config, "partial_rotary_factors", head_dim, factor)?;
    let scaled = config.opt_list("yarn_only_types")?;
    if scaled.is_some_and(|kinds| kinds.iter().any(|kind| kind.as_str() != Some("full_attention"))) {
        return Err(config.refuse("yarn_only_types", "names other layers than those of full_attention"));
    }
    match config.section("rope_scaling")?.filter(|_| !slides) {
        Some(section) => Ok(rope::of_section(&section, dim, pairing, theta, positions)?.spec),
        None => Ok(RopeSpec { pairing, theta, dim, scaling: RopeScaling::None }),
    }
}

fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    config.require_str("moe_router_activation", &["sigmoid"])?;
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        choice_bias: config.bool_or("use_moe_router_bias", true)?,
        scale: config.f32_or("moe_router_scaling_factor", 1.0)?,
        ..moe::softmax_router(config.bool_or("norm_expert_weight", true)?)
    };
    let experts = config.first_of(&["moe_num_experts", "n_routed_experts", "num_local_experts"]);
    let experts = config.size_or(experts, EXPERTS, MAX_EXPERTS)?;
    let top_k = config.size_or(config.first_of(&["moe_top_k", "num_experts_per_tok"]), TOP_K, experts)?;
    let width = config.size_or("moe_intermediate_size", EXPERT_WIDTH, MAX_WIDTH)?;
    let routed = moe::plain([experts, top_k, width], router);
    let shared = config.first_of(&["share_expert_dim", "share_expert_dims"]);
    let dense_width = config.size_or(shared, SHARED_WIDTH, MAX_WIDTH)?;
    Ok(FfnSpec { dense_width, moe: Some(routed), ..FfnSpec::NONE })
}

/// Experts are stacked, gate and up separately; the shared one is beside them.
fn origin(names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    let name = |rest: &str| names.layer(place.layer, rest);
    let Some(moe) = &spec.layers[place.layer].ffn.moe else { return names.origin(spec, place, tensor) };
    let stacked = |which: &str| {
        View::of_stack(name(&format!("moe.{which}_proj.weight")), [moe.experts, rows, cols], place.index, 0, rows)
    };
    let shared = |which: &str| View::whole(name(&format!("share_expert.{which}_proj.weight")), rows, cols);
    let own = match (place.kind, tensor.name) {
        (ExtentKind::Router, "router_bias") => names.vector(place, "moe.router_bias", tensor),
        (ExtentKind::Dense, "gate_up") => vec![vec![shared("gate"), shared("up")]],
        (ExtentKind::Dense, "down") => vec![vec![shared("down")]],
        (ExtentKind::Expert, "gate_up") => vec![vec![stacked("gate"), stacked("up")]],
        (ExtentKind::Expert, "down") => vec![vec![stacked("down")]],
        _ => Vec::new(),
    };
    [own, names.origin(spec, place, tensor)].concat()
}

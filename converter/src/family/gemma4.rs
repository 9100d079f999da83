//! Gemma 4, with experts beside a dense network, and without experts. Layers without a window have wider heads, whose keys are also
//! the values; there are norms in many places. The small models are not supported: they have embeddings for each layer, and layers
//! without keys.

use sluice_format::limits::{MAX_EXPERTS, MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    AttentionSpec, ExtentKind, FfnSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, QkNormScope, RopePairing, RopeScaling,
    RopeSpec, RouterSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::{self, Names};
use super::view::Origin;
use super::{Family, Place, Unused, gemma3, gqa, moe, rope};
use crate::error::ConvertError;

/// As published: with a vision model.
pub(crate) struct Gemma4;

/// The text model by itself.
pub(crate) struct Gemma4Text;

const DEFAULTS: Defaults = Defaults {
    vocab: 262_144,
    hidden: 2304,
    intermediate: 9216,
    layers: 30,
    heads: 8,
    kv_heads: Some(4),
    max_positions: 131_072,
    norm_eps: 1e-6,
    theta: 1e6,
};

const HEAD_DIM: usize = 256;
const GLOBAL_HEAD_DIM: usize = 512;
const WINDOW: usize = 512;
/// One in this many layers has no window.
const PATTERN: usize = 6;
/// The fraction of pairs that are rotated in layers without a window.
const GLOBAL_ROTARY_FACTOR: f64 = 0.25;
/// Width of the embeddings for each layer, if the key is missing.
const PER_LAYER_WIDTH: usize = 256;

impl Family for Gemma4Text {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma4_text"]
    }

    fn tied_by_default(&self) -> bool {
        true
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        gemma3::require_causal(config)?;
        for (key, default) in [("hidden_size_per_layer_input", PER_LAYER_WIDTH), ("num_kv_shared_layers", 0)] {
            let value = config.opt_usize_or(key, Some(default))?.unwrap_or(0);
            if value != 0 {
                return Err(config.refuse(key, format!("is {value}; only 0 is supported")));
            }
        }
        let decoder = gemma3::read(config, &DEFAULTS)?;
        let (full, sliding) = (full(&decoder)?, sliding(&decoder)?);
        let ffn = if config.bool_or("enable_moe_block", false)? { experts(&decoder)? } else { gemma3::dense(&decoder) };
        let mut slides = gemma3::slides(&decoder, PATTERN)?;
        // The last layer never has a window, whatever the list says.
        slides.iter_mut().rev().take(1).for_each(|last| *last = false);
        let layer = |slides: bool| LayerSpec {
            attention: AttentionSpec::Gqa(if slides { sliding.clone() } else { full.clone() }),
            ffn: ffn.clone(),
        };
        let model = gemma3::model(&decoder, slides.into_iter().map(layer).collect())?;
        Ok(ModelSpec { layer_scale: true, ..model })
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let vector = |rest: &str| names.vector(place, rest, tensor);
        let layer = |rest: &str| names.layer(place.layer, rest);
        let experts = spec.layers[place.layer].ffn.moe.as_ref().map_or(0, |moe| moe.experts);
        match (place.kind, tensor.name) {
            (_, "router") => names::matrix(layer("router.proj.weight"), tensor),
            (_, "router_norm") => vector("router.scale"),
            (_, "expert_scale") => vector("router.per_expert_scale"),
            (_, "expert_norm") => vector("pre_feedforward_layernorm_2.weight"),
            (_, "dense_post_norm") => vector("post_feedforward_layernorm_1.weight"),
            (_, "expert_post_norm") => vector("post_feedforward_layernorm_2.weight"),
            (_, "layer_scale") => vector("layer_scalar"),
            (ExtentKind::Dense, _) => vec![names::gated(&layer("mlp"), Names::USUAL.expert, tensor)],
            (ExtentKind::Expert, _) => vec![
                names::fused(&layer("experts"), experts, place.index, tensor),
                // As in MLX.
                names::stacked(&layer("experts.switch_glu"), experts, place.index, tensor),
                // Separate, as in files of tools that quantise each matrix.
                names::gated(&layer(&format!("experts.{}", place.index)), Names::USUAL.expert, tensor),
            ],
            _ => names.origin(spec, place, tensor),
        }
    }
}

impl Family for Gemma4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma4"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn tied_by_default(&self) -> bool {
        true
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", Gemma4Text.model_types())?;
        Gemma4Text.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "model.language_model.", ..Gemma4Text.names() }
    }

    fn spellings(&self) -> Vec<Names> {
        // The form of MLX, and of tools that keep only the text model.
        let outer = Names { prefix: "language_model.model.", head: "language_model.lm_head.weight", ..Names::USUAL };
        vec![self.names(), outer, Gemma4Text.names()]
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        Gemma4Text.origin(names, spec, place, tensor)
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        gemma3::unused_beside_text(name)
    }
}

/// Attention of layers without a window.
fn full(decoder: &Decoder<'_>) -> Result<GqaSpec, ConvertError> {
    const KV: &str = "num_global_key_value_heads";
    let config = decoder.config;
    let shared = config.bool_or("attention_k_eq_v", false)?;
    let head_dim = head_dim(decoder, "global_head_dim", GLOBAL_HEAD_DIM)?;
    // Their number can differ only if keys are also the values.
    let own = if shared { config.opt_usize_or(KV, None)? } else { None };
    let kv_heads = match own {
        Some(count) => gemma3::kv_heads(decoder, KV, count)?,
        None => gemma3::kv_heads(decoder, "num_key_value_heads", decoder.kv_heads)?,
    };
    Ok(GqaSpec { value_is_key: shared, ..attention(decoder, kv_heads, head_dim, proportional(decoder, head_dim)?)? })
}

/// Attention of layers with a window.
fn sliding(decoder: &Decoder<'_>) -> Result<GqaSpec, ConvertError> {
    let head_dim = head_dim(decoder, "head_dim", HEAD_DIM)?;
    let kv_heads = gemma3::kv_heads(decoder, "num_key_value_heads", decoder.kv_heads)?;
    let plain = || RopeSpec {
        pairing: RopePairing::Half,
        theta: gemma3::LOCAL_THETA,
        dim: head_dim,
        scaling: RopeScaling::None,
    };
    let rope = gemma3::of_kind(decoder, "sliding_attention", head_dim, gemma3::LOCAL_THETA)?.unwrap_or_else(plain);
    let window = Some(decoder.config.size_or("sliding_window", WINDOW, MAX_LENGTH)?);
    Ok(GqaSpec { window, ..attention(decoder, kv_heads, head_dim, rope)? })
}

fn head_dim(decoder: &Decoder<'_>, key: &str, default: usize) -> Result<usize, ConvertError> {
    let width = decoder.config.size_or(key, default, MAX_WIDTH / decoder.heads)?;
    rope::check_even(decoder.config, key, width)?;
    Ok(width)
}

fn attention(decoder: &Decoder<'_>, kv_heads: usize, dim: usize, rope: RopeSpec) -> Result<GqaSpec, ConvertError> {
    let bias = decoder.config.bool_or("attention_bias", false)?;
    Ok(GqaSpec {
        softmax_scale: 1.0,
        qk_norm: gqa::qk_norm(decoder, QkNormScope::Head),
        value_norm: Some(decoder.norm_eps),
        qkv_bias: bias,
        o_bias: bias,
        ..gqa::of_heads(decoder.heads, kv_heads, dim, rope)
    })
}

/// A rotation of only some pairs. Their frequencies are the same as if all pairs were rotated.
fn proportional(decoder: &Decoder<'_>, head_dim: usize) -> Result<RopeSpec, ConvertError> {
    const KIND: &str = "full_attention";
    let partial = |theta, factor: f64| {
        let pairs = (head_dim as f64 * factor / 2.0) as usize;
        let scaling = RopeScaling::Partial { pairs };
        RopeSpec { pairing: RopePairing::Half, theta, dim: head_dim, scaling }
    };
    let Some(parameters) = decoder.config.section("rope_parameters")? else {
        return Ok(partial(DEFAULTS.theta, GLOBAL_ROTARY_FACTOR));
    };
    let section = parameters.section(KIND)?.ok_or_else(|| parameters.refuse(KIND, "is missing"))?;
    if section.opt_str("rope_type")? != Some("proportional") {
        let rope = gemma3::of_kind(decoder, KIND, head_dim, DEFAULTS.theta)?;
        return rope.ok_or_else(|| parameters.refuse(KIND, "is missing"));
    }
    if section.f64_or("factor", 1.0)? != 1.0 {
        return Err(section.refuse("factor", "must be 1"));
    }
    let factor = section.check_above("partial_rotary_factor", section.f64_or("partial_rotary_factor", 1.0)?, 0.0)?;
    let theta = section.check_above("rope_theta", section.f64_or("rope_theta", DEFAULTS.theta)?, 1.0)?;
    let rope = partial(theta, factor);
    match &rope.scaling {
        RopeScaling::Partial { pairs } if (1..=head_dim / 2).contains(pairs) => Ok(rope),
        _ => Err(section.refuse("partial_rotary_factor", format!("is {factor}: no part of the pairs of a head"))),
    }
}

/// Experts beside the dense network.
fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    // The configuration class has no defaults for these numbers.
    let number = |key: &str, most: usize| {
        config.opt_size_or(key, None, most)?.ok_or_else(|| config.refuse(key, "is missing: it describes the experts"))
    };
    let experts = number("num_experts", MAX_EXPERTS)?;
    let sizes = [experts, number("top_k_experts", experts)?, number("moe_intermediate_size", MAX_WIDTH)?];
    let router = RouterSpec {
        logit_factor: Some((decoder.hidden as f64).powf(-0.5) as f32),
        expert_scale: true,
        ..moe::softmax_router(true)
    };
    let moe = MoeSpec { apart: true, ..moe::plain(sizes, router) };
    Ok(FfnSpec { moe: Some(moe), ..gemma3::dense(decoder) })
}

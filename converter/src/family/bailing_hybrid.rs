//! Ling 3: gated delta nets with a bounded decay for each channel, and latent attention whose heads are gated.

use sluice_format::limits::MAX_WIDTH;
use sluice_format::{AttentionSpec, DeltaSpec, ExtentKind, LayerSpec, MlaSpec, ModelSpec, TensorShape};

use super::bailing_moe::{NAMES, check_shared, renamed};
use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, View};
use super::{Family, Place, kimi_linear, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct BailingHybrid;

const DEFAULTS: Defaults = Defaults {
    vocab: 157_184,
    hidden: 2560,
    intermediate: 6144,
    layers: 42,
    heads: 32,
    kv_heads: Some(32),
    max_positions: 262_144,
    norm_eps: 1e-6,
    theta: 6e6,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 512, top_k: 8, width: 768, shared: 1, groups: 8, groups_kept: 4, scale: 2.5 };

/// Layers without experts at the beginning, if `first_k_dense_replace` is missing.
const DENSE_LAYERS: usize = 2;
/// Size of the groups of layers whose last layer has latent attention, if `layer_group_size` is missing.
const GROUP: usize = 6;

impl Family for BailingHybrid {
    fn model_types(&self) -> &'static [&'static str] {
        &["bailing_hybrid"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        check_class(config)?;
        config.require_str("score_function", &["sigmoid"])?;
        config.require_bool("moe_router_enable_expert_bias", true)?;
        check_shared(config, EXPERTS.width)?;
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let (full, linear) = (AttentionSpec::Mla(latent(&decoder)?), AttentionSpec::Delta(delta(&decoder)?));
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        let layers = linear_layers(&decoder)?.into_iter().zip(moe::after_dense(&decoder, DENSE_LAYERS)?);
        let layer = |(is_linear, is_sparse): (bool, bool)| LayerSpec {
            attention: if is_linear { linear.clone() } else { full.clone() },
            ffn: if is_sparse { sparse.clone() } else { decoder.dense() },
        };
        decoder.model(layers.map(layer).collect())
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let name = |rest: &str| names.layer(place.layer, &renamed(rest));
        match (place.kind, &spec.layers[place.layer].attention) {
            // Kimi Linear has more dimensions here.
            (ExtentKind::Attention, _) if tensor.name == "a_log" => {
                vec![vec![View::vector(name("self_attn.A_log"), tensor.shape[2])]]
            }
            (ExtentKind::Attention, AttentionSpec::Delta(delta)) if tensor.name != "attn_norm" => {
                kimi_linear::origin(delta, &name, tensor)
            }
            (ExtentKind::Attention, _) => names.origin_in(spec, place, &name, tensor),
            (ExtentKind::Router, _) if tensor.name == "router_bias" => {
                names.vector(place, "mlp.gate.expert_bias", tensor)
            }
            _ => names.origin(spec, place, tensor),
        }
    }
}

/// Ling 2.5 and 2.6 have the same `model_type`, but another linear attention.
fn check_class(config: &Config) -> Result<(), ConvertError> {
    let class = config.opt_list("architectures")?.and_then(|list| list.first()?.as_str());
    match class {
        Some(class) if !["BailingMoeV3ForCausalLM", "BailingHybridForCausalLM"].contains(&class) => {
            let problem = format!("names \"{class}\"; supported: BailingMoeV3ForCausalLM, BailingHybridForCausalLM");
            Err(config.refuse("architectures", problem))
        }
        _ => Ok(()),
    }
}

/// The query has a single matrix if `q_lora_rank` is missing.
fn latent(decoder: &Decoder<'_>) -> Result<MlaSpec, ConvertError> {
    let latent = mla::read(decoder, &mla::Defaults::DEEPSEEK)?;
    let q_lora_rank = latent.q_lora_rank.filter(|_| decoder.config.has("q_lora_rank"));
    Ok(MlaSpec { q_lora_rank, head_gate: true, ..latent })
}

fn delta(decoder: &Decoder<'_>) -> Result<DeltaSpec, ConvertError> {
    let config = decoder.config;
    let width = config.size_or("head_dim", 128, MAX_WIDTH)?;
    let least = config.f64_or("kda_lower_bound", -5.0)? as f32;
    let bounded = config.bool_or("kda_safe_gate", true)?;
    if bounded && !(least.is_finite() && least < 0.0) {
        return Err(config.refuse("kda_lower_bound", format!("is {least}, expected a negative number")));
    }
    Ok(DeltaSpec {
        key_heads: decoder.heads,
        value_heads: decoder.heads,
        key_head_dim: width,
        value_head_dim: width,
        conv_width: config.size_or("short_conv_kernel_size", 4, MAX_WIDTH)?,
        norm_eps: decoder.norm_eps,
        value_heads_tiled: false,
        decay_rank: None,
        channel_decay: true,
        least_log_decay: bounded.then_some(least),
        gate_rank: None,
        gate_sigmoid: true,
    })
}

/// Which layers are linear: as `layer_types` says, otherwise all but the last of each `layer_group_size`.
fn linear_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    if let Some(list) = decoder.layer_list("layer_types", ["linear_attention", "full_attention"])? {
        return Ok(list);
    }
    let group = decoder.config.size_or("layer_group_size", GROUP, ModelSpec::MAX_LAYERS)?;
    Ok((1..=decoder.layers).map(|number| number % group != 0).collect())
}

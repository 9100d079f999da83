//! Kimi Linear: gated delta nets with a decay for each channel, and latent attention without positions.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{AttentionSpec, DeltaSpec, ExtentKind, LayerSpec, MlaSpec, ModelSpec, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct KimiLinear;

const DEFAULTS: Defaults = Defaults {
    vocab: 163_840,
    hidden: 2304,
    intermediate: 9216,
    layers: 27,
    heads: 32,
    kv_heads: Some(32),
    max_positions: 1_048_576,
    norm_eps: 1e-5,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 8, width: 1024, shared: 1, groups: 1, groups_kept: 1, scale: 2.446 };

/// Layers without experts at the beginning, if `first_k_dense_replace` is missing.
const DENSE_LAYERS: usize = 1;

impl Family for KimiLinear {
    fn model_types(&self) -> &'static [&'static str] {
        &["kimi_linear"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("mla_use_nope", true)?;
        let mut decoder = Decoder::read(config, &DEFAULTS)?;
        if let Some(longest) = config.opt_size_or("model_max_length", None, MAX_LENGTH)? {
            decoder.max_positions = longest;
        }
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
        Names::MIXTRAL
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        match &spec.layers[place.layer].attention {
            AttentionSpec::Delta(delta) if place.kind == ExtentKind::Attention && tensor.name != "attn_norm" => {
                origin(delta, &|rest| names.layer(place.layer, rest), tensor)
            }
            _ => names.origin(spec, place, tensor),
        }
    }
}

/// Latent attention without rotation; the query has a single matrix if `q_lora_rank` is missing.
fn latent(decoder: &Decoder<'_>) -> Result<MlaSpec, ConvertError> {
    let latent = mla::read(decoder, &mla::Defaults::DEEPSEEK)?;
    let head_dim = latent.qk_nope_head_dim.saturating_add(latent.qk_rope_head_dim) as f64;
    Ok(MlaSpec {
        q_lora_rank: latent.q_lora_rank.filter(|_| decoder.config.has("q_lora_rank")),
        softmax_scale: head_dim.powf(-0.5) as f32,
        rope: None,
        ..latent
    })
}

/// Kimi Delta Attention: in `linear_attn_config`, or under transformers' names for its keys.
fn delta(decoder: &Decoder<'_>) -> Result<DeltaSpec, ConvertError> {
    let section = decoder.config.section("linear_attn_config")?;
    let size = |nested: &str, flat: &str, default: usize| {
        let flat = decoder.config.size_or(flat, default, MAX_WIDTH)?;
        section.as_ref().map_or(Ok(flat), |section| section.size_or(nested, flat, MAX_WIDTH))
    };
    let (heads, width) = (size("num_heads", "linear_num_heads", 32)?, size("head_dim", "linear_head_dim", 128)?);
    Ok(DeltaSpec {
        key_heads: heads,
        value_heads: heads,
        key_head_dim: width,
        value_head_dim: width,
        conv_width: size("short_conv_kernel_size", "linear_conv_kernel_dim", 4)?,
        norm_eps: decoder.norm_eps,
        value_heads_tiled: false,
        decay_rank: Some(width),
        channel_decay: false,
        least_log_decay: None,
        gate_rank: Some(width),
        gate_sigmoid: true,
    })
}

/// Which layers are linear: as `layer_types` says, or the lists of `linear_attn_config`, which count from one; otherwise all but
/// every fourth.
fn linear_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    if let Some(list) = decoder.layer_list("layer_types", ["linear_attention", "full_attention"])? {
        return Ok(list);
    }
    let by_default = || (0..decoder.layers).map(|layer| layer == 0 || layer % 4 != 0).collect();
    let Some(section) = decoder.config.section("linear_attn_config")? else { return Ok(by_default()) };
    let (Some(linear), Some(full)) = (section.opt_list("kda_layers")?, section.opt_list("full_attn_layers")?) else {
        return Ok(by_default());
    };
    let mut kinds = vec![None; decoder.layers];
    for (key, list, is_linear) in [("kda_layers", linear, true), ("full_attn_layers", full, false)] {
        for number in list {
            let layer = number.as_u64().and_then(|n| usize::try_from(n).ok()?.checked_sub(1));
            let Some(kind) = layer.and_then(|layer| kinds.get_mut(layer)) else {
                let problem = format!("holds {number}, expected numbers of layers from 1 to {}", decoder.layers);
                return Err(section.refuse(key, problem));
            };
            if kind.replace(is_linear).is_some() {
                return Err(section.refuse(key, format!("names layer {number}, which is named already")));
            }
        }
    }
    let known = |(layer, kind): (usize, Option<bool>)| {
        let problem = || format!("does not name layer {}, and neither does `full_attn_layers`", layer + 1);
        kind.ok_or_else(|| section.refuse("kda_layers", problem()))
    };
    kinds.into_iter().enumerate().map(known).collect()
}

/// Where a tensor of Kimi Delta Attention comes from; `layer` completes names.
pub(super) fn origin(delta: &DeltaSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    let name = |rest: &str| layer(&format!("self_attn.{rest}"));
    let one = |view: View| vec![vec![view]];
    let matrix = |module: &str| one(View::whole(name(&format!("{module}_proj.weight")), rows, cols));
    match tensor.name {
        "conv" => {
            let key = delta.key_heads * delta.key_head_dim;
            let parts = [("q", key), ("k", key), ("v", delta.value_heads * delta.value_head_dim)];
            let part = |(which, channels): (&str, usize)| {
                let taps = Strides::rows(0, 1, channels * delta.conv_width);
                View::new(name(&format!("{which}_conv1d.weight")), &[channels, 1, delta.conv_width], taps)
            };
            vec![parts.map(part).to_vec()]
        }
        "a_log" => one(View::new(name("A_log"), &[1, 1, cols, 1], Strides::rows(0, 1, cols))),
        "dt_bias" => one(View::vector(name("dt_bias"), cols)),
        "out_norm" => one(View::vector(name("o_norm.weight"), cols)),
        "a" => matrix("f"),
        "a_down" => matrix("f_a"),
        "a_up" => matrix("f_b"),
        "z" => matrix("g"),
        "z_down" => matrix("g_a"),
        "z_up" => matrix("g_b"),
        module => matrix(module),
    }
}

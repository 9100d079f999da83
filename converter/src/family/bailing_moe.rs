//! Ling and Ring of the first and second generation. Both have the type `bailing_moe`; their class in `architectures` tells them
//! apart.

use sluice_format::{AttentionSpec, ExtentKind, FfnSpec, GqaSpec, ModelSpec, QkNormScope, RouterSpec, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct BailingMoe;

/// The defaults of the configuration classes of the two generations.
const FIRST: Defaults = Defaults {
    vocab: 30_592,
    hidden: 1024,
    intermediate: 0,
    layers: 24,
    heads: 16,
    kv_heads: None,
    max_positions: 16_384,
    norm_eps: 1e-5,
    theta: 1e4,
};
const SECOND: Defaults = Defaults {
    vocab: 157_184,
    hidden: 2048,
    intermediate: 5120,
    layers: 20,
    heads: 16,
    kv_heads: Some(4),
    max_positions: 32_768,
    norm_eps: 1e-6,
    theta: 6e5,
};

const FIRST_EXPERTS: moe::Defaults =
    moe::Defaults { experts: 16, top_k: 2, width: 0, shared: 0, groups: 1, groups_kept: 1, scale: 1.0 };
const SECOND_EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 8, width: 512, shared: 1, groups: 8, groups_kept: 4, scale: 1.0 };

/// Width of a head of the second generation.
const HEAD_DIM: usize = 128;

/// The module of attention, and its output projection.
const MODULE: &str = "attention.";
const OUTPUT: &str = "attention.dense";

impl Family for BailingMoe {
    fn model_types(&self) -> &'static [&'static str] {
        &["bailing_moe", "bailing_moe_v2"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        for key in ["use_sliding_window", "norm_head", "norm_softmax"] {
            config.require_bool(key, false)?;
        }
        let second = is_second(config)?;
        let decoder = Decoder::read(config, if second { &SECOND } else { &FIRST })?;
        let heads = gqa::Heads { head_dim: second.then_some(HEAD_DIM), ..gqa::Heads::USUAL };
        let normed = config.bool_or("use_qk_norm", second)?;
        let attention = GqaSpec {
            qkv_bias: config.bool_or("use_qkv_bias", false)?,
            o_bias: config.bool_or("use_bias", !second)?,
            qk_norm: if normed { gqa::qk_norm(&decoder, QkNormScope::Head) } else { None },
            ..gqa::read(&decoder, heads)?
        };
        let sparse = if second { second_experts(&decoder)? } else { first_experts(&decoder)? };
        let is_sparse = moe::after_dense(&decoder, usize::from(second))?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &is_sparse)
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let own = match (place.kind, &spec.layers[place.layer].attention) {
            (ExtentKind::Attention, AttentionSpec::Gqa(gqa)) if tensor.name != "attn_norm" => {
                attention(gqa, &|rest| names.layer(place.layer, rest), tensor)
            }
            (ExtentKind::Router, _) if tensor.name == "router_bias" => {
                names.vector(place, "mlp.gate.expert_bias", tensor)
            }
            _ => Vec::new(),
        };
        names.or_usual([own, usual(names, spec, place, tensor)].concat(), spec, place, tensor)
    }
}

/// Names of Ling and Ring, of all generations.
pub(super) const NAMES: Names = Names { embedding: "word_embeddings.weight", ..Names::USUAL };

/// Tensors with the usual names: all except attention, where these names mean something else.
fn usual(names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
    match place.kind {
        ExtentKind::Attention if tensor.name != "attn_norm" => Vec::new(),
        _ => names.origin(spec, place, tensor),
    }
}

/// The name here for the tensor of attention with this usual name.
pub(super) fn renamed(usual: &str) -> String {
    match usual.strip_prefix("self_attn.") {
        None => usual.to_owned(),
        Some(rest) => match rest.strip_prefix("o_proj") {
            Some(end) => format!("{OUTPUT}{end}"),
            None => format!("{MODULE}{rest}"),
        },
    }
}

fn is_second(config: &Config) -> Result<bool, ConvertError> {
    let class = config.opt_list("architectures")?.and_then(|list| list.first()?.as_str());
    let second = config.opt_str("model_type")? == Some("bailing_moe_v2")
        || class.is_some_and(|class| class.starts_with("BailingMoeV2"));
    if let Some(class) = class.filter(|class| !["BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"].contains(class)) {
        let problem = format!("names \"{class}\"; supported: BailingMoeForCausalLM, BailingMoeV2ForCausalLM");
        return Err(config.refuse("architectures", problem));
    }
    config.require_str("score_function", if second { &["sigmoid"] } else { &["softmax"] })?;
    config.require_bool("moe_router_enable_expert_bias", second)?;
    Ok(second)
}

/// Softmax over all experts. The reference divides by the sum only if a token has several experts.
fn first_experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let renormalise = decoder.config.bool_or("norm_topk_prob", true)?;
    let ffn = moe::with_shared(decoder, &FIRST_EXPERTS, moe::softmax_router(renormalise))?;
    Ok(several(ffn))
}

fn second_experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    // The reference does so whatever the key says.
    config.require_bool("norm_topk_prob", true)?;
    check_shared(config, SECOND_EXPERTS.width)?;
    Ok(several(moe::deepseek_v3(decoder, &SECOND_EXPERTS)?))
}

/// Refuses a shared expert whose width is not a multiple of that of routed ones: the reference has no such width.
pub(super) fn check_shared(config: &Config, default: usize) -> Result<(), ConvertError> {
    let width = config.usize_or("moe_intermediate_size", default)?;
    let shared = config.opt_usize_or("moe_shared_expert_intermediate_size", Some(width))?.unwrap_or(width);
    if shared != width {
        let problem = format!("is {shared}, expected that of `moe_intermediate_size`, {width}");
        return Err(config.refuse("moe_shared_expert_intermediate_size", problem));
    }
    Ok(())
}

/// If a token has one expert, the weights are not divided by their sum.
fn several(mut ffn: FfnSpec) -> FfnSpec {
    if let Some(moe) = ffn.moe.as_mut().filter(|moe| moe.top_k == 1) {
        moe.router = RouterSpec { renormalise: None, ..moe.router.clone() };
    }
    ffn
}

/// Queries, keys and values are rows of one matrix, in this order.
fn attention(gqa: &GqaSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    let (query, key) = (gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim);
    let all = query + key + gqa.kv_heads * gqa.v_head_dim;
    let first = match tensor.name {
        "k" | "k_bias" => query,
        "v" | "v_bias" => query + key,
        _ => 0,
    };
    let view = match tensor.name {
        "q" | "k" | "v" => {
            let strides = Strides::rows(first, rows, cols);
            View::new(layer("attention.query_key_value.weight"), &[all, cols], strides)
        }
        "q_bias" | "k_bias" | "v_bias" => {
            let strides = Strides { start: first, ..Strides::rows(0, 1, cols) };
            View::new(layer("attention.query_key_value.bias"), &[all], strides)
        }
        "q_norm" => View::vector(layer("attention.query_layernorm.weight"), cols),
        "k_norm" => View::vector(layer("attention.key_layernorm.weight"), cols),
        name => gqa::origin(gqa, &|rest| layer(&renamed(rest)), name, tensor.shape),
    };
    vec![vec![view]]
}

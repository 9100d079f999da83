//! MiniMax-M3: a vision model around a text model with block-sparse attention. Only the text part is converted.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, BlockScore, FfnSpec, GqaSpec, KeyBlocksSpec, LayerSpec, ModelSpec, MoeSpec,
    QkNormScope, RouterScore, RouterSpec,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, Unused, gqa, moe, usually_unused};
use crate::error::ConvertError;

/// The family, as published.
pub(crate) struct MiniMaxM3;

/// Its text model by itself.
pub(crate) struct MiniMaxM3Text;

const DEFAULTS: Defaults = Defaults {
    vocab: 200_064,
    hidden: 6144,
    intermediate: 12_288,
    layers: 60,
    heads: 64,
    kv_heads: Some(4),
    max_positions: 524_288,
    norm_eps: 1e-6,
    theta: 5e6,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 128, top_k: 4, width: 3072, shared: 1, groups: 1, groups_kept: 1, scale: 2.0 };

const HEAD_DIM: usize = 128;
const SHARED_WIDTH: usize = 3072;

/// All of these mean the gated activation, whatever `hidden_act` says.
const ACTIVATIONS: [&str; 3] = ["swigluoai", "silu", "swish"];

impl Family for MiniMaxM3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["minimax_m3_vl"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", MiniMaxM3Text.model_types())?;
        MiniMaxM3Text.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "language_model.model.", head: "language_model.lm_head.weight", ..MiniMaxM3Text.names() }
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["vision_tower.", "multi_modal_projector.", "patch_merge_mlp."];
        if vision.iter().any(|prefix| name.starts_with(prefix)) { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

impl Family for MiniMaxM3Text {
    fn model_types(&self) -> &'static [&'static str] {
        &["minimax_m3_vl_text"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("use_gemma_norm", true)?;
        let mut decoder = Decoder::read_as(config, &DEFAULTS, &ACTIVATIONS)?;
        decoder.intermediate = config.size_or("dense_intermediate_size", DEFAULTS.intermediate, MAX_WIDTH)?;
        let activation = ActivationSpec::SwigluOai {
            alpha: config.f32_or("swiglu_alpha", 1.702)?,
            limit: config.f32_or("swiglu_limit", 7.0)?,
        };
        config.check_above("swiglu_limit", f64::from(config.f32_or("swiglu_limit", 7.0)?), 0.0)?;
        let (full, blocks) = (attention(&decoder)?, key_blocks(&decoder)?);
        let sparse = experts(&decoder, activation)?;
        let dense = FfnSpec { activation, ..decoder.dense() };
        let chooses = of_layers(&decoder, "sparse_attention_freq", ["minimax_m3_sparse", "full_attention"])?;
        let routed = of_layers(&decoder, "moe_layer_freq", ["sparse", "dense"])?;
        let layers = chooses.unwrap_or(vec![false; decoder.layers]).into_iter();
        let layer = |(chooses, routed): (bool, bool)| LayerSpec {
            attention: AttentionSpec::Gqa(GqaSpec { blocks: chooses.then(|| blocks.clone()), ..full.clone() }),
            ffn: if routed { sparse.clone() } else { dense.clone() },
        };
        decoder.model(layers.zip(routed.unwrap_or(vec![true; decoder.layers])).map(layer).collect())
    }

    fn names(&self) -> Names {
        Names { zero_centred: true, ..Names::MIXTRAL }
    }
}

/// Attention to all keys.
fn attention(decoder: &Decoder<'_>) -> Result<GqaSpec, ConvertError> {
    let config = decoder.config;
    config.require_bool("attention_bias", false)?;
    let head_dim = config.size_or("head_dim", HEAD_DIM, MAX_WIDTH)?;
    // transformers reads the factor, other runtimes the number of elements; published files have both.
    let rotated = config.size_or("rotary_dim", head_dim.div_ceil(2), head_dim)?;
    // Rounding down must give that number again.
    let rotary_factor = ((rotated as f64 + 0.5) / head_dim as f64).min(1.0);
    let heads = gqa::Heads { head_dim: Some(head_dim), rotary_factor };
    Ok(GqaSpec { qk_norm: gqa::qk_norm(decoder, QkNormScope::Head), ..gqa::read(decoder, heads)? })
}

/// The choice of blocks: in `sparse_attention_config`, or under transformers' names for its keys.
fn key_blocks(decoder: &Decoder<'_>) -> Result<KeyBlocksSpec, ConvertError> {
    let section = decoder.config.section("sparse_attention_config")?;
    let size = |nested: &str, flat: &str, default: usize, most: usize| {
        let flat = decoder.config.size_or(flat, default, most)?;
        section.as_ref().map_or(Ok(flat), |section| section.size_or(nested, flat, most))
    };
    let local = decoder.config.usize_or("index_local_blocks", 1)?;
    Ok(KeyBlocksSpec {
        index_heads: size("sparse_num_index_heads", "index_n_heads", 4, MAX_WIDTH)?,
        index_head_dim: size("sparse_index_dim", "index_head_dim", 128, MAX_WIDTH)?,
        index_norm_eps: decoder.norm_eps,
        block_len: size("sparse_block_size", "index_block_size", 128, MAX_LENGTH)?,
        top_blocks: size("sparse_topk_blocks", "index_topk_blocks", 16, MAX_LENGTH)?,
        local_blocks: section.map_or(Ok(local), |section| section.usize_or("sparse_local_block", local))?,
        score: BlockScore::LargestKey,
    })
}

/// Sigmoid scores whose weights are divided by their sum, and a shared expert.
fn experts(decoder: &Decoder<'_>, activation: ActivationSpec) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    config.require_str("scoring_func", &["sigmoid"])?;
    config.require_bool("use_routing_bias", true)?;
    let routed = moe::softmax_experts(decoder, &EXPERTS, "intermediate_size", true)?;
    let scale = config.f32_or("routed_scaling_factor", EXPERTS.scale)?;
    let sigmoid = |moe: MoeSpec| MoeSpec {
        router: RouterSpec { score: RouterScore::Sigmoid, choice_bias: true, scale, ..moe.router },
        ..moe
    };
    let dense_width = config.size_or("shared_intermediate_size", SHARED_WIDTH, MAX_WIDTH)?;
    Ok(FfnSpec { activation, dense_width, moe: routed.moe.map(sigmoid), ..routed })
}

/// Which layers are of the first of two `kinds`: by names in transformers' list, or by a list of zeros and other numbers under
/// `key`, which for attention is in its section. `None` if both lists are missing.
fn of_layers(decoder: &Decoder<'_>, key: &str, kinds: [&str; 2]) -> Result<Option<Vec<bool>>, ConvertError> {
    let of_attention = kinds[0] == "minimax_m3_sparse";
    if let Some(list) = decoder.layer_list(if of_attention { "layer_types" } else { "mlp_layer_types" }, kinds)? {
        return Ok(Some(list));
    }
    let section = if of_attention { decoder.config.section("sparse_attention_config")? } else { None };
    let config = section.as_ref().unwrap_or(decoder.config);
    let Some(list) = config.opt_list(key)? else { return Ok(None) };
    if list.len() != decoder.layers {
        return Err(config.refuse(key, format!("has {} entries for {} layers", list.len(), decoder.layers)));
    }
    let is_set = |entry: &serde_json::Value| match entry.as_u64() {
        Some(n) => Ok(n != 0),
        None => Err(config.refuse(key, format!("holds {entry}, expected 0 or 1"))),
    };
    list.iter().map(is_set).collect::<Result<_, _>>().map(Some)
}

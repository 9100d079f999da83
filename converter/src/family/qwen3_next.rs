//! Qwen3-Next and Qwen3-Coder-Next, and Qwen3.5 and 3.6, whose text model differs only in the arrangement of tensors.

use sluice_format::{AttentionSpec, FfnSpec, GqaSpec, LayerSpec, ModelSpec, QkNormScope};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, Unused, delta, gqa, moe, qwen, usually_unused};
use crate::error::ConvertError;

/// Qwen3-Next.
pub(crate) struct Qwen3Next;

const NEXT: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    intermediate: 5632,
    layers: 48,
    heads: 16,
    kv_heads: Some(2),
    max_positions: 32_768,
    norm_eps: 1e-6,
    theta: 1e4,
};

const NEXT_EXPERTS: moe::Defaults =
    moe::Defaults { experts: 512, top_k: 10, width: 512, shared: 1, groups: 1, groups_kept: 1, scale: 1.0 };

const HEADS: gqa::Heads = gqa::Heads { head_dim: Some(256), rotary_factor: 0.25 };
const SHARED_WIDTH: usize = 512;

impl Family for Qwen3Next {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_next"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &NEXT)?;
        let renormalise = config.bool_or("norm_topk_prob", true)?;
        model(&decoder, &NEXT_EXPERTS, renormalise)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        predicting(decoder)
    }

    fn names(&self) -> Names {
        Names { shared: "shared_expert", zero_centred: true, mtp: &["mtp."], ..Names::USUAL }
    }
}

/// Qwen3.5 and 3.6 with experts, as published: around a vision model.
pub(crate) struct Qwen35Moe;

/// The text model of Qwen3.5 by itself.
pub(crate) struct Qwen35MoeText;

const QWEN35: Defaults = Defaults { vocab: 248_320, layers: 40, ..NEXT };
const QWEN35_EXPERTS: moe::Defaults = moe::Defaults { experts: 256, top_k: 8, ..NEXT_EXPERTS };

impl Family for Qwen35MoeText {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_5_moe_text"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("attn_output_gate", true)?;
        // Weights are renormalised whatever `norm_topk_prob` says.
        model(&Decoder::read(config, &QWEN35)?, &QWEN35_EXPERTS, true)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        predicting(decoder)
    }

    fn names(&self) -> Names {
        Qwen3Next.names()
    }

    fn spellings(&self) -> Vec<Names> {
        vec![self.names(), MLX]
    }
}

/// MLX's names, with or without a vision model around it.
const MLX: Names = Names {
    prefix: "language_model.model.",
    head: "language_model.lm_head.weight",
    shared: "shared_expert",
    zero_centred: true,
    ..Names::USUAL
};

impl Family for Qwen35Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_5_moe"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", Qwen35MoeText.model_types())?;
        Qwen35MoeText.spec(config)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        predicting(decoder)
    }

    fn names(&self) -> Names {
        Names { prefix: "model.language_model.", ..Qwen3Next.names() }
    }

    fn spellings(&self) -> Vec<Names> {
        vec![self.names(), MLX]
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["model.visual.", "visual.", "vision_tower."].iter().any(|prefix| name.starts_with(prefix));
        if vision { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

/// The layer for multi-token prediction: full attention with experts, whichever layers of the decoder have those.
fn predicting(decoder: &ModelSpec) -> Option<LayerSpec> {
    let full = decoder.layers.iter().find(|layer| matches!(layer.attention, AttentionSpec::Gqa(_)))?;
    let sparse = decoder.layers.iter().find(|layer| layer.ffn.moe.is_some())?;
    Some(LayerSpec { attention: full.attention.clone(), ffn: sparse.ffn.clone() })
}

fn model(decoder: &Decoder<'_>, experts: &moe::Defaults, renormalise: bool) -> Result<ModelSpec, ConvertError> {
    decoder.config.require_bool("attention_bias", false)?;
    let full = AttentionSpec::Gqa(GqaSpec {
        qk_norm: gqa::qk_norm(decoder, QkNormScope::Head),
        output_gate: true,
        ..gqa::read(decoder, HEADS)?
    });
    let linear = AttentionSpec::Delta(delta::read(decoder)?);
    let routed = moe::softmax_experts(decoder, experts, "moe_intermediate_size", renormalise)?;
    let sparse: FfnSpec = qwen::with_gated_shared(decoder, routed, SHARED_WIDTH)?;
    let layers = delta::linear_layers(decoder)?.into_iter().zip(moe::by_step(decoder)?);
    let layer = |(is_linear, is_sparse): (bool, bool)| LayerSpec {
        attention: if is_linear { linear.clone() } else { full.clone() },
        ffn: if is_sparse { sparse.clone() } else { decoder.dense() },
    };
    decoder.model(layers.map(layer).collect())
}

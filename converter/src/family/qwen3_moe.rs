//! Qwen3-30B-A3B, 235B-A22B and the Coder models.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec, QkNormScope};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, gqa, moe, qwen};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Qwen3Moe;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    intermediate: 6144,
    layers: 24,
    heads: 32,
    kv_heads: Some(4),
    max_positions: 32_768,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 128, top_k: 8, width: 768, shared: 0, groups: 1, groups_kept: 1, scale: 1.0 };

impl Family for Qwen3Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_moe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        qwen::require_full_attention(&decoder)?;
        let attention = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Head),
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        };
        let renormalise = config.bool_or("norm_topk_prob", false)?;
        let sparse = moe::softmax_experts(&decoder, &EXPERTS, "moe_intermediate_size", renormalise)?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &moe::by_step(&decoder)?)
    }
}

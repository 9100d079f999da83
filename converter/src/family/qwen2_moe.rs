//! Qwen1.5-MoE and Qwen2-57B-A14B.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, gqa, moe, qwen};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Qwen2Moe;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    intermediate: 5632,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    max_positions: 32_768,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 60, top_k: 4, width: 1408, shared: 1, groups: 1, groups_kept: 1, scale: 1.0 };

const SHARED_WIDTH: usize = 5632;

impl Family for Qwen2Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2_moe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        qwen::require_full_attention(&decoder)?;
        let attention =
            GqaSpec { qkv_bias: config.bool_or("qkv_bias", true)?, ..gqa::read(&decoder, gqa::Heads::USUAL)? };
        let renormalise = config.bool_or("norm_topk_prob", false)?;
        let routed = moe::softmax_experts(&decoder, &EXPERTS, "moe_intermediate_size", renormalise)?;
        let sparse = qwen::with_gated_shared(&decoder, routed, SHARED_WIDTH)?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &moe::by_step(&decoder)?)
    }

    fn names(&self) -> Names {
        Names { shared: "shared_expert", ..Names::USUAL }
    }
}

//! OLMoE: a norm over all heads together, and a bound on queries, keys and values.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec, QkNormScope};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Olmoe;

const DEFAULTS: Defaults = Defaults {
    vocab: 50_304,
    hidden: 2048,
    intermediate: 2048,
    layers: 16,
    heads: 16,
    kv_heads: None,
    max_positions: 4096,
    norm_eps: 1e-5,
    theta: 1e4,
};

const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 64,
    top_k: 8,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

impl Family for Olmoe {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmoe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        let attention = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Whole),
            clip_qkv: config.opt_f64("clip_qkv")?.map(|limit| limit as f32),
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        };
        let renormalise = config.bool_or("norm_topk_prob", false)?;
        let sparse = moe::softmax_experts(&decoder, &EXPERTS, "intermediate_size", renormalise)?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &vec![true; decoder.layers])
    }
}

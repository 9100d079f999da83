//! DeepSeek-V2, V2.5, Coder-V2, and the Lite models, which have no low-rank queries and no expert groups.

use sluice_format::{AttentionSpec, GroupScore, ModelSpec, RouterSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct DeepSeekV2;

const DEFAULTS: Defaults = Defaults {
    vocab: 102_400,
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    max_positions: 2048,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 64, top_k: 6, width: 1407, shared: 2, groups: 1, groups_kept: 1, scale: 1.0 };

impl Family for DeepSeekV2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["deepseek_v2"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        // In transformers, a missing key has no default here.
        if !config.has("num_experts_per_tok") {
            return Err(config.refuse("num_experts_per_tok", "is missing"));
        }
        let attention = AttentionSpec::Mla(mla::read(&decoder, &mla::Defaults::DEEPSEEK)?);
        config.require_str("scoring_func", &["softmax"])?;
        config.require_str("topk_method", &["greedy", "group_limited_greedy"])?;
        // transformers never renormalises here, whatever the key says; no published model requests it.
        config.require_bool("norm_topk_prob", false)?;
        let limited = config.opt_str("topk_method")? == Some("group_limited_greedy");
        let groups = if limited { moe::groups(&decoder, &EXPERTS, GroupScore::Max)? } else { None };
        let scale = config.f32_or("routed_scaling_factor", EXPERTS.scale)?;
        let router = RouterSpec { groups, scale, ..moe::softmax_router(false) };
        let sparse = moe::with_shared(&decoder, &EXPERTS, router)?;
        decoder.uniform(attention, &sparse, &moe::after_dense(&decoder, 0)?)
    }
}

//! GLM-4.7-Flash: latent attention as in DeepSeek-V3, experts as in GLM-4.5.

use sluice_format::{AttentionSpec, LayerSpec, ModelSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Glm4MoeLite;

const DEFAULTS: Defaults = Defaults {
    vocab: 154_880,
    hidden: 2048,
    intermediate: 10_240,
    layers: 47,
    heads: 20,
    kv_heads: Some(20),
    max_positions: 202_752,
    norm_eps: 1e-5,
    theta: 1e4,
};

const LATENT: mla::Defaults =
    mla::Defaults { q_lora_rank: 768, qk_nope_head_dim: 192, v_head_dim: 256, ..mla::Defaults::DEEPSEEK };

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 64, top_k: 4, width: 1536, shared: 1, groups: 1, groups_kept: 1, scale: 1.8 };

impl Family for Glm4MoeLite {
    fn model_types(&self) -> &'static [&'static str] {
        &["glm4_moe_lite"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let attention = AttentionSpec::Mla(mla::read(&decoder, &LATENT)?);
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        decoder.uniform(attention, &sparse, &moe::after_dense(&decoder, 1)?)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        decoder.layers.last().cloned()
    }
}

//! DeepSeek-V3, R1 and V3.1, and Kimi K2, which is the same computation under another name.

use sluice_format::{AttentionSpec, LayerSpec, ModelSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct DeepSeekV3;

pub(crate) const DEFAULTS: Defaults = Defaults {
    vocab: 129_280,
    hidden: 7168,
    intermediate: 18_432,
    layers: 61,
    heads: 128,
    kv_heads: Some(128),
    max_positions: 4096,
    norm_eps: 1e-6,
    theta: 1e4,
};

pub(crate) const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 8, width: 2048, shared: 1, groups: 8, groups_kept: 4, scale: 2.5 };

/// Layers without experts at the beginning, if `first_k_dense_replace` is missing.
pub(crate) const DENSE_LAYERS: usize = 3;

impl Family for DeepSeekV3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["deepseek_v3", "kimi_k2"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let attention = AttentionSpec::Mla(mla::read(&decoder, &mla::Defaults::DEEPSEEK)?);
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        decoder.uniform(attention, &sparse, &moe::after_dense(&decoder, DENSE_LAYERS)?)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        decoder.layers.last().cloned()
    }
}

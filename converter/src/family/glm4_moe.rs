//! GLM-4.5, 4.6 and 4.7, and 4.5-Air, which has no norms of queries and keys.

use sluice_format::{AttentionSpec, GqaSpec, LayerSpec, ModelSpec, QkNormScope};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Glm4Moe;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_552,
    hidden: 4096,
    intermediate: 10_944,
    layers: 46,
    heads: 96,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 128, top_k: 8, width: 1408, shared: 1, groups: 1, groups_kept: 1, scale: 1.0 };

impl Family for Glm4Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["glm4_moe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let normed = config.bool_or("use_qk_norm", false)?;
        let attention = GqaSpec {
            // The output projection has no bias, whatever the key says.
            qkv_bias: config.bool_or("attention_bias", false)?,
            qk_norm: if normed { gqa::qk_norm(&decoder, QkNormScope::Head) } else { None },
            ..gqa::read(&decoder, gqa::Heads { rotary_factor: 0.5, ..gqa::Heads::USUAL })?
        };
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &moe::after_dense(&decoder, 1)?)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        decoder.layers.last().cloned()
    }
}

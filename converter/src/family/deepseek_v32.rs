//! DeepSeek-V3.2: V3 in which every layer attends only to the tokens that its indexer chooses.

use sluice_format::{AttentionSpec, LayerSpec, MlaSpec, ModelSpec, RopePairing};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, deepseek_v3, indexer, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct DeepSeekV32;

const DEFAULTS: Defaults = Defaults { max_positions: 163_840, ..deepseek_v3::DEFAULTS };
const INDEXER: indexer::Defaults = indexer::Defaults { heads: 64, head_dim: 128, top_k: 2048 };

impl Family for DeepSeekV32 {
    fn model_types(&self) -> &'static [&'static str] {
        &["deepseek_v32"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        // In the indexer, the two elements of a pair are half a rotation apart, unlike in the attention itself.
        let indexer = indexer::read(&decoder, &INDEXER, RopePairing::Half)?;
        let attention = MlaSpec { indexer: Some(indexer), ..mla::read(&decoder, &mla::Defaults::DEEPSEEK)? };
        let sparse = moe::deepseek_v3(&decoder, &deepseek_v3::EXPERTS)?;
        let is_sparse = moe::after_dense(&decoder, deepseek_v3::DENSE_LAYERS)?;
        decoder.uniform(AttentionSpec::Mla(attention), &sparse, &is_sparse)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        decoder.layers.last().cloned()
    }
}

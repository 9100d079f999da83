//! Mixtral 8x7B and 8x22B.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Mixtral;

const DEFAULTS: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    intermediate: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 1e6,
};

/// An expert is as wide as the dense network that it replaces.
const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 8,
    top_k: 2,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

impl Family for Mixtral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mixtral"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let attention = GqaSpec { window: gqa::window(&decoder, None)?, ..gqa::read(&decoder, gqa::Heads::USUAL)? };
        let sparse = moe::softmax_experts(&decoder, &EXPERTS, "intermediate_size", true)?;
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &vec![true; decoder.layers])
    }

    fn names(&self) -> Names {
        Names::MIXTRAL
    }
}

//! Phi-3.5-MoE: layer norms, biases everywhere except in the experts, and a router that weighs its choices one after the other.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec, MoeSpec, NormsSpec, RouterScore};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Phimoe;

const DEFAULTS: Defaults = Defaults {
    vocab: 32_064,
    hidden: 4096,
    intermediate: 6400,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 1e6,
};

const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 16,
    top_k: TOP_K,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

/// The reference mixes exactly two experts.
const TOP_K: usize = 2;
const JITTER: f64 = 0.01;

impl Family for Phimoe {
    fn model_types(&self) -> &'static [&'static str] {
        &["phimoe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        let attention = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            window: gqa::window(&decoder, None)?,
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        };
        let mut sparse = moe::softmax_experts(&decoder, &EXPERTS, "intermediate_size", false)?;
        let jitter = config.check_above("router_jitter_noise", config.f64_or("router_jitter_noise", JITTER)?, 0.0)?;
        sparse.moe = sparse.moe.map(|moe| MoeSpec {
            router: sluice_format::RouterSpec {
                score: RouterScore::SparseMixer { jitter: jitter as f32 },
                ..moe.router
            },
            ..moe
        });
        if sparse.moe.as_ref().is_some_and(|moe| moe.top_k != TOP_K) {
            return Err(config.refuse("num_experts_per_tok", format!("must be {TOP_K}")));
        }
        Ok(ModelSpec {
            norms: NormsSpec { centred: true, behind: false },
            head_bias: config.bool_or("lm_head_bias", false)?,
            ..decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &vec![true; decoder.layers])?
        })
    }

    fn names(&self) -> Names {
        Names::MIXTRAL
    }
}

//! MiniMax-M2, M2.1, M2.5 and M2.7.

use sluice_format::{AttentionSpec, FfnSpec, GqaSpec, ModelSpec, MoeSpec, QkNormScope, RouterScore, RouterSpec};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, gqa, moe, rope};
use crate::error::ConvertError;

/// The family.
pub(crate) struct MiniMaxM2;

const DEFAULTS: Defaults = Defaults {
    vocab: 200_064,
    hidden: 3072,
    intermediate: 1536,
    layers: 62,
    heads: 48,
    kv_heads: Some(8),
    max_positions: 196_608,
    norm_eps: 1e-6,
    theta: 5e6,
};

const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 256,
    top_k: 8,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

const HEAD_DIM: usize = 128;

impl Family for MiniMaxM2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["minimax_m2"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("scoring_func", &["sigmoid"])?;
        config.require_str("qk_norm_type", &["per_layer"])?;
        config.require_bool("use_routing_bias", true)?;
        if config.usize_or("shared_intermediate_size", 0)? != 0 {
            return Err(config.refuse("shared_intermediate_size", "must be 0: MiniMax-M2 has no shared expert"));
        }
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let normed = config.bool_or("use_qk_norm", true)?;
        let mut attention = GqaSpec {
            qk_norm: if normed { gqa::qk_norm(&decoder, QkNormScope::Whole) } else { None },
            ..gqa::read(&decoder, gqa::Heads { head_dim: Some(HEAD_DIM), ..gqa::Heads::USUAL })?
        };
        // The rotated width is given directly, not as a fraction of the head's.
        let width = config.opt_size_or("rotary_dim", None, attention.head_dim)?;
        if let (Some(rope), Some(width)) = (&mut attention.rope, width) {
            rope::check_even(config, "rotary_dim", width)?;
            rope.dim = width;
        }
        let routed = moe::softmax_experts(&decoder, &EXPERTS, "intermediate_size", true)?;
        let sigmoid = |moe: MoeSpec| MoeSpec {
            router: RouterSpec { score: RouterScore::Sigmoid, choice_bias: true, ..moe.router },
            ..moe
        };
        let sparse = FfnSpec { moe: routed.moe.map(sigmoid), ..routed };
        decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &vec![true; decoder.layers])
    }

    fn names(&self) -> Names {
        Names::MIXTRAL
    }
}

//! dots.llm1: attention with norms of queries and keys, and experts as in DeepSeek-V3.

use sluice_format::{
    AttentionSpec, FfnSpec, GqaSpec, GroupScore, LayerSpec, ModelSpec, QkNormScope, RouterScore, RouterSpec,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct Dots1;

const DEFAULTS: Defaults = Defaults {
    vocab: 152_064,
    hidden: 4608,
    intermediate: 10_944,
    layers: 62,
    heads: 32,
    kv_heads: Some(32),
    max_positions: 2048,
    norm_eps: 1e-6,
    theta: 1e4,
};

/// The configuration class has no defaults for the numbers of experts: these are those of the released models.
const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 128, top_k: 6, width: 1408, shared: 2, groups: 1, groups_kept: 1, scale: 1.0 };

/// The window of layers that have one, if `sliding_window` is missing.
const WINDOW: usize = 4096;

impl Family for Dots1 {
    fn model_types(&self) -> &'static [&'static str] {
        &["dots1"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        let full = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Head),
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        };
        let window = gqa::window(&decoder, Some(WINDOW))?;
        let sliding = GqaSpec { window, ..full.clone() };
        let slides = match decoder.layer_list("layer_types", ["sliding_attention", "full_attention"])? {
            Some(list) => list,
            None => {
                let first = config.usize_or("max_window_layers", DEFAULTS.layers)?;
                (0..decoder.layers).map(|layer| layer >= first).collect()
            }
        };
        let sparse = experts(&decoder)?;
        let is_sparse = moe::after_dense(&decoder, 0)?;
        let layer = |(slides, is_sparse): (bool, bool)| LayerSpec {
            attention: AttentionSpec::Gqa(if slides { sliding.clone() } else { full.clone() }),
            ffn: if is_sparse { sparse.clone() } else { decoder.dense() },
        };
        decoder.model(slides.into_iter().zip(is_sparse).map(layer).collect())
    }
}

/// As in DeepSeek-V3, but weights are divided by their sum only if the configuration says so.
fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    // The releases have the method of the choice under this key.
    config.require_str("scoring_func", &["sigmoid", "noaux_tc"])?;
    config.require_str("topk_method", &["noaux_tc"])?;
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        choice_bias: true,
        groups: moe::groups(decoder, &EXPERTS, GroupScore::TopTwoSum)?,
        renormalise: config.bool_or("norm_topk_prob", false)?.then_some(moe::RENORMALISE_EPS),
        scale: config.f32_or("routed_scaling_factor", EXPERTS.scale)?,
        ..moe::softmax_router(false)
    };
    moe::with_shared(decoder, &EXPERTS, router)
}

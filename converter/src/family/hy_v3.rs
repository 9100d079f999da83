//! Hunyuan 3 (Hy3).

use sluice_format::limits::{MAX_EXPERTS, MAX_WIDTH};
use sluice_format::{AttentionSpec, ExtentKind, GqaSpec, ModelSpec, QkNormScope, RouterScore, RouterSpec, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::Origin;
use super::{Family, Place, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct HyV3;

const DEFAULTS: Defaults = Defaults {
    vocab: 120_832,
    hidden: 4096,
    intermediate: 13_312,
    layers: 80,
    heads: 64,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 11_158_840.0,
};

const HEAD_DIM: usize = 128;
const EXPERTS: usize = 192;
const TOP_K: usize = 8;
const EXPERT_WIDTH: usize = 1536;
const SCALE: f64 = 2.826;

impl Family for HyV3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["hy_v3"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        for (key, supported) in
            [("mlp_bias", false), ("qk_norm", true), ("route_norm", true), ("moe_router_use_sigmoid", true)]
        {
            config.require_bool(key, supported)?;
        }
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        let attention = AttentionSpec::Gqa(GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Head),
            ..gqa::read(&decoder, gqa::Heads { head_dim: Some(HEAD_DIM), ..gqa::Heads::USUAL })?
        });
        let router = RouterSpec {
            score: RouterScore::Sigmoid,
            choice_bias: true,
            renormalise: Some(moe::RENORMALISE_EPS),
            scale: config.f32_or("router_scaling_factor", SCALE)?,
            ..moe::softmax_router(true)
        };
        let experts = config.size_or("num_experts", EXPERTS, MAX_EXPERTS)?;
        let shape = moe::Shape {
            experts,
            top_k: config.size_or("num_experts_per_tok", TOP_K, experts)?,
            width: config.size_or("moe_intermediate_size", EXPERT_WIDTH, MAX_WIDTH)?,
            shared: config.usize_or("num_shared_experts", 1)?,
        };
        let sparse = moe::of_shape(&decoder, &shape, "num_shared_experts", router)?;
        decoder.uniform(attention, &sparse, &moe::after_dense(&decoder, 1)?)
    }

    fn names(&self) -> Names {
        Names { router: "router.gate", shared: "shared_mlp", ..Names::USUAL }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let own = match (place.kind, tensor.name) {
            (ExtentKind::Router, "router_bias") => names.vector(place, "mlp.expert_bias", tensor),
            _ => names.origin(spec, place, tensor),
        };
        names.or_usual(own, spec, place, tensor)
    }
}

//! ERNIE 4.5 with experts, and without.

use sluice_format::limits::{MAX_EXPERTS, MAX_WIDTH};
use sluice_format::{AttentionSpec, ExtentKind, GqaSpec, ModelSpec, RopePairing, RouterSpec, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, Unused, gqa, moe, usually_unused};
use crate::error::ConvertError;

/// With experts.
pub(crate) struct Ernie45Moe;

const DEFAULTS: Defaults = Defaults {
    vocab: 103_424,
    hidden: 2560,
    intermediate: 12_288,
    layers: 28,
    heads: 20,
    kv_heads: Some(4),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 500_000.0,
};

const EXPERTS: usize = 64;
const TOP_K: usize = 6;
const EXPERT_WIDTH: usize = 1536;
const SHARED: usize = 2;
/// The least sum by which the weights of chosen experts are divided.
const LEAST_SUM: f64 = 1e-12;

impl Family for Ernie45Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["ernie4_5_moe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("moe_gate", &["topk"])?;
        config.require_bool("moe_use_aux_free", true)?;
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let attention = attention(&decoder, gqa::Heads::USUAL)?;
        let experts = config.size_or("moe_num_experts", EXPERTS, MAX_EXPERTS)?;
        let router = RouterSpec {
            choice_bias: true,
            least_sum: Some(config.f32_or("moe_norm_min", LEAST_SUM)?),
            ..moe::softmax_router(true)
        };
        let shape = moe::Shape {
            experts,
            top_k: config.size_or("moe_k", TOP_K, experts)?,
            width: config.size_or("moe_intermediate_size", EXPERT_WIDTH, MAX_WIDTH)?,
            shared: config.usize_or("moe_num_shared_experts", SHARED)?,
        };
        let sparse = moe::of_shape(&decoder, &shape, "moe_num_shared_experts", router)?;
        decoder.uniform(attention, &sparse, &sparse_layers(&decoder)?)
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        match (place.kind, tensor.name) {
            (ExtentKind::Router, "router_bias") => {
                let experts = tensor.shape[2];
                let bias = |module: &str| {
                    let name = names.layer(place.layer, &format!("{module}.moe_statics.e_score_correction_bias"));
                    vec![View::new(name, &[1, experts], Strides::rows(0, 1, experts))]
                };
                // The second is the name in transformers 5.
                names.or_usual(vec![bias("mlp"), bias("mlp.gate")], spec, place, tensor)
            }
            _ => names.origin(spec, place, tensor),
        }
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        // `model.mtp_block.0`, `model.mtp_emb_norm.0` and others.
        if name.starts_with("model.mtp_") { Some(Unused::MultiTokenPrediction) } else { usually_unused(name) }
    }
}

/// Without experts.
pub(crate) struct Ernie45;

const DENSE: Defaults =
    Defaults { hidden: 1024, intermediate: 3072, layers: 18, heads: 16, kv_heads: Some(2), ..DEFAULTS };
const DENSE_HEAD_DIM: usize = 128;

impl Family for Ernie45 {
    fn model_types(&self) -> &'static [&'static str] {
        &["ernie4_5"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DENSE)?;
        let attention = attention(&decoder, gqa::Heads { head_dim: Some(DENSE_HEAD_DIM), ..gqa::Heads::USUAL })?;
        decoder.uniform(attention, &decoder.dense(), &vec![false; decoder.layers])
    }
}

/// Attention in which adjacent elements are rotated in pairs.
fn attention(decoder: &Decoder<'_>, heads: gqa::Heads) -> Result<AttentionSpec, ConvertError> {
    // It would apply to every projection.
    decoder.config.require_bool("use_bias", false)?;
    let mut attention: GqaSpec = gqa::read(decoder, heads)?;
    if let Some(rope) = &mut attention.rope {
        rope.pairing = RopePairing::Interleaved;
    }
    Ok(AttentionSpec::Gqa(attention))
}

/// Which layers have experts: as a list says, or every `moe_layer_interval`-th from the start index to the end index, inclusive.
fn sparse_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    let config = decoder.config;
    if let Some(list) = decoder.layer_list("mlp_layer_types", ["sparse", "dense"])? {
        return Ok(list);
    }
    let interval = config.size_or("moe_layer_interval", 1, ModelSpec::MAX_LAYERS)?;
    let start = config.usize_or("moe_layer_start_index", 1)?;
    // −1 means the last layer.
    let last = decoder.layers - 1;
    let end = if config.opt_f64("moe_layer_end_index")? == Some(-1.0) {
        last
    } else {
        config.usize_or("moe_layer_end_index", last)?
    };
    Ok((0..decoder.layers).map(|i| (i + 1) % interval == 0 && (start..=end).contains(&i)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_predict_further_tokens_are_left_out() {
        let unused = |name| Ernie45Moe.unused(name);
        for name in ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight", "mtp.norm.weight"] {
            assert_eq!(unused(name), Some(Unused::MultiTokenPrediction), "{name}");
        }
        assert_eq!(unused("model.layers.0.mlp.up_proj.weight"), None);
    }
}

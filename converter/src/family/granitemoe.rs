//! Granite 3 with experts: constant factors on embedding, residual stream, attention scores and logits.

use sluice_format::{
    AttentionSpec, ExtentKind, Factors, FfnSpec, GqaSpec, ModelSpec, MoeSpec, RouterScore, RouterSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, View};
use super::{Family, Place, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct GraniteMoe;

const DEFAULTS: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    max_positions: 2048,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 8,
    top_k: 2,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

impl Family for GraniteMoe {
    fn model_types(&self) -> &'static [&'static str] {
        &["granitemoe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        if config.opt_usize_or("shared_intermediate_size", None)?.is_some_and(|width| width > 0) {
            let problem = "must be 0: models of this family have no shared expert, those of `granitemoeshared` have";
            return Err(config.refuse("shared_intermediate_size", problem));
        }
        let bias = config.bool_or("attention_bias", false)?;
        let attention = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            softmax_scale: factor(config, "attention_multiplier")?,
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        };
        let routed = moe::softmax_experts(&decoder, &EXPERTS, "intermediate_size", false)?;
        let of_chosen =
            |moe: MoeSpec| MoeSpec { router: RouterSpec { score: RouterScore::SoftmaxOfChosen, ..moe.router }, ..moe };
        let sparse = FfnSpec { moe: routed.moe.map(of_chosen), ..routed };
        let factors = Factors {
            embedding: factor(config, "embedding_multiplier")?,
            residual: factor(config, "residual_multiplier")?,
            // The logits are divided by this key's value.
            logits: 1.0 / factor(config, "logits_scaling")?,
        };
        let model = decoder.uniform(AttentionSpec::Gqa(attention), &sparse, &vec![true; decoder.layers])?;
        Ok(ModelSpec { factors, ..model })
    }

    fn names(&self) -> Names {
        Names { moe: &["block_sparse_moe"], ..Names::USUAL }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let [_, rows, cols] = tensor.shape;
        let module = |rest: &str| names.layer(place.layer, &format!("block_sparse_moe.{rest}.weight"));
        let experts = spec.layers[place.layer].ffn.moe.as_ref().map_or(0, |moe| moe.experts);
        let stack = |name: &str, all: usize, first: usize| {
            View::of_stack(module(name), [experts, all, cols], place.index, first, rows)
        };
        let own = match (place.kind, tensor.name) {
            (ExtentKind::Router, "router") => {
                // The second is the name in transformers 5.
                let gate = |name: &str| vec![View::whole(module(name), rows, cols)];
                vec![gate("router.layer"), gate("router")]
            }
            // Gate comes before up.
            (ExtentKind::Expert, "gate_up") => {
                vec![vec![stack("input_linear", 2 * rows, 0), stack("input_linear", 2 * rows, rows)]]
            }
            (ExtentKind::Expert, _) => vec![vec![stack("output_linear", rows, 0)]],
            _ => Vec::new(),
        };
        let named = [own, names.origin(spec, place, tensor)].concat();
        names.or_usual(named, spec, place, tensor)
    }
}

/// A factor, 1 if the key is missing; 0 would erase everything.
fn factor(config: &Config, key: &str) -> Result<f32, ConvertError> {
    config.check_above(key, f64::from(config.f32_or(key, 1.0)?), 0.0).map(|factor| factor as f32)
}

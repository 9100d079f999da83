//! Hunyuan-A13B: norms of queries and keys after the rotation.

use serde_json::Value;
use sluice_format::limits::{MAX_EXPERTS, MAX_WIDTH};
use sluice_format::{AttentionSpec, GqaSpec, LayerSpec, ModelSpec, QkNorm, QkNormScope, TensorShape};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::Origin;
use super::{Family, Place, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct HunyuanV1Moe;

const DEFAULTS: Defaults = Defaults {
    vocab: 290_943,
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    max_positions: 2048,
    norm_eps: 1e-5,
    theta: 1e4,
};

impl Family for HunyuanV1Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["hunyuan_v1_moe"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("use_qk_norm", true)?;
        config.require_bool("use_mixed_mlp_moe", true)?;
        config.require_bool("use_cla", false)?;
        config.require_bool("norm_topk_prob", true)?;
        config.require_bool("mlp_bias", false)?;
        let decoder = Decoder::read(config, &DEFAULTS)?;
        require_all(&decoder, "moe_layer_num_skipped", 0)?;
        // The shared expert and the routed ones have the same width.
        require_all(&decoder, "num_shared_expert", 1)?;
        require_all(&decoder, "moe_intermediate_size", decoder.intermediate)?;
        let width = config.check_size("intermediate_size", decoder.intermediate, MAX_WIDTH)?;
        let bias = config.bool_or("attention_bias", false)?;
        let attention = AttentionSpec::Gqa(GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: Some(QkNorm {
                scope: QkNormScope::Head,
                eps: decoder.norm_eps,
                weightless: false,
                after_rope: true,
            }),
            ..gqa::read(&decoder, gqa::Heads::USUAL)?
        });
        let experts = per_layer(&decoder, "num_experts", MAX_EXPERTS)?;
        let top_k = per_layer(&decoder, "moe_topk", MAX_EXPERTS)?;
        let layer = |(&experts, &top_k): (&usize, &usize)| {
            let shape = moe::Shape { experts, top_k: config.check_size("moe_topk", top_k, experts)?, width, shared: 1 };
            let ffn = moe::of_shape(&decoder, &shape, "num_shared_expert", moe::softmax_router(true))?;
            Ok(LayerSpec { attention: attention.clone(), ffn })
        };
        let layers = experts.iter().zip(&top_k).map(layer).collect::<Result<_, ConvertError>>()?;
        decoder.model(layers)
    }

    fn names(&self) -> Names {
        Names { router: "gate.wg", shared: "shared_mlp", ..Names::USUAL }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let own = match tensor.name {
            "q_norm" => names.vector(place, "self_attn.query_layernorm.weight", tensor),
            "k_norm" => names.vector(place, "self_attn.key_layernorm.weight", tensor),
            _ => names.origin(spec, place, tensor),
        };
        names.or_usual(own, spec, place, tensor)
    }
}

/// A count from 1 to `most` for each layer: one number for all of them, or a list; 1 if the key is missing.
fn per_layer(decoder: &Decoder<'_>, key: &str, most: usize) -> Result<Vec<usize>, ConvertError> {
    let config = decoder.config;
    match config.list(key) {
        None => Ok(vec![config.size_or(key, 1, most)?; decoder.layers]),
        Some(list) => {
            let count = |value: &Value| match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(n) => config.check_size(key, n, most),
                None => Err(config.refuse(key, format!("holds {value}, expected whole numbers"))),
            };
            if list.len() != decoder.layers {
                let problem = format!("has {} entries for {} layers", list.len(), decoder.layers);
                return Err(config.refuse(key, problem));
            }
            list.iter().map(count).collect()
        }
    }
}

/// Refuses any value of `key`, or of its list, except `expected`; the key may be missing.
fn require_all(decoder: &Decoder<'_>, key: &str, expected: usize) -> Result<(), ConvertError> {
    let config = decoder.config;
    let supported = match config.list(key) {
        Some(list) => list.iter().all(|value| value.as_u64() == Some(expected as u64)),
        None => config.opt_usize_or(key, None)?.is_none_or(|value| value == expected),
    };
    if supported { Ok(()) } else { Err(config.refuse(key, format!("must be {expected} in every layer"))) }
}

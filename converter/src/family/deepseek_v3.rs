//! DeepSeek-V3, R1 and V3.1, and Kimi K2, which computes the same under another name.

use serde_json::Value;
use sluice_format::{
    ActivationSpec, AttentionSpec, ExtentKind, FfnSpec, GroupScore, LayerSpec, MlaSpec, ModelSpec, MoeSpec,
    RopePairing, RouterGroups, RouterScore, RouterSpec, SPEC_VERSION, TensorShape,
};

use super::config::Config;
use super::{Family, Place, View, names, rope};
use crate::error::ConvertError;

/// The family. Values for missing keys are those that transformers fills in.
pub(crate) struct DeepSeekV3;

/// The reference hard-codes it for the norms inside latent attention, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;
/// The reference adds it to the sum of the chosen weights.
const RENORMALISE_EPS: f32 = 1e-20;

impl Family for DeepSeekV3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["deepseek_v3", "kimi_k2"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("hidden_act", &["silu"])?;
        config.require_bool("attention_bias", false)?;
        if config.usize_or("moe_layer_freq", 1)? != 1 {
            return Err(config.refuse("moe_layer_freq", "must be 1"));
        }
        let attention = AttentionSpec::Mla(attention(config)?);
        let activation = ActivationSpec::Silu;
        let dense = FfnSpec { activation, dense_width: config.usize_or("intermediate_size", 18432)?, moe: None };
        let sparse = sparse_ffn(config, activation)?;
        let is_sparse = sparse_layers(config)?;
        let layers = is_sparse.into_iter().map(|is_sparse| LayerSpec {
            attention: attention.clone(),
            ffn: if is_sparse { sparse.clone() } else { dense.clone() },
        });
        Ok(ModelSpec {
            version: SPEC_VERSION,
            family: config.opt_str("model_type")?.unwrap_or_default().to_owned(),
            vocab_size: config.usize_or("vocab_size", 129_280)?,
            hidden_size: config.usize_or("hidden_size", 7168)?,
            max_positions: max_positions(config)?,
            norm_eps: config.f64_or("rms_norm_eps", 1e-6)? as f32,
            layers: layers.collect(),
        })
    }

    fn origin(&self, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Vec<View> {
        let layer = |rest: &str| self.names().layer(place.layer, rest);
        let [_, rows, cols] = tensor.shape;
        let vector = |rest: &str| vec![View::vector(layer(rest), cols)];
        let ffn = &spec.layers[place.layer].ffn;
        match (place.kind, tensor.name) {
            (ExtentKind::Attention, name) => {
                let AttentionSpec::Mla(mla) = &spec.layers[place.layer].attention;
                attention_origin(mla, &layer, name, tensor.shape)
            }
            (ExtentKind::Router, "ffn_norm") => vector("post_attention_layernorm.weight"),
            (ExtentKind::Router, "router") => vec![View::whole(layer("mlp.gate.weight"), rows, cols)],
            (ExtentKind::Router, "router_bias") => vector("mlp.gate.e_score_correction_bias"),
            (ExtentKind::Dense, name) => {
                let module = if ffn.moe.is_some() { "mlp.shared_experts" } else { "mlp" };
                names::gated_ffn(&layer(module), name, [rows, cols])
            }
            (ExtentKind::Expert, name) => {
                names::gated_ffn(&layer(&format!("mlp.experts.{}", place.index)), name, [rows, cols])
            }
            (kind, name) => unreachable!("{kind} has no `{name}`"),
        }
    }
}

fn max_positions(config: &Config) -> Result<usize, ConvertError> {
    config.usize_or("max_position_embeddings", 4096)
}

fn attention(config: &Config) -> Result<MlaSpec, ConvertError> {
    let qk_nope_head_dim = config.usize_or("qk_nope_head_dim", 128)?;
    let qk_rope_head_dim = config.usize_or("qk_rope_head_dim", 64)?;
    let pairing = if config.bool_or("rope_interleave", true)? { RopePairing::Interleaved } else { RopePairing::Half };
    let rope = rope::read(config, qk_rope_head_dim, pairing, 1e4, max_positions(config)?)?;
    let head_dim = qk_nope_head_dim.saturating_add(qk_rope_head_dim) as f64;
    Ok(MlaSpec {
        heads: config.usize_or("num_attention_heads", 128)?,
        q_lora_rank: config.opt_usize_or("q_lora_rank", Some(1536))?,
        kv_lora_rank: config.usize_or("kv_lora_rank", 512)?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: config.usize_or("v_head_dim", 128)?,
        latent_norm_eps: LATENT_NORM_EPS,
        softmax_scale: (head_dim.powf(-0.5) * rope.score_mscale * rope.score_mscale) as f32,
        rope: rope.spec,
    })
}

fn sparse_ffn(config: &Config, activation: ActivationSpec) -> Result<FfnSpec, ConvertError> {
    config.require_str("scoring_func", &["sigmoid"])?;
    config.require_str("topk_method", &["noaux_tc"])?;
    let width = config.usize_or("moe_intermediate_size", 2048)?;
    let shared = config.opt_usize_or("n_shared_experts", Some(1))?.unwrap_or(0);
    let count = config.opt_usize_or("n_group", Some(8))?.unwrap_or(1);
    let keep = config.opt_usize_or("topk_group", Some(4))?.unwrap_or(count);
    // One group limits nothing.
    let groups = (count > 1).then_some(RouterGroups { count, keep, score: GroupScore::TopTwoSum });
    let renormalise = config.bool_or("norm_topk_prob", true)?.then_some(RENORMALISE_EPS);
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        choice_bias: true,
        groups,
        renormalise,
        scale: config.f64_or("routed_scaling_factor", 2.5)? as f32,
    };
    let moe = MoeSpec {
        experts: config.opt_usize_or("n_routed_experts", Some(256))?.unwrap_or(0),
        top_k: config.usize_or("num_experts_per_tok", 8)?,
        width,
        router,
    };
    Ok(FfnSpec { activation, dense_width: width.saturating_mul(shared), moe: Some(moe) })
}

/// Which layers have experts: all from `first_k_dense_replace` on, or as a list says.
fn sparse_layers(config: &Config) -> Result<Vec<bool>, ConvertError> {
    let layers = config.usize_or("num_hidden_layers", 61)?;
    if layers == 0 || layers > ModelSpec::MAX_LAYERS {
        return Err(config.refuse("num_hidden_layers", format!("is {layers}, expected 1 to {}", ModelSpec::MAX_LAYERS)));
    }
    let Some(list) = config.opt_list("mlp_layer_types")? else {
        let dense = config.usize_or("first_k_dense_replace", 3)?;
        return Ok((0..layers).map(|layer| layer >= dense).collect());
    };
    if list.len() != layers {
        return Err(config.refuse("mlp_layer_types", format!("has {} entries for {layers} layers", list.len())));
    }
    let sparse = |kind: &Value| match kind.as_str() {
        Some("sparse") => Ok(true),
        Some("dense") => Ok(false),
        _ => Err(config.refuse("mlp_layer_types", format!("holds {kind}; supported: \"dense\", \"sparse\""))),
    };
    list.iter().map(sparse).collect()
}

fn attention_origin(mla: &MlaSpec, layer: &dyn Fn(&str) -> String, name: &str, shape: [usize; 3]) -> Vec<View> {
    let [_, rows, cols] = shape;
    let matrix = |module: &str| vec![View::whole(layer(&format!("self_attn.{module}.weight")), rows, cols)];
    let norm = |module: &str| vec![View::vector(layer(&format!("{module}.weight")), cols)];
    match name {
        "attn_norm" => norm("input_layernorm"),
        "q" => matrix("q_proj"),
        "q_a" => matrix("q_a_proj"),
        "q_a_norm" => norm("self_attn.q_a_layernorm"),
        "q_b" => matrix("q_b_proj"),
        "kv_a" => matrix("kv_a_proj_with_mqa"),
        "kv_a_norm" => norm("self_attn.kv_a_layernorm"),
        "k_b" | "v_b" => vec![kv_b_half(mla, layer("self_attn.kv_b_proj.weight"), name == "k_b")],
        "o" => matrix("o_proj"),
        other => unreachable!("latent attention has no `{other}`"),
    }
}

/// `kv_b_proj` holds, head by head, the rows that make keys and then those that make values.
fn kv_b_half(mla: &MlaSpec, tensor: String, keys: bool) -> View {
    let batch_stride = mla.qk_nope_head_dim + mla.v_head_dim;
    View {
        tensor,
        source_shape: vec![mla.heads * batch_stride, mla.kv_lora_rank],
        first_row: if keys { 0 } else { mla.qk_nope_head_dim },
        batch_stride,
        transposed: keys,
    }
}

//! Multi-head latent attention: keys of `config.json`, and the tensors of a layer.

use sluice_format::limits::MAX_WIDTH;
use sluice_format::{MlaSpec, RopePairing};

use super::config::Config;
use super::decoder::Decoder;
use super::view::{Origin, Strides, View};
use super::{indexer, rope};
use crate::error::ConvertError;

/// The reference hard-codes this for the norms inside latent attention, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Values for missing keys.
pub(crate) struct Defaults {
    pub(crate) q_lora_rank: usize,
    pub(crate) kv_lora_rank: usize,
    pub(crate) qk_nope_head_dim: usize,
    pub(crate) qk_rope_head_dim: usize,
    pub(crate) v_head_dim: usize,
}

impl Defaults {
    /// Those of DeepSeek's models.
    pub(crate) const DEEPSEEK: Defaults =
        Defaults { q_lora_rank: 1536, kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128 };
}

/// Reads the attention of every layer.
pub(crate) fn read(decoder: &Decoder<'_>, defaults: &Defaults) -> Result<MlaSpec, ConvertError> {
    let config: &Config = decoder.config;
    config.require_bool("attention_bias", false)?;
    let size = |key: &str, default: usize| config.size_or(key, default, MAX_WIDTH);
    let qk_nope_head_dim = size("qk_nope_head_dim", defaults.qk_nope_head_dim)?;
    let qk_rope_head_dim = size("qk_rope_head_dim", defaults.qk_rope_head_dim)?;
    rope::check_even(config, "qk_rope_head_dim", qk_rope_head_dim)?;
    let pairing = if config.bool_or("rope_interleave", true)? { RopePairing::Interleaved } else { RopePairing::Half };
    let rope = rope::read(config, qk_rope_head_dim, pairing, decoder.theta, decoder.max_positions)?;
    let head_dim = qk_nope_head_dim.saturating_add(qk_rope_head_dim) as f64;
    Ok(MlaSpec {
        heads: decoder.heads,
        q_lora_rank: config.opt_size_or("q_lora_rank", Some(defaults.q_lora_rank), MAX_WIDTH)?,
        kv_lora_rank: size("kv_lora_rank", defaults.kv_lora_rank)?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: size("v_head_dim", defaults.v_head_dim)?,
        latent_norm_eps: LATENT_NORM_EPS,
        softmax_scale: (head_dim.powf(-0.5) * rope.score_mscale * rope.score_mscale) as f32,
        rope: Some(rope.spec),
        indexer: None,
        head_gate: false,
    })
}

/// Where a tensor of latent attention comes from; `layer` completes names.
pub(crate) fn origin(mla: &MlaSpec, layer: &dyn Fn(&str) -> String, name: &str, shape: [usize; 3]) -> Origin {
    if let "k_b" | "v_b" = name {
        let (keys, module) = (name == "k_b", if name == "k_b" { "embed_q" } else { "unembed_out" });
        let both = kv_b_half(mla, layer("self_attn.kv_b_proj.weight"), keys);
        // Since 2026, MLX stores the halves separately, head by head, and the half of the keys transposed, as needed here.
        let [heads, rows, cols] = shape;
        let apart = layer(&format!("self_attn.{module}.weight"));
        let apart = View::new(apart, &shape, Strides::rows(0, heads * rows, cols));
        return vec![vec![both], vec![apart]];
    }
    vec![vec![single(layer, name, shape)]]
}

fn single(layer: &dyn Fn(&str) -> String, name: &str, shape: [usize; 3]) -> View {
    let [_, rows, cols] = shape;
    let matrix = |module: &str| View::whole(layer(&format!("self_attn.{module}.weight")), rows, cols);
    let norm = |module: &str| View::vector(layer(&format!("self_attn.{module}.weight")), cols);
    match name {
        "q" => matrix("q_proj"),
        "q_a" => matrix("q_a_proj"),
        "q_a_norm" => norm("q_a_layernorm"),
        "q_b" => matrix("q_b_proj"),
        "kv_a" => matrix("kv_a_proj_with_mqa"),
        "kv_a_norm" => norm("kv_a_layernorm"),
        "head_gate" => matrix("g_proj"),
        "o" => matrix("o_proj"),
        index if index.starts_with("index_") => indexer::origin(layer, index, shape),
        other => unreachable!("latent attention has no `{other}`"),
    }
}

/// `kv_b_proj` holds the rows of the keys and then those of the values, head by head. Those of the keys are transposed here.
fn kv_b_half(mla: &MlaSpec, tensor: String, keys: bool) -> View {
    let rank = mla.kv_lora_rank;
    let head_rows = mla.qk_nope_head_dim + mla.v_head_dim;
    let run_step = head_rows * rank;
    let strides = if keys {
        Strides { start: 0, run: rank, run_step, row_step: 1, col_step: rank }
    } else {
        let start = mla.qk_nope_head_dim * rank;
        Strides { start, run: mla.v_head_dim, run_step, row_step: rank, col_step: 1 }
    };
    View::new(tensor, &[mla.heads * head_rows, rank], strides)
}

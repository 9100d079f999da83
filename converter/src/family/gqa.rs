//! Grouped-query attention: keys of `config.json`, and the tensors of a layer.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{GqaSpec, QkNorm, QkNormScope, RopePairing, RopeSpec};

use super::decoder::Decoder;
use super::rope;
use super::view::{Strides, View};
use crate::error::ConvertError;

/// What a family's heads have beyond the common part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Width of a head if `head_dim` is missing; `None`: the hidden size divided by the number of heads.
    pub(crate) head_dim: Option<usize>,
    /// Rotated part of a head if `partial_rotary_factor` is missing.
    pub(crate) rotary_factor: f64,
}

impl Heads {
    /// Heads divide the hidden size, and whole heads are rotated.
    pub(crate) const USUAL: Heads = Heads { head_dim: None, rotary_factor: 1.0 };
}

/// Reads plain attention without biases, norms and window; families add theirs.
pub(crate) fn read(decoder: &Decoder<'_>, heads: Heads) -> Result<GqaSpec, ConvertError> {
    let config = decoder.config;
    let default = heads.head_dim.unwrap_or(decoder.hidden / decoder.heads.max(1));
    let head_dim = config.opt_usize_or("head_dim", Some(default))?.unwrap_or(default);
    config.check_size("head_dim", head_dim, MAX_WIDTH / decoder.heads)?;
    let kv_heads = config.check_size("num_key_value_heads", decoder.kv_heads, decoder.heads)?;
    if !decoder.heads.is_multiple_of(kv_heads) {
        let problem = format!("is {kv_heads}, which does not divide `num_attention_heads`, {}", decoder.heads);
        return Err(config.refuse("num_key_value_heads", problem));
    }
    let rotated = rope::width(config, head_dim, heads.rotary_factor)?;
    let rope = rope::read(config, rotated, RopePairing::Half, decoder.theta, decoder.max_positions)?;
    Ok(of_heads(decoder.heads, kv_heads, head_dim, rope.spec))
}

/// Plain attention with these heads.
pub(crate) fn of_heads(heads: usize, kv_heads: usize, head_dim: usize, rope: RopeSpec) -> GqaSpec {
    GqaSpec {
        heads,
        kv_heads,
        head_dim,
        v_head_dim: head_dim,
        softmax_scale: (head_dim as f64).powf(-0.5) as f32,
        rope: Some(rope),
        ..plain()
    }
}

/// Attention without optional parts and without sizes.
pub(crate) fn plain() -> GqaSpec {
    GqaSpec {
        heads: 0,
        kv_heads: 0,
        head_dim: 0,
        v_head_dim: 0,
        softmax_scale: 1.0,
        rope: None,
        window: None,
        stretch: None,
        qk_norm: None,
        clip_qkv: None,
        temperature: None,
        value_factor: None,
        value_norm: None,
        value_is_key: false,
        qkv_bias: false,
        o_bias: false,
        sinks: false,
        output_gate: false,
        head_gate: false,
        blocks: None,
    }
}

/// A norm of queries and keys with the model's epsilon.
pub(crate) fn qk_norm(decoder: &Decoder<'_>, scope: QkNormScope) -> Option<QkNorm> {
    Some(QkNorm { scope, eps: decoder.norm_eps, weightless: false, after_rope: false })
}

/// The window of every layer under `sliding_window`, if it is a number.
pub(crate) fn window(decoder: &Decoder<'_>, default: Option<usize>) -> Result<Option<usize>, ConvertError> {
    decoder.config.opt_size_or("sliding_window", default, MAX_LENGTH)
}

/// Where a tensor of grouped-query attention comes from; `layer` completes names.
pub(crate) fn origin(gqa: &GqaSpec, layer: &dyn Fn(&str) -> String, name: &str, shape: [usize; 3]) -> View {
    let [_, rows, cols] = shape;
    let matrix = |module: &str| View::whole(layer(&format!("self_attn.{module}.weight")), rows, cols);
    let vector = |rest: &str| View::vector(layer(&format!("self_attn.{rest}")), cols);
    match name {
        "q" | "gate" if gqa.output_gate => query_or_gate(gqa, layer("self_attn.q_proj.weight"), name == "gate", cols),
        "q" => matrix("q_proj"),
        "k" => matrix("k_proj"),
        "v" => matrix("v_proj"),
        "head_gate" => matrix("g_proj"),
        "o" => matrix("o_proj"),
        "q_bias" => vector("q_proj.bias"),
        "k_bias" => vector("k_proj.bias"),
        "v_bias" => vector("v_proj.bias"),
        "o_bias" => vector("o_proj.bias"),
        "q_norm" => vector("q_norm.weight"),
        "k_norm" => vector("k_norm.weight"),
        "sinks" => vector("sinks"),
        "index_q" | "index_k" => matrix(&format!("{name}_proj")),
        "index_q_norm" | "index_k_norm" => vector(&format!("{name}.weight")),
        other => unreachable!("grouped-query attention has no `{other}`"),
    }
}

/// With an output gate, `q_proj` holds the rows of the query and then those of the gate, head by head.
fn query_or_gate(gqa: &GqaSpec, tensor: String, gate: bool, hidden: usize) -> View {
    let start = if gate { gqa.head_dim * hidden } else { 0 };
    let run_step = 2 * gqa.head_dim * hidden;
    let strides = Strides { start, run: gqa.head_dim, run_step, row_step: hidden, col_step: 1 };
    View::new(tensor, &[2 * gqa.heads * gqa.head_dim, hidden], strides)
}

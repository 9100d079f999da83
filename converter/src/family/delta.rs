//! Gated delta net: keys of `config.json`, and the tensors of a layer in the arrangements of Qwen3-Next and Qwen3.5.

use sluice_format::DeltaSpec;
use sluice_format::limits::MAX_WIDTH;

use super::decoder::Decoder;
use super::view::{Origin, Strides, View};
use crate::error::ConvertError;

/// The convolution's module and tensor inside the layer's.
const CONV: &str = "conv1d.weight";

/// The convolution of a layer.
pub(crate) fn conv(layer: impl Fn(&str) -> String) -> String {
    layer(&format!("linear_attn.{CONV}"))
}

/// Reads the linear attention of Qwen3-Next and Qwen3.5, which have the same values for missing keys.
pub(crate) fn read(decoder: &Decoder<'_>) -> Result<DeltaSpec, ConvertError> {
    let config = decoder.config;
    let size = |key: &str, default: usize| config.size_or(key, default, MAX_WIDTH);
    let (key_heads, value_heads) = (size("linear_num_key_heads", 16)?, size("linear_num_value_heads", 32)?);
    if !value_heads.is_multiple_of(key_heads) {
        let problem = format!("is {value_heads}, not a multiple of `linear_num_key_heads`, {key_heads}");
        return Err(config.refuse("linear_num_value_heads", problem));
    }
    Ok(DeltaSpec {
        key_heads,
        value_heads,
        key_head_dim: size("linear_key_head_dim", 128)?,
        value_head_dim: size("linear_value_head_dim", 128)?,
        conv_width: size("linear_conv_kernel_dim", 4)?,
        norm_eps: decoder.norm_eps,
        // Releases do not have this key: it describes GGUF files.
        value_heads_tiled: config.bool_or("linear_value_heads_tiled", false)?,
        decay_rank: None,
        channel_decay: false,
        least_log_decay: None,
        gate_rank: None,
        gate_sigmoid: false,
    })
}

/// Which layers are linear: as `layer_types` says, otherwise all but every `full_attention_interval`-th.
pub(crate) fn linear_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    if let Some(list) = decoder.layer_list("layer_types", ["linear_attention", "full_attention"])? {
        return Ok(list);
    }
    let interval = decoder.config.usize_or("full_attention_interval", 4)?;
    if interval == 0 {
        return Err(decoder.config.refuse("full_attention_interval", "is 0, expected 1 or more"));
    }
    Ok((0..decoder.layers).map(|layer| (layer + 1) % interval != 0).collect())
}

/// Where a tensor comes from: projections are separate as in Qwen3.5, or grouped by key head as in Qwen3-Next. `conv_last`: the
/// convolution is in MLX's arrangement.
pub(crate) fn origin(
    delta: &DeltaSpec,
    conv_last: bool,
    layer: &dyn Fn(&str) -> String,
    name: &str,
    shape: [usize; 3],
) -> Origin {
    let [_, rows, cols] = shape;
    let tensor = |rest: &str| layer(&format!("linear_attn.{rest}"));
    let one = |view: View| vec![vec![view]];
    let matrix = |rest: &str| one(View::whole(tensor(rest), rows, cols));
    let vector = |rest: &str| one(View::vector(tensor(rest), cols));
    match name {
        "conv" => {
            let (channels, width) = (delta.conv_channels(), delta.conv_width);
            let shape = if conv_last { [channels, width, 1] } else { [channels, 1, width] };
            one(View::new(tensor(CONV), &shape, Strides::rows(0, 1, cols)))
        }
        "a_log" => vector("A_log"),
        "dt_bias" => vector("dt_bias"),
        "out_norm" => vector("norm.weight"),
        "o" => matrix("out_proj.weight"),
        name => {
            let apart = match name {
                "q" | "k" | "v" => stacked(delta, tensor("in_proj_qkv.weight"), name, rows, cols),
                name => View::whole(tensor(&format!("in_proj_{name}.weight")), rows, cols),
            };
            let module = if matches!(name, "a" | "b") { "in_proj_ba.weight" } else { "in_proj_qkvz.weight" };
            vec![vec![apart], vec![by_key_head(delta, tensor(module), name, cols)]]
        }
    }
}

/// First all queries, then all keys, then all values.
fn stacked(delta: &DeltaSpec, tensor: String, name: &str, rows: usize, cols: usize) -> View {
    let key = delta.key_heads * delta.key_head_dim;
    let first = match name {
        "q" => 0,
        "k" => key,
        _ => 2 * key,
    };
    View::new(tensor, &[delta.conv_channels(), cols], Strides::rows(first, rows, cols))
}

/// For each key head its query, its key, then values and output gates of its value heads; in the other tensor, writing strengths
/// and decays of its value heads.
fn by_key_head(delta: &DeltaSpec, tensor: String, name: &str, cols: usize) -> View {
    let values_per_key = delta.value_heads / delta.key_heads.max(1);
    let (key, value) = (delta.key_head_dim, values_per_key * delta.value_head_dim);
    let (first, run, group) = match name {
        "q" => (0, key, 2 * (key + value)),
        "k" => (key, key, 2 * (key + value)),
        "v" => (2 * key, value, 2 * (key + value)),
        "z" => (2 * key + value, value, 2 * (key + value)),
        "b" => (0, values_per_key, 2 * values_per_key),
        "a" => (values_per_key, values_per_key, 2 * values_per_key),
        other => unreachable!("a gated delta net has no `{other}`"),
    };
    let strides = Strides { start: first * cols, run, run_step: group * cols, row_step: cols, col_step: 1 };
    View::new(tensor, &[delta.key_heads * group, cols], strides)
}

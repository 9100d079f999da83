//! Llama 4 Scout and Maverick, and the text model by itself: attention in stretches, layers without positions whose temperature
//! depends on the position, and an expert whose weight multiplies its input.

use serde_json::Value;
use sluice_format::limits::{MAX_EXPERTS, MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    AttentionSpec, ExtentKind, FfnSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, QkNormScope, QueryTemperature,
    RopePairing, RouterScore, RouterSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, Unused, gqa, moe, usually_unused};
use crate::error::ConvertError;

/// The text model by itself.
pub(crate) struct Llama4Text;

/// As published: with a vision model.
pub(crate) struct Llama4;

const DEFAULTS: Defaults = Defaults {
    vocab: 202_048,
    hidden: 5120,
    intermediate: 8192,
    layers: 48,
    heads: 40,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 500_000.0,
};

const HEAD_DIM: usize = 128;
const DENSE_WIDTH: usize = 16_384;
const EXPERTS: usize = 16;
const NOPE_INTERVAL: usize = 4;
const STRETCH: usize = 8192;
/// Positions per step of temperature, and the slope.
const FLOOR_SCALE: usize = 8192;
const ATTENTION_SCALE: f64 = 0.1;

const NAMES: Names = Names { dense: "feed_forward", moe: &["feed_forward"], router: "router", ..Names::USUAL };

impl Family for Llama4Text {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama4_text"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let mut decoder = Decoder::read(config, &DEFAULTS)?;
        let expert_width = config.check_size("intermediate_size", decoder.intermediate, MAX_WIDTH)?;
        // Layers without experts have a separate width.
        decoder.intermediate = config.size_or("intermediate_size_mlp", DENSE_WIDTH, MAX_WIDTH)?;
        let layers = Layers::read(&decoder)?;
        let (plain, turning) = attention(&decoder)?;
        let sparse = experts(&decoder, expert_width)?;
        let stretch = config.opt_size_or("attention_chunk_size", Some(STRETCH), MAX_LENGTH)?;
        let layer = |i: usize| {
            let attention = if layers.turns[i] { &turning } else { &plain };
            let stretch = stretch.filter(|_| layers.bounded[i]);
            LayerSpec {
                attention: AttentionSpec::Gqa(GqaSpec { stretch, ..attention.clone() }),
                ffn: if layers.sparse[i] { sparse.clone() } else { decoder.dense() },
            }
        };
        decoder.model((0..decoder.layers).map(layer).collect())
    }

    fn names(&self) -> Names {
        Names { shared: "shared_expert", ..NAMES }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let experts = spec.layers[place.layer].ffn.moe.as_ref();
        let own = match (place.kind, experts) {
            (ExtentKind::Expert, Some(moe)) => {
                expert_origin(&names.layer(place.layer, "feed_forward.experts"), moe.experts, place.index, tensor)
            }
            _ => names.origin(spec, place, tensor),
        };
        names.or_usual(own, spec, place, tensor)
    }
}

impl Family for Llama4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama4"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", Llama4Text.model_types())?;
        Llama4Text.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "language_model.model.", head: "language_model.lm_head.weight", ..Llama4Text.names() }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        Llama4Text.origin(names, spec, place, tensor)
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["vision_model.", "multi_modal_projector."].iter().any(|prefix| name.starts_with(prefix));
        if vision { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

/// The differences between layers.
struct Layers {
    /// Whether queries and keys are rotated by their positions.
    turns: Vec<bool>,
    /// Whether attention ends at the border of a stretch.
    bounded: Vec<bool>,
    /// Whether there are experts.
    sparse: Vec<bool>,
}

impl Layers {
    fn read(decoder: &Decoder<'_>) -> Result<Self, ConvertError> {
        let config = decoder.config;
        let interval = config.size_or("no_rope_layer_interval", NOPE_INTERVAL, MAX_LENGTH)?;
        let turns: Vec<bool> = match config.opt_list("no_rope_layers")?.filter(|list| !list.is_empty()) {
            None => (0..decoder.layers).map(|i| (i + 1) % interval != 0).collect(),
            // 1 means that the layer rotates, despite the name of the key.
            Some(list) if list.len() >= decoder.layers => {
                let turns = |value: &Value| match value.as_u64() {
                    Some(turns @ (0 | 1)) => Ok(turns == 1),
                    _ => Err(config.refuse("no_rope_layers", format!("holds {value}, expected 0 or 1"))),
                };
                list[..decoder.layers].iter().map(turns).collect::<Result<_, _>>()?
            }
            Some(list) => {
                let problem = format!("has {} entries for {} layers", list.len(), decoder.layers);
                return Err(config.refuse("no_rope_layers", problem));
            }
        };
        let bounded = decoder.layer_list("layer_types", ["chunked_attention", "full_attention"])?;
        let step = config.size_or("interleave_moe_layer_step", 1, MAX_LENGTH)?;
        let sparse: Vec<bool> = match config.opt_list("moe_layers")? {
            None => (0..decoder.layers).map(|i| (i + 1) % step == 0).collect(),
            Some(list) => (0..decoder.layers).map(|i| list.iter().any(|l| l.as_u64() == Some(i as u64))).collect(),
        };
        Ok(Layers { bounded: bounded.unwrap_or_else(|| turns.clone()), turns, sparse })
    }
}

/// Attention of layers without and with rotation.
fn attention(decoder: &Decoder<'_>) -> Result<(GqaSpec, GqaSpec), ConvertError> {
    let config = decoder.config;
    let bias = config.bool_or("attention_bias", false)?;
    let heads = gqa::Heads { head_dim: Some(HEAD_DIM), ..gqa::Heads::USUAL };
    let mut common = GqaSpec { qkv_bias: bias, o_bias: bias, ..gqa::read(decoder, heads)? };
    if let Some(rope) = &mut common.rope {
        rope.pairing = RopePairing::Interleaved;
    }
    let normed = config.bool_or("use_qk_norm", true)?;
    let qk_norm = QkNorm { scope: QkNormScope::Head, eps: decoder.norm_eps, weightless: true, after_rope: true };
    let step = config.size_or("floor_scale", FLOOR_SCALE, MAX_LENGTH)?;
    let temperature = QueryTemperature { slope: config.f32_or("attn_scale", ATTENTION_SCALE)?, step };
    let tuned = config.flag_or("attn_temperature_tuning", true)?;
    let plain = GqaSpec { rope: None, temperature: tuned.then_some(temperature), ..common.clone() };
    Ok((plain, GqaSpec { qk_norm: normed.then_some(qk_norm), ..common }))
}

fn experts(decoder: &Decoder<'_>, width: usize) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    let experts = config.size_or("num_local_experts", EXPERTS, MAX_EXPERTS)?;
    let top_k = config.size_or("num_experts_per_tok", 1, experts)?;
    let router = RouterSpec { score: RouterScore::SigmoidOfChosen, ..moe::softmax_router(false) };
    let shape = moe::Shape { experts, top_k, width, shared: 1 };
    let ffn = moe::of_shape(decoder, &shape, "intermediate_size", router)?;
    let weighted = |moe: MoeSpec| MoeSpec { weighted_input: true, ..moe };
    Ok(FfnSpec { moe: ffn.moe.map(weighted), ..ffn })
}

/// One of all experts of a layer: as published, stacked and transposed, with gate before up; stacked, as in MLX; or separate, as in
/// files of tools that quantise each matrix.
fn expert_origin(module: &str, experts: usize, index: usize, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    // `first` and `all` count columns of the stored matrix, which are rows of the expert's.
    let transposed = |name: &str, first: usize, all: usize| {
        let strides = Strides { start: index * cols * all + first, run: rows, run_step: 0, row_step: 1, col_step: all };
        View::new(format!("{module}.{name}"), &[experts, cols, all], strides)
    };
    let stacked =
        |part: &str| View::of_stack(format!("{module}.{part}_proj.weight"), [experts, rows, cols], index, 0, rows);
    let single = |part: &str| View::whole(format!("{module}.{index}.{part}_proj.weight"), rows, cols);
    match tensor.name {
        "gate_up" => vec![
            vec![transposed("gate_up_proj", 0, 2 * rows), transposed("gate_up_proj", rows, 2 * rows)],
            vec![stacked("gate"), stacked("up")],
            vec![single("gate"), single("up")],
        ],
        "down" => vec![vec![transposed("down_proj", 0, rows)], vec![stacked("down")], vec![single("down")]],
        other => unreachable!("an expert has no `{other}`"),
    }
}

//! Nemotron-H and Nemotron 3: blocks of Mamba-2, attention or a feed-forward network, each with its own norm and residual. A layer
//! here is a block that mixes tokens, with the feed-forward block after it if there is one.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, ExtentKind, FfnSpec, GqaSpec, LayerSpec, MambaSpec, ModelSpec, MoeSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, gqa, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct NemotronH;

const DEFAULTS: Defaults = Defaults {
    vocab: 131_072,
    hidden: 4096,
    intermediate: 21_504,
    layers: 4,
    heads: 32,
    kv_heads: Some(8),
    max_positions: 4096,
    norm_eps: 1e-5,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 8, top_k: 2, width: 7688, shared: 1, groups: 1, groups_kept: 1, scale: 1.0 };

const HEAD_DIM: usize = 128;
const SHARED_WIDTH: usize = 7688;

/// A bound on the steps of the recurrence that has no effect.
const NO_BOUND: f64 = 1e6;

const PREFIX: &str = "backbone.";

/// The kind of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Mamba,
    Attention,
    Experts,
    Dense,
}

impl Family for NemotronH {
    fn model_types(&self) -> &'static [&'static str] {
        &["nemotron_h"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        for key in ["attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"] {
            config.require_bool(key, false)?;
        }
        config.require_str("mlp_hidden_act", &["relu2"])?;
        config.require_str("mamba_hidden_act", &["silu", "swish"])?;
        let mut decoder = Decoder::read(config, &DEFAULTS)?;
        decoder.norm_eps = config.f32_or("layer_norm_epsilon", DEFAULTS.norm_eps)?;
        let (mamba, attention) = (AttentionSpec::Mamba(mamba(&decoder)?), AttentionSpec::Gqa(attention(&decoder)?));
        let sparse = experts(&decoder)?;
        let dense = FfnSpec { activation: ActivationSpec::ReluSquared, ..decoder.dense() };
        let mut layers: Vec<LayerSpec> = Vec::new();
        for (number, block) in blocks(config)?.into_iter().enumerate() {
            let (mixer, ffn) = match block {
                Block::Mamba => (Some(&mamba), &FfnSpec::NONE),
                Block::Attention => (Some(&attention), &FfnSpec::NONE),
                Block::Experts => (None, &sparse),
                Block::Dense => (None, &dense),
            };
            match mixer {
                Some(mixer) => layers.push(LayerSpec { attention: mixer.clone(), ffn: ffn.clone() }),
                None => {
                    let Some(last) = layers.last_mut().filter(|last| last.ffn.is_none()) else {
                        let problem =
                            format!("has a feed-forward block, number {number}, that follows no block of another kind");
                        return Err(config.refuse(pattern_key(config), problem));
                    };
                    last.ffn = ffn.clone();
                }
            }
        }
        // Blocks without a feed-forward part are not dense.
        let any_dense = layers.iter().any(|layer| layer.ffn == dense);
        let intermediate = if any_dense { decoder.intermediate } else { 1 };
        Decoder { intermediate, ..decoder }.model(layers)
    }

    fn names(&self) -> Names {
        Names { prefix: PREFIX, embedding: "embeddings.weight", dense: "mixer", moe: &["mixer"], ..Names::USUAL }
    }

    fn spellings(&self) -> Vec<Names> {
        // The second is the module's name in transformers since version 5.
        vec![self.names(), Names { prefix: "model.", ..self.names() }]
    }

    fn named_layers(&self, spec: &ModelSpec) -> usize {
        first_block(spec, spec.layers.len())
    }

    fn final_origin(&self, names: Names, spec: &ModelSpec, _tensor: &TensorShape) -> Origin {
        vec![vec![View::vector(format!("{}norm_f.weight", names.prefix), spec.hidden_size)]]
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let block = first_block(spec, place.layer) + usize::from(place.kind != ExtentKind::Attention);
        let name = |rest: &str| names.layer(block, &rest.replacen("self_attn.", "mixer.", 1));
        let [_, rows, cols] = tensor.shape;
        let matrix = |rest: &str| vec![vec![View::whole(name(rest), rows, cols)]];
        match (&spec.layers[place.layer].attention, tensor.name) {
            (_, "attn_norm" | "ffn_norm") => vec![vec![View::vector(name("norm.weight"), cols)]],
            (_, "latent_down") => matrix("mixer.fc1_latent_proj.weight"),
            (_, "latent_up") => matrix("mixer.fc2_latent_proj.weight"),
            (AttentionSpec::Mamba(mamba), _) if place.kind == ExtentKind::Attention => {
                vec![vec![mamba_view(mamba, &name, tensor)]]
            }
            (_, which @ ("up" | "down")) if place.kind == ExtentKind::Expert => {
                let experts = spec.layers[place.layer].ffn.moe.as_ref().map_or(0, |moe| moe.experts);
                let mlx = if which == "up" { "mixer.switch_mlp.fc1.weight" } else { "mixer.switch_mlp.fc2.weight" };
                let stacked = View::of_stack(name(mlx), [experts, rows, cols], place.index, 0, rows);
                [names.origin_in(spec, place, &name, tensor), vec![vec![stacked]]].concat()
            }
            _ => names.origin_in(spec, place, &name, tensor),
        }
    }
}

/// The number of the first block of a layer.
fn first_block(spec: &ModelSpec, layer: usize) -> usize {
    spec.layers[..layer].iter().map(|layer| if layer.ffn.is_none() { 1 } else { 2 }).sum()
}

/// The key that lists the blocks.
fn pattern_key(config: &Config) -> &'static str {
    if config.has("layers_block_type") { "layers_block_type" } else { "hybrid_override_pattern" }
}

/// The blocks: a list of words, a text with one letter for each, or the default of transformers.
fn blocks(config: &Config) -> Result<Vec<Block>, ConvertError> {
    let key = pattern_key(config);
    let refuse = |problem: String| config.refuse(key, problem);
    let blocks: Vec<Block> = if let Some(list) = config.opt_list("layers_block_type")? {
        let block = |value: &serde_json::Value| match value.as_str() {
            Some("mamba" | "linear_attention") => Ok(Block::Mamba),
            Some("attention" | "full_attention") => Ok(Block::Attention),
            Some("moe") => Ok(Block::Experts),
            Some("mlp") => Ok(Block::Dense),
            _ => Err(refuse(format!("holds {value}; supported: mamba, attention, moe, mlp"))),
        };
        list.iter().map(block).collect::<Result<_, _>>()?
    } else if let Some(pattern) = config.opt_str("hybrid_override_pattern")? {
        let block = |letter: char| match letter {
            'M' => Ok(Block::Mamba),
            '*' => Ok(Block::Attention),
            'E' => Ok(Block::Experts),
            '-' => Ok(Block::Dense),
            other => Err(refuse(format!("holds '{other}'; supported: M, *, E, -"))),
        };
        pattern.chars().map(block).collect::<Result<_, _>>()?
    } else {
        vec![Block::Mamba, Block::Experts, Block::Attention, Block::Dense]
    };
    if blocks.is_empty() || blocks.len() > 2 * ModelSpec::MAX_LAYERS {
        return Err(refuse(format!("has {} blocks", blocks.len())));
    }
    Ok(blocks)
}

fn mamba(decoder: &Decoder<'_>) -> Result<MambaSpec, ConvertError> {
    let config = decoder.config;
    check_steps(config)?;
    let size = |keys: &[&'static str], default: usize| config.size_or(config.first_of(keys), default, MAX_WIDTH);
    let (heads, groups) = (size(&["mamba_num_heads"], 128)?, size(&["n_groups", "mamba_n_groups"], 8)?);
    if !heads.is_multiple_of(groups) {
        let problem = format!("is {groups}, which does not divide the {heads} of `mamba_num_heads`");
        return Err(config.refuse(config.first_of(&["n_groups", "mamba_n_groups"]), problem));
    }
    Ok(MambaSpec {
        heads,
        head_dim: size(&["mamba_head_dim"], 64)?,
        groups,
        state_dim: size(&["ssm_state_size"], 128)?,
        conv_width: size(&["conv_kernel", "mamba_d_conv"], 4)?,
        conv_bias: config.bool_or(config.first_of(&["use_conv_bias", "mamba_conv_bias"]), true)?,
        norm_eps: decoder.norm_eps,
    })
}

/// Refuses bounds on the steps of the recurrence. (`time_step_min` bounds the initial values in training; transformers uses it as a
/// bound while it reads a prompt, but not while it generates. No trained step comes near it.)
fn check_steps(config: &Config) -> Result<(), ConvertError> {
    let key = config.first_of(&["time_step_limit", "mamba_dt_limit"]);
    let Some(limits) = config.opt_list(key)? else { return Ok(()) };
    let lower = limits.first().and_then(serde_json::Value::as_f64) == Some(0.0);
    // JSON has no infinity; writers use several words for it.
    let upper = limits.get(1).is_some_and(|upper| upper.as_f64().is_none_or(|upper| upper >= NO_BOUND));
    if lower && upper && limits.len() == 2 {
        return Ok(());
    }
    Err(config.refuse(key, "bounds the steps of the recurrence; supported: [0.0, Infinity]"))
}

/// Attention without positions.
fn attention(decoder: &Decoder<'_>) -> Result<GqaSpec, ConvertError> {
    let config = decoder.config;
    if let Some(window) = config.opt_size_or("sliding_window", None, MAX_LENGTH)? {
        return Err(config.refuse("sliding_window", format!("is {window}; supported: null")));
    }
    // In older files, the key has a prefix.
    let head_dim = config.size_or("attention_head_dim", HEAD_DIM, MAX_WIDTH)?;
    let heads = gqa::Heads { head_dim: Some(head_dim), ..gqa::Heads::USUAL };
    Ok(GqaSpec { rope: None, ..gqa::read(decoder, heads)? })
}

fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    let shared = config.usize_or("n_shared_experts", 1)?;
    if shared != 1 {
        return Err(config.refuse("n_shared_experts", format!("is {shared}; supported: 1")));
    }
    let routed = moe::deepseek_v3(decoder, &EXPERTS)?;
    let latent = config.opt_size_or("moe_latent_size", None, MAX_WIDTH)?;
    Ok(FfnSpec {
        activation: ActivationSpec::ReluSquared,
        dense_width: config.size_or("moe_shared_expert_intermediate_size", SHARED_WIDTH, MAX_WIDTH)?,
        moe: routed.moe.map(|moe| MoeSpec { latent, ..moe }),
        ..routed
    })
}

/// Where a tensor of Mamba-2 comes from. `in_proj` has the rows of the gate, of the convolution's channels, and of the steps.
fn mamba_view(mamba: &MambaSpec, name: &dyn Fn(&str) -> String, tensor: &TensorShape) -> View {
    let [_, rows, cols] = tensor.shape;
    let (inner, group, channels) = (mamba.inner_width(), mamba.groups * mamba.state_dim, mamba.conv_channels());
    let input = |first: usize| {
        let all = inner + channels + mamba.heads;
        View::new(name("mixer.in_proj.weight"), &[all, cols], Strides::rows(first, rows, cols))
    };
    let vector = |rest: &str| View::vector(name(rest), cols);
    match tensor.name {
        "z" => input(0),
        "x" => input(inner),
        "b" => input(2 * inner),
        "c" => input(2 * inner + group),
        "dt" => input(inner + channels),
        "conv" => {
            let shape = [channels, 1, mamba.conv_width];
            View::new(name("mixer.conv1d.weight"), &shape, Strides::rows(0, 1, cols))
        }
        "conv_bias" => vector("mixer.conv1d.bias"),
        "a_log" => vector("mixer.A_log"),
        "dt_bias" => vector("mixer.dt_bias"),
        "d" => vector("mixer.D"),
        "out_norm" => vector("mixer.norm.weight"),
        "o" => View::whole(name("mixer.out_proj.weight"), rows, cols),
        other => unreachable!("Mamba-2 has no `{other}`"),
    }
}

//! DeepSeek-V4 (Flash and Pro): four residual streams, a window with compressed entries before it, and experts by token in the
//! first layers.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, CompressedSpec, CompressionSpec, EntryIndexerSpec, ExtentKind, FfnSpec, LayerSpec,
    ModelSpec, RopePairing, RopeScaling, RopeSpec, RouterScore, RouterSpec, StreamsSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, View};
use super::{Family, Place, moe, rope};
use crate::error::ConvertError;

/// The family.
pub(crate) struct DeepSeekV4;

const DEFAULTS: Defaults = Defaults {
    vocab: 129_280,
    hidden: 4096,
    intermediate: 2048,
    layers: 43,
    heads: 64,
    kv_heads: Some(1),
    max_positions: 1 << 20,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 6, width: 2048, shared: 1, groups: 1, groups_kept: 1, scale: 1.5 };

const COMPRESSED_THETA: f64 = 160_000.0;
/// Part of a head that rotates: 64 of 512.
const ROTATED: f64 = 0.125;
/// Layers at the beginning whose experts come from a table.
const TABLE_LAYERS: usize = 3;
/// The reference adds it to the sum of the chosen weights.
const RENORMALISE_EPS: f32 = 1e-20;

/// What a layer attends to in addition to its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Window,
    /// Overlapping entries, from which an indexer chooses.
    Chosen,
    /// All entries.
    All,
}

impl Kind {
    const NAMES: [(&str, Kind); 3] = [
        ("sliding_attention", Kind::Window),
        ("compressed_sparse_attention", Kind::Chosen),
        ("heavily_compressed_attention", Kind::All),
    ];
}

impl Family for DeepSeekV4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["deepseek_v4"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let attention = Attention::read(&decoder)?;
        let ffn = experts(&decoder)?;
        let tables = token_tables(&decoder)?;
        let layer = |(kind, by_table): (Kind, bool)| {
            let mut ffn = ffn.clone();
            if let Some(moe) = &mut ffn.moe {
                moe.router.token_table = by_table.then_some(decoder.vocab);
                moe.router.choice_bias = !by_table;
            }
            LayerSpec { attention: AttentionSpec::Compressed(attention.of(kind)), ffn }
        };
        let layers = kinds(&decoder)?.into_iter().zip(tables).map(layer).collect();
        let count = config.size_or("hc_mult", 4, MAX_WIDTH)?;
        let iterations = config.size_or("hc_sinkhorn_iters", 20, MAX_WIDTH)?;
        let streams = StreamsSpec { count, iterations, eps: config.f32_or("hc_eps", 1e-6)? };
        Ok(ModelSpec { streams: Some(streams), ..decoder.model(layers)? })
    }

    fn names(&self) -> Names {
        Names {
            prefix: "",
            embedding: "embed.weight",
            head: "head.weight",
            moe: &["ffn"],
            expert: ["w1", "w3", "w2"],
            ..Names::USUAL
        }
    }

    fn final_origin(&self, names: Names, spec: &ModelSpec, tensor: &TensorShape) -> Origin {
        match stream_tensor(tensor, "hc_head", &|rest| rest.to_owned()) {
            Some(view) => vec![vec![view]],
            None => vec![vec![names.final_norm(spec.hidden_size)]],
        }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let layer = |rest: &str| names.layer(place.layer, rest);
        let [_, rows, cols] = tensor.shape;
        let matrix = |rest: &str| vec![vec![View::whole(layer(rest), rows, cols)]];
        let vector = |rest: &str| vec![vec![View::vector(layer(rest), cols)]];
        match (place.kind, tensor.name) {
            (ExtentKind::Attention, _) => vec![vec![attention_origin(spec, place.layer, &layer, tensor)]],
            (ExtentKind::Router, "ffn_norm") => vector("ffn_norm.weight"),
            (ExtentKind::Router, "router") => matrix("ffn.gate.weight"),
            (ExtentKind::Router, "router_bias") => vector("ffn.gate.bias"),
            (ExtentKind::Router, "token_experts") => {
                let rows = spec.vocab_size;
                let experts = spec.layers[place.layer].ffn.moe.as_ref().map_or(0, |moe| moe.experts);
                vec![vec![View::table(layer("ffn.gate.tid2eid"), rows, cols / rows, experts)]]
            }
            (ExtentKind::Router, _) => stream_tensor(tensor, "hc_ffn", &layer).into_iter().map(|v| vec![v]).collect(),
            (ExtentKind::Dense, "down") => matrix("ffn.shared_experts.w2.weight"),
            (ExtentKind::Dense, _) => {
                let part = |which| View::whole(layer(&format!("ffn.shared_experts.{which}.weight")), rows, cols);
                vec![vec![part("w1"), part("w3")]]
            }
            _ => names.origin(spec, place, tensor),
        }
    }
}

/// A tensor that mixes streams, if it is one.
fn stream_tensor(tensor: &TensorShape, module: &str, name: &dyn Fn(&str) -> String) -> Option<View> {
    let [_, rows, cols] = tensor.shape;
    let name = |end: &str| name(&format!("{module}_{end}"));
    match tensor.name {
        "streams" => Some(View::whole(name("fn"), rows, cols)),
        "streams_bias" => Some(View::vector(name("base"), cols)),
        "streams_scale" => Some(View::vector(name("scale"), cols)),
        _ => None,
    }
}

fn attention_origin(spec: &ModelSpec, index: usize, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> View {
    let [batch, rows, cols] = tensor.shape;
    if let Some(view) = stream_tensor(tensor, "hc_attn", layer) {
        return view;
    }
    let name = |rest: &str| layer(&format!("attn.{rest}"));
    let matrix = |rest: &str| View::whole(name(&format!("{rest}.weight")), batch * rows, cols);
    let norm = |rest: &str| View::vector(name(&format!("{rest}.weight")), cols);
    let ratio = match &spec.layers[index].attention {
        AttentionSpec::Compressed(CompressedSpec { compression: Some(compression), .. }) => compression.ratio,
        _ => 1,
    };
    let bias = |rest: &str| View::new(name(rest), &[ratio, cols / ratio], View::vector(String::new(), cols).strides);
    match tensor.name {
        "attn_norm" => View::vector(layer("attn_norm.weight"), cols),
        "q_a" => matrix("wq_a"),
        "q_a_norm" => norm("q_norm"),
        "q_b" => matrix("wq_b"),
        "kv" => matrix("wkv"),
        "kv_norm" => norm("kv_norm"),
        "entry_kv" => matrix("compressor.wkv"),
        "entry_gate" => matrix("compressor.wgate"),
        "entry_bias" => bias("compressor.ape"),
        "entry_norm" => norm("compressor.norm"),
        "index_q" => matrix("indexer.wq_b"),
        "index_weights" => matrix("indexer.weights_proj"),
        "index_entry_kv" => matrix("indexer.compressor.wkv"),
        "index_entry_gate" => matrix("indexer.compressor.wgate"),
        "index_entry_bias" => bias("indexer.compressor.ape"),
        "index_entry_norm" => norm("indexer.compressor.norm"),
        "sinks" => View::vector(name("attn_sink"), cols),
        "o_a" => matrix("wo_a"),
        "o" => matrix("wo_b"),
        other => unreachable!("such attention has no `{other}`"),
    }
}

/// The attention variants of all layers.
struct Attention {
    /// Without compression.
    window: CompressedSpec,
    /// Rotation in layers that compress.
    rope: RopeSpec,
    chosen: CompressionSpec,
    all: CompressionSpec,
}

impl Attention {
    fn read(decoder: &Decoder<'_>) -> Result<Self, ConvertError> {
        let config = decoder.config;
        config.require_bool("attention_bias", false)?;
        if decoder.kv_heads != 1 {
            return Err(config.refuse("num_key_value_heads", "must be 1: all heads share their key"));
        }
        let size = |key: &str, default: usize| config.size_or(key, default, MAX_WIDTH);
        let head_dim = size("head_dim", 512)?;
        let groups = size("o_groups", 8)?;
        if !decoder.heads.is_multiple_of(groups) {
            let problem = format!("is {groups}, which does not divide the {} of `num_attention_heads`", decoder.heads);
            return Err(config.refuse("o_groups", problem));
        }
        let (rope, compressed) = ropes(decoder, head_dim)?;
        let window = CompressedSpec {
            output_groups: groups,
            group_heads: decoder.heads / groups,
            output_rank: size("o_lora_rank", 1024)?,
            head_dim,
            q_lora_rank: size("q_lora_rank", 1024)?,
            window: config.size_or("sliding_window", 128, MAX_LENGTH)?,
            softmax_scale: (head_dim as f64).powf(-0.5) as f32,
            norm_eps: decoder.norm_eps,
            rope,
            sinks: true,
            compression: None,
        };
        let indexer = EntryIndexerSpec {
            index_heads: size("index_n_heads", 64)?,
            index_head_dim: size("index_head_dim", 128)?,
            index_top_k: config.size_or("index_topk", 512, MAX_LENGTH)?,
        };
        let [chosen, all] = ratios(config)?;
        Ok(Attention {
            window,
            rope: compressed,
            chosen: CompressionSpec { ratio: chosen, spans: 2, indexer: Some(indexer) },
            all: CompressionSpec { ratio: all, spans: 1, indexer: None },
        })
    }

    fn of(&self, kind: Kind) -> CompressedSpec {
        let compression = match kind {
            Kind::Window => return self.window.clone(),
            Kind::Chosen => &self.chosen,
            Kind::All => &self.all,
        };
        CompressedSpec { compression: Some(compression.clone()), rope: self.rope.clone(), ..self.window.clone() }
    }
}

/// Tokens per entry, for entries from which an indexer chooses and for other entries: in a table by layer type, or under separate
/// keys.
fn ratios(config: &Config) -> Result<[usize; 2], ConvertError> {
    let rates = config.section("compress_rates")?;
    let ratio = |name: &str, key: &str, default: usize| match (config.has(key), &rates) {
        (false, Some(rates)) => rates.size_or(name, default, MAX_LENGTH),
        _ => config.size_or(key, default, MAX_LENGTH),
    };
    Ok([
        ratio("compressed_sparse_attention", "compress_rate_csa", 4)?,
        ratio("heavily_compressed_attention", "compress_rate_hca", 128)?,
    ])
}

/// The rotation in layers with only a window, and in layers that compress. Only the latter are extended, without a factor on cosine
/// and sine unless one is given.
fn ropes(decoder: &Decoder<'_>, head_dim: usize) -> Result<(RopeSpec, RopeSpec), ConvertError> {
    let config = decoder.config;
    let width = match (config.has("partial_rotary_factor"), config.opt_size_or("qk_rope_head_dim", None, head_dim)?) {
        (false, Some(width)) => width,
        _ => rope::width(config, head_dim, ROTATED)?,
    };
    rope::check_even(config, "qk_rope_head_dim", width)?;
    let pairing = RopePairing::Interleaved;
    let theta = |key: &str, default: f64| {
        let theta = config.opt_f64(key)?.unwrap_or(default);
        config.check_above(key, theta, 1.0)
    };
    let plain = |theta: f64| RopeSpec { pairing, theta, dim: width, scaling: RopeScaling::None };
    let (main, compressed) = (theta("rope_theta", decoder.theta)?, theta("compress_rope_theta", COMPRESSED_THETA)?);
    let parameters = config.section("rope_parameters")?;
    let nested = parameters.as_ref().map(|p| Ok::<_, ConvertError>((p.section("main")?, p.section("compress")?)));
    let read = |section: &Config, theta: f64| rope::of_section(section, width, pairing, theta, decoder.max_positions);
    if let Some((Some(of_main), Some(of_compressed))) = nested.transpose()? {
        return Ok((read(&of_main, main)?.spec, unscaled(read(&of_compressed, compressed)?.spec, &of_compressed)));
    }
    let Some(section) = parameters.map_or_else(|| config.section("rope_scaling"), |p| Ok(Some(p)))? else {
        return Ok((plain(main), plain(compressed)));
    };
    // If a single section describes all layers, it is only the extension; each kind of layer has its own base.
    let spec = RopeSpec { theta: compressed, ..read(&section, compressed)?.spec };
    Ok((plain(main), unscaled(spec, &section)))
}

/// The same rotation without YaRN's factor on cosine and sine, unless `section` has one.
fn unscaled(mut rope: RopeSpec, section: &Config) -> RopeSpec {
    if let RopeScaling::Yarn { attention_factor, .. } = &mut rope.scaling
        && !section.has("attention_factor")
    {
        *attention_factor = 1.0;
    }
    rope
}

/// The kind of each layer: by name, by a list of ratios, or by default: two layers with all entries, then both kinds alternately.
fn kinds(decoder: &Decoder<'_>) -> Result<Vec<Kind>, ConvertError> {
    let config = decoder.config;
    let of_ratio = |ratio: &serde_json::Value| match ratio.as_u64() {
        Some(0) => Some(Kind::Window),
        Some(4) => Some(Kind::Chosen),
        Some(128) => Some(Kind::All),
        _ => None,
    };
    let of_name = |name: &serde_json::Value| {
        let found = Kind::NAMES.iter().find(|(known, _)| name.as_str() == Some(known));
        found.map(|(_, kind)| *kind)
    };
    type Read<'r> = &'r dyn Fn(&serde_json::Value) -> Option<Kind>;
    let lists: [(&str, Read<'_>, &str); 2] = [
        ("layer_types", &of_name, "sliding_attention, compressed_sparse_attention, heavily_compressed_attention"),
        ("compress_ratios", &of_ratio, "0, 4, 128"),
    ];
    for (key, read, supported) in lists {
        let Some(list) = config.opt_list(key)? else { continue };
        // Layers after the decoder's predict further tokens.
        let list = list
            .get(..decoder.layers)
            .ok_or_else(|| config.refuse(key, format!("has {} entries for {} layers", list.len(), decoder.layers)))?;
        let kind = |v| read(v).ok_or_else(|| config.refuse(key, format!("holds {v}; supported: {supported}")));
        return list.iter().map(kind).collect();
    }
    let by_turns = |layer: usize| if layer >= 2 && layer % 2 == 1 { Kind::Chosen } else { Kind::All };
    Ok((0..decoder.layers).map(by_turns).collect())
}

/// Whether each layer's experts come from a table.
fn token_tables(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    if let Some(list) = decoder.layer_list("mlp_layer_types", ["hash_moe", "moe"])? {
        return Ok(list);
    }
    let first = decoder.config.usize_or("num_hash_layers", TABLE_LAYERS)?;
    Ok((0..decoder.layers).map(|layer| layer < first).collect())
}

fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    config.require_bool("mlp_bias", false)?;
    config.require_str("topk_method", &["noaux_tc"])?;
    config.require_bool("norm_topk_prob", true)?;
    let score = match config.opt_str("scoring_func")?.unwrap_or("sqrtsoftplus") {
        "sqrtsoftplus" => RouterScore::SqrtSoftplus,
        "sigmoid" => RouterScore::Sigmoid,
        "softmax" => RouterScore::Softmax,
        other => {
            let problem = format!("is \"{other}\"; supported: sqrtsoftplus, sigmoid, softmax");
            return Err(config.refuse("scoring_func", problem));
        }
    };
    let router = RouterSpec {
        score,
        renormalise: Some(RENORMALISE_EPS),
        scale: config.f32_or("routed_scaling_factor", EXPERTS.scale)?,
        ..moe::softmax_router(true)
    };
    let limit = config.check_above("swiglu_limit", config.f64_or("swiglu_limit", 10.0)?, 0.0)? as f32;
    Ok(FfnSpec { activation: ActivationSpec::SiluClamped { limit }, ..moe::with_shared(decoder, &EXPERTS, router)? })
}

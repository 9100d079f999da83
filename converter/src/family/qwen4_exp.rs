//! Qwen4-Exp (Qwen3.8-Flash-Next): Qwen3.5's layers with gated residual streams instead of norms, a choice of key blocks, and
//! tables of n-grams. Only the text part is converted.

use sluice_format::limits::{MAX_EXTENTS, MAX_LENGTH, MAX_TABLE_ROWS, MAX_WIDTH};
use sluice_format::{
    AttentionSpec, BlockScore, ExtentKind, GatedStreamsSpec, GqaSpec, KeyBlocksSpec, LayerSpec, ModelSpec, NgramHead,
    NgramSpec, QkNormScope, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, Stored, Unused, delta, gqa, moe, qwen, usually_unused};
use crate::error::ConvertError;

/// The family, as published: around a vision model.
pub(crate) struct Qwen4Exp;

/// Its text model by itself.
pub(crate) struct Qwen4ExpText;

const DEFAULTS: Defaults = Defaults {
    vocab: 248_320,
    hidden: 2048,
    intermediate: 5632,
    layers: 40,
    heads: 16,
    kv_heads: Some(2),
    max_positions: 32_768,
    norm_eps: 1e-6,
    theta: 1e4,
};

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 512, top_k: 10, width: 512, shared: 1, groups: 1, groups_kept: 1, scale: 1.0 };

const HEADS: gqa::Heads = gqa::Heads { head_dim: Some(256), rotary_factor: 1.0 };
const SHARED_WIDTH: usize = 512;

/// The module of a layer with the numbers of its table of n-grams.
const TABLE: &str = "ple.ple_embedding";

impl Family for Qwen4Exp {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen4_exp"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", Qwen4ExpText.model_types())?;
        Qwen4ExpText.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "model.language_model.", ..Qwen4ExpText.names() }
    }

    fn final_origin(&self, names: Names, spec: &ModelSpec, tensor: &TensorShape) -> Origin {
        Qwen4ExpText.final_origin(names, spec, tensor)
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        Qwen4ExpText.origin(names, spec, place, tensor)
    }

    fn complete(
        &self,
        names: Names,
        spec: ModelSpec,
        parts: usize,
        stored: &dyn Stored,
    ) -> Result<ModelSpec, ConvertError> {
        Qwen4ExpText.complete(names, spec, parts, stored)
    }

    fn table_parts(&self, config: &Config) -> Result<usize, ConvertError> {
        Qwen4ExpText.table_parts(config)
    }

    fn deciding(&self, names: Names, spec: &ModelSpec) -> Vec<String> {
        Qwen4ExpText.deciding(names, spec)
    }

    fn table_part(&self, names: Names, layer: usize, part: usize) -> String {
        Qwen4ExpText.table_part(names, layer, part)
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["model.visual.", "visual.", "vision_tower."].iter().any(|prefix| name.starts_with(prefix));
        if vision { Some(Unused::Vision) } else { usually_unused(name) }
    }
}

impl Family for Qwen4ExpText {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen4_exp_text"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("attn_output_gate", true)?;
        config.require_bool("attention_bias", false)?;
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let full = AttentionSpec::Gqa(GqaSpec {
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Head),
            output_gate: true,
            blocks: key_blocks(&decoder)?,
            ..gqa::read(&decoder, HEADS)?
        });
        config.require_str("output_gate_type", &["silu", "swish", "sigmoid"])?;
        let mut linear = delta::read(&decoder)?;
        linear.gate_sigmoid = config.opt_str("output_gate_type")? == Some("sigmoid");
        let linear = AttentionSpec::Delta(linear);
        let renormalise = config.bool_or("norm_topk_prob", true)?;
        let routed = moe::softmax_experts(&decoder, &EXPERTS, "moe_intermediate_size", renormalise)?;
        let sparse = qwen::with_gated_shared(&decoder, routed, SHARED_WIDTH)?;
        let layers = delta::linear_layers(&decoder)?.into_iter().zip(moe::by_step(&decoder)?);
        let layer = |(is_linear, is_sparse): (bool, bool)| LayerSpec {
            attention: if is_linear { linear.clone() } else { full.clone() },
            ffn: if is_sparse { sparse.clone() } else { decoder.dense() },
        };
        let streams = GatedStreamsSpec {
            count: config.size_or("hc_count", 4, MAX_WIDTH)?,
            rank: config.size_or("hc_lowrank", 320, MAX_WIDTH)?,
        };
        let model = decoder.model(layers.map(layer).collect())?;
        Ok(ModelSpec { gated_streams: Some(streams), ngrams: ngrams(&decoder)?, ..model })
    }

    fn names(&self) -> Names {
        Names { shared: "shared_expert", zero_centred: true, ..Names::USUAL }
    }

    fn final_origin(&self, names: Names, _spec: &ModelSpec, tensor: &TensorShape) -> Origin {
        let module = format!("{}hyper_connection_mixer", names.prefix);
        vec![vec![stream_tensor(names, &module, tensor).expect("nothing else is behind the last layer")]]
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let layer = |rest: &str| names.layer(place.layer, rest);
        let module = match place.kind {
            ExtentKind::Attention => Some(layer("attn_hyper_connection")),
            ExtentKind::Router => Some(layer("mlp_hyper_connection")),
            _ => None,
        };
        let own = module.and_then(|module| stream_tensor(names, &module, tensor));
        let own = own.or_else(|| ngram_tensor(names, spec, &layer, tensor));
        match (own, index_tensor(names, spec, place, &layer, tensor)) {
            (Some(view), _) => vec![vec![view]],
            // Separate, as in what is made from GGUF.
            (None, Some(view)) => [vec![vec![view]], names.origin(spec, place, tensor)].concat(),
            (None, None) => names.origin(spec, place, tensor),
        }
    }

    fn complete(
        &self,
        names: Names,
        mut spec: ModelSpec,
        parts: usize,
        stored: &dyn Stored,
    ) -> Result<ModelSpec, ConvertError> {
        for ngrams in &mut spec.ngrams {
            let name = |rest: &str| names.layer(ngrams.layer, &format!("{TABLE}.{rest}"));
            ngrams.multipliers = stored.integers(&name(MULTIPLIERS), ngrams.tokens())?;
            let [sizes, offsets] = [SIZES, OFFSETS].map(|rest| stored.unsigned(&name(rest), ngrams.heads.len()));
            let heads = offsets?.into_iter().zip(sizes?);
            ngrams.heads = heads.map(|(first, rows)| NgramHead { first, rows }).collect();
            let rows = |part| stored.rows(&self.table_part(names, ngrams.layer, part)).unwrap_or(0) as u64;
            ngrams.table_rows = (0..parts).map(rows).fold(0, u64::saturating_add);
        }
        Ok(spec)
    }

    fn deciding(&self, names: Names, spec: &ModelSpec) -> Vec<String> {
        let of_layer = |ngrams: &NgramSpec| {
            let layer = ngrams.layer;
            [MULTIPLIERS, SIZES, OFFSETS].map(|rest| names.layer(layer, &format!("{TABLE}.{rest}")))
        };
        spec.ngrams.iter().flat_map(of_layer).collect()
    }

    fn table_parts(&self, config: &Config) -> Result<usize, ConvertError> {
        config.size_or("split_ngram_parts", 512, MAX_EXTENTS)
    }

    fn table_part(&self, names: Names, layer: usize, part: usize) -> String {
        names.layer(layer, &format!("{TABLE}.ngram_embedding.shard_{part}.weight"))
    }
}

const MULTIPLIERS: &str = "layer_multipliers";
const SIZES: &str = "ngram_heads_vocab_sizes";
const OFFSETS: &str = "ngram_heads_offsets";

/// Combines several streams into one input and adds a part's output to them; `module` belongs to a part or to the head.
fn stream_tensor(names: Names, module: &str, tensor: &TensorShape) -> Option<View> {
    let [_, rows, cols] = tensor.shape;
    let matrix = |rest: &str| Some(View::whole(format!("{module}.{rest}.weight"), rows, cols));
    match tensor.name {
        "streams_norm" => Some(norm(names, format!("{module}.hc_norm.weight"), cols)),
        "streams_down" => matrix("input_mix_weight_down"),
        "streams_up" => matrix("input_mix_weight_up"),
        "streams_inject" => matrix("block_inject_weight"),
        _ => None,
    }
}

/// A tensor that adds rows of a table of n-grams to the residual.
fn ngram_tensor(names: Names, spec: &ModelSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Option<View> {
    let [_, rows, cols] = tensor.shape;
    let matrix = |rest: &str| Some(View::whole(layer(&format!("ple.{rest}.weight")), rows, cols));
    let norm = |rest: &str| Some(norm(names, layer(&format!("ple.{rest}.weight")), cols));
    match tensor.name {
        "ngram_key" => matrix("key_proj"),
        "ngram_value" => matrix("value_proj"),
        "ngram_key_norm" => norm("norm_key"),
        "ngram_query_norm" => norm("norm_query"),
        "ngram_conv_norm" => norm("norm_conv"),
        "ngram_conv" => {
            let channels = spec.residual_width();
            let width = cols / channels;
            let shape = if names.conv_last { [channels, width, 1] } else { [channels, 1, width] };
            Some(View::new(layer("ple.conv1d.weight"), &shape, Strides::rows(0, 1, cols)))
        }
        _ => None,
    }
}

/// A tensor of the choice of key blocks: its queries and keys are one projection, queries first.
fn index_tensor(
    names: Names,
    spec: &ModelSpec,
    place: Place,
    layer: &dyn Fn(&str) -> String,
    tensor: &TensorShape,
) -> Option<View> {
    let AttentionSpec::Gqa(GqaSpec { blocks: Some(blocks), .. }) = &spec.layers[place.layer].attention else {
        return None;
    };
    let [_, rows, cols] = tensor.shape;
    let name = |rest: &str| layer(&format!("self_attn.indexer.{rest}.weight"));
    let queries = blocks.index_heads * blocks.index_head_dim;
    let part = |first| {
        View::new(name("index_qk_proj"), &[queries + blocks.index_head_dim, cols], Strides::rows(first, rows, cols))
    };
    match tensor.name {
        "index_q" => Some(part(0)),
        "index_k" => Some(part(queries)),
        "index_q_norm" => Some(norm(names, name("q_layernorm"), cols)),
        "index_k_norm" => Some(norm(names, name("k_layernorm"), cols)),
        _ => None,
    }
}

fn norm(names: Names, tensor: String, len: usize) -> View {
    View { plus_one: names.zero_centred, ..View::vector(tensor, len) }
}

/// The choice of key blocks, if there is one.
fn key_blocks(decoder: &Decoder<'_>) -> Result<Option<KeyBlocksSpec>, ConvertError> {
    let config = decoder.config;
    let Some(index_heads) = config.opt_size_or("indexer_n_heads", None, MAX_WIDTH)? else { return Ok(None) };
    let needed = |key: &str, most: usize| {
        let size = config.opt_size_or(key, None, most)?;
        size.ok_or_else(|| config.refuse(key, "is missing, and `indexer_n_heads` is there"))
    };
    if needed("indexer_kv_heads", MAX_WIDTH)? != 1 {
        return Err(config.refuse("indexer_kv_heads", "must be 1: all index heads share their key"));
    }
    let block_len = needed("indexer_compress_ratio", MAX_LENGTH)?;
    let budget = needed("indexer_budget", MAX_LENGTH)?;
    if budget < block_len {
        let problem = format!("is {budget}, less than the {block_len} of `indexer_compress_ratio`");
        return Err(config.refuse("indexer_budget", problem));
    }
    Ok(Some(KeyBlocksSpec {
        index_heads,
        index_head_dim: needed("indexer_head_dim", MAX_WIDTH)?,
        index_norm_eps: decoder.norm_eps,
        block_len,
        top_blocks: budget / block_len,
        local_blocks: 0,
        score: BlockScore::MeanKey,
    }))
}

/// The shapes of the tables of n-grams. The numbers for hashing n-grams are tensors. Until they are read ([`Family::complete`]),
/// there are placeholders: heads of equal sizes, while those of a release are the primes from there on.
fn ngrams(decoder: &Decoder<'_>) -> Result<Vec<NgramSpec>, ConvertError> {
    let config = decoder.config;
    let Some(list) = config.opt_list("ple_layer_ids")?.filter(|list| !list.is_empty()) else { return Ok(Vec::new()) };
    let tokens = config.size_or("ngram_size", 3, MAX_WIDTH)?;
    let each = config.size_or("heads_per_ngram", 8, MAX_WIDTH)?;
    if !(2..=MULTIPLIER.len()).contains(&tokens) {
        return Err(config.refuse("ngram_size", format!("is {tokens}; supported: 2 to {}", MULTIPLIER.len())));
    }
    let (width, heads) = (config.size_or("ple_embed_dim", 2048, MAX_WIDTH)?, each.saturating_mul(tokens - 1));
    if !width.is_multiple_of(heads) {
        let problem = format!("is {width}, not a multiple of the {heads} heads of `heads_per_ngram` and `ngram_size`");
        return Err(config.refuse("ple_embed_dim", problem));
    }
    let base = config.size_or("ngram_vocab_size_base", 20_000_000, MAX_TABLE_ROWS as usize / heads)? as u64;
    let unit = config.size_or("make_ngram_vocab_size_divisible_by", 128, MAX_LENGTH)? as u64;
    let spec = NgramSpec {
        layer: 0,
        width,
        multipliers: MULTIPLIER[..tokens].to_vec(),
        heads: (0..heads as u64).map(|head| NgramHead { first: head * base, rows: base }).collect(),
        table_rows: (heads as u64 * base).next_multiple_of(unit),
        separator: end_of_text(decoder)?,
        conv_width: config.size_or("ple_conv_kernel_size", 4, MAX_WIDTH)?,
    };
    // Layers are counted from one here.
    let layer = |id: &serde_json::Value| {
        let layer = id.as_u64().and_then(|id| usize::try_from(id).ok()?.checked_sub(1));
        let layer = layer.filter(|&layer| layer < decoder.layers);
        layer.ok_or_else(|| config.refuse("ple_layer_ids", format!("holds {id}, of {} layers", decoder.layers)))
    };
    let mut layers: Vec<usize> = list.iter().map(layer).collect::<Result<_, _>>()?;
    layers.sort_unstable();
    layers.dedup();
    Ok(layers.into_iter().map(|layer| NgramSpec { layer, ..spec.clone() }).collect())
}

/// Odd numbers that replace those of a checkpoint until they are read, and in synthetic models.
const MULTIPLIER: [i64; 8] = [
    0x1f0d_3804_1b2a_5d31,
    0x2b7e_1516_28ae_d2a7,
    0x3243_f6a8_885a_308d,
    0x0313_198a_2e03_7073,
    0x4409_3822_299f_31d1,
    0x0082_efa9_8ec4_e6c9,
    0x4528_21e6_38d0_1377,
    0x3466_cf34_e90c_6cc1,
];

/// The token that n-grams do not cross: the first one that ends a text.
fn end_of_text(decoder: &Decoder<'_>) -> Result<u32, ConvertError> {
    let (config, key) = (decoder.config, "eos_token_id");
    let token = match config.list(key) {
        Some(list) => list.first().and_then(serde_json::Value::as_u64),
        None => config.opt_usize_or(key, None)?.map(|token| token as u64),
    };
    let token = token.and_then(|token| u32::try_from(token).ok());
    let problem = "is not a token, and n-grams do not reach across the token that it names";
    token.ok_or_else(|| config.refuse(key, problem))
}

//! Gemma 3, and what it shares with Gemma 4: norms after attention and after the feed-forward part, a scaled embedding, bounded
//! logits, and another base of the rotary frequencies in layers with a window.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, Factors, FfnSpec, GqaSpec, LayerSpec, ModelSpec, NormsSpec, QkNormScope,
    RopePairing, RopeScaling, RopeSpec,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::{Family, Unused, gqa, rope, usually_unused};
use crate::error::ConvertError;

/// As published: with a vision model.
pub(crate) struct Gemma3;

/// The text model by itself.
pub(crate) struct Gemma3Text;

const DEFAULTS: Defaults = Defaults {
    vocab: 262_208,
    hidden: 2304,
    intermediate: 9216,
    layers: 26,
    heads: 8,
    kv_heads: Some(4),
    max_positions: 131_072,
    norm_eps: 1e-6,
    theta: 1e6,
};

const HEAD_DIM: usize = 256;
const QUERY_SCALAR: f64 = 256.0;
const WINDOW: usize = 4096;
/// Base of the frequencies of layers with a window.
pub(super) const LOCAL_THETA: f64 = 1e4;
/// One in this many layers has no window.
const PATTERN: usize = 6;

impl Family for Gemma3Text {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma3_text"]
    }

    fn tied_by_default(&self) -> bool {
        true
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        require_causal(config)?;
        if config.has("attn_logit_softcapping") {
            return Err(config.refuse("attn_logit_softcapping", "must be null: scores are not bounded"));
        }
        let decoder = read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", false)?;
        let scalar = config.f64_or("query_pre_attn_scalar", QUERY_SCALAR)?;
        let scalar = config.check_above("query_pre_attn_scalar", scalar, 0.0)?;
        let head_dim = config.size_or("head_dim", HEAD_DIM, MAX_WIDTH / decoder.heads)?;
        rope::check_even(config, "head_dim", head_dim)?;
        let kv_heads = kv_heads(&decoder, "num_key_value_heads", decoder.kv_heads)?;
        let attention = |rope| GqaSpec {
            softmax_scale: scalar.powf(-0.5) as f32,
            qk_norm: gqa::qk_norm(&decoder, QkNormScope::Head),
            qkv_bias: bias,
            o_bias: bias,
            ..gqa::of_heads(decoder.heads, kv_heads, head_dim, rope)
        };
        let (full, local) = rotations(&decoder, head_dim)?;
        let window = Some(config.size_or("sliding_window", WINDOW, MAX_LENGTH)?);
        let (full, sliding) = (attention(full), GqaSpec { window, ..attention(local) });
        let pattern = config.size_or("sliding_window_pattern", PATTERN, MAX_LENGTH)?;
        let layer = |slides: bool| LayerSpec {
            attention: AttentionSpec::Gqa(if slides { sliding.clone() } else { full.clone() }),
            ffn: dense(&decoder),
        };
        model(&decoder, slides(&decoder, pattern)?.into_iter().map(layer).collect())
    }

    fn names(&self) -> Names {
        Names { zero_centred: true, mlx_adds_one: false, ..Names::USUAL }
    }
}

impl Family for Gemma3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma3"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn tied_by_default(&self) -> bool {
        true
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", Gemma3Text.model_types())?;
        Gemma3Text.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "language_model.model.", head: "language_model.lm_head.weight", ..Gemma3Text.names() }
    }

    fn spellings(&self) -> Vec<Names> {
        // The form of transformers since version 5, and of tools that keep only the text model.
        let inner = Names { prefix: "model.language_model.", ..Gemma3Text.names() };
        vec![self.names(), inner, Gemma3Text.names()]
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        unused_beside_text(name)
    }
}

/// Encoders of images and sound, and the projections that connect them with the text model.
pub(super) fn unused_beside_text(name: &str) -> Option<Unused> {
    let inner = name.strip_prefix("model.").unwrap_or(name);
    let modules = ["vision_tower.", "audio_tower.", "multi_modal_projector.", "embed_vision.", "embed_audio."];
    if modules.iter().any(|module| inner.starts_with(module)) { Some(Unused::Vision) } else { usually_unused(name) }
}

/// The keys that all decoders share. The activation has a key of its own.
pub(super) fn read<'a>(config: &'a Config, defaults: &Defaults) -> Result<Decoder<'a>, ConvertError> {
    const ACTIVATION: &[&str] = &["gelu_pytorch_tanh"];
    config.require_str("hidden_activation", ACTIVATION)?;
    Decoder::read_as(config, defaults, ACTIVATION)
}

/// Refuses attention of text to later tokens. Images with such attention do not matter for a text model.
pub(super) fn require_causal(config: &Config) -> Result<(), ConvertError> {
    const KEY: &str = "use_bidirectional_attention";
    match config.opt_str(KEY) {
        Ok(None | Some("vision")) => Ok(()),
        Ok(Some(other)) => Err(config.refuse(KEY, format!("is \"{other}\"; supported: null, vision"))),
        Err(_) => config.require_bool(KEY, false),
    }
}

/// Number of key and value heads under `key`.
pub(super) fn kv_heads(decoder: &Decoder<'_>, key: &str, count: usize) -> Result<usize, ConvertError> {
    let count = decoder.config.check_size(key, count, decoder.heads)?;
    if decoder.heads.is_multiple_of(count) {
        return Ok(count);
    }
    let problem = format!("is {count}, which does not divide `num_attention_heads`, {}", decoder.heads);
    Err(decoder.config.refuse(key, problem))
}

/// Which layers have a window: as a list says, or all but every `pattern`-th.
pub(super) fn slides(decoder: &Decoder<'_>, pattern: usize) -> Result<Vec<bool>, ConvertError> {
    let list = decoder.layer_list("layer_types", ["sliding_attention", "full_attention"])?;
    Ok(list.unwrap_or_else(|| (1..=decoder.layers).map(|layer| !layer.is_multiple_of(pattern)).collect()))
}

/// The rotation in `rope_parameters` for the layers of one kind; `None`: it has none of its own.
pub(super) fn of_kind(
    decoder: &Decoder<'_>,
    kind: &str,
    dim: usize,
    theta: f64,
) -> Result<Option<RopeSpec>, ConvertError> {
    let Some(section) = decoder.config.section("rope_parameters")? else { return Ok(None) };
    let Some(section) = section.section(kind)? else { return Ok(None) };
    rope::of_section(&section, dim, RopePairing::Half, theta, decoder.max_positions).map(|rope| Some(rope.spec))
}

/// Rotations of layers without and with a window.
fn rotations(decoder: &Decoder<'_>, head_dim: usize) -> Result<(RopeSpec, RopeSpec), ConvertError> {
    let config = decoder.config;
    let full = match of_kind(decoder, "full_attention", head_dim, DEFAULTS.theta)? {
        Some(full) => full,
        None => rope::read(config, head_dim, RopePairing::Half, DEFAULTS.theta, decoder.max_positions)?.spec,
    };
    let theta = config.check_above("rope_local_base_freq", config.f64_or("rope_local_base_freq", LOCAL_THETA)?, 1.0)?;
    let plain = RopeSpec { pairing: RopePairing::Half, theta, dim: head_dim, scaling: RopeScaling::None };
    Ok((full, of_kind(decoder, "sliding_attention", head_dim, LOCAL_THETA)?.unwrap_or(plain)))
}

/// A feed-forward network without experts.
pub(super) fn dense(decoder: &Decoder<'_>) -> FfnSpec {
    FfnSpec { activation: ActivationSpec::GeluTanh, ..decoder.dense() }
}

/// The model with these layers.
pub(super) fn model(decoder: &Decoder<'_>, layers: Vec<LayerSpec>) -> Result<ModelSpec, ConvertError> {
    const CAP: &str = "final_logit_softcapping";
    let config = decoder.config;
    let cap = config.opt_f64(CAP)?.map(|cap| config.check_above(CAP, cap, 0.0)).transpose()?;
    Ok(ModelSpec {
        factors: Factors { embedding: (decoder.hidden as f64).sqrt() as f32, ..Factors::default() },
        norms: NormsSpec { centred: false, behind: true },
        logit_cap: cap.map(|cap| cap as f32),
        ..decoder.model(layers)?
    })
}

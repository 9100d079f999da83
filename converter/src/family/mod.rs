//! Model families: what `config.json` means and what the tensors are called.
//!
//! A family is one file that implements [`Family`] and contains only the differences; common parts are in `decoder`, `mla`,
//! `indexer`, `gqa`, `delta`, `moe`, `rope` and `names`. `docs/ADDING_A_MODEL.md` explains how to add one.

mod bailing_hybrid;
mod bailing_moe;
pub(crate) mod config;
mod decoder;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v32;
mod deepseek_v4;
pub(crate) mod delta;
mod dense;
mod dots1;
mod ernie4_5_moe;
mod gemma3;
mod gemma4;
mod glm4_moe;
mod glm4_moe_lite;
mod glm_moe_dsa;
mod gpt_oss;
mod gqa;
mod granitemoe;
mod hunyuan_v1_moe;
mod hy_v3;
mod indexer;
mod kimi_k25;
mod kimi_linear;
mod llama4;
mod mimo_v2_flash;
mod minimax_m2;
mod minimax_m3;
mod mixtral;
mod mla;
mod moe;
pub(crate) mod names;
mod nemotron_h;
mod olmoe;
mod phimoe;
pub(crate) mod prediction;
mod qwen;
mod qwen2_moe;
mod qwen3_moe;
mod qwen3_next;
mod qwen4_exp;
mod rope;
mod step3p5;
mod view;

use sluice_format::{ExtentKind, LayerSpec, ModelSpec, TensorShape};

use crate::error::ConvertError;
use crate::nearest;
use config::Config;
use names::Names;
pub(crate) use rope::DIVIDED as DIVIDED_ROPE;
pub(crate) use view::{Origin, Strides, View};

/// Every family that can be converted.
static FAMILIES: &[&dyn Family] = &[
    &deepseek_v2::DeepSeekV2,
    &deepseek_v3::DeepSeekV3,
    &deepseek_v32::DeepSeekV32,
    &deepseek_v4::DeepSeekV4,
    &kimi_k25::KimiK25,
    &kimi_linear::KimiLinear,
    &dots1::Dots1,
    &glm4_moe::Glm4Moe,
    &glm4_moe_lite::Glm4MoeLite,
    &glm_moe_dsa::GlmMoeDsa,
    &gpt_oss::GptOss,
    &qwen2_moe::Qwen2Moe,
    &qwen3_moe::Qwen3Moe,
    &qwen3_next::Qwen3Next,
    &qwen3_next::Qwen35Moe,
    &qwen3_next::Qwen35MoeText,
    &qwen4_exp::Qwen4Exp,
    &qwen4_exp::Qwen4ExpText,
    &minimax_m2::MiniMaxM2,
    &minimax_m3::MiniMaxM3,
    &minimax_m3::MiniMaxM3Text,
    &mixtral::Mixtral,
    &olmoe::Olmoe,
    &phimoe::Phimoe,
    &granitemoe::GraniteMoe,
    &ernie4_5_moe::Ernie45Moe,
    &ernie4_5_moe::Ernie45,
    &hunyuan_v1_moe::HunyuanV1Moe,
    &hy_v3::HyV3,
    &llama4::Llama4,
    &llama4::Llama4Text,
    &mimo_v2_flash::MiMoV2Flash,
    &bailing_moe::BailingMoe,
    &bailing_hybrid::BailingHybrid,
    &nemotron_h::NemotronH,
    &step3p5::Step3p5,
    &step3p5::Step3p7,
    &dense::Llama,
    &dense::Mistral,
    &dense::Qwen3,
    &gemma3::Gemma3,
    &gemma3::Gemma3Text,
    &gemma4::Gemma4,
    &gemma4::Gemma4Text,
];

/// What the converter must know about a family.
pub(crate) trait Family: Sync {
    /// The values of `model_type` for this family.
    fn model_types(&self) -> &'static [&'static str];

    /// The key under which `config.json` describes the text model; `None`: at the top level.
    fn text_section(&self) -> Option<&'static str> {
        None
    }

    /// Whether the token embedding is the output head if `tie_word_embeddings` is missing.
    fn tied_by_default(&self) -> bool {
        false
    }

    /// What the model computes, by its configuration `config` (that of the text model).
    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError>;

    /// The layer for multi-token prediction that checkpoints of the family may have in addition to a decoder with this spec;
    /// `None`: they have none, or it is left out.
    fn prediction(&self, _decoder: &ModelSpec) -> Option<LayerSpec> {
        None
    }

    /// The names of tensors.
    fn names(&self) -> Names {
        Names::USUAL
    }

    /// All spellings of names of tensors; the first is that of the family's own releases.
    fn spellings(&self) -> Vec<Names> {
        vec![self.names()]
    }

    /// The names of tensors, if their shapes show more than the configuration. `shape_of`: the shape of a tensor, if it exists.
    fn arranged(&self, names: Names, _spec: &ModelSpec, _shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Names {
        names
    }

    /// The number of layers, as numbered in names of tensors.
    fn named_layers(&self, spec: &ModelSpec) -> usize {
        spec.layers.len()
    }

    /// Where a tensor after the last layer comes from, except the head: the norm, and what merges streams before it.
    fn final_origin(&self, names: Names, _spec: &ModelSpec, tensor: &TensorShape) -> Origin {
        names.final_origin(tensor)
    }

    /// Where a tensor of an extent comes from, in one of the family's spellings. Called for the tensors in layers that
    /// [`ModelSpec::tensors`] lists, not for embedding, head and the tensors after the last layer.
    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        names.origin(spec, place, tensor)
    }

    /// What the model computes, including what only tensors of the checkpoint define. `spec` is the result of [`Family::spec`],
    /// `parts` that of [`Family::table_parts`].
    ///
    /// # Errors
    /// If a tensor is missing or has impossible contents.
    fn complete(
        &self,
        _names: Names,
        spec: ModelSpec,
        _parts: usize,
        _stored: &dyn Stored,
    ) -> Result<ModelSpec, ConvertError> {
        Ok(spec)
    }

    /// How many tensors each table of n-grams is split into.
    ///
    /// # Errors
    /// If the configuration has no possible number.
    fn table_parts(&self, _config: &Config) -> Result<usize, ConvertError> {
        Ok(0)
    }

    /// The tensors that [`Family::complete`] reads.
    fn deciding(&self, _names: Names, _spec: &ModelSpec) -> Vec<String> {
        Vec::new()
    }

    /// The tensor with a part of a layer's table of n-grams: a range of its rows. All parts but the last have equal length.
    fn table_part(&self, _names: Names, layer: usize, _part: usize) -> String {
        unreachable!("layer {layer} of this family has no table")
    }

    /// Why a tensor that no extent uses may be left out; `None`: it is unknown. Not called for layers after the decoder's.
    fn unused(&self, name: &str) -> Option<Unused> {
        usually_unused(name)
    }
}

/// The tensors of a checkpoint, for families whose models depend on the values of some of them.
pub(crate) trait Stored {
    /// The numbers of a vector of 64-bit integers that must have this length.
    ///
    /// # Errors
    /// If there is no such tensor, or it is something else.
    fn integers(&self, tensor: &str, len: usize) -> Result<Vec<i64>, ConvertError>;

    /// The same for numbers that must not be negative.
    ///
    /// # Errors
    /// As [`Stored::integers`].
    fn unsigned(&self, tensor: &str, len: usize) -> Result<Vec<u64>, ConvertError>;

    /// Rows of a matrix; `None` if no tensor has that name.
    fn rows(&self, tensor: &str) -> Option<usize>;
}

/// An extent, identified by its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Kind of contents.
    pub(crate) kind: ExtentKind,
    /// Layer.
    pub(crate) layer: usize,
    /// Expert, or 0.
    pub(crate) index: usize,
}

/// Why a tensor is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Unused {
    /// Layers that predict further tokens: not needed to generate.
    MultiTokenPrediction,
    /// Encoders of images and sound.
    Vision,
    /// Scales of activations, which are not quantised here.
    ActivationScales,
    /// Constants that follow from the configuration.
    Derived,
    /// Biases and zero points of zeros.
    Zeros,
    /// In neither the index nor the model.
    Unindexed,
}

impl Unused {
    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unused::MultiTokenPrediction => "multi-token prediction layers",
            Unused::Vision => "encoders of images and sound",
            Unused::ActivationScales => "scales of quantised activations",
            Unused::Derived => "constants that follow from the configuration",
            Unused::Zeros => "biases and zero points that are zero",
            Unused::Unindexed => "tensors that neither the index nor the model knows",
        }
    }
}

/// Suffixes of the names of tensors that quantise activations or the KV cache.
const ACTIVATION_SCALES: [&str; 16] = [
    ".input_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".activation_scale",
    ".kv_scale",
    ".kv_cache_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".prob_scale",
    ".prob_output_scale",
];

/// Suffixes of the names of constants that old versions of transformers saved.
const DERIVED: [&str; 5] =
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".position_ids", ".attn.masked_bias"];

/// Some families have prediction layers under `mtp.`; old checkpoints contain rotary frequencies.
fn usually_unused(name: &str) -> Option<Unused> {
    if ["mtp.", "model.mtp.", "language_model.mtp."].iter().any(|prefix| name.starts_with(prefix)) {
        return Some(Unused::MultiTokenPrediction);
    }
    by_its_name(name)
}

/// Why a tensor with this name is not needed in any model.
pub(crate) fn by_its_name(name: &str) -> Option<Unused> {
    if ACTIVATION_SCALES.iter().any(|end| name.ends_with(end)) {
        return Some(Unused::ActivationScales);
    }
    DERIVED.iter().any(|end| name.ends_with(end)).then_some(Unused::Derived)
}

/// The family that `config.json` names.
pub(crate) fn find(config: &Config) -> Result<&'static dyn Family, ConvertError> {
    let supported: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types()).copied().collect();
    let Some(model_type) = config.opt_str("model_type")? else {
        return Err(config.refuse("model_type", format!("is missing; supported: {}", supported.join(", "))));
    };
    let found = FAMILIES.iter().find(|f| f.model_types().contains(&model_type)).copied();
    let found = found.ok_or_else(|| config.refuse("model_type", nearest::refusal(model_type, &supported)))?;
    check_class(config, found)?;
    Ok(found)
}

/// Refuses a class of transformers that belongs to another supported family than `model_type`: one of both is wrong, and which one is
/// not for this program to say. Classes that nothing here is called after are no reason.
fn check_class(config: &Config, found: &dyn Family) -> Result<(), ConvertError> {
    let named = config.opt_list("architectures")?.and_then(|list| list.first()?.as_str());
    let Some((class, _)) = named.and_then(|named| named.split_once("For")) else { return Ok(()) };
    let plain = |name: &str| name.replace('_', "").to_lowercase();
    let class = plain(class);
    // A text model alone has the class of the whole.
    let is_of = |family: &dyn Family| {
        family.model_types().iter().any(|name| plain(name.strip_suffix("_text").unwrap_or(name)) == class)
    };
    let other = FAMILIES.iter().find(|family| is_of(**family)).filter(|_| !is_of(found));
    let Some(other) = other else { return Ok(()) };
    let problem = format!(
        "is {:?}, a class of `{}`, which `model_type` is not: correct the one that is wrong",
        named.unwrap_or_default(),
        other.model_types()[0]
    );
    Err(config.refuse("architectures", problem))
}

/// What the model computes according to its configuration `spec` and the tensors of its checkpoint; validated.
pub(crate) fn complete(
    family: &dyn Family,
    text: &Config,
    names: Names,
    spec: ModelSpec,
    parts: usize,
    stored: &dyn Stored,
) -> Result<ModelSpec, ConvertError> {
    let spec = family.complete(names, spec, parts, stored)?;
    spec.validate().map_err(|problem| text.impossible(problem))?;
    Ok(spec)
}

/// What the model described by `text` computes; validated.
pub(crate) fn spec(family: &dyn Family, text: &Config) -> Result<ModelSpec, ConvertError> {
    let spec = family.spec(text)?;
    spec.validate().map_err(|problem| text.impossible(problem))?;
    Ok(spec)
}

/// The section of `config.json` that describes the text model; `None`: the whole file does.
pub(crate) fn text(family: &dyn Family, config: &Config) -> Result<Option<Config>, ConvertError> {
    let Some(key) = family.text_section() else { return Ok(None) };
    let section = config.section(key)?;
    section.map(Some).ok_or_else(|| config.refuse(key, "is missing: it describes the text model"))
}

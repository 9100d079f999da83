//! Llama, Mistral and Qwen3 without experts: each layer is streamed as a whole.

use sluice_format::{AttentionSpec, GqaSpec, ModelSpec, QkNormScope};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, gqa, qwen};
use crate::error::ConvertError;

/// Llama 2 and 3.
pub(crate) struct Llama;

const LLAMA: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    max_positions: 2048,
    norm_eps: 1e-6,
    theta: 1e4,
};

impl Family for Llama {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_bool("mlp_bias", false)?;
        let decoder = Decoder::read(config, &LLAMA)?;
        let bias = config.bool_or("attention_bias", false)?;
        let attention = GqaSpec { qkv_bias: bias, o_bias: bias, ..gqa::read(&decoder, gqa::Heads::USUAL)? };
        dense(&decoder, attention)
    }
}

/// Mistral, with or without a window.
pub(crate) struct Mistral;

const MISTRAL: Defaults = Defaults { intermediate: 14_336, kv_heads: Some(8), max_positions: 131_072, ..LLAMA };

/// The window if `sliding_window` is missing; files of models without a window have null.
const MISTRAL_WINDOW: usize = 4096;

impl Family for Mistral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &MISTRAL)?;
        let window = gqa::window(&decoder, Some(MISTRAL_WINDOW))?;
        dense(&decoder, GqaSpec { window, ..gqa::read(&decoder, gqa::Heads::USUAL)? })
    }
}

/// Qwen3 without experts.
pub(crate) struct Qwen3;

const QWEN3: Defaults =
    Defaults { vocab: 151_936, intermediate: 22_016, kv_heads: Some(32), max_positions: 32_768, ..LLAMA };
const QWEN3_HEAD_DIM: usize = 128;

impl Family for Qwen3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &QWEN3)?;
        qwen::require_full_attention(&decoder)?;
        let bias = config.bool_or("attention_bias", false)?;
        let heads = gqa::Heads { head_dim: Some(QWEN3_HEAD_DIM), ..gqa::Heads::USUAL };
        let qk_norm = gqa::qk_norm(&decoder, QkNormScope::Head);
        let attention = GqaSpec { qkv_bias: bias, o_bias: bias, qk_norm, ..gqa::read(&decoder, heads)? };
        dense(&decoder, attention)
    }
}

fn dense(decoder: &Decoder<'_>, attention: GqaSpec) -> Result<ModelSpec, ConvertError> {
    decoder.uniform(AttentionSpec::Gqa(attention), &decoder.dense(), &vec![false; decoder.layers])
}

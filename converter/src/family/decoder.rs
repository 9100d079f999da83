//! The part of `config.json` that all decoders have.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{
    ActivationSpec, AttentionSpec, Factors, FfnSpec, LayerSpec, ModelSpec, NormsSpec, RopeScaling, RopeSpec,
    SPEC_VERSION,
};

use super::config::Config;
use crate::error::ConvertError;

/// Values for missing keys, as in transformers.
pub(crate) struct Defaults {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    /// `None`: as many as query heads.
    pub(crate) kv_heads: Option<usize>,
    pub(crate) max_positions: usize,
    pub(crate) norm_eps: f64,
    pub(crate) theta: f64,
}

/// The keys that all decoders share.
pub(crate) struct Decoder<'a> {
    pub(crate) config: &'a Config,
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    /// Width of a dense feed-forward network.
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) max_positions: usize,
    pub(crate) norm_eps: f32,
    /// Base of the rotary frequencies if the configuration has none.
    pub(crate) theta: f64,
}

impl<'a> Decoder<'a> {
    pub(crate) fn read(config: &'a Config, defaults: &Defaults) -> Result<Self, ConvertError> {
        Self::read_as(config, defaults, &["silu", "swish"])
    }

    /// Reads the keys of a family whose `hidden_act` may be one of `activations`.
    pub(crate) fn read_as(config: &'a Config, defaults: &Defaults, activations: &[&str]) -> Result<Self, ConvertError> {
        config.require_str("hidden_act", activations)?;
        let heads = config.size_or("num_attention_heads", defaults.heads, MAX_WIDTH)?;
        Ok(Decoder {
            config,
            vocab: config.size_or("vocab_size", defaults.vocab, MAX_LENGTH)?,
            hidden: config.size_or("hidden_size", defaults.hidden, MAX_WIDTH)?,
            intermediate: config.usize_or("intermediate_size", defaults.intermediate)?,
            layers: config.size_or("num_hidden_layers", defaults.layers, ModelSpec::MAX_LAYERS)?,
            heads,
            // Null means that keys and values are not shared.
            kv_heads: config.opt_usize_or("num_key_value_heads", defaults.kv_heads)?.unwrap_or(heads),
            max_positions: config.size_or("max_position_embeddings", defaults.max_positions, MAX_LENGTH)?,
            norm_eps: config.f32_or("rms_norm_eps", defaults.norm_eps)?,
            theta: defaults.theta,
        })
    }

    /// A feed-forward network without experts.
    pub(crate) fn dense(&self) -> FfnSpec {
        FfnSpec { activation: ActivationSpec::Silu, dense_width: self.intermediate, ..FfnSpec::NONE }
    }

    /// The model with these layers.
    pub(crate) fn model(&self, layers: Vec<LayerSpec>) -> Result<ModelSpec, ConvertError> {
        if layers.iter().any(|layer| layer.ffn.moe.is_none()) {
            // If all layers have experts, this key may have any value.
            self.config.check_size("intermediate_size", self.intermediate, MAX_WIDTH)?;
        }
        Ok(ModelSpec {
            version: SPEC_VERSION,
            family: self.config.opt_str("model_type")?.unwrap_or_default().to_owned(),
            vocab_size: self.vocab,
            hidden_size: self.hidden,
            max_positions: self.max_positions.max(extended_positions(&layers)),
            norm_eps: self.norm_eps,
            factors: Factors::default(),
            norms: NormsSpec::default(),
            layer_scale: false,
            head_bias: false,
            logit_cap: None,
            streams: None,
            gated_streams: None,
            ngrams: Vec::new(),
            layers,
            prediction: None,
        })
    }

    /// The model whose layers all have the same attention, and `sparse` or `dense` according to `is_sparse`.
    pub(crate) fn uniform(
        &self,
        attention: AttentionSpec,
        sparse: &FfnSpec,
        is_sparse: &[bool],
    ) -> Result<ModelSpec, ConvertError> {
        let dense = self.dense();
        let layer = |&is_sparse: &bool| LayerSpec {
            attention: attention.clone(),
            ffn: if is_sparse { sparse.clone() } else { dense.clone() },
        };
        self.model(is_sparse.iter().map(layer).collect())
    }

    /// The list under `key` with one entry per layer, if there is one: whether each entry is `yes` instead of `no`.
    pub(crate) fn layer_list(&self, key: &str, [yes, no]: [&str; 2]) -> Result<Option<Vec<bool>>, ConvertError> {
        let Some(list) = self.config.opt_list(key)? else { return Ok(None) };
        if list.len() != self.layers {
            let problem = format!("has {} entries for {} layers", list.len(), self.layers);
            return Err(self.config.refuse(key, problem));
        }
        let is_yes = |kind: &serde_json::Value| match kind.as_str() {
            Some(kind) if kind == yes => Ok(true),
            Some(kind) if kind == no => Ok(false),
            _ => Err(self.config.refuse(key, format!("holds {kind}; supported: \"{yes}\", \"{no}\""))),
        };
        list.iter().map(is_yes).collect::<Result<_, _>>().map(Some)
    }
}

/// The number of positions to which YaRN extends a context, counted as in vLLM: following model cards, users set only
/// `rope_scaling` to switch it on, and do not change `max_position_embeddings`.
fn extended_positions(layers: &[LayerSpec]) -> usize {
    let rope = |layer: &LayerSpec| match &layer.attention {
        AttentionSpec::Mla(mla) => mla.rope.clone(),
        AttentionSpec::Gqa(gqa) => gqa.rope.clone(),
        AttentionSpec::Compressed(compressed) => Some(compressed.rope.clone()),
        AttentionSpec::Delta(_) | AttentionSpec::Mamba(_) => None,
    };
    let extended = |rope: RopeSpec| match rope.scaling {
        RopeScaling::Yarn { factor, original_max_positions, .. } => (original_max_positions as f64 * factor) as usize,
        _ => 0,
    };
    layers.iter().filter_map(rope).map(extended).max().unwrap_or(0).min(MAX_LENGTH)
}

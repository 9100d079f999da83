//! The normalised hyperparameters: what a model computes, whatever its family calls it.
//!
//! The converter translates a family's `config.json` into a [`ModelSpec`]; the runtime executes specs and knows no family.
//! Stored as JSON in the metadata, versioned by [`SPEC_VERSION`], and validated on both sides.

mod compressed;
mod delta;
mod factors;
mod gqa;
mod indexer;
mod key_blocks;
mod mamba;
mod ngrams;
mod norms;
mod prediction;
mod streams;
mod temperature;

use serde::{Deserialize, Serialize};

use crate::extent::{ExtentRecord, NO_LAYER};
use crate::limits::{
    MAX_EXPERTS, MAX_FAMILY_NAME, MAX_LAYERS, MAX_LENGTH, MAX_MODEL_EXPERTS, MAX_SPEC_BYTES, MAX_WIDTH,
};
pub use compressed::{CompressedSpec, CompressionSpec, EntryIndexerSpec};
pub use delta::DeltaSpec;
pub use factors::Factors;
pub use gqa::{GqaSpec, QkNorm, QkNormScope};
pub use indexer::IndexerSpec;
pub use key_blocks::{BlockScore, KeyBlocksSpec};
pub use mamba::MambaSpec;
pub use ngrams::{NgramHead, NgramSpec};
pub use norms::NormsSpec;
pub use prediction::PredictionSpec;
pub use streams::{GatedStreamsSpec, StreamsSpec};
pub use temperature::QueryTemperature;

/// Version of the JSON; an unknown one is refused.
pub const SPEC_VERSION: u32 = 1;

/// What a model computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// [`SPEC_VERSION`].
    pub version: u32,
    /// The source's `model_type`, for reports only.
    pub family: String,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream, or of each of several.
    pub hidden_size: usize,
    /// Longest context that the model was made for, in tokens.
    pub max_positions: usize,
    /// Epsilon of the norms before attention, before the feed-forward part and before the head.
    pub norm_eps: f32,
    /// Factors on embedding, residual stream and logits.
    #[serde(default, skip_serializing_if = "Factors::are_one")]
    pub factors: Factors,
    /// The kind of the norms of the residual stream, and where they stand.
    #[serde(default, skip_serializing_if = "NormsSpec::are_usual")]
    pub norms: NormsSpec,
    /// Whether the output of a layer is multiplied by a number that is one of its weights.
    #[serde(default, skip_serializing_if = "is_false")]
    pub layer_scale: bool,
    /// Whether the output head has a bias.
    #[serde(default, skip_serializing_if = "is_false")]
    pub head_bias: bool,
    /// Bounds logits `x` smoothly: `cap · tanh(x / cap)` (Gemma 2, arXiv:2408.00118, section 2); `None`: not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_cap: Option<f32>,
    /// How several streams form the residual; `None`: there is one stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<StreamsSpec>,
    /// How gates join several streams; `None`: they do not. A model has one kind of streams or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gated_streams: Option<GatedStreamsSpec>,
    /// Tables of n-grams, at most one per layer, in the order of layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ngrams: Vec<NgramSpec>,
    /// One entry per decoder layer.
    pub layers: Vec<LayerSpec>,
    /// The layer behind them that predicts the token after the next one; `None`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PredictionSpec>,
}

/// One decoder layer: `x += attention(norm(x)); x += ffn(norm(x))`, with [`Factors::residual`] on what is added. A layer without
/// feed-forward part ([`FfnSpec::NONE`]) has only the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// The token mixer.
    pub attention: AttentionSpec,
    /// The feed-forward part.
    pub ffn: FfnSpec,
}

/// The token mixer of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AttentionSpec {
    /// Multi-head latent attention.
    Mla(MlaSpec),
    /// Grouped-query attention.
    Gqa(GqaSpec),
    /// Gated delta net.
    Delta(DeltaSpec),
    /// Mamba-2.
    Mamba(MambaSpec),
    /// A sliding window and compressed entries.
    Compressed(CompressedSpec),
}

/// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) in the absorbed form: the cache holds one
/// normalised latent of `kv_lora_rank` and one rotated key of `qk_rope_head_dim` values per token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlaSpec {
    /// Query heads.
    pub heads: usize,
    /// Rank of the query's low-rank factorisation; `None`: one full matrix.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Width of the part of a head's query and key that carries no position.
    pub qk_nope_head_dim: usize,
    /// Width of the part that is rotated.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Epsilon of the norms inside (not the layer's).
    pub latent_norm_eps: f32,
    /// Factor on the scores before the softmax.
    pub softmax_scale: f32,
    /// Rotation of the positional part; `None`: the layer knows no positions, and the part is as the projections give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeSpec>,
    /// Limits attention to the tokens that an indexer chooses; `None`: all before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub indexer: Option<IndexerSpec>,
    /// Whether the output of each head is multiplied by the sigmoid of a projection of the input to one number per head.
    #[serde(default, skip_serializing_if = "is_false")]
    pub head_gate: bool,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeSpec {
    /// Which elements form a pair.
    pub pairing: RopePairing,
    /// Base of the frequencies.
    pub theta: f64,
    /// Number of rotated elements, even.
    pub dim: usize,
    /// Change of the frequencies for contexts longer than those trained on.
    pub scaling: RopeScaling,
}

/// Which elements form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopePairing {
    /// `(i, i + dim/2)`.
    Half,
    /// `(2i, 2i + 1)`.
    Interleaved,
}

/// Change of the rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    None,
    /// Position interpolation (arXiv:2306.15595): all frequencies are divided by the same number.
    Linear {
        /// Extension factor.
        factor: f64,
    },
    /// Every frequency is divided by a number of its own.
    Divided {
        /// One for each pair of elements, the fastest first.
        divisors: Vec<f32>,
        /// Factor on cosine and sine.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        attention_factor: f64,
    },
    /// Only the fastest pairs turn, and the others stand still; frequencies are those of `dim` elements.
    Partial {
        /// Pairs that turn, at most `dim / 2`.
        pairs: usize,
    },
    /// YaRN (arXiv:2309.00071): interpolates low frequencies by `factor`, keeps high ones, ramps between.
    Yarn {
        /// Extension factor.
        factor: f64,
        /// Context length that the model was trained on.
        original_max_positions: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated.
        beta_slow: f64,
        /// Whether the bounds of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
    /// Llama 3.1: keeps wavelengths below `L / high_freq_factor`, divides the frequency of those above
    /// `L / low_freq_factor`, ramps between, with `L` the original context.
    Llama3 {
        /// Extension factor.
        factor: f64,
        /// Context length that the model was trained on, `L`.
        original_max_positions: usize,
        /// See above.
        low_freq_factor: f64,
        /// See above; larger than the low one.
        high_freq_factor: f64,
    },
}

/// The feed-forward part of a layer: what is computed for every token, plus the routed experts. With neither, the layer
/// has none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnSpec {
    /// Activation of dense part and experts.
    pub activation: ActivationSpec,
    /// Activation of the dense part if it has another; `None`: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_activation: Option<ActivationSpec>,
    /// Width of the dense feed-forward network or of all shared experts together; 0: none.
    pub dense_width: usize,
    /// Whether the dense part's output is multiplied by the sigmoid of a projection of the input to one number.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dense_gate: bool,
    /// The routed experts; `None` in a dense layer.
    pub moe: Option<MoeSpec>,
}

/// Activation of a feed-forward network, which joins the products of two matrices, gate and up, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ActivationSpec {
    /// `silu(gate) · up` (SwiGLU, arXiv:2002.05202).
    Silu,
    /// gpt-oss: `(clamp(up, ±limit) + 1) · g · sigmoid(alpha · g)` with `g = min(gate, limit)`.
    SwigluOai {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound.
        limit: f32,
    },
    /// `silu(min(gate, limit)) · clamp(up, ±limit)`.
    SiluClamped {
        /// Bound.
        limit: f32,
    },
    /// `gelu(gate) · up` (GeGLU, arXiv:2002.05202), with the approximation by tanh (arXiv:1606.08415, section 2).
    GeluTanh,
    /// `min(silu(gate), limit) · clamp(up, ±limit)`.
    SiluBounded {
        /// Bound.
        limit: f32,
    },
    /// `max(up, 0)²` (arXiv:2109.08668): there is no gate.
    ReluSquared,
}

impl ActivationSpec {
    /// Whether it joins a gate with up.
    pub fn is_gated(self) -> bool {
        self != ActivationSpec::ReluSquared
    }

    fn validate(self) -> Result<(), String> {
        let bound = |limit: f32| limit.is_finite() && limit > 0.0;
        match self {
            ActivationSpec::SwigluOai { alpha, limit } if !(alpha.is_finite() && bound(limit)) => {
                Err(format!("its activation has alpha {alpha} and limit {limit}"))
            }
            ActivationSpec::SiluClamped { limit } | ActivationSpec::SiluBounded { limit } if !bound(limit) => {
                Err(format!("its activation has limit {limit}"))
            }
            _ => Ok(()),
        }
    }
}

/// The routed experts of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeSpec {
    /// Number of experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of one expert.
    pub width: usize,
    /// Width of the input and output of experts. One projection makes their input from the layer's, and another one makes the layer's
    /// output from theirs (LatentMoE, arXiv:2601.18089). `None`: the hidden size, without projections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<usize>,
    /// Whether gate, up and down projections have biases.
    #[serde(default, skip_serializing_if = "is_false")]
    pub expert_bias: bool,
    /// Whether an expert's weight multiplies its input instead of its output.
    #[serde(default, skip_serializing_if = "is_false")]
    pub weighted_input: bool,
    /// Whether dense part, experts and router each have a norm of their own before them, and dense part and experts each an RMS norm
    /// behind them, before they are added to each other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub apart: bool,
    /// How the experts of a token and their weights are chosen.
    pub router: RouterSpec,
}

/// How a token's experts and their weights follow from the router's logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterSpec {
    /// Score of an expert from its logit.
    pub score: RouterScore,
    /// Factor on the logits; `None`: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_factor: Option<f32>,
    /// Whether a bias is added to the logits.
    #[serde(default, skip_serializing_if = "is_false")]
    pub logit_bias: bool,
    /// Whether a bias is added to the scores for the choice (not for the weights).
    pub choice_bias: bool,
    /// Limits the choice to the best groups of experts.
    pub groups: Option<RouterGroups>,
    /// Divides the chosen weights by their sum plus this; `None`: not.
    pub renormalise: Option<f32>,
    /// The least that the chosen weights are divided by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_sum: Option<f32>,
    /// Factor on the weights.
    pub scale: f32,
    /// Whether each expert has a factor of its own on its weight as well.
    #[serde(default, skip_serializing_if = "is_false")]
    pub expert_scale: bool,
    /// Rows of a table that gives the experts of each token by its id, whatever the scores, which are still the weights;
    /// `None`: the scores decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_table: Option<usize>,
}

/// Score of an expert from its logit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// `1 / (1 + exp(-logit))`.
    Sigmoid,
    /// Softmax over all experts.
    Softmax,
    /// `sqrt(ln(1 + exp(logit)))`.
    SqrtSoftplus,
    /// The logit itself; the weights are the softmax over the chosen logits.
    SoftmaxOfChosen,
    /// The logit itself; the weights are the sigmoids of the chosen logits.
    SigmoidOfChosen,
    /// The logit `l` itself. With `m` the largest logit among the experts that are not chosen yet, the weight of the next one
    /// is its share in the softmax over those of them with `(m − l) / max(|l|, m) ≤ 2 · jitter`: SparseMixer at inference
    /// (arXiv:2310.00811; GRIN, arXiv:2409.12136, section 2.2).
    SparseMixer {
        /// Half of the distance from the largest logit, as a part of it, within which an expert counts.
        jitter: f32,
    },
}

/// Group-limited choice (DeepSeek-V2, section 2.2.2; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterGroups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups that stay.
    pub keep: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// Sum of its two best scores, bias included; experts of other groups cannot be chosen (DeepSeek-V3).
    TopTwoSum,
    /// Its best score; experts of other groups compete with score 0 (DeepSeek-V2).
    Max,
}

impl ModelSpec {
    /// Most decoder layers that a spec may have.
    pub const MAX_LAYERS: usize = MAX_LAYERS;

    /// Parses and validates the JSON; `Err` says what is wrong.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        /// The one field that every version has: read first, because another version may have other fields.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if bytes.len() > MAX_SPEC_BYTES {
            return Err(format!("it has {} bytes, more than {MAX_SPEC_BYTES}", bytes.len()));
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        check_version(version)?;
        let spec: ModelSpec = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        spec.validate()?;
        Ok(spec)
    }

    /// Serialises to the JSON of the metadata.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("plain data with string keys always serialises")
    }

    /// Checks that every dimension is sane and that they fit together; `Err` says which does not. No size that follows from
    /// a valid spec overflows 64 bits.
    pub fn validate(&self) -> Result<(), String> {
        check_version(self.version)?;
        let family_ok = self.family.bytes().all(|b| b.is_ascii_graphic());
        if !family_ok || self.family.is_empty() || self.family.len() > MAX_FAMILY_NAME {
            return Err("its family is not a name".into());
        }
        check_range("vocab_size", self.vocab_size, MAX_LENGTH)?;
        check_range("max_positions", self.max_positions, MAX_LENGTH)?;
        check_width("hidden_size", self.hidden_size)?;
        check_eps("norm_eps", self.norm_eps)?;
        self.factors.validate()?;
        if self.logit_cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
            return Err("logit_cap is not a positive number".into());
        }
        if self.layer_scale && self.layers.iter().any(|layer| layer.ffn.is_none()) {
            return Err("it has a scale for a layer without feed-forward part".into());
        }
        if self.streams.is_some() && (self.norms.behind || self.layer_scale) {
            return Err("it has norms or a scale behind its layers' parts beside several streams".into());
        }
        if let Some(streams) = &self.streams {
            streams.validate(self.hidden_size)?;
        }
        if let Some(streams) = &self.gated_streams {
            streams.validate(self.hidden_size)?;
        }
        if self.streams.is_some() && self.gated_streams.is_some() {
            return Err("it has two kinds of streams".to_owned());
        }
        if (self.streams.is_some() || self.gated_streams.is_some()) && self.factors.residual != 1.0 {
            return Err("it has a factor on the residual beside several streams".to_owned());
        }
        if self.layers.is_empty() || self.layers.len() > Self::MAX_LAYERS {
            return Err(format!("it has {} layers", self.layers.len()));
        }
        self.layers.iter().enumerate().try_for_each(|(i, layer)| {
            layer.attention.validate().and_then(|()| layer.ffn.validate()).map_err(|e| format!("layer {i}: {e}"))
        })?;
        let (residual, layers) = (self.residual_width(), self.layers.len());
        self.ngrams.iter().try_for_each(|ngrams| ngrams.validate(residual, layers))?;
        if !self.ngrams.is_sorted_by(|a, b| a.layer < b.layer) {
            return Err("its tables of n-grams are not in the order of layers, one for each at most".to_owned());
        }
        let streams = self.streams.is_some() || self.gated_streams.is_some();
        if streams && self.layers.iter().any(|layer| layer.ffn.is_none()) {
            return Err("it has several streams and a layer without feed-forward part".to_owned());
        }
        let apart = |layer: &LayerSpec| layer.ffn.moe.as_ref().is_some_and(|moe| moe.apart);
        if self.gated_streams.is_some() && (self.norms.centred || self.layers.iter().any(apart)) {
            return Err("it has gated streams, and layer norms or experts apart from the dense part".to_owned());
        }
        if let Some(prediction) = &self.prediction {
            prediction.validate(self).map_err(|e| format!("prediction layer: {e}"))?;
        }
        // Each is an extent, and laying out a file may loop over all of them.
        let experts: usize = self.all_layers().filter_map(|l| l.ffn.moe.as_ref()).map(|m| m.experts).sum();
        if experts > MAX_MODEL_EXPERTS {
            return Err(format!("its layers have {experts} experts together; a model has {MAX_MODEL_EXPERTS} at most"));
        }
        let indexers = self.layers.iter().filter_map(|l| match &l.attention {
            AttentionSpec::Mla(m) => m.indexer.as_ref(),
            _ => None,
        });
        match indexers.take(1).any(|first| first.shared) {
            true => Err("its first indexer is shared, and there is none before it".into()),
            false => Ok(()),
        }
    }

    /// The layers of the file in the order of their numbers: those of the decoder, then the prediction layer, if there is one.
    pub fn all_layers(&self) -> impl Iterator<Item = &LayerSpec> {
        self.layers.iter().chain(self.prediction.as_ref().map(|prediction| &prediction.layer))
    }

    /// The layer of the file with this number; `None` if there are fewer.
    pub fn layer(&self, number: usize) -> Option<&LayerSpec> {
        self.layers.get(number).or_else(|| self.all_layers().nth(number))
    }

    /// Whether generating text needs an extent: all but those of a prediction layer.
    pub fn decodes(&self, extent: &ExtentRecord) -> bool {
        extent.layer == NO_LAYER || (extent.layer as usize) < self.layers.len()
    }

    /// Number of the prediction layer in the file, where it stands behind the layers of the decoder. `None` if there
    /// is none.
    pub fn prediction_layer(&self) -> Option<usize> {
        self.prediction.as_ref().map(|_| self.layers.len())
    }

    /// The prediction layer as a model of one layer: it remembers as much of a sequence, and takes as much scratch, as such a model.
    /// `None` if there is none.
    pub fn prediction_model(&self) -> Option<ModelSpec> {
        let layers = vec![self.prediction.as_ref()?.layer.clone()];
        Some(ModelSpec { layers, prediction: None, ..self.clone() })
    }

    /// Numbers of the residual of one token: of all streams.
    pub fn residual_width(&self) -> usize {
        let gated = || self.gated_streams.as_ref().map(|streams| streams.count);
        self.hidden_size * self.streams.as_ref().map(|streams| streams.count).or_else(gated).unwrap_or(1)
    }

    /// The table of n-grams of a layer.
    pub fn ngrams_of(&self, layer: usize) -> Option<&NgramSpec> {
        self.ngrams.iter().find(|ngrams| ngrams.layer == layer)
    }

    /// Experts that one token routes to, over all layers of the decoder.
    pub fn routed_per_token(&self) -> usize {
        self.layers.iter().filter_map(|l| l.ffn.moe.as_ref()).map(|m| m.top_k).sum()
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

fn check_version(version: u32) -> Result<(), String> {
    if version != SPEC_VERSION {
        return Err(format!("its version is {version}, this program reads {SPEC_VERSION}"));
    }
    Ok(())
}

fn check_range(name: &str, value: usize, max: usize) -> Result<(), String> {
    if value == 0 || value > max {
        return Err(format!("{name} is {value}, outside 1..={max}"));
    }
    Ok(())
}

fn check_width(name: &str, value: usize) -> Result<(), String> {
    check_range(name, value, MAX_WIDTH)
}

fn check_eps(name: &str, value: f32) -> Result<(), String> {
    if !(value.is_finite() && value >= 0.0) {
        return Err(format!("{name} is {value}"));
    }
    Ok(())
}

impl AttentionSpec {
    fn validate(&self) -> Result<(), String> {
        match self {
            AttentionSpec::Mla(m) => m.validate(),
            AttentionSpec::Gqa(g) => g.validate(),
            AttentionSpec::Delta(d) => d.validate(),
            AttentionSpec::Mamba(m) => m.validate(),
            AttentionSpec::Compressed(c) => c.validate(),
        }
    }
}

impl MlaSpec {
    fn validate(&self) -> Result<(), String> {
        for (name, value) in [
            ("heads", self.heads),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
            (
                "heads × head width",
                self.heads.saturating_mul(self.qk_nope_head_dim.saturating_add(self.qk_rope_head_dim)),
            ),
            ("heads × v_head_dim", self.heads.saturating_mul(self.v_head_dim)),
        ] {
            check_width(name, value)?;
        }
        check_eps("latent_norm_eps", self.latent_norm_eps)?;
        if !self.softmax_scale.is_finite() {
            return Err(format!("softmax_scale is {}", self.softmax_scale));
        }
        let Some(rope) = &self.rope else {
            return if self.indexer.is_none() { Ok(()) } else { Err("an indexer needs positions".into()) };
        };
        if rope.dim != self.qk_rope_head_dim {
            return Err(format!("rope.dim is {}, not qk_rope_head_dim {}", rope.dim, self.qk_rope_head_dim));
        }
        if let Some(indexer) = &self.indexer {
            indexer.validate(rope.dim, self.q_lora_rank.is_some())?;
        }
        rope.validate()
    }
}

impl RopeSpec {
    fn validate(&self) -> Result<(), String> {
        if !self.dim.is_multiple_of(2) || self.dim == 0 {
            return Err(format!("rope.dim is {}, not even", self.dim));
        }
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return Err(format!("rope.theta is {}", self.theta));
        }
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } if factor.is_finite() && factor > 0.0 => Ok(()),
            RopeScaling::Linear { factor } => Err(format!("its linear rope factor is {factor}")),
            RopeScaling::Divided { ref divisors, .. } if divisors.len() != self.dim / 2 => {
                Err(format!("rope.dim is {}, and there are {} divisors", self.dim, divisors.len()))
            }
            RopeScaling::Divided { attention_factor, .. }
                if !(attention_factor.is_finite() && attention_factor > 0.0) =>
            {
                Err(format!("its rope's attention_factor is {attention_factor}"))
            }
            RopeScaling::Divided { ref divisors, .. } => {
                match divisors.iter().find(|d| !(d.is_normal() && **d > 0.0)) {
                    None => Ok(()),
                    Some(divisor) => Err(format!("a rope divisor is {divisor}")),
                }
            }
            RopeScaling::Partial { pairs } if pairs == 0 || pairs > self.dim / 2 => {
                Err(format!("{pairs} pairs turn of the {} elements of rope.dim", self.dim))
            }
            RopeScaling::Partial { .. } => Ok(()),
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor, .. } => {
                check_range("original_max_positions", original_max_positions, MAX_LENGTH)?;
                let sane = |v: f64| v.is_finite() && v > 0.0;
                if [factor, beta_fast, beta_slow, attention_factor].into_iter().all(sane) {
                    Ok(())
                } else {
                    Err("a YaRN parameter is not a positive number".into())
                }
            }
            RopeScaling::Llama3 { factor, original_max_positions, low_freq_factor, high_freq_factor } => {
                check_range("original_max_positions", original_max_positions, MAX_LENGTH)?;
                let sane = |v: f64| v.is_finite() && v > 0.0;
                if sane(factor)
                    && sane(low_freq_factor)
                    && sane(high_freq_factor)
                    && high_freq_factor >= low_freq_factor
                {
                    Ok(())
                } else {
                    Err("the Llama 3 rope parameters do not fit together".into())
                }
            }
        }
    }
}

impl FfnSpec {
    /// What a layer without feed-forward part has.
    pub const NONE: FfnSpec = FfnSpec {
        activation: ActivationSpec::Silu,
        dense_activation: None,
        dense_width: 0,
        dense_gate: false,
        moe: None,
    };

    /// Whether there is no feed-forward part.
    pub fn is_none(&self) -> bool {
        self.dense_width == 0 && self.moe.is_none()
    }

    /// Activation of the dense part.
    pub fn dense_activation(&self) -> ActivationSpec {
        self.dense_activation.unwrap_or(self.activation)
    }

    fn validate(&self) -> Result<(), String> {
        if self.dense_width > 0 {
            check_width("dense_width", self.dense_width)?;
        }
        if self.dense_gate && self.dense_width == 0 {
            return Err("it gates a dense part that it does not have".into());
        }
        self.activation.validate()?;
        self.dense_activation().validate()?;
        if self.dense_activation().is_gated() != self.activation.is_gated() {
            return Err("only one of its dense part and its experts has a gate".into());
        }
        match &self.moe {
            None => Ok(()),
            Some(moe) if moe.apart && moe.latent.is_some() => {
                Err("its experts are apart from the dense part, and compute in a space of their own".into())
            }
            Some(moe) if moe.apart && self.dense_width == 0 => {
                Err("its experts are apart from a dense part that it does not have".into())
            }
            Some(moe) if moe.expert_bias && !self.activation.is_gated() => {
                Err("its experts have biases and no gate".into())
            }
            Some(moe) => moe.validate(),
        }
    }
}

impl MoeSpec {
    /// Width of the input and output of experts.
    pub fn input_width(&self, hidden_size: usize) -> usize {
        self.latent.unwrap_or(hidden_size)
    }

    fn validate(&self) -> Result<(), String> {
        check_range("experts", self.experts, MAX_EXPERTS)?;
        check_width("width", self.width)?;
        check_width("latent", self.latent.unwrap_or(1))?;
        if self.latent.is_some() && self.weighted_input {
            return Err("a weight multiplies the input of its experts, which is a projection".into());
        }
        if self.top_k == 0 || self.top_k > self.experts {
            return Err(format!("top_k is {} of {} experts", self.top_k, self.experts));
        }
        if !self.router.scale.is_finite() {
            return Err(format!("router.scale is {}", self.router.scale));
        }
        if let Some(eps) = self.router.renormalise {
            check_eps("router.renormalise", eps)?;
        }
        check_eps("router.least_sum", self.router.least_sum.unwrap_or(0.0))?;
        if self.router.logit_factor.is_some_and(|factor| !factor.is_finite()) {
            return Err("router.logit_factor is not a number".into());
        }
        if let RouterScore::SparseMixer { jitter } = self.router.score {
            check_eps("router.score.jitter", jitter)?;
            if self.router.choice_bias || self.router.groups.is_some() || self.router.token_table.is_some() {
                return Err("its sparse mixer chooses by logits alone".into());
            }
        }
        if let Some(rows) = self.router.token_table {
            check_range("router.token_table", rows, MAX_LENGTH)?;
            check_range("router.token_table × top_k", rows.saturating_mul(self.top_k), MAX_LENGTH)?;
        }
        let Some(g) = &self.router.groups else { return Ok(()) };
        if g.count == 0 || !self.experts.is_multiple_of(g.count) || g.keep == 0 || g.keep > g.count {
            return Err(format!("{} of {} groups of {} experts", g.keep, g.count, self.experts));
        }
        if g.score == GroupScore::TopTwoSum && g.count == self.experts {
            return Err("a group of one expert has no two best scores".into());
        }
        if g.score == GroupScore::TopTwoSum && g.keep * (self.experts / g.count) < self.top_k {
            return Err(format!("the {} groups that stay hold fewer than {} experts", g.keep, self.top_k));
        }
        Ok(())
    }
}

//! Rebuilds the `config.json` of the original checkpoint from the keys and tensors of a GGUF file. If both disagree, the tensors
//! decide: tools that remove experts from a model leave `expert_count` unchanged.

mod gemma;
mod nemotron;
mod own;
mod qwen4;
mod step;

use serde_json::{Value as Json, json};
use sluice_format::ModelSpec;

use super::arch::Arch;
use super::keys::{Keys, Synthesised};
use super::metadata::Problem;
use super::rope::{self, Rope};
pub(super) use qwen4::Ngrams;

/// The values of `expert_gating_func`.
const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;
const SOFTMAX_OF_CHOSEN: u64 = 3;
const SQRT_SOFTPLUS: u64 = 4;
/// Longest context of GLM-5 and 5.1; files with longer ones are 5.2, whose layers share indexers in a pattern.
const GLM_5_1_CONTEXT: u64 = 1 << 20;

/// The description of a model.
pub(super) struct Described {
    /// `config.json`.
    pub(super) config: Json,
    /// Query heads, and key and value heads.
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Rows of keys and of values in each layer; empty for latent attention.
    pub(super) kv_rows: Vec<[usize; 2]>,
    /// Which layers have linear attention.
    pub(super) linear: Vec<bool>,
    /// The table of n-grams.
    pub(super) ngrams: Option<Ngrams>,
    /// Remarks for the user.
    pub(super) notes: Vec<String>,
}

/// Tensors that decide how frequencies are divided.
pub(super) struct Factors {
    /// `rope_freqs.weight`.
    pub(super) all: Option<Vec<f32>>,
    /// `rope_factors_short.weight`.
    pub(super) short: Option<Vec<f32>>,
    /// `rope_factors_long.weight`.
    pub(super) long: Option<Vec<f32>>,
}

/// Describes the model.
pub(super) fn describe(arch: Arch, keys: &Keys<'_>, factors: &Factors) -> Result<Described, Problem> {
    arch.refuse_unknown_computation(keys)?;
    let layers = layers(keys)?;
    let mut writer = Writer {
        arch,
        keys,
        layers,
        heads: 0,
        kv_heads: 0,
        head_dim: 0,
        value_dim: 0,
        out: Synthesised::default(),
        notes: vec![],
    };
    writer.common()?;
    let rope = if arch.is_latent() { writer.latent()? } else { writer.grouped_query()? };
    let rope = match arch {
        Arch::Gemma4 => writer.gemma_4_rotations(factors.all.as_deref())?,
        Arch::PhiMoe => writer.longrope(factors)?,
        _ => rope::read(keys, &rope, factors.all.as_deref())?,
    };
    let rope = match arch {
        Arch::Gemma3 => writer.gemma_3_rotations(rope)?,
        Arch::Step35 => writer.step_rotations(rope)?,
        _ => rope,
    };
    writer.out.set("rope_parameters", rope);
    writer.experts()?;
    writer.own()?;
    let linear = if arch.is_hybrid() { writer.hybrid()? } else { vec![false; layers] };
    let ngrams = if arch == Arch::Qwen4Exp { writer.qwen_4(&linear)? } else { None };
    let kv_rows = writer.kv_rows()?;
    let Writer { heads, kv_heads, out, notes, .. } = writer;
    Ok(Described { config: Json::Object(out.0), heads, kv_heads, kv_rows, linear, ngrams, notes })
}

/// Layers without those that predict further tokens, which files count as blocks.
fn layers(keys: &Keys<'_>) -> Result<usize, Problem> {
    let blocks = keys.need("block_count")?;
    let predicting = keys.uint("nextn_predict_layers")?.unwrap_or(0);
    let layers = blocks.checked_sub(predicting).filter(|&n| n > 0).ok_or_else(|| {
        keys.refuse("nextn_predict_layers", format!("is {predicting}, and there are {blocks} blocks in all"))
    })?;
    // Each layer has at least one norm.
    let most = keys.tensors.len().min(ModelSpec::MAX_LAYERS);
    if layers > most as u64 {
        let problem = format!("is {blocks}, and with {} tensors there can be {most} at most", keys.tensors.len());
        return Err(keys.refuse("block_count", problem));
    }
    Ok(layers as usize)
}

struct Writer<'a> {
    arch: Arch,
    keys: &'a Keys<'a>,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    out: Synthesised,
    notes: Vec<String>,
}

impl Writer<'_> {
    /// What all decoders have in common.
    fn common(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let embedding = keys.tensors.get("token_embd.weight");
        let [vocab, hidden] = match embedding.map(|t| t.shape.as_slice()) {
            Some(&[vocab, hidden]) => [vocab as u64, hidden as u64],
            _ => return Err(Problem::new("token_embd.weight", "is missing, or not a matrix")),
        };
        let said = keys.need("embedding_length")?;
        if said != hidden {
            let problem = format!("is {said}, and rows of `token_embd.weight` have {hidden} elements");
            return Err(keys.refuse("embedding_length", problem));
        }
        let (heads, kv_heads) = match self.arch {
            // For latent attention, it counts the latents of a layer: none in layers with linear attention.
            Arch::KimiLinear => (keys.need("attention.head_count")?, None),
            arch if arch.differs_in_heads() => {
                let most = |end: &str| keys.most(end, self.layers);
                let missing = || keys.refuse("attention.head_count", "is missing");
                (most("attention.head_count")?.ok_or_else(missing)?, most("attention.head_count_kv")?)
            }
            _ => (keys.need("attention.head_count")?, keys.uint("attention.head_count_kv")?),
        };
        self.heads = index(keys, "attention.head_count", heads)?;
        self.kv_heads = index(keys, "attention.head_count_kv", kv_heads.unwrap_or(heads))?;
        if self.heads == 0 || self.kv_heads == 0 {
            return Err(keys.refuse("attention.head_count", "or the count of key and value heads is 0"));
        }
        let tied = !keys.tensors.contains_key("output.weight");
        self.out.set("model_type", self.model_type()?);
        self.out.set("vocab_size", vocab);
        self.out.set("hidden_size", hidden);
        self.out.set("num_hidden_layers", self.layers as u64);
        self.out.set("num_attention_heads", heads);
        self.out.set("max_position_embeddings", keys.need("context_length")?);
        let eps = keys.float("attention.layer_norm_rms_epsilon")?;
        let missing = || keys.refuse("attention.layer_norm_rms_epsilon", "is missing");
        self.out.set("rms_norm_eps", eps.ok_or_else(missing)?);
        self.out.set("tie_word_embeddings", tied);
        self.out.set("hidden_act", "silu");
        let widest = if self.arch == Arch::NemotronH { "ffn_up.weight" } else { "ffn_gate.weight" };
        let width = match keys.of_any_layer(self.layers, widest) {
            Some(dense) => Some(dense.rows() as u64),
            None => keys.most("feed_forward_length", self.layers)?,
        };
        let key = if self.arch == Arch::MiniMaxM3 { "dense_intermediate_size" } else { "intermediate_size" };
        self.out.set_some(key, width);
        Ok(())
    }

    /// The family. If several families share an architecture, keys and tensors tell them apart.
    fn model_type(&self) -> Result<&'static str, Problem> {
        let keys = self.keys;
        Ok(match self.arch {
            Arch::Llama | Arch::Mistral3 if self.has_experts() => "mixtral",
            Arch::Llama if keys.uint("attention.sliding_window")?.is_some() => "mistral",
            Arch::Llama => "llama",
            Arch::Mistral3 => "mistral",
            Arch::Qwen3 => "qwen3",
            Arch::Qwen2Moe => "qwen2_moe",
            Arch::Qwen3Moe => "qwen3_moe",
            Arch::Qwen3Next => "qwen3_next",
            Arch::Qwen35Moe => "qwen3_5_moe_text",
            Arch::DeepSeek2 => match (self.is_sigmoid()?, keys.pre_tokenizer()?) {
                (false, _) => "deepseek_v2",
                (true, "kimi-k2") => "kimi_k2",
                (true, "glm4" | "glm5" | "chatglm-bpe") => "glm4_moe_lite",
                (true, _) => "deepseek_v3",
            },
            Arch::DeepSeek32 => "deepseek_v32",
            Arch::GlmDsa => "glm_moe_dsa",
            Arch::Glm4Moe => "glm4_moe",
            Arch::GptOss => "gpt_oss",
            Arch::MiniMaxM2 => "minimax_m2",
            Arch::MiniMaxM3 => "minimax_m3_vl_text",
            Arch::KimiLinear => "kimi_linear",
            Arch::Olmoe => "olmoe",
            Arch::GraniteMoe => "granitemoe",
            Arch::Ernie45 => "ernie4_5",
            Arch::Ernie45Moe => "ernie4_5_moe",
            Arch::HunyuanMoe => "hunyuan_v1_moe",
            Arch::HyV3 => "hy_v3",
            Arch::Dots1 => "dots1",
            Arch::Llama4 => "llama4_text",
            Arch::MiMo2 => "mimo_v2_flash",
            Arch::DeepSeek4 => "deepseek_v4",
            Arch::BailingMoe => "bailing_moe",
            Arch::BailingMoe2 => "bailing_moe_v2",
            Arch::NemotronH => "nemotron_h",
            Arch::Step35 => "step3p5",
            Arch::PhiMoe => "phimoe",
            Arch::Gemma3 => "gemma3_text",
            Arch::Gemma4 => "gemma4_text",
            Arch::Qwen4Exp => "qwen4_exp_text",
        })
    }

    fn has_experts(&self) -> bool {
        self.keys.of_any_layer(self.layers, "ffn_gate_inp.weight").is_some()
    }

    fn has(&self, rest: &str) -> bool {
        self.keys.of_any_layer(self.layers, rest).is_some()
    }

    /// Whether experts' scores are sigmoids: by the key, or if it is missing, by the bias that goes with them.
    fn is_sigmoid(&self) -> Result<bool, Problem> {
        Ok(match self.keys.uint("expert_gating_func")?.filter(|&f| f != 0) {
            Some(func) => func == SIGMOID,
            None => self.has("exp_probs_b.bias") || self.has("exp_probs_b"),
        })
    }

    /// Heads of plain attention, and their rotated part.
    fn grouped_query(&mut self) -> Result<Rope, Problem> {
        let keys = self.keys;
        let hidden = keys.need("embedding_length")?;
        let head_dim = keys.uint("attention.key_length")?.unwrap_or(hidden / self.heads as u64);
        let value = keys.uint("attention.value_length")?.filter(|&n| n != head_dim);
        if let Some(value) = value.filter(|_| self.arch != Arch::MiMo2) {
            let problem = format!("is {value}, and heads of keys have {head_dim} elements: not supported");
            return Err(keys.refuse("attention.value_length", problem));
        }
        self.head_dim = index(keys, "attention.key_length", head_dim)?;
        self.value_dim = index(keys, "attention.value_length", value.unwrap_or(head_dim))?;
        let rotated = keys.uint("rope.dimension_count")?.unwrap_or(head_dim);
        self.out.set("num_key_value_heads", self.kv_heads as u64);
        self.out.set("head_dim", head_dim);
        let bias = self.has("attn_q.bias") || self.has("attn_qkv.bias");
        let key = if self.arch == Arch::Qwen2Moe { "qkv_bias" } else { "attention_bias" };
        self.out.set(key, bias);
        match self.arch {
            Arch::Glm4Moe | Arch::MiniMaxM2 => self.out.set("use_qk_norm", self.has("attn_q_norm.weight")),
            Arch::Olmoe => self.out.set("clip_qkv", keys.float("attention.clamp_kqv")?),
            Arch::MiMo2 => self.mimo(value.unwrap_or(head_dim))?,
            _ => {}
        }
        let theta = keys.float("rope.freq_base")?;
        if let Some(other) =
            keys.float("rope.freq_base_swa")?.filter(|other| self.arch == Arch::GptOss && Some(*other) != theta)
        {
            let problem = format!("is {other}, and layers without a window have another base: not supported");
            return Err(keys.refuse("rope.freq_base_swa", problem));
        }
        let window = keys.uint("attention.sliding_window")?.filter(|&w| w > 0);
        if matches!(self.arch, Arch::GptOss | Arch::Llama | Arch::Mistral3) {
            self.out.set("sliding_window", window);
        }
        if self.arch == Arch::MiniMaxM3 {
            self.key_blocks()?;
        }
        if matches!(self.arch, Arch::MiniMaxM2 | Arch::MiniMaxM3) {
            // The family has a separate key for it.
            self.out.set("rotary_dim", rotated);
            return Ok(Rope { dim: head_dim, head_dim, mscale: false, truncate: true });
        }
        Ok(Rope { dim: rotated, head_dim, mscale: false, truncate: self.arch != Arch::GptOss })
    }

    /// Rows of keys and of values in each layer.
    fn kv_rows(&self) -> Result<Vec<[usize; 2]>, Problem> {
        const COUNTS: &str = "attention.head_count_kv";
        let rows = |heads: usize| [heads.saturating_mul(self.head_dim), heads.saturating_mul(self.value_dim)];
        let counts = if self.arch.differs_in_heads() { self.keys.counts(COUNTS, self.layers)? } else { None };
        let Some(counts) = counts else { return Ok(vec![rows(self.kv_heads); self.layers]) };
        counts.into_iter().map(|count| index(self.keys, COUNTS, count).map(rows)).collect()
    }

    /// Latent attention. Files count one key head, as wide as the latent and the rotated part together; files from before 2025 have
    /// the widths of the heads themselves.
    fn latent(&mut self) -> Result<Rope, Problem> {
        let keys = self.keys;
        let rotated = keys.need("rope.dimension_count")?;
        let either = |new: &str, old: &str| match keys.uint(new)? {
            Some(n) => Ok(n),
            None => keys.need(old),
        };
        let key = either("attention.key_length_mla", "attention.key_length")?;
        let value = either("attention.value_length_mla", "attention.value_length")?;
        let Some(plain) = key.checked_sub(rotated).filter(|&n| n > 0) else {
            let problem = format!("is {rotated}, and a head of keys has {key} elements in all");
            return Err(keys.refuse("rope.dimension_count", problem));
        };
        self.out.set("num_key_value_heads", self.heads as u64);
        self.out.set("qk_rope_head_dim", rotated);
        self.out.set("qk_nope_head_dim", plain);
        self.out.set("v_head_dim", value);
        self.out.set("kv_lora_rank", keys.need("attention.kv_lora_rank")?);
        match self.has("attn_q_a.weight") {
            true => self.out.set("q_lora_rank", keys.need("attention.q_lora_rank")?),
            false => self.out.set("q_lora_rank", Json::Null),
        }
        if matches!(self.arch, Arch::DeepSeek32 | Arch::GlmDsa) {
            self.indexer()?;
        }
        Ok(Rope { dim: rotated, head_dim: rotated, mscale: true, truncate: true })
    }

    /// The choice of key blocks, and which layers have it.
    fn key_blocks(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        for (own, hub) in [
            ("head_count", "index_n_heads"),
            ("key_length", "index_head_dim"),
            ("top_k", "index_topk_blocks"),
            ("block_size", "index_block_size"),
            ("local_blocks", "index_local_blocks"),
        ] {
            self.out.set(hub, keys.need(&format!("attention.indexer.{own}"))?);
        }
        let kind = |layer| match keys.of_layer(layer, "indexer.q_proj.weight") {
            Some(_) => Json::from("minimax_m3_sparse"),
            None => Json::from("full_attention"),
        };
        self.out.set("layer_types", (0..self.layers).map(kind).collect::<Vec<_>>());
        Ok(())
    }

    /// The indexer of sparse attention.
    fn indexer(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        self.out.set("index_n_heads", keys.need("attention.indexer.head_count")?);
        self.out.set("index_head_dim", keys.need("attention.indexer.key_length")?);
        self.out.set("index_topk", keys.need("attention.indexer.top_k")?);
        if self.arch != Arch::GlmDsa {
            return Ok(());
        }
        let full = match keys.per_layer("attention.indexer.types", self.layers)? {
            Some(full) => full,
            // The value that llama.cpp assumes for files from before the key existed.
            None if keys.need("context_length")? < GLM_5_1_CONTEXT => vec![true; self.layers],
            None => (0..self.layers).map(|layer| layer < 2 || (layer - 2) % 4 == 0).collect(),
        };
        let name = |full: bool| Json::from(if full { "full" } else { "shared" });
        self.out.set("indexer_types", full.into_iter().map(name).collect::<Vec<_>>());
        Ok(())
    }

    /// Routed and shared experts.
    fn experts(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let Some(router) = keys.of_any_layer(self.layers, "ffn_gate_inp.weight") else { return Ok(()) };
        let experts = router.rows() as u64;
        if let Some(said) = keys.uint("expert_count")?.filter(|&said| said != experts) {
            self.notes.push(format!(
                "`{}` is {said}, but the routers choose among {experts}: the tensors are right",
                keys.key("expert_count")
            ));
        }
        let count_key = match self.arch {
            Arch::Llama
            | Arch::Mistral3
            | Arch::GptOss
            | Arch::MiniMaxM2
            | Arch::MiniMaxM3
            | Arch::GraniteMoe
            | Arch::PhiMoe
            | Arch::Llama4 => "num_local_experts",
            Arch::DeepSeek2
            | Arch::DeepSeek32
            | Arch::DeepSeek4
            | Arch::GlmDsa
            | Arch::Glm4Moe
            | Arch::Dots1
            | Arch::NemotronH
            | Arch::Step35
            | Arch::MiMo2 => "n_routed_experts",
            _ => "num_experts",
        };
        self.out.set(count_key, experts);
        let used = keys.need("expert_used_count")?;
        self.out.set("num_experts_per_tok", used);
        let width_key = match self.arch.is_all_sparse() || self.arch == Arch::MiniMaxM3 {
            true => "intermediate_size",
            false => "moe_intermediate_size",
        };
        self.out.set(width_key, self.expert_width()?);
        if !self.arch.is_all_sparse() {
            let kind = |layer| match keys.of_layer(layer, "ffn_gate_inp.weight") {
                Some(_) => Json::from("sparse"),
                None => Json::from("dense"),
            };
            self.out.set("mlp_layer_types", (0..self.layers).map(kind).collect::<Vec<_>>());
        }
        self.router()?;
        self.shared_expert()
    }

    /// The width of an expert, from the tensors: a stacked one, or the first of separate ones.
    fn expert_width(&self) -> Result<u64, Problem> {
        let keys = self.keys;
        for name in ["ffn_up_exps.weight", "ffn_up.0.weight"] {
            if let Some(&[.., rows, _]) = keys.of_any_layer(self.layers, name).map(|t| t.shape.as_slice()) {
                return Ok(rows as u64);
            }
        }
        if let Some(&[_, rows, _]) =
            keys.of_any_layer(self.layers, "ffn_gate_up_exps.weight").map(|t| t.shape.as_slice())
        {
            return Ok(rows as u64 / 2);
        }
        keys.need(if self.arch.is_all_sparse() { "feed_forward_length" } else { "expert_feed_forward_length" })
    }

    /// Whether experts' scores are sigmoids, and the values of `expert_gating_func` that are possible for the family.
    fn gating(&self) -> Result<(bool, &'static [u64]), Problem> {
        Ok(match self.arch {
            Arch::DeepSeek2 => (self.is_sigmoid()?, &[SOFTMAX, SIGMOID]),
            Arch::DeepSeek32
            | Arch::GlmDsa
            | Arch::Glm4Moe
            | Arch::MiniMaxM2
            | Arch::MiniMaxM3
            | Arch::KimiLinear
            | Arch::HyV3
            | Arch::Dots1
            | Arch::MiMo2
            | Arch::BailingMoe2
            | Arch::NemotronH
            | Arch::Step35
            | Arch::Llama4 => (true, &[SIGMOID]),
            Arch::GptOss | Arch::GraniteMoe => (false, &[SOFTMAX, SOFTMAX_OF_CHOSEN]),
            Arch::DeepSeek4 => (false, &[SQRT_SOFTPLUS]),
            _ => (false, &[SOFTMAX]),
        })
    }

    /// How experts are chosen and weighted.
    fn router(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let norm = keys.bool("expert_weights_norm")?;
        let scale = keys.float("expert_weights_scale")?.filter(|&s| s != 0.0);
        let (sigmoid, supported) = self.gating()?;
        if let Some(func) = keys.uint("expert_gating_func")?.filter(|f| *f != 0 && !supported.contains(f)) {
            return Err(keys.refuse("expert_gating_func", format!("is {func}; supported here: {supported:?}")));
        }
        match self.arch {
            Arch::DeepSeek2
            | Arch::DeepSeek32
            | Arch::GlmDsa
            | Arch::Glm4Moe
            | Arch::Dots1
            | Arch::BailingMoe2
            | Arch::NemotronH => {
                // It is written only if it is true.
                let norm = norm.unwrap_or(false);
                if !sigmoid && norm {
                    let problem = "is true, but the scores are not sigmoids, which is not supported";
                    return Err(keys.refuse("expert_weights_norm", problem));
                }
                self.out.set("norm_topk_prob", norm);
                self.out.set("routed_scaling_factor", scale.unwrap_or(1.0));
                self.out.set("scoring_func", if sigmoid { "sigmoid" } else { "softmax" });
                self.groups(sigmoid)?;
            }
            Arch::KimiLinear | Arch::MiMo2 => {
                // llama.cpp assumes without a key that the weights are divided by the sum.
                self.out.set("norm_topk_prob", norm.unwrap_or(true));
                self.out.set("routed_scaling_factor", scale.unwrap_or(1.0));
                self.out.set("scoring_func", "sigmoid");
                self.groups(true)?;
            }
            Arch::DeepSeek4 => {
                self.out.set("norm_topk_prob", norm.unwrap_or(true));
                self.out.set("routed_scaling_factor", scale.unwrap_or(1.0));
            }
            Arch::MiniMaxM2 => self.out.set("scoring_func", "sigmoid"),
            Arch::MiniMaxM3 => {
                self.out.set("scoring_func", "sigmoid");
                self.out.set("routed_scaling_factor", scale.unwrap_or(1.0));
            }
            Arch::HyV3 => {
                self.out.set("route_norm", norm.unwrap_or(true));
                self.out.set("router_scaling_factor", scale.unwrap_or(1.0));
            }
            Arch::Step35 => {
                self.out.set("moe_router_activation", "sigmoid");
                self.out.set("norm_expert_weight", norm.unwrap_or(false));
                self.out.set("moe_router_scaling_factor", scale.unwrap_or(1.0));
                self.out.set("use_moe_router_bias", self.has("exp_probs_b.bias") || self.has("exp_probs_b"));
            }
            // llama.cpp assumes without a key which of these divide by the sum.
            Arch::BailingMoe | Arch::Qwen2Moe | Arch::Olmoe => self.out.set("norm_topk_prob", norm.unwrap_or(false)),
            Arch::Qwen3Moe | Arch::Qwen3Next | Arch::Qwen4Exp => {
                self.out.set("norm_topk_prob", norm.unwrap_or(true));
            }
            _ => {}
        }
        self.check_scale(scale)
    }

    /// Refuses a factor for all experts if the family has none.
    fn check_scale(&self, scale: Option<f64>) -> Result<(), Problem> {
        let scales = self.arch.is_latent()
            || matches!(
                self.arch,
                Arch::DeepSeek4
                    | Arch::Glm4Moe
                    | Arch::HyV3
                    | Arch::Dots1
                    | Arch::MiMo2
                    | Arch::MiniMaxM3
                    | Arch::BailingMoe2
                    | Arch::NemotronH
                    | Arch::Step35
            );
        if let Some(scale) = scale.filter(|&s| s != 1.0 && !scales) {
            return Err(self.keys.refuse("expert_weights_scale", format!("is {scale}; only 1 is supported here")));
        }
        Ok(())
    }

    /// The limit on groups of experts. llama.cpp has had it since October 2025; older files do not contain it, but the models have
    /// it.
    fn groups(&mut self, sigmoid: bool) -> Result<(), Problem> {
        let keys = self.keys;
        let (count, kept) = (keys.uint("expert_group_count")?, keys.uint("expert_group_used_count")?);
        let published = match (sigmoid, self.layers, self.out.0.get("n_routed_experts").and_then(Json::as_u64)) {
            (true, 61, Some(256)) => [8, 4],
            (false, 60, Some(160)) => [8, 3],
            _ => [1, 1],
        };
        if count.is_none() && published[0] > 1 {
            self.notes.push(format!(
                "`{}` is missing, as in all files from before October 2025. The published values are used: {} groups, {} of them \
                 chosen",
                keys.key("expert_group_count"),
                published[0],
                published[1]
            ));
        }
        let (count, kept) = match count {
            Some(count) => (count.max(1), kept.unwrap_or(count).max(1)),
            None => (published[0], published[1]),
        };
        self.out.set("n_group", count);
        self.out.set("topk_group", kept);
        let limited = if count > 1 { "group_limited_greedy" } else { "greedy" };
        self.out.set("topk_method", if sigmoid { "noaux_tc" } else { limited });
        Ok(())
    }

    /// The expert that every token uses.
    fn shared_expert(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let width = keys.of_any_layer(self.layers, "ffn_up_shexp.weight").map_or(0, |t| t.rows() as u64);
        match self.arch {
            Arch::Qwen2Moe | Arch::Qwen3Next | Arch::Qwen35Moe | Arch::Qwen4Exp => {
                self.out.set("shared_expert_intermediate_size", width);
            }
            Arch::MiniMaxM3 => self.out.set("shared_intermediate_size", width),
            Arch::NemotronH => self.out.set("moe_shared_expert_intermediate_size", width),
            Arch::Step35 => self.out.set("share_expert_dim", width),
            Arch::DeepSeek2
            | Arch::DeepSeek32
            | Arch::DeepSeek4
            | Arch::GlmDsa
            | Arch::Glm4Moe
            | Arch::KimiLinear
            | Arch::Ernie45Moe
            | Arch::HunyuanMoe
            | Arch::HyV3
            | Arch::Dots1
            | Arch::BailingMoe
            | Arch::BailingMoe2
            | Arch::Llama4 => {
                let expert = self.expert_width()?;
                if expert == 0 || !width.is_multiple_of(expert) {
                    let problem = format!("is {expert}, and the {width} of the shared expert are not a multiple of it");
                    return Err(keys.refuse("expert_feed_forward_length", problem));
                }
                let key = match self.arch {
                    Arch::Ernie45Moe => "moe_num_shared_experts",
                    Arch::HunyuanMoe => "num_shared_expert",
                    Arch::HyV3 | Arch::BailingMoe | Arch::BailingMoe2 => "num_shared_experts",
                    _ => "n_shared_experts",
                };
                self.out.set(key, width / expert);
            }
            _ => {}
        }
        Ok(())
    }

    /// Linear attention, and which layers have it.
    fn hybrid(&mut self) -> Result<Vec<bool>, Problem> {
        let keys = self.keys;
        if self.arch == Arch::KimiLinear {
            return self.kimi_delta();
        }
        let value_heads = keys.need("ssm.time_step_rank")?;
        let inner = keys.need("ssm.inner_size")?;
        if value_heads == 0 || !inner.is_multiple_of(value_heads) {
            let problem = format!("is {inner}, no multiple of the {value_heads} heads of `ssm.time_step_rank`");
            return Err(keys.refuse("ssm.inner_size", problem));
        }
        self.out.set("linear_num_key_heads", keys.need("ssm.group_count")?);
        self.out.set("linear_num_value_heads", value_heads);
        self.out.set("linear_key_head_dim", keys.need("ssm.state_size")?);
        self.out.set("linear_value_head_dim", inner / value_heads);
        self.out.set("linear_conv_kernel_dim", keys.need("ssm.conv_kernel")?);
        if matches!(self.arch, Arch::Qwen35Moe | Arch::Qwen4Exp) {
            // llama.cpp's converter stores value heads in this order for this architecture.
            self.out.set("linear_value_heads_tiled", true);
        }
        let interval = keys.uint("full_attention_interval")?.unwrap_or(4);
        if interval == 0 {
            return Err(keys.refuse("full_attention_interval", "is 0"));
        }
        let by_interval = || (1..=self.layers as u64).map(|layer| layer % interval != 0).collect();
        let linear: Vec<bool> = keys.per_layer("attention.recurrent_layers", self.layers)?.unwrap_or_else(by_interval);
        let name = |linear: &bool| json!(if *linear { "linear_attention" } else { "full_attention" });
        self.out.set("layer_types", linear.iter().map(name).collect::<Vec<_>>());
        Ok(linear)
    }

    /// Kimi's linear attention, in the layers with its tensors.
    fn kimi_delta(&mut self) -> Result<Vec<bool>, Problem> {
        let keys = self.keys;
        let heads = keys.of_any_layer(self.layers, "ssm_beta.weight").map_or(self.heads, |t| t.rows());
        self.out.set("linear_num_heads", heads as u64);
        self.out.set("linear_head_dim", keys.need("kda.head_dim")?);
        self.out.set("linear_conv_kernel_dim", keys.need("ssm.conv_kernel")?);
        let linear: Vec<bool> = (0..self.layers).map(|l| keys.of_layer(l, "ssm_f_a.weight").is_some()).collect();
        let name = |linear: &bool| json!(if *linear { "linear_attention" } else { "full_attention" });
        self.out.set("layer_types", linear.iter().map(name).collect::<Vec<_>>());
        Ok(linear)
    }
}

/// A number that counts things in memory, from a key.
fn index(keys: &Keys<'_>, end: &str, n: u64) -> Result<usize, Problem> {
    usize::try_from(n).map_err(|_| keys.refuse(end, format!("is {n}")))
}

//! Keys that one family has.

use serde_json::{Value as Json, json};

use super::super::keys::decimal;
use super::super::metadata::Value;
use super::super::rope::{self, Rope};
use super::{Arch, Factors, Problem, Writer};

/// What MiMo-V2-Flash multiplies values by, which files from before May 2026 do not say.
const MIMO_VALUE_SCALE: f64 = 0.707;
/// Experts of the one Llama 4 that has no norms of queries and keys: Maverick. llama.cpp tells it by them as well.
const WITHOUT_NORMS: u64 = 128;
/// Contexts of Phi-3.5-MoE before it was extended and since, and what its scores are scaled by, which files do not say.
const PHI_CONTEXTS: (u64, u64) = (4096, 131_072);
const PHI_MSCALE: f64 = 1.243_163_121_016_122;

impl Writer<'_> {
    /// What the family calls otherwise, or has alone.
    pub(super) fn own(&mut self) -> Result<(), Problem> {
        match self.arch {
            Arch::GraniteMoe => self.granite(),
            Arch::Ernie45Moe => {
                self.copy("num_experts", "moe_num_experts");
                self.copy("num_experts_per_tok", "moe_k");
                Ok(())
            }
            Arch::HunyuanMoe => {
                self.copy("num_experts_per_tok", "moe_topk");
                Ok(())
            }
            Arch::Llama4 => self.llama_4(),
            Arch::DeepSeek4 => self.deepseek_4(),
            Arch::BailingMoe | Arch::BailingMoe2 => self.bailing(),
            Arch::NemotronH => self.nemotron(),
            Arch::Step35 => self.step(),
            Arch::PhiMoe => {
                self.out.set("lm_head_bias", self.keys.tensors.contains_key("output.bias"));
                Ok(())
            }
            Arch::Gemma3 => self.gemma_3(),
            Arch::Gemma4 => self.gemma_4(),
            _ => Ok(()),
        }
    }

    /// A key under another name.
    pub(super) fn copy(&mut self, from: &str, to: &str) {
        let value = self.out.0.get(from).cloned();
        self.out.set_some(to, value);
    }

    /// The factors of Granite, each of which is 1 where it is missing but that of the scores.
    fn granite(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        for (end, key) in [
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            // llama.cpp divides by it.
            ("logit_scale", "logits_scaling"),
        ] {
            self.out.set(key, keys.float(end)?.unwrap_or(1.0));
        }
        let usual = (self.head_dim as f64).powf(-0.5);
        self.out.set("attention_multiplier", keys.float("attention.scale")?.filter(|&s| s != 0.0).unwrap_or(usual));
        Ok(())
    }

    /// Ling and Ring. Their generations have other defaults.
    fn bailing(&mut self) -> Result<(), Problem> {
        self.out.set("use_qkv_bias", self.out.0.get("attention_bias").cloned());
        self.out.set("use_bias", self.has("attn_output.bias"));
        self.out.set("use_qk_norm", self.has("attn_q_norm.weight"));
        Ok(())
    }

    /// LongRoPE of Phi-3.5-MoE, whose factors are tensors.
    pub(super) fn longrope(&mut self, factors: &Factors) -> Result<Json, Problem> {
        let keys = self.keys;
        let rope = Rope { dim: self.head_dim as u64, head_dim: self.head_dim as u64, mscale: false, truncate: true };
        let mut out = rope::read(keys, &rope, factors.all.as_deref())?;
        let (Some(short), Some(long)) = (&factors.short, &factors.long) else { return Ok(out) };
        let original = keys.need("rope.scaling.original_context_length")?;
        let mut factor = keys.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        if (original, keys.need("context_length")?) == PHI_CONTEXTS {
            self.notes.push(format!(
                "`{}` is {factor}, which llama.cpp makes of the contexts: {PHI_MSCALE}, as Microsoft has published the model",
                keys.key("rope.scaling.attn_factor")
            ));
            factor = PHI_MSCALE;
        }
        out["rope_type"] = "longrope".into();
        out["original_max_position_embeddings"] = original.into();
        for (kind, factors) in [("short", short), ("long", long)] {
            out[format!("{kind}_factor")] = factors.iter().map(|&f| decimal(f.into())).collect();
            out[format!("{kind}_mscale")] = factor.into();
        }
        Ok(out)
    }

    /// Llama 4, of which files say little more than the tensors: llama.cpp knows the rest by heart.
    fn llama_4(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        self.copy("intermediate_size", "intermediate_size_mlp");
        self.copy("moe_intermediate_size", "intermediate_size");
        if self.out.0.get("n_shared_experts").and_then(Json::as_u64) != Some(1) && self.has("ffn_gate_inp.weight") {
            let problem = "is not the width of the shared expert, which is not supported";
            return Err(keys.refuse("expert_feed_forward_length", problem));
        }
        let is_sparse = |layer: &usize| keys.of_layer(*layer, "ffn_gate_inp.weight").is_some();
        self.out.set("moe_layers", (0..self.layers).filter(is_sparse).map(Json::from).collect::<Vec<_>>());
        let experts = self.out.0.get("num_local_experts").and_then(Json::as_u64);
        self.out.set("use_qk_norm", experts != Some(WITHOUT_NORMS));
        if keys.uint("attention.sliding_window")? == Some(0) {
            // No stretches, and a rotation in every layer.
            self.out.set("attention_chunk_size", Json::Null);
            self.out.set("no_rope_layers", vec![Json::from(1); self.layers]);
        }
        Ok(())
    }

    /// MiMo-V2, whose layers with a window have other heads of keys and values, and another rotation, than those without.
    pub(super) fn mimo(&mut self, value_dim: u64) -> Result<(), Problem> {
        let keys = self.keys;
        const PATTERN: &str = "attention.sliding_window_pattern";
        let slides = keys.per_layer(PATTERN, self.layers)?.ok_or_else(|| keys.refuse(PATTERN, "is missing"))?;
        for (slide, count_key, sinks_key) in [
            (false, "num_key_value_heads", "add_full_attention_sink_bias"),
            (true, "swa_num_key_value_heads", "add_swa_attention_sink_bias"),
        ] {
            let layers: Vec<usize> = (0..self.layers).filter(|&layer| slides[layer] == slide).collect();
            self.out.set_some(count_key, self.heads_of("attention.head_count_kv", &layers)?);
            let sinks = layers.iter().any(|&layer| {
                ["attn_sinks.weight", "attn_sinks"].iter().any(|name| keys.of_layer(layer, name).is_some())
            });
            self.out.set(sinks_key, sinks);
        }
        self.set_slides(&slides);
        self.out.set("v_head_dim", value_dim);
        self.out.set("sliding_window", keys.need("attention.sliding_window")?);
        let theta = keys.float("rope.freq_base")?;
        self.out.set_some("rope_theta", theta);
        self.out.set_some("swa_rope_theta", keys.float("rope.freq_base_swa")?.or(theta));
        let scale = keys.float("attention.value_scale")?;
        if scale.is_none() {
            self.notes.push(format!(
                "`{}` is missing, as in all files from before May 2026: {MIMO_VALUE_SCALE}, as Xiaomi has published the model",
                keys.key("attention.value_scale")
            ));
        }
        self.out.set("attention_value_scale", scale.unwrap_or(MIMO_VALUE_SCALE));
        Ok(())
    }

    /// What a key counts of these layers, which has to be the same for all of them; `None` if there are no layers.
    pub(super) fn heads_of(&self, end: &str, layers: &[usize]) -> Result<Option<u64>, Problem> {
        let keys = self.keys;
        let counts = keys.counts(end, self.layers)?.ok_or_else(|| keys.refuse(end, "is missing"))?;
        let mut all = layers.iter().map(|&layer| counts[layer]);
        let Some(first) = all.next() else { return Ok(None) };
        if first == 0 || all.any(|other| other != first) {
            return Err(keys.refuse(end, "is 0 or differs between layers of one kind, which is not supported"));
        }
        Ok(Some(first))
    }

    /// DeepSeek-V4.
    fn deepseek_4(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        self.copy("intermediate_size", "moe_intermediate_size");
        for (own, hub) in [
            ("attention.q_lora_rank", "q_lora_rank"),
            ("attention.output_lora_rank", "o_lora_rank"),
            ("attention.output_group_count", "o_groups"),
            ("attention.sliding_window", "sliding_window"),
            ("attention.indexer.head_count", "index_n_heads"),
            ("attention.indexer.key_length", "index_head_dim"),
            ("attention.indexer.top_k", "index_topk"),
            ("rope.dimension_count", "qk_rope_head_dim"),
            ("hyper_connection.count", "hc_mult"),
            ("hyper_connection.sinkhorn_iterations", "hc_sinkhorn_iters"),
        ] {
            self.out.set(hub, keys.need(own)?);
        }
        self.out.set_some("hc_eps", keys.float("hyper_connection.epsilon")?);
        self.out.set_some("swiglu_limit", self.expert_limit()?);
        self.out.set_some("rope_theta", keys.float("rope.freq_base")?);
        self.out.set_some("compress_rope_theta", keys.float("attention.compress_rope_freq_base")?);
        const RATIOS: &str = "attention.compress_ratios";
        let ratios = keys.metadata.integers(&keys.key(RATIOS))?;
        let ratios = ratios.ok_or_else(|| keys.refuse(RATIOS, "is missing, or not a list with one for each layer"))?;
        let ratio = |n: i128| i64::try_from(n).map_or(Json::Null, Json::from);
        self.out.set("compress_ratios", ratios.into_iter().map(ratio).collect::<Vec<_>>());
        let kind = |layer| match keys.of_layer(layer, "ffn_gate_tid2eid.weight") {
            Some(_) => Json::from("hash_moe"),
            None => Json::from("moe"),
        };
        self.out.set("mlp_layer_types", (0..self.layers).map(kind).collect::<Vec<_>>());
        if keys.metadata.get(&keys.key("rope.scaling.type")).is_none() {
            self.notes.push(format!(
                "`{}` is missing: YaRN by 16 from 65,536 tokens in layers that compress, as DeepSeek has published the model",
                keys.key("rope.scaling.type")
            ));
            self.out.set(
                "rope_parameters",
                json!({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65_536}),
            );
        }
        Ok(())
    }

    /// The limit of an expert's gate and up, which files give for each layer.
    fn expert_limit(&self) -> Result<Option<f64>, Problem> {
        const LIMITS: &str = "swiglu_clamp_exp";
        let keys = self.keys;
        let Some(Value::Numbers(_)) = keys.metadata.get(&keys.key(LIMITS)) else { return keys.float(LIMITS) };
        let limits = keys.metadata.floats(&keys.key(LIMITS))?.unwrap_or_default();
        match limits.get(..self.layers) {
            Some([first, others @ ..]) if others.iter().all(|other| other == first) => Ok(Some(decimal(*first))),
            Some([_, ..]) => Err(keys.refuse(LIMITS, "differs from layer to layer, which is not supported")),
            _ => Err(keys.refuse(LIMITS, format!("has {} entries for {} layers", limits.len(), self.layers))),
        }
    }
}

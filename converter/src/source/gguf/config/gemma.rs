//! Gemma 3 and 4, whose layers with a window have another base of the rotary frequencies than those without.

use serde_json::{Value as Json, json};

use super::super::metadata::Value;
use super::{Problem, Writer, index};

const PATTERN: &str = "attention.sliding_window_pattern";
const WINDOW: &str = "attention.sliding_window";
const LOCAL_THETA: &str = "rope.freq_base_swa";
/// One in this many layers of Gemma 3 has no window. Files do not contain this number.
const PERIOD: u64 = 6;
/// Number of layers of 27B, the only Gemma 3 that scales its scores by hidden size and heads instead of the width of a head.
/// llama.cpp recognises it by this number too.
const LAYERS_OF_27B: usize = 62;
/// A frequency divided by this does not rotate.
const STILL: f32 = 1e20;

impl Writer<'_> {
    /// Gemma 3.
    pub(super) fn gemma_3(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        self.gemma()?;
        let hidden = keys.need("embedding_length")?;
        let scalar = if self.layers == LAYERS_OF_27B { hidden / self.heads as u64 } else { self.head_dim as u64 };
        self.out.set("query_pre_attn_scalar", scalar);
        let window = keys.uint(WINDOW)?.filter(|&window| window > 0);
        let slides = match (window, keys.metadata.get(&keys.key(PATTERN))) {
            (None, _) => vec![false; self.layers],
            (Some(_), Some(Value::Numbers(_))) => keys.per_layer(PATTERN, self.layers)?.unwrap_or_default(),
            (Some(_), _) => {
                let period = keys.uint(PATTERN)?.unwrap_or(PERIOD);
                (1..=self.layers as u64).map(|layer| period == 0 || layer % period != 0).collect()
            }
        };
        self.set_slides(&slides);
        self.out.set_some("sliding_window", window);
        Ok(())
    }

    /// The common part.
    fn gemma(&mut self) -> Result<(), Problem> {
        for key in ["hidden_act", "hidden_activation"] {
            self.out.set(key, "gelu_pytorch_tanh");
        }
        self.out.set("final_logit_softcapping", self.keys.float("final_logit_softcapping")?.filter(|&cap| cap != 0.0));
        Ok(())
    }

    /// Which layers have a window.
    pub(super) fn set_slides(&mut self, slides: &[bool]) {
        let kind = |slides: &bool| Json::from(if *slides { "sliding_attention" } else { "full_attention" });
        self.out.set("layer_types", slides.iter().map(kind).collect::<Vec<_>>());
    }

    /// The rotations of Gemma 3; `full` is that of layers without a window.
    pub(super) fn gemma_3_rotations(&self, full: Json) -> Result<Json, Problem> {
        let mut all = json!({ "full_attention": full });
        if let Some(theta) = self.keys.float(LOCAL_THETA)? {
            all["sliding_attention"] = json!({ "rope_theta": theta, "rope_type": "default" });
        }
        Ok(all)
    }

    /// Gemma 4. The number of key heads follows from the tensors: files have other counts if keys are not the values.
    pub(super) fn gemma_4(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        self.gemma()?;
        for end in ["embedding_length_per_layer_input", "attention.shared_kv_layers"] {
            if let Some(count) = keys.uint(end)?.filter(|&count| count != 0) {
                return Err(
                    keys.refuse(end, format!("is {count}; only 0 is supported, that of models without such layers"))
                );
            }
        }
        self.out.set("hidden_size_per_layer_input", 0);
        let slides = keys.per_layer(PATTERN, self.layers)?.ok_or_else(|| keys.refuse(PATTERN, "is missing"))?;
        self.set_slides(&slides);
        self.out.set("sliding_window", keys.need(WINDOW)?);
        let local = keys.need("attention.key_length_swa")?;
        let value = keys.uint("attention.value_length_swa")?.unwrap_or(local);
        if value != local {
            let problem = format!("is {value}, and heads of keys have {local} elements: not supported");
            return Err(keys.refuse("attention.value_length_swa", problem));
        }
        let global = self.head_dim as u64;
        self.out.set("global_head_dim", global);
        self.out.set("head_dim", local);
        for (slide, head_dim, end, key) in [
            (true, local, "attention.key_length_swa", "num_key_value_heads"),
            (false, global, "attention.key_length", "num_global_key_value_heads"),
        ] {
            let layer = (0..self.layers).find(|&layer| slides[layer] == slide);
            let rows = layer.and_then(|layer| keys.of_layer(layer, "attn_k.weight")).map(|keys| keys.rows());
            if let Some(rows) = rows {
                let head_dim = index(keys, end, head_dim)?;
                if head_dim == 0 || !rows.is_multiple_of(head_dim) {
                    let problem =
                        format!("is {head_dim}, and the {rows} rows of `attn_k.weight` are not a multiple of it");
                    return Err(keys.refuse(end, problem));
                }
                self.out.set(key, (rows / head_dim) as u64);
            }
        }
        let is_key = |layer: usize| !slides[layer] && keys.of_layer(layer, "attn_v.weight").is_none();
        self.out.set("attention_k_eq_v", (0..self.layers).any(is_key));
        let sparse = self.has("ffn_gate_inp.weight");
        self.out.set("enable_moe_block", sparse);
        self.copy("num_experts_per_tok", "top_k_experts");
        Ok(())
    }

    /// The rotations of Gemma 4. In layers without a window, only the first pairs are rotated: files divide the frequencies of the
    /// others by a number so large that nothing is left.
    pub(super) fn gemma_4_rotations(&self, factors: Option<&[f32]>) -> Result<Json, Problem> {
        const FACTORS: &str = "rope_freqs.weight";
        let keys = self.keys;
        let factors = factors.ok_or_else(|| Problem::new(FACTORS, "is missing"))?;
        let pairs = factors.iter().take_while(|factor| **factor == 1.0).count();
        if pairs == 0 || factors[pairs..].iter().any(|factor| *factor < STILL) || factors.len() != self.head_dim / 2 {
            let problem =
                "does not say which pairs of a head turn: expected 1 for the first of them, and 1e30 for the others";
            return Err(Problem::new(FACTORS, problem));
        }
        let mut full =
            json!({ "rope_type": "proportional", "partial_rotary_factor": pairs as f64 / factors.len() as f64 });
        let mut sliding = json!({ "rope_type": "default" });
        for (end, rotation) in [("rope.freq_base", &mut full), (LOCAL_THETA, &mut sliding)] {
            if let Some(theta) = keys.float(end)? {
                rotation["rope_theta"] = theta.into();
            }
        }
        for (end, length) in [("rope.dimension_count", "key_length"), ("rope.dimension_count_swa", "key_length_swa")] {
            let width = keys.uint(&format!("attention.{length}"))?;
            if let Some(turned) = keys.uint(end)?.filter(|turned| Some(*turned) != width) {
                return Err(keys.refuse(end, format!("is {turned}, which is not the width of a head: not supported")));
            }
        }
        Ok(json!({ "full_attention": full, "sliding_attention": sliding }))
    }
}

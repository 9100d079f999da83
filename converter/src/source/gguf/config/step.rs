//! Step 3.5, whose layers with a window have other numbers of heads and another rotation than those without.

use serde_json::{Value as Json, json};

use super::{Problem, Writer};

const PATTERN: &str = "attention.sliding_window_pattern";
const HEADS: &str = "attention.head_count";
const KV_HEADS: &str = "attention.head_count_kv";
/// The rotated fraction of a head in layers without a window. llama.cpp assumes it without a key.
const TURNED: f64 = 0.5;

impl Writer<'_> {
    pub(super) fn step(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let slides = keys.per_layer(PATTERN, self.layers)?.ok_or_else(|| keys.refuse(PATTERN, "is missing"))?;
        self.set_slides(&slides);
        let of_kind = |slide: bool| (0..self.layers).filter(|&layer| slides[layer] == slide).collect::<Vec<_>>();
        let (full, sliding) = (of_kind(false), of_kind(true));
        let heads = [self.heads_of(HEADS, &full)?, self.heads_of(HEADS, &sliding)?];
        let kv_heads = [self.heads_of(KV_HEADS, &full)?, self.heads_of(KV_HEADS, &sliding)?];
        self.out.set_some("num_attention_heads", heads[0].or(heads[1]));
        self.out.set_some("num_attention_groups", kv_heads[0].or(kv_heads[1]));
        if let (Some(heads), Some(kv_heads)) = (heads[1], kv_heads[1]) {
            let other = json!({
                "attention_type": "sliding_attention",
                "num_attention_heads": heads,
                "num_attention_groups": kv_heads,
                "head_dim": self.head_dim as u64,
            });
            self.out.set("attention_other_setting", other);
        }
        self.out.set("sliding_window", keys.need("attention.sliding_window")?);
        self.out.set("use_head_wise_attn_gate", self.has("attn_gate.weight"));
        for (end, key) in [("swiglu_clamp_exp", "swiglu_limits"), ("swiglu_clamp_shexp", "swiglu_limits_shared")] {
            self.out.set_some(key, keys.numbers(end, self.layers)?);
        }
        Ok(())
    }

    /// The rotations of both kinds of layers; `full` is that of layers without a window. The factors of `rope_freqs.weight` are
    /// computed for whole heads, but only half of the pairs are rotated. If they are Llama 3's, the intended ones follow from its
    /// parameters.
    pub(super) fn step_rotations(&self, mut full: Json) -> Result<Json, Problem> {
        full["partial_rotary_factor"] = TURNED.into();
        if let Some(divisors) = full.get_mut("divisors").and_then(Json::as_array_mut) {
            divisors.truncate((self.head_dim as f64 * TURNED) as usize / 2);
        }
        let mut sliding = json!({ "rope_type": "default" });
        if let Some(theta) = self.keys.float("rope.freq_base_swa")?.or(self.keys.float("rope.freq_base")?) {
            sliding["rope_theta"] = theta.into();
        }
        Ok(json!({ "full_attention": full, "sliding_attention": sliding }))
    }
}

//! Keys that one family has.

use serde_json::Value as Json;

use super::{Arch, Problem, Writer};

/// Experts of the one Llama 4 that has no norms of queries and keys: Maverick. llama.cpp tells it by them as well.
const WITHOUT_NORMS: u64 = 128;

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
            _ => Ok(()),
        }
    }

    /// A key under another name.
    fn copy(&mut self, from: &str, to: &str) {
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
}

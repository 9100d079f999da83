//! Qwen3.8-Flash-Next: gated residual streams, a choice of key blocks, and a table of n-grams.

use serde_json::Value as Json;

use super::{Problem, Writer};

/// The table of n-grams, and the numbers that select its rows. These are keys in a GGUF file and tensors on the hub.
pub(in super::super) struct Ngrams {
    /// The layer with the table.
    pub(in super::super) layer: usize,
    /// Tensors on the hub, by their names in the module of the table.
    pub(in super::super) numbers: [(&'static str, Vec<i64>); 3],
}

impl Writer<'_> {
    /// `linear`: which layers have linear attention.
    pub(super) fn qwen_4(&mut self, linear: &[bool]) -> Result<Option<Ngrams>, Problem> {
        let keys = self.keys;
        for (own, hub) in [
            ("hyper_connection.count", "hc_count"),
            ("hyper_connection.low_rank", "hc_lowrank"),
            ("attention.indexer.head_count", "indexer_n_heads"),
            ("attention.indexer.key_length", "indexer_head_dim"),
            ("attention.indexer.top_k", "indexer_budget"),
        ] {
            self.out.set(hub, keys.need(own)?);
        }
        self.out.set("indexer_kv_heads", 1);
        // llama.cpp assumes without a key that the gate is a sigmoid.
        self.out.set("output_gate_type", "sigmoid");
        const RATIOS: &str = "attention.compress_ratios";
        let ratios = keys.counts(RATIOS, self.layers)?.ok_or_else(|| keys.refuse(RATIOS, "is missing"))?;
        let mut of_full = ratios.iter().zip(linear).filter(|(_, linear)| !**linear).map(|(ratio, _)| *ratio);
        let ratio = of_full.next().unwrap_or(1);
        if of_full.any(|other| other != ratio) {
            return Err(
                keys.refuse(RATIOS, "differs between layers that choose blocks of keys, which is not supported")
            );
        }
        self.out.set("indexer_compress_ratio", ratio);
        self.ngrams()
    }

    fn ngrams(&mut self) -> Result<Option<Ngrams>, Problem> {
        let keys = self.keys;
        const LAYERS: &str = "ple.layers";
        let layers = keys.metadata.integers(&keys.key(LAYERS))?.unwrap_or_default();
        let layer = match layers[..] {
            [] => return Ok(None),
            [layer] => usize::try_from(layer).ok().filter(|&layer| layer < self.layers),
            _ => return Err(keys.refuse(LAYERS, "names several layers; a file has one table of n-grams at most")),
        };
        let layer =
            layer.ok_or_else(|| keys.refuse(LAYERS, format!("holds {}, of {} layers", layers[0], self.layers)))?;
        let (tokens, each) = (keys.need("ple.ngram_size")?, keys.need("ple.heads_per_ngram")?);
        let heads = tokens.saturating_sub(1).saturating_mul(each);
        self.out.set("ngram_size", tokens);
        self.out.set("heads_per_ngram", each);
        self.out.set("ple_embed_dim", keys.need("embedding_length_per_layer_input")?.saturating_mul(heads));
        self.out.set("ple_conv_kernel_size", keys.need("ple.conv_kernel")?);
        self.out.set("eos_token_id", keys.need("ple.eos_token_id")?);
        // Layers are counted from one on the hub.
        self.out.set("ple_layer_ids", vec![Json::from(layer as u64 + 1)]);
        self.out.set("split_ngram_parts", 1);
        let numbers = |end: &str| -> Result<Vec<i64>, Problem> {
            let key = format!("ple.{end}");
            let all = keys.metadata.integers(&keys.key(&key))?.ok_or_else(|| keys.refuse(&key, "is missing"))?;
            let number = |n| i64::try_from(n).map_err(|_| keys.refuse(&key, format!("holds {n}, which is too large")));
            all.into_iter().map(number).collect()
        };
        let numbers = [
            ("layer_multipliers", numbers("layer_multipliers")?),
            ("ngram_heads_offsets", numbers("head_offsets")?),
            ("ngram_heads_vocab_sizes", numbers("head_vocab_sizes")?),
        ];
        Ok(Some(Ngrams { layer, numbers }))
    }
}

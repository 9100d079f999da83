//! Names of DeepSeek-V4, whose checkpoints have special names (`MODEL_ARCH.DEEPSEEK4` in `gguf-py/gguf/constants.py` and
//! `conversion/deepseek.py` of <https://github.com/ggml-org/llama.cpp>).

/// Names outside of the layers.
const OUTSIDE: [(&str, &str); 6] = [
    ("token_embd.weight", "embed.weight"),
    ("output_norm.weight", "norm.weight"),
    ("output.weight", "head.weight"),
    ("output_hc_fn.weight", "hc_head_fn"),
    ("output_hc_base.weight", "hc_head_base"),
    ("output_hc_scale.weight", "hc_head_scale"),
];

/// Names in a layer that have no suffix on the hub, or another one.
const WHOLE: [(&str, &str); 11] = [
    ("hc_attn_fn.weight", "hc_attn_fn"),
    ("hc_attn_base.weight", "hc_attn_base"),
    ("hc_attn_scale.weight", "hc_attn_scale"),
    ("hc_ffn_fn.weight", "hc_ffn_fn"),
    ("hc_ffn_base.weight", "hc_ffn_base"),
    ("hc_ffn_scale.weight", "hc_ffn_scale"),
    ("attn_sinks.weight", "attn.attn_sink"),
    ("attn_compressor_ape.weight", "attn.compressor.ape"),
    ("indexer_compressor_ape.weight", "attn.indexer.compressor.ape"),
    ("exp_probs_b.bias", "ffn.gate.bias"),
    ("ffn_gate_tid2eid.weight", "ffn.gate.tid2eid"),
];

/// Modules in a layer; the suffix stays.
const MODULES: [(&str, &str); 24] = [
    ("attn_norm", "attn_norm"),
    ("ffn_norm", "ffn_norm"),
    ("attn_q_a", "attn.wq_a"),
    ("attn_q_a_norm", "attn.q_norm"),
    ("attn_q_b", "attn.wq_b"),
    ("attn_kv", "attn.wkv"),
    ("attn_kv_a_norm", "attn.kv_norm"),
    ("attn_output_a", "attn.wo_a"),
    ("attn_output_b", "attn.wo_b"),
    ("attn_compressor_kv", "attn.compressor.wkv"),
    ("attn_compressor_gate", "attn.compressor.wgate"),
    ("attn_compressor_norm", "attn.compressor.norm"),
    ("indexer.attn_q_b", "attn.indexer.wq_b"),
    ("indexer.proj", "attn.indexer.weights_proj"),
    ("indexer_compressor_kv", "attn.indexer.compressor.wkv"),
    ("indexer_compressor_gate", "attn.indexer.compressor.wgate"),
    ("indexer_compressor_norm", "attn.indexer.compressor.norm"),
    ("ffn_gate_inp", "ffn.gate"),
    ("ffn_gate_shexp", "ffn.shared_experts.w1"),
    ("ffn_up_shexp", "ffn.shared_experts.w3"),
    ("ffn_down_shexp", "ffn.shared_experts.w2"),
    // All experts of a layer in one tensor, as in MLX.
    ("ffn_gate_exps", "ffn.switch_mlp.gate_proj"),
    ("ffn_up_exps", "ffn.switch_mlp.up_proj"),
    ("ffn_down_exps", "ffn.switch_mlp.down_proj"),
];

/// The name on the hub of the tensor `name` in a model with this many layers; `None` if llama.cpp's converter does not write it.
/// Layers after those predict further tokens.
pub(super) fn rename(layers: usize, name: &str) -> Option<String> {
    if let Some((_, outside)) = OUTSIDE.iter().find(|(own, _)| *own == name) {
        return Some((*outside).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if layer >= layers {
        return Some(format!("mtp.{}.{rest}", layer - layers));
    }
    if let Some((_, hub)) = WHOLE.iter().find(|(own, _)| *own == rest) {
        return Some(format!("layers.{layer}.{hub}"));
    }
    let (module, end) = rest.rsplit_once('.')?;
    let (_, hub) = MODULES.iter().find(|(own, _)| *own == module)?;
    Some(format!("layers.{layer}.{hub}.{end}"))
}

#[cfg(test)]
mod tests {
    use super::rename;

    #[test]
    fn names_of_the_hub() {
        for (own, hub) in [
            ("output_hc_base.weight", "hc_head_base"),
            ("blk.2.attn_sinks.weight", "layers.2.attn.attn_sink"),
            ("blk.2.indexer_compressor_kv.weight", "layers.2.attn.indexer.compressor.wkv.weight"),
            ("blk.0.ffn_down_exps.weight", "layers.0.ffn.switch_mlp.down_proj.weight"),
            ("blk.4.nextn.e_proj.weight", "mtp.0.nextn.e_proj.weight"),
        ] {
            assert_eq!(rename(4, own).as_deref(), Some(hub));
        }
        for unknown in ["blk.weight", "blk.0.attn_k.weight", "output_norm", "blk.0.attn_sinks"] {
            assert_eq!(rename(4, unknown), None, "{unknown}");
        }
    }
}

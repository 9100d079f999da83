//! Converts llama.cpp's names to those of the hub (`gguf-py/gguf/tensor_mapping.py` and `conversion/` of
//! <https://github.com/ggml-org/llama.cpp>), and says how the numbers must be changed.

mod deepseek4;
mod nemotron;

use super::arch::Arch;

/// The checkpoint's tensor for a tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Renamed {
    pub(super) name: String,
    pub(super) change: Change,
}

/// The change by llama.cpp's converter that must be undone for a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// The halves of each query head alternate.
    Queries,
    /// The halves of each key head alternate.
    Keys,
    /// Queries, keys and values are in one tensor, which has the name of the queries.
    Fused,
    /// A matrix of one row has become a vector.
    OneRow,
    /// A vector has become a matrix.
    Flat,
    /// A convolution, `[channels, width]`, was `[channels, 1, width]`.
    Convolution,
    /// The key and value heads of latent attention are in one matrix, as in the first files with them.
    Heads,
    /// It holds `−exp` of the numbers.
    NegativeExponential,
}

/// Names outside of the layers.
const OUTSIDE: [(&str, &str); 6] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("output_norm.bias", "model.norm.bias"),
    ("output.bias", "lm_head.bias"),
    // Constants that follow from the configuration.
    ("rope_freqs.weight", "model.rotary_emb.inv_freq"),
];

/// Modules of a layer; the suffix (`weight`, `bias`) stays.
const MODULES: [(&str, &str, Change); 26] = [
    ("attn_norm", "input_layernorm", Change::None),
    ("ffn_norm", "post_attention_layernorm", Change::None),
    ("post_attention_norm", "post_attention_layernorm", Change::None),
    ("attn_q", "self_attn.q_proj", Change::Queries),
    ("attn_k", "self_attn.k_proj", Change::Keys),
    ("attn_v", "self_attn.v_proj", Change::None),
    ("attn_output", "self_attn.o_proj", Change::None),
    ("attn_q_norm", "self_attn.q_norm", Change::None),
    ("attn_k_norm", "self_attn.k_norm", Change::None),
    ("attn_q_a", "self_attn.q_a_proj", Change::None),
    ("attn_q_a_norm", "self_attn.q_a_layernorm", Change::None),
    ("attn_q_b", "self_attn.q_b_proj", Change::None),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", Change::None),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm", Change::None),
    ("attn_kv_b", "self_attn.kv_b_proj", Change::None),
    // Head by head, and the keys transposed, as in MLX.
    ("attn_k_b", "self_attn.embed_q", Change::Heads),
    ("attn_v_b", "self_attn.unembed_out", Change::Heads),
    ("indexer.attn_q_b", "self_attn.indexer.wq_b", Change::None),
    ("indexer.attn_k", "self_attn.indexer.wk", Change::None),
    ("indexer.k_norm", "self_attn.indexer.k_norm", Change::None),
    ("indexer.proj", "self_attn.indexer.weights_proj", Change::None),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate", Change::OneRow),
    ("nextn.eh_proj", "eh_proj", Change::None),
    ("nextn.embed_tokens", "embed_tokens", Change::None),
    ("nextn.enorm", "enorm", Change::None),
    ("nextn.hnorm", "hnorm", Change::None),
];

/// Modules of a layer with linear attention.
const LINEAR: [(&str, &str, Change); 10] = [
    ("attn_qkv", "linear_attn.in_proj_qkv", Change::None),
    ("attn_gate", "linear_attn.in_proj_z", Change::None),
    ("ssm_in", "linear_attn.in_proj_qkvz", Change::None),
    ("ssm_ba", "linear_attn.in_proj_ba", Change::None),
    ("ssm_alpha", "linear_attn.in_proj_a", Change::None),
    ("ssm_beta", "linear_attn.in_proj_b", Change::None),
    ("ssm_conv1d", "linear_attn.conv1d", Change::Convolution),
    ("ssm_norm", "linear_attn.norm", Change::None),
    ("ssm_out", "linear_attn.out_proj", Change::None),
    ("nextn.shared_head_norm", "shared_head.norm", Change::None),
];

/// Modules of a layer with Kimi's linear attention.
const KIMI: [(&str, &str, Change); 9] = [
    ("ssm_conv1d_q", "self_attn.q_conv1d", Change::Convolution),
    ("ssm_conv1d_k", "self_attn.k_conv1d", Change::Convolution),
    ("ssm_conv1d_v", "self_attn.v_conv1d", Change::Convolution),
    ("ssm_f_a", "self_attn.f_a_proj", Change::None),
    ("ssm_f_b", "self_attn.f_b_proj", Change::None),
    ("ssm_g_a", "self_attn.g_a_proj", Change::None),
    ("ssm_g_b", "self_attn.g_b_proj", Change::None),
    ("ssm_beta", "self_attn.b_proj", Change::None),
    ("ssm_norm", "self_attn.o_norm", Change::None),
];

/// Modules that choose blocks of keys.
const MINIMAX: [(&str, &str, Change); 4] = [
    ("indexer.q_proj", "self_attn.index_q_proj", Change::None),
    ("indexer.k_proj", "self_attn.index_k_proj", Change::None),
    ("indexer.q_norm", "self_attn.index_q_norm", Change::None),
    ("indexer.k_norm", "self_attn.index_k_norm", Change::None),
];

/// Modules of a layer with norms after attention and after the feed-forward part.
const GEMMA: [(&str, &str, Change); 6] = [
    ("ffn_norm", "pre_feedforward_layernorm", Change::None),
    ("post_ffw_norm", "post_feedforward_layernorm", Change::None),
    ("pre_ffw_norm_2", "pre_feedforward_layernorm_2", Change::None),
    ("post_ffw_norm_1", "post_feedforward_layernorm_1", Change::None),
    ("post_ffw_norm_2", "post_feedforward_layernorm_2", Change::None),
    ("ffn_gate_inp", "router.proj", Change::None),
];

/// Modules of a layer with gated residual streams and a table of n-grams.
const QWEN_4: [(&str, &str, Change); 21] = [
    ("hc_attn_norm", "attn_hyper_connection.hc_norm", Change::None),
    ("hc_attn_down", "attn_hyper_connection.input_mix_weight_down", Change::None),
    ("hc_attn_up", "attn_hyper_connection.input_mix_weight_up", Change::None),
    ("hc_attn_inject", "attn_hyper_connection.block_inject_weight", Change::None),
    ("hc_ffn_norm", "mlp_hyper_connection.hc_norm", Change::None),
    ("hc_ffn_down", "mlp_hyper_connection.input_mix_weight_down", Change::None),
    ("hc_ffn_up", "mlp_hyper_connection.input_mix_weight_up", Change::None),
    ("hc_ffn_inject", "mlp_hyper_connection.block_inject_weight", Change::None),
    ("ple_key", "ple.key_proj", Change::None),
    ("ple_value", "ple.value_proj", Change::None),
    ("ple_norm_key", "ple.norm_key", Change::None),
    ("ple_norm_query", "ple.norm_query", Change::None),
    ("ple_norm_conv", "ple.norm_conv", Change::None),
    ("ple_conv1d", "ple.conv1d", Change::Convolution),
    ("indexer.q_proj", "self_attn.index_q_proj", Change::None),
    ("indexer.k_proj", "self_attn.index_k_proj", Change::None),
    ("indexer.q_norm", "self_attn.index_q_norm", Change::None),
    ("indexer.k_norm", "self_attn.index_k_norm", Change::None),
    // Modules of a layer that predicts a further token.
    ("nextn.hc_head_norm", "hyper_connection_mixer.hc_norm", Change::None),
    ("nextn.hc_head_down", "hyper_connection_mixer.input_mix_weight_down", Change::None),
    ("nextn.hc_head_up", "hyper_connection_mixer.input_mix_weight_up", Change::None),
];

/// Modules of Step 3.5.
const STEP: [(&str, &str, Change); 8] = [
    ("attn_gate", "self_attn.g_proj", Change::None),
    ("ffn_gate_inp", "moe.gate", Change::None),
    ("ffn_gate_exps", "moe.gate_proj", Change::None),
    ("ffn_up_exps", "moe.up_proj", Change::None),
    ("ffn_down_exps", "moe.down_proj", Change::None),
    ("ffn_gate_shexp", "share_expert.gate_proj", Change::None),
    ("ffn_up_shexp", "share_expert.up_proj", Change::None),
    ("ffn_down_shexp", "share_expert.down_proj", Change::None),
];

/// The last norm of a layer that predicts a further token.
const BAILING: [(&str, &str, Change); 1] = [("layer_output_norm", "final_layernorm", Change::None)];

/// Gate, up and down.
const PARTS: [&str; 3] = ["gate", "up", "down"];

/// The name on the hub of the tensor `name`; `None` if llama.cpp's converter does not write it. `linear` says for each layer
/// whether it has linear attention.
pub(super) fn rename(arch: Arch, linear: &[bool], name: &str) -> Option<Renamed> {
    let plain = |name: String| Some(Renamed { name, change: Change::None });
    match arch {
        Arch::DeepSeek4 => return deepseek4::rename(linear.len(), name).and_then(plain),
        Arch::NemotronH => return nemotron::rename(name),
        _ => {}
    }
    let outside = outside_of(arch).iter().chain(&OUTSIDE);
    if let Some((_, outside)) = outside.into_iter().find(|(own, _)| *own == name) {
        return plain((*outside).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let in_layer = |rest: &str| format!("model.layers.{layer}.{rest}");
    // Names without a suffix: of vectors, and in old files.
    let of_linear = if arch == Arch::KimiLinear { "self_attn" } else { "linear_attn" };
    match rest {
        "ssm_a" => {
            let name = in_layer(&format!("{of_linear}.A_log"));
            return Some(Renamed { name, change: Change::NegativeExponential });
        }
        "ssm_dt.bias" => return plain(in_layer(&format!("{of_linear}.dt_bias"))),
        "attn_sinks.weight" | "attn_sinks" => return plain(in_layer("self_attn.sinks")),
        "exp_probs_b.bias" | "exp_probs_b" if arch == Arch::Ernie45Moe => {
            let name = in_layer("mlp.moe_statics.e_score_correction_bias");
            return Some(Renamed { name, change: Change::OneRow });
        }
        "exp_probs_b.bias" | "exp_probs_b" if arch == Arch::Step35 => return plain(in_layer("moe.router_bias")),
        "layer_output_scale.weight" if arch == Arch::Gemma4 => return plain(in_layer("layer_scalar")),
        "ffn_gate_inp.scale" if arch == Arch::Gemma4 => return plain(in_layer("router.scale")),
        "ffn_down_exps.scale" if arch == Arch::Gemma4 => return plain(in_layer("router.per_expert_scale")),
        "exp_probs_b.bias" | "exp_probs_b" => return plain(in_layer("mlp.gate.e_score_correction_bias")),
        "attn_rot_embd.weight" | "attn_rot_embd" | "rope_freqs.weight" => {
            return plain(in_layer("self_attn.rotary_emb.inv_freq"));
        }
        "nextn.shared_head_head.weight" => return plain(in_layer("shared_head.head.weight")),
        _ => {}
    }
    let (module, end) = rest.rsplit_once('.')?;
    let own = modules_of(arch).iter().find(|(own, ..)| *own == module);
    if let Some(name) = feed_forward(arch, module, end).filter(|_| own.is_none()) {
        return plain(in_layer(&name));
    }
    if module == "attn_qkv" && !linear.get(layer).is_some_and(|&linear| linear) {
        return Some(Renamed { name: in_layer(&format!("self_attn.q_proj.{end}")), change: Change::Fused });
    }
    let mut usual = MODULES.iter().chain(&LINEAR);
    let &(_, hub, change) = own.or_else(|| usual.find(|(own, ..)| *own == module))?;
    // The order of scales beside a matrix is unchanged.
    let change = if matches!(end, "weight" | "bias") { change } else { Change::None };
    Some(Renamed { name: in_layer(&format!("{hub}.{end}")), change })
}

/// Feed-forward modules of a layer.
const FEED_FORWARD: [&str; 10] = [
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "ffn_gate_inp",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
];

/// Names of matrices that files of this kind usually have, those in layers as the first layer has them: on the hub, and in the file.
pub(super) fn usual(arch: Arch, linear: &[bool]) -> Vec<(String, String)> {
    let modules = MODULES.iter().chain(modules_of(arch)).map(|(own, ..)| *own).chain(FEED_FORWARD);
    let in_layer = modules.map(|module| format!("blk.0.{module}.weight"));
    let outside = OUTSIDE.iter().chain(outside_of(arch)).map(|(own, _)| (*own).to_owned());
    in_layer.chain(outside).filter_map(|own| Some((rename(arch, linear, &own)?.name, own))).collect()
}

/// Names outside of the layers that a family has, or calls otherwise.
fn outside_of(arch: Arch) -> &'static [(&'static str, &'static str)] {
    match arch {
        Arch::BailingMoe | Arch::BailingMoe2 => &[("token_embd.weight", "model.word_embeddings.weight")],
        Arch::Qwen4Exp => &[
            ("output_hc_norm.weight", "model.hyper_connection_mixer.hc_norm.weight"),
            ("output_hc_down.weight", "model.hyper_connection_mixer.input_mix_weight_down.weight"),
            ("output_hc_up.weight", "model.hyper_connection_mixer.input_mix_weight_up.weight"),
        ],
        _ => &[],
    }
}

/// Modules of a layer that only this family has, or that differ in it.
fn modules_of(arch: Arch) -> &'static [(&'static str, &'static str, Change)] {
    match arch {
        Arch::KimiLinear => &KIMI,
        Arch::MiniMaxM3 => &MINIMAX,
        Arch::BailingMoe2 => &BAILING,
        Arch::Gemma3 | Arch::Gemma4 => &GEMMA,
        Arch::Step35 => &STEP,
        Arch::Qwen4Exp => &QWEN_4,
        _ => &[],
    }
}

/// Dense networks, routers, experts and shared experts.
fn feed_forward(arch: Arch, module: &str, end: &str) -> Option<String> {
    let rest = module.strip_prefix("ffn_")?;
    if rest == "gate_inp" {
        let router = if arch == Arch::GptOss { "router" } else { "gate" };
        return Some(format!("mlp.{router}.{end}"));
    }
    if rest == "gate_up_exps" {
        // Without a suffix, as in transformers.
        let module = if arch == Arch::Gemma4 { "experts.gate_up_proj" } else { "mlp.experts.gate_up_proj" };
        return Some(if end == "weight" { module.to_owned() } else { format!("{module}.{end}") });
    }
    let part = PARTS
        .into_iter()
        .find(|part| rest.strip_prefix(part).is_some_and(|r| r.is_empty() || r.starts_with(['_', '.'])))?;
    match &rest[part.len()..] {
        "" => Some(format!("mlp.{part}_proj.{end}")),
        "_exps" if arch == Arch::Gemma4 => Some(format!("experts.switch_glu.{part}_proj.{end}")),
        "_exps" if arch == Arch::GptOss => Some(format!("mlp.experts.{part}_proj.{end}")),
        "_exps" => Some(format!("mlp.switch_mlp.{part}_proj.{end}")),
        "_shexp" => Some(format!("mlp.{}.{part}_proj.{end}", arch.shared())),
        // Separate, in files from before April 2024.
        number => {
            let expert: usize = number.strip_prefix('.')?.parse().ok()?;
            Some(match (arch, part) {
                (Arch::Llama, "gate") => format!("block_sparse_moe.experts.{expert}.w1.{end}"),
                (Arch::Llama, "down") => format!("block_sparse_moe.experts.{expert}.w2.{end}"),
                (Arch::Llama, _) => format!("block_sparse_moe.experts.{expert}.w3.{end}"),
                _ => format!("mlp.experts.{expert}.{part}_proj.{end}"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        for (arch, own, hub, change) in [
            (Arch::Llama, "token_embd.weight", "model.embed_tokens.weight", Change::None),
            (Arch::Llama, "blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", Change::Queries),
            (
                Arch::Llama,
                "blk.0.ffn_gate.2.weight",
                "model.layers.0.block_sparse_moe.experts.2.w1.weight",
                Change::None,
            ),
            (
                Arch::Qwen3Moe,
                "blk.1.ffn_down_exps.weight",
                "model.layers.1.mlp.switch_mlp.down_proj.weight",
                Change::None,
            ),
            (Arch::Qwen3Moe, "blk.1.ffn_gate_inp.weight", "model.layers.1.mlp.gate.weight", Change::None),
            (Arch::Qwen3Moe, "blk.1.ffn_gate_up_exps.weight", "model.layers.1.mlp.experts.gate_up_proj", Change::None),
            (Arch::Qwen3Moe, "blk.1.ffn_up_exps.scale", "model.layers.1.mlp.switch_mlp.up_proj.scale", Change::None),
            (Arch::GptOss, "blk.1.ffn_up_exps.bias", "model.layers.1.mlp.experts.up_proj.bias", Change::None),
            (Arch::GptOss, "blk.1.ffn_gate_inp.bias", "model.layers.1.mlp.router.bias", Change::None),
            (Arch::DeepSeek2, "blk.9.attn_k_b.weight", "model.layers.9.self_attn.embed_q.weight", Change::Heads),
            (
                Arch::DeepSeek2,
                "blk.9.ffn_up_shexp.weight",
                "model.layers.9.mlp.shared_experts.up_proj.weight",
                Change::None,
            ),
            (
                Arch::Qwen3Next,
                "blk.9.ffn_up_shexp.weight",
                "model.layers.9.mlp.shared_expert.up_proj.weight",
                Change::None,
            ),
            (Arch::Qwen3Next, "blk.0.attn_qkv.weight", "model.layers.0.linear_attn.in_proj_qkv.weight", Change::None),
            (Arch::Qwen3Next, "blk.0.ssm_a", "model.layers.0.linear_attn.A_log", Change::NegativeExponential),
            (Arch::Qwen3, "blk.1.attn_qkv.weight", "model.layers.1.self_attn.q_proj.weight", Change::Fused),
            (
                Arch::KimiLinear,
                "blk.0.ssm_conv1d_k.weight",
                "model.layers.0.self_attn.k_conv1d.weight",
                Change::Convolution,
            ),
            (Arch::KimiLinear, "blk.0.ssm_a", "model.layers.0.self_attn.A_log", Change::NegativeExponential),
            (Arch::KimiLinear, "blk.0.ssm_norm.weight", "model.layers.0.self_attn.o_norm.weight", Change::None),
            (
                Arch::MiniMaxM3,
                "blk.3.indexer.k_norm.weight",
                "model.layers.3.self_attn.index_k_norm.weight",
                Change::None,
            ),
            (Arch::GlmDsa, "blk.1.indexer.k_norm.bias", "model.layers.1.self_attn.indexer.k_norm.bias", Change::None),
            (
                Arch::Ernie45Moe,
                "blk.1.exp_probs_b.bias",
                "model.layers.1.mlp.moe_statics.e_score_correction_bias",
                Change::OneRow,
            ),
            (Arch::Glm4Moe, "blk.46.nextn.eh_proj.weight", "model.layers.46.eh_proj.weight", Change::None),
        ] {
            let found = rename(arch, &[true, false], own);
            assert_eq!(found, Some(Renamed { name: hub.to_owned(), change }), "{own}");
        }
        for unknown in ["blk.weight", "blk.x.attn_q.weight", "v.blk.0.attn_q.weight", "blk.0.ffn_gateway.weight", ""] {
            assert_eq!(rename(Arch::Llama, &[], unknown), None, "{unknown}");
        }
    }
}

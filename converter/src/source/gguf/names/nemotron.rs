//! Names of Nemotron-H and Nemotron 3, whose blocks have special names (`MODEL_ARCH.NEMOTRON_H_MOE` in `gguf-py/gguf/constants.py`
//! and `conversion/nemotron.py` of <https://github.com/ggml-org/llama.cpp>).

use super::{Change, Renamed};

/// Names outside of the layers.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "backbone.embeddings.weight"),
    ("output_norm.weight", "backbone.norm_f.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Names in a block that have no suffix on the hub, or another one.
const WHOLE: [(&str, &str, Change); 4] = [
    ("ssm_a", "mixer.A_log", Change::NegativeExponential),
    ("ssm_d", "mixer.D", Change::Flat),
    ("ssm_dt.bias", "mixer.dt_bias", Change::None),
    ("exp_probs_b.bias", "mixer.gate.e_score_correction_bias", Change::None),
];

/// Modules in a block; the suffix stays.
const MODULES: [(&str, &str, Change); 22] = [
    ("attn_norm", "norm", Change::None),
    ("ssm_in", "mixer.in_proj", Change::None),
    ("ssm_conv1d", "mixer.conv1d", Change::Convolution),
    // A row for each group.
    ("ssm_norm", "mixer.norm", Change::Flat),
    ("ssm_out", "mixer.out_proj", Change::None),
    ("attn_q", "mixer.q_proj", Change::Queries),
    ("attn_k", "mixer.k_proj", Change::Keys),
    ("attn_v", "mixer.v_proj", Change::None),
    ("attn_qkv", "mixer.q_proj", Change::Fused),
    ("attn_output", "mixer.o_proj", Change::None),
    ("ffn_up", "mixer.up_proj", Change::None),
    ("ffn_down", "mixer.down_proj", Change::None),
    ("ffn_gate_inp", "mixer.gate", Change::None),
    // All experts of a block in one tensor, as in MLX.
    ("ffn_up_exps", "mixer.switch_mlp.fc1", Change::None),
    ("ffn_down_exps", "mixer.switch_mlp.fc2", Change::None),
    ("ffn_up_shexp", "mixer.shared_experts.up_proj", Change::None),
    ("ffn_down_shexp", "mixer.shared_experts.down_proj", Change::None),
    ("ffn_latent_down", "mixer.fc1_latent_proj", Change::None),
    ("ffn_latent_up", "mixer.fc2_latent_proj", Change::None),
    // Modules of a block that predicts a further token.
    ("nextn.eh_proj", "eh_proj", Change::None),
    ("nextn.enorm", "enorm", Change::None),
    ("nextn.hnorm", "hnorm", Change::None),
];

/// The name on the hub of the tensor `name`; `None` if llama.cpp's converter does not write it.
pub(super) fn rename(name: &str) -> Option<Renamed> {
    if let Some((_, outside)) = OUTSIDE.iter().find(|(own, _)| *own == name) {
        return Some(Renamed { name: (*outside).to_owned(), change: Change::None });
    }
    let (block, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    let renamed = |rest: String, change| Some(Renamed { name: format!("backbone.layers.{block}.{rest}"), change });
    if let Some((_, hub, change)) = WHOLE.iter().find(|(own, ..)| *own == rest) {
        return renamed((*hub).to_owned(), *change);
    }
    let (module, end) = rest.rsplit_once('.')?;
    match module {
        "post_attention_norm" | "ffn_norm" => return renamed(format!("post_attention_layernorm.{end}"), Change::None),
        "nextn.shared_head_norm" => return renamed(format!("shared_head.norm.{end}"), Change::None),
        _ => {}
    }
    let (_, hub, change) = MODULES.iter().find(|(own, ..)| *own == module)?;
    // The shape of a bias or of scales beside a matrix is unchanged.
    let change = if end == "weight" { *change } else { Change::None };
    renamed(format!("{hub}.{end}"), change)
}

//! GGUF files of models whose layers differ from each other, as llama.cpp's converter (`conversion/kimi_linear.py`,
//! `minimax.py`, `mimo.py`, `deepseek.py` and `dots1.py` beside it) writes them: they give the models of the checkpoints that
//! they were made of.

use crate::common::gguf::{Origin, Value, Written};
use crate::common::safetensors::{Tensors, values};
use crate::common::written::{F32, check, float, floats, golden, metadata};
use serde_json::{Value as Json, json};

const I32: u32 = 26;

/// Tensors that keep their shape and numbers: name in the file, name on the hub.
const PLAIN: [(&str, &str); 42] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    ("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
    ("ssm_conv1d_q.weight", "self_attn.q_conv1d.weight"),
    ("ssm_conv1d_k.weight", "self_attn.k_conv1d.weight"),
    ("ssm_conv1d_v.weight", "self_attn.v_conv1d.weight"),
    ("ssm_f_a.weight", "self_attn.f_a_proj.weight"),
    ("ssm_f_b.weight", "self_attn.f_b_proj.weight"),
    ("ssm_g_a.weight", "self_attn.g_a_proj.weight"),
    ("ssm_g_b.weight", "self_attn.g_b_proj.weight"),
    ("ssm_beta.weight", "self_attn.b_proj.weight"),
    ("ssm_norm.weight", "self_attn.o_norm.weight"),
    ("ssm_dt.bias", "self_attn.dt_bias"),
    ("ssm_a", "self_attn.A_log"),
    ("indexer.q_proj.weight", "self_attn.index_q_proj.weight"),
    ("indexer.k_proj.weight", "self_attn.index_k_proj.weight"),
    ("indexer.q_norm.weight", "self_attn.index_q_norm.weight"),
    ("indexer.k_norm.weight", "self_attn.index_k_norm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
    ("ffn_gate_inp.weight", "block_sparse_moe.gate.weight"),
    ("exp_probs_b.bias", "block_sparse_moe.gate.e_score_correction_bias"),
    ("exp_probs_b.bias", "block_sparse_moe.e_score_correction_bias"),
    ("ffn_gate_shexp.weight", "block_sparse_moe.shared_experts.gate_proj.weight"),
    ("ffn_up_shexp.weight", "block_sparse_moe.shared_experts.up_proj.weight"),
    ("ffn_down_shexp.weight", "block_sparse_moe.shared_experts.down_proj.weight"),
    ("attn_sinks.weight", "self_attn.attention_sink_bias"),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
    ("token_embd.weight", "embed_tokens.weight"),
    ("output_norm.weight", "norm.weight"),
];

/// How many of them are in layers.
const IN_LAYERS: usize = PLAIN.len() - 2;

/// A tensor as it is written. `centred`: norms are stored around zero, and the converter adds one.
fn tensor(tensors: &Tensors, centred: bool, name: String, hub: &str) -> Written {
    let (mut numbers, mut shape) = (values(tensors, hub), tensors[hub].shape.clone());
    if centred && name.ends_with("norm.weight") {
        numbers.iter_mut().for_each(|n| *n += 1.0);
    }
    if name.ends_with("ssm_a") {
        numbers.iter_mut().for_each(|n| *n = -n.exp());
    }
    if name.contains("ssm_conv1d") {
        shape = vec![1, shape[0], 1, shape[2]];
    }
    (name, F32, shape, floats(&numbers))
}

/// All tensors of a checkpoint as they are written.
fn written(tensors: &Tensors, config: &Json, prefix: &'static str, head: &str, centred: bool) -> Vec<Written> {
    let origin = Origin { tensors, config, prefix };
    let count = |key: &str| config[key].as_u64().unwrap() as usize;
    let mut all = vec![tensor(tensors, centred, "output.weight".into(), head)];
    for (own, hub) in &PLAIN[IN_LAYERS..] {
        all.push(tensor(tensors, centred, (*own).to_owned(), &format!("{prefix}{hub}")));
    }
    for layer in 0..count("num_hidden_layers") {
        let (own, hub) =
            (|rest: &str| format!("blk.{layer}.{rest}"), |rest: &str| format!("{prefix}layers.{layer}.{rest}"));
        for (to, from) in &PLAIN[..IN_LAYERS] {
            if tensors.contains_key(&hub(from)) {
                all.push(tensor(tensors, centred, own(to), &hub(from)));
            }
        }
        if tensors.contains_key(&hub("self_attn.kv_b_proj.weight")) {
            let (heads, rank) = (count("num_attention_heads"), count("kv_lora_rank"));
            for (name, shape) in [
                ("attn_k_b.weight", vec![heads, rank, count("qk_nope_head_dim")]),
                ("attn_v_b.weight", vec![heads, count("v_head_dim"), rank]),
            ] {
                all.push((own(name), F32, shape, floats(&origin.data(&own(name)))));
            }
        }
        for (part, module) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
            let first =
                [format!("block_sparse_moe.experts.0.{module}.weight"), format!("mlp.experts.0.{part}_proj.weight")];
            let Some(one) = first.iter().find_map(|name| tensors.get(&hub(name))) else { continue };
            let name = own(&format!("ffn_{part}_exps.weight"));
            let data = floats(&origin.data(&name));
            all.push((
                name,
                F32,
                vec![data.len() / 4 / one.shape.iter().product::<usize>(), one.shape[0], one.shape[1]],
                data,
            ));
        }
    }
    all
}

#[test]
fn kimi_linear_comes_back_from_gguf() {
    let (config, tensors) = golden("kimi_linear");
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("context_length", "model_max_length"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
        ("attention.value_length_mla", "v_head_dim"),
        ("rope.dimension_count", "qk_rope_head_dim"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_token"),
        ("expert_group_used_count", "topk_group"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_count", "num_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("ssm.conv_kernel", "linear_attn_config/short_conv_kernel_size"),
        ("kda.head_dim", "linear_attn_config/head_dim"),
    ];
    let others = [
        // One head of latents where attention is latent, none elsewhere.
        ("attention.head_count_kv", Value::Bools(vec![false, false, true])),
        ("attention.key_length_mla", Value::U32(24)),
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("expert_weights_scale", float(&config, "routed_scaling_factor")),
        ("expert_gating_func", Value::U32(2)),
    ];
    let metadata = metadata("kimi-linear", &config, &counts, &others);
    let written = written(&tensors, &config, "model.", "lm_head.weight", false);
    check("kimi_linear", &config, &tensors, &metadata, &written);
}

#[test]
fn minimax_m3_comes_back_from_gguf() {
    let (mut config, tensors) = golden("minimax_m3");
    // llama.cpp knows this limit without a key.
    config["text_config"]["swiglu_limit"] = json!(7.0);
    let text = config["text_config"].clone();
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "dense_intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("rope.dimension_count", "rotary_dim"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "intermediate_size"),
        ("attention.indexer.head_count", "sparse_attention_config/sparse_num_index_heads"),
        ("attention.indexer.key_length", "sparse_attention_config/sparse_index_dim"),
        ("attention.indexer.top_k", "sparse_attention_config/sparse_topk_blocks"),
        ("attention.indexer.block_size", "sparse_attention_config/sparse_block_size"),
        ("attention.indexer.local_blocks", "sparse_attention_config/sparse_local_block"),
    ];
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&text, "rms_norm_eps")),
        ("rope.freq_base", float(&text, "rope_theta")),
        ("expert_shared_count", Value::U32(1)),
        ("leading_dense_block_count", Value::U32(1)),
        ("expert_weights_scale", float(&text, "routed_scaling_factor")),
        ("expert_weights_norm", Value::Bool(true)),
        ("expert_gating_func", Value::U32(2)),
    ];
    let metadata = metadata("minimax-m3", &text, &counts, &others);
    let written = written(&tensors, &text, "language_model.model.", "language_model.lm_head.weight", true);
    check("minimax_m3", &config, &tensors, &metadata, &written);
}

#[test]
fn dots1_comes_back_from_gguf() {
    let (mut config, tensors) = golden("dots1");
    // llama.cpp knows no windows of this family, and no released model has one.
    config["max_window_layers"] = config["num_hidden_layers"].clone();
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_count", "n_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
    ];
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("expert_weights_scale", float(&config, "routed_scaling_factor")),
        ("expert_weights_norm", Value::Bool(true)),
        ("expert_gating_func", Value::U32(2)),
    ];
    let metadata = metadata("dots1", &config, &counts, &others);
    let written = written(&tensors, &config, "model.", "lm_head.weight", false);
    check("dots1", &config, &tensors, &metadata, &written);
}

#[test]
fn mimo_v2_flash_comes_back_from_gguf() {
    let (config, tensors) = golden("mimo_v2_flash");
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "v_head_dim"),
        ("attention.sliding_window", "sliding_window"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ];
    let others = [
        ("attention.head_count_kv", Value::U32s(vec![1, 2, 2])),
        ("attention.sliding_window_pattern", Value::Bools(vec![false, true, true])),
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.dimension_count", Value::U32(8)),
        ("rope.freq_base", Value::F32(5e6)),
        ("rope.freq_base_swa", Value::F32(1e4)),
        ("expert_gating_func", Value::U32(2)),
    ];
    let value_scale = ("attention.value_scale", float(&config, "attention_value_scale"));
    let written = written(&tensors, &config, "model.", "lm_head.weight", false);
    // Early files lack the factor of values.
    for others in [&others[..], &[&others[..], &[value_scale]].concat()] {
        let metadata = metadata("mimo2", &config, &counts, others);
        check("mimo_v2_flash", &config, &tensors, &metadata, &written);
    }
}

/// The tensors of DeepSeek-V4 as they are written: the release's own names on the right, in layers behind their number.
fn deepseek_v4_written(tensors: &Tensors) -> Vec<Written> {
    let outside = [
        ("token_embd.weight", "embed.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", "head.weight"),
        ("output_hc_fn.weight", "hc_head_fn"),
        ("output_hc_base.weight", "hc_head_base"),
        ("output_hc_scale.weight", "hc_head_scale"),
    ];
    let in_layers = [
        ("hc_attn_fn.weight", "hc_attn_fn"),
        ("hc_attn_base.weight", "hc_attn_base"),
        ("hc_attn_scale.weight", "hc_attn_scale"),
        ("hc_ffn_fn.weight", "hc_ffn_fn"),
        ("hc_ffn_base.weight", "hc_ffn_base"),
        ("hc_ffn_scale.weight", "hc_ffn_scale"),
        ("attn_sinks.weight", "attn.attn_sink"),
        ("attn_norm.weight", "attn_norm.weight"),
        ("ffn_norm.weight", "ffn_norm.weight"),
        ("attn_q_a.weight", "attn.wq_a.weight"),
        ("attn_q_a_norm.weight", "attn.q_norm.weight"),
        ("attn_q_b.weight", "attn.wq_b.weight"),
        ("attn_kv.weight", "attn.wkv.weight"),
        ("attn_kv_a_norm.weight", "attn.kv_norm.weight"),
        ("attn_output_a.weight", "attn.wo_a.weight"),
        ("attn_output_b.weight", "attn.wo_b.weight"),
        ("attn_compressor_ape.weight", "attn.compressor.ape"),
        ("attn_compressor_kv.weight", "attn.compressor.wkv.weight"),
        ("attn_compressor_gate.weight", "attn.compressor.wgate.weight"),
        ("attn_compressor_norm.weight", "attn.compressor.norm.weight"),
        ("indexer.attn_q_b.weight", "attn.indexer.wq_b.weight"),
        ("indexer.proj.weight", "attn.indexer.weights_proj.weight"),
        ("indexer_compressor_ape.weight", "attn.indexer.compressor.ape"),
        ("indexer_compressor_kv.weight", "attn.indexer.compressor.wkv.weight"),
        ("indexer_compressor_gate.weight", "attn.indexer.compressor.wgate.weight"),
        ("indexer_compressor_norm.weight", "attn.indexer.compressor.norm.weight"),
        ("ffn_gate_inp.weight", "ffn.gate.weight"),
        ("exp_probs_b.bias", "ffn.gate.bias"),
        ("ffn_gate_shexp.weight", "ffn.shared_experts.w1.weight"),
        ("ffn_up_shexp.weight", "ffn.shared_experts.w3.weight"),
        ("ffn_down_shexp.weight", "ffn.shared_experts.w2.weight"),
    ];
    let plain = |own: String, hub: &str| (own, F32, tensors[hub].shape.clone(), floats(&values(tensors, hub)));
    let mut all: Vec<_> = outside.iter().map(|(own, hub)| plain((*own).to_owned(), hub)).collect();
    for layer in 0..4 {
        let (own, hub) = (|rest: &str| format!("blk.{layer}.{rest}"), |rest: &str| format!("layers.{layer}.{rest}"));
        let there = in_layers.iter().filter(|(_, from)| tensors.contains_key(&hub(from)));
        all.extend(there.map(|(to, from)| plain(own(to), &hub(from))));
        if let Some(table) = tensors.get(&hub("ffn.gate.tid2eid")) {
            let narrow = table.bytes.chunks(8).flat_map(|n| n[..4].to_vec()).collect();
            all.push((own("ffn_gate_tid2eid.weight"), I32, table.shape.clone(), narrow));
        }
        for (part, module) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
            let experts = (0..8).map(|expert| hub(&format!("ffn.experts.{expert}.{module}.weight")));
            let shape = &tensors[&hub(&format!("ffn.experts.0.{module}.weight"))].shape;
            let data = experts.flat_map(|name| floats(&values(tensors, &name))).collect();
            all.push((own(&format!("ffn_{part}_exps.weight")), F32, vec![8, shape[0], shape[1]], data));
        }
    }
    // A layer that predicts, which is left out.
    all.push(("blk.4.nextn.enorm.weight".to_owned(), F32, vec![64], vec![0; 256]));
    all
}

#[test]
fn deepseek_v4_comes_back_from_gguf() {
    let (config, tensors) = golden("deepseek_v4");
    let counts = [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("attention.sliding_window", "sliding_window"),
        ("attention.q_lora_rank", "q_lora_rank"),
        ("attention.output_lora_rank", "o_lora_rank"),
        ("attention.output_group_count", "o_groups"),
        ("attention.indexer.head_count", "index_n_heads"),
        ("attention.indexer.key_length", "index_head_dim"),
        ("attention.indexer.top_k", "index_topk"),
        ("rope.dimension_count", "qk_rope_head_dim"),
        ("rope.scaling.original_context_length", "rope_scaling/original_max_position_embeddings"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("hash_layer_count", "num_hash_layers"),
        ("hyper_connection.count", "hc_mult"),
        ("hyper_connection.sinkhorn_iterations", "hc_sinkhorn_iters"),
        ("nextn_predict_layers", "num_nextn_predict_layers"),
    ];
    let others = [
        ("block_count", Value::U32(5)),
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("attention.compress_ratios", Value::U32s(vec![0, 4, 128, 4, 0])),
        ("attention.compress_rope_freq_base", float(&config, "compress_rope_theta")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("rope.scaling.type", Value::Text("yarn")),
        ("rope.scaling.factor", Value::F32(16.0)),
        ("rope.scaling.yarn_beta_fast", Value::F32(32.0)),
        ("rope.scaling.yarn_beta_slow", Value::F32(1.0)),
        ("swiglu_clamp_exp", Value::F32(1.0)),
        ("expert_weights_scale", float(&config, "routed_scaling_factor")),
        ("expert_weights_norm", Value::Bool(true)),
        ("expert_gating_func", Value::U32(4)),
        ("hyper_connection.epsilon", float(&config, "hc_eps")),
    ];
    let metadata = metadata("deepseek4", &config, &counts, &others);
    check("deepseek_v4", &config, &tensors, &metadata, &deepseek_v4_written(&tensors));
}

//! GGUF files of the families that came last, as llama.cpp's converter (`conversion/bailing.py`, `nemotron.py`, `mimo.py`, `step3.py`,
//! `phi.py`, `gemma.py` and `qwen4exp.py`) writes them: they give the models of the checkpoints that they were made of.

use std::fs;

use crate::common::gguf::{Origin, Value, Written, alternate, file};
use crate::common::safetensors::{Tensor, Tensors, values};
use crate::common::written::{F32, Renaming, add_one, check, float, floats, golden, metadata};
use serde_json::{Value as Json, json};
use sluice_converter::{Options, plan};

/// Names outside of the layers that most checkpoints have.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Names in a layer that most checkpoints have.
const USUAL: [(&str, &str); 10] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

/// Experts one by one, as most checkpoints have them.
const EXPERTS: [(&str, &str); 3] = [
    ("ffn_gate_exps.weight", "mlp.experts.{}.gate_proj.weight"),
    ("ffn_up_exps.weight", "mlp.experts.{}.up_proj.weight"),
    ("ffn_down_exps.weight", "mlp.experts.{}.down_proj.weight"),
];

/// Counts that every decoder has: key in the file, key of the configuration.
const COUNTS: [(&str, &str); 3] = [
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
];

/// Counts of a model whose layers all have the same heads.
const HEADS: [(&str, &str); 3] = [
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
];

fn count(config: &Json, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
}

/// Names of Ling and Ring but for attention.
const BAILING: [(&str, &str); 16] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_qkv.weight", "attention.query_key_value.weight"),
    ("attn_output.weight", "attention.dense.weight"),
    ("attn_q_norm.weight", "attention.query_layernorm.weight"),
    ("attn_k_norm.weight", "attention.key_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("exp_probs_b.bias", "mlp.gate.expert_bias"),
    ("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
    ("nextn.eh_proj.weight", "eh_proj.weight"),
    ("layer_output_norm.weight", "final_layernorm.weight"),
];

fn bailing(tensors: &Tensors, layers: usize) -> Vec<Written> {
    let outside = [("token_embd.weight", "model.word_embeddings.weight"), OUTSIDE[1], OUTSIDE[2]];
    let next = [("nextn.enorm.weight", "enorm.weight"), ("nextn.hnorm.weight", "hnorm.weight")];
    let in_layers = [&BAILING[..], &next].concat();
    let renaming =
        Renaming { tensors, prefix: "model.", outside: &outside, in_layers: &in_layers, experts: &EXPERTS, layers };
    renaming.written(|_, _, _| {})
}

/// Ling of the first generation has queries, keys and values apart, and the halves of their heads alternate.
#[test]
fn bailing_moe_comes_back_from_gguf() {
    let (config, tensors) = golden("bailing_moe");
    let (heads, kv_heads) = (count(&config, "num_attention_heads"), count(&config, "num_key_value_heads"));
    let apart = |(name, ty, shape, data): Written| -> Vec<Written> {
        let Some(stem) = name.strip_suffix("attn_qkv.weight") else { return vec![(name, ty, shape, data)] };
        let numbers: Vec<f32> = data.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        let (cols, head) = (shape[1], shape[0] / (heads + 2 * kv_heads));
        let (queries, others) = numbers.split_at(heads * head * cols);
        let (keys, values) = others.split_at(kv_heads * head * cols);
        let part = |which: &str, numbers: &[f32]| {
            (format!("{stem}attn_{which}.weight"), F32, vec![numbers.len() / cols, cols], floats(numbers))
        };
        vec![
            part("q", &alternate(queries, heads * head, heads)),
            part("k", &alternate(keys, kv_heads * head, kv_heads)),
            part("v", values),
        ]
    };
    let written: Vec<Written> = bailing(&tensors, 2).into_iter().flat_map(apart).collect();
    let counts = [
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_count", "num_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
    ];
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("rope.dimension_count", Value::U32(10)),
        ("expert_weights_scale", Value::F32(1.0)),
        ("expert_weights_norm", Value::Bool(true)),
    ];
    let metadata = metadata("bailingmoe", &config, &[&COUNTS[..], &HEADS, &counts].concat(), &others);
    check("bailing_moe", &config, &tensors, &metadata, &written);
}

/// Ling of the second generation has them in one, as the release has, and a layer that predicts, which is left out.
#[test]
fn bailing_moe_v2_comes_back_from_gguf() {
    let (mut config, tensors) = golden("bailing_moe_v2");
    config["model_type"] = json!("bailing_moe_v2");
    let counts = [
        ("context_length", "max_position_embeddings"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("rope.dimension_count", "rotary_dim"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_group_count", "n_group"),
        ("expert_group_used_count", "topk_group"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
        ("expert_shared_count", "num_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("nextn_predict_layers", "num_nextn_predict_layers"),
    ];
    let others = [
        ("block_count", Value::U32(4)),
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("expert_gating_func", Value::U32(2)),
        ("expert_weights_scale", float(&config, "routed_scaling_factor")),
        ("expert_weights_norm", Value::Bool(true)),
    ];
    let counts = [&COUNTS[1..], &HEADS[1..], &counts].concat();
    let metadata = metadata("bailingmoe2", &config, &counts, &others);
    check("bailing_moe_v2", &config, &tensors, &metadata, &bailing(&tensors, 4));
}

/// Names in a block of Nemotron-H.
const NEMOTRON: [(&str, &str); 22] = [
    ("attn_norm.weight", "norm.weight"),
    ("ssm_in.weight", "mixer.in_proj.weight"),
    ("ssm_conv1d.weight", "mixer.conv1d.weight"),
    ("ssm_conv1d.bias", "mixer.conv1d.bias"),
    ("ssm_dt.bias", "mixer.dt_bias"),
    ("ssm_a", "mixer.A_log"),
    ("ssm_d", "mixer.D"),
    ("ssm_norm.weight", "mixer.norm.weight"),
    ("ssm_out.weight", "mixer.out_proj.weight"),
    ("attn_q.weight", "mixer.q_proj.weight"),
    ("attn_k.weight", "mixer.k_proj.weight"),
    ("attn_v.weight", "mixer.v_proj.weight"),
    ("attn_output.weight", "mixer.o_proj.weight"),
    ("ffn_up.weight", "mixer.up_proj.weight"),
    ("ffn_down.weight", "mixer.down_proj.weight"),
    ("ffn_gate_inp.weight", "mixer.gate.weight"),
    ("exp_probs_b.bias", "mixer.gate.e_score_correction_bias"),
    ("ffn_up_shexp.weight", "mixer.shared_experts.up_proj.weight"),
    ("ffn_down_shexp.weight", "mixer.shared_experts.down_proj.weight"),
    ("ffn_latent_down.weight", "mixer.fc1_latent_proj.weight"),
    ("ffn_latent_up.weight", "mixer.fc2_latent_proj.weight"),
    ("nextn.eh_proj.weight", "eh_proj.weight"),
];

/// Counts of Nemotron-H.
const NEMOTRON_COUNTS: [(&str, &str); 17] = [
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.value_length", "head_dim"),
    ("ssm.conv_kernel", "conv_kernel"),
    ("ssm.state_size", "ssm_state_size"),
    ("ssm.group_count", "n_groups"),
    ("ssm.time_step_rank", "mamba_num_heads"),
    ("expert_count", "n_routed_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
    ("context_length", "max_position_embeddings"),
];

/// Both have Mamba-2, attention without positions, whose halves of heads alternate all the same, and experts; one has latents.
#[test]
fn nemotron_h_comes_back_from_gguf() {
    for family in ["nemotron_h", "nemotron_h_latent"] {
        let (config, tensors) = golden(family);
        let (heads, kv_heads) = (count(&config, "num_attention_heads"), count(&config, "num_key_value_heads"));
        let (groups, blocks) = (count(&config, "n_groups"), count(&config, "num_hidden_layers"));
        let outside = [
            ("token_embd.weight", "backbone.embeddings.weight"),
            ("output_norm.weight", "backbone.norm_f.weight"),
            ("output.weight", "lm_head.weight"),
        ];
        let experts = [
            ("ffn_up_exps.weight", "mixer.experts.{}.up_proj.weight"),
            ("ffn_down_exps.weight", "mixer.experts.{}.down_proj.weight"),
        ];
        let renaming = Renaming {
            tensors: &tensors,
            prefix: "backbone.",
            outside: &outside,
            in_layers: &NEMOTRON,
            experts: &experts,
            layers: blocks,
        };
        let written = renaming.written(|name, numbers, shape| match name.splitn(3, '.').last().unwrap() {
            "ssm_a" => {
                numbers.iter_mut().for_each(|n| *n = -n.exp());
                shape.push(1);
            }
            "ssm_d" => shape.push(1),
            "ssm_conv1d.weight" => *shape = vec![shape[0], shape[2]],
            "ssm_norm.weight" => *shape = vec![groups, shape[0] / groups],
            "attn_q.weight" => *numbers = alternate(numbers, shape[0], heads),
            "attn_k.weight" => *numbers = alternate(numbers, shape[0], kv_heads),
            _ => {}
        });
        let pattern = config["hybrid_override_pattern"].as_str().unwrap();
        let of_kind = |letter: char, n: usize| {
            Value::U32s(pattern.chars().map(|c| if c == letter { n as u32 } else { 0 }).collect())
        };
        let mut counts = NEMOTRON_COUNTS.to_vec();
        if config["moe_latent_size"].is_u64() {
            counts.push(("moe_latent_size", "moe_latent_size"));
        }
        let inner = count(&config, "mamba_num_heads") * count(&config, "mamba_head_dim");
        let others = [
            ("attention.head_count_kv", of_kind('*', kv_heads)),
            ("feed_forward_length", of_kind('E', count(&config, "moe_intermediate_size"))),
            ("ssm.inner_size", Value::U32(inner as u32)),
            ("attention.layer_norm_rms_epsilon", float(&config, "layer_norm_epsilon")),
            ("rope.scaling.finetuned", Value::Bool(false)),
            ("expert_weights_norm", Value::Bool(true)),
            ("expert_weights_scale", float(&config, "routed_scaling_factor")),
        ];
        let metadata = metadata("nemotron_h_moe", &config, &counts, &others);
        check(family, &config, &tensors, &metadata, &written);
    }
}

/// Names in a layer of MiMo-V2.5 that are not usual.
const MIMO: [(&str, &str); 5] = [
    ("attn_qkv.weight", "self_attn.qkv_proj.weight"),
    ("attn_sinks.weight", "self_attn.attention_sink_bias"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
];

/// Queries, keys and values are in one tensor, and layers with a window have other heads of keys than those without.
#[test]
fn mimo_v2_5_comes_back_from_gguf() {
    let (mut config, tensors) = golden("mimo_v2");
    config["model_type"] = json!("mimo_v2_flash");
    // Under this key, V2-Flash counts the tokens before the one that sees them.
    config.as_object_mut().unwrap().remove("sliding_window_size");
    let renaming = Renaming {
        tensors: &tensors,
        prefix: "model.",
        outside: &OUTSIDE,
        in_layers: &[&USUAL[..], &MIMO].concat(),
        experts: &EXPERTS,
        layers: 3,
    };
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "v_head_dim"),
        ("attention.sliding_window", "sliding_window"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ];
    let others = [
        ("attention.head_count_kv", Value::U32s(vec![2, 4, 2])),
        ("attention.sliding_window_pattern", Value::Bools(vec![false, true, false])),
        ("attention.layer_norm_rms_epsilon", float(&config, "layernorm_epsilon")),
        ("attention.value_scale", float(&config, "attention_value_scale")),
        ("rope.dimension_count", Value::U32(8)),
        ("rope.freq_base", Value::F32(1e7)),
        ("rope.freq_base_swa", Value::F32(1e4)),
        ("expert_gating_func", Value::U32(2)),
    ];
    let metadata = metadata("mimo2", &config, &[&COUNTS[..], &counts].concat(), &others);
    check("mimo_v2", &config, &tensors, &metadata, &renaming.written(|_, _, _| {}));
}

/// Names in a layer of Step 3.5 that are not usual.
const STEP: [(&str, &str); 10] = [
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_gate.weight", "self_attn.g_proj.weight"),
    ("ffn_gate_inp.weight", "moe.gate.weight"),
    ("exp_probs_b.bias", "moe.router_bias"),
    ("ffn_gate_exps.weight", "moe.gate_proj.weight"),
    ("ffn_up_exps.weight", "moe.up_proj.weight"),
    ("ffn_down_exps.weight", "moe.down_proj.weight"),
    ("ffn_gate_shexp.weight", "share_expert.gate_proj.weight"),
    ("ffn_up_shexp.weight", "share_expert.up_proj.weight"),
    ("ffn_down_shexp.weight", "share_expert.down_proj.weight"),
];

/// Factors of Llama 3's scaling as the converter writes them: for a head of which everything turns.
fn llama_3_factors(theta: f64, pairs: usize, [factor, original, low, high]: [f64; 4]) -> Vec<f32> {
    let wavelength = |pair: usize| std::f64::consts::TAU * theta.powf(pair as f64 / pairs as f64);
    let divisor = |wave: f64| {
        if wave < original / high {
            return 1.0;
        }
        if wave > original / low {
            return factor;
        }
        let smooth = (original / wave - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    (0..pairs).map(|pair| divisor(wavelength(pair)) as f32).collect()
}

#[test]
fn step_3_5_comes_back_from_gguf() {
    let (mut config, tensors) = golden("step3p5");
    // Two blended wavelengths say where the blending begins and ends.
    config["rope_scaling"]["original_max_position_embeddings"] = json!(15_000);
    let renaming = Renaming {
        tensors: &tensors,
        prefix: "model.",
        outside: &OUTSIDE,
        in_layers: &[&USUAL[..], &STEP].concat(),
        experts: &[],
        layers: 4,
    };
    let mut written = renaming.written(|name, numbers, _| {
        if name.ends_with("norm.weight") {
            add_one(numbers);
        }
    });
    let factors = llama_3_factors(500_000.0, 6, [2.0, 15_000.0, 1.0, 32.0]);
    written.push(("rope_freqs.weight".to_owned(), F32, vec![6], floats(&factors)));
    let counts = [
        ("block_count", "num_hidden_layers"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("attention.sliding_window", "sliding_window"),
        ("expert_count", "moe_num_experts"),
        ("expert_used_count", "moe_top_k"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "share_expert_dim"),
    ];
    let others = [
        ("attention.head_count", Value::U32s(vec![4, 6, 4, 6])),
        ("attention.head_count_kv", Value::U32s(vec![2, 2, 2, 2])),
        ("attention.sliding_window_pattern", Value::Bools(vec![false, true, false, true])),
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", Value::F32(500_000.0)),
        ("rope.freq_base_swa", Value::F32(10_000.0)),
        ("leading_dense_block_count", Value::U32(1)),
        ("expert_gating_func", Value::U32(2)),
        ("expert_weights_scale", float(&config, "moe_router_scaling_factor")),
        ("expert_weights_norm", Value::Bool(true)),
        ("swiglu_clamp_exp", Value::F32s(vec![0.0, 0.0, 0.5, 0.7])),
        ("swiglu_clamp_shexp", Value::F32s(vec![0.0, 0.0, 0.0, 0.4])),
    ];
    let metadata = metadata("step35", &config, &[&COUNTS[..], &counts].concat(), &others);
    check("step3p5", &config, &tensors, &metadata, &written);
}

/// Names of Phi-3.5-MoE that are not usual: biases, and experts as Mixtral has them.
const PHI: [(&str, &str); 8] = [
    ("attn_norm.bias", "input_layernorm.bias"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_output.bias", "self_attn.o_proj.bias"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_norm.bias", "post_attention_layernorm.bias"),
    ("ffn_gate_inp.weight", "block_sparse_moe.gate.weight"),
];

#[test]
fn phimoe_comes_back_from_gguf() {
    let (mut config, tensors) = golden("phimoe");
    // llama.cpp makes the factor of the scores of the contexts, and knows this noise, which nobody adds.
    let (factor, noise) = (f64::sqrt(2.0) as f32, 0.01);
    for key in ["long_mscale", "short_mscale"] {
        config["rope_scaling"][key] = factor.to_string().parse::<f64>().unwrap().into();
    }
    config["router_jitter_noise"] = noise.into();
    let outside = [&OUTSIDE[..], &[("output_norm.bias", "model.norm.bias"), ("output.bias", "lm_head.bias")]].concat();
    let experts = [
        ("ffn_gate_exps.weight", "block_sparse_moe.experts.{}.w1.weight"),
        ("ffn_up_exps.weight", "block_sparse_moe.experts.{}.w3.weight"),
        ("ffn_down_exps.weight", "block_sparse_moe.experts.{}.w2.weight"),
    ];
    let renaming = Renaming {
        tensors: &tensors,
        prefix: "model.",
        outside: &outside,
        in_layers: &[&USUAL[..], &PHI].concat(),
        experts: &experts,
        layers: 2,
    };
    let mut written = renaming.written(|_, _, _| {});
    for (name, key) in [("rope_factors_long.weight", "long_factor"), ("rope_factors_short.weight", "short_factor")] {
        let factors = config["rope_scaling"][key].as_array().unwrap().iter().map(|f| f.as_f64().unwrap() as f32);
        let factors: Vec<f32> = factors.collect();
        written.push((name.to_owned(), F32, vec![factors.len()], floats(&factors)));
    }
    let counts = [
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ];
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("attention.sliding_window", Value::U32(0)),
        ("rope.dimension_count", Value::U32(12)),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("rope.scaling.attn_factor", Value::F32(factor)),
    ];
    let metadata = metadata("phimoe", &config, &[&COUNTS[..], &HEADS, &counts].concat(), &others);
    check("phimoe", &config, &tensors, &metadata, &written);
}

/// Names in a layer of Gemma that are not usual.
const GEMMA: [(&str, &str); 9] = [
    ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
    ("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight"),
    ("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight"),
    ("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight"),
    ("layer_output_scale.weight", "layer_scalar"),
    ("ffn_gate_inp.weight", "router.proj.weight"),
    ("ffn_gate_inp.scale", "router.scale"),
];

/// Experts of Gemma 4, which are stacked on the hub.
const GEMMA_EXPERTS: [(&str, &str); 3] = [
    ("ffn_down_exps.scale", "router.per_expert_scale"),
    ("ffn_gate_up_exps.weight", "experts.gate_up_proj"),
    ("ffn_down_exps.weight", "experts.down_proj"),
];

/// The text model of `family` by itself, whose names begin with `prefix`.
fn text_model(family: &str, prefix: &str) -> (Json, Tensors) {
    let (config, tensors) = golden(family);
    let plain = |(name, tensor): (String, Tensor)| (name.replacen(prefix, "model.", 1), tensor);
    let text = config.get("text_config").unwrap_or(&config).clone();
    (text, tensors.into_iter().map(plain).collect())
}

fn gemma(tensors: &Tensors, centred: bool) -> Vec<Written> {
    let renaming = Renaming {
        tensors,
        prefix: "model.",
        outside: &OUTSIDE[..2],
        in_layers: &[&USUAL[..], &GEMMA, &GEMMA_EXPERTS].concat(),
        experts: &[],
        layers: 3,
    };
    renaming.written(|name, numbers, _| {
        if centred && name.ends_with("norm.weight") {
            add_one(numbers);
        }
    })
}

#[test]
fn gemma_3_comes_back_from_gguf() {
    let (mut config, tensors) = text_model("gemma3", "language_model.model.");
    // llama.cpp knows this scale without a key, and for want of one that six layers are the period.
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    let counts = [
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("attention.sliding_window", "sliding_window"),
    ];
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
        ("rope.freq_base", float(&config, "rope_theta")),
        ("rope.freq_base_swa", float(&config, "rope_local_base_freq")),
        ("rope.scaling.type", Value::Text("linear")),
        ("rope.scaling.factor", Value::F32(4.0)),
        ("final_logit_softcapping", float(&config, "final_logit_softcapping")),
    ];
    let written = gemma(&tensors, true);
    for period in [3, 6] {
        config["sliding_window_pattern"] = period.into();
        let pattern = (period != 6).then_some(("attention.sliding_window_pattern", Value::U32(period)));
        let others: Vec<_> = others.iter().cloned().chain(pattern).collect();
        let metadata = metadata("gemma3", &config, &[&COUNTS[..], &HEADS, &counts].concat(), &others);
        check("gemma3", &config, &tensors, &metadata, &written);
    }
}

/// One has experts, and values that are keys where there is no window; the other has neither.
#[test]
fn gemma_4_comes_back_from_gguf() {
    for family in ["gemma4", "gemma4_text"] {
        let (config, tensors) = text_model(family, "model.language_model.");
        let mut written = gemma(&tensors, false);
        let factors: Vec<f32> = (0..12).map(|pair| if pair < 3 { 1.0 } else { 1e30 }).collect();
        written.push(("rope_freqs.weight".to_owned(), F32, vec![12], floats(&factors)));
        let mut counts = vec![
            ("block_count", "num_hidden_layers"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.key_length", "global_head_dim"),
            ("attention.value_length", "global_head_dim"),
            ("attention.key_length_swa", "head_dim"),
            ("attention.value_length_swa", "head_dim"),
            ("rope.dimension_count", "global_head_dim"),
            ("rope.dimension_count_swa", "head_dim"),
            ("attention.sliding_window", "sliding_window"),
            ("attention.shared_kv_layers", "num_kv_shared_layers"),
            ("embedding_length_per_layer_input", "hidden_size_per_layer_input"),
        ];
        if config["enable_moe_block"] == true {
            counts.extend([
                ("expert_count", "num_experts"),
                ("expert_used_count", "top_k_experts"),
                ("expert_feed_forward_length", "moe_intermediate_size"),
            ]);
        }
        let others = [
            ("attention.head_count_kv", Value::U32s(vec![2, 2, 1])),
            ("attention.sliding_window_pattern", Value::Bools(vec![true, true, false])),
            ("attention.layer_norm_rms_epsilon", float(&config, "rms_norm_eps")),
            ("rope.freq_base", Value::F32(20_000.0)),
            ("rope.freq_base_swa", Value::F32(500.0)),
            ("final_logit_softcapping", float(&config, "final_logit_softcapping")),
        ];
        let metadata = metadata("gemma4", &config, &[&COUNTS[..], &counts].concat(), &others);
        check(family, &config, &tensors, &metadata, &written);
    }
}

/// Names in a layer of Qwen3.8-Flash-Next that no other family has.
const QWEN_4: [(&str, &str); 16] = [
    ("hc_attn_norm.weight", "attn_hyper_connection.hc_norm.weight"),
    ("hc_attn_down.weight", "attn_hyper_connection.input_mix_weight_down.weight"),
    ("hc_attn_up.weight", "attn_hyper_connection.input_mix_weight_up.weight"),
    ("hc_attn_inject.weight", "attn_hyper_connection.block_inject_weight.weight"),
    ("hc_ffn_norm.weight", "mlp_hyper_connection.hc_norm.weight"),
    ("hc_ffn_down.weight", "mlp_hyper_connection.input_mix_weight_down.weight"),
    ("hc_ffn_up.weight", "mlp_hyper_connection.input_mix_weight_up.weight"),
    ("hc_ffn_inject.weight", "mlp_hyper_connection.block_inject_weight.weight"),
    ("ple_key.weight", "ple.key_proj.weight"),
    ("ple_value.weight", "ple.value_proj.weight"),
    ("ple_norm_key.weight", "ple.norm_key.weight"),
    ("ple_norm_query.weight", "ple.norm_query.weight"),
    ("ple_norm_conv.weight", "ple.norm_conv.weight"),
    ("ple_conv1d.weight", "ple.conv1d.weight"),
    ("indexer.q_norm.weight", "self_attn.indexer.q_layernorm.weight"),
    ("indexer.k_norm.weight", "self_attn.indexer.k_layernorm.weight"),
];

/// Tensors of Qwen3.8-Flash-Next that Qwen3.5 has as well, with their last dimension as it is on the hub.
const OF_QWEN_3_5: [(&str, &str); 18] = [
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("attn_qkv.weight", "linear_attn.in_proj_qkv.weight"),
    ("attn_gate.weight", "linear_attn.in_proj_z.weight"),
    ("ssm_alpha.weight", "linear_attn.in_proj_a.weight"),
    ("ssm_beta.weight", "linear_attn.in_proj_b.weight"),
    ("ssm_conv1d.weight", "linear_attn.conv1d.weight"),
    ("ssm_dt.bias", "linear_attn.dt_bias"),
    ("ssm_norm.weight", "linear_attn.norm.weight"),
    ("ssm_out.weight", "linear_attn.out_proj.weight"),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"),
];

/// Counts of Qwen3.8-Flash-Next that not every decoder has.
const QWEN_4_COUNTS: [(&str, &str); 21] = [
    ("context_length", "max_position_embeddings"),
    ("attention.key_length", "head_dim"),
    ("attention.value_length", "head_dim"),
    ("ssm.conv_kernel", "linear_conv_kernel_dim"),
    ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"),
    ("ssm.time_step_rank", "linear_num_value_heads"),
    ("full_attention_interval", "full_attention_interval"),
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ("hyper_connection.count", "hc_count"),
    ("hyper_connection.low_rank", "hc_lowrank"),
    ("attention.indexer.head_count", "indexer_n_heads"),
    ("attention.indexer.key_length", "indexer_head_dim"),
    ("attention.indexer.top_k", "indexer_budget"),
    ("ple.ngram_size", "ngram_size"),
    ("ple.heads_per_ngram", "heads_per_ngram"),
    ("ple.conv_kernel", "ple_conv_kernel_size"),
    ("ple.eos_token_id", "eos_token_id"),
];

const QWEN_4_PREFIX: &str = "model.language_model.";

/// The tensors of a layer that Qwen3.5 has as well, arranged as its are, and the parts of the indexer's projection.
fn qwen_4_layer(tensors: &Tensors, text: &Json, layer: usize) -> Vec<Written> {
    let origin = Origin { tensors, config: text, prefix: QWEN_4_PREFIX };
    let own = |rest: &str| format!("blk.{layer}.{rest}");
    let hub = |rest: &str| format!("{QWEN_4_PREFIX}layers.{layer}.{rest}");
    let mut all: Vec<Written> = Vec::new();
    for (to, from) in OF_QWEN_3_5 {
        let Some(tensor) = tensors.get(&hub(from)) else { continue };
        let shape = tensor.shape.iter().copied().filter(|&n| n != 1).collect();
        all.push((own(to), F32, shape, floats(&origin.data(&own(to)))));
    }
    all.push((
        own("ffn_gate_inp_shexp.weight"),
        F32,
        vec![64],
        floats(&origin.data(&own("ffn_gate_inp_shexp.weight"))),
    ));
    for (part, shape) in [("gate", [8, 32, 64]), ("up", [8, 32, 64]), ("down", [8, 64, 32])] {
        let name = own(&format!("ffn_{part}_exps.weight"));
        let data = floats(&origin.data(&name));
        all.push((name, F32, shape.to_vec(), data));
    }
    let exponentials = hub("linear_attn.A_log");
    if tensors.contains_key(&exponentials) {
        // Heads of values of the same number for both heads of keys together.
        let a = values(tensors, &exponentials);
        let tiled: Vec<f32> = [0, 2, 1, 3].iter().map(|&head| -f32::exp(a[head])).collect();
        all.push((own("ssm_a"), F32, vec![4], floats(&tiled)));
    }
    let index = hub("self_attn.indexer.index_qk_proj.weight");
    if tensors.contains_key(&index) {
        let (numbers, queries) =
            (values(tensors, &index), count(text, "indexer_n_heads") * count(text, "indexer_head_dim"));
        let (queries, keys) = numbers.split_at(queries * 64);
        for (part, numbers) in [("q", queries), ("k", keys)] {
            all.push((own(&format!("indexer.{part}_proj.weight")), F32, vec![numbers.len() / 64, 64], floats(numbers)));
        }
    }
    all
}

/// Integers of a tensor.
fn integers(tensors: &Tensors, name: &str) -> Vec<u64> {
    tensors[name].bytes.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn qwen_4_comes_back_from_gguf() {
    let (mut config, mut tensors) = golden("qwen4_exp");
    // A file has one table of n-grams at most.
    config["text_config"]["ple_layer_ids"] = json!([1]);
    tensors.retain(|name, _| !name.starts_with("model.language_model.layers.2.ple."));
    let text = config["text_config"].clone();
    let outside = [
        ("token_embd.weight", "model.language_model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_hc_norm.weight", "model.language_model.hyper_connection_mixer.hc_norm.weight"),
        ("output_hc_down.weight", "model.language_model.hyper_connection_mixer.input_mix_weight_down.weight"),
        ("output_hc_up.weight", "model.language_model.hyper_connection_mixer.input_mix_weight_up.weight"),
    ];
    let renaming = Renaming {
        tensors: &tensors,
        prefix: QWEN_4_PREFIX,
        outside: &outside,
        in_layers: &QWEN_4,
        experts: &[],
        layers: 4,
    };
    let mut written = renaming.written(|name, numbers, shape| {
        if name.contains("norm") {
            add_one(numbers);
        }
        shape.retain(|&n| n != 1);
    });
    (0..4).for_each(|layer| written.extend(qwen_4_layer(&tensors, &text, layer)));
    let table = "model.language_model.layers.0.ple.ple_embedding";
    let shards = (0..12).map(|part| format!("{table}.ngram_embedding.shard_{part}.weight"));
    let rows: Vec<f32> = shards.flat_map(|shard| values(&tensors, &shard)).collect();
    written.push(("per_layer_token_embd.weight".to_owned(), F32, vec![rows.len() / 4, 4], floats(&rows)));
    let hash = |rest: &str| Value::U64s(integers(&tensors, &format!("{table}.{rest}")));
    let others = [
        ("attention.layer_norm_rms_epsilon", float(&text, "rms_norm_eps")),
        ("rope.freq_base", Value::F32(1e7)),
        ("rope.dimension_count", Value::U32(8)),
        ("rope.dimension_sections", Value::U32s(vec![2, 1, 1, 0])),
        ("ssm.inner_size", Value::U32(64)),
        ("attention.compress_ratios", Value::U32s(vec![0, 0, 0, 4])),
        ("ple.layers", Value::U32s(vec![0])),
        ("embedding_length_per_layer_input", Value::U32(4)),
        ("ple.layer_multipliers", hash("layer_multipliers")),
        ("ple.head_offsets", hash("ngram_heads_offsets")),
        ("ple.head_vocab_sizes", hash("ngram_heads_vocab_sizes")),
    ];
    let counts = [&COUNTS[1..2], &HEADS, &QWEN_4_COUNTS].concat();
    let metadata = metadata("qwen4exp", &text, &counts, &others);
    check("qwen4_exp", &config, &tensors, &metadata, &written);
}

/// What is wrong with a file of one or two layers and little else in it.
fn problem(arch: &'static str, layers: u32, others: &[(&str, Value)], tensors: &[Written]) -> String {
    let mut all: Vec<(&str, Value)> = vec![
        ("block_count", Value::U32(layers)),
        ("context_length", Value::U32(64)),
        ("embedding_length", Value::U32(8)),
        ("feed_forward_length", Value::U32(8)),
        ("attention.key_length", Value::U32(4)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    all.extend(others.iter().cloned());
    let metadata = metadata(arch, &json!({}), &[], &all);
    let zeros = |name: &str, shape: &[usize]| {
        (name.to_owned(), F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
    };
    let mut written = vec![zeros("token_embd.weight", &[16, 8]), zeros("output_norm.weight", &[8])];
    written.extend((0..layers).map(|layer| zeros(&format!("blk.{layer}.attn_norm.weight"), &[8])));
    written.extend_from_slice(tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file(&metadata, &written)).unwrap();
    plan(&path, &Options::default()).unwrap_err().to_string()
}

#[test]
fn what_cannot_be_taken_from_a_file_is_named() {
    let heads = ("attention.head_count", Value::U32(2));
    let slides = |pattern: &[bool]| ("attention.sliding_window_pattern", Value::Bools(pattern.to_vec()));
    let factors = |all: [f32; 2]| vec![("rope_freqs.weight".to_owned(), F32, vec![2], floats(&all))];
    let gemma = [heads.clone(), slides(&[true]), ("embedding_length_per_layer_input", Value::U32(256))];
    let per_layer = problem("gemma4", 1, &gemma, &factors([1.0, 1e30]));
    assert!(per_layer.contains("`gemma4.embedding_length_per_layer_input` is 256"), "{per_layer}");
    let turned = problem("gemma4", 1, &gemma, &factors([2.0, 1.0]));
    assert!(turned.contains("`rope_freqs.weight` does not say which pairs"), "{turned}");
    let missing = problem("step35", 1, std::slice::from_ref(&heads), &[]);
    assert!(missing.contains("`step35.attention.sliding_window_pattern` is missing"), "{missing}");
    let mixed = [("attention.head_count", Value::U32s(vec![2, 1])), slides(&[false, false])];
    let mixed = problem("step35", 2, &mixed, &[]);
    assert!(mixed.contains("`step35.attention.head_count` is 0 or differs"), "{mixed}");
    let short = problem("step35", 2, &[("attention.head_count", Value::U32s(vec![2]))], &[]);
    assert!(short.contains("`step35.attention.head_count` has 1 entries for 2 layers"), "{short}");
    let block = problem("nemotron_h_moe", 1, std::slice::from_ref(&heads), &[]);
    assert!(block.contains("`blk.0` has no tensor that tells what the block is"), "{block}");
    let numbers = ["ssm.time_step_rank", "ssm.group_count", "ssm.state_size", "ssm.inner_size", "ssm.conv_kernel"];
    let streams = ["hyper_connection.count", "hyper_connection.low_rank"];
    let indexer = ["attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k"];
    let mut keys: Vec<_> =
        [&numbers[..], &streams, &indexer].concat().into_iter().map(|key| (key, Value::U32(4))).collect();
    keys.extend([heads, ("attention.compress_ratios", Value::U32s(vec![0])), ("ple.layers", Value::U32s(vec![0, 1]))]);
    let tables = problem("qwen4exp", 1, &keys, &[]);
    assert!(tables.contains("`qwen4exp.ple.layers` names several layers"), "{tables}");
}

//! What `config.json` becomes.

mod common;

use std::path::Path;

use common::{Synthetic, fixture, options};
use serde_json::{Value, json};
use sluice_converter::synth::Geometry;
use sluice_converter::{ConvertError, plan};
use sluice_format::{AttentionSpec, MlaSpec, ModelSpec, RopePairing, RopeScaling};

fn spec_of(dir: &Path) -> ModelSpec {
    plan(dir, &options("keep", "keep")).unwrap().spec().clone()
}

fn mla(spec: &ModelSpec) -> &MlaSpec {
    match &spec.layers[0].attention {
        AttentionSpec::Mla(mla) => mla,
        other => panic!("latent attention, not {other:?}"),
    }
}

#[test]
fn golden_deepseek_v3() {
    let spec = spec_of(&fixture("golden/deepseek_v3"));
    let m = mla(&spec);
    let mscale = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(m.softmax_scale, (24f64.powf(-0.5) * mscale * mscale) as f32);
    assert_eq!(m.rope.pairing, RopePairing::Interleaved);
    assert_eq!(m.latent_norm_eps, 1e-6);
    assert_eq!(spec.norm_eps, 0.01);
    let RopeScaling::Yarn { attention_factor, beta_fast, original_max_positions, truncate, .. } = m.rope.scaling else {
        panic!("{:?}", m.rope)
    };
    assert_eq!((attention_factor, beta_fast, original_max_positions, truncate), (1.0, 32.0, 64, true));
    assert!(spec.layers[0].ffn.moe.is_none());
    assert_eq!(spec.layers[0].ffn.dense_width, 96);
    let moe = spec.layers[1].ffn.moe.as_ref().unwrap();
    let groups = moe.router.groups.as_ref().unwrap();
    assert_eq!((groups.count, groups.keep), (4, 2));
    assert_eq!(moe.router.renormalise, Some(1e-20));
    assert_eq!(spec.layers[1].ffn.dense_width, 32);
}

#[test]
fn golden_kimi_k2() {
    let spec = spec_of(&fixture("golden/kimi_k2"));
    assert_eq!(spec.family, "kimi_k2");
    let RopeScaling::Yarn { beta_fast, beta_slow, .. } = mla(&spec).rope.scaling else { panic!() };
    assert_eq!((beta_fast, beta_slow), (1.0, 1.0));
    assert_eq!(mla(&spec).rope.theta, 50000.0);
    assert!(spec.layers[1].ffn.moe.as_ref().unwrap().router.groups.is_none());
}

/// A synthetic checkpoint with keys of its configuration replaced; null removes nothing, it is a value.
fn with(changes: Value) -> Result<ModelSpec, ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut config = shape.config();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    common::safetensors::write_dir(dir.path(), &config, &shape.tensors(), 1);
    plan(dir.path(), &options("keep", "keep")).map(|p| p.spec().clone())
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let yarn = json!({"factor": 8, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.5});
    let mut old = yarn.clone();
    old["type"] = json!("yarn");
    let mut new = yarn;
    new["rope_type"] = json!("yarn");
    new["rope_theta"] = json!(5e5);
    let old = with(json!({"rope_scaling": old, "rope_theta": 5e5})).unwrap();
    let new = with(json!({"rope_parameters": new, "rope_theta": 1e4})).unwrap();
    assert_eq!(old, new);
    let RopeScaling::Yarn { attention_factor, .. } = mla(&new).rope.scaling else { panic!() };
    let g = |m: f64| 0.1 * m * 8f64.ln() + 1.0;
    assert!((attention_factor - g(0.7) / g(0.5)).abs() < 1e-12);
    let default = with(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}})).unwrap();
    assert_eq!((mla(&default).rope.theta, &mla(&default).rope.scaling), (7e3, &RopeScaling::None));
    let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 4}})).unwrap();
    assert_eq!(mla(&linear).rope.scaling, RopeScaling::Linear { factor: 4.0 });
}

#[test]
fn layer_lists_and_switches() {
    let spec = with(json!({"mlp_layer_types": ["dense", "sparse", "sparse"], "norm_topk_prob": false})).unwrap();
    assert_eq!(spec.layers[1].ffn.moe.as_ref().unwrap().router.renormalise, None);
    let spec = with(json!({"rope_interleave": false})).unwrap();
    assert_eq!(mla(&spec).rope.pairing, RopePairing::Half);
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    for (changes, words) in [
        (json!({"model_type": "mamba"}), vec!["`model_type`", "\"mamba\"", "deepseek_v3", "kimi_k2"]),
        (json!({"model_type": 3}), vec!["`model_type`", "3"]),
        (json!({"hidden_act": "gelu"}), vec!["`hidden_act`", "\"gelu\"", "silu"]),
        (json!({"moe_layer_freq": 2}), vec!["`moe_layer_freq`"]),
        (json!({"attention_bias": true}), vec!["`attention_bias`"]),
        (json!({"scoring_func": "softmax"}), vec!["`scoring_func`", "sigmoid"]),
        (json!({"topk_method": "greedy"}), vec!["`topk_method`", "noaux_tc"]),
        (json!({"hidden_size": "72"}), vec!["`hidden_size`", "\"72\"", "whole number"]),
        (json!({"hidden_size": -72}), vec!["`hidden_size`", "-72"]),
        (json!({"num_hidden_layers": 1u64 << 40}), vec!["`num_hidden_layers`"]),
        (json!({"num_hidden_layers": 0}), vec!["`num_hidden_layers` is 0"]),
        (json!({"vocab_size": 0}), vec!["`vocab_size` is 0"]),
        (json!({"hidden_size": 0}), vec!["`hidden_size` is 0"]),
        (json!({"num_attention_heads": 0}), vec!["`num_attention_heads` is 0"]),
        (json!({"intermediate_size": 0}), vec!["`intermediate_size` is 0"]),
        (json!({"max_position_embeddings": 1u64 << 40}), vec!["`max_position_embeddings`", "1 to 16777216"]),
        (json!({"rms_norm_eps": -1.0}), vec!["`rms_norm_eps` is -1"]),
        (json!({"rope_theta": 0.5}), vec!["`rope_theta` is 0.5"]),
        (json!({"qk_rope_head_dim": 5}), vec!["`qk_rope_head_dim` is 5", "even"]),
        (json!({"qk_nope_head_dim": u64::MAX}), vec!["`qk_nope_head_dim`"]),
        (json!({"q_lora_rank": 0}), vec!["`q_lora_rank` is 0"]),
        (json!({"moe_intermediate_size": u64::MAX}), vec!["`moe_intermediate_size`"]),
        (json!({"n_shared_experts": u64::MAX}), vec!["`n_shared_experts`"]),
        (json!({"n_routed_experts": 0}), vec!["`n_routed_experts` is 0"]),
        (json!({"num_experts_per_tok": 0}), vec!["`num_experts_per_tok` is 0", "1 to 6"]),
        (json!({"num_experts_per_tok": 7}), vec!["`num_experts_per_tok` is 7", "1 to 6"]),
        (json!({"n_group": 0}), vec!["`n_group` is 0"]),
        (json!({"n_group": 4}), vec!["`n_group` is 4", "6 experts"]),
        (json!({"n_group": 6}), vec!["`n_group` is 6", "two best"]),
        (json!({"topk_group": 0}), vec!["`topk_group` is 0"]),
        (json!({"n_group": 2, "topk_group": 3}), vec!["`topk_group` is 3", "1 to 2"]),
        (json!({"n_group": 3, "num_experts_per_tok": 3}), vec!["`topk_group` is 1", "3 of `num_experts_per_tok`"]),
        (json!({"routed_scaling_factor": 1e300}), vec!["`routed_scaling_factor`"]),
        // Each is possible; together they are not. No single key is to blame.
        (json!({"num_attention_heads": 1 << 20}), vec!["impossible model", "heads × head width"]),
        (
            json!({"n_routed_experts": 1 << 16, "n_group": 1, "num_hidden_layers": 40}),
            vec!["impossible model", "experts together", "262144"],
        ),
        (json!({"rope_scaling": {"type": "longrope"}}), vec!["`rope_scaling.type`", "longrope", "yarn"]),
        (json!({"rope_scaling": {"rope_type": "yarn"}}), vec!["`rope_scaling.factor`"]),
        (json!({"rope_scaling": {"rope_type": "linear"}}), vec!["`rope_scaling.factor`", "missing"]),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), vec!["`rope_scaling.factor` is 0"]),
        (
            json!({"quantization_config": {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}}),
            vec!["`quantization_config.transform_config.config_groups.R4`", "not supported"],
        ),
        (json!({"mlp_layer_types": ["dense"]}), vec!["`mlp_layer_types`"]),
    ] {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.contains("config.json"), "{error}");
        words.iter().for_each(|w| assert!(error.contains(w), "{changes}: {error} lacks {w}"));
    }
}

#[test]
fn impossible_values_of_other_families_are_named_by_their_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    for (config, words) in [
        (
            json!({"model_type": "llama", "num_key_value_heads": 3}),
            ["`num_key_value_heads` is 3", "`num_attention_heads`"],
        ),
        (json!({"model_type": "llama", "head_dim": 0}), ["`head_dim` is 0", ""]),
        (json!({"model_type": "llama", "intermediate_size": 0}), ["`intermediate_size` is 0", ""]),
        (json!({"model_type": "mistral", "sliding_window": 0}), ["`sliding_window` is 0", ""]),
        (json!({"model_type": "glm4_moe", "head_dim": 6}), ["`partial_rotary_factor` is 0.5", "pairs"]),
        (json!({"model_type": "minimax_m2", "rotary_dim": 63}), ["`rotary_dim` is 63", "even"]),
        (json!({"model_type": "qwen3_next", "linear_num_key_heads": 5}), ["`linear_num_value_heads` is 32", "5"]),
        (json!({"model_type": "qwen3_moe", "num_experts": 4}), ["`num_experts_per_tok` is 8", "1 to 4"]),
        (json!({"model_type": "mixtral", "num_local_experts": 0}), ["`num_local_experts` is 0", ""]),
        (
            json!({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 0}),
            ["`n_group` is 0", ""],
        ),
        (
            json!({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": -1}}),
            ["`rope_scaling.factor` is -1", ""],
        ),
    ] {
        std::fs::write(&path, config.to_string()).unwrap();
        let error = Geometry::load(path.to_str().unwrap(), None).unwrap_err().to_string();
        words.iter().for_each(|w| assert!(error.contains(w), "{config}: {error} lacks {w}"));
        assert!(!error.contains("model_type"), "{error}");
    }
}

/// What `config.json` gives where it says nothing but its family: the values of the configuration classes of transformers
/// 4.57 and 5, which are the same but where noted. Checkpoints are saved without keys that have these values.
#[test]
fn missing_keys_mean_what_they_mean_in_transformers() {
    /// Vocabulary, hidden size, layers, heads, heads of keys and values, width of a head, positions, norm epsilon, theta.
    type Basics = (usize, usize, usize, usize, usize, usize, usize, f32, f64);
    /// Routed experts, experts per token, width of an expert, whether weights are divided by their sum, scale.
    type Experts = Option<(usize, usize, usize, bool, f32)>;
    let table: [(&str, Basics, Experts); 18] = [
        // Vocabulary of version 5; 4.57 had 32,000.
        ("deepseek_v2", (102_400, 4096, 32, 32, 32, 192, 2048, 1e-6, 1e4), Some((64, 6, 1407, false, 1.0))),
        ("deepseek_v3", (129_280, 7168, 61, 128, 128, 192, 4096, 1e-6, 1e4), Some((256, 8, 2048, true, 2.5))),
        ("kimi_k2", (129_280, 7168, 61, 128, 128, 192, 4096, 1e-6, 1e4), Some((256, 8, 2048, true, 2.5))),
        ("glm4_moe", (151_552, 4096, 46, 96, 8, 128, 131_072, 1e-5, 1e4), Some((128, 8, 1408, true, 1.0))),
        ("glm4_moe_lite", (154_880, 2048, 47, 20, 20, 256, 202_752, 1e-5, 1e4), Some((64, 4, 1536, true, 1.8))),
        ("glm_moe_dsa", (154_880, 6144, 78, 64, 64, 256, 202_752, 1e-5, 1e4), Some((256, 8, 2048, true, 2.5))),
        ("gpt_oss", (201_088, 2880, 36, 64, 8, 64, 131_072, 1e-5, 150_000.0), Some((128, 4, 2880, false, 1.0))),
        ("qwen2_moe", (151_936, 2048, 24, 16, 16, 128, 32_768, 1e-6, 1e4), Some((60, 4, 1408, false, 1.0))),
        ("qwen3_moe", (151_936, 2048, 24, 32, 4, 64, 32_768, 1e-6, 1e4), Some((128, 8, 768, false, 1.0))),
        ("qwen3_next", (151_936, 2048, 48, 16, 2, 256, 32_768, 1e-6, 1e4), Some((512, 10, 512, true, 1.0))),
        ("qwen3_5_moe_text", (248_320, 2048, 40, 16, 2, 256, 32_768, 1e-6, 1e4), Some((256, 8, 512, true, 1.0))),
        ("minimax_m2", (200_064, 3072, 62, 48, 8, 128, 196_608, 1e-6, 5e6), Some((256, 8, 1536, true, 1.0))),
        ("mixtral", (32_000, 4096, 32, 32, 8, 128, 131_072, 1e-5, 1e6), Some((8, 2, 14_336, true, 1.0))),
        ("olmoe", (50_304, 2048, 16, 16, 16, 128, 4096, 1e-5, 1e4), Some((64, 8, 2048, false, 1.0))),
        ("llama", (32_000, 4096, 32, 32, 32, 128, 2048, 1e-6, 1e4), None),
        ("mistral", (32_000, 4096, 32, 32, 8, 128, 131_072, 1e-6, 1e4), None),
        ("qwen3", (151_936, 4096, 32, 32, 32, 128, 32_768, 1e-6, 1e4), None),
        // Where the class knows no number, as many as heads.
        ("llama 40", (32_000, 4096, 32, 40, 40, 102, 2048, 1e-6, 1e4), None),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, basics, experts) in table {
        let (model_type, heads) = name.split_once(' ').map_or((name, None), |(m, heads)| (m, Some(heads)));
        let mut config = json!({"model_type": model_type});
        if let Some(heads) = heads {
            config["num_attention_heads"] = heads.parse::<usize>().unwrap().into();
        }
        match model_type {
            // Without a value in the class.
            "deepseek_v2" => config["num_experts_per_tok"] = json!(6),
            // What follows from the other values, 42, cannot be rotated.
            "glm4_moe" => config["head_dim"] = json!(128),
            _ => {}
        }
        let path = dir.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
        let spec = geometry.spec();
        // The last layer is one with experts and full attention in every family that mixes.
        let last = spec.layers.last().unwrap();
        let (heads, kv_heads, width, theta) = match &last.attention {
            AttentionSpec::Mla(m) => (m.heads, m.heads, m.qk_nope_head_dim + m.qk_rope_head_dim, m.rope.theta),
            AttentionSpec::Gqa(g) => (g.heads, g.kv_heads, g.head_dim, g.rope.as_ref().unwrap().theta),
            AttentionSpec::Delta(_) => panic!("{name}"),
        };
        let sizes = (spec.vocab_size, spec.hidden_size, spec.layers.len(), heads, kv_heads, width, spec.max_positions);
        let found = (sizes.0, sizes.1, sizes.2, sizes.3, sizes.4, sizes.5, sizes.6, spec.norm_eps, theta);
        assert_eq!(found, basics, "{name}");
        let moe = last.ffn.moe.as_ref();
        let found = moe.map(|m| (m.experts, m.top_k, m.width, m.router.renormalise.is_some(), m.router.scale));
        assert_eq!(found, experts, "{name}");
    }
}

#[test]
fn no_key_of_heads_means_as_many_as_heads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    for (family, key) in
        [("llama", json!(null)), ("olmoe", json!(null)), ("mistral", json!(null)), ("mixtral", json!(null))]
    {
        std::fs::write(&path, json!({"model_type": family, "num_key_value_heads": key}).to_string()).unwrap();
        let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
        let AttentionSpec::Gqa(gqa) = &geometry.spec().layers[0].attention else { panic!() };
        assert_eq!(gqa.kv_heads, gqa.heads, "{family}");
    }
    std::fs::write(&path, json!({"model_type": "deepseek_v2"}).to_string()).unwrap();
    let error = Geometry::load(path.to_str().unwrap(), None).unwrap_err().to_string();
    assert!(error.contains("`num_experts_per_tok` is missing"), "{error}");
}

#[test]
fn gpt_oss_that_does_not_mention_yarn_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let rope = |config: Value| {
        std::fs::write(&path, config.to_string()).unwrap();
        let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
        let AttentionSpec::Gqa(gqa) = &geometry.spec().layers[0].attention else { panic!() };
        gqa.rope.clone().unwrap()
    };
    let said = json!({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096});
    let silent = rope(json!({"model_type": "gpt_oss"}));
    assert_eq!(silent, rope(json!({"model_type": "gpt_oss", "rope_scaling": said})));
    assert!(matches!(silent.scaling, RopeScaling::Yarn { .. }));
    let plain = rope(json!({"model_type": "gpt_oss", "rope_parameters": {"rope_type": "default"}}));
    assert_eq!(plain.scaling, RopeScaling::None);
}

/// Model cards say how to switch YaRN on, and leave `max_position_embeddings` as it is.
#[test]
fn yarn_extends_the_positions_that_may_be_asked_for() {
    let yarn = |factor: Value, original: Value| json!({"rope_scaling": {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}});
    let positions = |config: Value| with(config).unwrap().max_positions;
    assert_eq!(positions(json!({})), 128);
    assert_eq!(positions(yarn(json!(4.0), json!(100))), 400);
    // Without the original positions, the given ones are extended; what is larger already stays.
    assert_eq!(positions(yarn(json!(2.5), json!(null))), 320);
    assert_eq!(positions(yarn(json!(1.5), json!(64))), 128);
    // Without a factor, it follows from both.
    let spec = with(yarn(json!(null), json!(32))).unwrap();
    let RopeScaling::Yarn { factor, original_max_positions, .. } = mla(&spec).rope.scaling else { panic!() };
    assert_eq!((factor, original_max_positions, spec.max_positions), (4.0, 32, 128));
    assert_eq!(positions(yarn(json!(1e300), json!(100))), 1 << 24);
}

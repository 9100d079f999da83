//! How `config.json` is interpreted.

use crate::common;

use std::path::Path;

use crate::common::{Synthetic, fixture, options};
use serde_json::{Value, json};
use sluice_converter::synth::Geometry;
use sluice_converter::{ConvertError, plan};
use sluice_format::{
    ActivationSpec, AttentionSpec, GqaSpec, LayerSpec, MlaSpec, ModelSpec, RopePairing, RopeScaling, RopeSpec,
    RouterScore,
};

fn spec_of(dir: &Path) -> ModelSpec {
    plan(dir, &options("keep", "keep")).unwrap().spec().clone()
}

fn rope(mla: &MlaSpec) -> &RopeSpec {
    mla.rope.as_ref().expect("the layer knows positions")
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
    assert_eq!(rope(m).pairing, RopePairing::Interleaved);
    assert_eq!(m.latent_norm_eps, 1e-6);
    assert_eq!(spec.norm_eps, 0.01);
    let RopeScaling::Yarn { attention_factor, beta_fast, original_max_positions, truncate, .. } = rope(m).scaling
    else {
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
    let RopeScaling::Yarn { beta_fast, beta_slow, .. } = rope(mla(&spec)).scaling else { panic!() };
    assert_eq!((beta_fast, beta_slow), (1.0, 1.0));
    assert_eq!(rope(mla(&spec)).theta, 50000.0);
    assert!(spec.layers[1].ffn.moe.as_ref().unwrap().router.groups.is_none());
}

/// A synthetic checkpoint with some configuration keys replaced; null is a value and removes nothing.
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
    let RopeScaling::Yarn { attention_factor, .. } = rope(mla(&new)).scaling else { panic!() };
    let g = |m: f64| 0.1 * m * 8f64.ln() + 1.0;
    assert!((attention_factor - g(0.7) / g(0.5)).abs() < 1e-12);
    let default = with(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}})).unwrap();
    assert_eq!((rope(mla(&default)).theta, &rope(mla(&default)).scaling), (7e3, &RopeScaling::None));
    let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 4}})).unwrap();
    assert_eq!(rope(mla(&linear)).scaling, RopeScaling::Linear { factor: 4.0 });

    // Both at once: repeating the same is allowed, but nothing is left out silently.
    let newer = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5});
    let both = |older: Value| with(json!({"rope_parameters": newer, "rope_scaling": older}));
    assert_eq!(
        rope(mla(&both(json!({"type": "linear", "factor": 4})).unwrap())).scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    for (older, named) in [
        (json!({"type": "yarn", "factor": 4}), "rope_scaling.type"),
        (json!({"rope_type": "linear", "factor": 8}), "rope_scaling.factor"),
        (json!({"type": "linear", "beta_fast": 16}), "rope_scaling.beta_fast"),
    ] {
        let message = both(older).unwrap_err().to_string();
        assert!(message.contains(named) && message.contains("rope_parameters"), "{message}");
    }
}

#[test]
fn layer_lists_and_switches() {
    let spec = with(json!({"mlp_layer_types": ["dense", "sparse", "sparse"], "norm_topk_prob": false})).unwrap();
    assert_eq!(spec.layers[1].ffn.moe.as_ref().unwrap().router.renormalise, None);
    let spec = with(json!({"rope_interleave": false})).unwrap();
    assert_eq!(rope(mla(&spec)).pairing, RopePairing::Half);
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
        // Each value is possible, but not all together. No single key is wrong.
        (json!({"num_attention_heads": 1 << 20}), vec!["impossible model", "heads × head width"]),
        (
            json!({"n_routed_experts": 1 << 16, "n_group": 1, "num_hidden_layers": 40}),
            vec!["impossible model", "experts together", "262144"],
        ),
        (json!({"rope_scaling": {"type": "ntk"}}), vec!["`rope_scaling.type`", "longrope", "yarn"]),
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
        (
            json!({"model_type": "glm4_moe", "head_dim": 6}),
            ["`partial_rotary_factor` is missing, which means that it is 0.5", "pairs"],
        ),
        (json!({"model_type": "minimax_m2", "rotary_dim": 63}), ["`rotary_dim` is 63", "even"]),
        (
            json!({"model_type": "qwen3_next", "linear_num_key_heads": 5}),
            ["`linear_num_value_heads` is missing, which means that it is 32", "5"],
        ),
        (
            json!({"model_type": "qwen3_moe", "num_experts": 4}),
            ["`num_experts_per_tok` is missing, which means that it is 8", "1 to 4"],
        ),
        (json!({"model_type": "mixtral", "num_local_experts": 0}), ["`num_local_experts` is 0", ""]),
        (
            json!({"model_type": "deepseek_v4", "compress_ratios": [0, 8]}),
            ["`compress_ratios` has 2 entries", "43 layers"],
        ),
        (
            json!({"model_type": "deepseek_v4", "compress_ratios": vec![8; 43]}),
            ["`compress_ratios` holds 8", "0, 4, 128"],
        ),
        (
            json!({"model_type": "deepseek_v4", "layer_types": vec!["mamba"; 43]}),
            ["`layer_types` holds \"mamba\"", "sliding_attention"],
        ),
        (json!({"model_type": "deepseek_v4", "o_groups": 7}), ["`o_groups` is 7", "`num_attention_heads`"]),
        (json!({"model_type": "deepseek_v4", "num_key_value_heads": 2}), ["`num_key_value_heads` must be 1", ""]),
        (json!({"model_type": "deepseek_v4", "scoring_func": "relu"}), ["`scoring_func` is \"relu\"", "sqrtsoftplus"]),
        (json!({"model_type": "deepseek_v4", "swiglu_limit": 0}), ["`swiglu_limit` is 0", ""]),
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

/// Vocabulary, hidden size, layers, heads, key and value heads, width of a head, positions, norm epsilon, theta.
type Basics = (usize, usize, usize, usize, usize, usize, usize, f32, f64);
/// Routed experts, experts per token, width of an expert, whether weights are divided by their sum, scale.
type Experts = Option<(usize, usize, usize, bool, f32)>;

/// The result of a `config.json` with nothing but its family: the defaults of the configuration classes of transformers 4.57 and 5,
/// which are the same except where noted. Checkpoints are saved without keys that have these values.
const DEFAULTS: [(&str, Basics, Experts); 36] = [
    // Vocabulary of version 5; 4.57 had 32,000.
    ("deepseek_v2", (102_400, 4096, 32, 32, 32, 192, 2048, 1e-6, 1e4), Some((64, 6, 1407, false, 1.0))),
    ("deepseek_v3", (129_280, 7168, 61, 128, 128, 192, 4096, 1e-6, 1e4), Some((256, 8, 2048, true, 2.5))),
    // Theta is that of layers that compress, such as the last one.
    ("deepseek_v4", (129_280, 4096, 43, 64, 1, 512, 1 << 20, 1e-6, 160_000.0), Some((256, 6, 2048, true, 1.5))),
    ("kimi_k2", (129_280, 7168, 61, 128, 128, 192, 4096, 1e-6, 1e4), Some((256, 8, 2048, true, 2.5))),
    // The class has no numbers of experts: these are those of the released models.
    ("dots1", (152_064, 4608, 62, 32, 32, 144, 2048, 1e-6, 1e4), Some((128, 6, 1408, false, 1.0))),
    ("glm4_moe", (151_552, 4096, 46, 96, 8, 128, 131_072, 1e-5, 1e4), Some((128, 8, 1408, true, 1.0))),
    ("glm4_moe_lite", (154_880, 2048, 47, 20, 20, 256, 202_752, 1e-5, 1e4), Some((64, 4, 1536, true, 1.8))),
    ("glm_moe_dsa", (154_880, 6144, 78, 64, 64, 256, 202_752, 1e-5, 1e4), Some((256, 8, 2048, true, 2.5))),
    ("gpt_oss", (201_088, 2880, 36, 64, 8, 64, 131_072, 1e-5, 150_000.0), Some((128, 4, 2880, false, 1.0))),
    ("qwen2_moe", (151_936, 2048, 24, 16, 16, 128, 32_768, 1e-6, 1e4), Some((60, 4, 1408, false, 1.0))),
    ("qwen3_moe", (151_936, 2048, 24, 32, 4, 64, 32_768, 1e-6, 1e4), Some((128, 8, 768, false, 1.0))),
    ("qwen3_next", (151_936, 2048, 48, 16, 2, 256, 32_768, 1e-6, 1e4), Some((512, 10, 512, true, 1.0))),
    ("qwen3_5_moe_text", (248_320, 2048, 40, 16, 2, 256, 32_768, 1e-6, 1e4), Some((256, 8, 512, true, 1.0))),
    ("qwen4_exp_text", (248_320, 2048, 40, 16, 2, 256, 32_768, 1e-6, 1e4), Some((512, 10, 512, true, 1.0))),
    ("minimax_m2", (200_064, 3072, 62, 48, 8, 128, 196_608, 1e-6, 5e6), Some((256, 8, 1536, true, 1.0))),
    ("minimax_m3_vl_text", (200_064, 6144, 60, 64, 4, 128, 524_288, 1e-6, 5e6), Some((128, 4, 3072, true, 2.0))),
    // Without positions, there is no base of frequencies.
    ("kimi_linear", (163_840, 2304, 27, 32, 32, 192, 1_048_576, 1e-5, 0.0), Some((256, 8, 1024, true, 2.446))),
    ("mixtral", (32_000, 4096, 32, 32, 8, 128, 131_072, 1e-5, 1e6), Some((8, 2, 14_336, true, 1.0))),
    ("olmoe", (50_304, 2048, 16, 16, 16, 128, 4096, 1e-5, 1e4), Some((64, 8, 2048, false, 1.0))),
    ("phimoe", (32_064, 4096, 32, 32, 8, 128, 131_072, 1e-5, 1e6), Some((16, 2, 6400, false, 1.0))),
    ("granitemoe", (32_000, 4096, 32, 32, 32, 128, 2048, 1e-6, 1e4), Some((8, 2, 11_008, false, 1.0))),
    ("ernie4_5_moe", (103_424, 2560, 28, 20, 4, 128, 131_072, 1e-5, 5e5), Some((64, 6, 1536, true, 1.0))),
    ("ernie4_5", (103_424, 1024, 18, 16, 2, 128, 131_072, 1e-5, 5e5), None),
    ("hunyuan_v1_moe", (290_943, 4096, 32, 32, 32, 128, 2048, 1e-5, 1e4), Some((1, 1, 11_008, true, 1.0))),
    ("hy_v3", (120_832, 4096, 80, 64, 8, 128, 131_072, 1e-5, 11_158_840.0), Some((192, 8, 1536, true, 2.826))),
    // One layer fewer, because the last one has no rotation.
    ("llama4_text", (202_048, 5120, 47, 40, 8, 128, 131_072, 1e-5, 5e5), Some((16, 1, 8192, false, 1.0))),
    ("mimo_v2_flash", (152_576, 4096, 48, 64, 4, 192, 131_072, 1e-5, 5e6), Some((256, 8, 2048, true, 1.0))),
    // The release's own class, which transformers lacks.
    ("bailing_moe_v2", (157_184, 2048, 20, 16, 4, 128, 32_768, 1e-6, 6e5), Some((256, 8, 512, true, 1.0))),
    ("bailing_hybrid", (157_184, 2560, 42, 32, 32, 192, 262_144, 1e-6, 6e6), Some((512, 8, 768, true, 2.5))),
    ("step3p5", (128_815, 4096, 45, 64, 8, 128, 128_000, 1e-5, 1e4), Some((288, 8, 1280, true, 1.0))),
    ("llama", (32_000, 4096, 32, 32, 32, 128, 2048, 1e-6, 1e4), None),
    ("mistral", (32_000, 4096, 32, 32, 8, 128, 131_072, 1e-6, 1e4), None),
    ("qwen3", (151_936, 4096, 32, 32, 32, 128, 32_768, 1e-6, 1e4), None),
    // Two layers fewer, because the last one has a window; in Gemma 4, layers without a window have wider heads.
    ("gemma3_text", (262_208, 2304, 24, 8, 4, 256, 131_072, 1e-6, 1e6), None),
    ("gemma4_text", (262_144, 2304, 30, 8, 4, 512, 131_072, 1e-6, 1e6), None),
    // If the class has no default, as many as heads.
    ("llama 40", (32_000, 4096, 32, 40, 40, 102, 2048, 1e-6, 1e4), None),
];

#[test]
fn missing_keys_mean_what_they_mean_in_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for (name, basics, experts) in DEFAULTS {
        let (model_type, heads) = name.split_once(' ').map_or((name, None), |(m, heads)| (m, Some(heads)));
        let mut config = json!({"model_type": model_type});
        if let Some(heads) = heads {
            config["num_attention_heads"] = heads.parse::<usize>().unwrap().into();
        }
        match model_type {
            // The class has no default.
            "deepseek_v2" => config["num_experts_per_tok"] = json!(6),
            // The value that follows from the others, 42, cannot be rotated.
            "glm4_moe" => config["head_dim"] = json!(128),
            "llama4_text" => config["num_hidden_layers"] = json!(47),
            // Two layers fewer, so that the last one has no window.
            "gemma3_text" => config["num_hidden_layers"] = json!(24),
            "gemma4_text" => config["hidden_size_per_layer_input"] = json!(0),
            _ => {}
        }
        let path = dir.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
        let spec = geometry.spec();
        // In every family that mixes, the last layer with full attention has experts.
        let is_full = |layer: &&LayerSpec| !matches!(layer.attention, AttentionSpec::Delta(_));
        let last = spec.layers.iter().rev().find(is_full).unwrap();
        let (heads, kv_heads, width, theta) = match &last.attention {
            AttentionSpec::Mla(m) => (
                m.heads,
                m.heads,
                m.qk_nope_head_dim + m.qk_rope_head_dim,
                m.rope.as_ref().map_or(0.0, |rope| rope.theta),
            ),
            AttentionSpec::Gqa(g) => (g.heads, g.kv_heads, g.head_dim, g.rope.as_ref().unwrap().theta),
            AttentionSpec::Compressed(c) => (c.heads(), 1, c.head_dim, c.rope.theta),
            AttentionSpec::Delta(_) | AttentionSpec::Mamba(_) => panic!("{name}"),
        };
        let sizes = (spec.vocab_size, spec.hidden_size, spec.layers.len(), heads, kv_heads, width, spec.max_positions);
        let found = (sizes.0, sizes.1, sizes.2, sizes.3, sizes.4, sizes.5, sizes.6, spec.norm_eps, theta);
        assert_eq!(found, basics, "{name}");
        let moe = last.ffn.moe.as_ref();
        let found = moe.map(|m| (m.experts, m.top_k, m.width, m.router.renormalise.is_some(), m.router.scale));
        assert_eq!(found, experts, "{name}");
    }
}

/// Models with only the family and some keys.
fn of_keys(config: &Value) -> Result<ModelSpec, ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    Geometry::load(path.to_str().unwrap(), None).map(|geometry| geometry.spec().clone())
}

fn gqa(spec: &ModelSpec, layer: usize) -> &GqaSpec {
    match &spec.layers[layer].attention {
        AttentionSpec::Gqa(gqa) => gqa,
        other => panic!("grouped-query attention, not {other:?}"),
    }
}

/// The release's own code spells its keys differently from transformers.
#[test]
fn both_spellings_of_mimo_mean_the_same() {
    let defaults = of_keys(&json!({"model_type": "mimo_v2_flash"})).unwrap();
    let slides: Vec<u8> = (0..48).map(|i| u8::from(i != 0 && (i + 1) % 6 != 0)).collect();
    let sparse: Vec<u8> = (0..48).map(|i| u8::from(i != 0)).collect();
    let release = json!({
        "model_type": "mimo_v2_flash", "hybrid_layer_pattern": slides, "moe_layer_freq": sparse, "layernorm_epsilon": 1e-5,
        "sliding_window": 128, "sliding_window_size": 128, "rope_theta": 5_000_000, "swa_rope_theta": 10_000,
        "partial_rotary_factor": 0.334, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192,
        "swa_v_head_dim": 128, "add_swa_attention_sink_bias": true, "add_full_attention_sink_bias": false,
        "attention_value_scale": 0.707, "n_shared_experts": null, "routed_scaling_factor": null, "rope_scaling": null,
    });
    assert_eq!(of_keys(&release).unwrap(), defaults);
    let (full, sliding) = (gqa(&defaults, 0), gqa(&defaults, 1));
    assert_eq!((full.kv_heads, full.window, full.sinks), (4, None, false));
    assert_eq!((sliding.kv_heads, sliding.window, sliding.sinks), (8, Some(129), true));
    let theta = |gqa: &GqaSpec| gqa.rope.as_ref().map(|rope| (rope.theta, rope.dim));
    assert_eq!([theta(full), theta(sliding)], [Some((5e6, 64)), Some((1e4, 64))]);
}

#[test]
fn layers_of_llama_4() {
    let of = |mut keys: Value| {
        keys["model_type"] = json!("llama4_text");
        keys["num_hidden_layers"] = json!(4);
        of_keys(&keys)
    };
    let kinds = |spec: &ModelSpec| {
        let kind = |i| (gqa(spec, i).rope.is_some(), gqa(spec, i).stretch, spec.layers[i].ffn.moe.is_some());
        (0..4).map(kind).collect::<Vec<_>>()
    };
    let turning = (true, Some(8192), true);
    let defaults = of(json!({})).unwrap();
    assert_eq!(kinds(&defaults), [turning, turning, turning, (false, None, true)]);
    assert!(gqa(&defaults, 3).temperature.is_some() && gqa(&defaults, 3).qk_norm.is_none());
    assert!(gqa(&defaults, 0).temperature.is_none() && gqa(&defaults, 0).qk_norm.as_ref().unwrap().weightless);
    let other = json!({"no_rope_layers": [0, 1, 1, 1], "moe_layers": [1, 3], "attention_chunk_size": null, "use_qk_norm": false,
        "attn_temperature_tuning": 0});
    let other = of(other).unwrap();
    assert_eq!(kinds(&other), [(false, None, false), (true, None, true), (true, None, false), (true, None, true)]);
    assert_eq!(other.layers[0].ffn.dense_width, 16_384);
    assert!(gqa(&other, 0).temperature.is_none() && gqa(&other, 1).qk_norm.is_none());
    for (keys, words) in [
        (json!({"no_rope_layers": [1]}), "`no_rope_layers` has 1 entries"),
        (json!({"no_rope_layers": [1, 2, 1, 1]}), "`no_rope_layers` holds 2"),
        (json!({"attention_chunk_size": 0}), "`attention_chunk_size` is 0"),
        (json!({"floor_scale": 0}), "`floor_scale` is 0"),
        (json!({"no_rope_layer_interval": 0}), "`no_rope_layer_interval` is 0"),
    ] {
        let error = of(keys).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Configurations are refused with these words.
fn refused(cases: &[(Value, &str)]) {
    for (config, words) in cases {
        let error = of_keys(config).unwrap_err().to_string();
        assert!(error.contains(words), "{config}: {error}");
    }
}

#[test]
fn what_newer_families_do_not_compute_is_refused_by_its_key() {
    refused(&[
        (json!({"model_type": "granitemoe", "logits_scaling": 0}), "`logits_scaling` is 0"),
        (json!({"model_type": "ernie4_5_moe", "use_bias": true}), "`use_bias` is true"),
        (json!({"model_type": "ernie4_5_moe", "moe_k": 65}), "`moe_k` is 65"),
        (json!({"model_type": "ernie4_5_moe", "moe_layer_interval": 0}), "`moe_layer_interval` is 0"),
        (json!({"model_type": "hunyuan_v1_moe", "moe_topk": [1]}), "`moe_topk` has 1 entries"),
        (json!({"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 5}), "`moe_topk` is 5"),
        (json!({"model_type": "hunyuan_v1_moe", "moe_intermediate_size": 64}), "`moe_intermediate_size` must be 11008"),
        (json!({"model_type": "hunyuan_v1_moe", "use_cla": true}), "`use_cla` is true"),
        (
            json!({"model_type": "hunyuan_v1_moe", "rope_scaling": {"type": "dynamic", "alpha": -1.0}}),
            "`rope_scaling.alpha` is -1",
        ),
        (json!({"model_type": "hunyuan_v1_moe", "rope_scaling": {"type": "dynamic", "factor": 2.0}}), "\"dynamic\""),
        (json!({"model_type": "hunyuan_v1_moe", "norm_topk_prob": false}), "`norm_topk_prob` is false"),
        (json!({"model_type": "hy_v3", "qk_norm": false}), "`qk_norm` is false"),
        (json!({"model_type": "hy_v3", "moe_router_use_sigmoid": false}), "`moe_router_use_sigmoid` is false"),
        (json!({"model_type": "granitemoe", "shared_intermediate_size": 64}), "`shared_intermediate_size` must be 0"),
        (json!({"model_type": "dots1", "scoring_func": "softmax"}), "`scoring_func` is \"softmax\""),
        (json!({"model_type": "phimoe", "num_experts_per_tok": 3}), "`num_experts_per_tok` must be 2"),
        (json!({"model_type": "phimoe", "rope_scaling": {"type": "longrope"}}), "`rope_scaling.original_max_position"),
        (
            json!({"model_type": "phimoe", "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096}}),
            "`rope_scaling.long_factor` has 0 numbers",
        ),
        (json!({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}), "`attn_logit_softcapping` must be null"),
        (json!({"model_type": "gemma3_text", "use_bidirectional_attention": true}), "`use_bidirectional_attention` is"),
        (json!({"model_type": "gemma3_text", "hidden_activation": "relu"}), "`hidden_activation` is \"relu\""),
        (
            json!({"model_type": "gemma4_text"}),
            "`hidden_size_per_layer_input` is missing, which means that it is 256; only 0",
        ),
        (
            json!({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4}),
            "`num_kv_shared_layers` is 4",
        ),
        (
            json!({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "enable_moe_block": true}),
            "`num_experts` is missing",
        ),
        (json!({"model_type": "mimo_v2_flash", "hybrid_layer_pattern": [2]}), "`hybrid_layer_pattern` has 1 entries"),
        (json!({"model_type": "mimo_v2_flash", "num_key_value_heads": 3}), "`num_key_value_heads` is 3"),
        (json!({"model_type": "bailing_moe", "norm_head": true}), "`norm_head` is true"),
        (json!({"model_type": "bailing_moe", "score_function": "sigmoid"}), "`score_function` is \"sigmoid\""),
        (
            json!({"model_type": "bailing_moe", "architectures": ["BailingMoeLinearForCausalLM"]}),
            "`architectures` names",
        ),
        (json!({"model_type": "bailing_moe_v2", "norm_topk_prob": false}), "`norm_topk_prob` is false"),
        (
            json!({"model_type": "bailing_moe_v2", "moe_shared_expert_intermediate_size": 64}),
            "`moe_shared_expert_intermediate_size` is 64",
        ),
        (
            json!({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"]}),
            "`architectures` names",
        ),
        (json!({"model_type": "bailing_hybrid", "kda_lower_bound": 0.0}), "`kda_lower_bound` is 0"),
        (json!({"model_type": "nemotron_h", "use_bias": true}), "`use_bias` is true"),
        (json!({"model_type": "nemotron_h", "mlp_hidden_act": "silu"}), "`mlp_hidden_act` is \"silu\""),
        (
            json!({"model_type": "nemotron_h", "hybrid_override_pattern": "M-E"}),
            "block, number 2, that follows no block",
        ),
    ]);
}

#[test]
fn a_class_of_another_family_is_refused_and_others_are_not_looked_at() {
    let with = |model_type: &str, class: &str| of_keys(&json!({"model_type": model_type, "architectures": [class]}));
    let error = with("deepseek_v3", "Qwen3MoeForCausalLM").unwrap_err().to_string();
    assert!(error.contains("`architectures` is \"Qwen3MoeForCausalLM\", a class of `qwen3_moe`"), "{error}");
    for (model_type, class) in [
        ("kimi_k2", "DeepseekV3ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("llama4_text", "Llama4ForCausalLM"),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
        ("deepseek_v3", "MyOwnForCausalLM"),
        ("deepseek_v3", "odd"),
    ] {
        let found = with(model_type, class);
        assert!(found.is_ok(), "{model_type} and {class}: {}", found.unwrap_err());
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, "\u{feff}{\"model_type\": \"mixtral\"}").unwrap();
    assert_eq!(Geometry::load(path.to_str().unwrap(), None).unwrap().spec().family, "mixtral");
}

#[test]
fn what_nemotron_and_step_do_not_compute_is_refused_by_its_key() {
    refused(&[
        (json!({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}), "`hybrid_override_pattern` holds 'X'"),
        (
            json!({"model_type": "nemotron_h", "layers_block_type": ["mamba", "rnn"]}),
            "`layers_block_type` holds \"rnn\"",
        ),
        (json!({"model_type": "nemotron_h", "layers_block_type": []}), "`layers_block_type` has 0 blocks"),
        (json!({"model_type": "nemotron_h", "time_step_limit": [0.001, 0.1]}), "`time_step_limit` bounds"),
        (json!({"model_type": "nemotron_h", "n_groups": 3}), "`n_groups` is 3"),
        (json!({"model_type": "nemotron_h", "n_shared_experts": 2}), "`n_shared_experts` is 2"),
        (json!({"model_type": "step3p5", "swiglu_limits": [7.0]}), "`swiglu_limits` has 1 entries"),
        (json!({"model_type": "step3p5", "moe_layers_enum": "3,x"}), "`moe_layers_enum` holds something else"),
        (json!({"model_type": "step3p5", "layer_types": ["chunked"]}), "`layer_types` has 1 entries"),
        (json!({"model_type": "step3p5", "yarn_only_types": ["sliding_attention"]}), "`yarn_only_types` names"),
    ]);
}

/// Blocks of Nemotron-H become layers of a mixer and the following feed-forward block, in every spelling.
#[test]
fn blocks_of_nemotron_make_layers() {
    let of = |mut keys: Value| {
        keys["model_type"] = json!("nemotron_h");
        of_keys(&keys).unwrap()
    };
    let spec =
        of(json!({"hybrid_override_pattern": "MEM*EM-", "time_step_limit": [0.0, "Infinity"], "moe_latent_size": 64}));
    let words = ["mamba", "moe", "linear_attention", "attention", "moe", "mamba", "mlp"];
    assert_eq!(spec, of(json!({"layers_block_type": words, "moe_latent_size": 64, "time_step_limit": [0.0, 1e30]})));
    let kind = |layer: &LayerSpec| {
        let mixer = if matches!(layer.attention, AttentionSpec::Mamba(_)) { 'M' } else { '*' };
        let ffn = match (&layer.ffn.moe, layer.ffn.is_none()) {
            (Some(moe), _) if moe.latent == Some(64) => 'E',
            (_, true) => ' ',
            _ => '-',
        };
        [mixer, ffn]
    };
    let kinds: String = spec.layers.iter().flat_map(kind).collect();
    assert_eq!(kinds, "MEM *EM-");
    let AttentionSpec::Mamba(mamba) = &spec.layers[0].attention else { panic!() };
    assert_eq!((mamba.heads, mamba.head_dim, mamba.groups, mamba.state_dim, mamba.conv_width), (128, 64, 8, 128, 4));
    assert!(mamba.conv_bias && gqa(&spec, 2).rope.is_none());
    assert!(spec.layers.iter().all(|layer| layer.ffn.is_none() || !layer.ffn.activation.is_gated()));
    // The default of transformers.
    assert_eq!(of(json!({})).layers.len(), 2);
}

/// Step's per-layer lists may have entries for layers that predict further tokens, and both spellings of the rotation have the same
/// meaning.
#[test]
fn layers_of_step_in_both_spellings() {
    let of = |mut keys: Value| {
        let common = json!({
            "model_type": "step3p5", "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "sliding_window": 512,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "moe_layers_enum": "1,2",
            "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8},
            "swiglu_limits": [0.0, 7.0, 0.0], "swiglu_limits_shared": [0.0, 16.0, 0.0],
        });
        keys.as_object_mut().unwrap().extend(common.as_object().unwrap().clone());
        of_keys(&keys).unwrap()
    };
    let scaling = json!({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 131_072,
        "low_freq_factor": 1.0, "high_freq_factor": 32.0});
    let old = of(json!({
        "rope_theta": [5e6, 1e4, 1e4], "partial_rotary_factors": [0.5, 1.0, 1.0], "rope_scaling": scaling,
        "yarn_only_types": ["full_attention"],
    }));
    let mut full = scaling;
    (full["rope_theta"], full["partial_rotary_factor"]) = (json!(5e6), json!(0.5));
    let sliding = json!({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0});
    assert_eq!(old, of(json!({"rope_parameters": {"full_attention": full, "sliding_attention": sliding}})));
    let (full, sliding) = (gqa(&old, 0), gqa(&old, 1));
    assert_eq!(
        [full, sliding].map(|gqa| (gqa.heads, gqa.window, gqa.head_gate)),
        [(64, None, true), (96, Some(512), true)]
    );
    let rope = |gqa: &GqaSpec| gqa.rope.as_ref().map(|rope| (rope.theta, rope.dim, rope.scaling != RopeScaling::None));
    assert_eq!([rope(full), rope(sliding)], [Some((5e6, 64, true)), Some((1e4, 128, false))]);
    let bounded = |limit| ActivationSpec::SiluBounded { limit };
    let [dense, sparse] = [0, 1].map(|layer: usize| &old.layers[layer].ffn);
    assert_eq!((dense.activation, dense.dense_activation, dense.moe.is_some()), (ActivationSpec::Silu, None, false));
    assert_eq!((sparse.activation, sparse.dense_activation()), (bounded(7.0), bounded(16.0)));
    assert!(sparse.moe.is_some());
}

/// Both generations of Ling have the same `model_type`.
#[test]
fn generations_of_ling_are_told_by_their_class() {
    let keys = json!({
        "model_type": "bailing_moe", "moe_intermediate_size": 64, "intermediate_size": 64, "num_key_value_heads": 4,
        "use_bias": false, "n_group": 4, "topk_group": 2,
    });
    let of = |class: &str| {
        let mut keys = keys.clone();
        keys["architectures"] = json!([class]);
        of_keys(&keys).unwrap()
    };
    let (first, second) = (of("BailingMoeForCausalLM"), of("BailingMoeV2ForCausalLM"));
    let router = |spec: &ModelSpec| spec.layers[1].ffn.moe.as_ref().unwrap().router.clone();
    assert_eq!((router(&first).score, router(&second).score), (RouterScore::Softmax, RouterScore::Sigmoid));
    assert_eq!([router(&first).groups.is_some(), router(&second).groups.is_some()], [false, true]);
    assert_eq!([&first, &second].map(|spec| gqa(spec, 0).qk_norm.is_some()), [false, true]);
}

/// Both generations of spelling, and the defaults of transformers' classes without either.
#[test]
fn layers_of_deepseek_v4_in_every_spelling() {
    let spec = |mut config: Value| {
        config["model_type"] = json!("deepseek_v4");
        config["num_hidden_layers"] = json!(4);
        of_keys(&config).unwrap()
    };
    let yarn = json!({"type": "yarn", "factor": 16, "original_max_position_embeddings": 65_536});
    // There is also an entry for the layer that predicts further tokens.
    let old = spec(json!({
        "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "qk_rope_head_dim": 32, "rope_scaling": yarn, "rope_theta": 5e3,
        "compress_rope_theta": 5e4,
    }));
    let mut nested = yarn;
    (nested["rope_type"], nested["rope_theta"]) = (json!("yarn"), json!(5e4));
    let new = spec(json!({
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "partial_rotary_factor": 0.0625,
        "rope_parameters": {"main": {"rope_type": "default", "rope_theta": 5e3}, "compress": nested},
    }));
    assert_eq!(old, new);
    let compressed = |layer: usize| match &new.layers[layer].attention {
        AttentionSpec::Compressed(compressed) => compressed.clone(),
        other => panic!("{other:?}"),
    };
    let ratio = |layer| compressed(layer).compression.map(|c| (c.ratio, c.spans, c.indexer.is_some()));
    assert_eq!([0, 1, 2].map(ratio), [None, Some((4, 2, true)), Some((128, 1, false))]);
    assert_eq!((compressed(0).rope.theta, compressed(0).rope.scaling), (5e3, RopeScaling::None));
    let RopeScaling::Yarn { attention_factor, factor, .. } = compressed(1).rope.scaling else { panic!() };
    assert_eq!((compressed(1).rope.theta, compressed(1).rope.dim, attention_factor, factor), (5e4, 32, 1.0, 16.0));
    let tables = new.layers.iter().map(|l| l.ffn.moe.as_ref().unwrap().router.token_table.is_some());
    assert_eq!(tables.collect::<Vec<_>>(), [true, false, false, false]);
    let silent = spec(json!({}));
    let ratios = silent.layers.iter().map(|l| match &l.attention {
        AttentionSpec::Compressed(c) => c.compression.as_ref().unwrap().ratio,
        other => panic!("{other:?}"),
    });
    assert_eq!(ratios.collect::<Vec<_>>(), [128, 128, 128, 4]);
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

/// The result of a configuration with only these keys.
fn bare(config: Value) -> Result<ModelSpec, ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    Geometry::load(path.to_str().unwrap(), None).map(|geometry| geometry.spec().clone())
}

#[test]
fn layers_of_kimi_linear_are_counted_from_one() {
    let with = |linear: Value, full: Value| {
        let lists = json!({"kda_layers": linear, "full_attn_layers": full});
        bare(json!({"model_type": "kimi_linear", "num_hidden_layers": 3, "linear_attn_config": lists}))
    };
    let is_linear = |spec: ModelSpec| -> Vec<bool> {
        spec.layers.iter().map(|layer| matches!(layer.attention, AttentionSpec::Delta(_))).collect()
    };
    assert_eq!(is_linear(with(json!([1, 3]), json!([2])).unwrap()), [true, false, true]);
    let default = bare(json!({"model_type": "kimi_linear", "num_hidden_layers": 6})).unwrap();
    assert_eq!(is_linear(default), [true, true, true, true, false, true]);
    for (linear, full, words) in [
        (json!([0, 1]), json!([2]), "kda_layers` holds 0"),
        (json!([1, 2]), json!([4]), "full_attn_layers` holds 4"),
        (json!([1, 2]), json!([2, 3]), "names layer 2"),
        (json!([1]), json!([3]), "does not name layer 2"),
    ] {
        let error = with(linear, full).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = bare(json!({"model_type": "kimi_linear", "mla_use_nope": false})).unwrap_err().to_string();
    assert!(error.contains("mla_use_nope"), "{error}");
}

#[test]
fn blocks_of_minimax_m3_are_where_the_configuration_says() {
    let with = |more: Value| {
        let mut config = json!({"model_type": "minimax_m3_vl_text", "num_hidden_layers": 2});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        bare(config)
    };
    let blocks = |spec: &ModelSpec| -> Vec<Option<usize>> {
        let of = |attention: &AttentionSpec| match attention {
            AttentionSpec::Gqa(gqa) => gqa.blocks.as_ref().map(|blocks| blocks.block_len),
            other => panic!("{other:?}"),
        };
        spec.layers.iter().map(|layer| of(&layer.attention)).collect()
    };
    assert_eq!(blocks(&with(json!({})).unwrap()), [None, None]);
    let nested = json!({"sparse_attention_config": {"sparse_attention_freq": [0, 1], "sparse_block_size": 64}});
    assert_eq!(blocks(&with(nested).unwrap()), [None, Some(64)]);
    let flat = json!({"layer_types": ["minimax_m3_sparse", "full_attention"], "moe_layer_freq": [0, 1]});
    let spec = with(flat).unwrap();
    assert_eq!(blocks(&spec), [Some(128), None]);
    assert_eq!(spec.layers.iter().map(|l| l.ffn.dense_width).collect::<Vec<_>>(), [12_288, 3072]);
    for (more, words) in [
        (json!({"moe_layer_freq": [1]}), "has 1 entries for 2 layers"),
        (json!({"sparse_attention_config": {"sparse_attention_freq": [true, 1]}}), "expected 0 or 1"),
        (json!({"use_gemma_norm": false}), "use_gemma_norm"),
        (json!({"swiglu_limit": 0}), "swiglu_limit"),
    ] {
        let error = with(more).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
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

/// Model cards say how to switch YaRN on, and leave `max_position_embeddings` unchanged.
#[test]
fn yarn_extends_the_positions_that_may_be_asked_for() {
    let yarn = |factor: Value, original: Value| json!({"rope_scaling": {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}});
    let positions = |config: Value| with(config).unwrap().max_positions;
    assert_eq!(positions(json!({})), 128);
    assert_eq!(positions(yarn(json!(4.0), json!(100))), 400);
    // Without the original positions, the given ones are extended; larger values stay.
    assert_eq!(positions(yarn(json!(2.5), json!(null))), 320);
    assert_eq!(positions(yarn(json!(1.5), json!(64))), 128);
    // Without a factor, it follows from both.
    let spec = with(yarn(json!(null), json!(32))).unwrap();
    let RopeScaling::Yarn { factor, original_max_positions, .. } = rope(mla(&spec)).scaling else { panic!() };
    assert_eq!((factor, original_max_positions, spec.max_positions), (4.0, 32, 128));
    assert_eq!(positions(yarn(json!(1e300), json!(100))), 1 << 24);
}

//! Models in GGUF's types, which vary from tensor to tensor as in published files, give the same results as the same numbers in f32
//! safetensors. The numbers of the blocks are those of the public `gguf` package (`fixtures/gguf/make_quantised.py`).

use std::fs;
use std::path::Path;

use crate::gguf::{Value, Written, file};
use crate::safetensors::{Tensor, Tensors, read_file, values, write_dir};
use serde_json::{Value as Json, json};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::{Converted, fixture, greedy, relative_error};

/// Name in the fixture, number in files, columns of a block.
type Type = (&'static str, u32, usize);

const TYPES: [Type; 23] = [
    ("Q4_0", 2, 32),
    ("Q4_1", 3, 32),
    ("Q5_0", 6, 32),
    ("Q5_1", 7, 32),
    ("Q8_0", 8, 32),
    ("Q2_K", 10, 256),
    ("Q3_K", 11, 256),
    ("Q4_K", 12, 256),
    ("Q5_K", 13, 256),
    ("Q6_K", 14, 256),
    ("IQ2_XXS", 16, 256),
    ("IQ2_XS", 17, 256),
    ("IQ3_XXS", 18, 256),
    ("IQ1_S", 19, 256),
    ("IQ4_NL", 20, 32),
    ("IQ3_S", 21, 256),
    ("IQ2_S", 22, 256),
    ("IQ4_XS", 23, 256),
    ("IQ1_M", 29, 256),
    ("TQ1_0", 34, 256),
    ("TQ2_0", 35, 256),
    ("MXFP4", 39, 32),
    ("NVFP4", 40, 64),
];
const F32: Type = ("F32", 0, 1);

/// Columns of a row of the fixture.
const WIDE: usize = 256;
const VOCAB: usize = 96;
const EXPERTS: usize = 3;

fn named(name: &str) -> Type {
    TYPES.into_iter().find(|ty| ty.0 == name).unwrap_or_else(|| panic!("{name}"))
}

/// A model that is written twice.
struct Twice {
    blocks: Tensors,
    /// State of the generator (xorshift64*).
    noise: u64,
    keys: Vec<(String, Value)>,
    gguf: Vec<Written>,
    hub: Tensors,
}

impl Twice {
    fn new(arch: &'static str, keys: &[(&str, Value)]) -> Self {
        let mut blocks = Tensors::new();
        read_file(&fixture("gguf/quantised.safetensors"), &mut blocks);
        let own = keys.iter().map(|(key, value)| (format!("{arch}.{key}"), value.clone()));
        let keys = [("general.architecture".to_owned(), Value::Text(arch))].into_iter().chain(own).collect();
        Twice { blocks, noise: 11, keys, gguf: Vec::new(), hub: Tensors::new() }
    }

    fn bits(&mut self) -> usize {
        self.noise ^= self.noise >> 12;
        self.noise ^= self.noise << 25;
        self.noise ^= self.noise >> 27;
        (self.noise.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
    }

    /// Blocks of a type, or numbers around `middle`, for `count` weights: as bytes, and as the numbers that they represent.
    fn draw(&mut self, ty: Type, count: usize, middle: f32) -> (Vec<u8>, Vec<f32>) {
        if ty == F32 {
            let numbers: Vec<f32> = (0..count).map(|_| middle + self.bits() as f32 / 2f32.powi(33) - 0.125).collect();
            return (numbers.iter().flat_map(|n| n.to_le_bytes()).collect(), numbers);
        }
        let (codes, numbers) =
            (self.blocks[&format!("{}.blocks", ty.0)].clone(), values(&self.blocks, &format!("{}.values", ty.0)));
        let of_file = numbers.len() / ty.2;
        let len = codes.bytes.len() / of_file;
        let (mut bytes, mut all) = (Vec::new(), Vec::new());
        for _ in 0..count / ty.2 {
            let block = self.bits() % of_file;
            bytes.extend_from_slice(&codes.bytes[block * len..][..len]);
            all.extend_from_slice(&numbers[block * ty.2..][..ty.2]);
        }
        (bytes, all)
    }

    /// Adds a tensor to the GGUF file and returns its numbers.
    fn own(&mut self, name: &str, ty: Type, shape: &[usize], middle: f32) -> Vec<f32> {
        let (bytes, numbers) = self.draw(ty, shape.iter().product(), middle);
        self.gguf.push((name.to_owned(), ty.1, shape.to_vec(), bytes));
        numbers
    }

    /// Adds a tensor to both files, in the same arrangement.
    fn add(&mut self, own: &str, hub: &str, ty: Type, shape: &[usize]) {
        let numbers = self.own(own, ty, shape, 0.0);
        self.hub.insert(hub.to_owned(), Tensor::f32(shape, numbers));
    }

    fn norm(&mut self, own: &str, hub: &str, width: usize) {
        let numbers = self.own(own, F32, &[width], 1.0);
        self.hub.insert(hub.to_owned(), Tensor::f32(&[width], numbers));
    }

    fn ends(&mut self, embedding: Type, head: Type) {
        self.add("token_embd.weight", "model.embed_tokens.weight", embedding, &[VOCAB, WIDE]);
        self.add("output.weight", "lm_head.weight", head, &[VOCAB, WIDE]);
        self.norm("output_norm.weight", "model.norm.weight", WIDE);
    }

    /// Adds one of the matrices of all experts of a layer.
    fn experts(&mut self, layer: usize, part: &str, ty: Type, [rows, cols]: [usize; 2]) {
        let numbers = self.own(&format!("blk.{layer}.ffn_{part}_exps.weight"), ty, &[EXPERTS, rows, cols], 0.0);
        for (expert, numbers) in numbers.chunks(rows * cols).enumerate() {
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight");
            self.hub.insert(name, Tensor::f32(&[rows, cols], numbers.iter().copied()));
        }
    }

    /// Writes both and converts them with their own types; returns the model from `gguf` and the one from safetensors.
    fn converted(&self, folder: &Path, config: &Json) -> (Converted, Converted) {
        let path = folder.join("model.gguf");
        fs::write(&path, file(&self.keys, &self.gguf)).unwrap();
        let checkpoint = folder.join("checkpoint");
        fs::create_dir(&checkpoint).unwrap();
        write_dir(&checkpoint, config, &self.hub, 1);
        let of = |source: &Path| Converted::new(source.to_str().unwrap(), None);
        (of(&path), of(&checkpoint))
    }

    /// Both give the same results: within rounding with f32 activations, and roughly with the usual ones.
    fn compare(&self, config: &Json) {
        let folder = tempfile::tempdir().unwrap();
        let (own, plain) = self.converted(folder.path(), config);
        let size = |model: &Converted| fs::metadata(&model.path).unwrap().len();
        assert!(size(&own) < size(&plain) / 3, "the types were not kept");
        let exact = |threads| EngineOptions { exact: true, threads: Some(threads), ..EngineOptions::default() };
        let prompt: Vec<u32> = (0..24).map(|i| i * 37 % VOCAB as u32).collect();
        let (mut engine, mut reference) = (own.open(&exact(2)), plain.open(&exact(2)));
        let (found, expected) = (logits(&mut engine, &prompt, 24), logits(&mut reference, &prompt, 24));
        let error = relative_error(&found, &expected);
        println!("relative error {error:.1e}");
        assert!(error < 1e-5, "logits differ by {error:e}");
        assert!(logits(&mut engine, &prompt, 1) == found, "a token at a time gives other bits than all at once");
        assert_eq!(greedy(&mut engine, &prompt, 8).0, greedy(&mut reference, &prompt, 8).0);

        let usual = |threads| EngineOptions { exact: false, ..exact(threads) };
        let found = logits(&mut own.open(&usual(2)), &prompt, 24);
        let error = relative_error(&found, &expected);
        println!("relative error {error:.1e} with activations of eight bits");
        // Random layers amplify every rounding.
        assert!(error < 0.2, "logits differ by {error:e} with activations of eight bits");
        assert!(logits(&mut own.open(&usual(1)), &prompt, 5) == found, "other threads and steps give other bits");
    }
}

/// Logits of every position, `step` tokens at a time.
fn logits(engine: &mut Engine, prompt: &[u32], step: usize) -> Vec<f32> {
    let mut sequence = engine.new_sequence();
    let mut all = Vec::new();
    for tokens in prompt.chunks(step) {
        engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
    }
    all
}

/// Every type is used for gate and up of the experts in one layer, for down in another one, and for matrices of the attention in
/// some.
#[test]
fn experts_of_every_type() {
    const LAYERS: usize = TYPES.len();
    let count = |n: usize| Value::U32(n as u32);
    let mut model = Twice::new(
        "qwen3moe",
        &[
            ("block_count", count(LAYERS)),
            ("context_length", count(512)),
            ("embedding_length", count(WIDE)),
            ("feed_forward_length", count(WIDE)),
            ("attention.head_count", count(4)),
            ("attention.head_count_kv", count(2)),
            ("attention.key_length", count(64)),
            ("attention.value_length", count(64)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("rope.freq_base", Value::F32(1e6)),
            ("expert_count", count(EXPERTS)),
            ("expert_used_count", count(2)),
            ("expert_feed_forward_length", count(WIDE)),
        ],
    );
    let config = json!({
        "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": WIDE, "intermediate_size": WIDE, "head_dim": 64,
        "moe_intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": true, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 512, "tie_word_embeddings": false, "hidden_act": "silu",
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": false,
    });
    model.ends(named("IQ4_XS"), named("Q6_K"));
    for layer in 0..LAYERS {
        let ty = |ahead: usize| TYPES[(layer + ahead) % TYPES.len()];
        let own = |rest: &str| format!("blk.{layer}.{rest}.weight");
        let hub = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        model.norm(&own("attn_norm"), &hub("input_layernorm"), WIDE);
        model.norm(&own("ffn_norm"), &hub("post_attention_layernorm"), WIDE);
        model.norm(&own("attn_q_norm"), &hub("self_attn.q_norm"), 64);
        model.norm(&own("attn_k_norm"), &hub("self_attn.k_norm"), 64);
        for (i, (part, module, rows)) in
            [("q", "q", 256), ("k", "k", 128), ("v", "v", 128), ("output", "o", 256)].into_iter().enumerate()
        {
            let (own, hub) = (own(&format!("attn_{part}")), hub(&format!("self_attn.{module}_proj")));
            model.add(&own, &hub, ty(3 + 5 * i), &[rows, WIDE]);
        }
        model.add(&own("ffn_gate_inp"), &hub("mlp.gate"), F32, &[EXPERTS, WIDE]);
        // Gate and up share a type; otherwise they become f32.
        model.experts(layer, "gate", ty(0), [WIDE, WIDE]);
        model.experts(layer, "up", ty(0), [WIDE, WIDE]);
        model.experts(layer, "down", ty(1), [WIDE, WIDE]);
    }
    model.compare(&config);
}

/// Queries and keys in the order to which llama.cpp permutes them, and one matrix for embedding and head.
#[test]
fn turned_rows_of_every_type() {
    const LAYERS: usize = TYPES.len().div_ceil(2);
    let count = |n: usize| Value::U32(n as u32);
    let mut model = Twice::new(
        "llama",
        &[
            ("block_count", count(LAYERS)),
            ("context_length", count(512)),
            ("embedding_length", count(WIDE)),
            ("feed_forward_length", count(WIDE)),
            ("attention.head_count", count(4)),
            ("attention.head_count_kv", count(2)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("rope.dimension_count", count(64)),
        ],
    );
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDE, "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    model.add("token_embd.weight", "model.embed_tokens.weight", named("Q6_K"), &[VOCAB, WIDE]);
    model.norm("output_norm.weight", "model.norm.weight", WIDE);
    for layer in 0..LAYERS {
        let ty = |ahead: usize| TYPES[(2 * layer + ahead) % TYPES.len()];
        let own = |rest: &str| format!("blk.{layer}.{rest}.weight");
        let hub = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        model.norm(&own("attn_norm"), &hub("input_layernorm"), WIDE);
        model.norm(&own("ffn_norm"), &hub("post_attention_layernorm"), WIDE);
        for (part, ty, heads) in [("q", ty(0), 4), ("k", ty(1), 2)] {
            let numbers = model.own(&own(&format!("attn_{part}")), ty, &[heads * 64, WIDE], 0.0);
            // Row `2i` of a head was row `i`, and row `2i + 1` was row `32 + i`.
            let row = |row: usize| &numbers[(row / 64 * 64 + row % 32 * 2 + row % 64 / 32) * WIDE..][..WIDE];
            let turned = (0..heads * 64).flat_map(|r| row(r).to_vec());
            model.hub.insert(hub(&format!("self_attn.{part}_proj")), Tensor::f32(&[heads * 64, WIDE], turned));
        }
        model.add(&own("attn_v"), &hub("self_attn.v_proj"), ty(2), &[128, WIDE]);
        model.add(&own("attn_output"), &hub("self_attn.o_proj"), ty(3), &[WIDE, WIDE]);
        model.dense(layer, ty(4), ty(5), WIDE);
    }
    model.compare(&config);
}

/// Widths of the latent attention below: parts of a head without and with position, its values, the latent; and the number of
/// heads.
const NOPE: usize = 64;
const ROPE: usize = 32;
const V: usize = 64;
const RANK: usize = 256;
const HEADS: usize = 4;

/// A DeepSeek V3 without layers.
fn latent() -> (Twice, Json) {
    let count = |n: usize| Value::U32(n as u32);
    let model = Twice::new(
        "deepseek2",
        &[
            ("block_count", count(4)),
            ("context_length", count(512)),
            ("embedding_length", count(WIDE)),
            ("feed_forward_length", count(2 * WIDE)),
            ("attention.head_count", count(HEADS)),
            ("attention.head_count_kv", count(1)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("attention.q_lora_rank", count(WIDE)),
            ("attention.kv_lora_rank", count(RANK)),
            ("attention.key_length", count(RANK + ROPE)),
            ("attention.value_length", count(RANK)),
            ("attention.key_length_mla", count(NOPE + ROPE)),
            ("attention.value_length_mla", count(V)),
            ("rope.dimension_count", count(ROPE)),
            ("leading_dense_block_count", count(1)),
            ("expert_count", count(EXPERTS)),
            ("expert_used_count", count(2)),
            ("expert_feed_forward_length", count(WIDE)),
            ("expert_shared_count", count(1)),
            ("expert_weights_scale", Value::F32(2.5)),
            ("expert_weights_norm", Value::Bool(true)),
            ("expert_gating_func", count(2)),
        ],
    );
    let config = json!({
        "model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": WIDE, "intermediate_size": 2 * WIDE,
        "moe_intermediate_size": WIDE, "num_hidden_layers": 4, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "q_lora_rank": WIDE, "kv_lora_rank": RANK, "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE, "v_head_dim": V, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": false,
        "hidden_act": "silu", "attention_bias": false,
    });
    (model, config)
}

impl Twice {
    fn latent_attention(&mut self, layer: usize, attention: Type, keys: Type, half: Type) {
        let own = |rest: &str| format!("blk.{layer}.{rest}.weight");
        let hub = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        self.norm(&own("attn_norm"), &hub("input_layernorm"), WIDE);
        self.norm(&own("ffn_norm"), &hub("post_attention_layernorm"), WIDE);
        self.norm(&own("attn_q_a_norm"), &hub("self_attn.q_a_layernorm"), WIDE);
        self.norm(&own("attn_kv_a_norm"), &hub("self_attn.kv_a_layernorm"), RANK);
        for (part, module, rows, cols) in [
            ("attn_q_a", "q_a_proj", WIDE, WIDE),
            ("attn_q_b", "q_b_proj", HEADS * (NOPE + ROPE), WIDE),
            ("attn_kv_a_mqa", "kv_a_proj_with_mqa", RANK + ROPE, WIDE),
            ("attn_output", "o_proj", WIDE, HEADS * V),
        ] {
            self.add(&own(part), &hub(&format!("self_attn.{module}")), attention, &[rows, cols]);
        }
        // Keys per head and transposed, values per head.
        let k = self.own(&own("attn_k_b"), keys, &[HEADS, RANK, NOPE], 0.0);
        let v = self.own(&own("attn_v_b"), half, &[HEADS, V, RANK], 0.0);
        let mut both = Vec::new();
        for head in 0..HEADS {
            both.extend((0..NOPE * RANK).map(|i| k[(head * RANK + i % RANK) * NOPE + i / RANK]));
            both.extend_from_slice(&v[head * V * RANK..][..V * RANK]);
        }
        self.hub.insert(hub("self_attn.kv_b_proj"), Tensor::f32(&[HEADS * (NOPE + V), RANK], both));
    }

    fn dense(&mut self, layer: usize, gate_up: Type, down: Type, width: usize) {
        for (part, ty, shape) in
            [("gate", gate_up, [width, WIDE]), ("up", gate_up, [width, WIDE]), ("down", down, [WIDE, width])]
        {
            let own = format!("blk.{layer}.ffn_{part}.weight");
            self.add(&own, &format!("model.layers.{layer}.mlp.{part}_proj.weight"), ty, &shape);
        }
    }
}

/// Latent attention with keys and values per head, a shared expert, and types mixed as in dynamic quantisations.
#[test]
fn latent_attention_of_mixed_types() {
    let (mut model, config) = latent();
    model.ends(named("Q4_K"), named("Q5_K"));
    // Gate and up, down, attention, and its separate keys and values.
    let recipes = [
        ["Q5_K", "Q6_K", "Q8_0", "Q8_0", "Q8_0"],
        ["IQ1_S", "IQ2_XXS", "Q4_K", "Q8_0", "IQ4_XS"],
        ["IQ1_M", "IQ3_XXS", "Q5_K", "Q5_0", "Q6_K"],
        ["Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "Q5_K"],
    ];
    for (layer, recipe) in recipes.into_iter().enumerate() {
        let [gate_up, down, attention, keys, half] = recipe.map(named);
        model.latent_attention(layer, attention, keys, half);
        if layer == 0 {
            model.dense(layer, gate_up, down, 2 * WIDE);
            continue;
        }
        let own = |rest: &str| format!("blk.{layer}.{rest}");
        let hub = |rest: &str| format!("model.layers.{layer}.mlp.{rest}");
        model.add(&own("ffn_gate_inp.weight"), &hub("gate.weight"), F32, &[EXPERTS, WIDE]);
        model.add(&own("exp_probs_b.bias"), &hub("gate.e_score_correction_bias"), F32, &[EXPERTS]);
        for (part, ty) in [("gate", gate_up), ("up", gate_up), ("down", down)] {
            model.experts(layer, part, ty, [WIDE, WIDE]);
            let (own, hub) =
                (own(&format!("ffn_{part}_shexp.weight")), hub(&format!("shared_experts.{part}_proj.weight")));
            model.add(&own, &hub, attention, &[WIDE, WIDE]);
        }
    }
    model.compare(&config);
}

//! Writes a checkpoint of random bf16 weights in the DeepSeek-V3 architecture, of any size, to measure conversions:
//!
//! `cargo run --release -p sluice-converter --example make_checkpoint -- FOLDER LAYERS`
//!
//! One layer takes about 130 MB, including 32 experts of 2048 × 640.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

const HIDDEN: usize = 1024;
const WIDTH: usize = 640;
const EXPERTS: usize = 32;
const VOCAB: usize = 8192;
const HEADS: usize = 8;
const RANK: usize = 128;
/// Widths of a head: the part without position, the part with position, the values.
const HEAD: (usize, usize, usize) = (64, 32, 64);

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, "usage: make_checkpoint FOLDER LAYERS");
    let folder = args.next().ok_or_else(usage)?;
    let layers: usize = args.next().and_then(|n| n.parse().ok()).ok_or_else(usage)?;
    write_checkpoint(Path::new(&folder), layers)
}

fn write_checkpoint(folder: &Path, layers: usize) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let config = json!({
        "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": null, "kv_lora_rank": RANK,
        "qk_nope_head_dim": HEAD.0, "qk_rope_head_dim": HEAD.1, "v_head_dim": HEAD.2, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": null,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 1.0,
        "tie_word_embeddings": false, "num_nextn_predict_layers": 0,
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let tensors = tensors(layers);
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors"))?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..end / 2 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // A sign, an exponent near 2^-6, any mantissa: finite, and of the magnitude of weights.
        let bits = (state as u16 & 0x80ff) | (0x3c00 - ((state >> 20) as u16 & 0x0100));
        out.write_all(&bits.to_le_bytes())?;
    }
    out.flush()
}

fn tensors(layers: usize) -> Vec<(String, Vec<usize>)> {
    let mut list = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    let ffn = |list: &mut Vec<(String, Vec<usize>)>, module: String| {
        for (name, shape) in [("gate", [WIDTH, HIDDEN]), ("up", [WIDTH, HIDDEN]), ("down", [HIDDEN, WIDTH])] {
            list.push((format!("{module}.{name}_proj.weight"), shape.to_vec()));
        }
    };
    for layer in 0..layers {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        list.extend([
            (name("input_layernorm"), vec![HIDDEN]),
            (name("post_attention_layernorm"), vec![HIDDEN]),
            (name("self_attn.q_proj"), vec![HEADS * (HEAD.0 + HEAD.1), HIDDEN]),
            (name("self_attn.kv_a_proj_with_mqa"), vec![RANK + HEAD.1, HIDDEN]),
            (name("self_attn.kv_a_layernorm"), vec![RANK]),
            (name("self_attn.kv_b_proj"), vec![HEADS * (HEAD.0 + HEAD.2), RANK]),
            (name("self_attn.o_proj"), vec![HIDDEN, HEADS * HEAD.2]),
            (name("mlp.gate"), vec![EXPERTS, HIDDEN]),
            (format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"), vec![EXPERTS]),
        ]);
        ffn(&mut list, format!("model.layers.{layer}.mlp.shared_experts"));
        (0..EXPERTS).for_each(|e| ffn(&mut list, format!("model.layers.{layer}.mlp.experts.{e}")));
    }
    list
}

//! Helpers for the tests: synthetic checkpoints, and converted files as numbers.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test program uses another part of it")]

pub mod gguf;
pub mod killed;
pub mod safetensors;
pub mod written;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Tensor, Tensors};
use serde_json::{Value, json};
use sluice_converter::{Options, TypeChoice};
use sluice_format::sectors::Sectors;
use sluice_format::{ExtentKind, Layout, ModelFile, TensorRecord, WeightType};
use sluice_kernels as kernels;

pub const GOLDENS: [&str; 3] = ["golden/deepseek_v3", "golden/deepseek_v3_fp8", "golden/kimi_k2"];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

pub fn options(experts: &str, dense: &str) -> Options {
    let choice = |s: &str| s.parse::<TypeChoice>().unwrap();
    Options { expert_type: choice(experts), dense_type: choice(dense), ..Options::default() }
}

/// A repeatable stream of numbers around zero (xorshift64*).
pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    }
}

/// Shape of a synthetic DeepSeek-V3 checkpoint.
#[derive(Clone)]
pub struct Synthetic {
    pub layers: usize,
    pub dense_layers: usize,
    pub experts: usize,
    pub hidden: usize,
    pub width: usize,
    pub nope: usize,
    pub v: usize,
    pub vocab: usize,
    pub q_lora: Option<usize>,
    pub kv_lora: usize,
    /// `BF16`, `F16`, `F32` or `F8_E4M3`.
    pub dtype: &'static str,
}

impl Default for Synthetic {
    fn default() -> Self {
        Synthetic {
            layers: 3,
            dense_layers: 1,
            experts: 6,
            hidden: 72,
            width: 40,
            nope: 20,
            v: 12,
            vocab: 301,
            q_lora: Some(28),
            kv_lora: 36,
            dtype: "BF16",
        }
    }
}

const HEADS: usize = 5;
const ROPE: usize = 6;

impl Synthetic {
    pub fn config(&self) -> Value {
        json!({
            "model_type": "deepseek_v3", "hidden_act": "silu", "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": self.width * 3, "moe_intermediate_size": self.width, "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS, "n_shared_experts": 2, "n_routed_experts": self.experts, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": self.dense_layers,
            "q_lora_rank": self.q_lora, "kv_lora_rank": self.kv_lora, "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": ROPE, "v_head_dim": self.v, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "rope_scaling": null, "rope_theta": 10000, "tie_word_embeddings": false
        })
    }

    fn add(&self, out: &mut Tensors, noise: &mut Noise, name: &str, shape: &[usize]) {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| noise.value()).collect();
        let quantised = self.dtype == "F8_E4M3" && shape.len() == 2 && name.contains("_proj");
        let tensor = match self.dtype {
            "F8_E4M3" if quantised => {
                let scales = [shape[0].div_ceil(128), shape[1].div_ceil(128)];
                let count = scales[0] * scales[1];
                let scales = Tensor::f32(&scales, (0..count).map(|_| noise.value().abs() * 0.01 + 1e-4));
                out.insert(format!("{name}_scale_inv"), scales);
                // Any code except the two NaNs.
                let code = |b: u64| if b as u8 & 0x7f == 0x7f { 0 } else { b as u8 };
                let bytes = (0..n).map(|_| code(noise.bits() >> 33)).collect();
                Tensor { dtype: "F8_E4M3".into(), shape: shape.to_vec(), bytes }
            }
            "F32" => Tensor::f32(shape, values),
            "F16" => Tensor::f16(shape, values),
            _ => Tensor::bf16(shape, values),
        };
        out.insert(name.to_owned(), tensor);
    }

    pub fn tensors(&self) -> Tensors {
        let (h, w) = (self.hidden, self.width);
        let mut out = Tensors::new();
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        let mut add = |name: String, shape: &[usize]| self.add(&mut out, &mut noise, &name, shape);
        add("model.embed_tokens.weight".into(), &[self.vocab, h]);
        add("lm_head.weight".into(), &[self.vocab, h]);
        add("model.norm.weight".into(), &[h]);
        for l in 0..self.layers {
            let p = format!("model.layers.{l}");
            let query = HEADS * (self.nope + ROPE);
            add(format!("{p}.input_layernorm.weight"), &[h]);
            add(format!("{p}.post_attention_layernorm.weight"), &[h]);
            match self.q_lora {
                Some(rank) => {
                    add(format!("{p}.self_attn.q_a_proj.weight"), &[rank, h]);
                    add(format!("{p}.self_attn.q_a_layernorm.weight"), &[rank]);
                    add(format!("{p}.self_attn.q_b_proj.weight"), &[query, rank]);
                }
                None => add(format!("{p}.self_attn.q_proj.weight"), &[query, h]),
            }
            add(format!("{p}.self_attn.kv_a_proj_with_mqa.weight"), &[self.kv_lora + ROPE, h]);
            add(format!("{p}.self_attn.kv_a_layernorm.weight"), &[self.kv_lora]);
            add(format!("{p}.self_attn.kv_b_proj.weight"), &[HEADS * (self.nope + self.v), self.kv_lora]);
            add(format!("{p}.self_attn.o_proj.weight"), &[h, HEADS * self.v]);
            let mut ffn = |module: &str, width: usize| {
                add(format!("{p}.{module}.gate_proj.weight"), &[width, h]);
                add(format!("{p}.{module}.up_proj.weight"), &[width, h]);
                add(format!("{p}.{module}.down_proj.weight"), &[h, width]);
            };
            if l < self.dense_layers {
                ffn("mlp", w * 3);
                continue;
            }
            ffn("mlp.shared_experts", w * 2);
            (0..self.experts).for_each(|e| ffn(&format!("mlp.experts.{e}"), w));
            add(format!("{p}.mlp.gate.weight"), &[self.experts, h]);
            add(format!("{p}.mlp.gate.e_score_correction_bias"), &[self.experts]);
        }
        out
    }

    pub fn write(&self, dir: &Path, shards: usize) -> Tensors {
        let tensors = self.tensors();
        safetensors::write_dir(dir, &self.config(), &tensors, shards);
        tensors
    }
}

/// The matrices of one stored tensor, row-major; gate and up of a pair separately.
pub fn unpack(t: &TensorRecord, extent: &[u8]) -> Vec<Vec<f32>> {
    let [batch, rows, cols] = t.shape.map(|d| d as usize);
    let bytes = &extent[t.offset as usize..(t.offset + t.len) as usize];
    let ty = t.weight_type;
    let order_len = if t.layout.is_ordered() { sluice_format::order_len(cols).unwrap() } else { 0 };
    let (order, bytes) = bytes.split_at(order_len);
    let matrix = |bytes: &[u8]| {
        let stored = kernels::unpack(kernels::Matrix::new(ty, rows, cols, bytes).unwrap());
        let mut values = stored.clone();
        for (i, value) in stored.iter().enumerate().filter(|_| order_len > 0) {
            let column = u16::from_le_bytes([order[i % cols * 2], order[i % cols * 2 + 1]]);
            values[i / cols * cols + usize::from(column)] = *value;
        }
        values
    };
    let element = ty.plain_element_len().unwrap_or(1);
    let wide = |c: &[u8]| match ty {
        WeightType::F32 => f32::from_le_bytes(c.try_into().unwrap()),
        WeightType::F16 => half::f16::from_le_bytes(c.try_into().unwrap()).to_f32(),
        _ => half::bf16::from_le_bytes(c.try_into().unwrap()).to_f32(),
    };
    match t.layout.unordered() {
        Layout::Plain => vec![bytes.chunks(element).map(wide).collect()],
        Layout::Sectors => {
            let sectors = Sectors::of_rows(cols * element).unwrap();
            let row = |row: usize| {
                let (sector, at) = sectors.place(row);
                &bytes[sector * sectors.len + at..][..sectors.row_len]
            };
            vec![(0..rows).flat_map(row).copied().collect::<Vec<u8>>().chunks(element).map(wide).collect()]
        }
        Layout::TiledPair => {
            let group = t.weight_type.row_group_len(cols).unwrap();
            let half = |which: usize| bytes.chunks(group).skip(which).step_by(2).collect::<Vec<_>>().concat();
            vec![matrix(&half(0)), matrix(&half(1))]
        }
        _ => bytes.chunks(bytes.len() / batch).map(matrix).collect(),
    }
}

/// Every tensor of a converted file: `(kind, layer, index, name)` → type and numbers, matrices of a batch one after the other, gate
/// before up.
pub type Content = BTreeMap<(ExtentKind, u32, u32, String), (WeightType, Vec<f32>)>;

pub fn content(path: &Path) -> Content {
    let model = ModelFile::open(path).unwrap();
    let mut out = Content::new();
    let mut buffer = Vec::new();
    for e in model.extents() {
        model.read_extent(e, &mut buffer).unwrap();
        for t in model.tensors_in(e.kind, e.layer, e.index) {
            let key = (e.kind, e.layer, e.index, t.name.clone());
            out.insert(key, (t.weight_type, unpack(t, &buffer).concat()));
        }
    }
    out
}

/// The whole embedding or head of a file.
pub fn joined(content: &Content, kind: ExtentKind) -> Vec<f32> {
    content.iter().filter(|(k, _)| k.0 == kind).flat_map(|(_, v)| v.1.clone()).collect()
}

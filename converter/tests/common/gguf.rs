//! GGUF files: reads their heads, and writes files as llama.cpp's converter makes them from checkpoints.

use std::collections::BTreeMap;

use super::safetensors::{Tensor, Tensors, values};

/// A value of the metadata, as bytes with their type.
#[derive(Clone, Debug)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    Bools(Vec<bool>),
    U32s(Vec<u32>),
    U64s(Vec<u64>),
    F32s(Vec<f32>),
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let ty = |out: &mut Vec<u8>, ty: u32| out.extend(ty.to_le_bytes());
        match self {
            Value::U32(n) => (ty(out, 4), out.extend(n.to_le_bytes())).1,
            Value::F32(n) => (ty(out, 6), out.extend(n.to_le_bytes())).1,
            Value::Bool(b) => (ty(out, 7), out.push(u8::from(*b))).1,
            Value::Text(text) => (ty(out, 8), string(out, text)).1,
            Value::U32s(all) => {
                ty(out, 9);
                ty(out, 4);
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
            }
            Value::U64s(all) => {
                ty(out, 9);
                ty(out, 10);
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
            }
            Value::F32s(all) => {
                ty(out, 9);
                ty(out, 6);
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
            }
            Value::Bools(all) => {
                ty(out, 9);
                ty(out, 7);
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().map(|b| u8::from(*b)));
            }
        }
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Name, type number, shape with the slowest dimension first, and data of a tensor to be written.
pub type Written = (String, u32, Vec<usize>, Vec<u8>);

/// The bytes of a file.
pub fn file(metadata: &[(String, Value)], tensors: &[Written]) -> Vec<u8> {
    let mut keys = Vec::new();
    for (key, value) in metadata {
        string(&mut keys, key);
        value.write(&mut keys);
    }
    with_keys(metadata.len(), &keys, tensors)
}

/// The bytes of a file with the metadata of a head, and other tensors.
pub fn with_metadata_of(head: &[u8], tensors: &[Written]) -> Vec<u8> {
    let (mut at, mut end) = (16, 24);
    let count = number(head, &mut at, 8);
    for _ in 0..count {
        text(head, &mut end);
        let ty = number(head, &mut end, 4);
        skip(head, &mut end, ty);
    }
    with_keys(count, &head[24..end], tensors)
}

fn with_keys(count: usize, keys: &[u8], tensors: &[Written]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((count as u64).to_le_bytes());
    out.extend_from_slice(keys);
    let mut offset = 0u64;
    for (name, ty, shape, data) in tensors {
        string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        out.extend(ty.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + data.len() as u64).next_multiple_of(32);
    }
    for (.., data) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out
}

/// A head's description of a tensor.
#[derive(Clone, Debug)]
pub struct Described {
    pub name: String,
    pub ty: u32,
    pub shape: Vec<usize>,
    pub offset: usize,
}

/// The tensors of a head, and the start of the data.
pub fn read_head(head: &[u8]) -> (Vec<Described>, usize) {
    let mut at = 8;
    let tensors = number(head, &mut at, 8);
    for _ in 0..number(head, &mut at, 8) {
        text(head, &mut at);
        let ty = number(head, &mut at, 4);
        skip(head, &mut at, ty);
    }
    let described = (0..tensors).map(|_| {
        let name = text(head, &mut at);
        let dimensions = number(head, &mut at, 4);
        let mut shape: Vec<usize> = (0..dimensions).map(|_| number(head, &mut at, 8)).collect();
        shape.reverse();
        Described { name, ty: number(head, &mut at, 4) as u32, shape, offset: number(head, &mut at, 8) }
    });
    let described = described.collect();
    (described, at.next_multiple_of(32))
}

fn number(head: &[u8], at: &mut usize, len: usize) -> usize {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&head[*at..*at + len]);
    *at += len;
    u64::from_le_bytes(bytes) as usize
}

fn text(head: &[u8], at: &mut usize) -> String {
    let len = number(head, at, 8);
    *at += len;
    String::from_utf8(head[*at - len..*at].to_vec()).unwrap()
}

fn skip(head: &[u8], at: &mut usize, ty: usize) {
    match ty {
        8 => drop(text(head, at)),
        9 => {
            let ty = number(head, at, 4);
            (0..number(head, at, 8)).for_each(|_| skip(head, at, ty));
        }
        _ => *at += [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][ty],
    }
}

/// Numbers of a checkpoint with the geometry that llama.cpp's converter needs.
pub struct Origin<'a> {
    pub tensors: &'a Tensors,
    /// `config.json` of the text model.
    pub config: &'a serde_json::Value,
    /// The prefix before `layers`.
    pub prefix: &'static str,
}

/// Rows of queries or keys in llama.cpp's order: the halves of each head alternate.
pub fn alternate(all: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (cols, half) = (all.len() / rows, rows / heads / 2);
    let source = |row: usize| row / (2 * half) * 2 * half + row % 2 * half + row % (2 * half) / 2;
    (0..rows).flat_map(|row| all[source(row) * cols..][..cols].to_vec()).collect()
}

/// Rows with this many columns.
type Matrix = (Vec<f32>, usize);

impl Origin<'_> {
    fn count(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    fn of(&self, name: &str) -> Vec<f32> {
        values(self.tensors, name)
    }

    /// The first of these that exists.
    fn of_any<const N: usize>(&self, names: [impl AsRef<str>; N]) -> Vec<f32> {
        let found = names.iter().map(AsRef::as_ref).find(|name| self.has(name));
        self.of(found.unwrap_or_else(|| panic!("none of {:?}", names.each_ref().map(AsRef::as_ref))))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The data of a tensor as the converter writes it, with type F32; `None` for one whose data the fixture has.
    pub fn data(&self, name: &str) -> Vec<f32> {
        match name {
            "token_embd.weight" => return self.of(&format!("{}embed_tokens.weight", self.prefix)),
            "output.weight" => return self.of_any(["lm_head.weight", "language_model.lm_head.weight"]),
            "output_norm.weight" => return self.norm(&format!("{}norm.weight", self.prefix)),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
        self.of_layer(&format!("{}layers.{layer}.", self.prefix), rest)
    }

    /// A norm; the converter adds one if the family stores one less.
    fn norm(&self, name: &str) -> Vec<f32> {
        let add = if self.is_hybrid() { 1.0 } else { 0.0 };
        self.of(name).into_iter().map(|n| n + add).collect()
    }

    fn is_hybrid(&self) -> bool {
        self.config["linear_num_key_heads"].is_u64()
    }

    fn of_layer(&self, layer: &str, rest: &str) -> Vec<f32> {
        let at = |name: &str| format!("{layer}{name}");
        let (module, end) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let plain = |hub: &str| self.of(&at(&format!("{hub}.{end}")));
        match module {
            "attn_norm" => self.norm(&at("input_layernorm.weight")),
            "ffn_norm" | "post_attention_norm" => self.norm(&at("post_attention_layernorm.weight")),
            "attn_q" | "attn_k" => {
                self.query_or_key(&at(&format!("self_attn.{}_proj.{end}", &module[5..])), module == "attn_q")
            }
            "attn_v" => plain("self_attn.v_proj"),
            "attn_output" => plain("self_attn.o_proj"),
            "attn_q_norm" | "attn_k_norm" => {
                let (queries, part) = (module == "attn_q_norm", &module[5..6]);
                let hunyuan =
                    at(if queries { "self_attn.query_layernorm.weight" } else { "self_attn.key_layernorm.weight" });
                let usual = at(&format!("self_attn.{part}_norm.weight"));
                self.norm(if self.has(&hunyuan) { &hunyuan } else { &usual })
            }
            "attn_sinks" => self.of(&at("self_attn.sinks")),
            "attn_q_a" => plain("self_attn.q_a_proj"),
            "attn_q_b" => plain("self_attn.q_b_proj"),
            "attn_q_a_norm" => plain("self_attn.q_a_layernorm"),
            "attn_kv_a_mqa" => plain("self_attn.kv_a_proj_with_mqa"),
            "attn_kv_a_norm" => plain("self_attn.kv_a_layernorm"),
            "attn_k_b" | "attn_v_b" => self.latent_half(&at("self_attn.kv_b_proj.weight"), module == "attn_k_b"),
            "indexer.attn_q_b" => plain("self_attn.indexer.wq_b"),
            "indexer.attn_k" => plain("self_attn.indexer.wk"),
            "indexer.k_norm" => plain("self_attn.indexer.k_norm"),
            "indexer.proj" => plain("self_attn.indexer.weights_proj"),
            "nextn.eh_proj" => plain("eh_proj"),
            "nextn.embed_tokens" => plain("embed_tokens"),
            "nextn.enorm" => plain("enorm"),
            "nextn.hnorm" => plain("hnorm"),
            "nextn.shared_head_head" => plain("shared_head.head"),
            "nextn.shared_head_norm" => plain("shared_head.norm"),
            module if module.starts_with("ffn_") || module.starts_with("exp_probs_b") => {
                self.feed_forward(layer, module, end)
            }
            module => self.linear(layer, module, end),
        }
    }

    /// Llama's and Mistral's queries and keys: the halves of each head alternate.
    fn query_or_key(&self, name: &str, queries: bool) -> Vec<f32> {
        let all = self.of(name);
        let family = self.config["model_type"].as_str().unwrap();
        if !["llama", "mistral", "mixtral", "granitemoe"].contains(&family) {
            return all;
        }
        let heads = self.count(if queries { "num_attention_heads" } else { "num_key_value_heads" });
        let rows = self.tensors[name].shape[0];
        alternate(&all, rows, heads)
    }

    /// Head by head, the rows of the keys, transposed, or those of the values.
    fn latent_half(&self, name: &str, keys: bool) -> Vec<f32> {
        let (nope, v, rank) = (self.count("qk_nope_head_dim"), self.count("v_head_dim"), self.count("kv_lora_rank"));
        let all = self.of(name);
        let heads = all.chunks((nope + v) * rank);
        if !keys {
            return heads.flat_map(|head| head[nope * rank..].to_vec()).collect();
        }
        let transposed = |head: &[f32]| (0..rank * nope).map(|i| head[i % nope * rank + i / nope]).collect::<Vec<_>>();
        heads.flat_map(transposed).collect()
    }

    fn feed_forward(&self, layer: &str, module: &str, end: &str) -> Vec<f32> {
        let at = |name: &str| format!("{layer}{name}");
        let mut of_any = [at("mlp"), at("block_sparse_moe"), at("feed_forward")].into_iter();
        let moe = of_any.find(|m| self.tensors.keys().any(|name| name.starts_with(&format!("{m}.")))).unwrap();
        let part = module.split('_').nth(1).unwrap();
        match module {
            "ffn_gate_inp" => {
                let routers = ["gate", "router", "gate.wg", "router.gate", "router.layer"];
                self.of_any(routers.map(|router| format!("{moe}.{router}.{end}")))
            }
            "ffn_gate_inp_shexp" => self.of(&format!("{moe}.shared_expert_gate.weight")),
            "exp_probs_b" => {
                let biases = [
                    "gate.e_score_correction_bias",
                    "e_score_correction_bias",
                    "expert_bias",
                    "moe_statics.e_score_correction_bias",
                ];
                self.of_any(biases.map(|bias| format!("{moe}.{bias}")))
            }
            "ffn_gate" | "ffn_up" | "ffn_down" => self.of(&format!("{moe}.{part}_proj.{end}")),
            shared if shared.ends_with("_shexp") => {
                let modules = ["shared_experts", "shared_expert", "shared_mlp"];
                self.of_any(modules.map(|module| format!("{moe}.{module}.{part}_proj.{end}")))
            }
            _ => self.experts(&moe, part, end),
        }
    }

    /// All experts of a layer, one after the other.
    fn experts(&self, moe: &str, part: &str, end: &str) -> Vec<f32> {
        match self.config["model_type"].as_str().unwrap() {
            "gpt_oss" => return self.alternating(moe, part, end),
            "llama4_text" => return self.transposed(moe, part),
            _ => {}
        }
        let fused = [["experts.gate_up_proj", "experts.down_proj"], ["input_linear.weight", "output_linear.weight"]];
        let mut fused = fused.map(|names| names.map(|name| format!("{moe}.{name}"))).into_iter();
        if let Some([gate_up, down]) = fused.find(|[gate_up, _]| self.has(gate_up)) {
            let stack = if part == "down" { down } else { gate_up };
            let [experts, rows, cols] = self.tensors[&stack].shape[..] else { panic!("{stack}") };
            let all = self.of(&stack);
            let half = if part == "down" {
                0..rows
            } else if part == "gate" {
                0..rows / 2
            } else {
                rows / 2..rows
            };
            return (0..experts)
                .flat_map(|e| all[(e * rows + half.start) * cols..(e * rows + half.end) * cols].to_vec())
                .collect();
        }
        let mixtral = BTreeMap::from([("gate", "w1"), ("up", "w3"), ("down", "w2")]);
        let names = |e: usize| {
            [format!("{moe}.experts.{e}.{part}_proj.{end}"), format!("{moe}.experts.{e}.{}.{end}", mixtral[part])]
        };
        let name = |e: usize| names(e).into_iter().find(|name| self.has(name));
        (0..).map_while(name).flat_map(|name| self.of(&name)).collect()
    }

    /// Llama 4: transposed, with gate before up.
    fn transposed(&self, moe: &str, part: &str) -> Vec<f32> {
        let name = format!("{moe}.experts.{}", if part == "down" { "down_proj" } else { "gate_up_proj" });
        let [experts, inputs, outputs] = self.tensors[&name].shape[..] else { panic!("{name}") };
        let (all, picked) = (self.of(&name), if part == "down" { outputs } else { outputs / 2 });
        let first = if part == "up" { picked } else { 0 };
        let element = |i: usize| {
            let (expert, output, input) = (i / inputs / picked, i / inputs % picked, i % inputs);
            all[(expert * inputs + input) * outputs + first + output]
        };
        (0..experts * picked * inputs).map(element).collect()
    }

    /// gpt-oss: transposed, and gate and up alternate.
    fn alternating(&self, moe: &str, part: &str, end: &str) -> Vec<f32> {
        let (source, first) = match part {
            "down" => ("down_proj", None),
            "gate" => ("gate_up_proj", Some(0)),
            _ => ("gate_up_proj", Some(1)),
        };
        let every_other = |row: &[f32]| match first {
            None => row.to_vec(),
            Some(first) => row.iter().skip(first).step_by(2).copied().collect(),
        };
        if end == "bias" {
            let name = format!("{moe}.experts.{source}_bias");
            let cols = self.tensors[&name].shape[1];
            return self.of(&name).chunks(cols).flat_map(every_other).collect();
        }
        let name = format!("{moe}.experts.{source}");
        let [experts, inputs, outputs] = self.tensors[&name].shape[..] else { panic!("{name}") };
        let all = self.of(&name);
        let picked = outputs / if first.is_some() { 2 } else { 1 };
        let output = |o: usize| first.map_or(o, |first| 2 * o + first);
        let element =
            |i: usize| all[(i / inputs / picked * inputs + i % inputs) * outputs + output(i / inputs % picked)];
        (0..experts * picked * inputs).map(element).collect()
    }

    /// Linear attention: projections are separate, and for Qwen3.5, value heads with the same number are together for all key
    /// heads.
    fn linear(&self, layer: &str, module: &str, end: &str) -> Vec<f32> {
        let at = |name: &str| format!("{layer}linear_attn.{name}");
        let (keys, heads) = (self.count("linear_num_key_heads"), self.count("linear_num_value_heads"));
        let (key, value) = (self.count("linear_key_head_dim"), self.count("linear_value_head_dim"));
        let apart = self.has(&at("in_proj_qkv.weight"));
        let tiled = |rows: Vec<f32>, width: usize| {
            let source = |head: usize| if apart { head % keys * (heads / keys) + head / keys } else { head };
            (0..heads).flat_map(|head| rows[source(head) * width..][..width].to_vec()).collect::<Vec<_>>()
        };
        let behind = |all: Vec<f32>, first: usize, width: usize| {
            let (before, values) = all.split_at(first);
            [before.to_vec(), tiled(values.to_vec(), width)].concat()
        };
        match (module, end) {
            ("ssm_conv1d", _) => {
                let width = self.count("linear_conv_kernel_dim");
                behind(self.of(&at("conv1d.weight")), 2 * keys * key * width, value * width)
            }
            ("ssm_dt", _) => tiled(self.of(&at("dt_bias")), 1),
            ("ssm_norm", _) => self.of(&at("norm.weight")),
            ("ssm_ba", _) => self.of(&at("in_proj_ba.weight")),
            ("ssm_out", _) => {
                let cols = heads * value;
                self.of(&at("out_proj.weight")).chunks(cols).flat_map(|row| tiled(row.to_vec(), value)).collect()
            }
            (module, _) => {
                let hidden = self.count("hidden_size");
                let name = |part: &str| at(&format!("in_proj_{part}.weight"));
                match (module, apart) {
                    ("ssm_alpha", _) => tiled(self.of(&name("a")), hidden),
                    ("ssm_beta", _) => tiled(self.of(&name("b")), hidden),
                    ("attn_gate", true) => tiled(self.of(&name("z")), value * hidden),
                    ("attn_qkv", true) => behind(self.of(&name("qkv")), 2 * keys * key * hidden, value * hidden),
                    ("attn_qkv", false) => self.by_kind(&name("qkvz"), [key, key, heads / keys * value], 0),
                    ("attn_gate", false) => {
                        self.by_kind(&name("qkvz"), [heads / keys * value, 0, 0], 2 * key + heads / keys * value)
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// Rows that are grouped by key head, sorted by kind: this many of each kind from row `first` of a group on.
    fn by_kind(&self, name: &str, kinds: [usize; 3], first: usize) -> Vec<f32> {
        let (all, hidden): Matrix = (self.of(name), self.count("hidden_size"));
        let groups: Vec<&[f32]> = all.chunks(all.len() / self.count("linear_num_key_heads")).collect();
        let mut out = Vec::new();
        let mut row = first;
        for count in kinds {
            groups.iter().for_each(|group| out.extend_from_slice(&group[row * hidden..][..count * hidden]));
            row += count;
        }
        out
    }

    /// MXFP4 of gpt-oss: scale, then nibbles of columns half a block apart.
    pub fn mxfp4(&self, name: &str) -> Vec<u8> {
        let (layer, rest) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
        let part = rest.split('_').nth(1).unwrap();
        let (source, first) = match part {
            "down" => ("down_proj", None),
            "gate" => ("gate_up_proj", Some(0)),
            _ => ("gate_up_proj", Some(1)),
        };
        let stem = format!("{}layers.{layer}.mlp.experts.{source}", self.prefix);
        let (blocks, scales) = (&self.tensors[&format!("{stem}_blocks")], &self.tensors[&format!("{stem}_scales")]);
        let Tensor { shape, bytes, .. } = blocks;
        let row = shape[2];
        let rows = (0..shape[0] * shape[1]).filter(|r| first.is_none_or(|first| r % 2 == first));
        let block = |i: usize| {
            let nibbles: Vec<u8> = bytes[i * 16..][..16].iter().flat_map(|b| [b & 15, b >> 4]).collect();
            let halves = (0..16).map(|j| nibbles[j] | nibbles[j + 16] << 4);
            std::iter::once(scales.bytes[i]).chain(halves).collect::<Vec<_>>()
        };
        rows.flat_map(|r| (r * row..(r + 1) * row).flat_map(block)).collect()
    }
}

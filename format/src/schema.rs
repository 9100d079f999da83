//! Which tensors a model of a given spec has: the contract between converter and runtime.

use crate::extent::ExtentKind;
use crate::spec::{AttentionSpec, DeltaSpec, FfnSpec, GqaSpec, MlaSpec, ModelSpec, QkNormScope};
use crate::tensor::Layout;
use sluice_weights::WeightType;

/// Name, shape and arrangement of one tensor that an extent must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorShape {
    /// Canonical name.
    pub name: &'static str,
    /// Arrangement. [`Layout::Plain`] tensors are vectors and always f32 (the embedding aside).
    pub layout: Layout,
    /// `[batch, rows, cols]`.
    pub shape: [usize; 3],
}

impl TensorShape {
    /// The two matrices of a pair, gate and up, each for itself. They may stand in its place where one description does not fit both.
    pub fn apart(&self) -> Option<[TensorShape; 2]> {
        let half = |name| TensorShape { name, layout: Layout::Tiled, shape: self.shape };
        (self.layout == Layout::TiledPair).then(|| [half("gate"), half("up")])
    }
}

fn vector(name: &'static str, len: usize) -> TensorShape {
    TensorShape { name, layout: Layout::Plain, shape: [1, 1, len] }
}

fn matrix(name: &'static str, rows: usize, cols: usize) -> TensorShape {
    TensorShape { name, layout: Layout::Tiled, shape: [1, rows, cols] }
}

fn ffn_pair(width: usize, hidden: usize) -> Vec<TensorShape> {
    vec![
        TensorShape { name: "gate_up", layout: Layout::TiledPair, shape: [1, width, hidden] },
        matrix("down", hidden, width),
    ]
}

impl ModelSpec {
    /// Number of extents of `kind` in `layer` (of the whole model for the final norm). Embedding and head are split into as
    /// many parts as the converter likes.
    pub fn extent_count(&self, kind: ExtentKind, layer: usize) -> usize {
        match (kind, self.layers.get(layer).and_then(|l| l.ffn.moe.as_ref())) {
            _ if self.tensors(kind, layer).is_empty() => 0,
            (ExtentKind::Expert, moe) => moe.map_or(0, |m| m.experts),
            _ => 1,
        }
    }

    /// The tensor of an embedding or head part of `rows` rows of type `ty`; `None` for other kinds. The embedding is looked up
    /// row by row: numbers that stand alone are plain, and of all other types a row is unpacked from its row group.
    pub fn part_tensor(&self, kind: ExtentKind, rows: usize, ty: WeightType) -> Option<TensorShape> {
        let layout = match kind {
            ExtentKind::Embedding if ty.plain_element_len().is_some() => Layout::Plain,
            ExtentKind::Embedding | ExtentKind::Head => Layout::Tiled,
            _ => return None,
        };
        Some(TensorShape { name: kind.name(), layout, shape: [1, rows, self.hidden_size] })
    }

    /// Tensors of the extents of `kind` in `layer`, in the order in which they are consumed and stored.
    /// Empty when the layer has no such extent. Embedding and head are split into parts by rows: see
    /// [`ModelSpec::part_tensor`].
    pub fn tensors(&self, kind: ExtentKind, layer: usize) -> Vec<TensorShape> {
        let hidden = self.hidden_size;
        let Some(spec) = self.layers.get(layer) else {
            return if kind == ExtentKind::FinalNorm { vec![vector("norm", hidden)] } else { Vec::new() };
        };
        match kind {
            ExtentKind::Embedding | ExtentKind::Head => Vec::new(),
            ExtentKind::FinalNorm => vec![vector("norm", hidden)],
            ExtentKind::Attention => {
                let mut list = vec![vector("attn_norm", hidden)];
                match &spec.attention {
                    AttentionSpec::Mla(m) => list.extend(mla_tensors(m, hidden)),
                    AttentionSpec::Gqa(g) => list.extend(gqa_tensors(g, hidden)),
                    AttentionSpec::Delta(d) => list.extend(delta_tensors(d, hidden)),
                }
                list
            }
            ExtentKind::Router => router_tensors(&spec.ffn, hidden),
            ExtentKind::Dense if spec.ffn.dense_width > 0 => {
                let gate = spec.ffn.dense_gate.then(|| matrix("dense_gate", 1, hidden));
                gate.into_iter().chain(ffn_pair(spec.ffn.dense_width, hidden)).collect()
            }
            ExtentKind::Dense => Vec::new(),
            ExtentKind::Expert => spec.ffn.moe.as_ref().map_or(Vec::new(), |moe| {
                let mut list = Vec::new();
                if moe.expert_bias {
                    list.extend([vector("gate_bias", moe.width), vector("up_bias", moe.width)]);
                    list.push(vector("down_bias", hidden));
                }
                list.extend(ffn_pair(moe.width, hidden));
                list
            }),
            // The spec of this version has neither prediction layers nor tables.
            ExtentKind::Prediction | ExtentKind::Table => Vec::new(),
        }
    }
}

/// `k_b` and `v_b` are the two halves of the checkpoint's `kv_b_proj`, one matrix per head; `k_b` is transposed, so that the
/// absorbed query `k_b · q_nope` is a plain matrix-vector product.
fn mla_tensors(m: &MlaSpec, hidden: usize) -> Vec<TensorShape> {
    let query = m.heads * (m.qk_nope_head_dim + m.qk_rope_head_dim);
    let mut list = match m.q_lora_rank {
        Some(rank) => vec![matrix("q_a", rank, hidden), vector("q_a_norm", rank), matrix("q_b", query, rank)],
        None => vec![matrix("q", query, hidden)],
    };
    let batched = |name, rows, cols| TensorShape { name, layout: Layout::Tiled, shape: [m.heads, rows, cols] };
    list.extend([
        matrix("kv_a", m.kv_lora_rank + m.qk_rope_head_dim, hidden),
        vector("kv_a_norm", m.kv_lora_rank),
        batched("k_b", m.kv_lora_rank, m.qk_nope_head_dim),
        batched("v_b", m.v_head_dim, m.kv_lora_rank),
        matrix("o", hidden, m.heads * m.v_head_dim),
    ]);
    if let (Some(indexer), Some(rank)) = (&m.indexer, m.q_lora_rank)
        && !indexer.shared
    {
        list.extend([
            matrix("index_q", indexer.index_heads * indexer.index_head_dim, rank),
            matrix("index_k", indexer.index_head_dim, hidden),
            vector("index_k_norm", indexer.index_head_dim),
            vector("index_k_norm_bias", indexer.index_head_dim),
            matrix("index_weights", indexer.index_heads, hidden),
        ]);
    }
    list
}

/// `conv` holds the taps of each channel together, oldest first; channels are those of queries, keys and values.
fn delta_tensors(d: &DeltaSpec, hidden: usize) -> Vec<TensorShape> {
    let (key, value) = (d.key_heads * d.key_head_dim, d.value_heads * d.value_head_dim);
    vec![
        matrix("q", key, hidden),
        matrix("k", key, hidden),
        matrix("v", value, hidden),
        matrix("b", d.value_heads, hidden),
        matrix("a", d.value_heads, hidden),
        vector("conv", d.conv_channels() * d.conv_width),
        vector("a_log", d.value_heads),
        vector("dt_bias", d.value_heads),
        matrix("z", value, hidden),
        vector("out_norm", d.value_head_dim),
        matrix("o", hidden, value),
    ]
}

/// `gate` is the half of the query projection of Qwen3-Next that gates the output.
fn gqa_tensors(g: &GqaSpec, hidden: usize) -> Vec<TensorShape> {
    let (query, key, value) = (g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.v_head_dim);
    let output = g.heads * g.v_head_dim;
    let mut list = vec![matrix("q", query, hidden), matrix("k", key, hidden), matrix("v", value, hidden)];
    if g.qkv_bias {
        list.extend([vector("q_bias", query), vector("k_bias", key), vector("v_bias", value)]);
    }
    if let Some(norm) = &g.qk_norm {
        let (q, k) = match norm.scope {
            QkNormScope::Head => (g.head_dim, g.head_dim),
            QkNormScope::Whole => (query, key),
        };
        list.extend([vector("q_norm", q), vector("k_norm", k)]);
    }
    if g.sinks {
        list.push(vector("sinks", g.heads));
    }
    if g.output_gate {
        list.push(matrix("gate", output, hidden));
    }
    list.push(matrix("o", hidden, output));
    if g.o_bias {
        list.push(vector("o_bias", hidden));
    }
    list
}

fn router_tensors(ffn: &FfnSpec, hidden: usize) -> Vec<TensorShape> {
    let mut list = vec![vector("ffn_norm", hidden)];
    if let Some(moe) = &ffn.moe {
        list.push(matrix("router", moe.experts, hidden));
        if moe.router.logit_bias {
            list.push(vector("router_logit_bias", moe.experts));
        }
        if moe.router.choice_bias {
            list.push(vector("router_bias", moe.experts));
        }
    }
    list
}

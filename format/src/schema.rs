//! Which tensors a model of a given spec has: the contract between converter and runtime.

use crate::extent::ExtentKind;
use crate::spec::{
    ActivationSpec, AttentionSpec, CompressedSpec, DeltaSpec, FfnSpec, GqaSpec, MambaSpec, MlaSpec, ModelSpec,
    NgramSpec, QkNormScope,
};
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

/// Names of the matrix that joins several residual streams, and of the matrices that gated streams have instead.
const STREAMS: &str = "streams";
const STREAMS_DOWN: &str = "streams_down";
const STREAMS_UP: &str = "streams_up";
const STREAMS_INJECT: &str = "streams_inject";

impl TensorShape {
    /// The two matrices of a pair, gate and up, as separate tensors. They may replace the pair if one description does not fit both.
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

/// The matrices of one feed-forward network.
fn network(activation: ActivationSpec, width: usize, hidden: usize) -> [TensorShape; 2] {
    let first = match activation.is_gated() {
        true => TensorShape { name: "gate_up", layout: Layout::TiledPair, shape: [1, width, hidden] },
        false => matrix("up", width, hidden),
    };
    [first, matrix("down", hidden, width)]
}

impl ModelSpec {
    /// Number of extents of `kind` in `layer` (of the whole model for the final norm). Embedding and head are split into as
    /// many parts as the converter likes. Layers are those of [`ModelSpec::all_layers`].
    pub fn extent_count(&self, kind: ExtentKind, layer: usize) -> usize {
        match (kind, self.layer(layer).and_then(|l| l.ffn.moe.as_ref())) {
            _ if self.tensors(kind, layer).is_empty() => 0,
            (ExtentKind::Expert, moe) => moe.map_or(0, |m| m.experts),
            _ => 1,
        }
    }

    /// The tensor of an embedding or head part of `rows` rows of type `ty`; `None` for other kinds. The embedding is looked up
    /// row by row: types with one number per weight are plain; with all other types, a row is unpacked from its row group.
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
        let Some(spec) = self.layer(layer) else {
            return if kind == ExtentKind::FinalNorm { self.final_tensors() } else { Vec::new() };
        };
        match kind {
            ExtentKind::Embedding | ExtentKind::Head => Vec::new(),
            ExtentKind::FinalNorm => self.final_tensors(),
            ExtentKind::Attention => {
                let mut list = self.ngrams_of(layer).map_or_else(Vec::new, |n| self.ngram_tensors(n));
                list.extend(self.stream_tensors());
                list.extend(self.norm_before("attn_norm", "attn_norm_bias"));
                match &spec.attention {
                    AttentionSpec::Mla(m) => list.extend(mla_tensors(m, hidden)),
                    AttentionSpec::Gqa(g) => list.extend(gqa_tensors(g, hidden)),
                    AttentionSpec::Delta(d) => list.extend(delta_tensors(d, hidden)),
                    AttentionSpec::Mamba(m) => list.extend(mamba_tensors(m, hidden)),
                    AttentionSpec::Compressed(c) => list.extend(compressed_tensors(c, hidden)),
                }
                list.extend(self.norms.behind.then(|| vector("attn_post_norm", hidden)));
                list
            }
            ExtentKind::Router if spec.ffn.is_none() => Vec::new(),
            ExtentKind::Router => {
                let mut list = self.stream_tensors();
                list.extend(self.norm_before("ffn_norm", "ffn_norm_bias"));
                list.extend(router_tensors(&spec.ffn, hidden));
                list.extend(self.norms.behind.then(|| vector("ffn_post_norm", hidden)));
                list.extend(self.layer_scale.then(|| vector("layer_scale", 1)));
                list
            }
            ExtentKind::Dense => dense_tensors(&spec.ffn, hidden),
            ExtentKind::Expert => spec.ffn.moe.as_ref().map_or(Vec::new(), |moe| {
                let mut list = Vec::new();
                if moe.expert_bias {
                    list.extend([vector("gate_bias", moe.width), vector("up_bias", moe.width)]);
                    list.push(vector("down_bias", hidden));
                }
                list.extend(network(spec.ffn.activation, moe.width, moe.input_width(hidden)));
                list
            }),
            ExtentKind::Prediction if self.prediction_layer() == Some(layer) => vec![
                vector("embedding_norm", hidden),
                vector("hidden_norm", hidden),
                matrix("projection", hidden, 2 * hidden),
                vector("norm", hidden),
            ],
            // A table is split into parts by rows: see [`NgramSpec::part_tensor`].
            ExtentKind::Table | ExtentKind::Prediction => Vec::new(),
        }
    }

    /// The tensors that add the rows of a table of n-grams to the residual.
    fn ngram_tensors(&self, ngrams: &NgramSpec) -> Vec<TensorShape> {
        let residual = self.residual_width();
        vec![
            matrix("ngram_key", residual, ngrams.width),
            matrix("ngram_value", self.hidden_size, ngrams.width),
            vector("ngram_key_norm", residual),
            vector("ngram_query_norm", residual),
            vector("ngram_conv_norm", residual),
            vector("ngram_conv", residual * ngrams.conv_width),
        ]
    }

    /// The tensors that make one input from gated streams.
    fn gate_tensors(&self) -> Vec<TensorShape> {
        let Some(streams) = &self.gated_streams else { return Vec::new() };
        let residual = self.residual_width();
        vec![
            vector("streams_norm", residual),
            matrix(STREAMS_DOWN, streams.rank, residual),
            matrix(STREAMS_UP, residual, streams.rank),
        ]
    }

    /// The tensors that join the streams for a part of a layer, and add its output to them.
    fn stream_tensors(&self) -> Vec<TensorShape> {
        if let Some(gated) = &self.gated_streams {
            let mut list = self.gate_tensors();
            list.push(matrix(STREAMS_INJECT, gated.count, self.residual_width()));
            return list;
        }
        let Some(streams) = &self.streams else { return Vec::new() };
        let functions = streams.functions();
        vec![
            matrix(STREAMS, functions, self.residual_width()),
            vector("streams_bias", functions),
            vector("streams_scale", 3),
        ]
    }

    /// The norm before a part of a layer or before the head. Gated streams have been normalised before they were joined.
    fn norm_before(&self, weight: &'static str, bias: &'static str) -> impl Iterator<Item = TensorShape> {
        let names = [weight].into_iter().chain(self.norms.centred.then_some(bias));
        names.filter(|_| self.gated_streams.is_none()).map(|name| vector(name, self.hidden_size))
    }

    fn final_tensors(&self) -> Vec<TensorShape> {
        let mut list = self.gate_tensors();
        if let Some(streams) = &self.streams {
            list.push(matrix(STREAMS, streams.count, self.residual_width()));
            list.extend([vector("streams_bias", streams.count), vector("streams_scale", 1)]);
        }
        list.extend(self.norm_before("norm", "norm_bias"));
        list.extend(self.head_bias.then(|| vector("head_bias", self.vocab_size)));
        list
    }
}

impl NgramSpec {
    /// The tensor of a part of the table, of `rows` rows.
    pub fn part_tensor(&self, rows: usize) -> TensorShape {
        TensorShape { name: ExtentKind::Table.name(), layout: Layout::Sectors, shape: [1, rows, self.row_width()] }
    }
}

impl TensorShape {
    /// Whether it makes decisions rather than sums, so its precision matters and costs little: it is a float whatever type
    /// matrices have.
    pub fn decides(&self, kind: ExtentKind) -> bool {
        kind == ExtentKind::Router || self.joins_streams()
    }

    /// Whether it is a matrix that joins several residual streams, or says which of them a part's output enters.
    pub fn joins_streams(&self) -> bool {
        [STREAMS, STREAMS_DOWN, STREAMS_UP, STREAMS_INJECT].contains(&self.name)
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
    ]);
    list.extend(m.head_gate.then(|| matrix("head_gate", m.heads, hidden)));
    list.push(matrix("o", hidden, m.heads * m.v_head_dim));
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
    let decays = d.value_heads * d.decays_per_head();
    let projection = |rank, whole, [down, up]: [&'static str; 2], rows| match rank {
        None => vec![matrix(whole, rows, hidden)],
        Some(rank) => vec![matrix(down, rank, hidden), matrix(up, rows, rank)],
    };
    let mut list = vec![matrix("q", key, hidden), matrix("k", key, hidden), matrix("v", value, hidden)];
    list.push(matrix("b", d.value_heads, hidden));
    list.extend(projection(d.decay_rank, "a", ["a_down", "a_up"], decays));
    list.extend([
        vector("conv", d.conv_channels() * d.conv_width),
        vector("a_log", d.value_heads),
        vector("dt_bias", decays),
    ]);
    list.extend(projection(d.gate_rank, "z", ["z_down", "z_up"], value));
    list.extend([vector("out_norm", d.value_head_dim), matrix("o", hidden, value)]);
    list
}

/// `conv` holds the taps of each channel together, oldest first; channels are those of `x`, `b` and `c`.
fn mamba_tensors(m: &MambaSpec, hidden: usize) -> Vec<TensorShape> {
    let (inner, group) = (m.inner_width(), m.groups * m.state_dim);
    let mut list = vec![matrix("x", inner, hidden), matrix("b", group, hidden), matrix("c", group, hidden)];
    list.extend([matrix("dt", m.heads, hidden), vector("conv", m.conv_channels() * m.conv_width)]);
    list.extend(m.conv_bias.then(|| vector("conv_bias", m.conv_channels())));
    list.extend([vector("a_log", m.heads), vector("dt_bias", m.heads), vector("d", m.heads)]);
    list.extend([matrix("z", inner, hidden), vector("out_norm", inner), matrix("o", hidden, inner)]);
    list
}

/// `gate` is the half of the query projection of Qwen3-Next that gates the output.
fn gqa_tensors(g: &GqaSpec, hidden: usize) -> Vec<TensorShape> {
    let (query, key, value) = (g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.v_head_dim);
    let output = g.heads * g.v_head_dim;
    let mut list = vec![matrix("q", query, hidden), matrix("k", key, hidden)];
    list.extend((!g.value_is_key).then(|| matrix("v", value, hidden)));
    if g.qkv_bias {
        list.extend([vector("q_bias", query), vector("k_bias", key)]);
        list.extend((!g.value_is_key).then(|| vector("v_bias", value)));
    }
    if let Some(norm) = g.qk_norm.as_ref().filter(|norm| !norm.weightless) {
        let (q, k) = match norm.scope {
            QkNormScope::Head => (g.head_dim, g.head_dim),
            QkNormScope::Whole => (query, key),
        };
        list.extend([vector("q_norm", q), vector("k_norm", k)]);
    }
    if g.sinks {
        list.push(vector("sinks", g.heads));
    }
    if let Some(blocks) = &g.blocks {
        list.extend([
            matrix("index_q", blocks.index_heads * blocks.index_head_dim, hidden),
            matrix("index_k", blocks.index_head_dim, hidden),
            vector("index_q_norm", blocks.index_head_dim),
            vector("index_k_norm", blocks.index_head_dim),
        ]);
    }
    if g.output_gate {
        list.push(matrix("gate", output, hidden));
    }
    list.extend(g.head_gate.then(|| matrix("head_gate", g.heads, hidden)));
    list.push(matrix("o", hidden, output));
    if g.o_bias {
        list.push(vector("o_bias", hidden));
    }
    list
}

/// The tensors for entries lie together, with those for the indexer's entries behind them.
fn compressed_tensors(c: &CompressedSpec, hidden: usize) -> Vec<TensorShape> {
    let mut list = vec![
        matrix("q_a", c.q_lora_rank, hidden),
        vector("q_a_norm", c.q_lora_rank),
        matrix("q_b", c.heads() * c.head_dim, c.q_lora_rank),
        matrix("kv", c.head_dim, hidden),
        vector("kv_norm", c.head_dim),
    ];
    if let Some(compression) = &c.compression {
        let (ratio, spans) = (compression.ratio, compression.spans);
        list.extend([
            matrix("entry_kv", spans * c.head_dim, hidden),
            matrix("entry_gate", spans * c.head_dim, hidden),
            vector("entry_bias", ratio * spans * c.head_dim),
            vector("entry_norm", c.head_dim),
        ]);
        if let Some(indexer) = &compression.indexer {
            let width = indexer.index_head_dim;
            list.extend([
                matrix("index_q", indexer.index_heads * width, c.q_lora_rank),
                matrix("index_weights", indexer.index_heads, hidden),
                matrix("index_entry_kv", spans * width, hidden),
                matrix("index_entry_gate", spans * width, hidden),
                vector("index_entry_bias", ratio * spans * width),
                vector("index_entry_norm", width),
            ]);
        }
    }
    if c.sinks {
        list.push(vector("sinks", c.heads()));
    }
    let group = [c.output_groups, c.output_rank, c.group_heads * c.head_dim];
    list.push(TensorShape { name: "o_a", layout: Layout::Tiled, shape: group });
    list.push(matrix("o", hidden, c.output_groups * c.output_rank));
    list
}

/// What is computed for every token, and the projections into the latent space of experts and back.
fn dense_tensors(ffn: &FfnSpec, hidden: usize) -> Vec<TensorShape> {
    let mut list = Vec::new();
    if let Some(latent) = ffn.moe.as_ref().and_then(|moe| moe.latent) {
        list.extend([matrix("latent_down", latent, hidden), matrix("latent_up", hidden, latent)]);
    }
    if ffn.dense_width > 0 {
        list.extend(ffn.dense_gate.then(|| matrix("dense_gate", 1, hidden)));
        list.extend(network(ffn.dense_activation(), ffn.dense_width, hidden));
    }
    list
}

fn router_tensors(ffn: &FfnSpec, hidden: usize) -> Vec<TensorShape> {
    let mut list = Vec::new();
    if let Some(moe) = &ffn.moe {
        list.push(matrix("router", moe.experts, hidden));
        if moe.router.logit_bias {
            list.push(vector("router_logit_bias", moe.experts));
        }
        if moe.router.choice_bias {
            list.push(vector("router_bias", moe.experts));
        }
        if let Some(rows) = moe.router.token_table {
            list.push(vector("token_experts", rows * moe.top_k));
        }
        if moe.router.expert_scale {
            list.push(vector("expert_scale", moe.experts));
        }
        if moe.apart {
            list.extend(
                ["router_norm", "expert_norm", "dense_post_norm", "expert_post_norm"].map(|name| vector(name, hidden)),
            );
        }
    }
    list
}

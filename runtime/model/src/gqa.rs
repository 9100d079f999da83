//! Grouped-query attention (arXiv:2305.13245) with rotary positions, and the additions of various families: norms of queries and
//! keys, biases, a sliding window or stretches, attention sinks, a temperature that depends on the position, an output gate, a
//! choice of blocks of keys.

use sluice_format::{GqaSpec, QkNormScope};
use sluice_kernels::{Activations, QueryTile, rms_norm, sigmoid};

use super::ModelError;
use super::compute::{Compute, HeadScratch, Step, sized, with_head_scratch};
use super::key_blocks::{self, KeyBlocks, KeyBlocksScratch};
use super::rope::{Rope, RopeAngles};
use super::rows::Caches;
use super::tasks::{self, Heads, Most, Task, Tasks};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Queries (heads times rows) of a task: with a block of their keys they fit in the second-level cache.
const QUERIES_TOGETHER: usize = 64;

/// Weights of one layer's attention, as places in its extent.
#[derive(Debug)]
pub struct Gqa {
    spec: GqaSpec,
    rope: Option<Rope>,
    q: Projection,
    k: Projection,
    /// `None` if values are keys.
    v: Option<Projection>,
    o: Projection,
    q_norm: Option<VectorRef>,
    k_norm: Option<VectorRef>,
    sinks: Option<VectorRef>,
    gate: Option<MatrixRef>,
    head_gate: Option<MatrixRef>,
    blocks: Option<KeyBlocks>,
}

/// A matrix and, in some families, a bias.
#[derive(Debug)]
struct Projection {
    matrix: MatrixRef,
    bias: Option<VectorRef>,
}

impl Projection {
    fn new(tensors: &ExtentTensors<'_>, matrix: &'static str, bias: Option<&'static str>) -> Result<Self, ModelError> {
        Ok(Projection { matrix: tensors.matrix(matrix)?, bias: bias.map(|b| tensors.vector(b)).transpose()? })
    }

    /// `out` `[n, rows]` = matrix · x + bias.
    fn apply(&self, step: Step<'_>, x: &Activations, vector: &mut Vec<f32>, out: &mut [f32]) {
        step.multiply(&self.matrix, x, out);
        self.add_bias(step, vector, out);
    }

    /// Adds the bias, if there is one, to the products `out` `[n, rows]`.
    fn add_bias(&self, step: Step<'_>, vector: &mut Vec<f32>, out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            step.read(bias, vector);
            for row in out.chunks_exact_mut(vector.len()) {
                row.iter_mut().zip(&*vector).for_each(|(o, b)| *o += b);
            }
        }
    }
}

/// The data that all tasks of a pass read.
#[derive(Clone, Copy)]
struct Queries<'a, 's> {
    step: Step<'a>,
    caches: &'a Caches<'a, 's>,
    /// `[n, heads, head_dim]`.
    query: &'a [f32],
    /// One per head.
    sinks: Option<&'a [f32]>,
    blocks: &'a KeyBlocksScratch,
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &GqaSpec) -> usize {
    let gate = match (spec.output_gate, spec.head_gate) {
        (true, _) => spec.heads * spec.v_head_dim,
        (false, true) => spec.heads,
        (false, false) => 0,
    };
    let key_value = spec.kv_heads * (spec.head_dim + spec.v_head_dim);
    let blocks = spec.blocks.as_ref().map_or(0, key_blocks::scratch_width);
    spec.heads * (spec.head_dim + 2 * spec.v_head_dim) + key_value + gate + blocks
}

/// Buffers that grouped-query attention reuses from call to call.
#[derive(Debug)]
pub struct GqaScratch {
    activations: Activations,
    vector: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    gate: Vec<f32>,
    sinks: Vec<f32>,
    by_task: Vec<f32>,
    tasks: Tasks,
    by_token: Vec<f32>,
    angles: RopeAngles,
    blocks: KeyBlocksScratch,
}

impl GqaScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        GqaScratch {
            activations: Activations::new(compute.precision),
            vector: Vec::new(),
            query: Vec::new(),
            key: Vec::new(),
            value: Vec::new(),
            gate: Vec::new(),
            sinks: Vec::new(),
            by_task: Vec::new(),
            tasks: Tasks::default(),
            by_token: Vec::new(),
            angles: RopeAngles::default(),
            blocks: KeyBlocksScratch::default(),
        }
    }
}

impl Gqa {
    pub(super) fn new(spec: &GqaSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        let bias = |on: bool, name| on.then_some(name);
        let weighted = spec.qk_norm.as_ref().is_some_and(|norm| !norm.weightless);
        let norm = |name| weighted.then(|| tensors.vector(name)).transpose();
        Ok(Gqa {
            rope: spec.rope.as_ref().map(Rope::new),
            q: Projection::new(tensors, "q", bias(spec.qkv_bias, "q_bias"))?,
            k: Projection::new(tensors, "k", bias(spec.qkv_bias, "k_bias"))?,
            v: match spec.value_is_key {
                true => None,
                false => Some(Projection::new(tensors, "v", bias(spec.qkv_bias, "v_bias"))?),
            },
            o: Projection::new(tensors, "o", bias(spec.o_bias, "o_bias"))?,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            sinks: spec.sinks.then(|| tensors.vector("sinks")).transpose()?,
            gate: spec.output_gate.then(|| tensors.matrix("gate")).transpose()?,
            head_gate: spec.head_gate.then(|| tensors.matrix("head_gate")).transpose()?,
            blocks: spec.blocks.as_ref().map(|blocks| KeyBlocks::new(spec, blocks, tensors)).transpose()?,
            spec: spec.clone(),
        })
    }

    /// Attention of the rows of a pass: reads `x` `[n, hidden]` (normalised), extends `caches`, writes `out` `[n, hidden]`.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut GqaScratch,
        out: &mut [f32],
    ) {
        let n = step.n();
        scratch.activations.set(x, n, x.len() / n);
        self.project(step, scratch);
        if step.is_cancelled() {
            return;
        }
        self.extend_caches(step, caches, scratch);
        if let Some(blocks) = &self.blocks {
            let GqaScratch { activations, angles, blocks: chosen, .. } = scratch;
            blocks.extend(step, caches, activations, angles, chosen);
            blocks.choose(step, caches, activations, angles, chosen);
            if step.is_cancelled() {
                return;
            }
        }
        self.attend(step, caches, scratch);
        if step.is_cancelled() {
            return;
        }
        self.gather_heads(step, scratch);
        let GqaScratch { activations, vector, by_token, .. } = scratch;
        let width = self.spec.heads * self.spec.v_head_dim;
        activations.set(&by_token[..n * width], n, width);
        self.o.apply(step, activations, vector, out);
    }

    /// All products with the layer's input: queries, keys, values, and what gates the output.
    fn multiply_input(&self, step: Step<'_>, scratch: &mut GqaScratch) {
        let (s, n) = (&self.spec, step.n());
        let GqaScratch { activations, vector, query, key, value, gate, .. } = scratch;
        let query = sized(query, n * s.heads * s.head_dim);
        let key = sized(key, n * s.kv_heads * s.head_dim);
        let value = sized(value, n * s.kv_heads * s.v_head_dim);
        let gates = self.gate.as_ref().or(self.head_gate.as_ref());
        let gates = gates.map(|matrix| (matrix, sized(gate, n * matrix.rows())));
        let of_value = self.v.as_ref().map(|v| (&v.matrix, &mut *value));
        let of_query = [(&self.q.matrix, &mut *query), (&self.k.matrix, &mut *key)];
        step.multiply_each(activations, of_query.into_iter().chain(of_value).chain(gates));
        self.q.add_bias(step, vector, query);
        self.k.add_bias(step, vector, key);
        match &self.v {
            Some(v) => v.add_bias(step, vector, value),
            None => value.copy_from_slice(key),
        }
    }

    /// Queries `[n, heads, head_dim]`, keys and values, normalised and rotated.
    fn project(&self, step: Step<'_>, scratch: &mut GqaScratch) {
        self.multiply_input(step, scratch);
        let (s, n) = (&self.spec, step.n());
        let GqaScratch { vector, query, key, value, angles, .. } = scratch;
        let query = sized(query, n * s.heads * s.head_dim);
        let key = sized(key, n * s.kv_heads * s.head_dim);
        let value = sized(value, n * s.kv_heads * s.v_head_dim);
        let after_rope = s.qk_norm.as_ref().is_some_and(|norm| norm.after_rope);
        if !after_rope {
            self.normalise(step, vector, query, key);
        }
        if let Some(limit) = s.clip_qkv {
            for x in [&mut *query, &mut *key, &mut *value] {
                x.iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
            }
        }
        if let Some(rope) = &self.rope {
            rope.angles(step.rows.positions(), angles);
            for (x, heads) in [(&mut *query, s.heads), (&mut *key, s.kv_heads)] {
                for (i, head) in x.chunks_exact_mut(s.head_dim).enumerate() {
                    rope.rotate(head, angles, i / heads);
                }
            }
        }
        if after_rope {
            self.normalise(step, vector, query, key);
        }
        if let Some(temperature) = &s.temperature {
            for (row, position) in query.chunks_exact_mut(s.heads * s.head_dim).zip(step.rows.positions()) {
                let factor = temperature.factor(position);
                row.iter_mut().for_each(|q| *q *= factor);
            }
        }
        if let Some(eps) = s.value_norm {
            vector.clear();
            vector.resize(s.v_head_dim, 1.0);
            normalise_rows(vector, eps, value);
        }
        if let Some(factor) = s.value_factor {
            value.iter_mut().for_each(|v| *v *= factor);
        }
    }

    /// The norm of queries and keys, if there is one.
    fn normalise(&self, step: Step<'_>, vector: &mut Vec<f32>, query: &mut [f32], key: &mut [f32]) {
        for (norm, heads, x) in [(&self.q_norm, self.spec.heads, query), (&self.k_norm, self.spec.kv_heads, key)] {
            self.normalise_heads(step, norm.as_ref(), heads, vector, x);
        }
    }

    fn normalise_heads(
        &self,
        step: Step<'_>,
        norm: Option<&VectorRef>,
        heads: usize,
        vector: &mut Vec<f32>,
        x: &mut [f32],
    ) {
        let Some(spec) = &self.spec.qk_norm else { return };
        let width = match spec.scope {
            QkNormScope::Head => self.spec.head_dim,
            QkNormScope::Whole => heads * self.spec.head_dim,
        };
        match norm {
            Some(norm) => step.read(norm, vector),
            None => {
                vector.clear();
                vector.resize(width, 1.0);
            }
        }
        normalise_rows(vector, spec.eps, x);
    }

    fn extend_caches(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, scratch: &GqaScratch) {
        let s = &self.spec;
        let (key_width, value_width) = (s.kv_heads * s.head_dim, s.kv_heads * s.v_head_dim);
        for span in step.rows.spans() {
            let mut cache = caches.of_mut(span.span).key_value_mut();
            let keys = scratch.key[span.first * key_width..].chunks_exact(key_width);
            let values = scratch.value[span.first * value_width..].chunks_exact(value_width);
            for (i, (key, value)) in keys.zip(values).take(span.count).enumerate() {
                cache.set(span.start + i, key, value);
            }
        }
    }

    /// Leaves the heads' outputs in `scratch.by_task`, divided as in `scratch.tasks`.
    fn attend(&self, step: Step<'_>, caches: &Caches<'_, '_>, scratch: &mut GqaScratch) {
        let s = &self.spec;
        let GqaScratch { query, by_task, tasks, sinks, blocks, .. } = scratch;
        if let Some(sink) = &self.sinks {
            step.read(sink, sinks);
        }
        let sharing = s.heads_together();
        let heads = Heads { heads: s.heads, sharing, width: s.v_head_dim };
        tasks.plan(step, heads, false, |_| Most { rows: (QUERIES_TOGETHER / sharing).max(1), heads: sharing });
        let queries = Queries { step, caches, query, sinks: self.sinks.as_ref().map(|_| &sinks[..]), blocks };
        tasks.run(&step.compute.threads, sized(by_task, step.n() * s.heads * s.v_head_dim), &|task, out| {
            with_head_scratch(|scratch| {
                let mut left = out;
                for (span, rows) in step.rows.parts(task.rows.clone()) {
                    let (out, rest) = left.split_at_mut(rows.len() * task.heads.len() * s.v_head_dim);
                    let part = Task { rows, heads: task.heads.clone(), expanded: false };
                    self.attend_rows(queries, span, &part, scratch, out);
                    left = rest;
                }
            });
        });
    }

    /// Rows of one span with heads that share their keys: `out` is `[rows, heads, v_head_dim]`.
    fn attend_rows(
        &self,
        queries: Queries<'_, '_>,
        span: usize,
        task: &Task,
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let (s, Queries { step, caches, blocks, .. }) = (&self.spec, queries);
        let chosen = |row| self.blocks.as_ref().and_then(|b| b.chosen(step, row, task.heads.start, blocks));
        let kv_head = task.heads.start / (s.heads / s.kv_heads);
        let cache = caches.of(span).key_value();
        let (mut left, mut row) = (out, task.rows.start);
        while row < task.rows.end {
            // A row with its own choice of blocks shares keys only among its heads; other rows meet their keys together.
            let own = chosen(row);
            let alike = (row + 1..task.rows.end).find(|&row| chosen(row).is_some());
            let end = if own.is_some() { row + 1 } else { alike.unwrap_or(task.rows.end) };
            self.begin_tile(
                queries,
                &Task { rows: row..end, heads: task.heads.clone(), expanded: false },
                &mut scratch.tile,
            );
            let done = match own {
                Some(own) => key_blocks::attend(step, cache, kv_head, own, scratch),
                None => tasks::attend(step, &mut scratch.tile, |positions| cache.rows(kv_head, positions)),
            };
            if !done {
                return;
            }
            let results = scratch.tile.results();
            let (out, rest) = left.split_at_mut(results.len());
            out.copy_from_slice(results);
            (left, row) = (rest, end);
        }
    }

    /// Adds the queries of a task's rows and heads to the tile, with what they see: positions, or places in the list of chosen
    /// keys.
    fn begin_tile(&self, queries: Queries<'_, '_>, task: &Task, tile: &mut QueryTile) {
        let (s, Queries { step, query, sinks, blocks, .. }) = (&self.spec, queries);
        tile.begin(s.head_dim, s.v_head_dim, s.softmax_scale);
        for row in task.rows.clone() {
            let position = step.rows.get(row).position;
            let chosen = self.blocks.as_ref().and_then(|b| b.chosen(step, row, task.heads.start, blocks));
            let end = chosen.map_or(position + 1, |chosen| chosen.keys());
            let first = if chosen.is_some() { 0 } else { s.first_seen(position) };
            for head in task.heads.clone() {
                let query = &query[(row * s.heads + head) * s.head_dim..][..s.head_dim];
                tile.add(first..end, sinks.map(|sinks| sinks[head])).copy_from_slice(query);
            }
        }
    }

    /// Puts the outputs into the order `[n, heads, v_head_dim]` and applies the output gate.
    fn gather_heads(&self, step: Step<'_>, scratch: &mut GqaScratch) {
        let (s, n) = (&self.spec, step.n());
        let GqaScratch { by_task, tasks, by_token, gate, .. } = scratch;
        let (heads, width) = (s.heads, s.v_head_dim);
        let by_token = sized(by_token, n * heads * width);
        tasks.by_row(by_task, heads, by_token);
        if self.gate.is_some() {
            by_token.iter_mut().zip(gate).for_each(|(o, g)| *o *= sigmoid(*g));
        } else if self.head_gate.is_some() {
            gate_heads(&gate[..n * heads], by_token);
        }
    }
}

/// Multiplies the outputs of heads, `[n, heads, width]`, by the sigmoid of one number per head, `[n, heads]`.
pub(super) fn gate_heads(gate: &[f32], out: &mut [f32]) {
    let width = out.len() / gate.len();
    for (head, gate) in out.chunks_exact_mut(width).zip(gate) {
        let gate = sigmoid(*gate);
        head.iter_mut().for_each(|o| *o *= gate);
    }
}

/// The RMS norm of each row of `x`; rows are as wide as `weight`.
fn normalise_rows(weight: &[f32], eps: f32, x: &mut [f32]) {
    // The kernel needs different slices for input and output; a head is short.
    with_head_scratch(|scratch| {
        for row in x.chunks_exact_mut(weight.len()) {
            let copy = sized(&mut scratch.input, weight.len());
            copy.copy_from_slice(row);
            rms_norm(copy, weight, eps, row);
        }
    });
}

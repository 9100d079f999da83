//! Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//!
//! The cache holds one latent `c` and one rotated key `k_pe` per token, shared by all heads. With `k_b` and `v_b` the two
//! halves of the up-projection of a head: `score = (k_b · q_nope) · c + q_pe · k_pe`, `out = v_b · Σ softmax(score) c`. This is the
//! absorbed form. On request the rows of prompts have the expanded form instead ([`PromptAttention`]): `score = q_nope · (k_bᵀ · c) +
//! q_pe · k_pe`, `out = Σ softmax(score) (v_b · c)`.

mod expanded;

use std::ops::Range;

use sluice_format::MlaSpec;
use sluice_kernels::{Activations, rms_norm};

use super::ModelError;
use super::cache::latent_width;
use super::compute::{Compute, HeadScratch, Step, sized, with_head_scratch};
use super::gqa::gate_heads;
use super::indexer::{self, IndexScratch, Indexer};
use super::prompt_attention::PromptAttention;
use super::rope::{Rope, RopeAngles};
use super::rows::{Caches, Phase, SpanRows};
use super::tasks::{self, Heads, Most, Task, Tasks};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

pub use self::expanded::{Expansion, expansion_memory};

/// Queries (heads times rows) that meet the same latents together: with a block of these they fit the second-level cache.
const QUERIES_TOGETHER: usize = 48;
/// Most heads of a task.
const HEADS_TOGETHER: usize = 16;
/// Most absorbed queries (heads times rows) of a thread, and most rows: enough that weights are met by many at once.
const ABSORBED_TOGETHER: usize = 256;
const ROWS_TOGETHER: usize = 48;

/// Weights of one layer's latent attention, as places in its extent.
#[derive(Debug)]
pub struct Mla {
    spec: MlaSpec,
    rope: Option<Rope>,
    query: Query,
    kv_a: MatrixRef,
    kv_a_norm: VectorRef,
    k_b: MatrixRef,
    v_b: MatrixRef,
    head_gate: Option<MatrixRef>,
    o: MatrixRef,
    indexer: Option<Indexer>,
}

/// What all tasks of a pass read.
#[derive(Clone, Copy)]
struct Queries<'a, 's> {
    step: Step<'a>,
    caches: &'a Caches<'a, 's>,
    /// `[n, heads, nope + rope]`, not rotated.
    query: &'a [f32],
    angles: &'a RopeAngles,
    index: &'a IndexScratch,
}

#[derive(Debug)]
enum Query {
    Full(MatrixRef),
    LowRank { a: MatrixRef, norm: VectorRef, b: MatrixRef },
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &MlaSpec) -> usize {
    let head = spec.qk_nope_head_dim + spec.qk_rope_head_dim + 2 * spec.v_head_dim;
    let index = spec.indexer.as_ref().map_or(0, indexer::scratch_width);
    let gate = if spec.head_gate { spec.heads } else { 0 };
    gate + spec.heads * head + 2 * spec.q_lora_rank.unwrap_or(0) + 4 * latent_width(spec) + index
}

/// Buffers that latent attention reuses from call to call.
#[derive(Debug)]
pub struct MlaScratch {
    activations: Activations,
    norm: Vec<f32>,
    /// The query's latent, and the same normalised, `[2, tokens, rank]`.
    latent: Vec<f32>,
    query: Vec<f32>,
    kv: Vec<f32>,
    /// The row of the cache that is being made.
    entry: Vec<f32>,
    by_task: Vec<f32>,
    tasks: Tasks,
    /// `[tokens, heads, v_head_dim]`.
    by_token: Vec<f32>,
    gate: Vec<f32>,
    angles: RopeAngles,
    index: IndexScratch,
}

impl MlaScratch {
    /// Empty buffers; they grow to what the first call needs.
    pub fn new(compute: &Compute) -> Self {
        MlaScratch {
            activations: Activations::new(compute.precision),
            norm: Vec::new(),
            latent: Vec::new(),
            query: Vec::new(),
            kv: Vec::new(),
            entry: Vec::new(),
            by_task: Vec::new(),
            tasks: Tasks::default(),
            by_token: Vec::new(),
            gate: Vec::new(),
            angles: RopeAngles::default(),
            index: IndexScratch::default(),
        }
    }
}

impl Mla {
    pub(super) fn new(spec: &MlaSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        let query = match spec.q_lora_rank {
            None => Query::Full(tensors.matrix("q")?),
            Some(_) => Query::LowRank {
                a: tensors.matrix("q_a")?,
                norm: tensors.vector("q_a_norm")?,
                b: tensors.matrix("q_b")?,
            },
        };
        let indexer = spec.indexer.as_ref().zip(spec.rope.as_ref());
        let indexer = indexer.map(|(indexer, rope)| Indexer::new(indexer, rope, tensors)).transpose()?;
        Ok(Mla {
            indexer: indexer.flatten(),
            spec: spec.clone(),
            rope: spec.rope.as_ref().map(Rope::new),
            query,
            kv_a: tensors.matrix("kv_a")?,
            kv_a_norm: tensors.vector("kv_a_norm")?,
            k_b: tensors.matrix("k_b")?,
            v_b: tensors.matrix("v_b")?,
            head_gate: spec.head_gate.then(|| tensors.matrix("head_gate")).transpose()?,
            o: tensors.matrix("o")?,
        })
    }

    /// Attention of the rows of a pass: reads `x` `[n, hidden]` (normalised), extends `caches`, writes `out` `[n, hidden]`.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut MlaScratch,
        out: &mut [f32],
    ) {
        let n = step.n();
        scratch.activations.set(x, n, x.len() / n);
        if let Some(rope) = &self.rope {
            rope.angles(step.rows.positions(), &mut scratch.angles);
        }
        self.multiply_input(step, scratch);
        self.extend_caches(step, caches, scratch);
        if let Some(indexer) = &self.indexer {
            indexer.extend(step, caches, &scratch.activations, &mut scratch.index);
        }
        if step.is_cancelled() {
            return;
        }
        self.project_query(step, scratch);
        if let Some(indexer) = &self.indexer {
            // The query's latent is what was last multiplied.
            indexer.choose(step, caches, &scratch.activations, &mut scratch.index);
        }
        if step.is_cancelled() {
            return;
        }
        self.attend(step, caches, scratch);
        if step.is_cancelled() {
            return;
        }

        let MlaScratch { by_task, tasks, by_token, activations, gate, .. } = scratch;
        let (heads, width) = (self.spec.heads, self.spec.v_head_dim);
        let by_token = sized(by_token, n * heads * width);
        tasks.by_row(by_task, heads, by_token);
        if self.head_gate.is_some() {
            gate_heads(&gate[..n * heads], by_token);
        }
        activations.set(by_token, n, heads * width);
        step.multiply(&self.o, activations, out);
    }

    /// Numbers of a row of queries, `[heads, nope + rope]`.
    fn query_width(&self) -> usize {
        self.spec.heads * (self.spec.qk_nope_head_dim + self.spec.qk_rope_head_dim)
    }

    /// All products with the layer's input: those of the cache, queries or their latents, and what gates the output.
    fn multiply_input(&self, step: Step<'_>, scratch: &mut MlaScratch) {
        let n = step.n();
        let MlaScratch { activations, latent, query, kv, gate, .. } = scratch;
        let of_query = match &self.query {
            Query::Full(q) => (q, sized(query, n * self.query_width())),
            Query::LowRank { a, .. } => (a, &mut sized(latent, 2 * n * a.rows())[..n * a.rows()]),
        };
        let of_cache = (&self.kv_a, sized(kv, n * latent_width(&self.spec)));
        let gates = self.head_gate.as_ref().map(|matrix| (matrix, sized(gate, n * matrix.rows())));
        step.multiply_each(activations, [of_cache, of_query].into_iter().chain(gates));
    }

    fn extend_caches(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, scratch: &mut MlaScratch) {
        let MlaScratch { norm, entry, kv, angles, .. } = scratch;
        let width = latent_width(&self.spec);
        let rank = self.spec.kv_lora_rank;
        step.read(&self.kv_a_norm, norm);
        let latent = sized(entry, width);
        for span in step.rows.spans() {
            let mut cache = caches.of_mut(span.span).latent_mut();
            for (t, row) in span.rows().enumerate() {
                let kv = &kv[row * width..][..width];
                rms_norm(&kv[..rank], norm, self.spec.latent_norm_eps, &mut latent[..rank]);
                latent[rank..].copy_from_slice(&kv[rank..]);
                self.rotate(&mut latent[rank..], angles, row);
                cache.set(span.start + t, latent);
            }
        }
    }

    /// Rotates the positional part of a query or key of a row, if the layer knows positions.
    fn rotate(&self, part: &mut [f32], angles: &RopeAngles, row: usize) {
        if let Some(rope) = &self.rope {
            rope.rotate(part, angles, row);
        }
    }

    /// Leaves the unrotated queries in `scratch.query`, `[n, heads, nope + rope]`, if they are not there yet.
    fn project_query(&self, step: Step<'_>, scratch: &mut MlaScratch) {
        let MlaScratch { activations, norm, latent, query, .. } = scratch;
        let Query::LowRank { a, norm: weight, b } = &self.query else { return };
        let (n, rank) = (step.n(), a.rows());
        // Two halves: the product, and its normalised copy.
        let (raw, normed) = sized(latent, 2 * n * rank).split_at_mut(n * rank);
        step.read(weight, norm);
        for (raw, normed) in raw.chunks_exact(rank).zip(normed.chunks_exact_mut(rank)) {
            rms_norm(raw, norm, self.spec.latent_norm_eps, normed);
        }
        activations.set(normed, n, rank);
        step.multiply(b, activations, sized(query, n * self.query_width()));
    }

    /// Leaves the heads' outputs in `scratch.by_task`, as `scratch.tasks` say.
    fn attend(&self, step: Step<'_>, caches: &Caches<'_, '_>, scratch: &mut MlaScratch) {
        let MlaScratch { query, by_task, tasks, angles, index, .. } = scratch;
        let s = &self.spec;
        let shape = Heads { heads: s.heads, sharing: s.heads, width: s.v_head_dim };
        let queries = Queries { step, caches, query, angles, index };
        // What an observer adds up has to come in order.
        let in_order = step.compute.observer.is_some();
        let most = |rows| most_together(rows, index.chooses());
        tasks.plan_with(step, shape, in_order, most, |span| self.expanded_rows(queries, span));
        tasks.run(&step.compute.threads, sized(by_task, step.n() * s.heads * s.v_head_dim), &|task, out| {
            with_head_scratch(|scratch| {
                if task.expanded {
                    return self.attend_expanded(queries, task, &mut scratch.expansion, out);
                }
                let rows = rows_together(task.heads.len());
                for (i, out) in out.chunks_mut(rows * task.heads.len() * s.v_head_dim).enumerate() {
                    let first = task.rows.start + i * rows;
                    let rows = first..(first + rows).min(task.rows.end);
                    let part = Task { rows, heads: task.heads.clone(), expanded: false };
                    self.absorb(queries, &part, scratch);
                    if step.is_cancelled() || !self.attend_rows(queries, &part, scratch) {
                        return;
                    }
                    self.expand(step, &part, scratch, out);
                }
            });
        });
    }

    /// How many rows at the beginning of a span have the expanded form: those of a prompt, as long as they see all keys before them. Rows
    /// with keys of their own choice would each have to expand them.
    fn expanded_rows(&self, Queries { step, index, .. }: Queries<'_, '_>, span: &SpanRows) -> usize {
        if step.compute.prompt_attention == PromptAttention::Absorbed || span.phase != Phase::Prompt {
            return 0;
        }
        span.rows().take_while(|&row| self.chosen(index, row).is_none()).count()
    }

    /// `scratch.product` `[heads, rows, rank]`: the parts without positions of a task's queries, in terms of latents.
    fn absorb(&self, Queries { step, query, .. }: Queries<'_, '_>, task: &Task, scratch: &mut HeadScratch) {
        let (s, n) = (&self.spec, task.rows.len());
        let (nope, rank, head_width) = (s.qk_nope_head_dim, s.kv_lora_rank, s.qk_nope_head_dim + s.qk_rope_head_dim);
        let HeadScratch { serial, activations, reordered, input, product, .. } = scratch;
        let product = sized(product, task.heads.len() * n * rank);
        for (h, absorbed) in task.heads.clone().zip(product.chunks_exact_mut(n * rank)) {
            let input = sized(input, n * nope);
            for (row, input) in task.rows.clone().zip(input.chunks_exact_mut(nope)) {
                input.copy_from_slice(&query[(row * s.heads + h) * head_width..][..nope]);
            }
            activations.set(input, n, nope);
            step.compute.observe(&self.k_b, h as u32, activations);
            let activations = self.k_b.input(step.extent, activations, reordered);
            step.compute.kernels.matmul(serial, self.k_b.view_of_batch(step.extent, h), activations, absorbed);
        }
    }

    /// `scratch.input` `[heads, rows, rank]`: the latents that a task's heads see. False once nobody wants them.
    fn attend_rows(&self, queries: Queries<'_, '_>, task: &Task, scratch: &mut HeadScratch) -> bool {
        let Queries { step, index, .. } = queries;
        let (rank, first, n) = (self.spec.kv_lora_rank, task.rows.start, task.rows.len());
        sized(&mut scratch.input, task.heads.len() * n * rank);
        let most = (QUERIES_TOGETHER / task.heads.len()).max(1);
        for (span, rows) in step.rows.parts(task.rows.clone()) {
            let mut row = rows.start;
            while row < rows.end {
                // A row with keys of its own choice is alone with its heads; others meet theirs together.
                let chosen = self.chosen(index, row);
                let alike = (row + 1..rows.end.min(row + most)).find(|&row| self.chosen(index, row).is_some());
                let end = if chosen.is_some() { row + 1 } else { alike.unwrap_or(rows.end.min(row + most)) };
                self.begin_tile(queries, task, row..end, scratch);
                let cache = queries.caches.of(span).latent();
                let HeadScratch { tile, chosen: buffer, .. } = scratch;
                let done = match chosen {
                    Some(chosen) => tasks::meet_chosen(step, tile, buffer, chosen, |at| cache.rows(at..at + 1)),
                    None => tasks::meet(step, tile, |positions| {
                        let rows = cache.rows(positions);
                        (rows, rows)
                    }),
                };
                if !done {
                    return false;
                }
                tile.finish();
                for (i, result) in scratch.tile.results().chunks_exact(rank).enumerate() {
                    let (row, head) = (row + i / task.heads.len(), i % task.heads.len());
                    scratch.input[(head * n + row - first) * rank..][..rank].copy_from_slice(result);
                }
                row = end;
            }
        }
        true
    }

    /// Positions that a row attends to, if its layer chooses.
    fn chosen<'a>(&self, index: &'a IndexScratch, row: usize) -> Option<&'a [u32]> {
        self.spec.indexer.as_ref().and_then(|_| index.chosen(row))
    }

    /// Puts the absorbed and rotated queries of some rows of a task into the tile.
    fn begin_tile(&self, queries: Queries<'_, '_>, task: &Task, rows: Range<usize>, scratch: &mut HeadScratch) {
        let (s, Queries { step, query, angles, index, .. }) = (&self.spec, queries);
        let (nope, rank, head_width) = (s.qk_nope_head_dim, s.kv_lora_rank, s.qk_nope_head_dim + s.qk_rope_head_dim);
        let HeadScratch { product, tile, .. } = scratch;
        tile.begin(latent_width(s), rank, s.softmax_scale);
        for row in rows {
            let seen = self.chosen(index, row).map_or(step.rows.get(row).position + 1, <[u32]>::len);
            for (i, head) in task.heads.clone().enumerate() {
                let full = tile.add(0..seen, None);
                full[..rank].copy_from_slice(&product[(i * task.rows.len() + row - task.rows.start) * rank..][..rank]);
                full[rank..].copy_from_slice(&query[(row * s.heads + head) * head_width..][nope..head_width]);
                self.rotate(&mut full[rank..], angles, row);
            }
        }
    }

    /// `out` `[rows, heads, v_head_dim]`: the values that a task's latents stand for.
    fn expand(&self, step: Step<'_>, task: &Task, scratch: &mut HeadScratch, out: &mut [f32]) {
        let (n, rank, width) = (task.rows.len(), self.spec.kv_lora_rank, self.spec.v_head_dim);
        let HeadScratch { serial, activations, reordered, input, output, .. } = scratch;
        let output = sized(output, n * width);
        for (i, (h, latents)) in task.heads.clone().zip(input.chunks_exact(n * rank)).enumerate() {
            activations.set(latents, n, rank);
            step.compute.observe(&self.v_b, h as u32, activations);
            let activations = self.v_b.input(step.extent, activations, reordered);
            step.compute.kernels.matmul(serial, self.v_b.view_of_batch(step.extent, h), activations, output);
            for (out, output) in out.chunks_exact_mut(task.heads.len() * width).zip(output.chunks_exact(width)) {
                out[i * width..][..width].copy_from_slice(output);
            }
        }
    }
}

/// Rows and heads of a task, where spans have so many rows. All heads share the latents, and all rows a head's weights: long spans
/// have enough rows that few heads do, and so few weights are met at once. Keys that a row has chosen only its heads share.
fn most_together(rows: usize, chosen: bool) -> Most {
    let heads = if chosen { HEADS_TOGETHER } else { (QUERIES_TOGETHER / rows.max(1)).clamp(1, HEADS_TOGETHER) };
    Most { rows: rows_together(heads), heads }
}

/// Most rows that are absorbed together for so many heads.
fn rows_together(heads: usize) -> usize {
    (ABSORBED_TOGETHER / heads).clamp(1, ROWS_TOGETHER)
}

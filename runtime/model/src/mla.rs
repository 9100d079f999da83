//! Multi-head latent attention in the absorbed form (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//!
//! The cache holds one latent `c` and one rotated key `k_pe` per token, shared by all heads. With `k_b` and `v_b` the two
//! halves of the up-projection of a head: `score = (k_b · q_nope) · c + q_pe · k_pe`, `out = v_b · Σ softmax(score) c`.

use std::ops::Range;

use sluice_format::MlaSpec;
use sluice_kernels::{Activations, rms_norm};

use super::ModelError;
use super::cache::latent_width;
use super::compute::{Compute, HeadScratch, Step, sized, with_head_scratch};
use super::indexer::{self, IndexScratch, Indexer};
use super::rope::{Rope, RopeAngles};
use super::rows::Caches;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Queries (heads times rows) that still fit the second-level cache together with their latents.
const MOST_QUERIES_TOGETHER: usize = 16;

/// Weights of one layer's latent attention, as places in its extent.
#[derive(Debug)]
pub struct Mla {
    spec: MlaSpec,
    rope: Rope,
    query: Query,
    kv_a: MatrixRef,
    kv_a_norm: VectorRef,
    k_b: MatrixRef,
    v_b: MatrixRef,
    o: MatrixRef,
    indexer: Option<Indexer>,
}

/// What the heads of all rows have in common.
#[derive(Clone, Copy)]
struct HeadRows<'a> {
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
    spec.heads * head + 2 * spec.q_lora_rank.unwrap_or(0) + 4 * latent_width(spec) + index
}

/// Buffers that latent attention reuses from call to call.
#[derive(Debug)]
pub struct MlaScratch {
    activations: Activations,
    norm: Vec<f32>,
    latent: Vec<f32>,
    query: Vec<f32>,
    kv: Vec<f32>,
    /// `[heads, tokens, v_head_dim]`.
    by_head: Vec<f32>,
    /// `[tokens, heads, v_head_dim]`.
    by_token: Vec<f32>,
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
            by_head: Vec::new(),
            by_token: Vec::new(),
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
        let indexer = spec.indexer.as_ref().map(|i| Indexer::new(i, &spec.rope, tensors)).transpose()?;
        Ok(Mla {
            indexer: indexer.flatten(),
            spec: spec.clone(),
            rope: Rope::new(&spec.rope),
            query,
            kv_a: tensors.matrix("kv_a")?,
            kv_a_norm: tensors.vector("kv_a_norm")?,
            k_b: tensors.matrix("k_b")?,
            v_b: tensors.matrix("v_b")?,
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
        self.rope.angles(step.rows.positions(), &mut scratch.angles);
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

        let MlaScratch { by_head, by_token, activations, .. } = scratch;
        let (heads, width) = (self.spec.heads, self.spec.v_head_dim);
        let by_token = sized(by_token, n * heads * width);
        for h in 0..heads {
            for t in 0..n {
                by_token[(t * heads + h) * width..][..width].copy_from_slice(&by_head[(h * n + t) * width..][..width]);
            }
        }
        activations.set(by_token, n, heads * width);
        step.multiply(&self.o, activations, out);
    }

    fn extend_caches(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, scratch: &mut MlaScratch) {
        let MlaScratch { activations, norm, latent, kv, angles, .. } = scratch;
        let width = latent_width(&self.spec);
        let rank = self.spec.kv_lora_rank;
        let kv = sized(kv, step.n() * width);
        step.multiply(&self.kv_a, activations, kv);
        step.read(&self.kv_a_norm, norm);
        let latent = sized(latent, width);
        for span in step.rows.spans() {
            let mut cache = caches.of_mut(span.span).latent_mut();
            for (t, row) in span.rows().enumerate() {
                let kv = &kv[row * width..][..width];
                rms_norm(&kv[..rank], norm, self.spec.latent_norm_eps, &mut latent[..rank]);
                latent[rank..].copy_from_slice(&kv[rank..]);
                self.rope.rotate(&mut latent[rank..], angles, row);
                cache.set(span.start + t, latent);
            }
        }
    }

    /// Leaves the unrotated queries in `scratch.query`, `[n, heads, nope + rope]`.
    fn project_query(&self, step: Step<'_>, scratch: &mut MlaScratch) {
        let MlaScratch { activations, norm, latent, query, .. } = scratch;
        let n = step.n();
        let width = self.spec.heads * (self.spec.qk_nope_head_dim + self.spec.qk_rope_head_dim);
        let query = sized(query, n * width);
        match &self.query {
            Query::Full(q) => step.multiply(q, activations, query),
            Query::LowRank { a, norm: weight, b } => {
                let rank = a.rows();
                // Two halves: the product, and its normalised copy.
                let (raw, normed) = sized(latent, 2 * n * rank).split_at_mut(n * rank);
                step.multiply(a, activations, raw);
                step.read(weight, norm);
                for (raw, normed) in raw.chunks_exact(rank).zip(normed.chunks_exact_mut(rank)) {
                    rms_norm(raw, norm, self.spec.latent_norm_eps, normed);
                }
                activations.set(normed, n, rank);
                step.multiply(b, activations, query);
            }
        }
    }

    /// Leaves the heads' outputs in `scratch.by_head`, `[heads, n, v_head_dim]`. A task, for one head or some: absorb the
    /// queries, attend, expand the values.
    fn attend(&self, step: Step<'_>, caches: &Caches<'_, '_>, scratch: &mut MlaScratch) {
        let MlaScratch { query, by_head, angles, index, .. } = scratch;
        let (s, n) = (&self.spec, step.n());
        let head_width = s.qk_nope_head_dim + s.qk_rope_head_dim;
        let rows = HeadRows { query: &query[..n * s.heads * head_width], angles, index };
        // All heads share the latents, and all rows a head's weights: what a task holds of both should stay in the cache.
        let together = step.compute.heads_together(s.heads, s.heads, (MOST_QUERIES_TOGETHER / n).max(1));
        let by_head = sized(by_head, s.heads * n * s.v_head_dim);
        step.compute.threads.for_each_chunk(by_head, together * n * s.v_head_dim, &|task, out| {
            // A head of a long prompt takes tens of milliseconds before it attends.
            if step.is_cancelled() {
                return;
            }
            let heads = task * together..(task + 1) * together;
            with_head_scratch(|scratch| {
                self.absorb(step, heads.clone(), rows.query, scratch);
                self.attend_heads(step, caches, heads.clone(), rows, scratch);
                if step.is_cancelled() {
                    return;
                }
                self.expand(step, heads, scratch, out);
            });
        });
    }

    /// `scratch.product` `[heads, n, rank]`: the parts without positions of these heads' queries, in terms of latents.
    fn absorb(&self, step: Step<'_>, heads: Range<usize>, query: &[f32], scratch: &mut HeadScratch) {
        let (s, n) = (&self.spec, step.n());
        let (nope, rank, head_width) = (s.qk_nope_head_dim, s.kv_lora_rank, s.qk_nope_head_dim + s.qk_rope_head_dim);
        let HeadScratch { serial, activations, input, product, .. } = scratch;
        let product = sized(product, heads.len() * n * rank);
        for (h, absorbed) in heads.zip(product.chunks_exact_mut(n * rank)) {
            let input = sized(input, n * nope);
            for (t, input) in input.chunks_exact_mut(nope).enumerate() {
                input.copy_from_slice(&query[(t * s.heads + h) * head_width..][..nope]);
            }
            activations.set(input, n, nope);
            step.compute.observe(&self.k_b, h as u32, activations);
            step.compute.kernels.matmul(serial, self.k_b.view_of_batch(step.extent, h), activations, absorbed);
        }
    }

    /// `scratch.input` `[heads, n, rank]`: the latents that these heads see.
    fn attend_heads(
        &self,
        step: Step<'_>,
        caches: &Caches<'_, '_>,
        heads: Range<usize>,
        HeadRows { query, angles, index }: HeadRows<'_>,
        scratch: &mut HeadScratch,
    ) {
        let (s, n) = (&self.spec, step.n());
        let (nope, rank, width) = (s.qk_nope_head_dim, s.kv_lora_rank, latent_width(s));
        let head_width = nope + s.qk_rope_head_dim;
        let HeadScratch { input, product, query: full, output, scores, .. } = scratch;
        let latents = sized(input, heads.len() * n * rank);
        let full = sized(full, heads.len() * width);
        let output = sized(output, heads.len() * rank);
        for t in 0..n {
            if step.is_cancelled() {
                return;
            }
            let row = step.rows.get(t);
            for (i, full) in full.chunks_exact_mut(width).enumerate() {
                full[..rank].copy_from_slice(&product[(i * n + t) * rank..][..rank]);
                full[rank..].copy_from_slice(&query[(t * s.heads + heads.start + i) * head_width..][nope..head_width]);
                self.rope.rotate(&mut full[rank..], angles, t);
            }
            let seen = row.position + 1;
            let mut of_rows = Vec::new();
            super::cache::in_blocks(0..seen, |positions| {
                let n = positions.len();
                super::cache::append(caches.of(row.span).latent().rows(positions), n, width, &mut of_rows);
            });
            let rows = sluice_kernels::KvRows::plain(&of_rows, width);
            let (rows, seen) = match s.indexer.as_ref().and_then(|_| index.chosen(t)) {
                Some(chosen) => (rows.only(chosen), chosen.len()),
                None => (rows, seen),
            };
            let scores = sized(scores, heads.len() * seen);
            let (kernels, together, scale) = (&step.compute.kernels, heads.len(), s.softmax_scale);
            kernels.attend_together(full, together, rows, rows, seen, scale, &[], scores, output);
            for (i, output) in output.chunks_exact(rank).enumerate() {
                latents[(i * n + t) * rank..][..rank].copy_from_slice(output);
            }
        }
    }

    /// `out` `[heads, n, v_head_dim]`: the values that these heads' latents stand for.
    fn expand(&self, step: Step<'_>, heads: Range<usize>, scratch: &mut HeadScratch, out: &mut [f32]) {
        let (n, rank) = (step.n(), self.spec.kv_lora_rank);
        let HeadScratch { serial, activations, input, .. } = scratch;
        let out = out.chunks_exact_mut(n * self.spec.v_head_dim);
        for ((h, latents), out) in heads.zip(input.chunks_exact(n * rank)).zip(out) {
            activations.set(latents, n, rank);
            step.compute.observe(&self.v_b, h as u32, activations);
            step.compute.kernels.matmul(serial, self.v_b.view_of_batch(step.extent, h), activations, out);
        }
    }
}

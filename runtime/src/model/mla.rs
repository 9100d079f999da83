//! Multi-head latent attention in the absorbed form (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//!
//! The cache holds one latent `c` and one rotated key `k_pe` per token, shared by all heads. With `k_b` and `v_b` the two
//! halves of the up-projection of a head: `score = (k_b · q_nope) · c + q_pe · k_pe`, `out = v_b · Σ softmax(score) c`.

use std::ops::Range;

use sluice_format::MlaSpec;
use sluice_kernels::{Activations, KvBuffer, KvType, rms_norm};

use super::ModelError;
use super::compute::{Compute, HeadScratch, sized, with_head_scratch};
use super::indexer::{self, IndexCache, IndexScratch, Indexer};
use super::rope::{Rope, RopeAngles};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Heads whose queries and latents still fit the second-level cache together.
const MOST_HEADS_TOGETHER: usize = 16;

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

#[derive(Debug)]
enum Query {
    Full(MatrixRef),
    LowRank { a: MatrixRef, norm: VectorRef, b: MatrixRef },
}

/// Keys and values of one layer and one session: `[max_tokens, kv_lora_rank + qk_rope_head_dim]`.
#[derive(Clone, Debug)]
pub struct LatentCache {
    rows: KvBuffer,
    /// Keys of the indexer, in layers that have one.
    index: Option<IndexCache>,
}

impl LatentCache {
    /// An empty cache for `max_tokens` positions.
    pub fn new(spec: &MlaSpec, max_tokens: usize, ty: KvType) -> Self {
        let index = spec.indexer.as_ref().map(|i| IndexCache::new(i, max_tokens));
        LatentCache { rows: KvBuffer::new(ty, max_tokens, latent_width(spec)), index }
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        self.rows.bytes() + self.index.as_ref().map_or(0, IndexCache::bytes)
    }
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &MlaSpec) -> usize {
    let head = spec.qk_nope_head_dim + spec.qk_rope_head_dim + 2 * spec.v_head_dim;
    let index = spec.indexer.as_ref().map_or(0, indexer::scratch_width);
    spec.heads * head + 2 * spec.q_lora_rank.unwrap_or(0) + 4 * latent_width(spec) + index
}

/// Bytes that the cache holds per token. Index keys are f32 whatever `ty` is: they decide what is attended to.
pub fn cache_bytes(spec: &MlaSpec, ty: KvType) -> usize {
    KvBuffer::row_bytes(ty, latent_width(spec)) + 4 * spec.indexer.as_ref().map_or(0, indexer::cache_width)
}

/// Width of a latent with its rotated key.
fn latent_width(spec: &MlaSpec) -> usize {
    spec.kv_lora_rank + spec.qk_rope_head_dim
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

    /// Attention of `n` tokens at positions `start..start + n`: reads `x` `[n, hidden]` (normalised), extends `cache`,
    /// writes `out` `[n, hidden]`. `extent`: the bytes of the layer's attention extent.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, state, scratch and output of one step; a struct would only rename them"
    )]
    pub fn forward(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &mut LatentCache,
        start: usize,
        n: usize,
        x: &[f32],
        scratch: &mut MlaScratch,
        out: &mut [f32],
    ) {
        let hidden = x.len() / n;
        scratch.activations.set(x, n, hidden);
        self.rope.angles(start, n, &mut scratch.angles);
        self.extend_cache(compute, extent, cache, start, n, scratch);
        if let (Some(indexer), Some(keys)) = (&self.indexer, &mut cache.index) {
            indexer.extend(compute, extent, keys, start, n, &scratch.activations, &mut scratch.index);
        }
        self.project_query(compute, extent, n, scratch);
        if let (Some(indexer), Some(keys)) = (&self.indexer, &cache.index) {
            // The query's latent is what was last multiplied.
            indexer.choose(compute, extent, keys, start, n, &scratch.activations, &mut scratch.index);
        }
        self.attend(compute, extent, cache, start, n, scratch);

        let MlaScratch { by_head, by_token, activations, .. } = scratch;
        let (heads, width) = (self.spec.heads, self.spec.v_head_dim);
        let by_token = sized(by_token, n * heads * width);
        for h in 0..heads {
            for t in 0..n {
                by_token[(t * heads + h) * width..][..width].copy_from_slice(&by_head[(h * n + t) * width..][..width]);
            }
        }
        activations.set(by_token, n, heads * width);
        compute.multiply(&self.o, extent, activations, out);
    }

    fn extend_cache(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &mut LatentCache,
        start: usize,
        n: usize,
        scratch: &mut MlaScratch,
    ) {
        let MlaScratch { activations, norm, latent, kv, angles, .. } = scratch;
        let width = latent_width(&self.spec);
        let rank = self.spec.kv_lora_rank;
        let kv = sized(kv, n * width);
        compute.multiply(&self.kv_a, extent, activations, kv);
        self.kv_a_norm.read(extent, norm);
        let row = sized(latent, width);
        for (t, kv) in kv.chunks_exact(width).enumerate() {
            rms_norm(&kv[..rank], norm, self.spec.latent_norm_eps, &mut row[..rank]);
            row[rank..].copy_from_slice(&kv[rank..]);
            self.rope.rotate(&mut row[rank..], angles, t);
            cache.rows.set(start + t, row);
        }
    }

    /// Leaves the unrotated queries in `scratch.query`, `[n, heads, nope + rope]`.
    fn project_query(&self, compute: &Compute, extent: &[u8], n: usize, scratch: &mut MlaScratch) {
        let MlaScratch { activations, norm, latent, query, .. } = scratch;
        let width = self.spec.heads * (self.spec.qk_nope_head_dim + self.spec.qk_rope_head_dim);
        let query = sized(query, n * width);
        match &self.query {
            Query::Full(q) => compute.multiply(q, extent, activations, query),
            Query::LowRank { a, norm: weight, b } => {
                let rank = a.rows();
                // Two halves: the product, and its normalised copy.
                let (raw, normed) = sized(latent, 2 * n * rank).split_at_mut(n * rank);
                compute.multiply(a, extent, activations, raw);
                weight.read(extent, norm);
                for (raw, normed) in raw.chunks_exact(rank).zip(normed.chunks_exact_mut(rank)) {
                    rms_norm(raw, norm, self.spec.latent_norm_eps, normed);
                }
                activations.set(normed, n, rank);
                compute.multiply(b, extent, activations, query);
            }
        }
    }

    /// Leaves the heads' outputs in `scratch.by_head`. A task, for one head or some: absorb the queries, attend, expand the
    /// values.
    fn attend(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &LatentCache,
        start: usize,
        n: usize,
        scratch: &mut MlaScratch,
    ) {
        let MlaScratch { query, by_head, angles, index, .. } = scratch;
        let s = &self.spec;
        let head_width = s.qk_nope_head_dim + s.qk_rope_head_dim;
        let query = &query[..n * s.heads * head_width];
        let (angles, index) = (&*angles, &*index);
        // All heads share the latents. Of several tokens, each head's are taken together instead, which reads the head's
        // weights once.
        let together = compute.heads_together(s.heads, s.heads, if n == 1 { MOST_HEADS_TOGETHER } else { 1 });
        let by_head = sized(by_head, s.heads * n * s.v_head_dim);
        compute.threads.for_each_chunk(by_head, together * n * s.v_head_dim, &|task, out| {
            let heads = task * together..(task + 1) * together;
            with_head_scratch(|scratch| {
                self.absorb(compute, extent, heads.clone(), n, query, scratch);
                self.attend_heads(compute, cache, heads.clone(), start, n, (query, angles, index), scratch);
                self.expand(compute, extent, heads, n, scratch, out);
            });
        });
    }

    /// `scratch.product` `[heads, n, rank]`: the parts without positions of these heads' queries, in terms of latents.
    fn absorb(
        &self,
        compute: &Compute,
        extent: &[u8],
        heads: Range<usize>,
        n: usize,
        query: &[f32],
        scratch: &mut HeadScratch,
    ) {
        let s = &self.spec;
        let (nope, rank, head_width) = (s.qk_nope_head_dim, s.kv_lora_rank, s.qk_nope_head_dim + s.qk_rope_head_dim);
        let HeadScratch { serial, activations, input, product, .. } = scratch;
        let product = sized(product, heads.len() * n * rank);
        for (h, absorbed) in heads.zip(product.chunks_exact_mut(n * rank)) {
            let input = sized(input, n * nope);
            for (t, input) in input.chunks_exact_mut(nope).enumerate() {
                input.copy_from_slice(&query[(t * s.heads + h) * head_width..][..nope]);
            }
            activations.set(input, n, nope);
            compute.observe(&self.k_b, h as u32, activations);
            compute.kernels.matmul(serial, self.k_b.view_of_batch(extent, h), activations, absorbed);
        }
    }

    /// `scratch.input` `[n, heads, rank]`: the latents that these heads see.
    #[expect(clippy::too_many_arguments, reason = "what, where to and for which heads and tokens")]
    fn attend_heads(
        &self,
        compute: &Compute,
        cache: &LatentCache,
        heads: Range<usize>,
        start: usize,
        n: usize,
        (query, angles, index): (&[f32], &RopeAngles, &IndexScratch),
        scratch: &mut HeadScratch,
    ) {
        let s = &self.spec;
        let (nope, rank, width) = (s.qk_nope_head_dim, s.kv_lora_rank, latent_width(s));
        let head_width = nope + s.qk_rope_head_dim;
        let HeadScratch { input, product, query: full, scores, .. } = scratch;
        let latents = sized(input, n * heads.len() * rank);
        for (t, latents) in latents.chunks_exact_mut(heads.len() * rank).enumerate() {
            let full = sized(full, heads.len() * width);
            for (i, full) in full.chunks_exact_mut(width).enumerate() {
                full[..rank].copy_from_slice(&product[(i * n + t) * rank..][..rank]);
                full[rank..].copy_from_slice(&query[(t * s.heads + heads.start + i) * head_width..][nope..head_width]);
                self.rope.rotate(&mut full[rank..], angles, t);
            }
            let seen = start + t + 1;
            let rows = cache.rows.rows(0..seen);
            let (rows, seen) = match s.indexer.as_ref().and_then(|_| index.chosen(t)) {
                Some(chosen) => (rows.only(chosen), chosen.len()),
                None => (rows, seen),
            };
            let scores = sized(scores, heads.len() * seen);
            let n = heads.len();
            compute.kernels.attend_together(full, n, rows, rows, seen, s.softmax_scale, &[], scores, latents);
        }
    }

    /// `out` `[heads, n, v_head_dim]`: the values that these heads' latents stand for.
    fn expand(
        &self,
        compute: &Compute,
        extent: &[u8],
        heads: Range<usize>,
        n: usize,
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        // A head's tokens lie together: there is one of them, or one head.
        debug_assert!(n == 1 || heads.len() == 1, "{n} tokens of {} heads", heads.len());
        let rank = self.spec.kv_lora_rank;
        let HeadScratch { serial, activations, input, .. } = scratch;
        let out = out.chunks_exact_mut(n * self.spec.v_head_dim);
        for ((h, latents), out) in heads.zip(input.chunks_exact(n * rank)).zip(out) {
            activations.set(latents, n, rank);
            compute.observe(&self.v_b, h as u32, activations);
            compute.kernels.matmul(serial, self.v_b.view_of_batch(extent, h), activations, out);
        }
    }
}

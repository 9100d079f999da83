//! The indexer of sparse attention (DeepSeek-V3.2): which earlier tokens each token attends to.
//!
//! Formula at [`IndexerSpec`]. While a token has no more predecessors than it may attend to, it attends to all, and nothing
//! but the index keys is computed.

use sluice_format::{IndexerSpec, RopeSpec};
use sluice_kernels::{Activations, top_k};

use super::ModelError;
use super::compute::{Compute, sized, with_head_scratch};
use super::rope::{Rope, RopeAngles};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Weights of one layer's indexer, as places in its extent.
#[derive(Debug)]
pub struct Indexer {
    spec: IndexerSpec,
    rope: Rope,
    rotated: usize,
    q: MatrixRef,
    k: MatrixRef,
    k_norm: VectorRef,
    k_norm_bias: VectorRef,
    weights: MatrixRef,
}

/// Index keys of one layer and one session, `[max_tokens, index_head_dim]`.
#[derive(Clone, Debug)]
pub struct IndexCache {
    keys: Vec<f32>,
}

impl IndexCache {
    /// An empty cache for `max_tokens` positions.
    pub fn new(spec: &IndexerSpec, max_tokens: usize) -> Self {
        IndexCache { keys: vec![0.0; cache_width(spec) * max_tokens] }
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        4 * self.keys.len()
    }
}

/// f32 values that the cache holds per token.
pub fn cache_width(spec: &IndexerSpec) -> usize {
    if spec.shared { 0 } else { spec.index_head_dim }
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &IndexerSpec) -> usize {
    spec.index_heads * (spec.index_head_dim + 1) + spec.index_head_dim + spec.index_top_k
}

/// What the tokens of the current chunk attend to, and buffers. A shared layer reads what the last other one chose.
#[derive(Debug, Default)]
pub struct IndexScratch {
    query: Vec<f32>,
    key: Vec<f32>,
    weights: Vec<f32>,
    norm: Vec<f32>,
    bias: Vec<f32>,
    angles: RopeAngles,
    /// Per token, ascending; none where it attends to all.
    chosen: Vec<Vec<u32>>,
}

impl IndexScratch {
    /// Positions that token `t` of the chunk attends to, ascending; `None`: all.
    pub fn chosen(&self, t: usize) -> Option<&[u32]> {
        self.chosen.get(t).filter(|c| !c.is_empty()).map(Vec::as_slice)
    }

    /// Every token attends to all.
    pub fn choose_all(&mut self) {
        self.chosen.iter_mut().for_each(Vec::clear);
    }
}

impl Indexer {
    /// The indexer of a layer that has one of its own.
    pub(super) fn new(
        spec: &IndexerSpec,
        rope: &RopeSpec,
        tensors: &ExtentTensors<'_>,
    ) -> Result<Option<Self>, ModelError> {
        if spec.shared {
            return Ok(None);
        }
        Ok(Some(Indexer {
            rope: Rope::new(&RopeSpec { pairing: spec.pairing, ..rope.clone() }),
            rotated: rope.dim,
            q: tensors.matrix("index_q")?,
            k: tensors.matrix("index_k")?,
            k_norm: tensors.vector("index_k_norm")?,
            k_norm_bias: tensors.vector("index_k_norm_bias")?,
            weights: tensors.matrix("index_weights")?,
            spec: spec.clone(),
        }))
    }

    /// Extends `cache` by the index keys of `n` tokens from `start` on. `x`: their normalised inputs.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, state and scratch of one step; a struct would only rename them"
    )]
    pub fn extend(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &mut IndexCache,
        start: usize,
        n: usize,
        x: &Activations,
        scratch: &mut IndexScratch,
    ) {
        let width = self.spec.index_head_dim;
        let IndexScratch { key, weights, norm, bias, angles, .. } = scratch;
        let key = sized(key, n * width);
        compute.multiply(&self.k, extent, x, key);
        self.k_norm.read(extent, norm);
        self.k_norm_bias.read(extent, bias);
        self.rope.angles(start, n, angles);
        for (t, (key, row)) in
            key.chunks_exact(width).zip(cache.keys[start * width..].chunks_exact_mut(width)).enumerate()
        {
            layer_norm(key, norm, bias, self.spec.key_norm_eps, row);
            self.rope.rotate(&mut row[..self.rotated], angles, t);
        }
        // The weights follow from the same input, which is gone when the queries are known.
        let weights = sized(weights, n * self.spec.index_heads);
        compute.multiply(&self.weights, extent, x, weights);
    }

    /// Chooses for each of the `n` tokens; [`Indexer::extend`] has seen them. `latent`: their low-rank queries, normalised.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, state and scratch of one step; a struct would only rename them"
    )]
    pub fn choose(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &IndexCache,
        start: usize,
        n: usize,
        latent: &Activations,
        scratch: &mut IndexScratch,
    ) {
        let s = &self.spec;
        if scratch.chosen.len() < n {
            scratch.chosen.resize_with(n, Vec::new);
        }
        scratch.choose_all();
        if start + n <= s.index_top_k {
            return;
        }
        let IndexScratch { query, weights, angles, chosen, .. } = scratch;
        let (heads, width) = (s.index_heads, s.index_head_dim);
        let query = sized(query, n * heads * width);
        compute.multiply(&self.q, extent, latent, query);
        for (i, head) in query.chunks_exact_mut(width).enumerate() {
            self.rope.rotate(&mut head[..self.rotated], angles, i / heads);
        }
        let (query, weights) = (&*query, &*weights);
        let (q_scale, w_scale) = ((width as f32).powf(-0.5), (heads as f32).powf(-0.5));
        compute.threads.for_each_chunk(&mut chosen[..n], 1, &|t, chosen| {
            let seen = start + t + 1;
            if seen <= s.index_top_k {
                return;
            }
            with_head_scratch(|scratch| {
                let scores = sized(&mut scratch.scores, seen);
                for (score, key) in scores.iter_mut().zip(cache.keys.chunks_exact(width)) {
                    let of_head = |h: usize| {
                        let q = &query[(t * heads + h) * width..][..width];
                        let weight = weights[t * heads + h] * w_scale;
                        weight * (compute.kernels.dot(q, key) * q_scale).max(0.0)
                    };
                    *score = (0..heads).map(of_head).sum();
                }
                top_k(scores, s.index_top_k, &mut chosen[0]);
                chosen[0].sort_unstable();
            });
        });
    }
}

/// `(x - mean) / sqrt(variance + eps) · weight + bias`.
fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let factor = 1.0 / (variance + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * factor * w + b;
    }
}

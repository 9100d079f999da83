//! The indexer of sparse attention (DeepSeek-V3.2): which earlier tokens each token attends to.
//!
//! Formulas are at [`IndexerSpec`]. While a token has no more predecessors than it may attend to, it attends to all of them, and
//! only the index keys are computed.

use sluice_format::{IndexerSpec, RopeSpec};
use sluice_kernels::{Activations, KeyBlock, KvRows, key_blocks};

use super::ModelError;
use super::cache::IndexCache;
use super::compute::{HeadScratch, Step, sized, with_head_scratch};
use super::norm::layer_norm;
use super::rope::{Rope, RopeAngles};
use super::rows::{Caches, Row};
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

/// f32 values of scratch per token.
pub fn scratch_width(spec: &IndexerSpec) -> usize {
    spec.index_heads * (spec.index_head_dim + 1) + spec.index_head_dim + spec.index_top_k
}

/// What the rows of the current pass attend to, and buffers. A layer that shares a choice reads the last choice of another layer.
#[derive(Debug, Default)]
pub struct IndexScratch {
    query: Vec<f32>,
    key: Vec<f32>,
    weights: Vec<f32>,
    norm: Vec<f32>,
    bias: Vec<f32>,
    angles: RopeAngles,
    /// Positions for each row, ascending; empty if it attends to all.
    chosen: Vec<Vec<u32>>,
}

impl IndexScratch {
    /// Positions that row `t` of the pass attends to, ascending; `None`: all.
    pub fn chosen(&self, t: usize) -> Option<&[u32]> {
        self.chosen.get(t).filter(|c| !c.is_empty()).map(Vec::as_slice)
    }

    /// Whether any row attends only to chosen positions.
    pub fn chooses(&self) -> bool {
        self.chosen.iter().any(|chosen| !chosen.is_empty())
    }

    /// Lets every row attend to all positions.
    pub fn choose_all(&mut self) {
        self.chosen.iter_mut().for_each(Vec::clear);
    }
}

impl Indexer {
    /// The indexer of a layer that has its own.
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

    /// Adds the index keys of the rows to `caches`. `x`: their normalised inputs.
    pub fn extend(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, x: &Activations, scratch: &mut IndexScratch) {
        let (width, n) = (self.spec.index_head_dim, step.n());
        let IndexScratch { key, weights, norm, bias, angles, .. } = scratch;
        let key = sized(key, n * width);
        step.multiply(&self.k, x, key);
        step.read(&self.k_norm, norm);
        step.read(&self.k_norm_bias, bias);
        self.rope.angles(step.rows.positions(), angles);
        for span in step.rows.spans() {
            let mut cache = caches.of_mut(span.span).latent_mut();
            for (i, row) in span.rows().enumerate() {
                let place = cache.index_key_mut(span.start + i);
                layer_norm(&key[row * width..][..width], norm, bias, self.spec.key_norm_eps, place);
                self.rope.rotate(&mut place[..self.rotated], angles, row);
            }
        }
        // The weights are computed from the same input, which has been overwritten once the queries are known.
        let weights = sized(weights, n * self.spec.index_heads);
        step.multiply(&self.weights, x, weights);
    }

    /// Chooses for each row, after [`Indexer::extend`] has seen the rows. `latent`: their low-rank queries, normalised.
    pub fn choose(&self, step: Step<'_>, caches: &Caches<'_, '_>, latent: &Activations, scratch: &mut IndexScratch) {
        let (s, n) = (&self.spec, step.n());
        if scratch.chosen.len() < n {
            scratch.chosen.resize_with(n, Vec::new);
        }
        scratch.choose_all();
        if step.rows.positions().all(|position| position < s.index_top_k) {
            return;
        }
        let IndexScratch { query, weights, angles, chosen, .. } = scratch;
        let (heads, width) = (s.index_heads, s.index_head_dim);
        let query = sized(query, n * heads * width);
        step.multiply(&self.q, latent, query);
        for (i, head) in query.chunks_exact_mut(width).enumerate() {
            self.rope.rotate(&mut head[..self.rotated], angles, i / heads);
        }
        let chooser = Chooser { heads, width, top_k: s.index_top_k, query, weights };
        let keys = |row: Row| (row.position + 1, caches.of(row.span).latent().index());
        chooser.choose(step, keys, &mut chosen[..n]);
    }
}

/// The data by which keys are chosen: queries `[rows, heads, width]` and weights `[rows, heads]`.
pub struct Chooser<'a> {
    pub heads: usize,
    pub width: usize,
    /// Number of keys to choose.
    pub top_k: usize,
    pub query: &'a [f32],
    pub weights: &'a [f32],
}

impl Chooser<'_> {
    /// Writes the keys with the highest scores for every row, ascending, to its place in `chosen`. A row that sees no more keys
    /// than are to be chosen keeps the contents of its place. `keys`: how many keys a row sees, and where they are.
    pub fn choose<'c>(
        &self,
        step: Step<'_>,
        keys: impl Fn(Row) -> (usize, IndexCache<'c>) + Sync,
        chosen: &mut [Vec<u32>],
    ) {
        let Chooser { heads, width, top_k, query, weights } = *self;
        let (q_scale, w_scale) = ((width as f32).powf(-0.5), (heads as f32).powf(-0.5));
        step.compute.threads.for_each_piece(chosen, 1, &|t, chosen| {
            let (seen, index) = keys(step.rows.get(t));
            if seen <= top_k || step.is_cancelled() {
                return;
            }
            with_head_scratch(|scratch| {
                // Not all scores are kept: for as many tokens as a context may have, they would take memory that no plan counts.
                let HeadScratch { tile, scores, best, .. } = scratch;
                best.begin(top_k);
                tile.begin(width, 0, 1.0);
                for query in query[t * heads * width..][..heads * width].chunks_exact(width) {
                    tile.add(0..seen, None).copy_from_slice(query);
                }
                for positions in key_blocks(0..seen) {
                    if step.is_cancelled() {
                        return;
                    }
                    let keys = KvRows::plain(index.keys(positions.clone()), width);
                    let block = KeyBlock::new(positions.clone(), keys, keys);
                    let products = step.compute.kernels.score_block(tile, &block);
                    let scores = sized(scores, positions.len());
                    scores.fill(0.0);
                    for (weight, products) in weights[t * heads..][..heads].iter().zip(products) {
                        let weight = weight * w_scale;
                        scores.iter_mut().zip(products).for_each(|(s, p)| *s += weight * (p * q_scale).max(0.0));
                    }
                    positions.zip(scores).for_each(|(position, score)| best.offer(position as u32, *score));
                }
                best.finish(&mut chosen[0]);
            });
        });
    }
}

//! The model: executes a [`ModelSpec`] layer by layer over any number of tokens.
//!
//! A layer reads top-down like the paper: norm, attention, add, norm, feed-forward part, add. Nothing here knows a family.

mod attention;
pub mod compute;
mod delta;
mod embedding;
mod ffn;
mod foresight;
mod gated;
mod gqa;
mod indexer;
mod mla;
mod rope;
pub mod router;
mod tally;
pub mod weights;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sluice_format::{ExtentKind, ExtentRecord, FormatError, ModelFile, ModelSpec, NO_LAYER};
use sluice_kernels::{Activations, KvType, rms_norm};

use self::attention::{Attention, AttentionScratch, LayerCache};
use self::compute::{Compute, sized};
use self::embedding::Embedding;
use self::ffn::{Ffn, FfnExtents, FfnScratch};
use self::foresight::NextLayer;
use self::router::Choice;
use self::weights::{ExtentTensors, MatrixRef, VectorRef};
use crate::pool::{DenseHandle, DenseParts, Pool, PoolError};

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is damaged or cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// An extent could not be read into memory, or is damaged.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A tensor that the spec implies is not there.
    #[error(
        "{path}: {extent} has no tensor `{tensor}`. The file was written by an incompatible version: convert it again"
    )]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The extent's name.
        extent: String,
        /// The tensor's canonical name.
        tensor: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the model's vocabulary of {vocab}")]
    Token {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// More tokens than the session has room for.
    #[error("the session holds {capacity} tokens, {wanted} are needed. Raise --context or shorten the prompt")]
    ContextFull {
        /// Tokens that fit.
        capacity: usize,
        /// Tokens wanted.
        wanted: usize,
    },
    /// No tokens.
    #[error("there are no tokens to compute: give a prompt of at least one token")]
    NoTokens,
}

/// State of one generation: what the layers remember of the tokens so far.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    position: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` tokens, with keys and values of type `ty`.
    pub fn new(spec: &ModelSpec, capacity: usize, ty: KvType) -> Self {
        let layers = spec.layers.iter().map(|l| LayerCache::new(&l.attention, capacity, ty));
        KvCache { layers: layers.collect(), position: 0, capacity }
    }

    /// Bytes of a cache for `capacity` tokens.
    pub fn memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        spec.layers.iter().map(|l| LayerCache::memory(&l.attention, capacity, ty)).fold(0, u64::saturating_add)
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.bytes() as u64).sum()
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.position = 0;
    }
}

/// Where the time of a forward pass went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerTimes {
    /// Attention with its projections, without waiting for weights.
    pub attention: Duration,
    /// Routed experts, without waiting for them.
    pub experts: Duration,
    /// Router, dense parts, sums, waiting for experts.
    pub feed_forward: Duration,
    /// Final norm and output head, without waiting for weights.
    pub head: Duration,
}

/// The layers of an opened model, as places in its extents.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    layers: Vec<Layer>,
    embedding: Embedding,
    final_norm: (DenseHandle, VectorRef),
    head: Vec<(DenseHandle, MatrixRef)>,
    scratch: Scratch,
    times: LayerTimes,
}

#[derive(Debug)]
struct Layer {
    attn_norm: VectorRef,
    attention: Attention,
    ffn_norm: VectorRef,
    ffn: Ffn,
    extents: LayerExtents,
}

#[derive(Debug)]
struct LayerExtents {
    attention: DenseHandle,
    router: DenseHandle,
    dense: Option<DenseHandle>,
}

#[derive(Debug)]
struct Scratch {
    /// Residual stream, `[tokens, hidden]`.
    x: Vec<f32>,
    normed: Vec<f32>,
    delta: Vec<f32>,
    norm: Vec<f32>,
    head_input: Activations,
    part: Vec<f32>,
    logits: Vec<f32>,
    attention: AttentionScratch,
    ffn: FfnScratch,
}

/// Where the weights are while the model runs.
pub struct Weights<'a> {
    /// The file, for rows of the embedding.
    pub file: &'a ModelFile,
    /// What every token needs.
    pub dense: &'a DenseParts,
    /// The routed experts.
    pub experts: &'a mut Pool,
}

/// Rows of logits computed at once: bounds the memory of a long prompt whose every logit is wanted.
const LOGIT_ROWS: usize = 16;

/// Sees the routing of every layer: layer, position of the first token, top-k, choices `[tokens, top_k]`.
pub type RoutingObserver = dyn FnMut(usize, usize, usize, &[Choice]);

/// Sees the residual stream `[tokens, hidden]`: before layer 0, and then behind every layer. Gets the number of layers that
/// have run, and the stream.
pub type HiddenObserver = dyn FnMut(usize, &[f32]);

/// Who watches the model compute.
#[derive(Default)]
pub struct Observers {
    /// Of the routing.
    pub routing: Vec<Box<RoutingObserver>>,
    /// Of the residual stream.
    pub hidden: Vec<Box<HiddenObserver>>,
}

/// The extents of a file that every token needs, in the order in which a token needs them. The position in this list is
/// the handle.
pub fn dense_extents(extents: &[ExtentRecord]) -> Vec<ExtentRecord> {
    // A layer's parts follow each other; NO_LAYER sorts the final norm and the head behind all layers.
    let order = |kind| match kind {
        ExtentKind::Attention => Some(0),
        ExtentKind::Router => Some(1),
        ExtentKind::Dense => Some(2),
        ExtentKind::FinalNorm => Some(3),
        ExtentKind::Head => Some(4),
        ExtentKind::Embedding | ExtentKind::Expert => None,
    };
    let mut dense: Vec<_> = extents.iter().filter(|e| order(e.kind).is_some()).copied().collect();
    dense.sort_by_key(|e| (e.layer, order(e.kind), e.index));
    dense
}

impl Model {
    /// Resolves every tensor of `file`. `handles` belong to [`dense_extents`] in the same order. `prefetch`: whether experts
    /// are read ahead of the router while tokens are decoded.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn new(
        file: &ModelFile,
        handles: &[DenseHandle],
        compute: &Compute,
        prefetch: bool,
    ) -> Result<Self, ModelError> {
        let spec = file.spec().clone();
        let mut handles = handles.iter().copied();
        let mut next = || handles.next().expect("one handle per dense extent");
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, layer) in spec.layers.iter().enumerate() {
            let tensors = |kind| ExtentTensors { file, kind, layer: i as u32, index: 0 };
            let (attention, router) = (tensors(ExtentKind::Attention), tensors(ExtentKind::Router));
            layers.push(Layer {
                attn_norm: attention.vector("attn_norm")?,
                attention: Attention::new(&layer.attention, &attention)?,
                ffn_norm: router.vector("ffn_norm")?,
                ffn: Ffn::new(&layer.ffn, &router, &tensors(ExtentKind::Dense), &tensors(ExtentKind::Expert))?,
                extents: LayerExtents {
                    attention: next(),
                    router: next(),
                    dense: (layer.ffn.dense_width > 0).then(&mut next),
                },
            });
        }
        let tail = |kind, index| ExtentTensors { file, kind, layer: NO_LAYER, index };
        let final_norm = (next(), tail(ExtentKind::FinalNorm, 0).vector("norm")?);
        let parts = file.parts(ExtentKind::Head).count() as u32;
        let head = (0..parts)
            .map(|i| Ok((next(), tail(ExtentKind::Head, i).matrix("head")?)))
            .collect::<Result<_, ModelError>>()?;
        let scratch = Scratch {
            x: Vec::new(),
            normed: Vec::new(),
            delta: Vec::new(),
            norm: Vec::new(),
            head_input: Activations::new(compute.precision),
            part: Vec::new(),
            logits: Vec::new(),
            attention: AttentionScratch::new(compute),
            ffn: FfnScratch::new(compute, prefetch),
        };
        Ok(Model {
            embedding: Embedding::new(file),
            spec,
            layers,
            final_norm,
            head,
            scratch,
            times: LayerTimes::default(),
        })
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where the time went since the model was opened.
    pub fn times(&self) -> LayerTimes {
        self.times
    }

    /// Bytes of the embedding read from the file.
    pub fn embedding_bytes_read(&self) -> u64 {
        self.embedding.bytes_read()
    }

    /// Runs all layers over `tokens`, which follow those already in `cache`; then [`Model::logits`] can be asked for.
    /// On an error the cache is as before.
    ///
    /// # Errors
    /// [`ModelError`]: no tokens, no room, an unknown id, an unreadable or damaged extent.
    pub fn forward(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        cache: &mut KvCache,
        tokens: &[u32],
        observers: &mut Observers,
    ) -> Result<(), ModelError> {
        let (n, start, hidden) = (tokens.len(), cache.position, self.spec.hidden_size);
        if n == 0 {
            return Err(ModelError::NoTokens);
        }
        if start + n > cache.capacity {
            return Err(ModelError::ContextFull { capacity: cache.capacity, wanted: start + n });
        }
        self.embedding.rows(weights.file, tokens, sized(&mut self.scratch.x, n * hidden))?;
        let hidden_of = |scratch: &Scratch, layers: usize, observers: &mut Observers| {
            observers.hidden.iter_mut().for_each(|sink| sink(layers, &scratch.x[..n * hidden]));
        };
        hidden_of(&self.scratch, 0, observers);
        for i in 0..self.layers.len() {
            self.layer(compute, weights, &mut cache.layers[i], i, start, n)?;
            if let Some(moe) = &self.spec.layers[i].ffn.moe {
                let choices = self.scratch.ffn.choices();
                observers.routing.iter_mut().for_each(|sink| sink(i, start, moe.top_k, choices));
            }
            hidden_of(&self.scratch, i + 1, observers);
        }
        cache.position += n;
        Ok(())
    }

    fn layer(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        cache: &mut LayerCache,
        index: usize,
        start: usize,
        n: usize,
    ) -> Result<(), ModelError> {
        let eps = self.spec.norm_eps;
        let len = n * self.spec.hidden_size;
        let Scratch { x, normed, delta, norm, attention: mixer, ffn, .. } = &mut self.scratch;
        let (x, normed, delta) = (&mut x[..len], sized(normed, len), sized(delta, len));
        let layer = &self.layers[index];

        let dense_parts = weights.dense;
        let (started, waited) = (Instant::now(), dense_parts.stats().wait);
        let attention = dense_parts.dense(layer.extents.attention)?;
        layer.attn_norm.read(attention.bytes(), norm);
        norm_rows(x, norm, eps, normed);
        layer.attention.forward(compute, attention.bytes(), cache, start, n, normed, mixer, delta);
        drop(attention);
        add(x, delta);
        let attended = Instant::now();
        self.times.attention += (attended - started).saturating_sub(dense_parts.stats().wait - waited);

        let router = dense_parts.dense(layer.extents.router)?;
        let dense = layer.extents.dense.map(|handle| dense_parts.dense(handle)).transpose()?;
        let extents = FfnExtents { router: router.bytes(), dense: dense.as_ref().map(|d| d.bytes()) };
        layer.ffn_norm.read(router.bytes(), norm);
        norm_rows(x, norm, eps, normed);
        // A guess is about one token, and needs the next layer's router in memory.
        let ahead = index + 1;
        let next = self.layers.get(ahead).filter(|l| {
            n == 1 && ffn.looks_ahead() && l.ffn.routed().is_some() && dense_parts.is_pinned(l.extents.router)
        });
        let next_router = next.map(|l| dense_parts.dense(l.extents.router)).transpose()?;
        let lookahead = next.zip(next_router.as_ref()).and_then(|(l, router)| {
            let (norm, extent) = (l.ffn_norm, router.bytes());
            Some((&*x, NextLayer { layer: ahead, routed: l.ffn.routed()?, norm, eps, extent }))
        });
        let pool = &mut *weights.experts;
        let experts = layer.ffn.forward(compute, extents, pool, index, n, normed, lookahead, ffn, delta)?;
        add(x, delta);
        self.times.experts += experts;
        self.times.feed_forward += attended.elapsed().saturating_sub(experts);
        Ok(())
    }

    /// Logits of tokens `range` of the last [`Model::forward`]: calls `sink` with the token's index and its `[vocab]` row.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when a part of the head cannot be read.
    pub fn logits(
        &mut self,
        compute: &Compute,
        dense: &DenseParts,
        range: std::ops::Range<usize>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let (mut started, waited) = (Instant::now(), dense.stats().wait);
        let (hidden, vocab) = (self.spec.hidden_size, self.spec.vocab_size);
        let Scratch { x, normed, norm, head_input, part, logits, .. } = &mut self.scratch;
        self.final_norm.1.read(dense.dense(self.final_norm.0)?.bytes(), norm);
        let mut first = range.start;
        while first < range.end {
            let n = (range.end - first).min(LOGIT_ROWS);
            let normed = sized(normed, n * hidden);
            norm_rows(&x[first * hidden..(first + n) * hidden], norm, self.spec.norm_eps, normed);
            head_input.set(normed, n, hidden);
            let logits = sized(logits, n * vocab);
            let mut row = 0;
            for (handle, matrix) in &self.head {
                let extent = dense.dense(*handle)?;
                let part = sized(part, n * matrix.rows());
                // The parts of the head are one matrix, which its input meets once.
                if row == 0 {
                    compute.observe(matrix, 0, head_input);
                }
                compute.kernels.matmul(&compute.threads, matrix.view(extent.bytes()), head_input, part);
                for (part, logits) in part.chunks_exact(matrix.rows()).zip(logits.chunks_exact_mut(vocab)) {
                    logits[row..row + matrix.rows()].copy_from_slice(part);
                }
                row += matrix.rows();
            }
            self.times.head += started.elapsed();
            logits.chunks_exact(vocab).enumerate().for_each(|(i, row)| sink(first + i, row));
            first += n;
            started = Instant::now();
        }
        self.times.head = self.times.head.saturating_sub(dense.stats().wait - waited);
        Ok(())
    }

    /// Bytes of scratch for chunks of `tokens` tokens and experts of `expert_len` bytes, at most.
    pub fn scratch_memory(spec: &ModelSpec, tokens: usize, expert_len: u64) -> u64 {
        let hidden = spec.hidden_size as u64;
        let layer = |l: &sluice_format::LayerSpec| {
            let attention = attention::scratch_width(&l.attention) as u64;
            let moe = l.ffn.moe.as_ref();
            let widest = l.ffn.dense_width.max(moe.map_or(0, |m| m.width)) as u64;
            let routed = moe.map_or(0, |m| m.top_k as u64 * (hidden + 8) + m.experts as u64);
            attention + 2 * widest + routed
        };
        let widest = spec.layers.iter().map(layer).max().unwrap_or(0);
        let logits = (2 * LOGIT_ROWS.min(tokens) * spec.vocab_size * 4) as u64;
        (widest + 8 * hidden) * 4 * tokens as u64 + logits + ffn::tally_memory(expert_len)
    }

    /// Bytes that the cached parts of the embedding may take, in a file of these extents.
    pub fn embedding_memory(extents: &[ExtentRecord]) -> u64 {
        let parts = extents.iter().filter(|e| e.kind == ExtentKind::Embedding);
        let (count, longest) = parts.fold((0, 0), |(n, longest), e| (n + 1, e.stored_len.max(longest)));
        embedding::cache_memory(count, longest)
    }
}

fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    x.chunks_exact(width).zip(out.chunks_exact_mut(width)).for_each(|(x, out)| rms_norm(x, weight, eps, out));
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}

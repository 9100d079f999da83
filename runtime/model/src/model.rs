//! The model: executes a [`ModelSpec`] layer by layer over the rows of a pass.
//!
//! A layer reads top-down like the paper: norm, attention, add, norm, feed-forward part, add. Nothing here knows a family.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sluice_format::{ExtentKind, ExtentRecord, FormatError, ModelFile, ModelSpec, NO_LAYER};
use sluice_kernels::{Activations, tanh};

use crate::attention::{Attention, AttentionScratch};
use crate::cache::PagesFull;
use crate::compute::{Compute, Step, sized};
use crate::control::{Control, Progress};
use crate::embedding::Embedding;
use crate::ffn::{Ffn, FfnScratch, FfnStep};
use crate::norm::{Norm, NormScratch};
use crate::prefetch::NextLayer;
use crate::residual::{self, Residual, ResidualScratch};
use crate::rows::{Caches, Rows, Span};
use crate::weights::{ExtentTensors, MatrixRef, VectorRef};
use sluice_storage::pool::{DenseHandle, DenseParts, Pool, PoolError};

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
    /// More tokens than the sequence has room for.
    #[error("the sequence holds {capacity} tokens, {wanted} are needed. Raise --context or shorten the prompt")]
    ContextFull {
        /// Tokens that fit.
        capacity: usize,
        /// Tokens wanted.
        wanted: usize,
    },
    /// The table of a layer's router names something that is no expert, or an expert twice.
    #[error(
        "{path}: {extent}: tensor `token_experts` gives token {token} the expert {listed}, twice or not one of {experts}. The \
         checkpoint is damaged: convert another copy"
    )]
    TokenTable {
        /// The file.
        path: PathBuf,
        /// The extent's name.
        extent: String,
        /// The token.
        token: u32,
        /// What is named.
        listed: f32,
        /// Experts of the layer.
        experts: usize,
    },
    /// Fewer pages are free than the step needs. Nothing has been appended: it can be tried again when another sequence has given
    /// pages back.
    #[error(transparent)]
    PagesFull(#[from] PagesFull),
    /// A sequence of another engine, whose pages it has.
    #[error("the sequence was made by another engine: make it with this one, or save it there and restore it here")]
    ForeignSequence,
    /// The caller has ended the step.
    #[error("the step was cancelled")]
    Cancelled,
    /// No tokens.
    #[error("there are no tokens to compute: give a prompt of at least one token")]
    NoTokens,
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
    final_residual: Residual,
    final_norm: (DenseHandle, Norm),
    head_bias: Option<VectorRef>,
    head: Vec<(DenseHandle, MatrixRef)>,
    scratch: Scratch,
    times: LayerTimes,
}

#[derive(Debug)]
struct Layer {
    /// How attention and the feed-forward part see the residual.
    residuals: [Residual; 2],
    attn_norm: Norm,
    attention: Attention,
    attn_post_norm: Option<Norm>,
    attention_extent: DenseHandle,
    ffn: Option<LayerFfn>,
}

/// The feed-forward part of a layer that has one.
#[derive(Debug)]
struct LayerFfn {
    norm: Norm,
    ffn: Ffn,
    post_norm: Option<Norm>,
    /// Factor on what leaves the layer.
    scale: Option<VectorRef>,
    router: DenseHandle,
    dense: Option<DenseHandle>,
}

#[derive(Debug)]
struct Scratch {
    /// The residual, `[rows, streams, hidden]`.
    x: Vec<f32>,
    residual: ResidualScratch,
    normed: Vec<f32>,
    delta: Vec<f32>,
    norm: NormScratch,
    head_bias: Vec<f32>,
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

/// Tokens whose rows of the embedding are read between two looks at whether the step is to end.
const EMBEDDED_AT_ONCE: usize = 64;

/// Rows of logits computed at once: bounds the memory of a long prompt whose every logit is wanted.
const LOGIT_ROWS: usize = 16;

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
        ExtentKind::Embedding | ExtentKind::Expert | ExtentKind::Prediction | ExtentKind::Table => None,
    };
    let mut dense: Vec<_> = extents.iter().filter(|e| order(e.kind).is_some()).copied().collect();
    dense.sort_by_key(|e| (e.layer, order(e.kind), e.index));
    dense
}

impl Model {
    /// Resolves every tensor of `file`. `handles` belong to [`dense_extents`] in the same order. `prefetch`: whether experts
    /// are read ahead of the router while tokens are decoded. `most_kept`: bytes of experts' outputs that may wait to be summed.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn new(
        file: &ModelFile,
        handles: &[DenseHandle],
        compute: &Compute,
        prefetch: bool,
        most_kept: u64,
    ) -> Result<Self, ModelError> {
        let spec = file.spec().clone();
        let mut handles = handles.iter().copied();
        let mut next = || handles.next().expect("one handle per dense extent");
        let behind = |tensors: &ExtentTensors<'_>, name| {
            spec.norms.behind.then(|| Norm::rms(spec.norm_eps, tensors, name)).transpose()
        };
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, layer) in spec.layers.iter().enumerate() {
            let tensors = |kind| ExtentTensors { file, kind, layer: i as u32, index: 0 };
            let (attention, router) = (tensors(ExtentKind::Attention), tensors(ExtentKind::Router));
            let (dense, expert) = (tensors(ExtentKind::Dense), tensors(ExtentKind::Expert));
            layers.push(Layer {
                residuals: [Residual::new(&spec, &attention)?, Residual::new(&spec, &router)?],
                attn_norm: Norm::before(&spec, &attention, "attn_norm", "attn_norm_bias")?,
                attention: Attention::new(&layer.attention, &attention)?,
                attn_post_norm: behind(&attention, "attn_post_norm")?,
                attention_extent: next(),
                ffn: match layer.ffn.is_none() {
                    true => None,
                    false => Some(LayerFfn {
                        norm: Norm::before(&spec, &router, "ffn_norm", "ffn_norm_bias")?,
                        ffn: Ffn::new(&spec, &layer.ffn, &router, &dense, &expert)?,
                        post_norm: behind(&router, "ffn_post_norm")?,
                        scale: spec.layer_scale.then(|| router.vector("layer_scale")).transpose()?,
                        router: next(),
                        dense: (!spec.tensors(ExtentKind::Dense, i).is_empty()).then(&mut next),
                    }),
                },
            });
        }
        let tail = |kind, index| ExtentTensors { file, kind, layer: NO_LAYER, index };
        let last = tail(ExtentKind::FinalNorm, 0);
        let (final_residual, final_norm) =
            (Residual::new(&spec, &last)?, (next(), Norm::before(&spec, &last, "norm", "norm_bias")?));
        let head_bias = spec.head_bias.then(|| last.vector("head_bias")).transpose()?;
        let parts = file.parts(ExtentKind::Head).count() as u32;
        let head = (0..parts)
            .map(|i| Ok((next(), tail(ExtentKind::Head, i).matrix("head")?)))
            .collect::<Result<_, ModelError>>()?;
        let scratch = Scratch {
            x: Vec::new(),
            residual: ResidualScratch::new(),
            normed: Vec::new(),
            delta: Vec::new(),
            norm: NormScratch::default(),
            head_bias: Vec::new(),
            head_input: Activations::new(compute.precision),
            part: Vec::new(),
            logits: Vec::new(),
            attention: AttentionScratch::new(compute),
            ffn: FfnScratch::new(compute, prefetch, most_kept),
        };
        Ok(Model {
            embedding: Embedding::new(file),
            spec,
            layers,
            final_residual,
            final_norm,
            head_bias,
            head,
            scratch,
            times: LayerTimes::default(),
        })
    }

    /// Gives all buffers back; they grow again to what the next call needs.
    pub fn give_back(&mut self, compute: &Compute) {
        let Scratch { x, residual, normed, delta, norm, head_bias, head_input, part, logits, attention, ffn } =
            &mut self.scratch;
        *residual = ResidualScratch::new();
        *norm = NormScratch::default();
        for buffer in [x, normed, delta, head_bias, part, logits] {
            *buffer = Vec::new();
        }
        *head_input = Activations::new(compute.precision);
        *attention = AttentionScratch::new(compute);
        ffn.give_back(compute);
        compute.give_back();
        self.embedding.give_back();
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

    /// Runs all layers over `rows` of `spans`; then [`Model::logits`] can be asked for. The sequences do not count the rows yet: that
    /// is [`Rows::advance`].
    ///
    /// # Errors
    /// [`ModelError`]: an unknown id, an unreadable or damaged extent, or that `control` has cancelled it.
    ///
    /// # Panics
    /// If a sequence is another model's, or has no room for its rows, or `control` has fewer states than the step has rows.
    pub fn forward(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        rows: &Rows,
        spans: &mut [Span<'_>],
        control: &mut Control<'_>,
    ) -> Result<(), ModelError> {
        self.begin(weights, rows, spans, control)?;
        self.watch(0, rows, control);
        for layer in 0..self.layers.len() {
            self.layer(compute, weights, rows, Caches::new(spans, layer), layer)?;
            control.check()?;
            self.watch(layer + 1, rows, control);
        }
        Ok(())
    }

    /// Fills the residual with what the first layer is to see: all streams begin with the embedding.
    fn begin(
        &mut self,
        weights: &Weights<'_>,
        rows: &Rows,
        spans: &[Span<'_>],
        control: &Control<'_>,
    ) -> Result<(), ModelError> {
        let (hidden, width) = (self.spec.hidden_size, self.spec.residual_width());
        let len = rows.len() * width;
        let x = sized(&mut self.scratch.x, len);
        if let Some(states) = control.states {
            x.copy_from_slice(&states[rows.before() * width..][..len]);
            return Ok(());
        }
        for part in rows.spans() {
            let tokens = spans[part.span].tokens[part.token..][..part.count].chunks(EMBEDDED_AT_ONCE);
            let x = x[part.first * hidden..].chunks_mut(EMBEDDED_AT_ONCE * hidden);
            for (tokens, x) in tokens.zip(x) {
                control.check()?;
                self.embedding.rows(weights.file, tokens, &mut x[..tokens.len() * hidden])?;
            }
        }
        scale(&mut x[..rows.len() * hidden], self.spec.factors.embedding);
        if width > hidden {
            // From the last row on, since each row goes where later ones were.
            for row in (0..rows.len()).rev() {
                x.copy_within(row * hidden..(row + 1) * hidden, row * width);
                let streams = width / hidden;
                (1..streams).for_each(|s| x.copy_within(row * width..row * width + hidden, row * width + s * hidden));
            }
        }
        Ok(())
    }

    /// Shows the observers what is there after so many layers.
    fn watch(&self, layers: usize, rows: &Rows, control: &mut Control<'_>) {
        let layer = layers.checked_sub(1);
        let moe = layer.and_then(|layer| self.spec.layers[layer].ffn.moe.as_ref());
        if let (Some(layer), Some(moe), Some(sink)) = (layer, moe, &mut control.routing) {
            let choices = self.scratch.ffn.choices();
            for part in rows.spans() {
                sink(layer, part.start, moe.top_k, &choices[part.first * moe.top_k..][..part.count * moe.top_k]);
            }
        }
        if let Some(sink) = &mut control.hidden {
            sink(layers, &self.scratch.x[..rows.len() * self.spec.residual_width()]);
        }
        if let (Some(_), Some(sink)) = (layer, &mut control.progress) {
            sink(Progress { layers, ..rows.progress() });
        }
    }

    fn layer(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        rows: &Rows,
        mut caches: Caches<'_, '_>,
        index: usize,
    ) -> Result<(), ModelError> {
        // What goes through a norm before it is added is not known from a part of it.
        let factor = if self.spec.norms.behind { 0.0 } else { self.spec.factors.residual };
        let len = rows.len() * self.spec.hidden_size;
        let Scratch { x, residual, normed, delta, norm, attention: mixer, ffn, .. } = &mut self.scratch;
        let x = &mut x[..rows.len() * self.spec.residual_width()];
        let (normed, delta) = (sized(normed, len), sized(delta, len));
        let layer = &self.layers[index];

        let dense_parts = weights.dense;
        let (started, waited) = (Instant::now(), dense_parts.stats().wait);
        let attention = dense_parts.dense(layer.attention_extent)?;
        let step = Step { compute, rows, extent: attention.bytes() };
        let input = layer.residuals[0].read(compute, step.extent, x, residual);
        layer.attn_norm.apply(step.extent, input, norm, normed);
        layer.attention.forward(step, &mut caches, normed, mixer, delta);
        if let Some(post) = &layer.attn_post_norm {
            post.apply_in_place(step.extent, delta, norm, normed);
        }
        drop(attention);
        if compute.is_cancelled() {
            return Err(ModelError::Cancelled);
        }
        layer.residuals[0].add(&compute.threads, x, delta, residual);
        let attended = Instant::now();
        self.times.attention += (attended - started).saturating_sub(dense_parts.stats().wait - waited);

        let Some(part) = &layer.ffn else { return Ok(()) };
        let router = dense_parts.dense(part.router)?;
        let dense = part.dense.map(|handle| dense_parts.dense(handle)).transpose()?;
        let input = layer.residuals[1].read(compute, router.bytes(), x, residual);
        part.norm.apply(router.bytes(), input, norm, normed);
        // A prompt will need most experts of the next layer anyway; a prefetch needs that layer's router in memory.
        let mut later = self.layers.iter().enumerate().skip(index + 1);
        let next = later.find_map(|(number, l)| Some((number, l.ffn.as_ref()?))).filter(|(_, l)| {
            let wanted = rows.generate() && ffn.prefetches() && l.ffn.routed().is_some();
            wanted && dense_parts.is_pinned(l.router)
        });
        let next_router = next.map(|(_, l)| dense_parts.dense(l.router)).transpose()?;
        let prefetch = next.zip(next_router.as_ref()).and_then(|((number, l), router)| {
            let (norm, extent) = (l.ffn.router_norm().unwrap_or(&l.norm), router.bytes());
            Some(NextLayer { layer: number, routed: l.ffn.routed()?, norm, factor, extent })
        });
        let step = FfnStep {
            compute,
            rows,
            layer: index,
            router: router.bytes(),
            dense: dense.as_ref().map(|d| d.bytes()),
            residual: input,
            ahead: prefetch,
        };
        let experts = part.ffn.forward(&step, weights.experts, normed, ffn, delta)?;
        if let Some(post) = &part.post_norm {
            post.apply_in_place(router.bytes(), delta, norm, normed);
        }
        layer.residuals[1].add(&compute.threads, x, delta, residual);
        part.scale.iter().flat_map(|place| place.part(router.bytes(), 0..1)).for_each(|factor| scale(x, factor));
        self.times.experts += experts;
        self.times.feed_forward += attended.elapsed().saturating_sub(experts);
        Ok(())
    }

    /// Logits of these rows of the last [`Model::forward`], in this order: calls `sink` with the place in `wanted` and the row's
    /// logits `[vocab]`.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when a part of the head cannot be read.
    pub fn logits(
        &mut self,
        compute: &Compute,
        dense: &DenseParts,
        wanted: &[usize],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let (mut started, waited) = (Instant::now(), dense.stats().wait);
        let (hidden, vocab) = (self.spec.hidden_size, self.spec.vocab_size);
        let width = self.spec.residual_width();
        let Scratch { x, residual, normed, delta, norm, head_bias, head_input, part, logits, .. } = &mut self.scratch;
        let last = dense.dense(self.final_norm.0)?;
        if let Some(bias) = &self.head_bias {
            bias.read(last.bytes(), head_bias);
        }
        for (block, rows) in wanted.chunks(LOGIT_ROWS).enumerate() {
            let n = rows.len();
            let normed = sized(normed, n * hidden);
            let wanted = sized(delta, n * width);
            for (row, wanted) in rows.iter().zip(wanted.chunks_exact_mut(width)) {
                wanted.copy_from_slice(&x[row * width..][..width]);
            }
            let input = self.final_residual.read(compute, last.bytes(), wanted, residual);
            self.final_norm.1.apply(last.bytes(), input, norm, normed);
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
                compute.product(matrix, extent.bytes(), head_input, part);
                for (part, logits) in part.chunks_exact(matrix.rows()).zip(logits.chunks_exact_mut(vocab)) {
                    logits[row..row + matrix.rows()].copy_from_slice(part);
                }
                row += matrix.rows();
            }
            self.times.head += started.elapsed();
            if compute.is_cancelled() {
                return Err(ModelError::Cancelled);
            }
            finish_logits(&self.spec, head_bias, logits);
            logits.chunks_exact(vocab).enumerate().for_each(|(i, row)| sink(block * LOGIT_ROWS + i, row));
            started = Instant::now();
        }
        self.times.head = self.times.head.saturating_sub(dense.stats().wait - waited);
        Ok(())
    }

    /// Bytes of scratch for passes of `rows` rows and experts of `expert_len` bytes, at most. `most_kept`: as in [`Model::new`].
    pub fn scratch_memory(spec: &ModelSpec, rows: usize, expert_len: u64, most_kept: u64) -> u64 {
        let hidden = spec.hidden_size as u64;
        let layer = |l: &sluice_format::LayerSpec| {
            let attention = crate::attention::scratch_width(&l.attention) as u64;
            let moe = l.ffn.moe.as_ref();
            let widest = l.ffn.dense_width.max(moe.map_or(0, |m| m.width)) as u64;
            let routed =
                moe.map_or(0, |m| crate::experts::combining_width(hidden) + 8 * m.top_k as u64 + m.experts as u64);
            // What experts read and write, as f32 and in the form that kernels consume, and what becomes of it.
            let latent = moe.and_then(|m| m.latent).map_or(0, |latent| 3 * latent as u64 + hidden);
            attention + 2 * widest + routed + latent + crate::ffn::apart_width(&l.ffn, hidden)
        };
        let widest = spec.layers.iter().map(layer).max().unwrap_or(0);
        let kept = Model::output_memory(spec, rows).min(most_kept);
        let logits = (2 * LOGIT_ROWS.min(rows) * spec.vocab_size * 4) as u64;
        // More than one stream is what the residual has beyond the stream that is counted with the rest.
        let streams = (spec.residual_width() - spec.hidden_size) as u64 * 4 * rows as u64;
        let residual = streams + residual::scratch_memory(spec, rows);
        (widest + 8 * hidden) * 4 * rows as u64 + residual + kept + logits + crate::experts::tally_memory(expert_len)
    }

    /// Bytes of the outputs of all experts that `rows` rows choose in a layer.
    pub fn output_memory(spec: &ModelSpec, rows: usize) -> u64 {
        let moe = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref());
        moe.map(|moe| crate::experts::output_bytes(moe, rows, moe.input_width(spec.hidden_size))).max().unwrap_or(0)
    }

    /// Bytes that the cached parts of the embedding may take, in a file of these extents.
    pub fn embedding_memory(extents: &[ExtentRecord]) -> u64 {
        let parts = extents.iter().filter(|e| e.kind == ExtentKind::Embedding);
        let (count, longest) = parts.fold((0, 0), |(n, longest), e| (n + 1, e.padded_len.max(longest)));
        crate::embedding::cache_memory(count, longest)
    }
}

/// From products with the head to logits `[n, vocab]`; `bias` is empty or `[vocab]`.
fn finish_logits(spec: &ModelSpec, bias: &[f32], logits: &mut [f32]) {
    if !bias.is_empty() {
        logits.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(l, b)| *l += b));
    }
    scale(logits, spec.factors.logits);
    if let Some(cap) = spec.logit_cap {
        logits.iter_mut().for_each(|l| *l = cap * tanh(*l / cap));
    }
}

fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

//! The model: executes a [`ModelSpec`] layer by layer over the rows of a pass.
//!
//! A layer reads top-down like the paper: norm, attention, add, norm, feed-forward part, add. Nothing here knows a family.

mod ahead;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sluice_format::{ExtentKind, ExtentRecord, FormatError, LayerSpec, ModelFile, ModelSpec, NO_LAYER};
use sluice_kernels::{Activations, tanh};

use crate::attention::{Attention, AttentionScratch};
use crate::cache::PagesFull;
use crate::compute::{Compute, Step, sized};
use crate::control::{Control, Progress};
use crate::embedding::Embedding;
use crate::ffn::{Ffn, FfnScratch, FfnStep};
use crate::ngrams::{self, NgramScratch, Ngrams};
use crate::norm::{Norm, NormScratch};
use crate::prediction::Prediction;
use crate::residual::{self, Residual, ResidualScratch};
use crate::rows::{Caches, Rows, Span};
use crate::thrift::Thrift;
use crate::weights::{ExtentTensors, MatrixRef, VectorRef};
use ahead::{next_to_read, read_ahead};
use sluice_storage::pool::{DenseHandle, DenseParts, Pool, PoolError, SectorCache};

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is damaged or cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// An extent could not be read into memory, or is damaged.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A tensor that the spec requires is missing.
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
    /// The table of a layer's router lists a number that is no expert, or an expert twice.
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
        /// The number that it lists.
        listed: f32,
        /// Experts of the layer.
        experts: usize,
    },
    /// Fewer pages are free than the step needs. Nothing has been appended: the step can be tried again when another sequence has
    /// returned pages.
    #[error(transparent)]
    PagesFull(#[from] PagesFull),
    /// The sequence and its pages belong to another engine.
    #[error("the sequence was made by another engine: make it with this one, or save it there and restore it here")]
    ForeignSequence,
    /// The caller has ended the step.
    #[error("the step was cancelled")]
    Cancelled,
    /// The head inputs that were given to the prediction layer have the wrong length.
    #[error("{tokens} tokens need {expected} numbers of what the head saw before them, {found} were given")]
    HeadInputs {
        /// Tokens of the span.
        tokens: usize,
        /// Tokens times hidden size.
        expected: usize,
        /// Numbers that were given.
        found: usize,
    },
    /// Inputs cannot be observed in the expanded form, which multiplies other things than the absorbed one.
    #[error(
        "what matrices are multiplied with can only be observed while prompts are in the absorbed form: leave --prompt-attention expanded out"
    )]
    ObservedExpanded,
    /// No tokens.
    #[error("there are no tokens to compute: give a prompt of at least one token")]
    NoTokens,
}

/// How a model is opened, besides its file.
#[derive(Clone, Copy, Debug)]
pub struct ModelOptions {
    /// Whether experts are read ahead of the router while tokens are decoded.
    pub prefetch: bool,
    /// Bytes of experts' outputs that may wait to be summed.
    pub most_kept: u64,
    /// Whether the prediction layer is opened, if there is one.
    pub prediction: bool,
    /// How experts are chosen otherwise than by the routers.
    pub thrift: Thrift,
}

/// Time spent in the parts of a forward pass.
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
    /// The layers of the decoder, then the prediction layer if it is open.
    layers: Vec<Layer>,
    embedding: Embedding,
    tail: Tail,
    prediction: Option<Prediction>,
    scratch: Scratch,
    times: LayerTimes,
}

/// The parts after the last layer.
#[derive(Debug)]
pub(crate) struct Tail {
    /// The extent with the weights for the head's view of the residual.
    pub(crate) extent: DenseHandle,
    pub(crate) residual: Residual,
    pub(crate) head_bias: Option<VectorRef>,
    pub(crate) head: Vec<(DenseHandle, MatrixRef)>,
}

/// Selects the head and the rows for which logits are computed.
pub struct HeadStep<'a> {
    /// Whether the prediction layer, not the decoder, was run last.
    pub prediction: bool,
    /// The extents with norm and head.
    pub dense: &'a DenseParts,
    /// The rows of the pass.
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub wanted: &'a [usize],
}

#[derive(Debug)]
struct Layer {
    /// Attention's view of the residual.
    residual: Residual,
    ngrams: Option<Ngrams>,
    attention: Attention,
    attn_post_norm: Option<Norm>,
    attention_extent: DenseHandle,
    ffn: Option<LayerFfn>,
}

/// The feed-forward part of a layer that has one.
#[derive(Debug)]
struct LayerFfn {
    /// Its view of the residual.
    residual: Residual,
    ffn: Ffn,
    post_norm: Option<Norm>,
    /// Factor of the layer's output.
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
    ngrams: NgramScratch,
    norm: NormScratch,
    head_bias: Vec<f32>,
    head_input: Activations,
    part: Vec<f32>,
    logits: Vec<f32>,
    attention: AttentionScratch,
    ffn: FfnScratch,
}

/// The places of the weights while the model runs.
pub struct Weights<'a> {
    /// The file, for rows of the embedding.
    pub file: &'a ModelFile,
    /// The parts that every token needs.
    pub dense: &'a DenseParts,
    /// The routed experts.
    pub experts: &'a mut Pool,
    /// Rows of tables.
    pub tables: &'a mut SectorCache,
}

/// Tokens whose embedding rows are read between two checks for cancellation.
pub(crate) const EMBEDDED_AT_ONCE: usize = 64;

/// Rows of logits that are computed at once, which bounds the memory of a long prompt for which all logits are wanted.
const LOGIT_ROWS: usize = 16;

/// The extents of a file that are used: those of the prediction layer only if it is opened.
pub fn opened_extents(spec: &ModelSpec, extents: &[ExtentRecord], prediction: bool) -> Vec<ExtentRecord> {
    extents.iter().filter(|extent| prediction || spec.decodes(extent)).copied().collect()
}

/// The extents of a file that every token needs, in the order in which a token needs them. The position in this list is the handle.
pub fn dense_extents(extents: &[ExtentRecord]) -> Vec<ExtentRecord> {
    // A layer's parts follow each other; NO_LAYER sorts the final norm and the head after all layers.
    let order = |kind| match kind {
        ExtentKind::Prediction => Some(0),
        ExtentKind::Attention => Some(1),
        ExtentKind::Router => Some(2),
        ExtentKind::Dense => Some(3),
        ExtentKind::FinalNorm => Some(4),
        ExtentKind::Head => Some(5),
        ExtentKind::Embedding | ExtentKind::Expert | ExtentKind::Table => None,
    };
    // The prediction layer comes after all parts of the decoder, because many tokens are decoded without it.
    let predicting = extents.iter().find(|e| e.kind == ExtentKind::Prediction).map_or(NO_LAYER, |e| e.layer);
    let predicts = |e: &ExtentRecord| e.layer >= predicting && e.layer != NO_LAYER;
    let mut dense: Vec<_> = extents.iter().filter(|e| order(e.kind).is_some()).copied().collect();
    dense.sort_by_key(|e| (predicts(e), e.layer, order(e.kind), e.index));
    dense
}

impl Layer {
    /// The layer with this number in `file`; `next` gives the handles of its extents in their order.
    fn new(
        file: &ModelFile,
        number: usize,
        layer: &LayerSpec,
        next: &mut impl FnMut() -> DenseHandle,
    ) -> Result<Self, ModelError> {
        let spec = file.spec();
        let tensors = |kind| ExtentTensors { file, kind, layer: number as u32, index: 0 };
        let (attention, router) = (tensors(ExtentKind::Attention), tensors(ExtentKind::Router));
        let (dense, expert) = (tensors(ExtentKind::Dense), tensors(ExtentKind::Expert));
        let behind = |tensors: &ExtentTensors<'_>, name| {
            spec.norms.behind.then(|| Norm::rms(spec.norm_eps, tensors, name)).transpose()
        };
        Ok(Layer {
            residual: Residual::new(spec, &attention, ["attn_norm", "attn_norm_bias"])?,
            ngrams: Ngrams::new(spec, number, &attention)?,
            attention: Attention::new(&layer.attention, &attention)?,
            attn_post_norm: behind(&attention, "attn_post_norm")?,
            attention_extent: next(),
            ffn: match layer.ffn.is_none() {
                true => None,
                false => Some(LayerFfn {
                    residual: Residual::new(spec, &router, ["ffn_norm", "ffn_norm_bias"])?,
                    ffn: Ffn::new(spec, &layer.ffn, &router, &dense, &expert)?,
                    post_norm: behind(&router, "ffn_post_norm")?,
                    scale: spec.layer_scale.then(|| router.vector("layer_scale")).transpose()?,
                    router: next(),
                    dense: (!spec.tensors(ExtentKind::Dense, number).is_empty()).then(next),
                }),
            },
        })
    }
}

impl Tail {
    /// Puts these rows of the residual into `scratch.normed`, `[rows, hidden]`, as the head's inputs. `last`: bytes of the tail's
    /// extent.
    fn inputs(&self, compute: &Compute, last: &[u8], spec: &ModelSpec, rows: &[usize], scratch: &mut Scratch) {
        let (hidden, width) = (spec.hidden_size, spec.residual_width());
        let Scratch { x, residual, normed, delta, .. } = scratch;
        let wanted = sized(delta, rows.len() * width);
        for (row, wanted) in rows.iter().zip(wanted.chunks_exact_mut(width)) {
            wanted.copy_from_slice(&x[row * width..][..width]);
        }
        self.residual.read(compute, last, wanted, residual, sized(normed, rows.len() * hidden));
    }
}

/// The parts of a head in `file`: the model's own, or those of the prediction layer.
pub(crate) fn head_parts(
    file: &ModelFile,
    layer: u32,
    next: &mut impl FnMut() -> DenseHandle,
) -> Result<Vec<(DenseHandle, MatrixRef)>, ModelError> {
    let parts = file.parts_of(ExtentKind::Head, layer).count() as u32;
    let part = |index| ExtentTensors { file, kind: ExtentKind::Head, layer, index };
    (0..parts).map(|index| Ok((next(), part(index).matrix("head")?))).collect()
}

impl Model {
    /// Resolves every tensor of `file` that `options` open. `handles` belong to the [`dense_extents`] of the [`opened_extents`], in
    /// the same order.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn new(
        file: &ModelFile,
        handles: &[DenseHandle],
        compute: &Compute,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        let mut spec = file.spec().clone();
        options.thrift.limit(&mut spec);
        let mut handles = handles.iter().copied();
        let mut next = || handles.next().expect("one handle per dense extent");
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (number, layer) in spec.layers.iter().enumerate() {
            layers.push(Layer::new(file, number, layer, &mut next)?);
        }
        let last = ExtentTensors { file, kind: ExtentKind::FinalNorm, layer: NO_LAYER, index: 0 };
        let (extent, residual) = (next(), Residual::new(&spec, &last, ["norm", "norm_bias"])?);
        let head_bias = spec.head_bias.then(|| last.vector("head_bias")).transpose()?;
        let tail = Tail { extent, residual, head_bias, head: head_parts(file, NO_LAYER, &mut next)? };
        let prediction = match spec.prediction.as_ref().filter(|_| options.prediction) {
            None => None,
            Some(of_spec) => {
                let opening = Prediction::open(file, layers.len(), compute, &mut next)?;
                layers.push(Layer::new(file, layers.len(), &of_spec.layer, &mut next)?);
                Some(opening.with_head(file, of_spec.own_head, &tail, &mut next)?)
            }
        };
        let scratch = Scratch {
            x: Vec::new(),
            residual: ResidualScratch::new(),
            normed: Vec::new(),
            delta: Vec::new(),
            ngrams: NgramScratch::new(compute),
            norm: NormScratch::default(),
            head_bias: Vec::new(),
            head_input: Activations::new(compute.precision),
            part: Vec::new(),
            logits: Vec::new(),
            attention: AttentionScratch::new(compute),
            ffn: FfnScratch::new(compute, options),
        };
        Ok(Model {
            embedding: Embedding::new(file, NO_LAYER),
            spec,
            layers,
            tail,
            prediction,
            scratch,
            times: LayerTimes::default(),
        })
    }

    /// Frees all buffers; they grow again to the size that the next call needs.
    pub fn give_back(&mut self, compute: &Compute) {
        let Scratch { x, residual, normed, delta, ngrams, norm, head_bias, head_input, part, logits, attention, ffn } =
            &mut self.scratch;
        (*residual, *ngrams, *norm) = (ResidualScratch::new(), NgramScratch::new(compute), NormScratch::default());
        for buffer in [x, normed, delta, head_bias, part, logits] {
            *buffer = Vec::new();
        }
        *head_input = Activations::new(compute.precision);
        *attention = AttentionScratch::new(compute);
        ffn.give_back(compute);
        compute.give_back();
        self.embedding.give_back();
        self.prediction.iter_mut().for_each(|prediction| prediction.give_back(compute));
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Changes [`ModelOptions::most_kept`], from the next pass on.
    pub fn keep_at_most(&mut self, bytes: u64) {
        self.scratch.ffn.keep_at_most(bytes);
    }

    /// How many experts were chosen instead of the routers' own since the model was opened.
    pub fn replaced(&self) -> u64 {
        self.scratch.ffn.replaced()
    }

    /// Times since the model was opened.
    pub fn times(&self) -> LayerTimes {
        self.times
    }

    /// Bytes of the embedding read from the file.
    pub fn embedding_bytes_read(&self) -> u64 {
        self.embedding.bytes_read() + self.prediction.as_ref().map_or(0, Prediction::embedding_bytes_read)
    }

    /// Runs all layers over `rows` of `spans`; then [`Model::logits`] can be called. The sequences do not count the rows yet;
    /// [`Rows::advance`] does that.
    ///
    /// # Errors
    /// [`ModelError`]: an unknown id, an unreadable or damaged extent, or that `control` has cancelled it.
    ///
    /// # Panics
    /// If a sequence belongs to another model, or has no room for its rows, or `control` has fewer states than the step has rows.
    pub fn forward(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        rows: &Rows,
        spans: &mut [Span<'_>],
        control: &mut Control<'_>,
    ) -> Result<(), ModelError> {
        self.read_ahead(weights, rows, spans)?;
        self.begin(weights, rows, spans, control)?;
        self.watch(0, rows, control);
        for layer in 0..self.spec.layers.len() {
            self.layer(compute, weights, rows, Caches::new(spans, layer), layer)?;
            control.check()?;
            self.watch(layer + 1, rows, control);
        }
        Ok(())
    }

    /// Runs the prediction layer over `rows` of `spans`, whose sequences belong to this layer alone; then [`Model::logits`] can be
    /// called. `head_inputs`: for each span, the head's inputs of the tokens before its tokens, `[tokens, hidden]`.
    ///
    /// # Errors
    /// Like [`Model::forward`].
    ///
    /// # Panics
    /// If the prediction layer is not open, or there are fewer head inputs than tokens, and like [`Model::forward`].
    pub fn predict(
        &mut self,
        compute: &Compute,
        weights: &mut Weights<'_>,
        rows: &Rows,
        spans: &mut [Span<'_>],
        head_inputs: &[&[f32]],
        control: &mut Control<'_>,
    ) -> Result<(), ModelError> {
        let prediction = self.prediction.as_mut().expect("the prediction layer is open");
        let x = sized(&mut self.scratch.x, rows.len() * self.spec.hidden_size);
        prediction.begin(compute, weights, (rows, head_inputs), &self.spec, &mut self.embedding, x)?;
        let number = prediction.number();
        self.layer(compute, weights, rows, Caches::new(spans, 0), number)?;
        control.check()?;
        if let Some(sink) = &mut control.hidden {
            sink(1, &self.scratch.x[..rows.len() * self.spec.hidden_size]);
        }
        Ok(())
    }

    /// Starts to read the table rows that the first rows of the pass need, as many from each table.
    fn read_ahead(&mut self, weights: &mut Weights<'_>, rows: &Rows, spans: &[Span<'_>]) -> Result<(), ModelError> {
        let most = weights.tables.ahead() / self.spec.ngrams.len().max(1);
        let mut tables = self.layers.iter().filter_map(|layer| layer.ngrams.as_ref());
        tables.try_for_each(|ngrams| ngrams.read_ahead((rows, spans), most, weights.tables, &mut self.scratch.ngrams))
    }

    /// Fills the residual with the first layer's input: all streams begin with the embedding.
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
            // From the last row on, because each row moves to a place where later ones were.
            for row in (0..rows.len()).rev() {
                x.copy_within(row * hidden..(row + 1) * hidden, row * width);
                let streams = width / hidden;
                (1..streams).for_each(|s| x.copy_within(row * width..row * width + hidden, row * width + s * hidden));
            }
        }
        Ok(())
    }

    /// Shows the observers the residual after this many layers.
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
        // If the sum goes through a norm before it is added, a part of it does not determine the result.
        let factor = if self.spec.norms.behind { 0.0 } else { self.spec.factors.residual };
        let len = rows.len() * self.spec.hidden_size;
        let Scratch { x, residual, normed, delta, ngrams, norm, attention: mixer, ffn, .. } = &mut self.scratch;
        let x = &mut x[..rows.len() * self.spec.residual_width()];
        let (normed, delta) = (sized(normed, len), sized(delta, len));
        let layer = &self.layers[index];

        let dense_parts = weights.dense;
        let (started, waited) = (Instant::now(), dense_parts.stats().wait + weights.tables.wait());
        let decoder = &self.layers[..self.spec.layers.len()];
        let then_read = if ffn.prefetches() { read_ahead(decoder, index, rows, weights.experts) } else { None };
        layer.prefetch_own(index, compute, weights, (rows, &*x), ffn)?;
        let attention = dense_parts.dense(layer.attention_extent)?;
        let step = Step { compute, rows, extent: attention.bytes() };
        if let Some(table) = &layer.ngrams {
            table.forward(step, &mut caches, weights.tables, x, ngrams)?;
        }
        layer.residual.read(compute, step.extent, x, residual, normed);
        layer.attention.forward(step, &mut caches, normed, mixer, delta);
        if let Some(post) = &layer.attn_post_norm {
            post.apply_in_place(step.extent, delta, norm, normed);
        }
        drop(attention);
        if compute.is_cancelled() {
            return Err(ModelError::Cancelled);
        }
        layer.residual.add(&compute.threads, x, delta, residual);
        let attended = Instant::now();
        let waited = dense_parts.stats().wait + weights.tables.wait() - waited;
        self.times.attention += (attended - started).saturating_sub(waited);

        let Some(part) = &layer.ffn else { return Ok(()) };
        let router = dense_parts.dense(part.router)?;
        let dense = part.dense.map(|handle| dense_parts.dense(handle)).transpose()?;
        part.residual.read(compute, router.bytes(), x, residual, normed);
        let input = part.residual.joined(x, len, residual).unwrap_or(normed);
        // A long prompt needs most experts of the next layer anyway.
        let wanted = rows.generate() && ffn.prefetches();
        let next = wanted.then(|| next_to_read(decoder, index, weights)).flatten();
        let next_router = next.map(|(_, l)| dense_parts.dense(l.router)).transpose()?;
        let next = next.zip(next_router.as_ref());
        let step = FfnStep {
            compute,
            rows,
            layer: index,
            router: router.bytes(),
            dense: dense.as_ref().map(|d| d.bytes()),
            residual: input,
            ahead: next.and_then(|((number, next), router)| next.to_prefetch(number, factor, router.bytes())),
            then_read,
        };
        let experts = part.ffn.forward(&step, weights.experts, normed, ffn, delta)?;
        if let Some(post) = &part.post_norm {
            post.apply_in_place(router.bytes(), delta, norm, normed);
        }
        part.residual.add(&compute.threads, x, delta, residual);
        part.scale.iter().flat_map(|place| place.part(router.bytes(), 0..1)).for_each(|factor| scale(x, factor));
        self.times.experts += experts;
        self.times.feed_forward += attended.elapsed().saturating_sub(experts);
        Ok(())
    }

    /// Logits of the wanted rows of the last [`Model::forward`] or [`Model::predict`], in order: calls `sink` with the place among
    /// the wanted rows and the row's logits `[vocab]`. Before that, `control` sees the head's inputs of all rows.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when a part of the head cannot be read.
    pub fn logits(
        &mut self,
        compute: &Compute,
        step: &HeadStep<'_>,
        control: &mut Control<'_>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let dense = step.dense;
        let (mut started, waited) = (Instant::now(), dense.stats().wait);
        let (hidden, vocab) = (self.spec.hidden_size, self.spec.vocab_size);
        let tail = match &self.prediction {
            Some(prediction) if step.prediction => prediction.tail(),
            _ => &self.tail,
        };
        let last = dense.dense(tail.extent)?;
        match &tail.head_bias {
            Some(bias) => bias.read(last.bytes(), &mut self.scratch.head_bias),
            None => self.scratch.head_bias.clear(),
        }
        if let Some(observer) = &mut control.head_inputs {
            let all: Vec<usize> = (0..step.rows).collect();
            for rows in all.chunks(LOGIT_ROWS) {
                tail.inputs(compute, last.bytes(), &self.spec, rows, &mut self.scratch);
                observer(&self.scratch.normed[..rows.len() * hidden]);
            }
        }
        for (block, rows) in step.wanted.chunks(LOGIT_ROWS).enumerate() {
            let n = rows.len();
            tail.inputs(compute, last.bytes(), &self.spec, rows, &mut self.scratch);
            let Scratch { normed, head_bias, head_input, part, logits, .. } = &mut self.scratch;
            head_input.set(&normed[..n * hidden], n, hidden);
            let logits = sized(logits, n * vocab);
            let mut row = 0;
            for (handle, matrix) in &tail.head {
                let extent = dense.dense(*handle)?;
                let part = sized(part, n * matrix.rows());
                // The parts of the head are one matrix, and its inputs are shown once.
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

    /// Most bytes of scratch for passes of `rows` rows and experts of `expert_len` bytes. `most_kept`: as in [`ModelOptions`].
    pub fn scratch_memory(spec: &ModelSpec, rows: usize, expert_len: u64, most_kept: u64) -> u64 {
        let hidden = spec.hidden_size as u64;
        let layer = |l: &sluice_format::LayerSpec| {
            let attention = crate::attention::scratch_width(&l.attention) as u64;
            let moe = l.ffn.moe.as_ref();
            let widest = l.ffn.dense_width.max(moe.map_or(0, |m| m.width)) as u64;
            let routed =
                moe.map_or(0, |m| crate::experts::combining_width(hidden) + 8 * m.top_k as u64 + m.experts as u64);
            // Inputs and outputs of experts, as f32 and in the form that kernels consume, and their results.
            let latent = moe.and_then(|m| m.latent).map_or(0, |latent| 3 * latent as u64 + hidden);
            attention + 2 * widest + routed + latent + crate::ffn::apart_width(&l.ffn, hidden)
        };
        let widest = spec.layers.iter().map(layer).max().unwrap_or(0);
        let kept = Model::output_memory(spec, rows).min(most_kept);
        let logits = (2 * LOGIT_ROWS.min(rows) * spec.vocab_size * 4) as u64;
        // The streams beyond the first, which is counted with the rest.
        let streams = (spec.residual_width() - spec.hidden_size) as u64 * 4 * rows as u64;
        let residual = streams + residual::scratch_memory(spec, rows) + ngrams::scratch_memory(spec, rows);
        let moe = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref());
        let together = moe.map(|moe| crate::experts::together_memory(moe, spec.hidden_size)).max().unwrap_or(0);
        let experts = kept + together + crate::experts::tally_memory(expert_len);
        (widest + 8 * hidden) * 4 * rows as u64 + residual + logits + experts
    }

    /// Bytes that one thread needs to read the prompts of passes of `rows` rows in the expanded form; 0 in models without latent attention.
    pub fn expansion_memory(spec: &ModelSpec, rows: usize) -> u64 {
        spec.layers.iter().map(|l| crate::attention::expansion_memory(&l.attention, rows)).max().unwrap_or(0)
    }

    /// Bytes of the outputs of all experts that `rows` rows choose in a layer.
    pub fn output_memory(spec: &ModelSpec, rows: usize) -> u64 {
        let moe = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref());
        moe.map(|moe| crate::experts::output_bytes(moe, rows, moe.input_width(spec.hidden_size))).max().unwrap_or(0)
    }

    /// Bytes of scratch for the prediction layer's projection of its inputs, for a model that consists of this layer.
    pub fn projection_memory(spec: &ModelSpec) -> u64 {
        crate::prediction::projection_width(spec.hidden_size as u64) * 4 * EMBEDDED_AT_ONCE as u64
    }

    /// Bytes that the cached parts of the embeddings may take, for a file with these extents: the model's embedding, and the
    /// prediction layer's own if it has one.
    pub fn embedding_memory(extents: &[ExtentRecord]) -> u64 {
        let cache = |own: bool| {
            let parts = extents.iter().filter(|e| e.kind == ExtentKind::Embedding && (e.layer != NO_LAYER) == own);
            let (count, longest) = parts.fold((0, 0), |(n, longest), e| (n + 1, e.padded_len.max(longest)));
            crate::embedding::cache_memory(count, longest)
        };
        cache(false) + cache(true)
    }
}

/// Turns products with the head into logits `[n, vocab]`; `bias` is empty or `[vocab]`.
fn finish_logits(spec: &ModelSpec, bias: &[f32], logits: &mut [f32]) {
    if !bias.is_empty() {
        logits.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(l, b)| *l += b));
    }
    scale(logits, spec.factors.logits);
    if let Some(cap) = spec.logit_cap {
        logits.iter_mut().for_each(|l| *l = cap * tanh(*l / cap));
    }
}

pub(crate) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

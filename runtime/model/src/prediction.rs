//! The layer that predicts the token after the next one: its inputs, and the sequences that it remembers.
//!
//! Formulas are at [`PredictionSpec`](sluice_format::PredictionSpec). The layer itself is like those of the decoder.

use sluice_format::{ExtentKind, ModelFile, ModelSpec};
use sluice_kernels::Activations;

use crate::compute::{Compute, sized};
use crate::embedding::Embedding;
use crate::model::{EMBEDDED_AT_ONCE, Tail, head_parts, scale};
use crate::norm::{Norm, NormScratch};
use crate::residual::Residual;
use crate::rows::{Phase, Rows, Want};
use crate::sequence::Sequence;
use crate::weights::{ExtentTensors, MatrixRef};
use crate::{ModelError, RewindError, Weights};
use sluice_storage::pool::DenseHandle;

/// The parts that only the prediction layer has.
#[derive(Debug)]
pub(crate) struct Prediction {
    /// Number of the layer.
    number: usize,
    extent: DenseHandle,
    embedding_norm: Norm,
    hidden_norm: Norm,
    projection: MatrixRef,
    /// Its own token embedding; `None`: it uses the model's.
    embedding: Option<Embedding>,
    tail: Tail,
    scratch: Scratch,
}

#[derive(Debug)]
struct Scratch {
    embedded: Vec<f32>,
    norm: NormScratch,
    normed: Vec<f32>,
    /// Both inputs, `[rows, 2 · hidden]`.
    joined: Vec<f32>,
    activations: Activations,
}

impl Scratch {
    fn new(compute: &Compute) -> Self {
        Scratch {
            embedded: Vec::new(),
            norm: NormScratch::default(),
            normed: Vec::new(),
            joined: Vec::new(),
            activations: Activations::new(compute.precision),
        }
    }
}

/// f32 values of scratch per token: its embedding, both inputs after their norms, and the joined input, also as activations.
pub(crate) fn projection_width(hidden: u64) -> u64 {
    6 * hidden
}

impl Prediction {
    /// The prediction layer of `file`, which has this number, with the model's head in place of its own. `next` gives the handle of
    /// its extent.
    pub(crate) fn open(
        file: &ModelFile,
        number: usize,
        compute: &Compute,
        next: &mut impl FnMut() -> DenseHandle,
    ) -> Result<Self, ModelError> {
        let tensors = ExtentTensors { file, kind: ExtentKind::Prediction, layer: number as u32, index: 0 };
        let own_embedding = file.spec().prediction.as_ref().is_some_and(|prediction| prediction.own_embedding);
        let (extent, eps) = (next(), file.spec().norm_eps);
        let residual = Residual::new(file.spec(), &tensors, ["norm", "norm_bias"])?;
        Ok(Prediction {
            number,
            extent,
            embedding_norm: Norm::rms(eps, &tensors, "embedding_norm")?,
            hidden_norm: Norm::rms(eps, &tensors, "hidden_norm")?,
            projection: tensors.matrix("projection")?,
            embedding: own_embedding.then(|| Embedding::new(file, number as u32)),
            tail: Tail { extent, residual, head_bias: None, head: Vec::new() },
            scratch: Scratch::new(compute),
        })
    }

    /// The layer with its own head, or with that of the model, whose tail is `model`. `next` gives the handles of its parts.
    pub(crate) fn with_head(
        mut self,
        file: &ModelFile,
        own: bool,
        model: &Tail,
        next: &mut impl FnMut() -> DenseHandle,
    ) -> Result<Self, ModelError> {
        self.tail.head = if own { head_parts(file, self.number as u32, next)? } else { model.head.clone() };
        Ok(self)
    }

    /// Number of the layer.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// Norm and head after the layer.
    pub(crate) fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Frees all buffers.
    pub(crate) fn give_back(&mut self, compute: &Compute) {
        self.scratch = Scratch::new(compute);
        self.embedding.iter_mut().for_each(Embedding::give_back);
    }

    /// Bytes of its own embedding read from the file.
    pub(crate) fn embedding_bytes_read(&self) -> u64 {
        self.embedding.as_ref().map_or(0, Embedding::bytes_read)
    }

    /// Fills `x` `[rows, hidden]` with the layer's input: the projection of each row's embedding joined with the head's input of
    /// the token before it. `step`: the rows, and for each span the head's inputs, `[tokens, hidden]`. `shared`: the model's
    /// embedding.
    pub(crate) fn begin(
        &mut self,
        compute: &Compute,
        weights: &Weights<'_>,
        (rows, head_inputs): (&Rows, &[&[f32]]),
        spec: &ModelSpec,
        shared: &mut Embedding,
        x: &mut [f32],
    ) -> Result<(), ModelError> {
        let hidden = spec.hidden_size;
        let extent = weights.dense.dense(self.extent)?;
        let Scratch { embedded, norm: buffers, normed, joined, activations } = &mut self.scratch;
        let embedding = self.embedding.as_mut().unwrap_or(shared);
        for part in rows.spans() {
            let before = &head_inputs[part.span][part.token * hidden..][..part.count * hidden];
            let tokens = rows.ids()[part.rows()].chunks(EMBEDDED_AT_ONCE);
            let x = x[part.first * hidden..].chunks_mut(EMBEDDED_AT_ONCE * hidden);
            for ((tokens, before), x) in tokens.zip(before.chunks(EMBEDDED_AT_ONCE * hidden)).zip(x) {
                if compute.is_cancelled() {
                    return Err(ModelError::Cancelled);
                }
                let n = tokens.len();
                let (embedded, normed) = (sized(embedded, n * hidden), sized(normed, n * hidden));
                let joined = sized(joined, 2 * n * hidden);
                embedding.rows(weights.file, tokens, embedded)?;
                scale(embedded, spec.factors.embedding);
                for (half, input, norm) in [(0, &*embedded, &self.embedding_norm), (hidden, before, &self.hidden_norm)]
                {
                    norm.apply(extent.bytes(), input, buffers, normed);
                    for (joined, normed) in joined.chunks_exact_mut(2 * hidden).zip(normed.chunks_exact(hidden)) {
                        joined[half..half + hidden].copy_from_slice(normed);
                    }
                }
                activations.set(joined, n, 2 * hidden);
                compute.multiply(&self.projection, extent.bytes(), activations, &mut x[..n * hidden]);
            }
        }
        Ok(())
    }
}

/// What the prediction layer remembers of the tokens of one sequence. The engine makes it. It is not saved, because it can be
/// computed again from the head's inputs of the sequence.
#[derive(Debug)]
pub struct PredictionSequence(Sequence);

impl PredictionSequence {
    pub(crate) fn new(sequence: Sequence) -> Self {
        PredictionSequence(sequence)
    }

    pub(crate) fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.0
    }

    /// Tokens seen so far. The `i`-th is the one after token `i` of the sequence that is predicted.
    pub fn tokens(&self) -> &[u32] {
        self.0.tokens()
    }

    /// Number of these tokens.
    pub fn position(&self) -> usize {
        self.0.position()
    }

    /// The most tokens that it can hold.
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Forgets the tokens from `position` on; if the layer has a window that has moved on, it may have to go to the nearest earlier
    /// position that it can reach. Returns the position that was reached.
    ///
    /// # Errors
    /// [`RewindError::Beyond`] if there are fewer tokens; the sequence is then unchanged.
    pub fn rewind_to(&mut self, position: usize) -> Result<usize, RewindError> {
        self.0.rewind_to(position)
    }

    /// A sequence of the same tokens that continues independently; both share their pages.
    #[must_use]
    pub fn fork(&self) -> Self {
        PredictionSequence(self.0.fork())
    }
}

/// What a step of the prediction layer appends to one sequence.
#[derive(Debug)]
pub struct PredictionSpan<'a> {
    /// The sequence that grows.
    pub sequence: &'a mut PredictionSequence,
    /// The next tokens, at least one: each is the token *after* the one to which its head input belongs.
    pub tokens: &'a [u32],
    /// The head's inputs of the tokens before them, `[tokens, hidden]`: [`Control::head_inputs`](crate::Control::head_inputs) of a
    /// step of the decoder, or of this layer.
    pub head_inputs: &'a [f32],
    /// The kind of the tokens.
    pub phase: Phase,
    /// Which of their logits are wanted. A token's logits predict the one after it.
    pub logits: Want,
}

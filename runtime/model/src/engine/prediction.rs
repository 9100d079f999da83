//! Steps of the prediction layer.

use std::sync::Arc;

use super::{Engine, RuntimeError};
use crate::cache::PagePool;
use crate::control::Control;
use crate::rows::Span;
use crate::sequence::MarkLimits;
use crate::{ModelError, PredictionSequence, PredictionSpan, Sequence};

impl Engine {
    /// Whether the prediction layer is open ([`EngineOptions::prediction`](super::EngineOptions::prediction)).
    pub fn predicts(&self) -> bool {
        self.prediction_pages.is_some()
    }

    /// An empty sequence of the prediction layer, with room for as many tokens as the memory plan gives each.
    ///
    /// # Errors
    /// [`RuntimeError::PredictionClosed`] if the model was opened without it.
    pub fn new_prediction_sequence(&self) -> Result<PredictionSequence, RuntimeError> {
        let pages = self.prediction_pool()?;
        let (context, marks) = (self.memory.context, MarkLimits::default());
        Ok(PredictionSequence::new(Sequence::new(pages, context, self.binding, marks)))
    }

    /// Predicts the tokens after the next ones. Each span has tokens and, for the token before each, the head's input
    /// ([`Control::head_inputs`]): token `t[i + 1]` with the head input of `t[i]` gives logits of `t[i + 2]`. Calls `sink` with
    /// span, token and logits `[vocab]` of the tokens whose logits are wanted, span by span.
    ///
    /// The layer attends to what its sequence has seen. So a sequence must be given all tokens but the first, in order; the number
    /// of steps makes no difference to the bits. Of `control` it uses `cancel`, `head_inputs` (the head's inputs for this layer,
    /// with which it can predict one token more), `hidden` (after the layer, as 1) and `inputs`.
    ///
    /// # Errors
    /// [`RuntimeError::PredictionClosed`] if the model was opened without the layer; [`ModelError::HeadInputs`] if a span's head
    /// inputs do not have the length that its tokens need; otherwise the errors of [`Engine::step`].
    pub fn predict(
        &mut self,
        spans: &mut [PredictionSpan<'_>],
        control: &mut Control<'_>,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let pages = Arc::clone(self.prediction_pool()?);
        let hidden = self.spec().hidden_size;
        for span in &*spans {
            let (tokens, found) = (span.tokens.len(), span.head_inputs.len());
            if found != tokens * hidden {
                return Err(ModelError::HeadInputs { tokens, expected: tokens * hidden, found }.into());
            }
        }
        let head_inputs: Vec<&[f32]> = spans.iter().map(|span| span.head_inputs).collect();
        let as_spans = spans.iter_mut().map(|span| {
            let PredictionSpan { sequence, tokens, phase, logits, .. } = span;
            Span { sequence: sequence.sequence_mut(), tokens, phase: *phase, logits: *logits }
        });
        self.take_step(&pages, Some(&head_inputs), &mut as_spans.collect::<Vec<_>>(), control, sink)
    }

    fn prediction_pool(&self) -> Result<&Arc<PagePool>, RuntimeError> {
        self.prediction_pages.as_ref().ok_or(RuntimeError::PredictionClosed)
    }
}

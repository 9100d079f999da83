//! Proposals of the model's own prediction layer.
//!
//! The layer computes with the head's input of a token and with the token after it, and remembers both for all tokens before. It
//! need not have seen the whole text: its proposals are always checked, and the latest tokens matter most to it. So it starts with
//! the last tokens of a prompt, and restarts wherever something is missing.

use sluice_model::engine::RuntimeError;
use sluice_model::memory::WAITING_INPUTS;
use sluice_model::{Control, Engine, ModelError, Phase, PredictionSequence, PredictionSpan, Want};

/// Most tokens whose head inputs wait to be given to the layer: bounds their memory, which is planned, and what catching up with a prompt
/// costs.
const WAITING: usize = WAITING_INPUTS;

/// What the prediction layer remembers of one generation.
#[derive(Debug)]
pub(super) struct Predicted {
    sequence: PredictionSequence,
    /// Position of the first token whose head input the layer got.
    origin: usize,
    /// Tokens of the decoder's sequence whose head inputs have been taken.
    seen: usize,
    /// Head inputs of the last of these tokens, which the layer has not got yet: `[waiting, hidden]`.
    inputs: Vec<f32>,
    hidden: usize,
}

impl Predicted {
    /// An empty memory; `None` if the prediction layer is not open.
    pub(super) fn new(engine: &Engine) -> Option<Self> {
        let sequence = engine.new_prediction_sequence().ok()?;
        Some(Predicted { sequence, origin: 0, seen: 0, inputs: Vec::new(), hidden: engine.spec().hidden_size })
    }

    /// Tokens whose head inputs it has not been given.
    pub(super) fn waiting(&self) -> usize {
        self.inputs.len() / self.hidden
    }

    /// Restarts at a position.
    fn restart(&mut self, position: usize) {
        self.sequence.clear();
        self.inputs.clear();
        (self.origin, self.seen) = (position, position);
    }

    /// Takes the head's inputs of the last tokens before `position`, `[tokens, hidden]`.
    pub(super) fn take_behind(&mut self, position: usize, inputs: &[f32]) {
        let first = position - inputs.len() / self.hidden;
        if first != self.seen {
            self.restart(first);
        }
        self.inputs.extend_from_slice(inputs);
        self.seen += inputs.len() / self.hidden;
        let waiting = self.waiting();
        if waiting > WAITING {
            let last = self.inputs.split_off((waiting - WAITING) * self.hidden);
            self.restart(self.seen - WAITING);
            (self.inputs, self.seen) = (last, self.origin + WAITING);
        }
    }

    /// Follows the decoder's sequence back to `position`.
    pub(super) fn go_back(&mut self, position: usize) {
        let gone = self.seen.saturating_sub(position);
        match self.waiting().checked_sub(gone) {
            Some(left) => {
                self.inputs.truncate(left * self.hidden);
                self.seen -= gone;
            }
            None => self.restart(position),
        }
    }

    /// Whether it can propose what follows a text of this many tokens.
    pub(super) fn is_ready(&self, tokens: usize) -> bool {
        self.seen + 1 == tokens
            && !self.inputs.is_empty()
            && self.sequence.position() + WAITING < self.sequence.capacity()
    }
}

/// The rows of a step whose head inputs are kept: the last ones of each span.
pub(super) struct Wanted {
    /// For each span, the number of its rows, and the first row that is kept.
    spans: Vec<(usize, usize)>,
    at: (usize, usize),
    hidden: usize,
    /// The inputs that are kept, span by span.
    pub(super) kept: Vec<Vec<f32>>,
}

impl Wanted {
    /// For spans with these numbers of tokens.
    pub(super) fn new(tokens: impl Iterator<Item = usize>, hidden: usize) -> Self {
        let spans: Vec<_> = tokens.map(|count| (count, count.saturating_sub(WAITING))).collect();
        Wanted { kept: vec![Vec::new(); spans.len()], spans, at: (0, 0), hidden }
    }

    /// Takes the next rows `[rows, hidden]` of the step.
    pub(super) fn see(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.hidden) {
            let (span, token) = self.at;
            let Some(&(count, from)) = self.spans.get(span) else { return };
            if token >= from {
                self.kept[span].extend_from_slice(row);
            }
            self.at = if token + 1 == count { (span + 1, 0) } else { (span, token + 1) };
        }
    }
}

/// One of the generations that want proposals: what the layer remembers of it, the tokens of its text, the most proposals, and the
/// place for them.
pub(super) struct Asked<'a> {
    pub(super) predicted: &'a mut Predicted,
    pub(super) tokens: &'a [u32],
    pub(super) most: usize,
    pub(super) proposals: Vec<u32>,
}

/// Makes proposals for all of them; each step of the layer serves all that still want one. The proposals are the likeliest tokens.
///
/// # Errors
/// Like [`Engine::predict`]. If pages are short, there are fewer proposals, which is no error.
pub(super) fn propose(engine: &mut Engine, asked: &mut [Asked<'_>]) -> Result<(), RuntimeError> {
    let deepest = asked.iter().map(|asked| asked.most).max().unwrap_or(0);
    // The head inputs of the layer's own last token, for each generation.
    let mut states: Vec<Vec<f32>> = vec![Vec::new(); asked.len()];
    let mut outcome = Ok(());
    for depth in 0..deepest {
        outcome = propose_once(engine, asked, depth, &mut states);
        if outcome.is_err() {
            break;
        }
    }
    for asked in asked {
        let predicted = &mut *asked.predicted;
        // Results from its own proposals are replaced once the decoder's results are known.
        let known = predicted.seen - predicted.waiting() - predicted.origin;
        let goes_back = known <= predicted.sequence.position();
        if outcome.is_err() || !goes_back || predicted.sequence.rewind_to(known) != Ok(known) {
            predicted.restart(predicted.seen);
        }
    }
    match outcome {
        Err(RuntimeError::Model(ModelError::PagesFull(_))) => Ok(()),
        outcome => outcome,
    }
}

/// One proposal for each generation that wants this many.
fn propose_once(
    engine: &mut Engine,
    asked: &mut [Asked<'_>],
    depth: usize,
    states: &mut [Vec<f32>],
) -> Result<(), RuntimeError> {
    let hidden = engine.spec().hidden_size;
    let (mut spans, mut takers) = (Vec::new(), Vec::new());
    for (asked, state) in asked.iter_mut().zip(states).filter(|(asked, _)| asked.most > depth) {
        let Asked { predicted, tokens, proposals, .. } = asked;
        let known = tokens.len() - predicted.waiting();
        if depth == 0 {
            *state = std::mem::take(&mut predicted.inputs);
        }
        takers.push(proposals);
        spans.push((&mut predicted.sequence, &tokens[known..], state));
    }
    let last: Vec<[u32; 1]> = takers.iter().map(|proposals| [proposals.last().copied().unwrap_or_default()]).collect();
    let rows: Vec<usize> = spans.iter().map(|(_, tokens, _)| if depth == 0 { tokens.len() } else { 1 }).collect();
    let mut wanted = Wanted::new(rows.iter().copied(), hidden);
    let mut observer = |rows: &[f32]| wanted.see(rows);
    let mut control = Control { head_inputs: Some(&mut observer), ..Control::default() };
    let mut of_layer: Vec<PredictionSpan<'_>> = spans
        .iter_mut()
        .zip(&last)
        .map(|((sequence, tokens, state), last)| PredictionSpan {
            sequence,
            tokens: if depth == 0 { tokens } else { last },
            head_inputs: state,
            phase: Phase::Draft,
            logits: Want::Last,
        })
        .collect();
    engine.predict(&mut of_layer, &mut control, &mut |span, _, logits| takers[span].push(likeliest(logits)))?;
    drop(of_layer);
    for ((_, _, state), kept) in spans.into_iter().zip(&wanted.kept) {
        state.clear();
        state.extend_from_slice(&kept[kept.len() - hidden..]);
    }
    Ok(())
}

/// The first of the largest logits.
fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(
        (0, f32::NEG_INFINITY),
        |best, (id, &logit)| {
            if logit > best.1 { (id, logit) } else { best }
        },
    );
    best.0 as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_span_the_last_rows_are_kept() {
        let mut wanted = Wanted::new([3, WAITING + 2, 1].into_iter(), 2);
        let rows: Vec<f32> = (0..2 * (WAITING + 6)).map(|i| i as f32).collect();
        // They come in pieces that do not follow the spans.
        rows.chunks(2 * 5).for_each(|piece| wanted.see(piece));
        assert_eq!(wanted.kept[0], rows[..6]);
        assert_eq!(wanted.kept[1], rows[2 * 5..2 * (WAITING + 5)]);
        assert_eq!(wanted.kept[2], rows[2 * (WAITING + 5)..]);
    }
}

//! One generation: what it wants to append, and what it makes of the logits behind that.

use crate::sampler::{Sampler, logprobs};
use sluice_model::rows::Phase;

use super::request::{Constraint, Shape};
use super::text::TextStream;
use super::{Event, Finish, GenerationError, Request, Usage};

/// Takes what a generation says.
pub type EventSink<'a> = dyn FnMut(Event) + 'a;

/// Sampling on top of one sequence. It never touches an engine: it [offers](Self::offer) tokens to append and
/// [accepts](Self::accept) the logits behind the last of them.
///
/// What it says depends on its request and the logits alone, never on how its tokens were cut into steps or what else was in
/// them. Randomness depends on the seed and the index of the token.
#[derive(Debug)]
pub struct Generation {
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    prompt: usize,
    max_tokens: usize,
    context: usize,
    sampler: Sampler,
    bias: Vec<(u32, f32)>,
    logprobs: Option<usize>,
    constraint: Option<Box<dyn Constraint>>,
    text: TextStream,
    /// Logits with bias and constraint.
    scores: Vec<f32>,
    finish: Option<Finish>,
}

impl Generation {
    /// A generation that has not begun.
    ///
    /// # Errors
    /// What can be wrong with a request: no prompt or one that is too long, unknown tokens, settings that make no sense.
    pub fn new(request: Request, shape: &Shape) -> Result<Self, GenerationError> {
        request.check(shape)?;
        let Request { prompt, max_tokens, sampling, stop, special, bias, logprobs, constraint } = request;
        Ok(Generation {
            prompt: prompt.len(),
            tokens: prompt,
            max_tokens,
            context: shape.context,
            sampler: Sampler::new(sampling)?,
            bias,
            logprobs,
            constraint,
            text: TextStream::new(shape.tokenizer.as_ref(), special, stop),
            scores: Vec::new(),
            finish: None,
        })
    }

    /// The tokens that a sequence which has seen `position` of them has to see next: the rest of the prompt, later the token that
    /// was sampled last. The logits behind the last of them are what [`accept`](Self::accept) takes. Empty once the generation has
    /// ended.
    pub fn offer(&self, position: usize) -> (&[u32], Phase) {
        let phase = if position < self.prompt { Phase::Prompt } else { Phase::Decode };
        match self.finish {
            Some(_) => (&[], phase),
            None => (self.tokens.get(position..).unwrap_or_default(), phase),
        }
    }

    /// Chooses the next token by the logits `[vocab]` behind the last one, and says what follows. Nothing once it has ended.
    ///
    /// # Errors
    /// When no token can be chosen, or its text cannot be told. The generation cannot go on then.
    pub fn accept(&mut self, logits: &[f32], sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        if self.finish.is_some() {
            return Ok(());
        }
        if self.generated().len() >= self.max_tokens {
            return self.end(Finish::Length, sink);
        }
        let id = self.choose(logits)?;
        let (logprob, top) = match self.logprobs {
            Some(count) => {
                let (own, top) = logprobs(logits, id, count);
                (Some(own), top)
            }
            None => (None, Vec::new()),
        };
        self.tokens.push(id);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(id);
        }
        sink(Event::Token { id, logprob, top });
        let is_end = self.text.is_end(id);
        let emit = if is_end { self.text.push_end(id)? } else { self.text.push(id)? };
        if !emit.text.is_empty() {
            sink(Event::Text(emit.text));
        }
        // The last token need not fit: nothing is to follow it.
        let full = self.tokens.len() > self.context;
        let complete = self.constraint.as_ref().is_some_and(|c| c.is_complete());
        match () {
            () if is_end => self.end(Finish::EndToken, sink),
            () if emit.stopped => self.end(Finish::StopString, sink),
            () if complete => self.end(Finish::Complete, sink),
            () if self.generated().len() >= self.max_tokens => self.end(Finish::Length, sink),
            () if full => self.end(Finish::Context, sink),
            () => Ok(()),
        }
    }

    /// Ends the generation before its time: text that was held back for a possible stop string comes out.
    ///
    /// # Errors
    /// When the last text cannot be told.
    pub fn cancel(&mut self, sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        match self.finish {
            Some(_) => Ok(()),
            None => self.end(Finish::Cancelled, sink),
        }
    }

    /// The tokens generated so far, an end token included.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// Why it ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// What it has taken so far.
    pub fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.prompt, generated_tokens: self.generated().len() }
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32, GenerationError> {
        let index = self.generated().len() as u64;
        if self.bias.is_empty() && self.constraint.is_none() {
            return Ok(self.sampler.sample_at(index, logits, &self.tokens)?);
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        for &(id, bias) in &self.bias {
            // A shorter row of logits is not a model's; the sampler says so.
            if let Some(score) = self.scores.get_mut(id as usize) {
                let sum = *score + bias;
                // Large numbers must neither exclude a token nor make it infinitely likely.
                *score = if score.is_finite() && bias.is_finite() { sum.clamp(f32::MIN, f32::MAX) } else { sum };
            }
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(&mut self.scores);
        }
        Ok(self.sampler.sample_at(index, &self.scores, &self.tokens)?)
    }

    fn end(&mut self, reason: Finish, sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        let emit = self.text.finish()?;
        if !emit.text.is_empty() {
            sink(Event::Text(emit.text));
        }
        let reason = if emit.stopped && reason != Finish::Cancelled { Finish::StopString } else { reason };
        self.finish = Some(reason);
        sink(Event::Finish { reason, usage: self.usage() });
        Ok(())
    }
}

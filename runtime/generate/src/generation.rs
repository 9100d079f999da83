//! One generation: the tokens that it wants to append, and its use of the logits after them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::sampler::{Sampler, logprobs};
use sluice_model::GENERATED;
use sluice_model::rows::Phase;

use super::guard::guarded;
use super::request::{Constraint, Penalties, Shape, WhenFull};
use super::text::TextStream;
use super::worth::DEEPEST;
use super::{Draft, Event, Finish, GenerationError, Priority, Request, Sampled, Usage};

/// Receives the events of a generation.
pub type EventSink<'a> = dyn FnMut(Event) + 'a;

/// Name of a constraint in the message of a panic.
const CONSTRAINT: &str = "the request's constraint";

/// Sampling on top of one sequence. It never touches an engine: it [offers](Self::offer) tokens to append, and
/// [accepts](Self::accept) the logits after the last of them.
///
/// Its text depends only on its request and the logits, never on how its tokens were divided into steps or on what else was in
/// them. Randomness depends on the seed and the index of the token. Penalties apply to the tokens in the context.
#[derive(Debug)]
pub struct Generation {
    /// The tokens of the context: prompt and generated tokens, except those that were dropped.
    tokens: Vec<u32>,
    /// How many of these must be read as a prompt before the next token can be chosen.
    to_read: usize,
    /// How many of these are tokens of the prompt.
    of_prompt: usize,
    /// Whether those have other numbers than generated tokens.
    phases: bool,
    /// Tokens of the prompt.
    prompt: usize,
    generated: Vec<u32>,
    dropped: usize,
    when_full: WhenFull,
    /// Position to which the sequence has to go back, because tokens after it have been dropped or refused.
    back_to: Option<usize>,
    max_tokens: usize,
    context: usize,
    sampler: Sampler,
    bias: Vec<(u32, f32)>,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// Tokens of the prompt that have been scored; the first needs no score.
    scored: usize,
    penalties: Penalties,
    constraint: Option<Box<dyn Constraint>>,
    draft: Option<Box<dyn Draft>>,
    vocab: usize,
    /// The last token, and proposals for those after it; empty while there are none.
    ahead: Vec<u32>,
    /// The draft's proposals.
    proposals: Vec<u32>,
    /// How many of the proposals have come true so far; `None` once one has not.
    true_so_far: Option<usize>,
    proposed: u64,
    came_true: u64,
    text: TextStream,
    /// Logits with bias and constraint.
    scores: Vec<f32>,
    finish: Option<Finish>,
    /// Positions at which the sequence is to be marked while the prompt is read.
    marks: Vec<usize>,
    keep: bool,
    title: Option<String>,
    priority: Priority,
    /// Tokens of the prompt that a sequence had seen when the generation started from it.
    cached: Option<usize>,
    /// Events for the owner about tokens that were sampled in an earlier run; they come before all others.
    replayed: Vec<Event>,
}

impl Generation {
    /// A generation that has not started.
    ///
    /// # Errors
    /// If the request is invalid: no prompt or one that is too long, unknown tokens, invalid settings.
    pub fn new(request: Request, shape: &Shape) -> Result<Self, GenerationError> {
        request.check(shape)?;
        let Request { prompt, max_tokens, sampling, stop, special, bias, logprobs, constraint, .. } = request;
        let Request { when_full, draft, marks, keep, title, prompt_logprobs, penalties, priority, sampled, .. } =
            request;
        let mut generation = Generation {
            prompt: prompt.len(),
            to_read: prompt.len(),
            of_prompt: prompt.len(),
            phases: shape.phases,
            tokens: prompt,
            generated: Vec::new(),
            dropped: 0,
            when_full,
            back_to: None,
            max_tokens,
            context: shape.context,
            sampler: Sampler::new(sampling)?,
            bias,
            logprobs,
            prompt_logprobs,
            scored: 1,
            penalties,
            constraint,
            draft,
            vocab: shape.vocab,
            ahead: Vec::new(),
            proposals: Vec::new(),
            true_so_far: None,
            proposed: 0,
            came_true: 0,
            text: TextStream::new(shape.tokenizer.as_ref(), special, stop),
            scores: Vec::new(),
            finish: None,
            marks,
            keep,
            title,
            priority,
            cached: None,
            replayed: Vec::new(),
        };
        generation.replay(sampled)?;
        Ok(generation)
    }

    /// Takes tokens that were sampled in an earlier run.
    fn replay(&mut self, sampled: Vec<Sampled>) -> Result<(), GenerationError> {
        let given = sampled.len();
        let mut events = Vec::new();
        for token in sampled {
            let taken = self.generated.len();
            if self.finish.is_some() || taken >= self.max_tokens {
                return Err(GenerationError::SampledTooMany { given, taken });
            }
            self.take(token, &mut |event| events.push(event))?;
        }
        if given > 0 {
            // All of them are read before the next one is chosen. Nothing has been read yet, so there is nothing to go back from.
            self.to_read = self.tokens.len();
            self.back_to = None;
        }
        self.replayed = events;
        Ok(())
    }

    /// The events for the owner about tokens that were sampled in an earlier run; only the first call returns them.
    pub fn take_replayed(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.replayed)
    }

    /// The generation's priority.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// The tokens to append next to a sequence that has seen the first `position`: the rest of the prompt, later the token that was
    /// sampled last; all of them if the sequence was dropped, but no generated ones together with those of the prompt if they have
    /// numbers of another kind. [`accept`](Self::accept) takes the logits behind the last token of the context. Empty once the generation
    /// has ended.
    ///
    /// With a draft ([`draft`](Self::draft)), the proposals follow the last token, and [`accept_draft`](Self::accept_draft) takes
    /// the logits after each of them.
    ///
    /// If [`take_back_to`](Self::take_back_to) returns a position, the sequence must go back to it first.
    pub fn offer(&self, position: usize) -> (&[u32], Phase) {
        if self.finish.is_none() && !self.ahead.is_empty() && position + 1 == self.tokens.len() {
            return (&self.ahead, Phase::Draft);
        }
        let rest = match self.finish {
            Some(_) => &[],
            None => self.tokens.get(position..).unwrap_or_default(),
        };
        // A step that failed behind a choice leaves two tokens to decode.
        let reads = position < self.to_read || rest.len() > 2;
        match (reads, self.phases) {
            (false, _) => (rest, Phase::Decode),
            (true, false) => (rest, Phase::Prompt),
            (true, true) => match self.of_prompt.saturating_sub(position).min(rest.len()) {
                0 => (rest, Phase::Again),
                left => (&rest[..left], Phase::Prompt),
            },
        }
    }

    /// Whether it reads at `position` what it has not seen before, or has lost: not a token that it has just chosen, nor a few that it has
    /// chosen and must read again because a proposal between them did not come true.
    pub(super) fn is_reading(&self, position: usize) -> bool {
        position < self.to_read || self.tokens.len().saturating_sub(position) > DEEPEST + 1
    }

    /// Whether the logits after tokens of the prompt are needed, to [score](Self::score) the tokens after them.
    pub fn scores_prompt(&self) -> bool {
        self.prompt_logprobs.is_some() && self.scored < self.prompt
    }

    /// Takes the logits `[vocab]` after token `position` of the prompt. Reports the probability of the next token, once for each.
    pub fn score(&mut self, position: usize, logits: &[f32], sink: &mut EventSink<'_>) {
        let Some(count) = self.prompt_logprobs.filter(|_| position + 1 == self.scored) else { return };
        if let Some(&id) = self.tokens[..self.prompt.min(self.tokens.len())].get(self.scored) {
            self.scored += 1;
            let (logprob, top) = logprobs(logits, id, count);
            sink(Event::PromptToken { id, logprob, top });
        }
    }

    /// Asks the draft for up to `most` proposals, for a sequence that has seen `position` tokens. There are none unless it has seen
    /// all tokens except the last.
    ///
    /// # Errors
    /// [`GenerationError::Panicked`]. The generation cannot continue then.
    pub fn draft(&mut self, position: usize, most: usize) -> Result<(), GenerationError> {
        self.check(&[]);
        let most = self.most_proposals(position, most);
        let Some(draft) = self.draft.as_mut().filter(|_| most > 0) else { return Ok(()) };
        let mut proposals = std::mem::take(&mut self.proposals);
        proposals.clear();
        guarded("the request's draft", || draft.propose(&self.tokens, &mut proposals))?;
        self.check(&proposals[..most.min(proposals.len())]);
        self.proposals = proposals;
        Ok(())
    }

    /// Whether its request has a draft.
    pub(super) fn has_draft(&self) -> bool {
        self.draft.is_some()
    }

    /// How many proposals, at most `most`, can be checked with a sequence that has seen `position` tokens: none unless it has seen
    /// all tokens except the last.
    pub(super) fn most_proposals(&self, position: usize, most: usize) -> usize {
        if self.finish.is_some() || position < self.to_read || position + 1 != self.tokens.len() {
            return 0;
        }
        // The last token of a text need not fit in the context, but a row of a step must.
        let room = self.context.saturating_sub(self.tokens.len());
        most.min(self.remaining().saturating_sub(1)).min(room)
    }

    /// Sets the proposals of the next offer, at most as many as [`most_proposals`](Self::most_proposals) allows, and replaces
    /// earlier ones.
    pub(super) fn check(&mut self, proposals: &[u32]) {
        self.ahead.clear();
        let known = proposals.iter().take_while(|&&id| (id as usize) < self.vocab).count();
        if let (Some(&last), true) = (self.tokens.last(), known > 0) {
            self.ahead.push(last);
            self.ahead.extend_from_slice(&proposals[..known]);
            self.true_so_far = Some(0);
            self.proposed += known as u64;
        }
    }

    /// Takes the logits after token `index` of an offer with proposals, in ascending order. They are used as long as the proposals
    /// have come true.
    ///
    /// # Errors
    /// Like [`accept`](Self::accept).
    pub fn accept_draft(
        &mut self,
        index: usize,
        logits: &[f32],
        sink: &mut EventSink<'_>,
    ) -> Result<(), GenerationError> {
        if self.true_so_far != Some(index) {
            return Ok(());
        }
        let before = self.dropped;
        self.true_so_far = None;
        self.accept(logits, sink)?;
        let goes_on = self.finish.is_none() && self.dropped == before;
        let next = self.ahead.get(index + 1);
        if goes_on && next.is_some() && next == self.tokens.last() {
            self.true_so_far = Some(index + 1);
            self.came_true += 1;
            return Ok(());
        }
        if goes_on && next.is_some() {
            // The sequence has seen proposals that did not come true.
            let seen = self.tokens.len() - 1;
            self.back_to = Some(self.back_to.map_or(seen, |before| before.min(seen)));
        }
        self.ahead.clear();
        Ok(())
    }

    /// How many tokens its draft has proposed, and how many of these have come true.
    pub fn proposals(&self) -> (u64, u64) {
        (self.proposed, self.came_true)
    }

    /// The position to which the sequence has to go back before the next offer, if it has seen more, because tokens after it have
    /// been dropped or refused. Returns each position once.
    pub fn take_back_to(&mut self) -> Option<usize> {
        self.back_to.take()
    }

    /// Number of tokens of the context.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never true, because a prompt has at least one token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Most tokens that can still be generated.
    pub fn remaining(&self) -> usize {
        self.max_tokens - self.generated.len().min(self.max_tokens)
    }

    /// Chooses the next token from the logits `[vocab]` after the last one, and sends the events to `sink`. Does nothing once the
    /// generation has ended.
    ///
    /// # Errors
    /// If no token can be chosen, or it cannot be turned into text. The generation cannot continue then.
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
        self.take(Sampled { id, logprob, top }, sink)
    }

    /// Takes a chosen token, and finds out whether it ends the generation.
    fn take(&mut self, Sampled { id, logprob, top }: Sampled, sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        self.tokens.push(id);
        self.generated.push(id);
        if let Some(constraint) = &mut self.constraint {
            guarded(CONSTRAINT, || constraint.accept(id))?;
        }
        sink(Event::Token { id, logprob, top });
        let is_end = self.text.is_end(id);
        let emit = if is_end { self.text.push_end(id)? } else { self.text.push(id)? };
        if !emit.text.is_empty() {
            sink(Event::Text(emit.text));
        }
        // The last token need not fit in the context, because nothing follows it.
        let full = self.tokens.len() > self.context;
        let complete = match &self.constraint {
            Some(constraint) => guarded(CONSTRAINT, || constraint.is_complete())?,
            None => false,
        };
        match () {
            () if is_end => self.end(Finish::EndToken, sink),
            () if emit.stopped => self.end(Finish::StopString, sink),
            () if complete => self.end(Finish::Complete, sink),
            () if self.generated().len() >= self.max_tokens => self.end(Finish::Length, sink),
            () if full => self.fill(sink),
            () => Ok(()),
        }
    }

    /// Handles a full context: drops the oldest tokens if the request says so, and otherwise ends the generation.
    ///
    /// # Errors
    /// If the last tokens cannot be turned into text.
    pub fn fill(&mut self, sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        let WhenFull::DropOldest { keep } = self.when_full else { return self.end(Finish::Context, sink) };
        let others = self.tokens.len().saturating_sub(keep);
        if others < 2 {
            return self.end(Finish::Context, sink);
        }
        let dropped = others / 2;
        self.tokens.drain(keep..keep + dropped);
        self.of_prompt -= self.of_prompt.saturating_sub(keep).min(dropped);
        self.to_read = self.tokens.len();
        self.marks.clear();
        self.dropped += dropped;
        self.back_to = Some(self.back_to.map_or(keep, |before| before.min(keep)));
        sink(Event::Shifted { dropped, left: self.tokens.len() });
        Ok(())
    }

    /// Ends the generation early. Text that was held back because a stop string might begin in it is sent now.
    ///
    /// # Errors
    /// If the last tokens cannot be turned into text.
    pub fn cancel(&mut self, sink: &mut EventSink<'_>) -> Result<(), GenerationError> {
        match self.finish {
            Some(_) => Ok(()),
            None => self.end(Finish::Cancelled, sink),
        }
    }

    /// The tokens generated so far, including an end token.
    pub fn generated(&self) -> &[u32] {
        &self.generated
    }

    /// Why it ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Tokens read, generated and dropped so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            generated_tokens: self.generated.len(),
            dropped_tokens: self.dropped,
            cached_tokens: self.cached.unwrap_or(0),
        }
    }

    /// The tokens of the context: prompt and generated tokens, except those that were dropped.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens of the context as sequences have them ([`Sequence::phased`](sluice_model::Sequence::phased)).
    pub(super) fn phased(&self) -> Cow<'_, [u32]> {
        if !self.phases {
            return Cow::Borrowed(&self.tokens);
        }
        let mut phased = self.tokens.clone();
        phased[self.of_prompt..].iter_mut().for_each(|token| *token |= GENERATED);
        Cow::Owned(phased)
    }

    /// How many of the tokens are read before the next one can be chosen.
    pub(super) fn to_read(&self) -> usize {
        self.to_read
    }

    /// It begins with a sequence that has seen the first `position` tokens. False if it has begun before. Tokens that were sampled in an
    /// earlier run are none of the prompt.
    pub(super) fn begin_at(&mut self, position: usize) -> bool {
        let first = self.cached.is_none();
        self.cached.get_or_insert(position.min(self.prompt));
        first
    }

    /// Keeps only the last `most` of the marks.
    pub(super) fn limit_marks(&mut self, most: usize) {
        self.marks.drain(..self.marks.len().saturating_sub(most));
    }

    /// The next mark after `position`.
    pub(super) fn mark_behind(&self, position: usize) -> Option<usize> {
        self.marks.get(self.marks.partition_point(|&mark| mark <= position)).copied()
    }

    /// Whether there is a mark at `position`.
    pub(super) fn is_mark(&self, position: usize) -> bool {
        self.marks.binary_search(&position).is_ok()
    }

    /// Whether its sequence is kept, and its title.
    pub(super) fn keeps(&self) -> (bool, Option<&str>) {
        (self.keep, self.title.as_deref())
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32, GenerationError> {
        let index = self.generated().len() as u64;
        if self.bias.is_empty() && self.penalties.is_off() && self.constraint.is_none() {
            return Ok(self.sampler.sample_at(index, logits, &self.tokens)?);
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        for &(id, bias) in &self.bias {
            // A row of logits that is too short cannot come from a model; the sampler reports it.
            if let Some(score) = self.scores.get_mut(id as usize) {
                let sum = *score + bias;
                // Large biases must neither exclude a token nor make it infinitely likely.
                *score = if score.is_finite() && bias.is_finite() { sum.clamp(f32::MIN, f32::MAX) } else { sum };
            }
        }
        self.penalise();
        if let Some(constraint) = &mut self.constraint {
            let failure = guarded(CONSTRAINT, || {
                constraint.mask(&mut self.scores);
                constraint.failure()
            })?;
            if let Some(reason) = failure {
                return Err(GenerationError::Constraint { reason });
            }
        }
        Ok(self.sampler.sample_at(index, &self.scores, &self.tokens)?)
    }

    /// Subtracts the penalties for generated tokens from the scores.
    fn penalise(&mut self) {
        if self.penalties.is_off() {
            return;
        }
        let Penalties { presence, frequency } = self.penalties;
        let mut counts = BTreeMap::new();
        self.generated.iter().for_each(|&id| *counts.entry(id).or_insert(0u32) += 1);
        for (id, count) in counts {
            if let Some(score) = self.scores.get_mut(id as usize).filter(|score| score.is_finite()) {
                *score = (*score - presence - frequency * count as f32).clamp(f32::MIN, f32::MAX);
            }
        }
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

//! What a caller asks for.

use std::fmt;

use crate::sampler::SamplerConfig;
use sluice_text::{Special, StopCondition, Tokenizer};

use super::{Draft, GenerationError};

/// Says which tokens may come next: a grammar, a schema, a list of answers.
///
/// It is a part of one generation and hears of its tokens in order.
pub trait Constraint: Send + fmt::Debug {
    /// Sets the logits of tokens that must not come next to minus infinity. End tokens are tokens like all others: a grammar lets
    /// them through where the text may end. If none is left, the generation fails.
    fn mask(&mut self, logits: &mut [f32]);

    /// The generation has taken this token.
    fn accept(&mut self, id: u32);

    /// Whether nothing can follow. The generation then ends without an end token ([`Finish::Complete`](super::Finish)).
    fn is_complete(&self) -> bool {
        false
    }
}

/// What becomes of a generation when its context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It ends ([`Finish::Context`](super::Finish)).
    #[default]
    Stop,
    /// It goes on with a shorter text: the first `keep` tokens and the newer half of the others. That is read again from where
    /// the texts part, so that everything is as if the shorter text had been the prompt: exact, and as expensive as reading it.
    DropOldest {
        /// Tokens at the beginning that are never dropped, fewer than the context has. A prompt's instructions, for instance.
        keep: usize,
    },
}

/// What to generate.
#[derive(Debug)]
pub struct Request {
    /// Tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; with 0 the prompt is read and nothing more.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplerConfig,
    /// What ends the generation early.
    pub stop: StopCondition,
    /// What becomes of special tokens in the text.
    pub special: Special,
    /// Numbers that are added to the logits of tokens before anything else; minus infinity excludes a token.
    pub bias: Vec<(u32, f32)>,
    /// Whether to report how probable the model holds each token, and how many of the likeliest alternatives with it. All are the
    /// model's own probabilities: before bias, constraint and sampling settings.
    pub logprobs: Option<usize>,
    /// Which tokens may come next.
    pub constraint: Option<Box<dyn Constraint>>,
    /// What to do when the context is full. A prompt that does not fit is refused in any case.
    pub when_full: WhenFull,
    /// Proposals for the next tokens, to check several in one step. They do not change the text.
    pub draft: Option<Box<dyn Draft>>,
}

impl Request {
    /// The likeliest continuation of a prompt by up to `max_tokens` tokens, without end tokens.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Request {
            prompt,
            max_tokens,
            sampling: SamplerConfig::default(),
            stop: StopCondition::default(),
            special: Special::Markup,
            bias: Vec::new(),
            logprobs: None,
            constraint: None,
            when_full: WhenFull::Stop,
            draft: None,
        }
    }

    /// Checks everything that can be wrong before a model computes.
    pub(super) fn check(&self, shape: &Shape) -> Result<(), GenerationError> {
        self.sampling.validate()?;
        if self.prompt.is_empty() {
            return Err(GenerationError::EmptyPrompt);
        }
        if self.prompt.len() > shape.context {
            return Err(GenerationError::PromptTooLong { prompt: self.prompt.len(), context: shape.context });
        }
        if let WhenFull::DropOldest { keep } = self.when_full
            && keep >= shape.context
        {
            return Err(GenerationError::KeepsTooMuch { keep, context: shape.context });
        }
        let outside = |id: u32| id as usize >= shape.vocab;
        if let Some(&id) = self.prompt.iter().find(|&&id| outside(id)) {
            return Err(GenerationError::PromptToken { id, vocab: shape.vocab });
        }
        let bad = |&&(id, bias): &&(u32, f32)| outside(id) || bias.is_nan() || bias == f32::INFINITY;
        if let Some(&(id, bias)) = self.bias.iter().find(bad) {
            return Err(GenerationError::Bias { id, bias, vocab: shape.vocab });
        }
        if shape.tokenizer.is_none() && !self.stop.strings().is_empty() {
            return Err(GenerationError::StopNeedsTokenizer);
        }
        Ok(())
    }
}

/// What a generation has to know of the model.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of logits.
    pub vocab: usize,
    /// Tokens that a sequence can hold.
    pub context: usize,
    /// Turns tokens into text; without it there is no text.
    pub tokenizer: Option<Tokenizer>,
}

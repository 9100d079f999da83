//! Requests of callers.

use std::fmt;

use crate::sampler::SamplerConfig;
use sluice_text::{Special, StopCondition, Tokenizer};

use super::{Draft, GenerationError, Logprob};

/// Decides which tokens may come next: a grammar, a schema, a list of answers.
///
/// It belongs to one generation and is told that generation's tokens in order.
pub trait Constraint: Send + fmt::Debug {
    /// Sets the logits of tokens that must not come next to minus infinity. End tokens are treated like all others: a grammar
    /// allows them where the text may end. If no token is left, the generation fails.
    fn mask(&mut self, logits: &mut [f32]);

    /// The generation has taken this token.
    fn accept(&mut self, id: u32);

    /// Why the constraint cannot continue, if it cannot: a limit of its own, for instance. It then allows no token, and the
    /// generation fails with this message.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Whether nothing may follow. The generation then ends without an end token ([`Finish::Complete`](super::Finish)).
    fn is_complete(&self) -> bool {
        false
    }
}

/// What a generation does when its context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It ends ([`Finish::Context`](super::Finish)).
    #[default]
    Stop,
    /// It goes on with a shorter text: the first `keep` tokens and the newer half of the others. The part behind the first `keep`
    /// tokens is read again, so the result is exactly what the shorter text would give as a prompt (with
    /// [`PromptAttention::Expanded`](sluice_model::PromptAttention): what it would give if the same of its tokens had been generated), and
    /// costs as much as reading it.
    DropOldest {
        /// Tokens at the beginning that are never dropped, such as a prompt's instructions. Must be fewer than the context has.
        keep: usize,
    },
}

/// Numbers that are subtracted from the logits of tokens that a generation has generated; the prompt does not count. OpenAI defines
/// them: <https://platform.openai.com/docs/api-reference/chat/create>.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Penalties {
    /// Once for each token that has occurred.
    pub presence: f32,
    /// Each time that the token has occurred.
    pub frequency: f32,
}

impl Penalties {
    /// Whether nothing is subtracted.
    pub fn is_off(&self) -> bool {
        *self == Penalties::default()
    }
}

/// A sampled token, with the details of its event ([`Event::Token`](super::Event)).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, if it was requested.
    pub logprob: Option<f32>,
    /// The likeliest tokens, as many as were requested.
    pub top: Vec<Logprob>,
}

/// Which generations come first when not all can be served at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// Somebody is waiting for it.
    #[default]
    Usual,
    /// Nobody is waiting for it: it begins once the queue has nothing of usual priority, and it gives up its place and its pages to
    /// generations that have it.
    Background,
}

/// What to generate.
#[derive(Debug)]
pub struct Request {
    /// Tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// Tokens that an earlier run of the program already sampled after the prompt. The owner gets their events again, and the
    /// generation continues after them exactly as if it had sampled them now: they count for `max_tokens`, stop strings, penalties
    /// and the constraint, and randomness continues with the index of the next one. They are read together with the prompt. They
    /// cannot be combined with `prompt_logprobs`.
    pub sampled: Vec<Sampled>,
    /// Most tokens to generate; with 0, only the prompt is read.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplerConfig,
    /// What ends the generation early.
    pub stop: StopCondition,
    /// How special tokens appear in the text.
    pub special: Special,
    /// Numbers that are added to the logits of tokens before anything else; minus infinity excludes a token.
    pub bias: Vec<(u32, f32)>,
    /// `Some(n)`: report the log probability of each token, and the `n` likeliest tokens with theirs. These are the model's own
    /// probabilities, before bias, constraint and sampling settings.
    pub logprobs: Option<usize>,
    /// `Some(n)`: report the log probability of each token of the prompt, and the `n` likeliest tokens at its place. The whole
    /// prompt is read for this, whatever is kept of it.
    pub prompt_logprobs: Option<usize>,
    /// Makes tokens that this generation has generated less likely.
    pub penalties: Penalties,
    /// Which tokens may come next.
    pub constraint: Option<Box<dyn Constraint>>,
    /// What to do when the context is full. A prompt that does not fit is always refused.
    pub when_full: WhenFull,
    /// Proposes next tokens, so that a step can check several. It never changes the text.
    pub draft: Option<Box<dyn Draft>>,
    /// Positions in the prompt, ascending and from 1 to its length, where later prompts may diverge: ends of messages, for
    /// instance. In a model with windows or recurrent states, the sequence is marked there, and a later request that begins with
    /// the same tokens continues from the last mark that it reaches. Such a model needs
    /// [`EngineOptions::marks`](sluice_model::EngineOptions); if there are more positions than marks, the last positions are used.
    /// Other models can continue from any token and ignore this.
    pub marks: Vec<usize>,
    /// Whether later requests may continue from what the model remembers of this one. If not, nothing of this request is left once
    /// it has ended.
    pub keep: bool,
    /// The sequence's title in the list of those on the drive.
    pub title: Option<String>,
    /// Whether it comes before other requests.
    pub priority: Priority,
}

impl Request {
    /// The likeliest continuation of a prompt by up to `max_tokens` tokens, without end tokens.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Request {
            prompt,
            sampled: Vec::new(),
            max_tokens,
            sampling: SamplerConfig::default(),
            stop: StopCondition::default(),
            special: Special::Markup,
            bias: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            penalties: Penalties::default(),
            constraint: None,
            when_full: WhenFull::Stop,
            draft: None,
            marks: Vec::new(),
            keep: true,
            title: None,
            priority: Priority::default(),
        }
    }

    /// Checks the whole request, for a model of this shape.
    ///
    /// # Errors
    /// If there is no prompt or one that is too long, a token that the model does not have, or an impossible setting.
    pub fn check(&self, shape: &Shape) -> Result<(), GenerationError> {
        self.sampling.validate()?;
        if self.prompt.is_empty() {
            return Err(GenerationError::EmptyPrompt);
        }
        if self.prompt.len() > shape.context {
            let (context, most) = (shape.context, shape.most_context);
            return Err(GenerationError::PromptTooLong { prompt: self.prompt.len(), context, most });
        }
        if let WhenFull::DropOldest { keep } = self.when_full
            && keep >= shape.context
        {
            return Err(GenerationError::KeepsTooMuch { keep, context: shape.context });
        }
        let outside = |id: u32| id as usize >= shape.vocab;
        let all = self.prompt.iter().chain(self.sampled.iter().map(|token| &token.id));
        if let Some(&id) = all.into_iter().find(|&&id| outside(id)) {
            return Err(GenerationError::PromptToken { id, vocab: shape.vocab });
        }
        if self.prompt_logprobs.is_some() && !self.sampled.is_empty() {
            return Err(GenerationError::SampledAndScored);
        }
        for (field, value) in [("presence", self.penalties.presence), ("frequency", self.penalties.frequency)] {
            if !value.is_finite() {
                return Err(GenerationError::Penalty { field, value });
            }
        }
        let bad = |&&(id, bias): &&(u32, f32)| outside(id) || bias.is_nan() || bias == f32::INFINITY;
        if let Some(&(id, bias)) = self.bias.iter().find(bad) {
            return Err(GenerationError::Bias { id, bias, vocab: shape.vocab });
        }
        self.check_marks()?;
        if shape.tokenizer.is_none() && !self.stop.strings().is_empty() {
            return Err(GenerationError::StopNeedsTokenizer);
        }
        Ok(())
    }

    fn check_marks(&self) -> Result<(), GenerationError> {
        let mut before = 0;
        for &position in &self.marks {
            if position <= before || position > self.prompt.len() {
                return Err(GenerationError::Mark { position, before, prompt: self.prompt.len() });
            }
            before = position;
        }
        Ok(())
    }
}

/// What a generation has to know about the model.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of logits.
    pub vocab: usize,
    /// Tokens that a sequence can hold.
    pub context: usize,
    /// Tokens that a sequence of the model can hold at most, with whatever context it is opened.
    pub most_context: usize,
    /// Turns tokens into text; without a tokenizer there is no text.
    pub tokenizer: Option<Tokenizer>,
    /// Whether the numbers of a token that was read differ from those of one that was generated, so that a generated token must not be
    /// read as a part of a prompt ([`PromptAttention`](sluice_model::PromptAttention)).
    pub phases: bool,
}

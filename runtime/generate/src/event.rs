//! The events of a generation, as its owner gets them.

use serde::Serialize;

use crate::sampler::{Logprob, SamplerError};
use sluice_model::engine::RuntimeError;
use sluice_text::TextError;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It has as many tokens as were requested.
    Length,
    /// The model sampled an end token.
    EndToken,
    /// A stop string appeared.
    StopString,
    /// The context is full.
    Context,
    /// The constraint allows nothing to follow.
    Complete,
    /// Its owner has cancelled it.
    Cancelled,
}

/// Tokens of a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, including an end token.
    pub generated_tokens: usize,
    /// Tokens of both that were dropped because the context was full.
    pub dropped_tokens: usize,
    /// Tokens of the prompt that were not computed, because a stored sequence began with them.
    pub cached_tokens: usize,
}

/// The events of a generation, in order. The last is [`Finish`](Event::Finish) or [`Failed`](Event::Failed).
#[derive(Debug)]
pub enum Event {
    /// A part of the prompt has been read. The first such event tells how much did not have to be read, if anything
    /// ([`Usage::cached_tokens`]).
    Progress {
        /// Tokens read so far, including those that did not have to be.
        read: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// The probability of a token of the prompt, if it was requested. These events come in order, without the first token, which
    /// has nothing before it.
    PromptToken {
        /// The token.
        id: u32,
        /// Natural logarithm of its probability.
        logprob: f32,
        /// The likeliest tokens at its place, as many as were requested, the likeliest first.
        top: Vec<Logprob>,
    },
    /// A token was chosen; it may be an end token.
    Token {
        /// The token.
        id: u32,
        /// Natural logarithm of its probability, if it was requested.
        logprob: Option<f32>,
        /// The likeliest tokens, as many as were requested, the likeliest first.
        top: Vec<Logprob>,
    },
    /// The context was full, and the oldest tokens after the kept ones were dropped ([`WhenFull`](super::WhenFull)).
    Shifted {
        /// Tokens that were dropped.
        dropped: usize,
        /// Tokens that the context has now. Those after the kept ones are read again.
        left: usize,
    },
    /// Text that has become certain; never empty. Stop strings are not part of it.
    Text(String),
    /// The end.
    Finish {
        /// The reason.
        reason: Finish,
        /// Tokens read, generated and dropped.
        usage: Usage,
    },
    /// The end, because something went wrong.
    Failed(GenerationError),
}

/// What a prompt is too long for, and what can be done.
fn longest(context: usize, most: usize) -> String {
    if context < most {
        format!("a sequence holds {context}: shorten it, or open the model with more context, at most {most}")
    } else {
        format!("the model takes at most {context}: shorten it")
    }
}

/// Why something cannot be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No tokens to continue.
    #[error("the prompt is empty: give at least one token to continue")]
    EmptyPrompt,
    /// The prompt is longer than any sequence.
    #[error("the prompt has {prompt} tokens, but {}", longest(*context, *most))]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that a sequence can hold.
        context: usize,
        /// Tokens that it could hold at most, if the model were opened with all the context that it takes.
        most: usize,
    },
    /// Nothing can be dropped.
    #[error("a context of {context} tokens cannot keep the first {keep} and have room for more: keep fewer")]
    KeepsTooMuch {
        /// Tokens to be kept.
        keep: usize,
        /// Tokens that a sequence can hold.
        context: usize,
    },
    /// The model does not have this token.
    #[error("the prompt has token id {id}, but the model's vocabulary has {vocab}")]
    PromptToken {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The bias is invalid.
    #[error("the bias of token {id} is {bias}: biases are numbers or minus infinity, for ids below {vocab}")]
    Bias {
        /// The token.
        id: u32,
        /// Its bias.
        bias: f32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A mark is not inside the prompt, or the marks are not in order.
    #[error(
        "the request has a mark at token {position}: marks ascend from 1 to the length of the prompt, {prompt}, and the one before is \
         {before}"
    )]
    Mark {
        /// The position of the mark.
        position: usize,
        /// The mark before it, or 0.
        before: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// Sampled tokens and scores of the prompt exclude each other, because a prompt is scored before anything is sampled.
    #[error(
        "tokens that were sampled already cannot be given together with log probabilities of the prompt: leave one of them out"
    )]
    SampledAndScored,
    /// The tokens that were sampled already continue after the end of the generation.
    #[error(
        "{given} tokens are given as sampled already, but the generation ends after {taken}: they belong to another request"
    )]
    SampledTooMany {
        /// Tokens that are given.
        given: usize,
        /// Tokens with which it ends.
        taken: usize,
    },
    /// Too many generations are waiting.
    #[error("{queued} generations are waiting, and the queue holds {limit}: try again later")]
    QueueFull {
        /// Generations in the queue.
        queued: usize,
        /// Most that it holds.
        limit: usize,
    },
    /// A part of the request has panicked.
    #[error("{what} has panicked, which ended the generation: this is a bug in the program that made the request")]
    Panicked {
        /// The part, and the message of the panic.
        what: String,
    },
    /// The constraint has failed.
    #[error("the form that the request asks for cannot be kept: {reason}")]
    Constraint {
        /// The constraint's reason.
        reason: String,
    },
    /// The penalty is invalid.
    #[error("the {field} penalty is {value}: give a number")]
    Penalty {
        /// The penalty.
        field: &'static str,
        /// Its value.
        value: f32,
    },
    /// Stop strings were given, but there is no text.
    #[error("stop strings need a tokenizer, and the model has none")]
    StopNeedsTokenizer,
    /// A text was given, but the model has no tokenizer.
    #[error("the model has no tokenizer, so it cannot read text: give token ids")]
    NoTokenizer,
    /// A conversation was given, but the model has no template.
    #[error(
        "the model has no chat template: give text or token ids, or set one with `sluice set FILE --chat-template TEMPLATE`"
    )]
    NoChatTemplate,
    /// The model has been closed, or its thread has ended.
    #[error("the model has been closed")]
    Closed,
    /// The system refused to start a thread.
    #[error("cannot start a thread for the model: {error}")]
    Thread {
        /// The system's error.
        error: std::io::Error,
    },
    /// No token can be chosen.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// Tokenizer, template or stop strings.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A step failed.
    #[error(transparent)]
    Engine(#[from] RuntimeError),
}

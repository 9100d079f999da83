//! Answers as objects of chat completions.

use serde_json::{Map, Value, json};
use sluice_dialect::Piece;

use super::{logprobs, new_id, now};
use crate::answer::{Ending, Step, TokenLogprob, Usage, Why};
use crate::error::{ApiError, Flavour};
use crate::reply::{Events, Fold, Writer};

/// The reason for which an answer ended, in OpenAI's terms.
pub fn finish_reason(why: &Why) -> &'static str {
    match why {
        Why::Done | Why::Stop(_) => "stop",
        Why::Calls => "tool_calls",
        Why::Length => "length",
    }
}

/// `usage` of these answers; each `n` of them share one prompt.
pub fn usage(endings: &[Usage], n: usize) -> Value {
    let prompts = || endings.chunks(n.max(1)).filter_map(<[Usage]>::first);
    let prompt: usize = prompts().map(|usage| usage.prompt).sum();
    let cached: usize = prompts().map(|usage| usage.cached).sum();
    let generated: usize = endings.iter().map(|usage| usage.generated).sum();
    let thinking: usize = endings.iter().map(|usage| usage.thinking).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    })
}

/// The fields that all objects of a response share.
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(model: String) -> Self {
        Head { id: new_id("chatcmpl-"), created: now(), model }
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices})
    }
}

/// Streams chunks.
pub struct ChatWriter {
    head: Head,
    n: usize,
    with_usage: bool,
    usages: Vec<Usage>,
}

const CHUNK: &str = "chat.completion.chunk";

impl ChatWriter {
    /// A stream of `n` answers.
    pub fn new(model: String, n: Option<i64>, with_usage: bool) -> Self {
        let n = n.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
        ChatWriter { head: Head::new(model), n, with_usage, usages: Vec::new() }
    }

    fn chunk(&self, index: usize, delta: Value, finish: Option<&str>, tokens: &[TokenLogprob]) -> Value {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": finish});
        if !tokens.is_empty() {
            choice["logprobs"] = logprobs::chat(tokens);
        }
        let mut object = self.head.object(CHUNK, json!([choice]));
        if self.with_usage {
            object["usage"] = Value::Null;
        }
        object
    }
}

impl Writer for ChatWriter {
    fn begin(&mut self, out: &mut Events) {
        for index in 0..self.n {
            out.data(&self.chunk(index, json!({"role": "assistant", "content": ""}), None, &[]));
        }
    }

    fn step(&mut self, index: usize, step: Step, out: &mut Events) {
        match step {
            Step::Waiting(waiting) => {
                let mut chunk = self.chunk(index, json!({}), None, &[]);
                chunk["progress"] = json!(waiting);
                out.data(&chunk);
            }
            Step::Echo(..) => {}
            Step::Piece(piece, tokens) => out.data(&self.chunk(index, delta(piece), None, &tokens)),
            Step::End(Ending { why, usage }) => {
                self.usages.push(usage);
                out.data(&self.chunk(index, json!({}), Some(finish_reason(&why)), &[]));
            }
            Step::Failed(error) => out.data(&error.body(Flavour::OpenAi)),
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.with_usage {
            let mut object = self.head.object(CHUNK, json!([]));
            object["usage"] = usage(&self.usages, self.n);
            out.data(&object);
        }
        out.done();
    }
}

/// A piece as a delta.
fn delta(piece: Piece) -> Value {
    match piece {
        Piece::Text(text) => json!({"content": text}),
        Piece::Thinking(text) => json!({"reasoning_content": text}),
        Piece::Call { index, id, name } => json!({
            "tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}],
        }),
        Piece::Arguments { index, delta } => json!({
            "tool_calls": [{"index": index, "function": {"arguments": delta}}],
        }),
    }
}

/// An answer's message, assembled from its pieces.
#[derive(Default)]
pub struct Collected {
    /// Its text.
    pub text: String,
    /// Its thinking.
    pub thinking: String,
    /// Its calls: id, name, arguments.
    pub calls: Vec<(String, String, String)>,
    /// The log probabilities of its tokens.
    pub tokens: Vec<TokenLogprob>,
    /// How it ended.
    pub ending: Option<Ending>,
}

impl Collected {
    /// Takes a step.
    ///
    /// # Errors
    /// The error of an answer that failed.
    pub fn step(&mut self, step: Step) -> Result<(), ApiError> {
        match step {
            Step::Waiting(_) => {}
            Step::Echo(text, tokens) => {
                self.tokens.extend(tokens);
                self.text += &text;
            }
            Step::Piece(piece, tokens) => {
                self.tokens.extend(tokens);
                self.add(piece);
            }
            Step::End(ending) => self.ending = Some(ending),
            Step::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn add(&mut self, piece: Piece) {
        match piece {
            Piece::Text(text) => self.text += &text,
            Piece::Thinking(text) => self.thinking += &text,
            Piece::Call { id, name, .. } => self.calls.push((id, name, String::new())),
            Piece::Arguments { index, delta } => {
                if let Some((_, _, arguments)) = self.calls.get_mut(index) {
                    *arguments += &delta;
                }
            }
        }
    }

    /// Its tokens.
    pub fn usage(&self) -> Usage {
        self.ending.as_ref().map(|ending| ending.usage).unwrap_or_default()
    }

    fn message(&self) -> Value {
        let mut message = Map::new();
        message.insert("role".into(), "assistant".into());
        let content =
            if self.text.is_empty() && !self.calls.is_empty() { Value::Null } else { self.text.clone().into() };
        message.insert("content".into(), content);
        if !self.thinking.is_empty() {
            message.insert("reasoning_content".into(), self.thinking.clone().into());
        }
        if !self.calls.is_empty() {
            let call = |(id, name, arguments): &(String, String, String)| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            message.insert("tool_calls".into(), self.calls.iter().map(call).collect());
        }
        message.insert("refusal".into(), Value::Null);
        message.into()
    }
}

/// Makes one object from the answers.
pub struct ChatFold {
    head: Head,
    answers: Vec<Collected>,
}

impl ChatFold {
    /// An object of `n` answers.
    pub fn new(model: String, n: Option<i64>) -> Self {
        let n = n.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
        ChatFold { head: Head::new(model), answers: (0..n).map(|_| Collected::default()).collect() }
    }
}

impl Fold for ChatFold {
    fn step(&mut self, index: usize, step: Step) -> Result<(), ApiError> {
        self.answers.get_mut(index).map_or(Ok(()), |answer| answer.step(step))
    }

    fn finish(self: Box<Self>) -> Value {
        let choice = |(index, answer): (usize, &Collected)| {
            let why = answer.ending.as_ref().map(|ending| finish_reason(&ending.why));
            let tokens = (!answer.tokens.is_empty()).then(|| logprobs::chat(&answer.tokens));
            json!({"index": index, "message": answer.message(), "logprobs": tokens, "finish_reason": why})
        };
        let choices: Vec<Value> = self.answers.iter().enumerate().map(choice).collect();
        let mut object = self.head.object("chat.completion", choices.into());
        object["usage"] = usage(&self.answers.iter().map(Collected::usage).collect::<Vec<_>>(), self.answers.len());
        object
    }
}

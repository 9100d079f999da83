//! Answers as messages: events of a stream, or one object.

use serde_json::{Value, json};
use sluice_dialect::Piece;
use tokio::time::Instant;

use crate::answer::{Ending, KEEP_ALIVE, Step, Usage, Why};
use crate::api::arguments;
use crate::api::openai::new_id;
use crate::error::{ApiError, Flavour};
use crate::reply::{Events, Fold, Writer};

/// Stands in for Anthropic's signature of thinking. Clients send it back. It is not checked here, because thinking, like text, is
/// part of what the client says that the assistant said.
const SIGNATURE: &str = "c2x1aWNl";

/// The reason for which an answer ended, and the stop sequence if there was one.
fn stop_reason(why: &Why) -> (&'static str, Option<&str>) {
    match why {
        Why::Done => ("end_turn", None),
        Why::Calls => ("tool_use", None),
        Why::Stop(sequence) => ("stop_sequence", sequence.as_deref()),
        Why::Length => ("max_tokens", None),
    }
}

fn usage(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt.saturating_sub(usage.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    })
}

/// A message.
fn message(id: &str, model: &str, content: Value, why: Option<&Why>, tokens: &Usage) -> Value {
    let (reason, sequence) = why.map(stop_reason).unzip();
    json!({
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence.flatten(),
        "usage": usage(tokens),
    })
}

/// The block that is being written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Thinking,
    Text,
    Call,
}

/// Streams events.
pub struct MessageWriter {
    id: String,
    model: String,
    request_id: String,
    shows_thinking: bool,
    open: Option<Open>,
    /// Blocks that were begun.
    blocks: usize,
    /// The block of each call.
    calls: Vec<usize>,
    /// Time of the last event for the client.
    told: Instant,
}

impl MessageWriter {
    /// A stream. `shows_thinking`: whether the client reads the model's thinking, or only learns that it thinks.
    pub fn new(model: String, request_id: String, shows_thinking: bool) -> Self {
        let (open, blocks, calls) = (None, 0, Vec::new());
        MessageWriter {
            id: new_id("msg_"),
            model,
            request_id,
            shows_thinking,
            open,
            blocks,
            calls,
            told: Instant::now(),
        }
    }

    fn ping(&mut self, out: &mut Events) {
        out.named("ping", &json!({"type": "ping"}));
    }

    /// The block to which pieces of this kind are added: the open one, or a new one.
    fn block(&mut self, open: Open, begin: Value, out: &mut Events) {
        if self.open == Some(open) && open != Open::Call {
            return;
        }
        self.close(out);
        let event = json!({"type": "content_block_start", "index": self.blocks, "content_block": begin});
        out.named("content_block_start", &event);
        self.open = Some(open);
        self.blocks += 1;
    }

    fn delta(&self, index: usize, delta: Value, out: &mut Events) {
        out.named("content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }

    fn close(&mut self, out: &mut Events) {
        let Some(open) = self.open.take() else { return };
        let index = self.blocks - 1;
        if open == Open::Thinking {
            self.delta(index, json!({"type": "signature_delta", "signature": SIGNATURE}), out);
        }
        out.named("content_block_stop", &json!({"type": "content_block_stop", "index": index}));
    }

    fn piece(&mut self, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Text(text) => {
                self.block(Open::Text, json!({"type": "text", "text": ""}), out);
                self.delta(self.blocks - 1, json!({"type": "text_delta", "text": text}), out);
            }
            Piece::Thinking(text) => {
                self.block(Open::Thinking, json!({"type": "thinking", "thinking": "", "signature": ""}), out);
                if self.shows_thinking {
                    self.delta(self.blocks - 1, json!({"type": "thinking_delta", "thinking": text}), out);
                }
            }
            Piece::Call { id, name, .. } => {
                self.block(Open::Call, json!({"type": "tool_use", "id": id, "name": name, "input": {}}), out);
                self.calls.push(self.blocks - 1);
            }
            Piece::Arguments { index, delta } => {
                if let Some(&block) = self.calls.get(index) {
                    self.delta(block, json!({"type": "input_json_delta", "partial_json": delta}), out);
                }
            }
        }
    }

    fn finish(&mut self, ending: &Ending, out: &mut Events) {
        self.close(out);
        let (reason, sequence) = stop_reason(&ending.why);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        out.named("message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage(&ending.usage)}));
        out.named("message_stop", &json!({"type": "message_stop"}));
    }
}

impl Writer for MessageWriter {
    /// Nothing yet: the first event reports the number of the prompt's tokens.
    fn begin(&mut self, _: &mut Events) {}

    fn started(&mut self, prompt: usize, out: &mut Events) {
        let tokens = Usage { prompt, ..Usage::default() };
        let message = message(&self.id, &self.model, json!([]), None, &tokens);
        out.named("message_start", &json!({"type": "message_start", "message": message}));
        self.ping(out);
        self.told = Instant::now();
    }

    fn step(&mut self, _: usize, step: Step, out: &mut Events) {
        let before = out.as_str().len();
        match step {
            Step::Waiting(_) => self.ping(out),
            Step::Echo(..) => {}
            Step::Piece(piece, _) => self.piece(piece, out),
            Step::End(ending) => self.finish(&ending, out),
            Step::Failed(error) => {
                let mut body = error.body(Flavour::Anthropic);
                body["request_id"] = self.request_id.clone().into();
                out.named("error", &body);
            }
        }
        // Thinking that the client does not read produces no events.
        if out.as_str().len() == before && self.told.elapsed() >= KEEP_ALIVE {
            self.ping(out);
        }
        if out.as_str().len() > before {
            self.told = Instant::now();
        }
    }

    fn end(&mut self, _: &mut Events) {}
}

/// A block under construction.
enum Block {
    Thinking(String),
    Text(String),
    Call { id: String, name: String, arguments: String },
}

/// Makes one object from an answer.
pub struct MessageFold {
    model: String,
    shows_thinking: bool,
    blocks: Vec<Block>,
    ending: Option<Ending>,
}

impl MessageFold {
    /// A message. `shows_thinking`: whether the client reads the model's thinking, or only learns that it thinks.
    pub fn new(model: String, shows_thinking: bool) -> Self {
        MessageFold { model, shows_thinking, blocks: Vec::new(), ending: None }
    }

    fn piece(&mut self, piece: Piece) {
        match (piece, self.blocks.last_mut()) {
            (Piece::Text(more), Some(Block::Text(text))) | (Piece::Thinking(more), Some(Block::Thinking(text))) => {
                *text += &more;
            }
            (Piece::Text(text), _) => self.blocks.push(Block::Text(text)),
            (Piece::Thinking(text), _) => self.blocks.push(Block::Thinking(text)),
            (Piece::Call { id, name, .. }, _) => {
                self.blocks.push(Block::Call { id, name, arguments: String::new() });
            }
            (Piece::Arguments { index, delta }, _) => {
                let call = |block| match block {
                    &mut Block::Call { ref mut arguments, .. } => Some(arguments),
                    _ => None,
                };
                if let Some(arguments) = self.blocks.iter_mut().filter_map(call).nth(index) {
                    *arguments += &delta;
                }
            }
        }
    }

    fn block(&self, block: &Block) -> Value {
        match block {
            Block::Text(text) => json!({"type": "text", "text": text}),
            Block::Thinking(text) => {
                let thinking = if self.shows_thinking { text } else { "" };
                json!({"type": "thinking", "thinking": thinking, "signature": SIGNATURE})
            }
            Block::Call { id, name, arguments } => {
                json!({"type": "tool_use", "id": id, "name": name, "input": arguments::object(arguments)})
            }
        }
    }
}

impl Fold for MessageFold {
    fn step(&mut self, _: usize, step: Step) -> Result<(), ApiError> {
        match step {
            Step::Waiting(_) | Step::Echo(..) => {}
            Step::Piece(piece, _) => self.piece(piece),
            Step::End(ending) => self.ending = Some(ending),
            Step::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Value {
        let content = self.blocks.iter().map(|block| self.block(block)).collect();
        let why = self.ending.as_ref().map(|ending| &ending.why);
        let tokens = self.ending.as_ref().map(|ending| ending.usage).unwrap_or_default();
        message(&new_id("msg_"), &self.model, content, why, &tokens)
    }
}

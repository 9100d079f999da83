//! Answers as response objects and their events.
//!
//! One machine makes both: it keeps the items of the response, and records an event for each change. A stream sends the events. A
//! whole object is the final state of the machine, so both have the same contents.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sluice_dialect::Piece;

use super::item::{Item, Kind, Names, Status};
use super::store::{Record, ResponseStore};
use crate::answer::{Ending, Step, TokenLogprob, Usage, Waiting, Why};
use crate::api::openai::{logprobs, now};
use crate::error::{self, ApiError};
use crate::reply::{Events, Fold, Writer};

/// How an answer is reported.
#[derive(Clone, Debug, Default)]
pub struct Wants {
    /// With log probabilities.
    pub logprobs: bool,
    /// With the opaque text of reasoning.
    pub encrypted: bool,
    /// Thinking as a summary.
    pub summary: bool,
    /// Names of functions that represent `custom` tools.
    pub custom: BTreeSet<String>,
}

/// Where a response is stored when it has ended.
pub struct Keep {
    /// The store.
    pub store: Arc<ResponseStore>,
    /// The request's own items.
    pub input: Vec<Value>,
}

/// Makes a response.
pub struct Maker {
    head: Map<String, Value>,
    wants: Wants,
    keep: Option<Keep>,
    items: Vec<Item>,
    /// The reasoning or message to which text is added.
    current: Option<usize>,
    /// Unfinished calls: their index in the answer, and in `items`.
    calls: Vec<(usize, usize)>,
    /// White space at the beginning of a message, which is used if text follows.
    blank: (String, Vec<TokenLogprob>),
    usage: Option<Usage>,
    events: Vec<(&'static str, Value)>,
    sequence: u64,
}

impl Maker {
    /// A response that has just begun.
    pub fn new(head: Map<String, Value>, wants: Wants, keep: Option<Keep>) -> Self {
        Maker {
            head,
            wants,
            keep,
            items: Vec::new(),
            current: None,
            calls: Vec::new(),
            blank: Default::default(),
            usage: None,
            events: Vec::new(),
            sequence: 0,
        }
    }

    /// The response in its present state.
    pub fn response(&self) -> Value {
        let mut response = self.head.clone();
        let done = self.items.iter().filter(|item| item.status != Status::InProgress);
        let output: Vec<Value> = done.map(|item| item.to_json(self.wants.encrypted)).collect();
        response.insert("output".into(), output.into());
        response.insert("usage".into(), self.usage.as_ref().map_or(Value::Null, usage));
        response.into()
    }

    fn note(&mut self, name: &'static str, mut event: Value) {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.events.push((name, event));
    }

    /// Begins it.
    pub(super) fn begin(&mut self) {
        self.note("response.created", json!({"response": self.response()}));
        self.note("response.in_progress", json!({"response": self.response()}));
    }

    fn waiting(&mut self, waiting: Waiting) {
        self.note("response.in_progress", json!({"response": self.response(), "progress": waiting}));
    }

    fn piece(&mut self, piece: Piece, tokens: Vec<TokenLogprob>) {
        match piece {
            Piece::Thinking(text) => {
                let at = self.part(Kind::reasoning(self.wants.summary));
                self.add(at, &text, &[]);
            }
            Piece::Text(text) => self.text(&text, tokens),
            Piece::Call { index, id, name } => self.call(index, id, name),
            Piece::Arguments { index, delta } => {
                let at = self.calls.iter().find(|(call, _)| *call == index).map(|&(_, at)| at);
                if let Some(at) = at {
                    self.add(at, &delta, &[]);
                }
            }
        }
    }

    fn text(&mut self, text: &str, tokens: Vec<TokenLogprob>) {
        let open = self.current.is_some_and(|at| matches!(self.items[at].kind, Kind::Message { .. }));
        if !open {
            self.blank.0 += text;
            self.blank.1.extend(tokens);
            if self.blank.0.trim().is_empty() {
                return;
            }
            let (text, tokens) = std::mem::take(&mut self.blank);
            let at = self.part(Kind::message());
            return self.add(at, &text, &tokens);
        }
        if let Some(at) = self.current {
            self.add(at, text, &tokens);
        }
    }

    /// The open item of this kind, or a new one.
    fn part(&mut self, kind: Kind) -> usize {
        if let Some(at) = self.current
            && self.items[at].kind.is_like(&kind)
        {
            return at;
        }
        self.close_all(Status::Completed);
        let at = self.open(kind);
        self.current = Some(at);
        at
    }

    fn call(&mut self, index: usize, id: String, name: String) {
        if let Some(at) = self.current.take() {
            self.close(at, Status::Completed);
        }
        // Clients take items one after another. A call whose arguments are incomplete may still get more.
        let items = &self.items;
        let (whole, open) = self.calls.drain(..).partition::<Vec<_>, _>(|&(_, at)| items[at].has_whole_arguments());
        self.calls = open;
        whole.into_iter().for_each(|(_, at)| self.close(at, Status::Completed));
        let kind = match self.wants.custom.contains(&name) {
            true => Kind::Custom { call_id: id, name, arguments: String::new() },
            false => Kind::Function { call_id: id, name, arguments: String::new() },
        };
        let at = self.open(kind);
        self.calls.push((index, at));
    }

    fn open(&mut self, kind: Kind) -> usize {
        // White space between two items belongs to neither.
        self.blank = Default::default();
        let at = self.items.len();
        self.items.push(Item::new(kind));
        let item = self.items[at].to_json(self.wants.encrypted);
        self.note("response.output_item.added", json!({"output_index": at, "item": item}));
        if let Some(Names { added, .. }) = self.items[at].names() {
            let part = self.items[at].part("", &[]);
            self.note_of(at, added, json!({"part": part}));
        }
        at
    }

    /// Records an event of an item.
    fn note_of(&mut self, at: usize, name: &'static str, mut event: Value) {
        event["item_id"] = self.items[at].id.clone().into();
        event["output_index"] = at.into();
        if let Some(names) = self.items[at].names() {
            event[names.index] = 0.into();
        }
        self.note(name, event);
    }

    fn add(&mut self, at: usize, text: &str, tokens: &[TokenLogprob]) {
        if text.is_empty() && tokens.is_empty() {
            return;
        }
        let tokens = if self.wants.logprobs { logprobs::list(tokens) } else { Vec::new() };
        self.items[at].kind.push(text, &tokens);
        if let Some(name) = self.items[at].kind.delta() {
            let mut event = json!({"delta": text});
            if matches!(self.items[at].kind, Kind::Message { .. }) {
                event["logprobs"] = tokens.into();
            }
            self.note_of(at, name, event);
        }
    }

    fn close(&mut self, at: usize, status: Status) {
        self.items[at].status = status;
        for (name, event) in self.items[at].endings() {
            self.note_of(at, name, event);
        }
        let item = self.items[at].to_json(self.wants.encrypted);
        self.note("response.output_item.done", json!({"output_index": at, "item": item}));
    }

    fn close_all(&mut self, status: Status) {
        let current = self.current.take();
        let calls = std::mem::take(&mut self.calls);
        for at in current.into_iter().chain(calls.into_iter().map(|(_, at)| at)) {
            self.close(at, status);
        }
    }

    /// Ends it without an answer, for a request that only says what later ones continue.
    pub(super) fn skip(&mut self) {
        self.finish(true, Usage::default());
    }

    /// The events since the last call.
    pub(super) fn take_events(&mut self) -> impl Iterator<Item = (&'static str, Value)> {
        self.events.drain(..)
    }

    fn end(&mut self, ending: &Ending) {
        let whole = ending.why != Why::Length;
        let status = if whole { Status::Completed } else { Status::Incomplete };
        if self.items.is_empty() {
            // An answer without content has an empty text.
            let (text, tokens) = std::mem::take(&mut self.blank);
            let at = self.part(Kind::message());
            self.add(at, &text, &tokens);
        }
        self.close_all(status);
        self.finish(whole, ending.usage);
    }

    /// The end of the response, all items of which have ended.
    fn finish(&mut self, whole: bool, usage: Usage) {
        self.usage = Some(usage);
        let status = if whole { Status::Completed } else { Status::Incomplete };
        self.head.insert("status".into(), status.word().into());
        let name = match whole {
            true => {
                self.head.insert("completed_at".into(), now().into());
                "response.completed"
            }
            false => {
                self.head.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
                "response.incomplete"
            }
        };
        let response = self.response();
        if let Some(Keep { store, input }) = self.keep.take() {
            store.put(Record { response: response.clone(), input });
        }
        self.note(name, json!({"response": response}));
    }

    fn fail(&mut self, error: &ApiError) {
        self.close_all(Status::Incomplete);
        let code = error.code.unwrap_or(match error.kind {
            error::Kind::Busy => "rate_limit_exceeded",
            error::Kind::Internal | error::Kind::Closing => "server_error",
            _ => "invalid_prompt",
        });
        self.head.insert("status".into(), "failed".into());
        self.head.insert("error".into(), json!({"code": code, "message": error.message}));
        self.note("response.failed", json!({"response": self.response()}));
    }

    /// Takes a step of the answer.
    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Waiting(waiting) => self.waiting(waiting),
            // Only texts that are continued are echoed, which responses are not.
            Step::Echo(..) => {}
            Step::Piece(piece, tokens) => self.piece(piece, tokens),
            Step::End(ending) => self.end(&ending),
            Step::Failed(error) => self.fail(&error),
        }
    }
}

/// `usage` of a response.
pub(super) fn usage(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": usage.thinking},
        "total_tokens": usage.prompt + usage.generated,
    })
}

/// Streams a response.
pub struct ResponsesWriter(Maker);

impl ResponsesWriter {
    /// A stream of the events of `maker`.
    pub fn new(maker: Maker) -> Self {
        ResponsesWriter(maker)
    }

    fn send(&mut self, out: &mut Events) {
        self.0.take_events().for_each(|(name, event)| out.named(name, &event));
    }
}

impl Writer for ResponsesWriter {
    fn begin(&mut self, out: &mut Events) {
        self.0.begin();
        self.send(out);
    }

    fn step(&mut self, _: usize, step: Step, out: &mut Events) {
        self.0.step(step);
        self.send(out);
    }

    fn end(&mut self, out: &mut Events) {
        // Open Responses requires this word as the last event.
        out.done();
    }
}

/// Makes one object from an answer.
pub struct ResponsesFold(Maker);

impl ResponsesFold {
    /// An object of `maker`.
    pub fn new(maker: Maker) -> Self {
        ResponsesFold(maker)
    }
}

impl Fold for ResponsesFold {
    fn step(&mut self, _: usize, step: Step) -> Result<(), ApiError> {
        if let Step::Failed(error) = step {
            return Err(error);
        }
        self.0.step(step);
        self.0.events.clear();
        Ok(())
    }

    fn finish(self: Box<Self>) -> Value {
        self.0.response()
    }
}

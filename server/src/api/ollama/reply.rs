//! Answers as Ollama's objects: one per line, or one for the whole answer.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use sluice_dialect::Piece;
use tokio::time::Instant;

use crate::answer::{Ending, KEEP_ALIVE, Step, Waiting, Why};
use crate::api::arguments;
use crate::app::App;
use crate::ask::Ask;
use crate::clock::{now, rfc3339};
use crate::error::{ApiError, Flavour};
use crate::reply::{Events, Fold, Writer};

/// The field that contains an object's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// In a message.
    Chat,
    /// By itself.
    Generate,
}

/// The fields that all objects of a response share, and the times of events.
pub struct Head {
    model: String,
    shape: Shape,
    begun: Instant,
    loaded: Option<Instant>,
    first: Option<Instant>,
}

/// A call of a tool.
struct Call {
    index: usize,
    id: String,
    name: String,
    arguments: String,
}

impl Call {
    fn object(&self) -> Value {
        let arguments = arguments::object(&self.arguments);
        json!({"id": self.id, "function": {"index": self.index, "name": self.name, "arguments": arguments}})
    }
}

impl Head {
    /// A response to a request that has just arrived. `model`: the name that the client gave.
    pub fn new(model: String, shape: Shape) -> Self {
        Head { model, shape, begun: Instant::now(), loaded: None, first: None }
    }

    /// The name that the client gave.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Sets the time at which the model was loaded.
    pub fn loaded(&mut self, at: Instant) {
        self.loaded.get_or_insert(at);
    }

    /// Records the times of steps.
    fn note(&mut self, step: &Step) {
        let now = Instant::now();
        if !matches!(step, Step::Waiting(Waiting::Loading)) {
            self.loaded(now);
        }
        if matches!(step, Step::Piece(..)) {
            self.first.get_or_insert(now);
        }
    }

    fn object(&self, content: &str, thinking: &str, calls: &[Call]) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("model".into(), self.model.clone().into());
        object.insert("created_at".into(), rfc3339(now()).into());
        let mut inner = Map::new();
        match self.shape {
            Shape::Chat => inner.extend([("role".into(), "assistant".into()), ("content".into(), content.into())]),
            Shape::Generate => inner.extend([("response".into(), content.into())]),
        }
        if !thinking.is_empty() {
            inner.insert("thinking".into(), thinking.into());
        }
        if !calls.is_empty() {
            inner.insert("tool_calls".into(), calls.iter().map(Call::object).collect());
        }
        match self.shape {
            Shape::Chat => object.extend([("message".into(), inner.into())]),
            Shape::Generate => object.extend(inner),
        }
        object.insert("done".into(), false.into());
        object
    }

    /// The object for a request without an answer.
    pub fn nothing(&self, why: &str) -> Value {
        let mut object = self.object("", "", &[]);
        object.insert("done".into(), true.into());
        object.insert("done_reason".into(), why.into());
        object.into()
    }

    /// Turns an object into the last one. Times are in nanoseconds.
    fn finish(&self, object: &mut Map<String, Value>, ending: &Ending) {
        let end = Instant::now();
        let loaded = self.loaded.unwrap_or(end);
        let first = self.first.unwrap_or(end);
        let between = |from: Instant, to: Instant| u64::try_from((to - from).as_nanos()).unwrap_or(u64::MAX);
        let reason = match ending.why {
            Why::Length => "length",
            Why::Done | Why::Calls | Why::Stop(_) => "stop",
        };
        let fields: [(&str, Value); 8] = [
            ("done", true.into()),
            ("done_reason", reason.into()),
            ("total_duration", between(self.begun, end).into()),
            ("load_duration", between(self.begun, loaded).into()),
            ("prompt_eval_count", ending.usage.prompt.into()),
            ("prompt_eval_duration", between(loaded, first).into()),
            ("eval_count", ending.usage.generated.into()),
            ("eval_duration", between(first, end).into()),
        ];
        object.extend(fields.map(|(name, value)| (name.to_owned(), value)));
    }
}

/// The data for `context` of `/api/generate`.
pub struct Memory {
    app: Arc<App>,
    ask: Ask,
    text: String,
}

impl Memory {
    /// The memory of a request.
    pub fn new(app: &Arc<App>, ask: Ask) -> Self {
        Memory { app: Arc::clone(app), ask, text: String::new() }
    }

    /// The tokens of the prompt and of the answer's text, as in Ollama: without the model's thinking.
    fn tokens(&self) -> Option<Vec<u32>> {
        let served = self.app.models.find(&self.ask.model).ok()?.peek()?;
        let mut ids = served.encode(&self.ask).ok()?.ids;
        ids.extend(served.tokenizer().ok()?.encode(&self.text, false).ok()?);
        Some(ids)
    }
}

/// The end of an answer: the last object.
fn last(head: &Head, memory: Option<&Memory>, mut object: Map<String, Value>, ending: &Ending) -> Value {
    if let Some(tokens) = memory.and_then(Memory::tokens) {
        object.insert("context".into(), tokens.into());
    }
    head.finish(&mut object, ending);
    object.into()
}

/// Streams objects.
pub struct OllamaWriter {
    head: Head,
    memory: Option<Memory>,
    /// A call whose arguments may be incomplete: clients get only whole calls.
    call: Option<Call>,
    told: Instant,
}

impl OllamaWriter {
    /// A stream.
    pub fn new(head: Head, memory: Option<Memory>) -> Self {
        OllamaWriter { head, memory, call: None, told: Instant::now() }
    }

    fn send(&self, content: &str, thinking: &str, calls: &[Call], out: &mut Events) {
        out.line(&self.head.object(content, thinking, calls));
    }

    fn send_call(&mut self, out: &mut Events) {
        if let Some(call) = self.call.take() {
            self.send("", "", &[call], out);
        }
    }

    fn piece(&mut self, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Arguments { delta, .. } => {
                if let Some(call) = &mut self.call {
                    call.arguments += &delta;
                }
                return;
            }
            _ => self.send_call(out),
        }
        match piece {
            Piece::Text(text) => {
                self.send(&text, "", &[], out);
                if let Some(memory) = &mut self.memory {
                    memory.text += &text;
                }
            }
            Piece::Thinking(text) => self.send("", &text, &[], out),
            Piece::Call { index, id, name } => self.call = Some(Call { index, id, name, arguments: String::new() }),
            Piece::Arguments { .. } => {}
        }
    }
}

impl Writer for OllamaWriter {
    fn begin(&mut self, _: &mut Events) {}

    fn step(&mut self, _: usize, step: Step, out: &mut Events) {
        let before = out.as_str().len();
        self.head.note(&step);
        match step {
            Step::Waiting(_) => self.send("", "", &[], out),
            Step::Echo(..) => {}
            Step::Piece(piece, _) => self.piece(piece, out),
            Step::End(ending) => {
                self.send_call(out);
                let object = self.head.object("", "", &[]);
                out.line(&last(&self.head, self.memory.as_ref(), object, &ending));
            }
            Step::Failed(error) => out.line(&error.body(Flavour::Ollama)),
        }
        // Arguments may take a long time.
        if out.as_str().len() == before && self.told.elapsed() >= KEEP_ALIVE {
            self.send("", "", &[], out);
        }
        if out.as_str().len() > before {
            self.told = Instant::now();
        }
    }

    fn end(&mut self, _: &mut Events) {}
}

/// Makes one object.
pub struct OllamaFold {
    head: Head,
    memory: Option<Memory>,
    text: String,
    thinking: String,
    calls: Vec<Call>,
    ending: Option<Ending>,
}

impl OllamaFold {
    /// One object.
    pub fn new(head: Head, memory: Option<Memory>) -> Self {
        let (text, thinking) = (String::new(), String::new());
        OllamaFold { head, memory, text, thinking, calls: Vec::new(), ending: None }
    }
}

impl Fold for OllamaFold {
    fn step(&mut self, _: usize, step: Step) -> Result<(), ApiError> {
        self.head.note(&step);
        match step {
            Step::Waiting(_) | Step::Echo(..) => {}
            Step::Piece(Piece::Text(text), _) => self.text += &text,
            Step::Piece(Piece::Thinking(text), _) => self.thinking += &text,
            Step::Piece(Piece::Call { index, id, name }, _) => {
                self.calls.push(Call { index, id, name, arguments: String::new() });
            }
            Step::Piece(Piece::Arguments { index, delta }, _) => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.arguments += &delta;
                }
            }
            Step::End(ending) => self.ending = Some(ending),
            Step::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Value {
        let object = self.head.object(&self.text, &self.thinking, &self.calls);
        if let Some(memory) = &mut self.memory {
            memory.text = std::mem::take(&mut self.text);
        }
        match &self.ending {
            Some(ending) => last(&self.head, self.memory.as_ref(), object, ending),
            None => object.into(),
        }
    }
}

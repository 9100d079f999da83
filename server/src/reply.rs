//! Responses: streams of events, and whole objects, before which white space keeps the connection alive.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, Response};
use futures_util::stream;
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::answer::{KEEP_ALIVE, Step};
use crate::error::{ApiError, Flavour, Kind};
use crate::request_id;
use crate::run::Run;

/// How events are written to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Server-sent events (WHATWG HTML, 9.2).
    Events,
    /// JSON objects, one per line.
    Lines,
}

/// Events that are sent to the client next.
#[derive(Debug, Default)]
pub struct Events(String);

impl Events {
    /// An event without a name.
    pub fn data(&mut self, data: &impl Serialize) {
        self.0 += "data: ";
        self.json(data);
        self.0 += "\n\n";
    }

    /// An event with a name.
    pub fn named(&mut self, name: &str, data: &impl Serialize) {
        self.0 += "event: ";
        self.0 += name;
        self.0.push('\n');
        self.data(data);
    }

    /// The last event of OpenAI's streams.
    pub fn done(&mut self) {
        self.0 += "data: [DONE]\n\n";
    }

    /// A line of its own.
    pub fn line(&mut self, data: &impl Serialize) {
        self.json(data);
        self.0.push('\n');
    }

    /// The text so far.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn json(&mut self, data: &impl Serialize) {
        // Our objects have only string keys, so they can always be written.
        self.0 += &serde_json::to_string(data).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    }
}

/// Turns the steps of answers into the events of an API.
pub trait Writer: Send + 'static {
    /// The events before everything else.
    fn begin(&mut self, out: &mut Events);
    /// The events once the number of the prompt's tokens is known: before all pieces, but possibly after some waiting.
    fn started(&mut self, _prompt: usize, _out: &mut Events) {}
    /// The events of a step of answer `index`.
    fn step(&mut self, index: usize, step: Step, out: &mut Events);
    /// The events after everything else.
    fn end(&mut self, out: &mut Events);
}

/// Makes one object from the steps of answers.
pub trait Fold: Send + 'static {
    /// Takes a step of answer `index`.
    ///
    /// # Errors
    /// The error of an answer that failed.
    fn step(&mut self, index: usize, step: Step) -> Result<(), ApiError>;
    /// The object.
    fn finish(self: Box<Self>) -> Value;
}

/// A streamed response.
pub fn streamed<W: Writer>(run: Run, writer: W, framing: Framing) -> Response<Body> {
    let queued = run.queue_position();
    let state = Some(Streaming { run, writer, begun: false, started: false });
    let next = |state: Option<Streaming<W>>| async { state?.next().await };
    let mut response = Response::new(Body::from_stream(stream::unfold(state, next)));
    let kind = match framing {
        Framing::Events => "text/event-stream",
        Framing::Lines => "application/x-ndjson",
    };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Otherwise proxies would buffer events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert("x-queue-position", queued.into());
    response
}

/// A stream that is being written.
struct Streaming<W> {
    run: Run,
    writer: W,
    begun: bool,
    started: bool,
}

impl<W: Writer> Streaming<W> {
    /// The next bytes, and the rest of the stream.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Option<Self>)> {
        let mut out = Events::default();
        if !std::mem::replace(&mut self.begun, true) {
            self.writer.begin(&mut out);
            self.note_start(&mut out);
        }
        // Some steps have no events, and an empty piece would end the body.
        while out.0.is_empty() {
            let Some((index, step)) = self.run.next().await else {
                self.writer.end(&mut out);
                return (!out.0.is_empty()).then(|| (Ok(Bytes::from(out.0)), None));
            };
            self.note_start(&mut out);
            if let Step::Failed(error) = &step {
                self.run.note(error);
            }
            self.writer.step(index, step, &mut out);
        }
        Some((Ok(Bytes::from(out.0)), Some(self)))
    }

    fn note_start(&mut self, out: &mut Events) {
        if let Some(prompt) = self.run.prompt_tokens().filter(|_| !self.started) {
            self.started = true;
            self.writer.started(prompt, out);
        }
    }
}

/// A response that is one object. If it takes long, white space is sent before it, so that nothing in between closes an idle
/// connection; the status is then 200, whatever follows: a request that is wrong has been refused by then ([`Run::begin`]).
pub async fn whole(mut run: Run, fold: impl Fold, flavour: Flavour) -> Response<Body> {
    let queued = run.queue_position();
    let mut fold: Box<dyn Fold> = Box::new(fold);
    let deadline = Instant::now() + KEEP_ALIVE;
    let mut response = match timeout_at(deadline, collect(&mut run, &mut fold)).await {
        Ok(Ok(())) => json_response(&fold.finish()),
        Ok(Err(error)) => return error.response(flavour),
        Err(_) => kept_alive(run, fold, flavour),
    };
    response.headers_mut().insert("x-queue-position", queued.into());
    response
}

fn kept_alive(run: Run, fold: Box<dyn Fold>, flavour: Flavour) -> Response<Body> {
    let state = Some((run, fold));
    let next = move |state: Option<(Run, Box<dyn Fold>)>| async move {
        let (mut run, mut fold) = state?;
        let deadline = Instant::now() + KEEP_ALIVE;
        let text = match timeout_at(deadline, collect(&mut run, &mut fold)).await {
            Err(_) => return Some((Ok::<_, Infallible>(Bytes::from_static(b" ")), Some((run, fold)))),
            Ok(Ok(())) => fold.finish().to_string(),
            Ok(Err(error)) => {
                run.note(&error);
                request_id::within(run.id(), || error.body(flavour)).to_string()
            }
        };
        Some((Ok(Bytes::from(text)), None))
    };
    let first = stream::once(async { Ok::<_, Infallible>(Bytes::from_static(b" ")) });
    let body = Body::from_stream(futures_util::StreamExt::chain(first, stream::unfold(state, next)));
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn collect(run: &mut Run, fold: &mut Box<dyn Fold>) -> Result<(), ApiError> {
    while let Some((index, step)) = run.next().await {
        fold.step(index, step)?;
    }
    Ok(())
}

/// A response that is complete at once.
pub fn json_response(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = Response::new(Body::from(bytes));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => ApiError::new(Kind::Internal, error.to_string()).response(Flavour::OpenAi),
    }
}

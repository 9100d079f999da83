//! `/v1/responses` over a WebSocket: a client that makes many responses keeps one connection, and continues the last response without having
//! it stored. Each message of the client is a request with the type `response.create`; each message to it is an event, as in a stream.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout};

use super::handlers::{blocking, renamed};
use super::reply::{Keep, Maker};
use super::request::{Prepared, ResponsesRequest};
use crate::answer::Step;
use crate::api::body::{parsed, read};
use crate::app::{App, SOCKETS};
use crate::error::{ApiError, Flavour, Kind};
use crate::request_id;
use crate::run::Run;

/// Most requests that wait while a response is made. Further ones are refused.
const WAITING: usize = 4;
/// Most requests that wait to be answered or refused. The connection of a client that sends more is closed.
const QUEUED: usize = 1024;
/// Longest id of a response, with room to spare. Of a request that is refused, no longer one is kept.
const LONGEST_ID: usize = 128;
/// How often an idle client is asked whether it is there, and how long it may say nothing at all.
const ASK: Duration = Duration::from_secs(30);
const SILENT: Duration = Duration::from_secs(120);
/// How long the end of a connection may take. The server's own end waits longer than that.
const PARTING: Duration = Duration::from_secs(1);

/// The path of the requests, for errors.
const PATH: &str = "/v1/responses";

/// Opens a connection.
pub async fn open(
    State(app): State<Arc<App>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response<Body> {
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(rejection) => {
            let message = format!("GET opens a WebSocket here, and POST makes a response: {}", rejection.body_text());
            return ApiError::invalid(message).response(Flavour::OpenAi);
        }
    };
    // Nothing would be answered, and the end of the server waits for all places.
    if let Err(closing) = app.open() {
        return closing.response(Flavour::OpenAi);
    }
    let Ok(place) = Arc::clone(&app.sockets).try_acquire_owned() else {
        let message = format!("{SOCKETS} WebSockets are open already: close some, or send the request by POST");
        return ApiError::new(Kind::Busy, message).code("rate_limit_exceeded").response(Flavour::OpenAi);
    };
    let most = app.options.max_body;
    upgrade.max_message_size(most).max_frame_size(most).on_upgrade(move |socket| async move {
        Session::new(app, socket).serve().await;
        drop(place);
    })
}

/// The connection has ended.
struct Gone;

/// The response that came last.
struct Last {
    id: String,
    /// All items of the conversation up to its end.
    items: Vec<Value>,
    /// Whether it can be found by others too.
    stored: bool,
}

/// A request that has been checked.
struct Begun {
    /// `None`: nothing is to be generated.
    run: Option<Run>,
    maker: Maker,
    /// The items of the conversation, without the response's own.
    items: Vec<Value>,
    stored: bool,
}

/// What a client has sent.
enum Sent {
    Request(Bytes),
    /// A request beyond those that may wait. Only the id of the response that it continues is kept; `None`: it cannot be read.
    Surplus(Option<Value>),
}

/// What is kept of such a request.
#[derive(Deserialize)]
struct Continuing {
    #[serde(default)]
    previous_response_id: Value,
}

struct Session {
    app: Arc<App>,
    connection: Connection,
    last: Option<Last>,
}

impl Session {
    fn new(app: Arc<App>, socket: WebSocket) -> Self {
        Session { app, connection: Connection::new(socket), last: None }
    }

    async fn serve(mut self) {
        while let Ok(sent) = self.connection.next(&self.app).await {
            if request_id::with(request_id::new(), self.answer(sent)).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&mut self, sent: Sent) -> Result<(), Gone> {
        let Session { app, connection, last } = self;
        let begun = match sent {
            Sent::Request(request) => connection.during(begin(app, last, request)).await?,
            Sent::Surplus(continued) => Err(surplus(last, &continued)),
        };
        match begun {
            Ok(begun) => {
                self.app.metrics.response(200);
                self.make(begun).await
            }
            Err(error) => {
                self.app.metrics.response(error.kind.status().as_u16());
                self.connection.send(&error_event(&error)).await
            }
        }
    }

    /// Sends the events of a response.
    async fn make(&mut self, begun: Begun) -> Result<(), Gone> {
        let Begun { mut run, mut maker, mut items, stored } = begun;
        maker.begin();
        if run.is_none() {
            maker.skip();
        }
        self.send_events(&mut maker).await?;
        while let Some(going) = &mut run {
            let Some((_, step)) = self.connection.during(going.next()).await? else { break };
            if let Step::Failed(error) = &step {
                going.note(error);
            }
            maker.step(step);
            self.send_events(&mut maker).await?;
        }
        let response = maker.response();
        if let (Some(id), Some(output), true) =
            (response["id"].as_str(), response["output"].as_array(), response["status"] != "failed")
        {
            items.extend(output.iter().cloned());
            self.last = Some(Last { id: id.to_owned(), items, stored });
        }
        Ok(())
    }

    async fn send_events(&mut self, maker: &mut Maker) -> Result<(), Gone> {
        for (_, event) in maker.take_events() {
            self.connection.send(&event).await?;
        }
        Ok(())
    }
}

/// Checks a request, and begins to generate its response.
async fn begin(app: &Arc<App>, last: &mut Option<Last>, request: Bytes) -> Result<Begun, ApiError> {
    app.open()?;
    let request: Value = match parsed(request, PATH.to_owned()).await {
        Ok(request) => request,
        Err(error) => {
            *last = None;
            return Err(error);
        }
    };
    // If anything fails from here on, the response that it continues is gone: a client must not go on as if the failed turn had not been.
    let continued = last.take_if(|last| request["previous_response_id"] == last.id);
    if request["type"] != "response.create" {
        let message = format!("`type` is {}, it must be response.create", request["type"]);
        return Err(ApiError::field("type", message).code("invalid_value"));
    }
    let generates = request["generate"] != false;
    let request: ResponsesRequest = read(request)?;
    let stored = request.store.unwrap_or(true);
    let model = app.models.find(request.model.as_deref().unwrap_or_default())?.id.clone();
    if stored && continued.as_ref().is_some_and(|last| !last.stored) {
        let message = "`store` must be false, as it was for the response that this one continues";
        return Err(ApiError::field("store", message).code("invalid_value"));
    }
    let store = Arc::clone(&app.responses);
    let prepared = blocking(move || {
        let history = match continued {
            Some(last) => last.items,
            None => store.history_of(request.previous_response_id.as_deref())?,
        };
        Ok((request.prepare(model, &history)?, history))
    });
    let (Prepared { ask, head, input, wants }, mut items) = prepared.await?;
    let run = if generates { Some(Run::begin(app, ask).await.map_err(renamed)?) } else { None };
    items.extend(input.iter().cloned());
    let keep = stored.then(|| Keep { store: Arc::clone(&app.responses), input });
    Ok(Begun { run, maker: Maker::new(head, wants, keep), items, stored })
}

/// The id of the response that a request continues, null if it continues none; `None` if it cannot be read.
async fn continued_by(request: Bytes) -> Option<Value> {
    let Continuing { previous_response_id: id } = parsed(request, PATH.to_owned()).await.ok()?;
    Some(if id.as_str().is_some_and(|id| id.len() <= LONGEST_ID) { id } else { Value::Null })
}

/// Refuses a request beyond those that may wait. As with any other that fails, the response that it continues is gone.
fn surplus(last: &mut Option<Last>, continued: &Option<Value>) -> ApiError {
    last.take_if(|last| continued.as_ref().is_none_or(|id| *id == last.id));
    let message =
        format!("{WAITING} requests of this connection were waiting already: send it again, once a response has ended");
    ApiError::new(Kind::Busy, message).code("rate_limit_exceeded")
}

/// A connection to a client.
struct Connection {
    socket: WebSocket,
    waiting: VecDeque<Sent>,
    /// When something came from the client, and when it was asked for a sign of life.
    heard: Instant,
    asked: Instant,
}

impl Connection {
    fn new(socket: WebSocket) -> Self {
        let now = Instant::now();
        Connection { socket, waiting: VecDeque::new(), heard: now, asked: now }
    }

    /// The next request.
    async fn next(&mut self, app: &App) -> Result<Sent, Gone> {
        // While a response was made, the client had no reason to say anything.
        self.heard = Instant::now();
        loop {
            if let Some(sent) = self.waiting.pop_front() {
                return Ok(sent);
            }
            let look = (self.heard.max(self.asked) + ASK).min(self.heard + SILENT);
            tokio::select! {
                received = self.socket.recv() => self.take(received).await?,
                () = app.ending() => return self.close(close_code::AWAY, "the server is about to end").await,
                () = sleep_until(look) => self.look().await?,
            }
        }
    }

    /// Asks an idle client for a sign of life, or gives it up.
    async fn look(&mut self) -> Result<(), Gone> {
        if self.heard.elapsed() >= SILENT {
            return self.close(close_code::POLICY, "the client has not answered").await;
        }
        self.asked = Instant::now();
        self.socket.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)
    }

    /// Waits for some work. What the client says meanwhile is read, so that its pings are answered and its end is noticed.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Gone> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                received = self.socket.recv() => self.take(received).await?,
            }
        }
    }

    /// Takes what has come from the client.
    async fn take(&mut self, received: Option<Result<Message, axum::Error>>) -> Result<(), Gone> {
        self.heard = Instant::now();
        match received {
            Some(Ok(Message::Text(text))) => self.queue(text.into()).await,
            Some(Ok(Message::Binary(bytes))) => self.queue(bytes).await,
            // The library answers them.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
            Some(Ok(Message::Close(_))) => {
                let _ = timeout(PARTING, self.read_to_end()).await;
                Err(Gone)
            }
            Some(Err(_)) | None => Err(Gone),
        }
    }

    /// Puts a request behind those that wait. One that is too many is refused only when it is its turn: the error does not say which request it
    /// belongs to, so clients tell by the order.
    async fn queue(&mut self, request: Bytes) -> Result<(), Gone> {
        let sent = match self.waiting.len() {
            ..WAITING => Sent::Request(request),
            WAITING..QUEUED => Sent::Surplus(continued_by(request).await),
            _ => return self.close(close_code::POLICY, "too many requests are waiting").await,
        };
        self.waiting.push_back(sent);
        Ok(())
    }

    async fn send(&mut self, event: &Value) -> Result<(), Gone> {
        self.socket.send(Message::Text(event.to_string().into())).await.map_err(|_| Gone)
    }

    async fn close<T>(&mut self, code: u16, reason: &'static str) -> Result<T, Gone> {
        let farewell = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
        let parting = async {
            if self.socket.send(farewell).await.is_ok() {
                self.read_to_end().await;
            }
        };
        // If it cannot be said, the connection ends all the same.
        let _ = timeout(PARTING, parting).await;
        Err(Gone)
    }

    /// Ends a connection in order, once one of both has said so. The library sends the answer to a client's last message when it is asked for
    /// the next one; and what was sent last could be lost if something were left to read.
    async fn read_to_end(&mut self) {
        while let Some(Ok(_)) = self.socket.recv().await {}
    }
}

/// The event for a request that is refused.
fn error_event(error: &ApiError) -> Value {
    let mut body = error.body(Flavour::OpenAi)["error"].take();
    if body["code"].is_null() {
        body["code"] = body["type"].clone();
    }
    json!({"type": "error", "status": error.kind.status().as_u16(), "error": body})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_too_many_takes_what_it_continues_with_it() {
        let named = r#"{"type": "response.create", "previous_response_id": "resp_1", "input": [1]}"#;
        let none = r#"{"type": "response.create"}"#;
        let long = format!(r#"{{"previous_response_id": "{}"}}"#, "x".repeat(LONGEST_ID + 1));
        for (request, stays) in [(named, false), ("{", false), (none, true), (&long, true)] {
            let mut last = Some(Last { id: "resp_1".into(), items: Vec::new(), stored: false });
            let continued = continued_by(Bytes::copy_from_slice(request.as_bytes())).await;
            assert_eq!(surplus(&mut last, &continued).kind, Kind::Busy);
            assert_eq!(last.is_some(), stays, "{request}");
        }
    }

    #[test]
    fn an_error_always_has_a_code() {
        let event = error_event(&ApiError::field("input", "`input` is empty"));
        assert_eq!((&event["status"], &event["error"]["code"]), (&json!(400), &json!("invalid_request_error")));
        let known = error_event(&ApiError::invalid("x").code("previous_response_not_found"));
        assert_eq!(known["error"]["code"], "previous_response_not_found");
    }
}

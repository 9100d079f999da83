//! `/v1/responses` over a WebSocket: a client that makes many responses keeps one connection, and continues the last response without having
//! it stored. Each message of the client is a request with the type `response.create`; each message to it is an event, as in a stream.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::Response;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::handlers::{blocking, renamed};
use super::reply::{Keep, Maker};
use super::request::{Prepared, ResponsesRequest};
use crate::answer::Step;
use crate::api::body::{parsed, read};
use crate::app::{App, SOCKETS};
use crate::error::{ApiError, Flavour, Kind};
use crate::request_id;
use crate::run::Run;

/// Most requests that wait while a response is made. More are not read from the connection.
const WAITING: usize = 4;
/// How often an idle connection looks whether the server is about to end.
const LOOK: Duration = Duration::from_secs(1);
/// How often an idle client is asked whether it is there, and how long it may say nothing at all.
const ASK: Duration = Duration::from_secs(30);
const SILENT: Duration = Duration::from_secs(120);

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

struct Session {
    app: Arc<App>,
    socket: WebSocket,
    last: Option<Last>,
    waiting: VecDeque<Bytes>,
    /// When something came from the client, and when it was asked for a sign of life.
    heard: Instant,
    asked: Instant,
}

impl Session {
    fn new(app: Arc<App>, socket: WebSocket) -> Self {
        let now = Instant::now();
        Session { app, socket, last: None, waiting: VecDeque::new(), heard: now, asked: now }
    }

    async fn serve(mut self) {
        while let Ok(request) = self.next().await {
            if request_id::with(request_id::new(), self.answer(request)).await.is_err() {
                return;
            }
        }
    }

    /// The next request.
    async fn next(&mut self) -> Result<Bytes, Gone> {
        loop {
            if let Some(request) = self.waiting.pop_front() {
                return Ok(request);
            }
            match timeout(LOOK, self.socket.recv()).await {
                Ok(received) => self.take(received)?,
                Err(_) if self.app.closing.load(Ordering::Relaxed) => {
                    return self.close(close_code::AWAY, "the server is about to end").await;
                }
                Err(_) if self.heard.elapsed() > SILENT => {
                    return self.close(close_code::POLICY, "the client has not answered").await;
                }
                Err(_) if self.heard.elapsed().min(self.asked.elapsed()) > ASK => {
                    self.asked = Instant::now();
                    self.socket.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)?;
                }
                Err(_) => {}
            }
        }
    }

    /// Takes what has come from the client.
    fn take(&mut self, received: Option<Result<Message, axum::Error>>) -> Result<(), Gone> {
        self.heard = Instant::now();
        match received {
            Some(Ok(Message::Text(text))) => self.waiting.push_back(text.into()),
            Some(Ok(Message::Binary(bytes))) => self.waiting.push_back(bytes),
            // The library answers them.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
        }
        Ok(())
    }

    async fn close<T>(&mut self, code: u16, reason: &'static str) -> Result<T, Gone> {
        // If it cannot be said, the connection ends all the same.
        let _ = self.socket.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await;
        Err(Gone)
    }

    async fn answer(&mut self, request: Bytes) -> Result<(), Gone> {
        match self.begin(request).await {
            Ok(begun) => {
                self.app.metrics.response(200);
                self.make(begun).await
            }
            Err(error) => {
                self.app.metrics.response(error.kind.status().as_u16());
                self.send(&error_event(&error)).await
            }
        }
    }

    async fn begin(&mut self, request: Bytes) -> Result<Begun, ApiError> {
        self.app.open()?;
        let request: Value = parsed(request, "/v1/responses".to_owned()).await?;
        if request["type"] != "response.create" {
            let message = format!("`type` is {}, it must be response.create", request["type"]);
            return Err(ApiError::field("type", message).code("invalid_value"));
        }
        let generates = request["generate"] != false;
        let request: ResponsesRequest = read(request)?;
        let stored = request.store.unwrap_or(true);
        let model = self.app.models.find(request.model.as_deref().unwrap_or_default())?.id.clone();
        // If this fails, the response that it continues is gone: a client must not go on as if the failed turn had not been.
        let continued = self.last.take_if(|last| request.previous_response_id.as_ref() == Some(&last.id));
        if stored && continued.as_ref().is_some_and(|last| !last.stored) {
            let message = "`store` must be false, as it was for the response that this one continues";
            return Err(ApiError::field("store", message).code("invalid_value"));
        }
        let store = Arc::clone(&self.app.responses);
        let prepared = blocking(move || {
            let history = match continued {
                Some(last) => last.items,
                None => store.history_of(request.previous_response_id.as_deref())?,
            };
            Ok((request.prepare(model, &history)?, history))
        });
        let (Prepared { ask, head, input, wants }, mut items) = prepared.await?;
        let run = if generates { Some(Run::begin(&self.app, ask).await.map_err(renamed)?) } else { None };
        items.extend(input.iter().cloned());
        let keep = stored.then(|| Keep { store: Arc::clone(&self.app.responses), input });
        Ok(Begun { run, maker: Maker::new(head, wants, keep), items, stored })
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
            tokio::select! {
                step = going.next() => {
                    let Some((_, step)) = step else { break };
                    if let Step::Failed(error) = &step {
                        going.note(error);
                    }
                    maker.step(step);
                    self.send_events(&mut maker).await?;
                }
                received = self.socket.recv(), if self.waiting.len() < WAITING => self.take(received)?,
            }
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
            self.send(&event).await?;
        }
        Ok(())
    }

    async fn send(&mut self, event: &Value) -> Result<(), Gone> {
        self.socket.send(Message::Text(event.to_string().into())).await.map_err(|_| Gone)
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

    #[test]
    fn an_error_always_has_a_code() {
        let event = error_event(&ApiError::field("input", "`input` is empty"));
        assert_eq!((&event["status"], &event["error"]["code"]), (&json!(400), &json!("invalid_request_error")));
        let known = error_event(&ApiError::invalid("x").code("previous_response_not_found"));
        assert_eq!(known["error"]["code"], "previous_response_not_found");
    }
}

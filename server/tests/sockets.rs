//! `/v1/responses` over a WebSocket, with a real, small model.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use sluice_model::engine::EngineOptions;
use sluice_server::{Server, ServerOptions};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::common::{model, start};

/// Starts a server that others can reach, until the test ends.
async fn listen() -> SocketAddr {
    let server = bind().await;
    let address = server.address().unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    address
}

async fn bind() -> Server {
    let engine = EngineOptions { threads: Some(1), sequences: Some(2), ..EngineOptions::default() };
    let address = "127.0.0.1:0".parse().unwrap();
    let grace = Duration::ZERO;
    let options = ServerOptions { files: vec![model().to_owned()], engine, address, grace, ..ServerOptions::default() };
    Server::bind(options, false).await.unwrap()
}

/// The types of the events after which the next request is answered.
const LAST: [&str; 4] = ["response.completed", "response.incomplete", "response.failed", "error"];

fn kind_of(event: &Value) -> String {
    event["type"].as_str().unwrap().to_owned()
}

/// A request for a short response that is not stored.
fn request(more: Value) -> String {
    let mut request = json!({"type": "response.create", "max_output_tokens": 8, "temperature": 0, "store": false});
    for (name, value) in more.as_object().unwrap() {
        request[name] = value.clone();
    }
    request.to_string()
}

struct Client(WebSocketStream<TcpStream>);

impl Client {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        Client(client_async(format!("ws://{address}/v1/responses"), stream).await.unwrap().0)
    }

    async fn send(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.unwrap();
    }

    async fn event(&mut self) -> Value {
        let message = self.0.next().await.unwrap().unwrap();
        serde_json::from_str(message.to_text().unwrap()).unwrap()
    }

    /// The code with which the server ends the connection, and the types of the events before.
    async fn end(&mut self) -> (Option<CloseCode>, Vec<String>) {
        let (mut code, mut kinds) = (None, Vec::new());
        while let Some(message) = self.0.next().await {
            match message.unwrap() {
                Message::Close(frame) => code = frame.map(|frame| frame.code),
                Message::Text(text) => kinds.push(kind_of(&serde_json::from_str(&text).unwrap())),
                _ => {}
            }
        }
        (code, kinds)
    }

    /// The events of a response, up to the last one or the error.
    async fn create(&mut self, more: Value) -> Vec<Value> {
        self.send(&request(more)).await;
        let mut events = Vec::new();
        loop {
            let event = self.event().await;
            let kind = kind_of(&event);
            events.push(event);
            if LAST.contains(&&*kind) {
                return events;
            }
        }
    }

    /// The response, which must not fail.
    async fn respond(&mut self, more: Value) -> Value {
        let events = self.create(more).await;
        let last = events.last().unwrap();
        assert_ne!(last["type"], "error", "{last}");
        last["response"].clone()
    }

    /// The code and the field of the error.
    async fn refused(&mut self, more: Value) -> (Value, Value) {
        let events = self.create(more).await;
        assert_eq!((events.len(), &events[0]["type"]), (1, &json!("error")), "{events:?}");
        (events[0]["error"]["code"].clone(), events[0]["error"]["param"].clone())
    }
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_that_of_a_stream() {
    let server = start(ServerOptions::default()).await;
    let body = json!({"input": "Once upon a time", "max_output_tokens": 8, "temperature": 0, "store": false});
    let whole = server.post("/v1/responses", body).await.json();
    let mut client = Client::connect(listen().await).await;
    for _ in 0..2 {
        let events = client.create(json!({"input": "Once upon a time"})).await;
        let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        assert_eq!(kinds[..3], ["response.created", "response.in_progress", "response.output_item.added"]);
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number);
        }
        let response = &events.last().unwrap()["response"];
        assert_eq!((text(response), &response["usage"]), (text(&whole), &whole["usage"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_stored_can_be_continued_on_its_connection() {
    let address = listen().await;
    let mut client = Client::connect(address).await;
    let first = client.respond(json!({"input": "Once upon a time"})).await;
    let second = client.respond(json!({"input": "And then?", "previous_response_id": first["id"]})).await;
    let third = client.respond(json!({"input": "Why?", "previous_response_id": second["id"]})).await;
    let mut items = vec![json!({"role": "user", "content": "Once upon a time"})];
    for (response, next) in [(&first, "And then?"), (&second, "Why?")] {
        items.extend(response["output"].as_array().unwrap().iter().cloned());
        items.push(json!({"role": "user", "content": next}));
    }
    let by_items = client.respond(json!({"input": items})).await;
    assert_eq!(text(&third), text(&by_items));
    assert_eq!(third["usage"]["input_tokens"], by_items["usage"]["input_tokens"]);
    // Others do not find it, and it cannot be the beginning of what they find.
    let more = json!({"input": "x", "previous_response_id": by_items["id"]});
    let missing = (json!("previous_response_not_found"), json!("previous_response_id"));
    assert_eq!(Client::connect(address).await.refused(more.clone()).await, missing);
    let stored = json!({"input": "x", "previous_response_id": by_items["id"], "store": true});
    assert_eq!(client.refused(stored).await.1, "store");
    assert_eq!(client.refused(more).await, missing, "a turn that continues it has failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_turn_takes_what_it_continues_with_it() {
    let address = listen().await;
    let mut client = Client::connect(address).await;
    let first = client.respond(json!({"input": "Once upon a time"})).await;
    let output = json!([{"type": "function_call_output", "call_id": "call_1", "output": "x"}]);
    let refused = client.refused(json!({"input": output, "previous_response_id": first["id"]})).await;
    assert_eq!(refused.1, "input[0].call_id");
    let again = json!({"input": "And then?", "previous_response_id": first["id"]});
    assert_eq!(client.refused(again).await.0, "previous_response_not_found");
    // This also holds if a turn fails before anything else of it is looked at, or if it cannot be read.
    for bad in [json!({"temperature": "hot"}), json!({"type": "response.cancel"})] {
        let first = client.respond(json!({"input": "Once upon a time"})).await;
        let mut turn = json!({"input": "x", "previous_response_id": first["id"]});
        turn.as_object_mut().unwrap().extend(bad.as_object().unwrap().clone());
        client.refused(turn).await;
        let again = json!({"input": "And then?", "previous_response_id": first["id"]});
        assert_eq!(client.refused(again).await.0, "previous_response_not_found", "{bad}");
    }
    let first = client.respond(json!({"input": "Once upon a time"})).await;
    client.send("{").await;
    assert_eq!(client.event().await["type"], "error");
    let again = json!({"input": "And then?", "previous_response_id": first["id"]});
    assert_eq!(client.refused(again).await.0, "previous_response_not_found");
    // One that continues another takes nothing with it.
    let first = client.respond(json!({"input": "Once upon a time"})).await;
    client.refused(json!({"input": "x", "temperature": "hot"})).await;
    client.respond(json!({"input": "And then?", "previous_response_id": first["id"]})).await;
    // A stored one is found in any case.
    let stored = client.respond(json!({"input": "Once upon a time", "store": true})).await;
    client.refused(json!({"input": output, "previous_response_id": stored["id"]})).await;
    client.respond(json!({"input": "And then?", "previous_response_id": stored["id"]})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_and_the_connection_stays() {
    let address = listen().await;
    let mut client = Client::connect(address).await;
    for nonsense in ["", "[", "[]", "{}", r#"{"type": "response.cancel"}"#, r#"{"type": "response.create"}"#] {
        client.send(nonsense).await;
        let event = client.event().await;
        assert_eq!((&event["type"], &event["status"]), (&json!("error"), &json!(400)), "{nonsense}: {event}");
        assert!(event["error"]["code"].is_string(), "{event}");
    }
    assert_eq!(client.refused(json!({"input": "x", "temperature": "hot"})).await.1, "temperature");
    // Nothing is generated, and the next response goes on from there.
    let warm = client.respond(json!({"input": "Once upon a time", "generate": false})).await;
    assert_eq!((&warm["status"], &warm["output"]), (&json!("completed"), &json!([])));
    let next = client.respond(json!({"input": "And then?", "previous_response_id": warm["id"]})).await;
    assert!(!text(&next).is_empty());
    let server = start(ServerOptions::default()).await;
    let plain = server.get("/v1/responses", &[]).await;
    assert_eq!(plain.status, 400, "{}", plain.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_those_that_may_wait_are_refused_in_their_turn() {
    let mut client = Client::connect(listen().await).await;
    for _ in 0..8 {
        client.0.feed(Message::text(request(json!({"input": "Once upon a time"})))).await.unwrap();
    }
    client.0.send(Message::Ping("here?".into())).await.unwrap();
    let mut outcomes = Vec::new();
    let mut before_answer = None;
    while outcomes.len() < 8 {
        match client.0.next().await.unwrap().unwrap() {
            Message::Pong(_) => before_answer = Some(outcomes.len()),
            message => {
                let event: Value = serde_json::from_str(message.to_text().unwrap()).unwrap();
                if LAST.contains(&event["type"].as_str().unwrap()) {
                    outcomes.push(event);
                }
            }
        }
    }
    assert_eq!(before_answer, Some(0), "the ping is answered during the first response");
    let kinds: Vec<&str> = outcomes.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert!(!kinds[..5].contains(&"error") && kinds[5..] == ["error"; 3], "{kinds:?}");
    assert_eq!((&outcomes[5]["status"], &outcomes[5]["error"]["code"]), (&json!(429), &json!("rate_limit_exceeded")));
    client.respond(json!({"input": "Once upon a time"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_the_connection_is_answered() {
    let mut client = Client::connect(listen().await).await;
    client.respond(json!({"input": "Once upon a time"})).await;
    let farewell = CloseFrame { code: CloseCode::Normal, reason: "done".into() };
    client.0.send(Message::Close(Some(farewell))).await.unwrap();
    assert_eq!(client.end().await, (Some(CloseCode::Normal), Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_tells_all_clients_before() {
    let (told, ended) = tokio::sync::oneshot::channel::<()>();
    let (send, address) = tokio::sync::oneshot::channel();
    // As in a process that ends: nothing goes on once the server has ended.
    let server = std::thread::spawn(move || {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let server = bind().await;
            send.send(server.address().unwrap()).unwrap();
            server.serve(async { drop(ended.await) }).await;
        });
    });
    let address = address.await.unwrap();
    let (mut idle, mut busy) = (Client::connect(address).await, Client::connect(address).await);
    idle.respond(json!({"input": "Once upon a time"})).await;
    busy.send(&request(json!({"input": "Once upon a time", "max_output_tokens": 400}))).await;
    assert_eq!(kind_of(&busy.event().await), "response.created");
    told.send(()).unwrap();
    assert_eq!(idle.end().await, (Some(CloseCode::Away), Vec::new()));
    let (code, kinds) = busy.end().await;
    assert_eq!(code, Some(CloseCode::Away));
    assert!(LAST.contains(&&**kinds.last().unwrap()), "{kinds:?}");
    server.join().unwrap();
}

//! Anthropic's API on a small model.

use crate::common::start;
use serde_json::{Value, json};
use sluice_server::{Guard, ServerOptions};

fn request(more: Value) -> Value {
    let mut body = json!({
        "model": "demo",
        "max_tokens": 12,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Speak, good sir."}],
    });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text_of(message: &Value) -> String {
    message["content"].as_array().unwrap().iter().filter_map(|block| block["text"].as_str()).collect()
}

#[tokio::test]
async fn a_stream_says_what_the_whole_message_says() {
    let server = start(ServerOptions::default()).await;
    let whole = server.post("/v1/messages?beta=true", request(json!({}))).await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    assert!(whole.headers["request-id"].to_str().unwrap().starts_with("req_"));
    let message = whole.json();
    assert_eq!(message["model"], "demo");
    assert_eq!(message["usage"]["output_tokens"], 12);
    assert_eq!(message["stop_reason"], "max_tokens");

    let stream = server.post("/v1/messages", request(json!({"stream": true}))).await;
    assert_eq!(stream.headers["content-type"], "text/event-stream");
    let events = stream.events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "ping").collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(events[1].0, "ping", "one comes at once");
    let text: String = events.iter().filter_map(|(_, data)| data["delta"]["text"].as_str()).collect();
    assert_eq!(text, text_of(&message));
    let counted = server.post("/v1/messages/count_tokens", request(json!({"max_tokens": null}))).await;
    let tokens = &counted.json()["input_tokens"];
    assert!(tokens.as_u64().unwrap() > 4);
    assert_eq!(&events[0].1["message"]["usage"]["input_tokens"], tokens);
    let usage = &events[events.len() - 2].1["usage"];
    assert_eq!(usage["output_tokens"], 12);
    let read = ["input_tokens", "cache_read_input_tokens"].map(|name| usage[name].as_u64().unwrap());
    assert_eq!(read.iter().sum::<u64>(), tokens.as_u64().unwrap());
}

#[tokio::test]
async fn an_answer_is_continued_and_stopped() {
    let server = start(ServerOptions::default()).await;
    let whole = text_of(&server.post("/v1/messages", request(json!({}))).await.json());
    let (begun, rest) = whole.split_at(whole.char_indices().nth(whole.chars().count() / 2).unwrap().0);
    let begun = begun.trim_end();
    let messages = json!([{"role": "user", "content": "Speak, good sir."}, {"role": "assistant", "content": begun}]);
    let counted = server.post("/v1/messages/count_tokens", request(json!({"messages": messages}))).await.json();
    let alone = server.post("/v1/messages/count_tokens", request(json!({}))).await.json();
    assert!(counted["input_tokens"].as_u64() > alone["input_tokens"].as_u64());
    let continued = server.post("/v1/messages", request(json!({"messages": messages}))).await;
    assert_eq!(continued.status, 200, "{}", continued.text);

    let sequence: String = rest.trim().chars().take(3).collect();
    let stopped = server.post("/v1/messages", request(json!({"stop_sequences": [sequence]}))).await.json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(sequence)));
    assert_eq!(text_of(&stopped), whole[..whole.find(&sequence).unwrap()]);
}

#[tokio::test]
async fn errors_are_anthropics() {
    let server = start(ServerOptions::default()).await;
    for (path, body, kind) in [
        ("/v1/messages", request(json!({"max_tokens": null})), "invalid_request_error"),
        ("/v1/messages", request(json!({"max_tokens": "many"})), "invalid_request_error"),
        ("/v1/messages", request(json!({"stream": true, "temperature": 2})), "invalid_request_error"),
        ("/v1/messages", json!([]), "invalid_request_error"),
        ("/v1/messages/count_tokens", json!({"model": "demo"}), "invalid_request_error"),
        ("/v1/messages/batches", json!({}), "not_found_error"),
    ] {
        let reply = server.post(path, body.clone()).await;
        let error = reply.json();
        assert!((400..500).contains(&reply.status), "{body}");
        assert_eq!(error["type"], "error");
        assert_eq!(error["error"]["type"], kind, "{body}");
        assert_eq!(reply.headers["request-id"], error["request_id"].as_str().unwrap());
    }
    let long = "word ".repeat(2000);
    let reply = server.post("/v1/messages", request(json!({"messages": [{"role": "user", "content": long}]}))).await;
    assert_eq!((reply.status, &reply.json()["error"]["type"]), (400, &json!("invalid_request_error")));
    let guard = Guard { keys: vec!["secret".into()], ..Guard::default() };
    let locked = start(ServerOptions { guard, ..ServerOptions::default() }).await;
    let reply = locked.post("/v1/messages", request(json!({}))).await;
    assert_eq!((reply.status, &reply.json()["error"]["type"]), (401, &json!("authentication_error")));
}

#[tokio::test]
async fn models_are_listed_for_both_kinds_of_clients() {
    let server = start(ServerOptions::default()).await;
    let version = [("anthropic-version", "2023-06-01")];
    let list = server.get("/v1/models?limit=1000", &version).await.json();
    assert_eq!((&list["data"][0]["type"], &list["data"][0]["id"]), (&json!("model"), &json!("demo")));
    assert_eq!(
        (&list["first_id"], &list["last_id"], &list["has_more"]),
        (&json!("demo"), &json!("demo"), &json!(false))
    );
    assert!(list["data"][0]["created_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(server.get("/v1/models/demo", &version).await.json(), list["data"][0]);
    let missing = server.get("/v1/models/claude", &version).await;
    assert_eq!((missing.status, &missing.json()["error"]["type"]), (404, &json!("not_found_error")));
    assert_eq!(server.get("/v1/models", &[]).await.json()["object"], "list");
}

#[tokio::test]
async fn what_agents_change_on_every_call_costs_nothing_if_it_is_normalised() {
    let count = async |normalise: bool, cch: &str| {
        let server = start(ServerOptions { normalise, ..ServerOptions::default() }).await;
        let billing = format!("x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={cch};");
        let system = json!([{"type": "text", "text": billing}, {"type": "text", "text": "You are brief."}]);
        let body = request(json!({"system": system}));
        server.post("/v1/messages/count_tokens", body).await.json()["input_tokens"].as_u64().unwrap()
    };
    let same = count(true, "36ee5").await;
    assert_eq!(same, count(true, "0aaa9123456789").await);
    assert!(same + 20 < count(false, "36ee5").await);
}

#[tokio::test]
async fn the_second_turn_reads_only_what_is_new() {
    let server = start(ServerOptions::default()).await;
    let long = "O, speak again, bright angel! for thou art as glorious to this night. ".repeat(6);
    let mut messages = vec![json!({"role": "user", "content": long})];
    let first = server.post("/v1/messages", request(json!({"messages": messages}))).await.json();
    let tokens = |message: &Value, name: &str| message["usage"][name].as_u64().unwrap();
    assert_eq!(tokens(&first, "cache_read_input_tokens"), 0);
    messages.push(json!({"role": "assistant", "content": first["content"]}));
    messages.push(json!({"role": "user", "content": "Go on."}));
    let stream = server.post("/v1/messages", request(json!({"messages": messages, "stream": true}))).await;
    let events = stream.events();
    let last = &events.iter().find(|(name, _)| name == "message_delta").unwrap().1;
    let whole = tokens(&events[0].1["message"], "input_tokens");
    let cached = tokens(last, "cache_read_input_tokens");
    assert_eq!(tokens(last, "input_tokens") + cached, whole);
    // A page has 64 tokens.
    assert!(cached + 64 > tokens(&first, "input_tokens"), "{cached} of {whole}");
}

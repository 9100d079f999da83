//! `/v1/responses` with a real, small model: streams, stored responses, and refusals.

use crate::common::{Running, start};
use serde_json::{Value, json};
use sluice_server::{ServerOptions, SessionOptions};

/// A request that is answered the same way each time.
fn request(more: Value) -> Value {
    let mut request = json!({"input": "Once upon a time", "max_output_tokens": 12, "temperature": 0});
    for (name, value) in more.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

async fn respond(server: &Running, more: Value) -> Value {
    let reply = server.post("/v1/responses", request(more)).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.json()
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_the_whole_object_says() {
    let server = start(ServerOptions::default()).await;
    let whole = respond(&server, json!({})).await;
    assert_eq!(whole["object"], "response");
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(whole["usage"]["output_tokens"], 12);
    let reply = server.post("/v1/responses", request(json!({"stream": true}))).await;
    let events = reply.events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    assert!(reply.text.ends_with("data: [DONE]\n\n"));
    let deltas = events.iter().filter(|(name, _)| name == "response.output_text.delta");
    let streamed: String = deltas.map(|(_, event)| event["delta"].as_str().unwrap()).collect();
    assert_eq!(streamed, text(&whole));
    let (_, last) = events.iter().rev().find(|(name, _)| name == "response.incomplete").unwrap();
    assert_eq!(text(&last["response"]), streamed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_continued_by_its_id_as_by_its_items() {
    let server = start(ServerOptions::default()).await;
    let first = respond(&server, json!({})).await;
    let id = first["id"].as_str().unwrap();
    let stored = server.get(&format!("/v1/responses/{id}"), &[]).await;
    assert_eq!(stored.json(), first);
    let by_id = respond(&server, json!({"input": "And then?", "previous_response_id": id})).await;
    let mut items = vec![json!({"role": "user", "content": "Once upon a time"})];
    items.extend(first["output"].as_array().unwrap().iter().cloned());
    items.push(json!({"role": "user", "content": [{"type": "input_text", "text": "And then?"}]}));
    let by_items = respond(&server, json!({"input": items, "store": false})).await;
    assert_eq!(text(&by_id), text(&by_items));
    assert_eq!(by_id["usage"]["input_tokens"], by_items["usage"]["input_tokens"]);
    let gone = server.get(&format!("/v1/responses/{}", by_items["id"].as_str().unwrap()), &[]).await;
    assert_eq!(gone.status, 404, "it was not to be stored");
    let counted =
        server.post("/v1/responses/input_tokens", json!({"input": "And then?", "previous_response_id": id})).await;
    assert_eq!(counted.json()["input_tokens"], by_id["usage"]["input_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_responses_can_be_listed_and_deleted() {
    let server = start(ServerOptions::default()).await;
    let input = json!([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]);
    let response = respond(&server, json!({"input": input})).await;
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    let items = server.get(&format!("{path}/input_items?limit=2"), &[]).await.json();
    assert_eq!(items["data"][0]["content"], "three", "the last comes first");
    assert_eq!(items["has_more"], true);
    let after = items["last_id"].as_str().unwrap();
    let rest = server.get(&format!("{path}/input_items?after={after}"), &[]).await.json();
    assert_eq!(rest["data"].as_array().unwrap().len(), 1);
    assert_eq!(rest["has_more"], false);
    for query in ["limit=0", "limit=x", "order=up", "after=nothing"] {
        assert_eq!(server.get(&format!("{path}/input_items?{query}"), &[]).await.status, 400, "{query}");
    }
    assert_eq!(server.post(&format!("{path}/cancel"), json!({})).await.status, 400);
    assert_eq!(server.get(&format!("{path}?stream=true"), &[]).await.status, 400);
    let delete = || axum::http::Request::delete(&path).body(axum::body::Body::empty()).unwrap();
    assert_eq!(server.send(delete()).await.json()["deleted"], true);
    assert_eq!(server.send(delete()).await.status, 404);
    assert_eq!(server.get(&path, &[]).await.status, 404);
    assert_eq!(server.post(&format!("{path}/cancel"), json!({})).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_can_be_continued_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let sessions = SessionOptions { folder: folder.path().to_owned(), max_bytes: 1 << 30, expire_after: None };
    let options = ServerOptions { sessions: Some(sessions), ..ServerOptions::default() };
    let server = start(options.clone()).await;
    server.app.responses.open().unwrap();
    let first = respond(&server, json!({})).await;
    let more = json!({"input": "And then?", "previous_response_id": first["id"]});
    let second = respond(&server, more.clone()).await;
    drop(server);
    let server = start(options).await;
    server.app.responses.open().unwrap();
    assert_eq!(text(&respond(&server, more).await), text(&second));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_impossible_has_openais_error() {
    let server = start(ServerOptions::default()).await;
    for (body, status, param, code) in [
        (
            json!({"input": "x", "previous_response_id": "resp_1"}),
            400,
            "previous_response_id",
            "previous_response_not_found",
        ),
        (json!({"input": "x", "background": true}), 400, "background", "unsupported_parameter"),
        (json!({"input": "x", "temperature": "hot"}), 400, "temperature", "invalid_type"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            400,
            "input[0].content[0]",
            "unsupported_value",
        ),
    ] {
        for path in ["/v1/responses", "/v1/responses/input_tokens"] {
            let reply = server.post(path, body.clone()).await;
            let error = &reply.json()["error"];
            assert_eq!(
                (reply.status, &error["param"], &error["code"]),
                (status, &json!(param), &json!(code)),
                "{error}"
            );
        }
    }
    let long = server.post("/v1/responses", json!({"input": "once ".repeat(600)})).await;
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_if_they_are_asked_for() {
    let server = start(ServerOptions::default()).await;
    let more = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let response = respond(&server, more).await;
    let logprobs = response["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert!(!logprobs.is_empty());
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let without = respond(&server, json!({})).await;
    assert_eq!(without["output"][0]["content"][0]["logprobs"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_from_its_summary() {
    let server = start(ServerOptions::default()).await;
    let input =
        json!([{"role": "user", "content": "We meet on Tuesday."}, {"role": "assistant", "content": "Agreed."}]);
    let reply = server.post("/v1/responses/compact", json!({"model": "demo", "input": input})).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let made = reply.json();
    assert_eq!((&made["object"], &made["output"][0]["type"]), (&json!("response.compaction"), &json!("compaction")));
    let mut items = made["output"].as_array().unwrap().clone();
    // What this model writes is long and says nothing; another summary takes its place.
    items[0]["encrypted_content"] = json!("sluice-1-4f6b2e");
    items.push(json!({"role": "user", "content": "When?"}));
    let after = respond(&server, json!({"input": items})).await;
    let written = json!([{"role": "user", "content": "Summary of our conversation so far:\n\nOk.\n\nWhen?"}]);
    assert_eq!(text(&after), text(&respond(&server, json!({"input": written})).await));
    for (body, param) in [(json!({"input": "x"}), "model"), (json!({"model": "demo"}), "input")] {
        let refused = server.post("/v1/responses/compact", body).await;
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(param)));
    }
}

//! Ollama's API on a small model.

use std::num::NonZeroU16;

use crate::common::start;
use serde_json::{Value, json};
use sluice_model::{EngineOptions, PromptAttention, Thrift};
use sluice_server::ServerOptions;

const GREEDY: &str = r#"{"temperature": 0, "num_predict": 10}"#;

fn with(more: Value) -> Value {
    let mut body = json!({"model": "demo:latest", "options": serde_json::from_str::<Value>(GREEDY).unwrap()});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_stream_says_what_the_whole_object_says() {
    let server = start(ServerOptions::default()).await;
    let messages = json!([{"role": "user", "content": "Speak, good sir."}]);
    let stream = server.post("/api/chat", with(json!({"messages": messages}))).await;
    assert_eq!(stream.headers["content-type"], "application/x-ndjson", "streaming is usual");
    let lines = stream.lines();
    let text: String = lines.iter().filter_map(|line| line["message"]["content"].as_str()).collect();
    let whole = server.post("/api/chat", with(json!({"messages": messages, "stream": false}))).await.json();
    assert_eq!(whole["message"]["content"], text.as_str());
    for last in [lines.last().unwrap(), &whole] {
        assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("length")));
        assert_eq!((&last["eval_count"], &last["model"]), (&json!(10), &json!("demo:latest")));
        assert!(last["prompt_eval_count"].as_u64().unwrap() > 4);
        assert!(last["total_duration"].as_u64().unwrap() >= last["eval_duration"].as_u64().unwrap());
        assert!(last.get("context").is_none());
    }
    let generated = server.post("/api/generate", with(json!({"prompt": "Speak, good sir.", "stream": false}))).await;
    assert_eq!(generated.json()["response"], text.as_str());
}

#[tokio::test]
async fn a_context_carries_the_conversation_on() {
    let server = start(ServerOptions::default()).await;
    let first = server.post("/api/generate", with(json!({"prompt": "Speak.", "stream": false}))).await.json();
    let context = first["context"].as_array().unwrap();
    let counted = |reply: &Value, name: &str| reply[name].as_u64().unwrap() as usize;
    assert_eq!(context.len(), counted(&first, "prompt_eval_count") + counted(&first, "eval_count"));
    let more = with(json!({"prompt": "Go on.", "context": context}));
    let lines = server.post("/api/generate", more).await.lines();
    let second = lines.last().unwrap();
    assert!(counted(second, "prompt_eval_count") > context.len());
    assert_eq!(second["context"].as_array().unwrap()[..context.len()], context[..]);
    let wrong = server.post("/api/generate", with(json!({"prompt": "x", "context": [1_000_000]}))).await;
    assert_eq!(wrong.status, 400);
    let raw = server.post("/api/generate", with(json!({"prompt": "KING:", "raw": true, "stream": false}))).await;
    assert!(raw.json().get("context").is_none(), "a raw prompt is no conversation");
}

#[tokio::test]
async fn models_are_listed_shown_and_loaded() {
    let server = start(ServerOptions::default()).await;
    assert!(server.get("/api/version", &[]).await.json()["version"].is_string());
    let tags = server.get("/api/tags", &[]).await.json();
    assert_eq!(tags["models"][0]["name"], "demo:latest");
    assert!(tags["models"][0]["digest"].as_str().unwrap().len() >= 12, "clients show twelve characters of it");
    let shown = server.post("/api/show", json!({"model": "demo"})).await.json();
    assert_eq!(shown["capabilities"], json!(["completion"]));
    let family = shown["details"]["family"].as_str().unwrap();
    assert_eq!(shown["model_info"][format!("{family}.context_length")], 512);
    assert!(shown["template"].as_str().unwrap().contains("message.role"));
    assert_eq!(server.get("/api/ps", &[]).await.json()["models"], json!([]), "listing loads nothing");
    let loaded = server.post("/api/generate", json!({"model": "demo"})).await.json();
    assert_eq!((&loaded["done"], &loaded["done_reason"]), (&json!(true), &json!("load")));
    let ps = server.get("/api/ps", &[]).await.json();
    assert_eq!((&ps["models"][0]["model"], &ps["models"][0]["context_length"]), (&json!("demo:latest"), &json!(512)));
    let gone = server.post("/api/chat", json!({"model": "demo", "messages": [], "keep_alive": 0})).await.json();
    assert_eq!(gone["done_reason"], "unload");
}

#[tokio::test]
async fn what_is_not_there_says_so() {
    let server = start(ServerOptions::default()).await;
    for path in ["/api/pull", "/api/push", "/api/create", "/api/copy", "/api/embed", "/api/embeddings"] {
        let reply = server.post(path, json!({"model": "demo"})).await;
        assert_eq!(reply.status, 501, "{path}");
        assert!(reply.json()["error"].as_str().unwrap().contains(path));
    }
    let wrong = server.post("/api/chat", json!({"messages": [{"role": "user", "content": 3}]})).await;
    assert_eq!((wrong.status, wrong.json()["error"].is_string()), (400, true));
    let wrong = server.post("/api/chat", json!({"model": 3})).await;
    assert!(wrong.json()["error"].as_str().unwrap().contains("`model`"), "{}", wrong.text);
    assert_eq!(server.get("/api/chat", &[]).await.status, 405);
    assert!(server.get("/api/nothing", &[]).await.json()["error"].is_string());
}

#[tokio::test]
async fn answers_that_are_lossy_say_so() {
    let engine = |n: u16| EngineOptions {
        thrift: Thrift { top_k: NonZeroU16::new(n), ..Thrift::default() },
        ..EngineOptions::default()
    };
    // The model has four experts per token.
    for (n, lossy) in [(2, Some("at most 2 experts per token and layer")), (4, None)] {
        let server = start(ServerOptions { engine: engine(n), ..ServerOptions::default() }).await;
        let reply = server.post("/api/generate", with(json!({"prompt": "Speak.", "stream": false}))).await;
        assert_eq!(reply.headers.get("x-sluice-lossy").map(|said| said.to_str().unwrap()), lossy);
        assert_eq!(server.get("/status", &[]).await.json()["models"][0]["lossy"], json!(lossy));
    }
}

#[tokio::test]
async fn prompts_in_the_expanded_form_are_said() {
    for (form, said) in [(PromptAttention::Expanded, Some("expanded")), (PromptAttention::Absorbed, None)] {
        let engine = EngineOptions { prompt_attention: form, ..EngineOptions::default() };
        let server = start(ServerOptions { engine, ..ServerOptions::default() }).await;
        let reply = server.post("/api/generate", with(json!({"prompt": "Speak.", "stream": false}))).await;
        assert_eq!(reply.headers.get("x-sluice-prompt-attention").map(|form| form.to_str().unwrap()), said);
        assert_eq!(server.get("/status", &[]).await.json()["models"][0]["prompt_attention"], json!(said));
    }
}

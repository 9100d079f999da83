//! Paths that belong to no other API: health, metrics, status, tokens and templates.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sluice_text::Message;

use super::body::Json;
use super::openai::request;
use crate::app::App;
use crate::ask::{Ask, Chat};
use crate::error::{ApiError, Flavour, Kind};
use crate::reply::json_response;

/// Most bytes of a text to tokenise, because tokenizers take a hundred times as much memory.
const LONGEST_TEXT: usize = 4 << 20;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/slots", get(slots))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/apply-template", post(apply_template))
}

async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    match app.open() {
        Ok(()) => json_response(&json!({"status": "ok"})),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    for entry in app.models.entries() {
        if let Some(served) = entry.peek() {
            app.metrics.model(&entry.id, &served.model().status());
        }
    }
    match app.metrics.text(app.live.count()) {
        Ok(text) => {
            let mut response = Response::new(Body::from(text));
            let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(error) => ApiError::new(Kind::Internal, error.to_string()).response(Flavour::OpenAi),
    }
}

async fn status(State(app): State<Arc<App>>) -> Response<Body> {
    let model = |entry: &crate::models::Entry| {
        let served = entry.peek();
        let report = served.as_ref().and_then(|served| served.model().report());
        json!({
            "id": entry.id,
            "family": entry.facts.family,
            "bytes": entry.facts.bytes,
            "loaded": served.is_some(),
            "lossy": entry.facts.lossy,
            "prompt_attention": entry.facts.prompt_attention,
            "idle_seconds": entry.idle_seconds(),
            "context": served.as_ref().map(|served| served.context()),
            "status": served.as_ref().map(|served| served.model().status()),
            "report": report.as_deref(),
        })
    };
    let models: Vec<Value> = app.models.entries().iter().map(model).collect();
    json_response(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seconds": app.started.elapsed().as_secs_f64(),
        "answers": app.live.count(),
        "models": models,
    }))
}

async fn slots(State(app): State<Arc<App>>) -> Response<Body> {
    json_response(&app.live.to_json())
}

/// A text to turn into tokens.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct TokenizeRequest {
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    model: String,
    content: String,
    #[serde(default)]
    add_special: bool,
    #[serde(default)]
    with_pieces: bool,
}

async fn tokenize(State(app): State<Arc<App>>, Json(request): Json<TokenizeRequest>) -> Response<Body> {
    let answer = async {
        if request.content.len() > LONGEST_TEXT {
            let message = format!("`content` has more than {LONGEST_TEXT} bytes: give it in parts");
            return Err(ApiError { param: Some("content".into()), ..ApiError::new(Kind::TooLarge, message) });
        }
        let served = app.models.get(&request.model).await?;
        let tokens = move || {
            let tokenizer = served.tokenizer()?;
            let ids = tokenizer.encode(&request.content, request.add_special)?;
            let piece = |&id: &u32| json!({"id": id, "piece": tokenizer.decode(&[id], false).unwrap_or_default()});
            let tokens: Value = match request.with_pieces {
                true => ids.iter().map(piece).collect(),
                false => json!(ids),
            };
            Ok(json!({"tokens": tokens}))
        };
        aside(tokens).await
    };
    finish(answer.await)
}

/// Tokens to turn into a text.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct DetokenizeRequest {
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    model: String,
    #[schema(value_type = Vec<u64>)]
    tokens: Vec<u32>,
}

async fn detokenize(State(app): State<Arc<App>>, Json(request): Json<DetokenizeRequest>) -> Response<Body> {
    let answer = async {
        let served = app.models.get(&request.model).await?;
        aside(move || {
            let tokenizer = served.tokenizer()?;
            if let Some(id) = request.tokens.iter().find(|&&id| tokenizer.token_text(id).is_none()) {
                return Err(ApiError::field("tokens", format!("`tokens`: the model has no token {id}")));
            }
            Ok(json!({"content": tokenizer.decode(&request.tokens, false)?}))
        })
        .await
    };
    finish(answer.await)
}

/// A conversation to turn into a text.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct TemplateRequest {
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    model: String,
    #[schema(value_type = Vec<Object>)]
    messages: Vec<Map<String, Value>>,
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    tools: Vec<Value>,
    #[serde(default)]
    #[schema(value_type = Object)]
    chat_template_kwargs: Map<String, Value>,
}

async fn apply_template(State(app): State<Arc<App>>, Json(request): Json<TemplateRequest>) -> Response<Body> {
    let answer = async {
        request::check_messages(&request.messages)?;
        let served = app.models.get(&request.model).await?;
        let messages = request.messages.into_iter().map(Message::from).collect();
        let chat = Chat { messages, variables: request.chat_template_kwargs, ..Chat::default() };
        let ask = Ask { tools: request::tools(&request.tools)?, ..Ask::default() };
        aside(move || Ok(json!({"prompt": served.prompt(&chat, &ask)?.text()}))).await
    };
    finish(answer.await)
}

/// Runs long computations away from the threads that serve all clients.
async fn aside(work: impl FnOnce() -> Result<Value, ApiError> + Send + 'static) -> Result<Value, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request was given up: the log says why")))
}

fn finish(answer: Result<Value, ApiError>) -> Response<Body> {
    match answer {
        Ok(value) => json_response(&value),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

//! Lists and describes models.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, Uri};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::VERSION;
use crate::api::body::Json;
use crate::app::App;
use crate::clock::{now, rfc3339};
use crate::error::{ApiError, Flavour, Kind};
use crate::models::Entry;
use crate::reply::json_response;

/// `GET /api/version`.
pub async fn version() -> Response<Body> {
    json_response(&json!({"version": VERSION}))
}

/// `GET /api/tags`: all models.
pub async fn tags(State(app): State<Arc<App>>) -> Response<Body> {
    let models: Vec<Value> = app.models.entries().iter().map(|entry| listed(entry).into()).collect();
    json_response(&json!({"models": models}))
}

/// `GET /api/ps`: the loaded ones.
pub async fn ps(State(app): State<Arc<App>>) -> Response<Body> {
    let loaded = |entry: &Entry| {
        let served = entry.peek()?;
        let idle = Duration::try_from_secs_f64(entry.idle_seconds()?).unwrap_or_default();
        // Without a limit, a model stays loaded; Ollama then reports roughly a century.
        let rest = app.options.rest_after.unwrap_or(Duration::from_secs(100 * 365 * 86_400));
        let mut model = listed(entry);
        model.insert("expires_at".into(), rfc3339(now() + rest.saturating_sub(idle)).into());
        model.insert("size_vram".into(), 0.into());
        model.insert("context_length".into(), served.context().into());
        Some(Value::from(model))
    };
    let models: Vec<Value> = app.models.entries().iter().filter_map(loaded).collect();
    json_response(&json!({"models": models}))
}

/// The model to show.
#[derive(Debug, Default, Deserialize)]
pub struct ShowRequest {
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    model: String,
    /// The older name of `model`.
    #[serde(default)]
    name: String,
}

/// `POST /api/show`: one model.
pub async fn show(State(app): State<Arc<App>>, Json(request): Json<ShowRequest>) -> Response<Body> {
    let name = if request.model.is_empty() { &request.name } else { &request.model };
    let entry = match app.models.find(name) {
        Ok(entry) => entry,
        Err(error) => return error.response(Flavour::Ollama),
    };
    let facts = &entry.facts;
    let template = facts.template.as_deref().unwrap_or_default();
    let context = app.options.engine.context.map_or(facts.max_positions, |most| most.min(facts.max_positions));
    let mut info = Map::new();
    info.insert("general.architecture".into(), facts.family.clone().into());
    info.insert("general.basename".into(), entry.id.clone().into());
    info.insert(format!("{}.context_length", facts.family), context.into());
    json_response(&json!({
        "modelfile": format!("FROM {}\n", entry.id),
        "parameters": "",
        "template": template,
        "details": details(entry),
        "model_info": info,
        "capabilities": capabilities(template),
        "modified_at": modified(entry),
    }))
}

/// The capabilities for which a template has variables.
fn capabilities(template: &str) -> Vec<&'static str> {
    let has = |words: &[&str]| words.iter().any(|word| template.contains(word));
    let tools = has(&["tools"]).then_some("tools");
    let thinking = has(&["think", "reasoning"]).then_some("thinking");
    std::iter::once("completion").chain(tools).chain(thinking).collect()
}

/// Answers the paths with which Ollama manages models.
pub async fn no_management(uri: Uri) -> Response<Body> {
    let path = uri.path();
    let message = format!("{path} is not supported: models are the files that the server was started with");
    ApiError::new(Kind::NotImplemented, message).response(Flavour::Ollama)
}

/// Answers the paths with which Ollama embeds texts.
pub async fn no_embeddings(uri: Uri) -> Response<Body> {
    let message = format!("{} is not supported: the models here generate text", uri.path());
    ApiError::new(Kind::NotImplemented, message).response(Flavour::Ollama)
}

fn listed(entry: &Entry) -> Map<String, Value> {
    let name = format!("{}:latest", entry.id);
    let fields = [
        ("name", name.clone().into()),
        ("model", name.into()),
        ("modified_at", modified(entry).into()),
        ("size", entry.facts.bytes.into()),
        ("digest", entry.facts.state_id.clone().into()),
        ("details", details(entry)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn details(entry: &Entry) -> Value {
    let family = &entry.facts.family;
    json!({
        "parent_model": "",
        "format": "sluice",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    })
}

fn modified(entry: &Entry) -> String {
    rfc3339(Duration::from_secs(entry.facts.created))
}

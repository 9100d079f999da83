//! `/v1/models` for clients of Anthropic's API.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Response};
use serde_json::{Value, json};

use super::identify;
use crate::app::App;
use crate::clock::rfc3339;
use crate::error::{ApiError, Flavour, Kind};
use crate::models::Entry;
use crate::reply::json_response;
use crate::request_id;

/// Whether a client uses Anthropic's API. Both APIs have this path; only Anthropic's clients send this header.
pub fn is_asked(headers: &HeaderMap) -> bool {
    headers.contains_key("anthropic-version")
}

/// All models, on one page.
pub fn list(app: &Arc<App>) -> Response<Body> {
    let entries = app.models.entries();
    let list = json!({
        "data": entries.iter().map(object).collect::<Vec<_>>(),
        "has_more": false,
        "first_id": entries.first().map(|entry| &entry.id),
        "last_id": entries.last().map(|entry| &entry.id),
    });
    identify(json_response(&list), &request_id::current())
}

/// One model.
pub fn one(app: &Arc<App>, id: &str) -> Response<Body> {
    let response = match app.models.entries().iter().find(|entry| entry.id == id) {
        Some(entry) => json_response(&object(entry)),
        None => ApiError::new(Kind::NotFound, format!("there is no model {id:?}")).response(Flavour::Anthropic),
    };
    identify(response, &request_id::current())
}

fn object(entry: &Entry) -> Value {
    json!({
        "type": "model",
        "id": entry.id,
        "display_name": entry.id,
        "created_at": rfc3339(Duration::from_secs(entry.facts.created)),
        "max_input_tokens": entry.peek().map_or(entry.facts.max_positions, |served| served.context()),
    })
}

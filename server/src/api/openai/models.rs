//! `/v1/models`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response};
use serde_json::{Value, json};

use crate::api::anthropic;
use crate::app::App;
use crate::error::{ApiError, Flavour, Kind};
use crate::models::Entry;
use crate::reply::json_response;

/// All models.
pub async fn list(State(app): State<Arc<App>>, headers: HeaderMap) -> Response<Body> {
    if anthropic::models::is_asked(&headers) {
        return anthropic::models::list(&app);
    }
    let data: Vec<Value> = app.models.entries().iter().map(object).collect();
    json_response(&json!({"object": "list", "data": data}))
}

/// One model.
pub async fn one(State(app): State<Arc<App>>, Path(id): Path<String>, headers: HeaderMap) -> Response<Body> {
    if anthropic::models::is_asked(&headers) {
        return anthropic::models::one(&app, &id);
    }
    match app.models.entries().iter().find(|entry| entry.id == id) {
        Some(entry) => json_response(&object(entry)),
        None => {
            let error = ApiError::new(Kind::NotFound, format!("there is no model {id:?}")).code("model_not_found");
            error.response(Flavour::OpenAi)
        }
    }
}

fn object(entry: &Entry) -> Value {
    let facts = &entry.facts;
    json!({
        "id": entry.id,
        "object": "model",
        "created": facts.created,
        "owned_by": "sluice",
        "meta": {
            "family": facts.family,
            "bytes": facts.bytes,
            "max_positions": facts.max_positions,
            "context": entry.peek().map(|served| served.context()),
            "loaded": entry.peek().is_some(),
        },
    })
}

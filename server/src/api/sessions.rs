//! `/sessions`: what models remember of conversations, on the drive.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::Response;
use axum::routing::{delete, get};
use serde_json::{Value, json};
use sluice_sessions::{SessionEntry, Store};

use crate::app::App;
use crate::error::{ApiError, Flavour, Kind};
use crate::models::Entry;
use crate::reply::json_response;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new().route("/sessions", get(list)).route("/sessions/{id}", delete(remove))
}

async fn list(State(app): State<Arc<App>>) -> Response<Body> {
    let Some(store) = app.store.clone() else {
        return json_response(&json!({"object": "list", "data": [], "stored": false}));
    };
    let Ok(entries) = tokio::task::spawn_blocking(move || describe(&app, &store)).await else {
        return ApiError::new(Kind::Internal, "the sessions could not be listed").response(Flavour::OpenAi);
    };
    json_response(&entries)
}

fn describe(app: &App, store: &Store) -> Value {
    let model = |entry: &SessionEntry| {
        let id = entry.state_id().to_string();
        app.models.entries().iter().find(|model| model.facts.state_id == id).map(|model| model.id.clone())
    };
    let object = |entry: SessionEntry| {
        json!({
            "id": entry.id,
            "object": "session",
            "model": model(&entry),
            "tokens": entry.tokens,
            "bytes": entry.bytes,
            "created": seconds(entry.created),
            "used": seconds(entry.used),
            "uses": entry.uses,
            "title": entry.title,
            "parent": entry.parent,
            "children": entry.children,
        })
    };
    let usage = store.usage();
    json!({
        "object": "list",
        "stored": true,
        "bytes": usage.bytes,
        "max_bytes": store.options().max_bytes,
        "files": usage.files,
        "error": store.last_error().map(|error| error.to_string()),
        "data": store.list().into_iter().map(object).collect::<Vec<_>>(),
    })
}

async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    let missing = || ApiError::new(Kind::NotFound, "there is no such session: GET /sessions lists them");
    let deleted = match app.store.clone() {
        None => Err(missing()),
        Some(store) => {
            let name = id.clone();
            match tokio::task::spawn_blocking(move || store.delete(&name)).await {
                Ok(Ok(true)) => {
                    // Deleted sessions must not be found in memory either.
                    app.models.entries().iter().filter_map(Entry::peek).for_each(|served| served.forget());
                    Ok(())
                }
                Ok(Ok(false)) => Err(missing()),
                Ok(Err(error)) => Err(ApiError::new(Kind::Internal, error.to_string())),
                Err(_) => Err(ApiError::new(Kind::Internal, "the session could not be deleted")),
            }
        }
    };
    match deleted {
        Ok(()) => json_response(&json!({"id": id, "object": "session", "deleted": true})),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

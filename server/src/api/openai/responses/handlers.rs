//! The handlers of `/v1/responses`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::reply::{Keep, Maker, ResponsesFold, ResponsesWriter};
use super::request::{Prepared, ResponsesRequest};
use super::store::Record;
use crate::api::body::Json;
use crate::api::openai::request::count;
use crate::app::App;
use crate::error::{ApiError, Flavour, Kind};
use crate::reply::{Framing, json_response, streamed, whole};
use crate::run::Run;

/// Makes a response.
pub async fn create(State(app): State<Arc<App>>, Json(request): Json<ResponsesRequest>) -> Response<Body> {
    let streams = request.stream == Some(true);
    match begin(&app, request).await {
        Err(error) => error.response(Flavour::OpenAi),
        Ok((run, maker)) if streams => streamed(run, ResponsesWriter::new(maker), Framing::Events),
        Ok((run, maker)) => whole(run, ResponsesFold::new(maker), Flavour::OpenAi).await,
    }
}

async fn begin(app: &Arc<App>, request: ResponsesRequest) -> Result<(Run, Maker), ApiError> {
    app.open()?;
    let stores = request.store.unwrap_or(true);
    let Prepared { ask, head, input, wants } = prepare(app, request).await?;
    let run = Run::begin(app, ask).await.map_err(renamed)?;
    let keep = stores.then(|| Keep { store: Arc::clone(&app.responses), input });
    Ok((run, Maker::new(head, wants, keep)))
}

async fn prepare(app: &Arc<App>, request: ResponsesRequest) -> Result<Prepared, ApiError> {
    let model = app.models.find(request.model.as_deref().unwrap_or_default())?.id.clone();
    let store = Arc::clone(&app.responses);
    // Reading files and long conversations takes milliseconds.
    blocking(move || {
        let history = store.history_of(request.previous_response_id.as_deref())?;
        request.prepare(model, &history)
    })
    .await
}

/// Runs work that computes or reads for a while.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request was given up: the log says why")))
}

/// An error with the field names of this API.
pub(super) fn renamed(error: ApiError) -> ApiError {
    let name = match error.param.as_deref() {
        Some("response_format") => "text.format",
        Some("messages") => "input",
        _ => return error,
    };
    let message = error.message.replace("`response_format`", "`text.format`");
    ApiError { param: Some(name.into()), message, ..error }
}

/// Counts the tokens of a request's input.
pub async fn input_tokens(State(app): State<Arc<App>>, Json(request): Json<ResponsesRequest>) -> Response<Body> {
    let counted = async {
        app.open()?;
        let prepared = prepare(&app, request).await?;
        let served = app.models.get(&prepared.ask.model).await?;
        let count = blocking(move || Ok(served.encode(&prepared.ask)?.ids.len())).await.map_err(renamed)?;
        Ok(json!({"object": "response.input_tokens", "input_tokens": count}))
    };
    finish(counted.await)
}

/// Parameters of `GET /v1/responses/{id}`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct OneQuery {
    stream: Option<bool>,
}

/// A response that was stored.
pub async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Result<Query<OneQuery>, QueryRejection>,
) -> Response<Body> {
    let found = async {
        let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
        if query.stream == Some(true) {
            let message = "`stream` is not supported here: the response is there as a whole";
            return Err(ApiError::field("stream", message).code("unsupported_parameter"));
        }
        Ok(find(&app, id).await?.response.clone())
    };
    finish(found.await)
}

/// Forgets a response.
pub async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    let store = Arc::clone(&app.responses);
    let deleted = blocking(move || match store.delete(&id) {
        true => Ok(json!({"id": id, "object": "response", "deleted": true})),
        false => Err(missing(&id)),
    });
    finish(deleted.await)
}

/// Cancels a response in the background. There are none, so this returns an error.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    let cancelled = async {
        find(&app, id).await?;
        let message = "only responses with `background` can be cancelled: close the connection to cancel others";
        Err(ApiError::invalid(message))
    };
    finish(cancelled.await)
}

/// The part of a list that is requested.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ItemsQuery {
    after: Option<String>,
    limit: Option<i64>,
    order: Option<String>,
}

/// Items that a response answered.
pub async fn input_items(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Result<Query<ItemsQuery>, QueryRejection>,
) -> Response<Body> {
    let listed = async {
        let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
        let record = find(&app, id).await?;
        page(&record.input, &query)
    };
    finish(listed.await)
}

/// A page of a list whose items have ids, the oldest first.
///
/// # Errors
/// Names the parameter that has an impossible value.
pub fn page(items: &[Value], query: &ItemsQuery) -> Result<Value, ApiError> {
    let limit = count("limit", query.limit, 1, 100)?.unwrap_or(20);
    let mut items: Vec<&Value> = items.iter().collect();
    match query.order.as_deref() {
        Some("asc") => {}
        None | Some("desc") => items.reverse(),
        Some(other) => {
            let message = format!("`order` is {other:?}, it must be asc or desc");
            return Err(ApiError::field("order", message).code("invalid_value"));
        }
    }
    let from = match &query.after {
        None => 0,
        Some(after) => match items.iter().position(|item| item["id"] == after.as_str()) {
            Some(at) => at + 1,
            None => return Err(ApiError::field("after", format!("`after`: there is no item {after:?}"))),
        },
    };
    let data: Vec<&Value> = items[from..].iter().copied().take(limit).collect();
    let id = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    Ok(json!({
        "object": "list",
        "first_id": id(data.first()),
        "last_id": id(data.last()),
        "has_more": items.len() > from + data.len(),
        "data": data,
    }))
}

async fn find(app: &Arc<App>, id: String) -> Result<Arc<Record>, ApiError> {
    let store = Arc::clone(&app.responses);
    blocking(move || store.get(&id).ok_or_else(|| missing(&id))).await
}

fn missing(id: &str) -> ApiError {
    ApiError::new(Kind::NotFound, format!("there is no response {id:?}: it was not stored, or it is gone"))
}

fn finish(answer: Result<Value, ApiError>) -> Response<Body> {
    match answer {
        Ok(value) => json_response(&value),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

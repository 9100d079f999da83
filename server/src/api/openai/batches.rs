//! `/v1/files` and `/v1/batches`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Multipart, Path, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};

use super::line::PATHS;
use super::responses::{ItemsQuery, page};
use crate::api::body::Json;
use crate::app::App;
use crate::batches::{Batches, NewBatch};
use crate::error::{ApiError, Flavour, Kind};
use crate::reply::json_response;

/// Most bytes of a form's field that is no file.
const FIELD: usize = 4096;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        // Files have a bound of their own, and are never in memory as a whole.
        .route("/v1/files", get(files).post(upload).layer(DefaultBodyLimit::disable()))
        .route("/v1/files/{id}", get(file).delete(delete))
        .route("/v1/files/{id}/content", get(content))
        .route("/v1/batches", get(batches).post(create))
        .route("/v1/batches/{id}", get(batch))
        .route("/v1/batches/{id}/cancel", post(cancel))
}

/// A request for a batch.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct BatchRequest {
    /// The file with its requests.
    pub input_file_id: String,
    /// The path that they name.
    pub endpoint: String,
    /// Accepted and reported; nothing is done in less or more time for it.
    pub completion_window: Option<String>,
    /// Keys and values of the client's own.
    pub metadata: Option<BTreeMap<String, String>>,
}

fn there(app: &App) -> Result<Arc<Batches>, ApiError> {
    app.open()?;
    app.batches.clone().ok_or_else(|| {
        let message = "this server keeps no files and batches: start it with --batches DIR";
        ApiError::new(Kind::NotImplemented, message).code("not_implemented")
    })
}

/// Does what may wait for the drive.
async fn with_batches(
    app: Arc<App>,
    work: impl FnOnce(&Batches) -> Result<Value, ApiError> + Send + 'static,
) -> Response<Body> {
    let done = async {
        let batches = there(&app)?;
        let done = tokio::task::spawn_blocking(move || work(&batches)).await;
        done.unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request was given up: the log says why")))
    };
    match done.await {
        Ok(value) => json_response(&value),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

/// Which files are listed.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FilesQuery {
    purpose: Option<String>,
}

async fn files(
    State(app): State<Arc<App>>,
    purpose: Result<Query<FilesQuery>, QueryRejection>,
    query: Result<Query<ItemsQuery>, QueryRejection>,
) -> Response<Body> {
    with_batches(app, |batches| {
        let wrong = |rejection: QueryRejection| ApiError::invalid(rejection.body_text());
        let (Query(FilesQuery { purpose }), Query(query)) = (purpose.map_err(wrong)?, query.map_err(wrong)?);
        let mut files = batches.files();
        files.retain(|file| purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose));
        page(&files.iter().map(|file| file.to_json()).collect::<Vec<_>>(), &query)
    })
    .await
}

async fn upload(State(app): State<Arc<App>>, request: Request) -> Response<Body> {
    match receive(&app, request).await {
        Ok(value) => json_response(&value),
        Err(error) => error.response(Flavour::OpenAi),
    }
}

async fn receive(app: &App, request: Request) -> Result<Value, ApiError> {
    let batches = there(app)?;
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let (mut purpose, mut file) = (None, None);
    while let Some(mut field) = form.next_field().await.map_err(broken)? {
        match field.name() {
            Some("purpose") => purpose = Some(short(&mut field).await?),
            Some("file") => {
                let name = field.file_name().unwrap_or("batch.jsonl").chars().filter(|c| !c.is_control());
                let name: String = name.take(255).collect();
                let mut upload = batches.upload()?;
                while let Some(bytes) = field.chunk().await.map_err(broken)? {
                    upload.receive(&bytes)?;
                }
                file = Some((upload, name));
            }
            // What clients may say besides changes nothing.
            _ => _ = short(&mut field).await?,
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        Some(other) => {
            let message = format!("`purpose` is {other:?}; files here are for batches, so it must be \"batch\"");
            return Err(ApiError::field("purpose", message).code("invalid_value"));
        }
        None => return Err(ApiError::field("purpose", "`purpose` is missing: give \"batch\"")),
    }
    let (upload, name) = file.ok_or_else(|| ApiError::field("file", "`file` is missing"))?;
    Ok(upload.keep(name, "batch")?.to_json())
}

/// A field of a form that is a word.
async fn short(field: &mut Field<'_>) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(bytes) = field.chunk().await.map_err(broken)? {
        text.extend_from_slice(&bytes);
        if text.len() > FIELD {
            return Err(ApiError::invalid(format!("a field of the form has more than {FIELD} bytes")));
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn broken(error: MultipartError) -> ApiError {
    ApiError::invalid(format!("the form cannot be read: {}", error.body_text()))
}

async fn file(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    with_batches(app, move |batches| Ok(batches.file(&id)?.to_json())).await
}

async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    with_batches(app, move |batches| {
        batches.delete(&id)?;
        Ok(json!({"id": id, "object": "file", "deleted": true}))
    })
    .await
}

async fn content(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    let read = async {
        let batches = there(&app)?;
        let path = batches.content(&batches.file(&id)?.id);
        let unreadable =
            |error: std::io::Error| ApiError::new(Kind::Internal, format!("the file cannot be read: {error}"));
        let file = tokio::task::spawn_blocking(move || std::fs::File::open(path)).await;
        file.map_err(|error| unreadable(error.into()))?.map_err(unreadable)
    };
    match read.await {
        Ok(file) => {
            let mut response = Response::new(Body::from_stream(pieces(file)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
            response
        }
        Err(error) => error.response(Flavour::OpenAi),
    }
}

/// A file in pieces.
fn pieces(file: std::fs::File) -> impl futures_util::Stream<Item = std::io::Result<Vec<u8>>> {
    const PIECE: u64 = 256 << 10;
    futures_util::stream::unfold(Some(file), |file| async {
        use std::io::Read as _;
        let mut file = file?;
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            let read = file.by_ref().take(PIECE).read_to_end(&mut bytes);
            read.map(|_| (bytes, file))
        });
        match read.await.map_err(std::io::Error::from).flatten() {
            Ok((bytes, _)) if bytes.is_empty() => None,
            Ok((bytes, file)) => Some((Ok(bytes), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

async fn batches(State(app): State<Arc<App>>, query: Result<Query<ItemsQuery>, QueryRejection>) -> Response<Body> {
    with_batches(app, |batches| {
        let Query(query) = query.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
        page(&batches.batches().iter().map(|batch| batch.to_json()).collect::<Vec<_>>(), &query)
    })
    .await
}

async fn create(State(app): State<Arc<App>>, request: Request) -> Response<Body> {
    if let Err(error) = there(&app) {
        return error.response(Flavour::OpenAi);
    }
    let request: BatchRequest = match Json::from_request(request, &()).await {
        Ok(Json(request)) => request,
        Err(response) => return response,
    };
    with_batches(app, move |batches| {
        let BatchRequest { input_file_id, endpoint, completion_window, metadata } = request;
        if !PATHS.contains(&endpoint.as_str()) {
            let message = format!("`endpoint` is {endpoint:?}, it must be one of {}", PATHS.join(", "));
            return Err(ApiError::field("endpoint", message).code("invalid_value"));
        }
        let completion_window = completion_window.unwrap_or_else(|| "24h".into());
        Ok(batches.create(NewBatch { input_file_id, endpoint, completion_window, metadata })?.to_json())
    })
    .await
}

async fn batch(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    with_batches(app, move |batches| Ok(batches.batch(&id)?.to_json())).await
}

async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response<Body> {
    with_batches(app, move |batches| Ok(batches.cancel(&id)?.to_json())).await
}

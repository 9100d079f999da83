//! `/v1/files` and `/v1/batches`: known, and not there yet.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::Response;
use axum::routing::{get, post};

use crate::app::App;
use crate::error::{ApiError, Flavour, Kind};

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/files", get(none).post(none))
        .route("/v1/files/{id}", get(none).delete(none))
        .route("/v1/files/{id}/content", get(none))
        .route("/v1/batches", get(none).post(none))
        .route("/v1/batches/{id}", get(none))
        .route("/v1/batches/{id}/cancel", post(none))
}

async fn none() -> Response<Body> {
    let message = "files and batches need the batch runner, which this version does not have yet: \
                   send the requests one by one, several at a time are served together";
    ApiError::new(Kind::NotImplemented, message).code("not_implemented").response(Flavour::OpenAi)
}

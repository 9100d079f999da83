//! Ollama's API: <https://docs.ollama.com/api>.

mod catalogue;
mod chat;
mod reply;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::routing::{MethodFilter, get, on, post};

use crate::app::App;

pub use request::{ChatRequest, GenerateRequest};

/// The version of the API that these paths implement. Clients use it to decide which requests they can send.
const VERSION: &str = "0.13.0";

/// The paths with which Ollama manages models. Here, models are files with which the server was started.
const MANAGEMENT: [(&str, MethodFilter); 6] = [
    ("/api/pull", MethodFilter::POST),
    ("/api/push", MethodFilter::POST),
    ("/api/create", MethodFilter::POST),
    ("/api/copy", MethodFilter::POST),
    ("/api/delete", MethodFilter::DELETE),
    ("/api/blobs/{digest}", MethodFilter::POST),
];

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    let routes = Router::new()
        .route("/api/version", get(catalogue::version))
        .route("/api/tags", get(catalogue::tags))
        .route("/api/ps", get(catalogue::ps))
        .route("/api/show", post(catalogue::show))
        .route("/api/chat", post(chat::chat))
        .route("/api/generate", post(chat::generate))
        .route("/api/embed", post(catalogue::no_embeddings))
        .route("/api/embeddings", post(catalogue::no_embeddings));
    let add = |routes: Router<Arc<App>>, (path, method)| routes.route(path, on(method, catalogue::no_management));
    MANAGEMENT.into_iter().fold(routes, add)
}

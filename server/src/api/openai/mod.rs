//! OpenAI's API: <https://platform.openai.com/docs/api-reference>.

mod batches;
mod chat;
mod chat_reply;
mod completions;
pub mod line;
mod logprobs;
mod models;
pub mod request;
pub mod responses;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use crate::app::App;

pub use batches::BatchRequest;
pub use chat::ChatRequest;
pub use completions::CompletionRequest;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .merge(responses::routes())
        .merge(batches::routes())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    crate::clock::now().as_secs()
}

/// An id that cannot be predicted.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

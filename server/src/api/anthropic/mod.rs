//! Anthropic's API: <https://platform.claude.com/docs/en/api/messages>.

mod content;
mod messages;
pub mod models;
mod reply;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Response};
use axum::routing::post;

use crate::app::App;

pub use reply::{MessageFold, MessageWriter};
pub use request::MessagesRequest;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
}

/// Adds the id of the request to a response, unless it has it already.
fn identify(mut response: Response<Body>, request_id: &str) -> Response<Body> {
    if let Ok(id) = HeaderValue::from_str(request_id) {
        response.headers_mut().entry("request-id").or_insert(id);
    }
    response
}

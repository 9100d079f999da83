//! `/v1/responses`: OpenAI's Responses API (<https://platform.openai.com/docs/api-reference/responses>), as Open Responses
//! (<https://www.openresponses.org>, 2026-04-24) specifies it for other servers.
//!
//! If the two differ, this follows OpenAI's, because clients are written for it: thinking is streamed as
//! `response.reasoning_text.delta`.

mod compact;
mod handlers;
mod item;
mod items;
mod reasoning;
mod reply;
pub mod request;
pub mod schema;
mod socket;
pub mod store;
mod tools;

#[cfg(test)]
mod tests;

pub use compact::CompactRequest;
pub use handlers::{ItemsQuery, page};
pub use reply::{Maker, ResponsesFold};

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use crate::app::App;

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/responses", post(handlers::create).get(socket::open))
        .route("/v1/responses/compact", post(compact::compact))
        .route("/v1/responses/input_tokens", post(handlers::input_tokens))
        .route("/v1/responses/{id}", get(handlers::one).delete(handlers::delete))
        .route("/v1/responses/{id}/cancel", post(handlers::cancel))
        .route("/v1/responses/{id}/input_items", get(handlers::input_items))
}

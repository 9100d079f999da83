//! The APIs. Each translates its JSON into an [`Ask`](crate::ask::Ask), and the steps of answers into its own objects.

pub mod anthropic;
mod arguments;
pub mod body;
pub mod ollama;
pub mod openai;
pub mod openapi;
pub mod own;
pub mod sessions;

use std::sync::Arc;

use axum::Router;

use crate::app::App;

/// All paths of all APIs.
pub fn routes() -> Router<Arc<App>> {
    let ours = Router::new().merge(openapi::routes()).merge(own::routes()).merge(sessions::routes());
    ours.merge(openai::routes()).merge(anthropic::routes()).merge(ollama::routes())
}

//! The APIs. Each translates its JSON into an [`Ask`](crate::ask::Ask), and the steps of answers into its own objects.

pub mod body;
pub mod openai;
pub mod own;
pub mod sessions;

use std::sync::Arc;

use axum::Router;

use crate::app::App;

/// All paths of all APIs.
pub fn routes() -> Router<Arc<App>> {
    Router::new().merge(own::routes()).merge(sessions::routes()).merge(openai::routes())
}

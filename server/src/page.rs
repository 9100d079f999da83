//! The page at `/`.

use axum::Router;

/// The page's paths.
pub fn router() -> Router {
    Router::new()
}

//! The id of a request: its response names it, and so do the lines of the log that belong to it.

use std::future::Future;
use std::sync::Arc;

use uuid::Uuid;

tokio::task_local! {
    static ID: Arc<str>;
}

/// A new id.
pub fn new() -> Arc<str> {
    format!("req_{}", Uuid::new_v4().simple()).into()
}

/// The id of the request that this task handles; a new one outside of requests, such as in tests.
pub fn current() -> Arc<str> {
    ID.try_with(Arc::clone).unwrap_or_else(|_| new())
}

/// Handles a request with this id.
pub async fn with<T>(id: Arc<str>, handled: impl Future<Output = T>) -> T {
    ID.scope(id, handled).await
}

/// Computes something for the request with this id, such as the end of its response.
pub fn within<T>(id: &Arc<str>, work: impl FnOnce() -> T) -> T {
    ID.sync_scope(Arc::clone(id), work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_one_id() {
        assert_ne!(current(), current(), "there is no request");
        let id = new();
        assert!(id.starts_with("req_") && id.len() == 36);
        within(&id, || assert_eq!((current(), current()), (Arc::clone(&id), Arc::clone(&id))));
    }
}

//! The state that all handlers share, and the routes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, Response};
use axum::middleware::{self, Next};

use sluice_sessions::Store;
use tokio::sync::{Semaphore, watch};
use tower_http::timeout::{RequestBodyDeadlineLayer, RequestBodyTimeoutLayer};

use crate::api;
use crate::api::openai::responses::store::ResponseStore;
use crate::batches::Batches;
use crate::error::{ApiError, Cause, Flavour, Kind};
use crate::guard::{self, Guard};
use crate::live::Live;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::options::ServerOptions;
use crate::page;
use crate::request_id;

/// How long a client may pause while it sends a body.
const BODY: Duration = Duration::from_secs(30);
/// How long it may take to send a whole body, so that a client that sends a byte now and then does not keep its connection for
/// ever.
const WHOLE_BODY: Duration = Duration::from_secs(600);

/// Tells how answers differ from the model's own, if the server was started with such options.
pub const LOSSY: HeaderName = HeaderName::from_static("x-sluice-lossy");
/// Says in which form prompts are read, if it is not the usual one.
pub const PROMPT_ATTENTION: HeaderName = HeaderName::from_static("x-sluice-prompt-attention");

/// The id of the request, which the log names too.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Most requests that are prepared at the same time.
const PREPARING: usize = 2;
/// Most WebSockets at the same time.
pub const SOCKETS: u32 = 256;

/// The state that all handlers share.
pub struct App {
    /// How the server was set up.
    pub options: ServerOptions,
    /// The models.
    pub models: Arc<Models>,
    /// What models remember of conversations, on the drive, if it is kept there.
    pub store: Option<Arc<Store>>,
    /// The answers that are being made.
    pub live: Live,
    /// Responses that can be continued.
    pub responses: Arc<ResponseStore>,
    /// Files and batches, if there are any.
    pub batches: Option<Arc<Batches>>,
    /// Limits the requests that are being prepared, because templates, tokenizers and grammars take memory and processors.
    pub preparing: Semaphore,
    /// Limits the WebSockets, which are open for as long as clients like.
    pub sockets: Arc<Semaphore>,
    /// Counters.
    pub metrics: Metrics,
    /// When the server began.
    pub started: Instant,
    /// Set once the server is about to end.
    pub closing: watch::Sender<bool>,
}

impl App {
    /// A server's state.
    pub fn new(
        options: ServerOptions,
        models: Models,
        store: Option<Arc<Store>>,
        batches: Option<Arc<Batches>>,
    ) -> Arc<Self> {
        let responses = Arc::new(ResponseStore::new(options.sessions.as_ref()));
        Arc::new(App {
            responses,
            options,
            models: Arc::new(models),
            store,
            live: Live::default(),
            batches,
            preparing: Semaphore::new(PREPARING),
            sockets: Arc::new(Semaphore::new(SOCKETS as usize)),
            metrics: Metrics::new(),
            started: Instant::now(),
            closing: watch::Sender::new(false),
        })
    }

    /// Refuses new work once the server is about to end.
    ///
    /// # Errors
    /// If the server is about to end.
    pub fn open(&self) -> Result<(), ApiError> {
        match *self.closing.borrow() {
            true => Err(ApiError::new(Kind::Closing, "the server is about to end: try again when it is back")),
            false => Ok(()),
        }
    }

    /// Completes once the server is about to end.
    pub async fn ending(&self) {
        // It fails only if there is no server any more.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }
}

/// All paths, protected by the guard.
pub fn router(app: &Arc<App>) -> Router {
    let guard: Arc<Guard> = Arc::new(app.options.guard.clone());
    api::routes()
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(Arc::clone(app))
        .merge(page::router())
        .layer(DefaultBodyLimit::max(app.options.max_body))
        .layer(RequestBodyTimeoutLayer::new(BODY))
        .layer(RequestBodyDeadlineLayer::new(WHOLE_BODY))
        .layer(middleware::from_fn_with_state(guard, guard::check))
        .layer(middleware::from_fn_with_state(Arc::clone(app), record))
}

async fn not_found(request: Request) -> Response<Body> {
    let path = request.uri().path();
    let message = format!("there is nothing at {path}: /openapi.json lists what there is");
    ApiError::new(Kind::NotFound, message).response(Flavour::of(path))
}

async fn not_allowed(request: Request) -> Response<Body> {
    let path = request.uri().path();
    ApiError::new(Kind::Method, format!("{path} does not take {}", request.method())).response(Flavour::of(path))
}

/// Counts and logs a request. The contents of requests are not logged.
async fn record(State(app): State<Arc<App>>, request: Request, next: Next) -> Response<Body> {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let id = request_id::new();
    let mut response = request_id::with(Arc::clone(&id), next.run(request)).await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if let Some(Ok(lossy)) = app.models.lossy().map(HeaderValue::from_str) {
        response.headers_mut().insert(LOSSY, lossy);
    }
    if let Some(form) = app.models.prompt_attention() {
        response.headers_mut().insert(PROMPT_ATTENTION, HeaderValue::from_static(form));
    }
    let status = response.status().as_u16();
    app.metrics.response(status);
    let milliseconds = began.elapsed().as_millis() as u64;
    let (id, cause) = (&*id, response.extensions().get::<Cause>());
    match (path.as_str(), cause) {
        (_, Some(Cause(cause))) => tracing::error!(%method, path, status, milliseconds, id, cause, "response"),
        // Programs that watch the server ask every second.
        ("/health" | "/metrics" | "/slots" | "/status", None) => {
            tracing::debug!(%method, path, status, milliseconds, id, "response")
        }
        (_, None) => tracing::info!(%method, path, status, milliseconds, id, "response"),
    }
    response
}

//! `/v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use serde_json::{Value, json};

use super::identify;
use super::reply::{MessageFold, MessageWriter};
use super::request::MessagesRequest;
use crate::api::body::Json;
use crate::app::App;
use crate::error::{ApiError, Flavour, Kind};
use crate::hygiene;
use crate::reply::{Framing, json_response, streamed, whole};
use crate::request_id;
use crate::run::Run;

/// Makes an answer.
pub async fn create(State(app): State<Arc<App>>, Json(request): Json<MessagesRequest>) -> Response<Body> {
    let request_id = request_id::current().to_string();
    let streams = request.stream == Some(true);
    let shows_thinking = request.shows_thinking();
    let response = match begin(&app, request).await {
        Err(error) => error.response(Flavour::Anthropic),
        Ok((run, model)) if streams => {
            let writer = MessageWriter::new(model, request_id.clone(), shows_thinking);
            streamed(run, writer, Framing::Events)
        }
        Ok((run, model)) => whole(run, MessageFold::new(model, shows_thinking), Flavour::Anthropic).await,
    };
    identify(response, &request_id)
}

async fn begin(app: &Arc<App>, request: MessagesRequest) -> Result<(Run, String), ApiError> {
    app.open()?;
    let model = app.models.find(&request.model)?.id.clone();
    let ask = request.into_ask()?;
    Ok((Run::begin(app, ask).await?, model))
}

/// Counts the tokens of a request.
pub async fn count_tokens(State(app): State<Arc<App>>, Json(request): Json<MessagesRequest>) -> Response<Body> {
    let response = match count(&app, request).await {
        Ok(count) => json_response(&count),
        Err(error) => error.response(Flavour::Anthropic),
    };
    identify(response, &request_id::current())
}

async fn count(app: &Arc<App>, mut request: MessagesRequest) -> Result<Value, ApiError> {
    app.open()?;
    // `max_tokens` is not required for counting.
    request.max_tokens.get_or_insert(1);
    let mut ask = request.into_ask()?;
    hygiene::apply(&app.options, &mut ask);
    let served = app.models.get(&ask.model).await?;
    let counted = tokio::task::spawn_blocking(move || served.encode(&ask).map(|encoded| encoded.ids.len())).await;
    let failed = |_| ApiError::new(Kind::Internal, "the request could not be counted: the log says why");
    Ok(json!({"input_tokens": counted.map_err(failed)??}))
}

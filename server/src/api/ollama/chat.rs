//! `/api/chat` and `/api/generate`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use tokio::time::Instant;

use super::reply::{Head, Memory, OllamaFold, OllamaWriter, Shape};
use super::request::{ChatRequest, GenerateRequest, lets_go};
use crate::api::body::Json;
use crate::app::App;
use crate::ask::{Ask, Input};
use crate::error::{ApiError, Flavour};
use crate::hygiene;
use crate::reply::{Framing, json_response, streamed, whole};
use crate::run::Run;

/// Answers in a conversation.
pub async fn chat(State(app): State<Arc<App>>, Json(request): Json<ChatRequest>) -> Response<Body> {
    let head = Head::new(request.model.clone(), Shape::Chat);
    let streams = request.stream != Some(false);
    if request.messages.is_empty() {
        return load(&app, head, lets_go(&request.keep_alive)).await;
    }
    match begin(&app, request.into_ask()).await {
        Ok((run, _)) => respond(run, head, None, streams).await,
        Err(error) => error.response(Flavour::Ollama),
    }
}

/// Answers a prompt.
pub async fn generate(State(app): State<Arc<App>>, Json(request): Json<GenerateRequest>) -> Response<Body> {
    let head = Head::new(request.model.clone(), Shape::Generate);
    let streams = request.stream != Some(false);
    if request.prompt.is_empty() {
        return load(&app, head, lets_go(&request.keep_alive)).await;
    }
    match begin(&app, request.into_ask()).await {
        Ok((run, ask)) => {
            let memory = (!matches!(ask.input, Input::Text(_))).then(|| Memory::new(&app, ask));
            respond(run, head, memory, streams).await
        }
        Err(error) => error.response(Flavour::Ollama),
    }
}

async fn begin(app: &Arc<App>, ask: Result<Ask, ApiError>) -> Result<(Run, Ask), ApiError> {
    app.open()?;
    let mut ask = ask?;
    app.models.find(&ask.model)?;
    hygiene::apply(&app.options, &mut ask);
    Ok((Run::begin(app, ask.clone()).await?, ask))
}

async fn respond(run: Run, mut head: Head, memory: Option<Memory>, streams: bool) -> Response<Body> {
    if run.served().is_some() {
        head.loaded(Instant::now());
    }
    match streams {
        true => streamed(run, OllamaWriter::new(head, memory), Framing::Lines),
        false => whole(run, OllamaFold::new(head, memory), Flavour::Ollama).await,
    }
}

/// A request without a prompt asks to load or to unload the model. Models are unloaded automatically when they are idle.
async fn load(app: &Arc<App>, head: Head, lets_go: bool) -> Response<Body> {
    let outcome = async {
        app.open()?;
        match lets_go {
            true => app.models.find(head.model()).map(|_| "unload"),
            false => app.models.get(head.model()).await.map(|_| "load"),
        }
    };
    match outcome.await {
        Ok(why) => json_response(&head.nothing(why)),
        Err(error) => error.response(Flavour::Ollama),
    }
}

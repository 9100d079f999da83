//! Errors of requests: one type for all APIs, and each API's own object for it.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, Response, StatusCode};
use serde_json::{Value, json};
use sluice_generate::GenerationError;
use sluice_model::ModelError;
use sluice_model::engine::RuntimeError;

use crate::request_id;

/// Why a request is refused or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request is invalid.
    Invalid,
    /// No key, or a wrong one.
    Unauthorized,
    /// It comes from a page or a host that is not allowed.
    Forbidden,
    /// The thing does not exist.
    NotFound,
    /// The path exists, but not the method.
    Method,
    /// The body, or the text in it, is too large.
    TooLarge,
    /// The queue is full.
    Busy,
    /// The client was too slow.
    Timeout,
    /// The server does not support this.
    NotImplemented,
    /// The server is about to end.
    Closing,
    /// A fault of the server.
    Internal,
}

impl Kind {
    /// The status of the response.
    pub fn status(self) -> StatusCode {
        match self {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::Unauthorized => StatusCode::UNAUTHORIZED,
            Kind::Forbidden => StatusCode::FORBIDDEN,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Method => StatusCode::METHOD_NOT_ALLOWED,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::Busy => StatusCode::TOO_MANY_REQUESTS,
            Kind::Timeout => StatusCode::REQUEST_TIMEOUT,
            Kind::NotImplemented => StatusCode::NOT_IMPLEMENTED,
            Kind::Closing => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's name for it.
    fn openai(self) -> &'static str {
        match self {
            Kind::Unauthorized => "authentication_error",
            Kind::Forbidden => "permission_error",
            Kind::Busy => "rate_limit_error",
            Kind::Closing | Kind::Internal => "server_error",
            Kind::NotImplemented => "not_implemented_error",
            _ => "invalid_request_error",
        }
    }

    /// Anthropic's name for it.
    fn anthropic(self) -> &'static str {
        match self {
            Kind::Unauthorized => "authentication_error",
            Kind::Forbidden => "permission_error",
            Kind::NotFound => "not_found_error",
            Kind::TooLarge => "request_too_large",
            Kind::Busy => "rate_limit_error",
            Kind::Timeout => "timeout_error",
            Kind::Closing => "overloaded_error",
            Kind::Internal => "api_error",
            Kind::Invalid | Kind::Method | Kind::NotImplemented => "invalid_request_error",
        }
    }
}

/// Why a response says that the server is at fault: for the log, which does not have the response itself.
#[derive(Clone, Debug)]
pub struct Cause(pub String);

/// The code of an error that concerns only one request, although it is not the client's fault.
pub const PANICKED: &str = "panicked";

/// An error that is sent to a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The kind of error.
    pub kind: Kind,
    /// What is wrong, and what the client can do.
    pub message: String,
    /// The invalid field of the request.
    pub param: Option<String>,
    /// A word for programs, if the API has one.
    pub code: Option<&'static str>,
    /// Seconds after which the client should try again.
    pub retry_after: Option<u32>,
    /// If a prompt is too long: its length.
    pub too_long: Option<TooLong>,
}

/// The length of a prompt that is too long, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Of the prompt.
    pub prompt: usize,
    /// Of the longest that fits.
    pub context: usize,
    /// Of the longest that would fit with all the context that the model takes.
    pub most: usize,
}

impl ApiError {
    /// An error of a kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        ApiError { kind, message: message.into(), param: None, code: None, retry_after: None, too_long: None }
    }

    /// An error for an invalid request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// An error for a field with an invalid value.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..Self::invalid(message) }
    }

    /// The same, with a word for programs.
    #[must_use]
    pub fn code(self, code: &'static str) -> Self {
        ApiError { code: Some(code), ..self }
    }

    /// An error for a full queue.
    pub fn busy(queued: usize) -> Self {
        let message = format!("{queued} requests are waiting already: try again later");
        ApiError { retry_after: Some(10), ..Self::new(Kind::Busy, message).code("rate_limit_exceeded") }
    }

    /// The object of an API for this error.
    pub fn body(&self, flavour: Flavour) -> Value {
        let message = &self.words(flavour);
        match flavour {
            Flavour::OpenAi => json!({
                "error": {"message": message, "type": self.kind.openai(), "param": self.param, "code": self.code},
            }),
            Flavour::Anthropic => json!({
                "type": "error",
                "error": {"type": self.kind.anthropic(), "message": message},
                "request_id": &*request_id::current(),
            }),
            Flavour::Ollama => json!({"error": message}),
        }
    }

    /// The message. Clients of each API look for that API's own words for a prompt that is too long, to shorten the conversation.
    fn words(&self, flavour: Flavour) -> String {
        match (self.too_long, flavour) {
            (Some(TooLong { prompt, context, .. }), Flavour::Anthropic) => {
                format!("prompt is too long: {prompt} tokens > {context} maximum")
            }
            (Some(TooLong { prompt, context, most }), _) => {
                let more = match context < most {
                    true => format!(", or start the server with a larger --context, at most {most}"),
                    false => String::new(),
                };
                format!(
                    "this model's maximum context length is {context} tokens, and the prompt has {prompt}: shorten it{more}"
                )
            }
            (None, _) => self.message.clone(),
        }
    }

    /// The whole response.
    pub fn response(&self, flavour: Flavour) -> Response<Body> {
        let body = self.body(flavour);
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.kind.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(Ok(id)) = body["request_id"].as_str().map(HeaderValue::from_str) {
            headers.insert("request-id", id);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.kind.status().is_server_error() {
            response.extensions_mut().insert(Cause(self.message.clone()));
        }
        response
    }
}

impl From<GenerationError> for ApiError {
    fn from(error: GenerationError) -> Self {
        let message = error.to_string();
        match error {
            GenerationError::PromptTooLong { prompt, context, most } => {
                let error = Self::invalid(message).code("context_length_exceeded");
                ApiError { too_long: Some(TooLong { prompt, context, most }), ..error }
            }
            GenerationError::QueueFull { queued, .. } => Self::busy(queued),
            GenerationError::Closed => Self::new(Kind::Closing, message),
            GenerationError::Engine(RuntimeError::Model(ModelError::PagesFull(_))) => {
                ApiError { retry_after: Some(10), ..Self::new(Kind::Busy, message) }
            }
            // The cause is a part of this request, and nothing else.
            GenerationError::Panicked { .. } => Self::new(Kind::Internal, message).code(PANICKED),
            GenerationError::Engine(_) | GenerationError::Thread { .. } | GenerationError::SampledTooMany { .. } => {
                Self::new(Kind::Internal, message)
            }
            _ => Self::invalid(message),
        }
    }
}

impl From<sluice_text::TextError> for ApiError {
    fn from(error: sluice_text::TextError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// The API whose objects a path uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// OpenAI; also used for our own paths.
    OpenAi,
    /// Anthropic.
    Anthropic,
    /// Ollama.
    Ollama,
}

impl Flavour {
    /// The flavour of a path.
    pub fn of(path: &str) -> Self {
        match path {
            _ if path == "/v1/messages" || path.starts_with("/v1/messages/") => Flavour::Anthropic,
            _ if path.starts_with("/api/") => Flavour::Ollama,
            _ => Flavour::OpenAi,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_api_gets_its_own_object() {
        let error = ApiError::field("temperature", "too hot").code("invalid_value");
        let openai = error.body(Flavour::of("/v1/chat/completions"));
        assert_eq!(openai["error"]["type"], "invalid_request_error");
        assert_eq!(openai["error"]["param"], "temperature");
        assert_eq!(openai["error"]["code"], "invalid_value");
        let anthropic = error.body(Flavour::of("/v1/messages/count_tokens"));
        assert_eq!(anthropic["type"], "error");
        assert_eq!(anthropic["error"]["message"], "too hot");
        let response = error.response(Flavour::Anthropic);
        assert!(response.headers()["request-id"].to_str().unwrap().starts_with("req_"));
        assert_eq!(error.body(Flavour::of("/api/chat")), json!({"error": "too hot"}));
        assert_eq!(Flavour::of("/v1/messages_of_mine"), Flavour::OpenAi);
    }

    #[test]
    fn a_long_prompt_is_refused_in_the_words_that_clients_look_for() {
        let long = |most| ApiError::from(GenerationError::PromptTooLong { prompt: 9000, context: 4096, most });
        let error = long(8192);
        let message = |flavour| error.body(flavour)["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(message(Flavour::OpenAi).contains("maximum context length is 4096 tokens"));
        assert_eq!(message(Flavour::Anthropic), "prompt is too long: 9000 tokens > 4096 maximum");
        assert_eq!(error.body(Flavour::OpenAi)["error"]["code"], "context_length_exceeded");
        // More context is advised only where the model takes more.
        assert!(message(Flavour::OpenAi).ends_with("or start the server with a larger --context, at most 8192"));
        assert!(error.message.ends_with("with more context, at most 8192"), "{error}");
        let error = long(4096);
        assert_eq!(error.message, "the prompt has 9000 tokens, but the model takes at most 4096: shorten it");
        assert!(error.body(Flavour::OpenAi)["error"]["message"].as_str().unwrap().ends_with("shorten it"));
    }

    #[test]
    fn a_full_queue_says_when_to_try_again() {
        let response = ApiError::busy(3).response(Flavour::OpenAi);
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "10");
    }
}

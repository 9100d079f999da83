//! `/openapi.json`: a description of all paths (OpenAPI 3.1, <https://spec.openapis.org/oas/v3.1.1.html>).

mod operations;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::Body;
use axum::http::Response;
use axum::routing::get;
use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use self::operations::{Answer, OPERATIONS, Operation};
use super::{anthropic, ollama, openai, own};
use crate::app::App;
use crate::error::{Flavour, Kind};
use crate::reply::json_response;

/// Schemas of the server's answers.
const ANSWERS: &str = include_str!("answers.json");

/// Errors that every operation can return.
const ERRORS: [Kind; 11] = [
    Kind::Invalid,
    Kind::Unauthorized,
    Kind::Forbidden,
    Kind::NotFound,
    Kind::Method,
    Kind::Timeout,
    Kind::TooLarge,
    Kind::Busy,
    Kind::Internal,
    Kind::NotImplemented,
    Kind::Closing,
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(document);

/// The path.
pub fn routes() -> Router<Arc<App>> {
    Router::new().route("/openapi.json", get(serve))
}

async fn serve() -> Response<Body> {
    json_response(&*DOCUMENT)
}

/// The whole document.
pub fn document() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = describe(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Sluice",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Mixture-of-experts language models far larger than memory, by the APIs of OpenAI, Anthropic and Ollama.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}, {"key": []}],
        "tags": [{"name": "OpenAI"}, {"name": "Anthropic"}, {"name": "Ollama"}, {"name": "Sluice"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": schemas(),
            "responses": errors(),
        },
    })
}

/// The fields that an object for a POST to this path must have; a few of those that it can have if none is needed.
pub fn fields_of(path: &str) -> Vec<&'static str> {
    let body = OPERATIONS.iter().find(|o| o.path == path && o.method == "post").and_then(|o| o.body);
    let document: &'static Value = &DOCUMENT;
    let Some(schema) = body.map(|body| &document["components"]["schemas"][body]) else { return Vec::new() };
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match (required.is_empty(), schema["properties"].as_object()) {
        (true, Some(properties)) => properties.keys().map(String::as_str).take(3).collect(),
        _ => required,
    }
}

fn describe(operation: &Operation) -> Value {
    let mut described = json!({
        "tags": [operation.tag()],
        "summary": operation.summary,
        "operationId": operation_id(operation),
        "responses": answers(operation),
    });
    let parameters = parameters(operation);
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if let Some(body) = operation.body {
        described["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": reference(body)}}});
    }
    if operation.path == "/health" {
        described["security"] = json!([{}]);
    }
    described
}

/// A name for the function in generated clients.
fn operation_id(operation: &Operation) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric();
    let words = operation.path.split(|c| !is_word(c)).filter(|word| !word.is_empty());
    words.fold(operation.method.to_owned(), |id, word| id + "_" + word)
}

fn parameters(operation: &Operation) -> Vec<Value> {
    let braces = operation.path.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
    let in_path = braces.map(
        |(name, _)| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}),
    );
    let in_query = operation.query.iter().map(|parameter| {
        let schema: Value =
            serde_json::from_str(parameter.schema).expect("schemas of parameters are JSON: a test reads them");
        json!({"name": parameter.name, "in": "query", "required": false, "schema": schema})
    });
    in_path.chain(in_query).collect()
}

fn answers(operation: &Operation) -> Value {
    let mut answers = Map::new();
    let stream = json!({"schema": {"type": "string"}});
    let content = match operation.answer {
        Answer::Json(name) => Some(json!({"application/json": {"schema": reference(name)}})),
        Answer::Events(name) => {
            Some(json!({"application/json": {"schema": reference(name)}, "text/event-stream": stream}))
        }
        Answer::Lines(name) => {
            Some(json!({"application/json": {"schema": reference(name)}, "application/x-ndjson": stream}))
        }
        Answer::Other(kind) => Some(json!({kind: stream})),
        Answer::Missing => None,
    };
    if let Some(content) = content {
        answers.insert("200".into(), json!({"description": "Done", "content": content}));
    }
    for kind in ERRORS {
        let name = error_name(operation.flavour(), kind);
        let reference = json!({"$ref": format!("#/components/responses/{name}")});
        answers.insert(kind.status().as_str().into(), reference);
    }
    answers.into()
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn error_schema(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::OpenAi => "OpenAiError",
        Flavour::Anthropic => "AnthropicError",
        Flavour::Ollama => "OllamaError",
    }
}

fn error_name(flavour: Flavour, kind: Kind) -> String {
    format!("{}{}", error_schema(flavour), kind.status().as_str())
}

/// The error responses.
fn errors() -> Value {
    let mut errors = Map::new();
    for flavour in [Flavour::OpenAi, Flavour::Anthropic, Flavour::Ollama] {
        for kind in ERRORS {
            let content = json!({"application/json": {"schema": reference(error_schema(flavour))}});
            let status = kind.status();
            let description = status.canonical_reason().unwrap_or_default();
            let mut error = json!({"description": description, "content": content});
            if kind == Kind::Busy {
                error["headers"] = json!({"Retry-After": {"schema": {"type": "integer", "minimum": 0}}});
            }
            errors.insert(error_name(flavour, kind), error);
        }
    }
    errors.into()
}

/// All schemas: those of requests, which are derived from the types that read them, and those of answers.
fn schemas() -> Value {
    let answers: Value = serde_json::from_str(ANSWERS).expect("the schemas of answers are JSON: a test reads them");
    let Value::Object(mut all) = answers else { return Value::Null };
    add::<openai::ChatRequest>(&mut all, "ChatRequest");
    add::<openai::CompletionRequest>(&mut all, "CompletionRequest");
    add::<openai::BatchRequest>(&mut all, "BatchRequest");
    add::<openai::responses::request::ResponsesRequest>(&mut all, "ResponsesRequest");
    add::<openai::responses::CompactRequest>(&mut all, "CompactRequest");
    add::<anthropic::MessagesRequest>(&mut all, "MessagesRequest");
    add::<ollama::ChatRequest>(&mut all, "OllamaChatRequest");
    add::<ollama::GenerateRequest>(&mut all, "OllamaGenerateRequest");
    add::<own::TokenizeRequest>(&mut all, "TokenizeRequest");
    add::<own::DetokenizeRequest>(&mut all, "DetokenizeRequest");
    add::<own::TemplateRequest>(&mut all, "TemplateRequest");
    all.into()
}

/// Adds a type's schema under a name, and the schemas to which it refers.
fn add<T: ToSchema + PartialSchema>(all: &mut Map<String, Value>, name: &str) {
    let mut others: Vec<(String, RefOr<Schema>)> = Vec::new();
    T::schemas(&mut others);
    others.push((name.to_owned(), T::schema()));
    for (name, schema) in others {
        let schema = serde_json::to_value(schema).expect("schemas have string keys only");
        all.insert(name, schema);
    }
}

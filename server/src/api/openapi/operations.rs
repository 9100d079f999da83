//! The operations of all APIs.

use crate::error::Flavour;

/// An operation.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// The method, in lower case.
    pub method: &'static str,
    /// The path; variable parts are in braces.
    pub path: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// The schema of the request's body.
    pub body: Option<&'static str>,
    /// Its answer.
    pub answer: Answer,
    /// Parameters of the query.
    pub query: &'static [Parameter],
}

/// The answer of an operation.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// JSON of this schema.
    Json(&'static str),
    /// JSON, or a stream of server-sent events if `stream` is true.
    Events(&'static str),
    /// JSON, or a stream of lines.
    Lines(&'static str),
    /// Content of this type, which is not JSON.
    Other(&'static str),
    /// An error, because the operation is not supported.
    Missing,
}

/// A parameter of a query.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Its schema, in JSON.
    pub schema: &'static str,
}

const fn get(path: &'static str, answer: Answer, summary: &'static str) -> Operation {
    Operation { method: "get", path, summary, body: None, answer, query: &[] }
}

const fn delete(path: &'static str, answer: Answer, summary: &'static str) -> Operation {
    Operation { method: "delete", ..get(path, answer, summary) }
}

const fn act(path: &'static str, answer: Answer, summary: &'static str) -> Operation {
    Operation { method: "post", ..get(path, answer, summary) }
}

const fn post(path: &'static str, body: &'static str, answer: Answer, summary: &'static str) -> Operation {
    Operation { body: Some(body), ..act(path, answer, summary) }
}

impl Operation {
    const fn with(self, query: &'static [Parameter]) -> Self {
        Operation { query, ..self }
    }

    /// The API to which it belongs.
    pub fn flavour(&self) -> Flavour {
        Flavour::of(self.path)
    }

    /// The heading under which it is listed.
    pub fn tag(&self) -> &'static str {
        match self.flavour() {
            Flavour::Anthropic => "Anthropic",
            Flavour::Ollama => "Ollama",
            Flavour::OpenAi if self.path.starts_with("/v1/") => "OpenAI",
            Flavour::OpenAi => "Sluice",
        }
    }
}

const STREAM: Parameter = Parameter { name: "stream", schema: r#"{"type": "boolean", "enum": [false]}"# };
const AFTER: Parameter = Parameter { name: "after", schema: r#"{"type": "string"}"# };
const PURPOSE: Parameter = Parameter { name: "purpose", schema: r#"{"type": "string"}"# };
const LIMIT: Parameter = Parameter { name: "limit", schema: r#"{"type": "integer", "minimum": 1, "maximum": 100}"# };
const ORDER: Parameter = Parameter { name: "order", schema: r#"{"type": "string", "enum": ["asc", "desc"]}"# };

use Answer::{Events, Json, Lines, Missing, Other};

/// All operations.
pub const OPERATIONS: &[Operation] = &[
    get("/v1/models", Json("Models"), "Lists the models"),
    get("/v1/models/{id}", Json("Model"), "Describes a model"),
    post("/v1/chat/completions", "ChatRequest", Events("ChatCompletion"), "Answers a conversation"),
    post("/v1/completions", "CompletionRequest", Events("Completion"), "Continues a text as it is"),
    post("/v1/responses", "ResponsesRequest", Events("Response"), "Makes a response"),
    get("/v1/responses", Missing, "Opens a WebSocket, over which responses are made"),
    post("/v1/responses/compact", "CompactRequest", Json("Compaction"), "Sums up a conversation"),
    post(
        "/v1/responses/input_tokens",
        "ResponsesRequest",
        Json("InputTokens"),
        "Counts the tokens of a request's input",
    ),
    get("/v1/responses/{id}", Json("Response"), "Returns a stored response").with(&[STREAM]),
    delete("/v1/responses/{id}", Json("Deleted"), "Forgets a response"),
    act("/v1/responses/{id}/cancel", Json("Response"), "Cancels a background response; this server has none"),
    get("/v1/responses/{id}/input_items", Json("Items"), "Lists the items that a response answered")
        .with(&[AFTER, LIMIT, ORDER]),
    get("/v1/files", Json("Files"), "Lists files").with(&[PURPOSE, AFTER, LIMIT, ORDER]),
    act("/v1/files", Json("File"), "Uploads a file, as a form with `purpose` and `file`"),
    get("/v1/files/{id}", Json("File"), "Describes a file"),
    delete("/v1/files/{id}", Json("Deleted"), "Deletes a file"),
    get("/v1/files/{id}/content", Other("application/jsonl"), "Returns the contents of a file"),
    get("/v1/batches", Json("Batches"), "Lists batches").with(&[AFTER, LIMIT, ORDER]),
    post("/v1/batches", "BatchRequest", Json("Batch"), "Begins a batch of the requests in a file"),
    get("/v1/batches/{id}", Json("Batch"), "Describes a batch"),
    act("/v1/batches/{id}/cancel", Json("Batch"), "Ends a batch early"),
    post("/v1/messages", "MessagesRequest", Events("Message"), "Answers a conversation"),
    post("/v1/messages/count_tokens", "MessagesRequest", Json("MessageTokens"), "Counts the tokens of a conversation"),
    get("/api/version", Json("OllamaVersion"), "Returns the version of Ollama's API that is implemented"),
    get("/api/tags", Json("OllamaModels"), "Lists the models"),
    get("/api/ps", Json("OllamaModels"), "Lists the models that are loaded"),
    post("/api/show", "OllamaShowRequest", Json("OllamaModel"), "Describes a model"),
    post("/api/chat", "OllamaChatRequest", Lines("OllamaChat"), "Answers a conversation"),
    post("/api/generate", "OllamaGenerateRequest", Lines("OllamaText"), "Answers a text"),
    act("/api/embed", Missing, "Embeds texts: not supported"),
    act("/api/embeddings", Missing, "Embeds a text: not supported"),
    act("/api/pull", Missing, "Downloads a model: not supported"),
    act("/api/push", Missing, "Publishes a model: not supported"),
    act("/api/create", Missing, "Creates a model: not supported"),
    act("/api/copy", Missing, "Copies a model: not supported"),
    delete("/api/delete", Missing, "Deletes a model: not supported"),
    act("/api/blobs/{digest}", Missing, "Uploads a part of a model: not supported"),
    get("/health", Json("Health"), "Tells whether the server accepts requests; needs no key"),
    get("/metrics", Other("application/openmetrics-text"), "Returns counters for Prometheus"),
    get("/status", Json("Status"), "Describes what the server and its models are doing"),
    get("/slots", Json("Slots"), "Lists the answers that are being made"),
    post("/tokenize", "TokenizeRequest", Json("Tokens"), "Turns a text into tokens"),
    post("/detokenize", "DetokenizeRequest", Json("Content"), "Turns tokens into a text"),
    post(
        "/apply-template",
        "TemplateRequest",
        Json("Prompt"),
        "Turns a conversation into the text that the model reads",
    ),
    get("/sessions", Json("Sessions"), "Lists what models remember of conversations on the drive"),
    delete("/sessions/{id}", Json("Deleted"), "Forgets a conversation"),
    get("/openapi.json", Json("Document"), "This document"),
];

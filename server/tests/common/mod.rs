//! Code that the server's tests share: a small model with a chat template, and requests to a server's own paths.
#![allow(dead_code, reason = "every program of tests uses a part of it")]

use std::path::Path;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request};
use serde_json::Value;
use sluice_converter::{Options, TypeChoice, convert};
use sluice_format::WeightType;
use sluice_generate::SchedulerOptions;
use sluice_model::engine::EngineOptions;
use sluice_server::ServerOptions;
use sluice_server::app::{App, router};
use sluice_server::models::Models;
use tempfile::TempDir;
use tower::ServiceExt;

/// The template of the model's conversations.
const TEMPLATE: &str = "{%- for message in messages %}<{{ message.role }}>{{ message.content or '' }}\n{% endfor %}\
                        {%- if add_generation_prompt %}<assistant>{% endif %}";

/// A server without a socket.
pub struct Running {
    /// Its state.
    pub app: Arc<App>,
    router: Router,
}

/// A complete response.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub text: String,
}

/// The model file, `demo.sluice`, made once for all tests of a program.
pub fn model() -> &'static Path {
    static MODEL: OnceLock<(TempDir, std::path::PathBuf)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("checkpoint");
        std::fs::create_dir(&source).unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/demo-model");
        for entry in std::fs::read_dir(fixture).unwrap().map(Result::unwrap) {
            std::fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
        }
        std::fs::write(source.join("chat_template.jinja"), TEMPLATE).unwrap();
        let path = folder.path().join("demo.sluice");
        let choice = TypeChoice::Type(WeightType::Q8);
        let options = Options { expert_type: choice, dense_type: choice, ..Options::default() };
        convert(&source, &path, &options, &()).unwrap();
        (folder, path)
    };
    &MODEL.get_or_init(make).1
}

/// Starts a server with the small model.
pub async fn start(options: ServerOptions) -> Running {
    start_with(model(), options).await
}

/// Starts a server with a model.
pub async fn start_with(file: &Path, options: ServerOptions) -> Running {
    let engine = EngineOptions { threads: Some(1), sequences: Some(2), ..options.engine.clone() };
    let options = ServerOptions { files: vec![file.to_owned()], engine, ..options };
    let models = Models::new(&options, SchedulerOptions::default()).unwrap();
    let app = App::new(options, models, None, None);
    Running { router: router(&app), app }
}

impl Running {
    /// Sends a request.
    pub async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.into()).unwrap();
        Reply { status: parts.status.as_u16(), headers: parts.headers, text }
    }

    /// Posts JSON.
    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Request::post(path).body(Body::from(body.to_string())).unwrap()).await
    }

    /// Gets a path.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        let request = headers.iter().fold(Request::get(path), |request, (name, value)| request.header(*name, *value));
        self.send(request.body(Body::empty()).unwrap()).await
    }
}

impl Reply {
    /// Its body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The events of a stream: names, which may be empty, and data.
    pub fn events(&self) -> Vec<(String, Value)> {
        let event = |text: &str| {
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            (field("event: ").to_owned(), serde_json::from_str(field("data: ")).unwrap_or_default())
        };
        self.text.split("\n\n").filter(|text| !text.is_empty()).map(event).collect()
    }

    /// The lines of a stream.
    pub fn lines(&self) -> Vec<Value> {
        self.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

//! What is wrong is said before a response begins, and before a model is loaded; and the log says why the server was at fault.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use crate::common::{model, start, start_with};
use serde_json::{Value, json};
use sluice_generate::SchedulerOptions;
use sluice_model::EngineOptions;
use sluice_server::ServerOptions;
use sluice_server::models::{Models, ModelsError};

#[tokio::test]
async fn requests_that_are_wrong_are_refused_before_their_model_is_loaded() {
    let engine = EngineOptions { context: Some(64), ..EngineOptions::default() };
    let server = start(ServerOptions { engine, queue: 4, ..ServerOptions::default() }).await;
    let chat = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let text = |text: String| json!([{"role": "user", "content": text}]);
    let form = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
    for streams in [false, true] {
        for (more, code, word) in [
            (json!({"messages": text("many words ".repeat(60))}), "context_length_exceeded", "context length is 64"),
            (
                json!({"messages": text("many words ".repeat(60_000))}),
                "context_length_exceeded",
                "context length is 64",
            ),
            (json!({"temperature": 9}), "invalid_value", "temperature"),
            (json!({"n": 5}), "", "queue of 4"),
            (json!({"logit_bias": {"99999999": 1}}), "", "99999999"),
            (json!({"response_format": form(json!({"type": "strange"}))}), "", "`type`"),
        ] {
            let mut body = chat(more);
            body["stream"] = streams.into();
            let reply = server.post("/v1/chat/completions", body).await;
            let error = &reply.json()["error"];
            assert_eq!(reply.status, 400, "{error}");
            assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{error}");
            assert!(error["message"].as_str().unwrap().contains(word), "{error}");
        }
    }
    let long = json!({"model": "demo", "max_tokens": 2, "messages": text("many words ".repeat(60))});
    assert_eq!(server.post("/v1/messages", long).await.status, 400);
    assert!(server.app.models.entries()[0].peek().is_none(), "nothing was loaded for these");
    // What is right is answered; and then the same is refused in the same words.
    assert_eq!(server.post("/v1/chat/completions", chat(json!({}))).await.status, 200);
    let again = chat(json!({"messages": text("many words ".repeat(60))}));
    let reply = server.post("/v1/chat/completions", again).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
}

#[test]
fn a_budget_that_is_too_small_is_refused_at_the_start() {
    let engine = EngineOptions { budget: Some(100 << 10), ..EngineOptions::default() };
    let options = ServerOptions { files: vec![model().to_owned()], engine, ..ServerOptions::default() };
    let Err(refused) = Models::new(&options, SchedulerOptions::default()) else { panic!("it is much too small") };
    assert!(matches!(refused, ModelsError::Memory { one: None, .. }));
    let said = refused.to_string();
    for word in ["demo.sluice: ", "the budget of 100.0 KiB is too small", "needs at least"] {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
    assert!(!said.contains("--parallel"), "{said}");
    // What is planned for many conversations may suffice for one.
    let with = |sequences, budget| {
        let engine = EngineOptions { sequences: Some(sequences), budget: Some(budget), ..EngineOptions::default() };
        let options = ServerOptions { files: vec![model().to_owned()], engine, ..ServerOptions::default() };
        Models::new(&options, SchedulerOptions::default()).err()
    };
    let Some(refused) = with(8, 100 << 10) else { panic!("it is much too small") };
    let ModelsError::Memory { ref source, one: Some(one), .. } = refused else { panic!("{refused}") };
    assert!(one < source.least && refused.to_string().contains("With --parallel 1, "), "{refused}");
    assert!(with(1, one).is_none() && with(8, one).is_some());
}

#[test]
fn a_model_that_is_given_twice_is_refused_and_copies_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let (copy, link) = (folder.path().join("demo.sluice"), folder.path().join("other.sluice"));
    std::fs::copy(model(), &copy).unwrap();
    std::os::unix::fs::symlink(model(), &link).unwrap();
    let names = |files: &[&std::path::Path]| {
        let files = files.iter().map(|file| (*file).to_owned()).collect();
        let models = Models::new(&ServerOptions { files, ..ServerOptions::default() }, SchedulerOptions::default())?;
        Ok::<_, ModelsError>(models.entries().iter().map(|entry| entry.id.clone()).collect::<Vec<_>>())
    };
    let refused = names(&[model(), &copy, model()]).unwrap_err();
    assert!(matches!(&refused, ModelsError::Twice { path } if path == model()), "{refused}");
    assert!(refused.to_string().contains("demo.sluice is given twice"), "{refused}");
    // A link gives a model a second name.
    assert_eq!(names(&[model(), &copy, &link]).unwrap(), ["demo", "demo-2", "other"]);
}

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The fields of each line.
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["fields"].take()).collect()
    }
}

#[tokio::test]
async fn the_log_says_why_the_server_was_at_fault() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("gone.sluice");
    std::fs::copy(model(), &file).unwrap();
    let server = start_with(&file, ServerOptions::default()).await;
    std::fs::remove_file(&file).unwrap();
    let log = Log::default();
    let into = log.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || into.clone()).finish();
    let _logged = tracing::subscriber::set_default(subscriber);
    let chat = json!({"model": "gone", "messages": [{"role": "user", "content": "Secret"}], "max_tokens": 2});
    let reply = server.post("/v1/chat/completions", chat.clone()).await;
    assert_eq!(reply.status, 500);
    let lines = log.lines();
    let line = lines.iter().find(|line| line["status"] == 500).unwrap();
    let cause = line["cause"].as_str().unwrap();
    assert!(cause.contains("gone.sluice") && cause.contains("No such file"), "{line}");
    assert_eq!(line["id"].as_str().unwrap(), reply.headers["x-request-id"].to_str().unwrap());
    assert!(!format!("{lines:?}").contains("Secret"));
    // Anthropic's own header and field have the same id.
    let reply = server.post("/v1/messages", chat).await;
    assert_eq!(
        (reply.status, &reply.json()["request_id"]),
        (500, &json!(reply.headers["request-id"].to_str().unwrap()))
    );
    assert_eq!(reply.headers["request-id"], reply.headers["x-request-id"]);
}

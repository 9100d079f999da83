//! The server with answers from a script, so that clients can test the protocol and not the model.
//!
//!     cargo run -p sluice-tests --example scripted-server -- MODEL.sluice SCRIPT.json PORT [KEY]
//!
//! The script is an object: `turns`, a list of `{"role", "contains", "say"}`, and `otherwise`, the answer if no turn matches. A
//! turn matches if a message after the assistant's latest one has that role and contains that text; the first match is taken. `say`
//! is what the model writes, with thinking and tool calls in the syntax of its family; a grammar forces it. `times` repeats `say`
//! that many times. Each request is logged on standard error.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::Value;
use sluice_grammar::Form;
use sluice_model::EngineOptions;
use sluice_server::ask::{Ask, Input};
use sluice_server::{Force, Guard, ServerOptions, serve_until_told};
use sluice_text::Message;

/// Agents send long prompts, and the tokens of the test model are short.
const CONTEXT: usize = 65_536;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [model, script, port, keys @ ..] = arguments.as_slice() else {
        eprintln!("usage: scripted-server MODEL.sluice SCRIPT.json PORT [KEY]");
        return ExitCode::from(2);
    };
    let script = fs::read(script).expect("the script can be read");
    let options = ServerOptions {
        files: vec![PathBuf::from(model)],
        address: format!("127.0.0.1:{port}").parse().expect("a port"),
        guard: Guard { keys: keys.to_vec(), ..Guard::default() },
        engine: EngineOptions { context: Some(CONTEXT), sequences: Some(2), forget: true, ..EngineOptions::default() },
        force: Some(force(serde_json::from_slice(&script).expect("the script is JSON"))),
        ..ServerOptions::default()
    };
    let ready = |address| eprintln!("listening at http://{address}");
    match serve_until_told(options, false, ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn force(script: Value) -> Force {
    Arc::new(move |ask: &Ask| {
        let latest = latest(ask);
        let turns = script["turns"].as_array().into_iter().flatten();
        let said = turns.into_iter().find(|turn| latest.iter().any(|message| fits(turn, message)));
        let say = said.map_or(&script["otherwise"], |turn| &turn["say"]);
        let tools: Vec<&str> = ask.tools.iter().map(|tool| tool.name.as_str()).collect();
        eprintln!("{}: tools {tools:?}: {}", ask.api, latest.last().map_or_else(String::new, text_of));
        eprintln!("says: {say}");
        let times = said.and_then(|turn| turn["times"].as_u64()).unwrap_or(1);
        say.as_str().map(|text| Form::Text(text.repeat(times as usize)))
    })
}

/// The messages after the latest one of the assistant; a plain text counts as the user's.
fn latest(ask: &Ask) -> Vec<Message> {
    match &ask.input {
        Input::Chat(chat) | Input::After { chat, .. } => {
            let own = chat.messages.iter().rposition(|message| message.fields["role"] == "assistant");
            chat.messages[own.map_or(0, |at| at + 1)..].to_vec()
        }
        Input::Text(text) => vec![Message::new("user", text)],
        Input::Tokens(_) => Vec::new(),
    }
}

fn fits(turn: &Value, message: &Message) -> bool {
    let contains = turn["contains"].as_str().unwrap_or_default();
    message.fields["role"] == turn["role"] && text_of(message).contains(contains)
}

/// The text of a message, which is a string or a list of text parts.
fn text_of(message: &Message) -> String {
    match message.fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

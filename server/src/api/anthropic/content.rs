//! Converts a conversation in Anthropic's form to OpenAI's, which templates take.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sluice_text::Message;

use crate::ask::Chat;
use crate::error::ApiError;

/// Separator between two blocks of text of a user or of the system.
const BETWEEN: &str = "\n\n";

/// A block of a message.
enum Block {
    Text(String),
    Thinking(String),
    Call {
        id: String,
        name: String,
        arguments: String,
    },
    Result {
        id: String,
        text: String,
    },
    /// Content that no model here can read.
    Nothing,
}

/// The conversation of a request.
///
/// # Errors
/// Names the message or block that is invalid, or that these models cannot read.
pub fn chat(system: &Value, messages: &[Map<String, Value>]) -> Result<Chat, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "`messages` is empty: a conversation has at least one message"));
    }
    let mut chat = Conversation { system: texts(system, "system")?, ..Conversation::default() };
    for (i, message) in messages.iter().enumerate() {
        let place = format!("messages[{i}]");
        let content = message.get("content").unwrap_or(&Value::Null);
        match message.get("role").and_then(Value::as_str) {
            Some("user") => chat.user(content, &place)?,
            Some("assistant") => chat.assistant(content, &place)?,
            Some("system") => chat.system(texts(content, &format!("{place}.content"))?),
            role => {
                let message = format!("`{place}.role` is {role:?}, it must be user or assistant");
                return Err(ApiError::field(format!("{place}.role"), message));
            }
        }
    }
    chat.finish(messages.len() - 1)
}

/// A conversation under construction.
#[derive(Default)]
struct Conversation {
    system: Vec<String>,
    turns: Vec<Map<String, Value>>,
    /// The tools that were called, by the ids of the calls.
    called: HashMap<String, String>,
}

impl Conversation {
    /// Templates take a system message only at the beginning. Later system messages are given to the model in the way that agents
    /// use anyway: marked, within the user's text.
    fn system(&mut self, texts: Vec<String>) {
        if self.turns.is_empty() {
            self.system.extend(texts);
            return;
        }
        for text in texts {
            self.say(&format!("<system-reminder>\n{text}\n</system-reminder>"));
        }
    }

    /// The results of calls come first, then the user's text; each in their order.
    fn user(&mut self, content: &Value, place: &str) -> Result<(), ApiError> {
        let mut said = Vec::new();
        for (block, place) in blocks(content, place)? {
            match block {
                Block::Text(text) => said.push(text),
                Block::Result { id, text } => {
                    let Some(name) = self.called.get(&id) else {
                        let message = format!("`{place}`: no `tool_use` before it has the id {id:?}");
                        return Err(ApiError::field(format!("{place}.tool_use_id"), message));
                    };
                    let turn = json!({"role": "tool", "tool_call_id": id, "name": name, "content": text});
                    self.turns.extend(turn.as_object().cloned());
                }
                Block::Thinking(_) | Block::Call { .. } => {
                    return Err(ApiError::field(
                        place.clone(),
                        format!("`{place}`: only an assistant message can think and call tools"),
                    ));
                }
                Block::Nothing => {}
            }
        }
        said.iter().for_each(|text| self.say(text));
        Ok(())
    }

    /// Consecutive messages of one role are merged.
    fn say(&mut self, text: &str) {
        match self.turns.last_mut() {
            Some(turn) if is(turn, "user") => append(turn, "content", BETWEEN, text),
            _ => self.turns.push(Message::new("user", text).fields),
        }
    }

    fn assistant(&mut self, content: &Value, place: &str) -> Result<(), ApiError> {
        if !self.turns.last().is_some_and(|turn| is(turn, "assistant")) {
            self.turns.push(Message::new("assistant", "").fields);
        }
        for (block, place) in blocks(content, place)? {
            let Some(turn) = self.turns.last_mut() else { break };
            match block {
                // These are parts of one answer, with nothing between them.
                Block::Text(text) => append(turn, "content", "", &text),
                Block::Thinking(text) => append(turn, "reasoning_content", "", &text),
                Block::Call { id, name, arguments } => {
                    self.called.insert(id.clone(), name.clone());
                    let call =
                        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
                    let calls = turn.entry("tool_calls").or_insert_with(|| json!([]));
                    calls.as_array_mut().into_iter().for_each(|calls| calls.push(call.clone()));
                }
                Block::Result { .. } => {
                    return Err(ApiError::field(
                        place.clone(),
                        format!("`{place}`: only a user message can have results of tools"),
                    ));
                }
                Block::Nothing => {}
            }
        }
        Ok(())
    }

    /// `last`: the index of the last message of the request.
    fn finish(mut self, last: usize) -> Result<Chat, ApiError> {
        let said = |turn: &Map<String, Value>| turn.get("content").is_some_and(|content| content != "");
        // An assistant message without content is one that is still to be answered.
        let nothing = |turn: &Map<String, Value>| is(turn, "assistant") && !said(turn) && turn.len() == 2;
        if self.turns.last().is_some_and(nothing) {
            self.turns.pop();
        }
        let continues = self.turns.last().is_some_and(|turn| is(turn, "assistant"));
        if continues && self.turns.last().is_some_and(|turn| turn.contains_key("tool_calls")) {
            let message = "the last message calls tools: give their results, as `tool_result` blocks of a user";
            return Err(ApiError::field(format!("messages[{last}]"), message));
        }
        for turn in &mut self.turns {
            if turn.contains_key("tool_calls") && !said(turn) {
                turn.insert("content".into(), Value::Null);
            }
        }
        let system = (!self.system.is_empty()).then(|| Message::new("system", &self.system.join(BETWEEN)));
        let messages: Vec<Message> = system.into_iter().chain(self.turns.into_iter().map(Message::from)).collect();
        if messages.is_empty() {
            return Err(ApiError::field("messages", "`messages` has no text: give one to answer"));
        }
        Ok(Chat { messages, continues, ..Chat::default() })
    }
}

fn is(turn: &Map<String, Value>, role: &str) -> bool {
    turn.get("role").is_some_and(|own| own == role)
}

/// Adds to a field that is a text.
fn append(turn: &mut Map<String, Value>, field: &str, between: &str, text: &str) {
    match turn.get_mut(field) {
        Some(Value::String(before)) if !before.is_empty() => {
            *before += between;
            *before += text;
        }
        _ => {
            turn.insert(field.into(), text.into());
        }
    }
}

/// The blocks of a message, each with its place.
fn blocks(content: &Value, place: &str) -> Result<Vec<(Block, String)>, ApiError> {
    let place = format!("{place}.content");
    match content {
        Value::String(text) => Ok(vec![(Block::Text(text.clone()), place)]),
        Value::Array(list) => {
            let block = |(i, value): (usize, &Value)| {
                let place = format!("{place}[{i}]");
                Ok((block(value, &place)?, place))
            };
            list.iter().enumerate().map(block).collect()
        }
        _ => Err(ApiError::field(place.clone(), format!("`{place}` must be a text or a list of blocks"))),
    }
}

fn block(value: &Value, place: &str) -> Result<Block, ApiError> {
    let text = |name: &str| match value[name].as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(ApiError::field(format!("{place}.{name}"), format!("`{place}.{name}` must be a text"))),
    };
    match value["type"].as_str() {
        Some("text") => text("text").map(Block::Text),
        Some("thinking") => text("thinking").map(Block::Thinking),
        // Only the server that wrote it can read it.
        Some("redacted_thinking") => Ok(Block::Nothing),
        Some("tool_use") => {
            let arguments = match &value["input"] {
                Value::Null => "{}".to_owned(),
                input => input.to_string(),
            };
            Ok(Block::Call { id: text("id")?, name: text("name")?, arguments })
        }
        Some("tool_result") => {
            let result = texts(&value["content"], &format!("{place}.content"))?.join("\n");
            let text = |text: String| if value["is_error"] == true { as_error(text) } else { text };
            Ok(Block::Result { id: id_of(value, place)?, text: text(result) })
        }
        Some(kind) => Err(unreadable(kind, place)),
        None => Err(ApiError::field(format!("{place}.type"), format!("`{place}.type` is needed: say what it is"))),
    }
}

fn id_of(value: &Value, place: &str) -> Result<String, ApiError> {
    let wrong = || ApiError::field(format!("{place}.tool_use_id"), format!("`{place}.tool_use_id` must be a text"));
    value["tool_use_id"].as_str().map(str::to_owned).ok_or_else(wrong)
}

/// Templates have no place for `is_error`, so the text must say it.
fn as_error(text: String) -> String {
    let says_so = |start: &str| text.get(..start.len()).is_some_and(|own| own.eq_ignore_ascii_case(start));
    match text.trim().is_empty() {
        true => "Error".to_owned(),
        false if says_so("error") || says_so("<tool_use_error>") => text,
        false => format!("Error: {text}"),
    }
}

/// A text, or the texts of blocks. Without a value, there is no text.
fn texts(value: &Value, place: &str) -> Result<Vec<String>, ApiError> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => {
            let one = |(i, value): (usize, &Value)| {
                let place = format!("{place}[{i}]");
                match (value["type"].as_str(), value["text"].as_str()) {
                    (Some("text"), Some(text)) => Ok(text.to_owned()),
                    (Some("text") | None, _) => {
                        Err(ApiError::field(place.clone(), format!("`{place}` must be a block of text")))
                    }
                    (Some(kind), _) => Err(unreadable(kind, &place)),
                }
            };
            list.iter().enumerate().map(one).collect()
        }
        _ => Err(ApiError::field(place, format!("`{place}` must be a text or a list of blocks of text"))),
    }
}

fn unreadable(kind: &str, place: &str) -> ApiError {
    let message =
        format!("`{place}`: blocks of type {kind:?} are not supported, the models here read text only: leave it out");
    ApiError::field(place, message)
}

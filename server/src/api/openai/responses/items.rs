//! Turns input items, which are the client's own and those of earlier responses, into messages for a template.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use sluice_text::Message;

use super::reasoning;
use super::tools::INPUT;
use crate::api::openai::new_id;
use crate::error::ApiError;

/// `input` as a list of items, each with a type and an id.
///
/// # Errors
/// Names the invalid item.
pub fn normalized(input: &Value) -> Result<Vec<Value>, ApiError> {
    let items = match input {
        Value::Null => return Ok(Vec::new()),
        Value::String(text) => {
            let content = json!([{"type": "input_text", "text": text}]);
            return Ok(vec![json!({
                "type": "message",
                "id": new_id("msg_"),
                "status": "completed",
                "role": "user",
                "content": content,
            })]);
        }
        Value::Array(items) => items,
        _ => return Err(ApiError::field("input", "`input` must be a text or a list of items").code("invalid_type")),
    };
    items.iter().enumerate().map(|(i, item)| normalized_item(item, &format!("input[{i}]"))).collect()
}

fn normalized_item(item: &Value, place: &str) -> Result<Value, ApiError> {
    let wrong = |what: &str| ApiError::field(place, format!("`{place}` {what}")).code("invalid_value");
    let Value::Object(fields) = item else {
        return Err(wrong("must be an object"));
    };
    let mut fields = fields.clone();
    let kind = match fields.get("type") {
        None | Some(Value::Null) if fields.contains_key("role") => "message".to_owned(),
        Some(Value::String(kind)) => kind.clone(),
        _ => return Err(wrong("has no `type`")),
    };
    let prefix = match kind.as_str() {
        "message" => "msg_",
        "reasoning" => "rs_",
        "function_call" => "fc_",
        "custom_tool_call" => "ctc_",
        "compaction" => "cmp_",
        _ => "item_",
    };
    fields.insert("type".into(), kind.into());
    if !fields.get("id").is_some_and(Value::is_string) {
        fields.insert("id".into(), new_id(prefix).into());
    }
    Ok(fields.into())
}

/// Messages under construction.
#[derive(Debug, Default)]
pub struct Conversation {
    messages: Vec<Map<String, Value>>,
    /// Ids of the calls so far.
    calls: BTreeSet<String>,
    /// Whether the last message is an assistant's, and may still get calls.
    open: bool,
    /// Whether the last message is a summary, to which the user's next message is added: templates want turns to alternate.
    summarised: bool,
}

/// What comes before a summary that stands for the conversation so far.
const SUMMARY: &str = "Summary of our conversation so far:";

impl Conversation {
    /// The conversation of instructions, the items of earlier responses, and new items.
    ///
    /// # Errors
    /// Names the invalid item.
    pub fn of(instructions: Option<&str>, history: &[Value], input: &[Value]) -> Result<Self, ApiError> {
        let mut conversation = Conversation::default();
        if let Some(text) = instructions.filter(|text| !text.is_empty()) {
            conversation.message("system", text.to_owned());
        }
        for item in history {
            conversation.push(item, "previous_response_id")?;
        }
        for (i, item) in input.iter().enumerate() {
            conversation.push(item, &format!("input[{i}]"))?;
        }
        Ok(conversation)
    }

    /// Adds a request of the user, to the last message if it is the user's too.
    pub fn request(&mut self, text: &str) {
        self.summarised |= self.messages.last().is_some_and(|message| message.get("role").is_some_and(|r| r == "user"));
        self.message("user", text.to_owned());
    }

    /// Whether there is nothing besides the instructions.
    pub fn is_empty(&self) -> bool {
        self.messages.iter().all(|message| message.get("role").is_some_and(|role| role == "system"))
    }

    /// The messages, in the form of chat completions.
    pub fn into_messages(self) -> Vec<Message> {
        self.messages.into_iter().map(Message::from).collect()
    }

    fn push(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        match item["type"].as_str().unwrap_or_default() {
            "message" => self.push_message(item, place),
            "reasoning" => {
                if let Some(text) = reasoning::text_of(item) {
                    self.assistant(|message| !message.contains_key("reasoning_content") && is_bare(message))
                        .insert("reasoning_content".into(), text.into());
                }
                Ok(())
            }
            "function_call" => {
                let arguments = text(item, "arguments", place)?.to_owned();
                self.call(item, place, None, arguments)
            }
            "custom_tool_call" => {
                let arguments = json!({INPUT: text(item, "input", place)?}).to_string();
                self.call(item, place, None, arguments)
            }
            "local_shell_call" => self.call(item, place, Some("local_shell"), item["action"].to_string()),
            "function_call_output" | "custom_tool_call_output" | "local_shell_call_output" => self.output(item, place),
            "compaction" => {
                let place = format!("{place}.encrypted_content");
                let summary = item["encrypted_content"].as_str().and_then(reasoning::opened).ok_or_else(|| {
                    let message =
                        format!("`{place}` is not of this server, so it cannot be read here: send the items instead");
                    ApiError::field(&place, message).code("invalid_value")
                })?;
                self.message("user", format!("{SUMMARY}\n\n{summary}"));
                self.summarised = true;
                Ok(())
            }
            "item_reference" => {
                let message = format!("`{place}`: item references are not supported: send the item itself");
                Err(ApiError::field(place, message).code("unsupported_value"))
            }
            other => {
                let message = format!("`{place}`: items of type {other:?} are not supported");
                Err(ApiError::field(place, message).code("unsupported_value"))
            }
        }
    }

    fn push_message(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        let role = item["role"].as_str().unwrap_or_default();
        if !["system", "developer", "user", "assistant"].contains(&role) {
            let place = format!("{place}.role");
            let message =
                format!("`{place}` is {}, it must be one of system, developer, user, assistant", item["role"]);
            return Err(ApiError::field(place, message).code("invalid_value"));
        }
        let content = content(&item["content"], &format!("{place}.content"))?;
        match role {
            "assistant" => {
                let message = self.assistant(|message| !message.contains_key("content"));
                message.insert("content".into(), content.into());
            }
            role => self.message(role, content),
        }
        Ok(())
    }

    fn message(&mut self, role: &str, content: String) {
        self.open = false;
        if std::mem::take(&mut self.summarised)
            && role == "user"
            && let Some(Value::String(before)) = self.messages.last_mut().and_then(|message| message.get_mut("content"))
        {
            before.push_str("\n\n");
            before.push_str(&content);
            return;
        }
        let mut message = Map::new();
        message.insert("role".into(), role.into());
        message.insert("content".into(), content.into());
        self.messages.push(message);
    }

    /// The last message if it is an assistant's and `fits`; otherwise a new one.
    fn assistant(&mut self, fits: impl Fn(&Map<String, Value>) -> bool) -> &mut Map<String, Value> {
        self.summarised = false;
        let fits = self.open && self.messages.last().is_some_and(fits);
        if !fits {
            let mut message = Map::new();
            message.insert("role".into(), "assistant".into());
            self.messages.push(message);
            self.open = true;
        }
        self.messages.last_mut().expect("a message was added if there was none")
    }

    fn call(&mut self, item: &Value, place: &str, name: Option<&str>, arguments: String) -> Result<(), ApiError> {
        let id = text(item, "call_id", place)?.to_owned();
        let name = match name {
            Some(name) => name,
            None => text(item, "name", place)?,
        };
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let message = self.assistant(|_| true);
        let calls = message.entry("tool_calls").or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(calls) = calls {
            calls.push(call);
        }
        self.calls.insert(id);
        Ok(())
    }

    fn output(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        // Codex identifies the call of a local shell by the item's id.
        let id = item["call_id"].as_str().or_else(|| item["id"].as_str()).unwrap_or_default();
        if !self.calls.contains(id) {
            let place = format!("{place}.call_id");
            let message = format!("`{place}`: no call {id:?} comes before its output");
            return Err(ApiError::field(place, message).code("invalid_value"));
        }
        let content = match &item["output"] {
            Value::Object(object) => Value::Object(object.clone()).to_string(),
            output => content(output, &format!("{place}.output"))?,
        };
        let id = id.to_owned();
        self.message("tool", content);
        if let Some(message) = self.messages.last_mut() {
            message.insert("tool_call_id".into(), id.into());
        }
        Ok(())
    }
}

/// Whether an assistant's message has no content yet.
fn is_bare(message: &Map<String, Value>) -> bool {
    !message.contains_key("content") && !message.contains_key("tool_calls")
}

fn text<'a>(item: &'a Value, field: &str, place: &str) -> Result<&'a str, ApiError> {
    item[field].as_str().ok_or_else(|| {
        let place = format!("{place}.{field}");
        ApiError::field(&place, format!("`{place}` is needed, as a text")).code("invalid_type")
    })
}

/// The text of `content`: a string, or parts.
fn content(value: &Value, place: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => {
            return Err(
                ApiError::field(place, format!("`{place}` must be a text or a list of parts")).code("invalid_type")
            );
        }
    };
    let mut whole = String::new();
    for (i, part) in parts.iter().enumerate() {
        let place = format!("{place}[{i}]");
        whole += match part["type"].as_str() {
            Some("input_text" | "output_text" | "text" | "summary_text" | "reasoning_text") => {
                text(part, "text", &place)?
            }
            Some("refusal") => text(part, "refusal", &place)?,
            Some(other) => {
                let message = format!("`{place}`: parts of type {other:?} are not supported: this server reads texts");
                return Err(ApiError::field(place, message).code("unsupported_value"));
            }
            None => return Err(ApiError::field(&place, format!("`{place}` has no `type`")).code("invalid_type")),
        };
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(instructions: Option<&str>, input: Value) -> Result<Vec<Value>, ApiError> {
        let conversation = Conversation::of(instructions, &[], &normalized(&input)?)?;
        Ok(conversation.messages.into_iter().map(Value::Object).collect())
    }

    #[test]
    fn one_turn_of_an_agent_is_one_message() {
        let input = json!([
            {"role": "user", "content": "Look."},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I "}, {"type": "output_text", "text": "look."}]},
            {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": "{\"a\": 1}"},
            {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** \"x\""},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "files"}]},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
            {"type": "local_shell_call", "call_id": "c3", "action": {"command": ["ls"]}},
            {"type": "local_shell_call_output", "call_id": "c3", "output": "x"},
        ]);
        let messages = messages(Some("Be kind."), input).unwrap();
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let expected = [
            json!({"role": "system", "content": "Be kind."}),
            json!({"role": "user", "content": "Look."}),
            json!({"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": [
                call("c1", "ls", "{\"a\": 1}"), call("c2", "apply_patch", "{\"input\":\"*** \\\"x\\\"\"}"),
            ]}),
            json!({"role": "tool", "content": "files", "tool_call_id": "c1"}),
            json!({"role": "tool", "content": "done", "tool_call_id": "c2"}),
            json!({"role": "assistant", "reasoning_content": "So.", "tool_calls": [call("c3", "local_shell", "{\"command\":[\"ls\"]}")]}),
            json!({"role": "tool", "content": "x", "tool_call_id": "c3"}),
        ];
        assert_eq!(messages, expected);
    }

    #[test]
    fn a_summary_stands_for_the_conversation_before_it() {
        let summary =
            json!({"type": "compaction", "id": "cmp_1", "encrypted_content": reasoning::sealed("We agreed on 4.")});
        let input = json!([summary, {"role": "user", "content": "Why?"}, {"role": "user", "content": "Tell me."}]);
        let read = messages(None, input).unwrap();
        assert_eq!(read[0]["content"], format!("{SUMMARY}\n\nWe agreed on 4.\n\nWhy?"));
        assert_eq!((read.len(), &read[1]["content"]), (2, &json!("Tell me.")));
        let answered =
            json!([summary, {"role": "assistant", "content": "So it is."}, {"role": "user", "content": "Why?"}]);
        assert_eq!(messages(None, answered).unwrap().len(), 3);
        let foreign = json!([{"type": "compaction", "encrypted_content": "gAAAA"}]);
        let refused = messages(None, foreign).unwrap_err();
        assert_eq!(refused.param.as_deref(), Some("input[0].encrypted_content"));
    }

    #[test]
    fn a_request_is_added_to_what_the_user_said_last() {
        for (role, count) in [("user", 1), ("assistant", 2)] {
            let items = normalized(&json!([{"role": role, "content": "One."}])).unwrap();
            let mut conversation = Conversation::of(None, &[], &items).unwrap();
            conversation.request("Two.");
            assert_eq!(conversation.messages.len(), count);
            let last = conversation.messages[count - 1]["content"].as_str().unwrap();
            assert_eq!(last, if count == 1 { "One.\n\nTwo." } else { "Two." });
        }
    }

    #[test]
    fn two_answers_stay_two_messages() {
        let input = json!([
            {"type": "message", "role": "assistant", "phase": "commentary", "content": "One."},
            {"type": "message", "role": "assistant", "content": "Two."},
            {"type": "message", "role": "user", "content": "Go on."},
        ]);
        assert_eq!(messages(None, input).unwrap().len(), 3);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let of = |item: Value| messages(None, json!([item])).unwrap_err().param.unwrap();
        let image = json!([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x"}]);
        assert_eq!(of(json!({"role": "user", "content": image})), "input[0].content[1]");
        assert_eq!(of(json!({"role": "tool", "content": "x"})), "input[0].role");
        assert_eq!(of(json!({"role": "user", "content": 1})), "input[0].content");
        assert_eq!(of(json!({"type": "function_call_output", "call_id": "?", "output": "x"})), "input[0].call_id");
        assert_eq!(of(json!({"type": "function_call", "call_id": "c", "name": "n"})), "input[0].arguments");
        assert_eq!(of(json!({"type": "item_reference", "id": "x"})), "input[0]");
        assert_eq!(of(json!({"type": "computer_call"})), "input[0]");
        assert_eq!(of(json!(1)), "input[0]");
        assert_eq!(messages(None, json!({})).unwrap_err().param.as_deref(), Some("input"));
    }
}

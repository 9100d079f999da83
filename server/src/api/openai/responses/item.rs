//! Items of a response's output.

use serde_json::{Value, json};

use super::reasoning;
use super::tools::INPUT;
use crate::api::openai::new_id;

/// The progress of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// More of it will come.
    InProgress,
    /// It is complete.
    Completed,
    /// It ended early.
    Incomplete,
}

impl Status {
    /// The API's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Incomplete => "incomplete",
        }
    }
}

/// An item.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its id.
    pub id: String,
    /// Its progress.
    pub status: Status,
    /// Its kind.
    pub kind: Kind,
}

/// The kind of an item.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Thinking.
    Reasoning {
        /// The text.
        text: String,
        /// Whether it is reported as a summary.
        summary: bool,
    },
    /// Text for the reader.
    Message {
        /// The text.
        text: String,
        /// Log probabilities.
        logprobs: Vec<Value>,
    },
    /// A call of a function.
    Function {
        /// The call's id.
        call_id: String,
        /// The function.
        name: String,
        /// The arguments, in JSON.
        arguments: String,
    },
    /// A call of a tool whose only argument is a text.
    Custom {
        /// The call's id.
        call_id: String,
        /// The tool.
        name: String,
        /// The arguments, in JSON, of the function that represents the tool.
        arguments: String,
    },
}

/// Names of the events for an item with a part.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// The part begins.
    pub added: &'static str,
    /// More text.
    pub delta: &'static str,
    /// The whole text.
    pub done: &'static str,
    /// The part is complete.
    pub part_done: &'static str,
    /// The field with the number of the part.
    pub index: &'static str,
    /// The type of the part.
    pub part: &'static str,
}

const TEXT: Names = Names {
    added: "response.content_part.added",
    delta: "response.output_text.delta",
    done: "response.output_text.done",
    part_done: "response.content_part.done",
    index: "content_index",
    part: "output_text",
};

const REASONING: Names = Names {
    delta: "response.reasoning_text.delta",
    done: "response.reasoning_text.done",
    part: "reasoning_text",
    ..TEXT
};

const SUMMARY: Names = Names {
    added: "response.reasoning_summary_part.added",
    delta: "response.reasoning_summary_text.delta",
    done: "response.reasoning_summary_text.done",
    part_done: "response.reasoning_summary_part.done",
    index: "summary_index",
    part: "summary_text",
};

impl Kind {
    /// Thinking that begins.
    pub fn reasoning(summary: bool) -> Self {
        Kind::Reasoning { text: String::new(), summary }
    }

    /// A message that begins.
    pub fn message() -> Self {
        Kind::Message { text: String::new(), logprobs: Vec::new() }
    }

    /// Whether text of one is added to the other.
    pub fn is_like(&self, other: &Kind) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// Adds text.
    pub fn push(&mut self, more: &str, tokens: &[Value]) {
        match self {
            Kind::Reasoning { text, .. } => *text += more,
            Kind::Message { text, logprobs } => {
                *text += more;
                logprobs.extend_from_slice(tokens);
            }
            Kind::Function { arguments, .. } | Kind::Custom { arguments, .. } => *arguments += more,
        }
    }

    /// The event for more text. The text of a custom call is inside JSON, so it comes as a whole at the end.
    pub fn delta(&self) -> Option<&'static str> {
        match self {
            Kind::Reasoning { summary: true, .. } => Some(SUMMARY.delta),
            Kind::Reasoning { .. } => Some(REASONING.delta),
            Kind::Message { .. } => Some(TEXT.delta),
            Kind::Function { .. } => Some("response.function_call_arguments.delta"),
            Kind::Custom { .. } => None,
        }
    }
}

impl Item {
    /// Whether it is a call whose arguments are a whole JSON object.
    pub fn has_whole_arguments(&self) -> bool {
        let (Kind::Function { arguments, .. } | Kind::Custom { arguments, .. }) = &self.kind else { return false };
        serde_json::from_str::<serde_json::Map<String, Value>>(arguments).is_ok()
    }

    /// An item that begins.
    pub fn new(kind: Kind) -> Self {
        let prefix = match kind {
            Kind::Reasoning { .. } => "rs_",
            Kind::Message { .. } => "msg_",
            Kind::Function { .. } => "fc_",
            Kind::Custom { .. } => "ctc_",
        };
        Item { id: new_id(prefix), status: Status::InProgress, kind }
    }

    /// Names of the events for its part, if it has one.
    pub fn names(&self) -> Option<Names> {
        match self.kind {
            Kind::Reasoning { summary: true, .. } => Some(SUMMARY),
            Kind::Reasoning { .. } => Some(REASONING),
            Kind::Message { .. } => Some(TEXT),
            Kind::Function { .. } | Kind::Custom { .. } => None,
        }
    }

    /// Its part with a text.
    pub fn part(&self, text: &str, logprobs: &[Value]) -> Value {
        match self.names() {
            Some(names) if names.part == TEXT.part => {
                json!({"type": names.part, "text": text, "annotations": [], "logprobs": logprobs})
            }
            Some(names) => json!({"type": names.part, "text": text}),
            None => Value::Null,
        }
    }

    /// The events that end it, before the one of the item.
    pub fn endings(&self) -> Vec<(&'static str, Value)> {
        let whole = |text: &str, logprobs: &[Value]| {
            let names = self.names()?;
            let mut done = json!({"text": text});
            if names.part == TEXT.part {
                done["logprobs"] = logprobs.into();
            }
            Some(vec![(names.done, done), (names.part_done, json!({"part": self.part(text, logprobs)}))])
        };
        match &self.kind {
            Kind::Reasoning { text, .. } => whole(text, &[]).unwrap_or_default(),
            Kind::Message { text, logprobs } => whole(text, logprobs).unwrap_or_default(),
            Kind::Function { name, arguments, .. } => {
                let done = json!({"name": name, "arguments": arguments});
                vec![("response.function_call_arguments.done", done)]
            }
            Kind::Custom { arguments, .. } => {
                let input = input_of(arguments);
                let delta = ("response.custom_tool_call_input.delta", json!({"delta": input}));
                let done = ("response.custom_tool_call_input.done", json!({"input": input}));
                vec![delta, done]
            }
        }
    }

    /// The item as JSON. While it is in progress, it has no text yet. `encrypted`: include the opaque text of reasoning.
    pub fn to_json(&self, encrypted: bool) -> Value {
        let begun = self.status != Status::InProgress;
        let status = self.status.word();
        match &self.kind {
            Kind::Reasoning { text, summary } => {
                let parts: Vec<Value> = begun.then(|| self.part(text, &[])).into_iter().collect();
                let (content, summary) = if *summary { (Vec::new(), parts) } else { (parts, Vec::new()) };
                let mut item = json!({
                    "type": "reasoning",
                    "id": self.id,
                    "status": status,
                    "summary": summary,
                    "content": content,
                });
                if encrypted && begun {
                    item["encrypted_content"] = reasoning::sealed(text).into();
                }
                item
            }
            Kind::Message { text, logprobs } => {
                let content: Vec<Value> = begun.then(|| self.part(text, logprobs)).into_iter().collect();
                json!({
                    "type": "message",
                    "id": self.id,
                    "status": status,
                    "role": "assistant",
                    "content": content,
                })
            }
            Kind::Function { call_id, name, arguments } => json!({
                "type": "function_call",
                "id": self.id,
                "call_id": call_id,
                "name": name,
                "arguments": if begun { arguments } else { "" },
                "status": status,
            }),
            Kind::Custom { call_id, name, arguments } => json!({
                "type": "custom_tool_call",
                "id": self.id,
                "call_id": call_id,
                "name": name,
                "input": if begun { input_of(arguments) } else { String::new() },
                "status": status,
            }),
        }
    }
}

/// The text in the arguments of a function that represents a custom tool. If the model wrote something else, that is the text.
fn input_of(arguments: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(arguments).ok();
    let input = parsed.as_ref().and_then(|parsed| parsed[INPUT].as_str());
    input.unwrap_or(arguments).to_owned()
}

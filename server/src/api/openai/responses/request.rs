//! The request of `/v1/responses`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::items::{self, Conversation};
use super::reply::Wants;
use super::tools::{self, Declared};
use crate::api::openai::request::{OneOrMany, count, form, penalties};
use crate::api::openai::{new_id, now};
use crate::ask::{Ask, Chat, Input, Settings, Thinking};
use crate::error::ApiError;

/// Most entries of `metadata`.
const MOST_METADATA: usize = 16;
/// Most characters of a key of `metadata`.
const MOST_KEY: usize = 64;
/// Most characters of a value of `metadata`.
const MOST_VALUE: usize = 512;

/// A request.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct ResponsesRequest {
    /// The model's name.
    pub model: Option<String>,
    /// A text, or items: messages, calls, outputs of calls, reasoning.
    #[serde(default)]
    #[schema(schema_with = super::schema::input)]
    pub input: Value,
    /// A system message before everything else. The instructions of the previous response are not used again.
    pub instructions: Option<String>,
    /// The response that this one continues.
    pub previous_response_id: Option<String>,
    /// Functions that the model may call. Tools that run at OpenAI are left out.
    #[schema(schema_with = super::schema::objects)]
    pub tools: Option<Vec<Value>>,
    /// Which of these functions it must call.
    #[serde(default)]
    #[schema(schema_with = super::schema::tool_choice)]
    pub tool_choice: Value,
    /// Whether it may make several calls at once.
    pub parallel_tool_calls: Option<bool>,
    /// Whether and how hard to think.
    pub reasoning: Option<Reasoning>,
    /// The form of the text.
    pub text: Option<TextOptions>,
    /// Most tokens to generate, including thinking.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<i64>,
    /// Temperature, 0 to 2.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Nucleus, 0 to 1.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Makes tokens that occurred in the answer less likely, -2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// The same, for each time that they occurred, -2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Number of likeliest tokens to report.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// Additional data to report: `message.output_text.logprobs`, `reasoning.encrypted_content`.
    pub include: Option<Vec<String>>,
    /// Whether the response can be retrieved and continued later; the default is true.
    pub store: Option<bool>,
    /// Whether the response is streamed.
    pub stream: Option<bool>,
    /// Keys and values of the client's own.
    pub metadata: Option<BTreeMap<String, String>>,
    /// What to do with a conversation that is too long. It is always refused, whatever the value.
    pub truncation: Option<String>,
    /// Not supported: it must not be true.
    pub background: Option<bool>,
    /// Not supported: it must be null.
    #[serde(default)]
    #[schema(schema_with = super::schema::null)]
    pub conversation: Value,
    /// Not supported: it must be null.
    #[serde(default)]
    #[schema(schema_with = super::schema::null)]
    pub prompt: Value,
    /// Most calls of tools that run at the server. There are no such tools.
    pub max_tool_calls: Option<i64>,
    /// The client's identifier for its user.
    pub user: Option<String>,
    /// The same, from newer clients.
    pub safety_identifier: Option<String>,
    /// A hint that is not needed here: prompts that were read before are found by their tokens.
    pub prompt_cache_key: Option<String>,
    /// Texts that end the answer (not in OpenAI's API).
    pub stop: Option<OneOrMany>,
    /// Seed of the random numbers (not in OpenAI's API).
    pub seed: Option<i64>,
    /// Number of likeliest tokens to choose from; 0 means all (not in OpenAI's API).
    #[schema(minimum = 0)]
    pub top_k: Option<i64>,
    /// Least probability, as a part of the likeliest token's (not in OpenAI's API).
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// More variables for the model's chat template (not in OpenAI's API).
    #[schema(schema_with = super::schema::object)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// Whether and how hard to think.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct Reasoning {
    /// `none`, `minimal`, `low`, `medium`, `high`, `xhigh`.
    pub effort: Option<String>,
    /// `auto`, `concise` or `detailed`: thinking is reported as a summary.
    pub summary: Option<String>,
    /// The older name of `summary`.
    pub generate_summary: Option<String>,
}

/// The form of the text.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct TextOptions {
    /// `text`, `json_object` or `json_schema`.
    #[serde(default)]
    #[schema(schema_with = super::schema::object_or_null)]
    pub format: Value,
    /// `low`, `medium` or `high`. Models here do not support it.
    pub verbosity: Option<String>,
}

/// A request that has been checked.
#[derive(Debug)]
pub struct Prepared {
    /// The request in the form that all APIs share.
    pub ask: Ask,
    /// The response object, without the fields that depend on the answer.
    pub head: Map<String, Value>,
    /// This request's own items, with ids.
    pub input: Vec<Value>,
    /// How the answer is reported.
    pub wants: Wants,
}

impl ResponsesRequest {
    /// Checks the request, and translates it. `history`: items of the responses that it continues; `model`: the name of the model
    /// that was found.
    ///
    /// # Errors
    /// Names the field that has an impossible value.
    pub fn prepare(self, model: String, history: &[Value]) -> Result<Prepared, ApiError> {
        self.prepare_with(model, history, None)
    }

    /// The same, with a last request of the user.
    ///
    /// # Errors
    /// As [`ResponsesRequest::prepare`].
    pub fn prepare_with(self, model: String, history: &[Value], last: Option<&str>) -> Result<Prepared, ApiError> {
        self.refuse()?;
        let declared = tools::declared(self.tools.as_deref().unwrap_or_default())?;
        let (choice, allowed) = tools::choice(&self.tool_choice, &declared)?;
        let input = items::normalized(&self.input)?;
        let mut conversation = Conversation::of(self.instructions.as_deref(), history, &input)?;
        if conversation.is_empty() {
            return Err(ApiError::field("input", "`input` is empty: give a text, or at least one item"));
        }
        last.into_iter().for_each(|last| conversation.request(last));
        let settings = self.settings()?;
        let wants = self.wants(&declared, &settings);
        let head = self.head(&model, &declared);
        let reasoning = self.reasoning.unwrap_or_default();
        let enabled = reasoning.effort.as_deref().map(|effort| effort != "none");
        let format = self.text.map(|text| text.format).unwrap_or_default();
        let ask = Ask {
            api: "responses",
            model,
            input: Input::Chat(Chat {
                messages: conversation.into_messages(),
                variables: self.chat_template_kwargs.unwrap_or_default(),
                continues: false,
                now: None,
            }),
            settings,
            tools: allowed,
            choice,
            parallel: self.parallel_tool_calls.unwrap_or(true),
            thinking: Thinking { enabled, effort: reasoning.effort.filter(|effort| effort != "none") },
            form: form(&format, "text.format")?,
            n: 1,
            keep: true,
            echo: false,
        };
        Ok(Prepared { ask, head, input, wants })
    }

    /// Refuses by name what this server does not support.
    fn refuse(&self) -> Result<(), ApiError> {
        let unsupported = |name: &str, what: &str| {
            Err(ApiError::field(name, format!("`{name}` is not supported: {what}")).code("unsupported_parameter"))
        };
        if self.background == Some(true) {
            return unsupported("background", "stream the response, or keep the connection open");
        }
        if !self.conversation.is_null() {
            return unsupported("conversation", "continue a response with `previous_response_id`");
        }
        if !self.prompt.is_null() {
            return unsupported("prompt", "give the text as `instructions` and `input`");
        }
        let known = |name: &str, value: Option<&str>, words: &[&str]| match value {
            Some(value) if !words.contains(&value) => {
                let message = format!("`{name}` is {value:?}, it must be one of {}", words.join(", "));
                Err(ApiError::field(name, message).code("invalid_value"))
            }
            _ => Ok(()),
        };
        known("truncation", self.truncation.as_deref(), &["auto", "disabled"])?;
        let reasoning = self.reasoning.as_ref();
        let summary = reasoning.and_then(|reasoning| reasoning.summary.as_deref());
        known("reasoning.summary", summary, &["auto", "concise", "detailed", "none"])?;
        count("max_tool_calls", self.max_tool_calls, 1, i64::MAX)?;
        self.check_metadata()
    }

    fn check_metadata(&self) -> Result<(), ApiError> {
        let wrong = |what: String| Err(ApiError::field("metadata", format!("`metadata` {what}")).code("invalid_value"));
        let Some(metadata) = &self.metadata else { return Ok(()) };
        if metadata.len() > MOST_METADATA {
            return wrong(format!("has {} entries; at most {MOST_METADATA} are allowed", metadata.len()));
        }
        for (key, value) in metadata {
            if key.chars().count() > MOST_KEY {
                return wrong(format!(
                    "has a key of {} characters; at most {MOST_KEY} are allowed",
                    key.chars().count()
                ));
            }
            if value.chars().count() > MOST_VALUE {
                let length = value.chars().count();
                return wrong(format!("has a value of {length} characters; at most {MOST_VALUE} are allowed"));
            }
        }
        Ok(())
    }

    fn settings(&self) -> Result<Settings, ApiError> {
        let top = count("top_logprobs", self.top_logprobs, 0, 20)?;
        let logprobs = match self.includes("message.output_text.logprobs") {
            true => Some(top.unwrap_or(0)),
            false => top.filter(|&top| top > 0),
        };
        let settings = Settings {
            penalties: penalties(self.presence_penalty, self.frequency_penalty),
            max_tokens: count("max_output_tokens", self.max_output_tokens, 1, i64::MAX)?,
            temperature: self.temperature.map(|temperature| temperature as f32),
            top_p: self.top_p.map(|p| p as f32),
            top_k: count("top_k", self.top_k, 0, i64::from(u32::MAX))?.map(|k| k as u32),
            min_p: self.min_p,
            repetition_penalty: None,
            seed: self.seed.map(|seed| seed as u64),
            stop: self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default(),
            bias: Vec::new(),
            logprobs,
        };
        settings.check()?;
        Ok(settings)
    }

    fn includes(&self, what: &str) -> bool {
        self.include.iter().flatten().any(|included| included == what)
    }

    fn summary(&self) -> Option<&str> {
        let reasoning = self.reasoning.as_ref()?;
        let summary = reasoning.summary.as_deref().or(reasoning.generate_summary.as_deref());
        summary.filter(|&summary| summary != "none")
    }

    fn wants(&self, declared: &Declared, settings: &Settings) -> Wants {
        Wants {
            logprobs: settings.logprobs.is_some(),
            // A client that stores nothing here needs it, even if it does not ask for it: Codex sends back nothing else of a
            // model's thinking.
            encrypted: self.includes("reasoning.encrypted_content") || self.store == Some(false),
            summary: self.summary().is_some(),
            custom: declared.custom.clone(),
        }
    }

    /// The fields of the response that repeat the request.
    fn head(&self, model: &str, declared: &Declared) -> Map<String, Value> {
        let text = self.text.clone().unwrap_or_default();
        let mut format = match text.format {
            Value::Null => json!({"type": "text"}),
            format => format,
        };
        if format["type"] == "json_schema" {
            let defaults = [("name", json!("schema")), ("description", Value::Null), ("strict", json!(true))];
            for (name, value) in defaults {
                if format[name].is_null() {
                    format[name] = value;
                }
            }
        }
        let effort = self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone());
        let choice = if self.tool_choice.is_null() { json!("auto") } else { self.tool_choice.clone() };
        let head = json!({
            "id": new_id("resp_"),
            "object": "response",
            "created_at": now(),
            "completed_at": null,
            "status": "in_progress",
            "background": false,
            "error": null,
            "incomplete_details": null,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "model": model,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls.unwrap_or(true),
            "previous_response_id": self.previous_response_id,
            "presence_penalty": self.presence_penalty.unwrap_or(0.0),
            "frequency_penalty": self.frequency_penalty.unwrap_or(0.0),
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": self.summary()},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.store.unwrap_or(true),
            "temperature": self.temperature.unwrap_or(1.0),
            "text": {"format": format, "verbosity": text.verbosity.as_deref().unwrap_or("medium")},
            "tool_choice": choice,
            "tools": declared.echo,
            "top_logprobs": self.top_logprobs.unwrap_or(0),
            "top_p": self.top_p.unwrap_or(1.0),
            "truncation": "disabled",
            "usage": null,
            "user": self.user,
            "metadata": self.metadata.clone().unwrap_or_default(),
        });
        let Value::Object(mut head) = head else { return Map::new() };
        if !declared.notes.is_empty() {
            head.insert("notes".into(), json!(declared.notes));
        }
        head
    }
}

//! Requests for answers.

use std::collections::VecDeque;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use sluice_text::Message;

use crate::api::openai::request::{OneOrMany, check_messages, count, penalties, tools};
use crate::ask::{Ask, Chat, Input, Settings, TextForm, Thinking, ToolChoice};
use crate::error::ApiError;

/// A request of `/api/chat`.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct ChatRequest {
    /// The model's name, with or without `:latest`.
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    pub model: String,
    /// The conversation. If its last message is the assistant's, that message is continued; if it is empty, the model is loaded.
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Map<String, Value>>,
    /// Functions that the model may call.
    #[schema(schema_with = crate::api::openai::responses::schema::list)]
    pub tools: Option<Vec<Value>>,
    /// Whether the answer is streamed, which is the default.
    pub stream: Option<bool>,
    /// The form of the answer: `json`, or a JSON schema.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub format: Value,
    /// Whether to think: true, false, or how hard.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub think: Value,
    /// How tokens are chosen, and when to stop.
    pub options: Option<Options>,
    /// How long the model should stay loaded; only 0 without a prompt has an effect. Idle models release their memory
    /// automatically.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub keep_alive: Value,
}

/// A request of `/api/generate`.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct GenerateRequest {
    /// The model's name, with or without `:latest`.
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    pub model: String,
    /// The user's message; if it is empty, the model is loaded.
    #[serde(default)]
    pub prompt: String,
    /// Not supported.
    pub suffix: Option<String>,
    /// Not supported.
    #[schema(schema_with = crate::api::openai::responses::schema::list)]
    pub images: Option<Vec<Value>>,
    /// The system prompt.
    pub system: Option<String>,
    /// Not supported.
    pub template: Option<String>,
    /// Tokens of an earlier conversation, from the last object of its answer.
    #[schema(value_type = Option<Vec<i64>>)]
    pub context: Option<Vec<u32>>,
    /// Whether `prompt` is continued without the model's template.
    pub raw: Option<bool>,
    /// Whether the answer is streamed, which is the default.
    pub stream: Option<bool>,
    /// The form of the answer: `json`, or a JSON schema.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub format: Value,
    /// Whether to think: true, false, or how hard.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub think: Value,
    /// How tokens are chosen, and when to stop.
    pub options: Option<Options>,
    /// How long the model should stay loaded; only 0 without a prompt has an effect. Idle models release their memory
    /// automatically.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::any)]
    pub keep_alive: Value,
}

/// Options. Those of Ollama that concern the machine (`num_ctx`, `num_gpu`, …) are set by the server here.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct Options {
    /// Temperature, 0 to 2.
    pub temperature: Option<f32>,
    /// Nucleus, 0 to 1.
    pub top_p: Option<f32>,
    /// Number of likeliest tokens to choose from; 0 means all.
    pub top_k: Option<i64>,
    /// Least probability, as a part of the likeliest token's.
    pub min_p: Option<f32>,
    /// Makes tokens that occurred less likely (above 1).
    pub repeat_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that occurred in the answer, -2 to 2.
    pub presence_penalty: Option<f32>,
    /// The same for each time that they occurred, -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Seed of the random numbers.
    pub seed: Option<i64>,
    /// Most tokens to generate; a number below 1 means as many as there is room for.
    pub num_predict: Option<i64>,
    /// Texts that end the answer.
    pub stop: Option<OneOrMany>,
}

impl ChatRequest {
    /// The request in the form that all APIs share.
    ///
    /// # Errors
    /// Names the field that has an impossible value.
    pub fn into_ask(self) -> Result<Ask, ApiError> {
        let chat = conversation(self.messages)?;
        let tools = tools(&self.tools.unwrap_or_default())?;
        let ask = ask(self.model, Input::Chat(chat), self.options, &self.think, self.format)?;
        Ok(Ask { echo: false, tools, ..ask })
    }
}

impl GenerateRequest {
    /// The request in the form that all APIs share.
    ///
    /// # Errors
    /// Names the field that has an impossible value, or is not supported.
    pub fn into_ask(self) -> Result<Ask, ApiError> {
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let context = self.context.filter(|context| !context.is_empty());
        let unsupported = [
            ("suffix", given(&self.suffix), "only what follows a text can be generated"),
            ("images", self.images.is_some_and(|images| !images.is_empty()), "the models here read text only"),
            ("template", given(&self.template), "a model has its own; with `raw`, the prompt is taken as it is"),
        ];
        if let Some((name, _, why)) = unsupported.into_iter().find(|(_, given, _)| *given) {
            return Err(ApiError::field(name, format!("`{name}` is not supported: {why}")));
        }
        let raw = self.raw == Some(true);
        if raw && (given(&self.system) || context.is_some()) {
            return Err(ApiError::field(
                "raw",
                "with `raw` the prompt is all there is: leave out `system` and `context`",
            ));
        }
        let system = self.system.filter(|system| !system.is_empty()).map(|system| Message::new("system", &system));
        let messages = system.into_iter().chain([Message::new("user", &self.prompt)]).collect();
        let chat = Chat { messages, ..Chat::default() };
        let input = match (raw, context) {
            (true, _) => Input::Text(self.prompt),
            (false, Some(before)) => Input::After { before, chat },
            (false, None) => Input::Chat(chat),
        };
        ask(self.model, input, self.options, &self.think, self.format)
    }
}

/// Whether a client wants the model unloaded at once: `keep_alive` is 0, in seconds or as a duration in Go's notation.
pub fn lets_go(keep_alive: &Value) -> bool {
    let zero = |text: &str| text.trim_end_matches(|c: char| c.is_ascii_lowercase()) == "0";
    keep_alive.as_f64() == Some(0.0) || keep_alive.as_str().is_some_and(zero)
}

/// The parts that both kinds of requests have in common.
fn ask(model: String, input: Input, options: Option<Options>, think: &Value, format: Value) -> Result<Ask, ApiError> {
    Ok(Ask {
        api: "ollama",
        model,
        input,
        settings: options.unwrap_or_default().settings()?,
        tools: Vec::new(),
        choice: ToolChoice::Auto,
        parallel: true,
        thinking: thinking(think)?,
        form: form(format)?,
        n: 1,
        keep: true,
        echo: false,
    })
}

impl Options {
    fn settings(self) -> Result<Settings, ApiError> {
        let settings = Settings {
            max_tokens: self.num_predict.and_then(|most| usize::try_from(most).ok()).filter(|&most| most > 0),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: count("options.top_k", self.top_k, 0, i64::from(u32::MAX))?.map(|k| k as u32),
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            penalties: penalties(self.presence_penalty, self.frequency_penalty),
            seed: self.seed.filter(|&seed| seed >= 0).map(|seed| seed as u64),
            stop: self.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            ..Settings::default()
        };
        let named = |name: &str| if name == "repetition_penalty" { "repeat_penalty".into() } else { name.to_owned() };
        settings.check().map_err(|error| match &error.param {
            Some(name) => {
                let (old, new) = (format!("`{name}`"), format!("options.{}", named(name)));
                ApiError::field(new.clone(), error.message.replace(&old, &format!("`{new}`")))
            }
            None => error,
        })?;
        Ok(settings)
    }
}

fn thinking(value: &Value) -> Result<Thinking, ApiError> {
    match value {
        Value::Null => Ok(Thinking::default()),
        Value::Bool(enabled) => Ok(Thinking { enabled: Some(*enabled), effort: None }),
        Value::String(effort) if effort == "none" => Ok(Thinking { enabled: Some(false), effort: None }),
        Value::String(effort) => Ok(Thinking { enabled: Some(true), effort: Some(effort.clone()) }),
        _ => Err(ApiError::field("think", "`think` must be true, false, or how hard: low, medium, high")),
    }
}

fn form(value: Value) -> Result<TextForm, ApiError> {
    match value {
        Value::Null => Ok(TextForm::Free),
        Value::String(text) if text.is_empty() => Ok(TextForm::Free),
        Value::String(text) if text == "json" => Ok(TextForm::JsonObject),
        Value::Object(schema) => Ok(TextForm::JsonSchema(schema.into())),
        _ => Err(ApiError::field("format", "`format` must be \"json\", or a JSON schema")),
    }
}

/// Converts a conversation from Ollama's form to OpenAI's: arguments are texts, and results name their calls by id.
fn conversation(messages: Vec<Map<String, Value>>) -> Result<Chat, ApiError> {
    check_messages(&messages)?;
    let mut open: VecDeque<(String, String)> = VecDeque::new();
    let mut calls = 0;
    let mut told = Vec::with_capacity(messages.len());
    for (i, message) in messages.into_iter().enumerate() {
        let place = format!("messages[{i}]");
        told.push(Message::from(one_message(message, &place, &mut calls, &mut open)?));
    }
    let last = told.last().map(|message| &message.fields);
    let continues =
        last.is_some_and(|last| last["role"] == "assistant" && last["content"] != "" && !last["content"].is_null());
    let calls = last.is_some_and(|last| last.contains_key("tool_calls"));
    Ok(Chat { messages: told, continues: continues && !calls, ..Chat::default() })
}

/// `calls`: number of calls so far; `open`: names and ids of calls whose results have not come yet.
fn one_message(
    mut message: Map<String, Value>,
    place: &str,
    calls: &mut usize,
    open: &mut VecDeque<(String, String)>,
) -> Result<Map<String, Value>, ApiError> {
    let wrong = |name: &str, what: &str| ApiError::field(format!("{place}.{name}"), format!("`{place}.{name}` {what}"));
    if message.get("images").and_then(Value::as_array).is_some_and(|images| !images.is_empty()) {
        return Err(wrong("images", "is not supported: the models here read text only"));
    }
    message.remove("images");
    match message.get("content") {
        Some(Value::String(_)) => {}
        None | Some(Value::Null) => {
            message.insert("content".into(), "".into());
        }
        _ => return Err(wrong("content", "must be a text")),
    }
    if let Some(thinking) = message.remove("thinking") {
        message.insert("reasoning_content".into(), thinking);
    }
    match message.remove("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) if list.is_empty() => {}
        Some(Value::Array(list)) => {
            let call = |call| {
                one_call(call, calls, open).ok_or_else(|| wrong("tool_calls", "must be calls with `function.name`"))
            };
            let list: Vec<Value> = list.into_iter().map(call).collect::<Result<_, _>>()?;
            message.insert("tool_calls".into(), list.into());
            if message["content"] == "" {
                message.insert("content".into(), Value::Null);
            }
        }
        Some(_) => return Err(wrong("tool_calls", "must be a list of calls")),
    }
    if message["role"] == "tool" {
        join(&mut message, *calls, open);
    }
    Ok(message)
}

/// Gives a result the id and the name of its call: the call that it names by id, otherwise the first call with its name, otherwise
/// the first of all calls.
fn join(result: &mut Map<String, Value>, calls: usize, open: &mut VecDeque<(String, String)>) {
    let name = result.remove("tool_name").or_else(|| result.remove("name"));
    let id = result.remove("tool_call_id");
    let fits = |(open, open_id): &(String, String)| match (&id, &name) {
        (Some(id), _) => id == open_id,
        (None, Some(name)) => name == open,
        (None, None) => true,
    };
    let found = open.iter().position(fits).and_then(|at| open.remove(at)).map(|(name, id)| (name.into(), id.into()));
    // A result without a call: templates need an id nevertheless.
    let (name, id) = found.map_or((name, id), |(name, id)| (Some(name), Some(id)));
    result.insert("tool_call_id".into(), id.unwrap_or_else(|| format!("call_{calls}").into()));
    result.extend(name.map(|name| ("name".to_owned(), name)));
}

/// A call in OpenAI's form.
fn one_call(call: Value, calls: &mut usize, open: &mut VecDeque<(String, String)>) -> Option<Value> {
    let name = call["function"]["name"].as_str()?.to_owned();
    let arguments = match &call["function"]["arguments"] {
        Value::Null => "{}".to_owned(),
        Value::String(text) => text.clone(),
        object => object.to_string(),
    };
    let id = call["id"].as_str().map_or_else(|| format!("call_{calls}"), str::to_owned);
    *calls += 1;
    open.push_back((name.clone(), id.clone()));
    Some(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

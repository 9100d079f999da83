//! Requests for messages.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::content;
use crate::api::openai::request::{check_count, count, form, tool};
use crate::ask::{Ask, Input, Settings, TextForm, Thinking, Tool, ToolChoice, out_of_range};
use crate::error::ApiError;

/// A request.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct MessagesRequest {
    /// The model's name.
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    pub model: String,
    /// The conversation. If its last message is the assistant's, that message is continued.
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Map<String, Value>>,
    /// Most tokens to generate; required, unless tokens are only counted.
    pub max_tokens: Option<i64>,
    /// The system prompt: a string, or blocks of text.
    #[serde(default)]
    #[schema(schema_with = crate::api::openai::responses::schema::input)]
    pub system: Value,
    /// Whether the answer is streamed.
    pub stream: Option<bool>,
    /// Texts that end the answer.
    pub stop_sequences: Option<Vec<String>>,
    /// Temperature, 0 to 1.
    pub temperature: Option<f32>,
    /// Nucleus, 0 to 1.
    pub top_p: Option<f32>,
    /// Number of likeliest tokens to choose from.
    pub top_k: Option<i64>,
    /// Tools that the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// Which tools it must call, as `type`: `auto`, `any`, `tool` (with `name`), `none`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Value,
    /// Whether to think, as `type`: `enabled`, `adaptive`, `disabled`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub thinking: Value,
    /// How hard to think, as `effort`, and the form of the answer, as `format`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub output_config: Value,
    /// The older place of `output_config.format`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub output_format: Value,
}

impl MessagesRequest {
    /// Whether the client wants to read the model's thinking.
    pub fn shows_thinking(&self) -> bool {
        self.thinking["display"] != "omitted"
    }

    /// The request in the form that all APIs share.
    ///
    /// # Errors
    /// Names the field that has an impossible value.
    pub fn into_ask(self) -> Result<Ask, ApiError> {
        let settings = self.settings()?;
        let tools = tools(self.tools.as_deref().unwrap_or_default())?;
        let choice = tool_choice(&self.tool_choice, &tools)?;
        let thinking = thinking(&self.thinking, &self.output_config["effort"])?;
        let form = self.form()?;
        let chat = content::chat(&self.system, &self.messages)?;
        Ok(Ask {
            api: "messages",
            model: self.model,
            input: Input::Chat(chat),
            settings,
            tools,
            choice,
            parallel: self.tool_choice["disable_parallel_tool_use"] != true,
            thinking,
            form,
            n: 1,
            keep: true,
            echo: false,
        })
    }

    fn settings(&self) -> Result<Settings, ApiError> {
        let max_tokens = count("max_tokens", self.max_tokens, 1, i64::MAX)?;
        if max_tokens.is_none() {
            return Err(ApiError::field(
                "max_tokens",
                "`max_tokens` is needed: say how many tokens the answer may have",
            ));
        }
        if let Some(temperature) = self.temperature.filter(|temperature| !(0.0..=1.0).contains(temperature)) {
            return Err(out_of_range("temperature", temperature, 0, 1));
        }
        let settings = Settings {
            max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: count("top_k", self.top_k, 0, i64::from(u32::MAX))?.map(|k| k as u32),
            stop: self.stop_sequences.clone().unwrap_or_default(),
            ..Settings::default()
        };
        settings.check().map_err(|error| match error.param.as_deref() {
            Some("stop") => ApiError::field("stop_sequences", error.message.replace("`stop`", "`stop_sequences`")),
            _ => error,
        })?;
        Ok(settings)
    }

    fn form(&self) -> Result<TextForm, ApiError> {
        let (value, place) = match &self.output_config["format"] {
            Value::Null => (&self.output_format, "output_format"),
            format => (format, "output_config.format"),
        };
        match (value, value["type"].as_str()) {
            (Value::Null, _) | (_, Some("json_schema")) => form(value, place),
            _ => Err(ApiError::field(place, format!("`{place}.type` must be json_schema"))),
        }
    }
}

/// `tools`. Tools that Anthropic's servers run themselves (web search and the like, recognised by their `type`) are left out: the
/// model cannot call them here, and clients send them even if they do not need them.
fn tools(list: &[Value]) -> Result<Vec<Tool>, ApiError> {
    check_count(list)?;
    let mut tools: Vec<Tool> = Vec::new();
    for (i, value) in list.iter().enumerate() {
        let place = format!("tools[{i}]");
        match value["type"].as_str() {
            None | Some("custom") => {}
            Some(_) => continue,
        }
        let schema = &value["input_schema"];
        if !schema.is_object() {
            let message = format!("`{place}.input_schema` is needed: a JSON schema of the arguments");
            return Err(ApiError::field(format!("{place}.input_schema"), message));
        }
        let function = json!({
            "name": value["name"],
            "description": value["description"],
            "parameters": schema,
            "strict": value["strict"],
        });
        let tool = tool(&function, &place)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(ApiError::field(place, format!("`tools`: there are two tools {:?}", tool.name)));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// `tool_choice`.
fn tool_choice(value: &Value, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    let wrong = |what: String| ApiError::field("tool_choice", format!("`tool_choice`: {what}"));
    match (value, value["type"].as_str()) {
        (Value::Null, _) | (_, Some("auto")) => Ok(ToolChoice::Auto),
        (_, Some("none")) => Ok(ToolChoice::None),
        (_, Some("any")) if tools.is_empty() => Err(wrong("a call is required, but there are no `tools`".into())),
        (_, Some("any")) => Ok(ToolChoice::Required),
        (_, Some("tool")) => {
            let name = value["name"].as_str().ok_or_else(|| wrong("say which tool, as `name`".into()))?;
            match tools.iter().any(|tool| tool.name == name) {
                true => Ok(ToolChoice::Named(name.to_owned())),
                false => Err(wrong(format!("there is no tool {name:?} among `tools` that the model can call here"))),
            }
        }
        _ => Err(wrong("its `type` must be one of auto, any, tool, none".into())),
    }
}

/// `thinking` and `output_config.effort`. As in Anthropic's API, a model thinks only if asked to. `budget_tokens` must be valid,
/// but the model decides how long it thinks.
fn thinking(value: &Value, effort: &Value) -> Result<Thinking, ApiError> {
    let wrong = |place: &str, what: &str| ApiError::field(place, format!("`{place}` {what}"));
    let enabled = match (value, value["type"].as_str()) {
        (Value::Null, _) | (_, Some("disabled")) => false,
        (_, Some("enabled" | "adaptive")) => true,
        _ => return Err(wrong("thinking.type", "must be one of enabled, adaptive, disabled")),
    };
    let budget = &value["budget_tokens"];
    if !budget.is_null() && budget.as_u64().is_none_or(|budget| budget == 0) {
        return Err(wrong("thinking.budget_tokens", "must be a number of tokens"));
    }
    let effort = match effort {
        Value::Null => None,
        Value::String(effort) => Some(effort.clone()),
        _ => return Err(wrong("output_config.effort", "must be a word such as low, medium, high")),
    };
    Ok(Thinking { enabled: Some(enabled), effort })
}

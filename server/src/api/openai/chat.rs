//! `/v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use serde::Deserialize;
use serde_json::{Map, Value};
use sluice_text::Message;

use super::chat_reply::{ChatFold, ChatWriter};
use super::request::{OneOrMany, StreamOptions, bias, check_messages, count, form, penalties, tool_choice, tools};
use crate::api::body::Json;
use crate::app::App;
use crate::ask::{Ask, Chat, Input, MOST_ANSWERS, Settings, Thinking};
use crate::error::{ApiError, Flavour};
use crate::reply::{Framing, streamed, whole};
use crate::run::Run;

/// A request.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct ChatRequest {
    /// The model's name.
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    pub model: String,
    /// The conversation.
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Map<String, Value>>,
    /// Whether the answer is streamed.
    #[serde(default)]
    pub stream: Option<bool>,
    /// What streams report.
    pub stream_options: Option<StreamOptions>,
    /// Most tokens to generate.
    pub max_completion_tokens: Option<i64>,
    /// The older name of `max_completion_tokens`.
    pub max_tokens: Option<i64>,
    /// Temperature, 0 to 2.
    pub temperature: Option<f32>,
    /// Nucleus, 0 to 1.
    pub top_p: Option<f32>,
    /// Number of likeliest tokens to choose from; 0 means all.
    pub top_k: Option<i64>,
    /// Least probability, as a part of the likeliest token's.
    pub min_p: Option<f32>,
    /// Makes tokens that occurred less likely (above 1).
    pub repetition_penalty: Option<f32>,
    /// Makes tokens that occurred in the answer less likely, -2 to 2.
    pub presence_penalty: Option<f32>,
    /// The same, for each time that they occurred, -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Number of answers.
    pub n: Option<i64>,
    /// Texts that end the answer.
    pub stop: Option<OneOrMany>,
    /// Seed of the random numbers.
    pub seed: Option<i64>,
    /// Numbers that are added to logits, by token id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Whether to report log probabilities.
    pub logprobs: Option<bool>,
    /// Number of likeliest tokens to report.
    pub top_logprobs: Option<i64>,
    /// The form of the answer.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub response_format: Value,
    /// Functions that the model may call.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// Which of these functions it must call.
    #[serde(default)]
    #[schema(schema_with = super::responses::schema::tool_choice)]
    pub tool_choice: Value,
    /// Whether it may make several calls at once.
    pub parallel_tool_calls: Option<bool>,
    /// How hard to think: `none`, `minimal`, `low`, `medium`, `high`.
    pub reasoning_effort: Option<String>,
    /// More variables for the model's chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the last message, an assistant's, is continued instead of answered.
    pub continue_final_message: Option<bool>,
    /// Whether keys and values may be kept for later requests.
    pub cache_prompt: Option<bool>,
}

/// Makes answers.
pub async fn create(State(app): State<Arc<App>>, Json(request): Json<ChatRequest>) -> Response<Body> {
    let streams = request.stream == Some(true);
    let usage = request.stream_options.is_some_and(|options| options.include_usage);
    let n = request.n;
    match begin(&app, request).await {
        Err(error) => error.response(Flavour::OpenAi),
        Ok((run, model)) if streams => streamed(run, ChatWriter::new(model, n, usage), Framing::Events),
        Ok((run, model)) => whole(run, ChatFold::new(model, n), Flavour::OpenAi).await,
    }
}

async fn begin(app: &Arc<App>, request: ChatRequest) -> Result<(Run, String), ApiError> {
    app.open()?;
    let model = app.models.find(&request.model)?.id.clone();
    let ask = request.into_ask()?;
    Ok((Run::begin(app, ask).await?, model))
}

impl ChatRequest {
    /// The request in the form that all APIs share.
    ///
    /// # Errors
    /// Names the field that has an impossible value.
    pub fn into_ask(self) -> Result<Ask, ApiError> {
        check_messages(&self.messages)?;
        let tools = tools(&self.tools.unwrap_or_default())?;
        let choice = tool_choice(&self.tool_choice, &tools)?;
        let logprobs = match (self.logprobs, count("top_logprobs", self.top_logprobs, 0, 20)?) {
            (Some(true), top) => Some(top.unwrap_or(0)),
            (_, None | Some(0)) => None,
            (_, Some(_)) => {
                return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
            }
        };
        let most = self.max_completion_tokens.or(self.max_tokens);
        let settings = Settings {
            max_tokens: count("max_completion_tokens", most, 1, i64::MAX)?,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: count("top_k", self.top_k, 0, i64::from(u32::MAX))?.map(|k| k as u32),
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            penalties: penalties(self.presence_penalty, self.frequency_penalty),
            seed: self.seed.map(|seed| seed as u64),
            stop: self.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            bias: bias(self.logit_bias)?,
            logprobs,
        };
        settings.check()?;
        let effort = self.reasoning_effort;
        let enabled = effort.as_deref().map(|effort| effort != "none");
        let continues = self.continue_final_message == Some(true);
        let last = self.messages.last().and_then(|message| message.get("role")?.as_str());
        if continues && last != Some("assistant") {
            let message = "`continue_final_message` needs the last message to be one of the assistant";
            return Err(ApiError::field("continue_final_message", message));
        }
        Ok(Ask {
            api: "chat",
            model: self.model,
            input: Input::Chat(Chat {
                messages: self.messages.into_iter().map(Message::from).collect(),
                variables: self.chat_template_kwargs.unwrap_or_default(),
                continues,
                now: None,
            }),
            settings,
            tools,
            choice,
            parallel: self.parallel_tool_calls.unwrap_or(true),
            thinking: Thinking { enabled, effort: effort.filter(|effort| effort != "none") },
            form: form(&self.response_format, "response_format")?,
            n: count("n", self.n, 1, MOST_ANSWERS as i64)?.unwrap_or(1),
            keep: self.cache_prompt.unwrap_or(true),
            echo: false,
        })
    }
}

//! `/v1/completions`: texts and tokens that are continued as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_dialect::Piece;

use super::chat_reply::{Collected, finish_reason, usage};
use super::request::{OneOrMany, StreamOptions, bias, count, form, penalties};
use super::{logprobs, new_id, now};
use crate::answer::{Step, TokenLogprob, Usage};
use crate::api::body::Json;
use crate::app::App;
use crate::ask::{Ask, Input, MOST_ANSWERS, Settings};
use crate::error::{ApiError, Flavour};
use crate::reply::{Events, Fold, Framing, Writer, streamed, whole};
use crate::run::Run;

/// Tokens that OpenAI's API generates by default.
const USUAL_TOKENS: usize = 16;

/// The text to continue.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged)]
pub enum Prompts {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// The tokens of a text.
    Tokens(Vec<u32>),
    /// The tokens of several texts.
    TokenLists(Vec<Vec<u32>>),
}

/// A request.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CompletionRequest {
    /// The model's name.
    #[serde(default, deserialize_with = "crate::api::body::nullable")]
    #[schema(nullable)]
    pub model: String,
    /// The text to continue.
    pub prompt: Prompts,
    /// Whether the answer is streamed.
    pub stream: Option<bool>,
    /// What streams report.
    pub stream_options: Option<StreamOptions>,
    /// Most tokens to generate; the default is 16.
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
    /// Number of answers to each prompt.
    pub n: Option<i64>,
    /// Texts that end the answer.
    pub stop: Option<OneOrMany>,
    /// Seed of the random numbers.
    pub seed: Option<i64>,
    /// Numbers that are added to logits, by token id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Number of likeliest tokens to report, with their log probabilities.
    pub logprobs: Option<i64>,
    /// Whether the answer begins with the prompt.
    pub echo: Option<bool>,
    /// Used like `n` if `n` is missing, because the server returns all answers that it generates.
    pub best_of: Option<i64>,
    /// Refused: models here only continue a text.
    pub suffix: Option<String>,
    /// The form of the answer.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub response_format: Value,
    /// Whether keys and values may be kept for later requests.
    pub cache_prompt: Option<bool>,
}

/// Makes completions.
pub async fn create(State(app): State<Arc<App>>, Json(request): Json<CompletionRequest>) -> Response<Body> {
    let streams = request.stream == Some(true);
    let with_usage = request.stream_options.is_some_and(|options| options.include_usage);
    match begin(&app, request).await {
        Err(error) => error.response(Flavour::OpenAi),
        Ok((run, reply)) if streams => streamed(run, CompletionWriter { reply, with_usage }, Framing::Events),
        Ok((run, reply)) => whole(run, CompletionFold { reply }, Flavour::OpenAi).await,
    }
}

async fn begin(app: &Arc<App>, request: CompletionRequest) -> Result<(Run, Reply), ApiError> {
    app.open()?;
    let model = app.models.find(&request.model)?.id.clone();
    let asks = request.into_asks()?;
    let reply = Reply::new(model, &asks);
    Ok((Run::begin_all(app, asks).await?, reply))
}

impl CompletionRequest {
    /// The requests, one for each prompt.
    ///
    /// # Errors
    /// Names the field that has an impossible value.
    pub fn into_asks(self) -> Result<Vec<Ask>, ApiError> {
        let inputs: Vec<Input> = match self.prompt {
            Prompts::Text(text) => vec![Input::Text(text)],
            Prompts::Texts(texts) => texts.into_iter().map(Input::Text).collect(),
            Prompts::Tokens(tokens) => vec![Input::Tokens(tokens)],
            Prompts::TokenLists(lists) => lists.into_iter().map(Input::Tokens).collect(),
        };
        let most = MOST_ANSWERS as i64;
        let n = count("n", self.n.or(self.best_of), 1, most)?.unwrap_or(1);
        if inputs.is_empty() || inputs.len() * n > MOST_ANSWERS {
            let message =
                format!("`prompt` and `n` ask for {} answers, from 1 to {most} are possible", inputs.len() * n);
            return Err(ApiError::field("prompt", message));
        }
        if self.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field("suffix", "`suffix` is not supported: models here only continue a text"));
        }
        let settings = Settings {
            max_tokens: Some(count("max_tokens", self.max_tokens, 0, i64::MAX)?.unwrap_or(USUAL_TOKENS)),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: count("top_k", self.top_k, 0, i64::from(u32::MAX))?.map(|k| k as u32),
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            penalties: penalties(self.presence_penalty, self.frequency_penalty),
            seed: self.seed.map(|seed| seed as u64),
            stop: self.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            bias: bias(self.logit_bias)?,
            logprobs: count("logprobs", self.logprobs, 0, 20)?,
        };
        settings.check()?;
        let form = form(&self.response_format, "response_format")?;
        let ask = |input| Ask {
            api: "completions",
            model: self.model.clone(),
            input,
            settings: settings.clone(),
            form: form.clone(),
            n,
            keep: self.cache_prompt.unwrap_or(true),
            echo: self.echo.unwrap_or(false),
            ..Ask::default()
        };
        Ok(inputs.into_iter().map(ask).collect())
    }
}

/// The fields that all objects of a response share, and the answers so far.
struct Reply {
    id: String,
    created: u64,
    model: String,
    n: usize,
    logprobs: bool,
    answers: Vec<Collected>,
    /// Bytes of each answer that a stream has sent.
    offsets: Vec<usize>,
}

impl Reply {
    fn new(model: String, asks: &[Ask]) -> Self {
        let n = asks.first().map_or(1, |ask| ask.n);
        let logprobs = asks.iter().any(|ask| ask.settings.logprobs.is_some());
        let answers = (0..asks.len() * n).map(|_| Collected::default()).collect();
        Reply { id: new_id("cmpl-"), created: now(), model, n, logprobs, answers, offsets: Vec::new() }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn choice(&self, index: usize, text: &str, tokens: &[TokenLogprob], offset: usize, why: Option<&str>) -> Value {
        let tokens = self.logprobs.then(|| logprobs::completion(tokens, offset));
        json!({"index": index, "text": text, "logprobs": tokens, "finish_reason": why})
    }

    fn usage(&self) -> Value {
        usage(&self.answers.iter().map(Collected::usage).collect::<Vec<Usage>>(), self.n)
    }
}

/// Streams objects.
struct CompletionWriter {
    reply: Reply,
    with_usage: bool,
}

impl CompletionWriter {
    fn send(&mut self, index: usize, text: &str, tokens: &[TokenLogprob], out: &mut Events) {
        self.reply.offsets.resize(self.reply.answers.len(), 0);
        let offset = self.reply.offsets[index];
        self.reply.offsets[index] += text.len();
        out.data(&self.reply.object(vec![self.reply.choice(index, text, tokens, offset, None)]));
    }
}

impl Writer for CompletionWriter {
    fn begin(&mut self, _out: &mut Events) {}

    fn step(&mut self, index: usize, step: Step, out: &mut Events) {
        match step {
            Step::Waiting(waiting) => {
                let mut object = self.reply.object(vec![self.reply.choice(index, "", &[], 0, None)]);
                object["progress"] = json!(waiting);
                out.data(&object);
            }
            Step::Echo(text, tokens) | Step::Piece(Piece::Text(text), tokens) => self.send(index, &text, &tokens, out),
            // Without a dialect there is only text.
            Step::Piece(..) => {}
            Step::End(ending) => {
                let why = finish_reason(&ending.why);
                self.reply.answers[index].ending = Some(ending);
                out.data(&self.reply.object(vec![self.reply.choice(index, "", &[], 0, Some(why))]));
            }
            Step::Failed(error) => out.data(&error.body(Flavour::OpenAi)),
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.with_usage {
            let mut object = self.reply.object(Vec::new());
            object["usage"] = self.reply.usage();
            out.data(&object);
        }
        out.done();
    }
}

/// Makes one object from the answers.
pub struct CompletionFold {
    reply: Reply,
}

impl CompletionFold {
    /// An object for the answers to these requests.
    pub fn new(model: String, asks: &[Ask]) -> Self {
        CompletionFold { reply: Reply::new(model, asks) }
    }
}

impl Fold for CompletionFold {
    fn step(&mut self, index: usize, step: Step) -> Result<(), ApiError> {
        self.reply.answers.get_mut(index).map_or(Ok(()), |answer| answer.step(step))
    }

    fn finish(self: Box<Self>) -> Value {
        let choice = |(index, answer): (usize, &Collected)| {
            let why = answer.ending.as_ref().map(|ending| finish_reason(&ending.why));
            self.reply.choice(index, &answer.text, &answer.tokens, 0, why)
        };
        let choices = self.reply.answers.iter().enumerate().map(choice).collect();
        let mut object = self.reply.object(choices);
        object["usage"] = self.reply.usage();
        object
    }
}

//! The form of requests that all APIs share.

use serde_json::{Map, Value};
pub use sluice_dialect::ToolChoice;
use sluice_generate::Penalties;
use sluice_text::Message;

use crate::error::ApiError;

/// A request, from any API.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Its API, for logs and metrics.
    pub api: &'static str,
    /// The model's name, as the client gave it.
    pub model: String,
    /// The text to continue.
    pub input: Input,
    /// How tokens are chosen.
    pub settings: Settings,
    /// Tools that the model may call.
    pub tools: Vec<Tool>,
    /// Which of these tools it must call.
    pub choice: ToolChoice,
    /// Whether it may make several calls at once.
    pub parallel: bool,
    /// Whether and how hard it should think.
    pub thinking: Thinking,
    /// The form of the text.
    pub form: TextForm,
    /// Number of answers.
    pub n: usize,
    /// Whether later requests may use what the model remembers.
    pub keep: bool,
    /// Whether the answer begins with the text that it continues, with the log probabilities of its tokens if these are requested.
    pub echo: bool,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON schema of its arguments.
    pub parameters: Value,
    /// Whether arguments must match the schema.
    pub strict: bool,
}

impl Tool {
    /// The tool in the form that templates take.
    pub fn declaration(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.clone().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.clone().into());
        }
        function.insert("parameters".into(), self.parameters.clone());
        serde_json::json!({"type": "function", "function": function})
    }
}

/// The text to continue.
#[derive(Clone, Debug)]
pub enum Input {
    /// A conversation.
    Chat(Chat),
    /// A conversation that continues after the tokens of an earlier one.
    After {
        /// The tokens.
        before: Vec<u32>,
        /// The messages after them.
        chat: Chat,
    },
    /// A text, without a template.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
}

impl Ask {
    /// Number of its messages.
    pub fn messages(&self) -> usize {
        match &self.input {
            Input::Chat(chat) | Input::After { chat, .. } => chat.messages.len(),
            Input::Text(_) | Input::Tokens(_) => 0,
        }
    }

    /// A lower bound for the bytes of the prompt's texts. Thinking is not counted, because templates drop it.
    pub fn text_bytes(&self) -> usize {
        let text = |content: &Value| match content {
            Value::String(text) => text.len(),
            Value::Array(parts) => parts.iter().filter_map(|part| Some(part.get("text")?.as_str()?.len())).sum(),
            _ => 0,
        };
        match &self.input {
            Input::Chat(chat) | Input::After { chat, .. } => {
                chat.messages.iter().filter_map(|message| message.fields.get("content")).map(text).sum()
            }
            Input::Text(text) => text.len(),
            Input::Tokens(_) => 0,
        }
    }
}

impl Ask {
    /// `Some(n)`: the tokens of the prompt are scored too, with the `n` likeliest tokens at the place of each.
    pub fn scored(&self) -> Option<usize> {
        self.settings.logprobs.filter(|_| self.echo)
    }
}

impl Input {
    /// Whether a conversation is continued, rather than a text.
    pub fn is_chat(&self) -> bool {
        matches!(self, Input::Chat(_) | Input::After { .. })
    }
}

impl Default for Input {
    fn default() -> Self {
        Input::Text(String::new())
    }
}

/// A conversation, its messages in OpenAI's form.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The messages.
    pub messages: Vec<Message>,
    /// More variables for the template.
    pub variables: Map<String, Value>,
    /// Whether the last message, an assistant's, should be continued instead of answered.
    pub continues: bool,
    /// The time that templates see, in seconds since 1970; `None`: now. A conversation that keeps the time of its beginning has the
    /// same prompt on another day.
    pub now: Option<i64>,
}

/// How tokens are chosen, and when to stop. Settings that are not given are those that the model's authors recommend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Most tokens to generate; `None`: as many as the context has room for.
    pub max_tokens: Option<usize>,
    /// Temperature; 0 takes the likeliest token.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Number of likeliest tokens to choose from.
    pub top_k: Option<u32>,
    /// Least probability, as a part of the likeliest token's.
    pub min_p: Option<f32>,
    /// Makes tokens that occurred less likely (above 1).
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens in the answer so far, once and for each time that they occurred.
    pub penalties: Penalties,
    /// Seed of the random numbers; `None`: a random one.
    pub seed: Option<u64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Numbers that are added to logits.
    pub bias: Vec<(u32, f32)>,
    /// `Some(n)`: report log probabilities, and those of the `n` likeliest tokens.
    pub logprobs: Option<usize>,
}

/// Whether and how hard to think.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thinking {
    /// The client's choice, if it made one.
    pub enabled: Option<bool>,
    /// How hard: `low`, `medium`, `high`, ….
    pub effort: Option<String>,
}

/// The form of an answer's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TextForm {
    /// Anything.
    #[default]
    Free,
    /// A JSON object.
    JsonObject,
    /// JSON that matches a schema.
    JsonSchema(Value),
    /// A regular expression.
    Regex(String),
    /// A grammar in Lark.
    Lark(String),
}

/// Most stop strings of a request.
const MOST_STOPS: usize = 16;
/// Most log probabilities of a token.
pub const MOST_LOGPROBS: usize = 20;
/// Most answers to one request.
pub const MOST_ANSWERS: usize = 128;

impl Settings {
    /// Checks the settings, under the names that the API has for them.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(&self) -> Result<(), ApiError> {
        let within = |name: &str, value: Option<f32>, least: f32, most: f32| match value {
            Some(value) if !(least..=most).contains(&value) => Err(out_of_range(name, value, least, most)),
            _ => Ok(()),
        };
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        within("presence_penalty", Some(self.penalties.presence), -2.0, 2.0)?;
        within("frequency_penalty", Some(self.penalties.frequency), -2.0, 2.0)?;
        if self.stop.len() > MOST_STOPS {
            let message = format!("`stop` has {} strings; at most {MOST_STOPS} are allowed", self.stop.len());
            return Err(ApiError::field("stop", message));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(ApiError::field("stop", "an empty stop string ends every text before it begins: leave it out"));
        }
        if let Some(count) = self.logprobs.filter(|&count| count > MOST_LOGPROBS) {
            let message = format!("`top_logprobs` is {count}; the most is {MOST_LOGPROBS}");
            return Err(ApiError::field("top_logprobs", message));
        }
        Ok(())
    }
}

/// A number outside its range.
pub fn out_of_range(
    name: &str,
    value: impl std::fmt::Display,
    least: impl std::fmt::Display,
    most: impl std::fmt::Display,
) -> ApiError {
    ApiError::field(name, format!("`{name}` is {value}; it must be between {least} and {most}")).code("invalid_value")
}

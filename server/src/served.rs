//! A model that is served: how it was opened, and how requests become generations on it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value;
use sluice_dialect::{Dialect, Tools};
use sluice_format::ModelFile;
use sluice_generate::{Drain, GenerationError, Model, Priority, Request, Sampled, SamplerConfig, SchedulerOptions};
use sluice_grammar::{Form, Grammar, Vocabulary};
use sluice_model::engine::{Engine, EngineOptions};
use sluice_text::{ChatTemplate, Prompt, RenderOptions, Special, StopCondition, Tokenizer};

use crate::answer::{Answer, Reading};
use crate::ask::{Ask, Chat, Input, Settings, TextForm, Tool, ToolChoice};
use crate::clock;
use crate::error::{ApiError, Kind};
use crate::live::Live;
use crate::transcripts::Transcripts;

/// Places at the end of a prompt at which its sequence is marked.
const MARKS: usize = 2;
/// Most characters of the title of a stored sequence.
const TITLE: usize = 80;
/// Bytes at the end of a prompt that a dialect reads.
const TAIL: usize = 256;

/// A loaded model.
pub struct Served {
    /// The name that clients see.
    pub id: String,
    model: Model,
    /// The model's own template, or that of its family here.
    template: Option<ChatTemplate>,
    dialect: Dialect,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    transcripts: Transcripts,
    /// Bytes of the longest token.
    longest_token: OnceLock<usize>,
}

/// Receives tokens as they are sampled.
pub type Hears = Box<dyn FnMut(Sampled) + Send>;

/// Values that a batch fixes in addition to the request, so that it can be answered again in the same way.
pub struct Repeatable {
    /// The time that templates see, in seconds since 1970.
    pub now: i64,
    /// Seed of the random numbers, if the request gives none.
    pub seed: u64,
    /// Seed of the ids of calls.
    pub calls: u64,
    /// For each answer: the tokens that an earlier run sampled, and the receiver of those that are sampled now.
    pub answers: Vec<(Vec<Sampled>, Hears)>,
    /// Whether it comes before other requests.
    pub priority: Priority,
}

/// A prompt as tokens, and the end of its text.
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The end of the text.
    tail: String,
}

impl Served {
    /// Opens a model and begins to read its dense parts; the first answer waits for them.
    ///
    /// # Errors
    /// If the file, its text files, or the memory do not allow it.
    pub fn open(
        id: String,
        path: &Path,
        options: &EngineOptions,
        scheduling: SchedulerOptions,
    ) -> Result<Self, GenerationError> {
        let engine = Engine::open(path, options)?;
        Self::of(id, engine, scheduling, !options.forget, None)
    }

    /// A model on top of an engine. `learn`: whether to save what is learned about the experts; `template`: a chat template to use
    /// instead of the model's own.
    ///
    /// # Errors
    /// If the model's text files are invalid, or the system refuses to start a thread.
    pub fn of(
        id: String,
        engine: Engine,
        scheduling: SchedulerOptions,
        learn: bool,
        template: Option<ChatTemplate>,
    ) -> Result<Self, GenerationError> {
        let store = scheduling.store.clone();
        let model = Model::new(engine, scheduling, learn)?;
        let tokenizer = model.tokenizer();
        let has_token = |text: &str| tokenizer.is_some_and(|t| t.token_id(text).is_some());
        let template = match template.or_else(|| model.template().cloned()) {
            Some(template) => Some(template),
            None => own_template(model.family(), tokenizer, &has_token)?,
        };
        let source = template.as_ref().map(|template| template.source(true));
        let special = |text: &str| {
            let tokenizer = tokenizer?;
            tokenizer.token_id(text).filter(|&id| tokenizer.is_control(id))
        };
        let dialect = Dialect::detect(Some(model.family()), source, &has_token).with_special_tokens(&special);
        let (vocabulary, transcripts) = (OnceLock::new(), Transcripts::default());
        if let Some(store) = &store {
            store.texts(model.binding()).into_iter().for_each(|tokens| transcripts.remember(tokens));
        }
        Ok(Served { id, model, template, dialect, vocabulary, transcripts, longest_token: OnceLock::new() })
    }

    /// Closes the model; what it remembers of conversations is kept if possible.
    pub fn close(self) {
        self.model.close(Drain::default());
    }

    /// The [`Model`] of the generation layer.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Most tokens of a conversation.
    pub fn context(&self) -> usize {
        self.model.context()
    }

    /// The model's chat template, if it has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// How the model writes thinking and tool calls.
    pub fn dialect(&self) -> &Dialect {
        &self.dialect
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        self.model.tokenizer().ok_or_else(|| GenerationError::NoTokenizer.into())
    }

    /// The tokens that end an answer.
    fn end(&self) -> &BTreeSet<u32> {
        self.model.recommended().1.eos()
    }

    /// The prompt of a conversation as text.
    ///
    /// # Errors
    /// If the model has no template, or the template refuses the conversation.
    pub fn prompt(&self, chat: &Chat, ask: &Ask) -> Result<Prompt, ApiError> {
        self.prompt_at(chat, ask, now())
    }

    fn prompt_at(&self, chat: &Chat, ask: &Ask, now: i64) -> Result<Prompt, ApiError> {
        let template = self.template.as_ref().ok_or_else(|| ApiError::from(GenerationError::NoChatTemplate))?;
        let messages = self.dialect.messages(chat.messages.clone());
        let messages = messages.map_err(|error| ApiError::field("messages", error.to_string()))?;
        let mut extra = self.dialect.template_options(ask.thinking.enabled, ask.thinking.effort.as_deref());
        extra.extend(chat.variables.clone());
        let now = chat.now.unwrap_or(now);
        let tools = Some(declarations(ask)).filter(|tools| !tools.is_empty()).map(Value::Array);
        let options = RenderOptions { add_generation_prompt: !chat.continues, tools, extra, now };
        let mut prompt = template.prompt(self.tokenizer()?, &messages, &options)?;
        if chat.continues {
            let content = chat.messages.last().and_then(|message| message.fields.get("content")?.as_str());
            if !content.is_some_and(|content| prompt.end_with(content)) {
                let message = "this model's template changes the last message, so it cannot be continued";
                return Err(ApiError::field("messages", message));
            }
        }
        Ok(prompt)
    }

    /// Refuses a text that cannot fit in the context, before a tokenizer spends seconds and gigabytes on it.
    fn check_size(&self, bytes: usize) -> Result<(), ApiError> {
        let Some(tokenizer) = self.model.tokenizer() else { return Ok(()) };
        let longest = *self.longest_token.get_or_init(|| {
            let ids = 0..u32::try_from(self.model.vocab_size()).unwrap_or(u32::MAX);
            ids.filter_map(|id| Some(tokenizer.token_text(id)?.len())).max().unwrap_or(1).max(1)
        });
        // Tokenizers may merge several bytes into one before they search for tokens.
        let fewest = bytes / longest / 4;
        match fewest > self.context() {
            true => Err(GenerationError::PromptTooLong { prompt: fewest, context: self.context() }.into()),
            false => Ok(()),
        }
    }

    /// The tokens of the text to continue.
    ///
    /// # Errors
    /// Like [`Served::prompt`], and if the tokenizer refuses the text.
    pub fn encode(&self, ask: &Ask) -> Result<Encoded, ApiError> {
        self.encode_at(ask, now(), ask.keep)
    }

    /// Like [`Served::encode`], at this time. `goes_on`: whether the tokens of earlier answers replace the tokenizer's tokens for
    /// their texts.
    fn encode_at(&self, ask: &Ask, now: i64, goes_on: bool) -> Result<Encoded, ApiError> {
        // Each message adds tokens of its own.
        let messages = ask.messages();
        if messages > self.context() {
            return Err(GenerationError::PromptTooLong { prompt: messages, context: self.context() }.into());
        }
        self.check_size(ask.text_bytes())?;
        match &ask.input {
            Input::Chat(chat) => {
                let prompt = self.prompt_at(chat, ask, now)?;
                let tokenizer = self.tokenizer()?;
                let ids = prompt.encode(tokenizer)?;
                let ids = match goes_on {
                    true => self.transcripts.continue_from(tokenizer, prompt.text(), ids),
                    false => ids,
                };
                Ok(Encoded { ids, tail: tail_of(prompt.text()).to_owned() })
            }
            Input::After { before, chat } => {
                let prompt = self.prompt_at(chat, ask, now)?;
                let tokenizer = self.tokenizer()?;
                let mut ids = prompt.encode(tokenizer)?;
                // A text has only one beginning token.
                if ids.first() == before.first() && ids.first().is_some_and(|&id| tokenizer.is_special(id)) {
                    ids.remove(0);
                }
                ids.splice(..0, before.iter().copied());
                Ok(Encoded { ids, tail: tail_of(prompt.text()).to_owned() })
            }
            Input::Text(text) => {
                let ids = self.tokenizer()?.encode(text, true)?;
                Ok(Encoded { ids, tail: String::new() })
            }
            Input::Tokens(ids) => Ok(Encoded { ids: ids.clone(), tail: String::new() }),
        }
    }

    /// Starts the generations of a request. `forced`: a form that the answer must have instead of the requested one.
    ///
    /// # Errors
    /// If the request is invalid, or the queue is full.
    pub fn start(self: &Arc<Self>, ask: &Ask, forced: Option<&Form>, live: &Live) -> Result<Vec<Answer>, ApiError> {
        self.start_all(ask, forced, live, None)
    }

    /// Starts the generations of a request in a batch.
    ///
    /// # Errors
    /// If the request is invalid.
    pub fn start_again(
        self: &Arc<Self>,
        ask: &Ask,
        live: &Live,
        repeatable: Repeatable,
    ) -> Result<Vec<Answer>, ApiError> {
        self.start_all(ask, None, live, Some(repeatable))
    }

    fn start_all(
        self: &Arc<Self>,
        ask: &Ask,
        forced: Option<&Form>,
        live: &Live,
        repeatable: Option<Repeatable>,
    ) -> Result<Vec<Answer>, ApiError> {
        ask.settings.check()?;
        let encoded = match &repeatable {
            Some(repeatable) => self.encode_at(ask, repeatable.now, false)?,
            None => self.encode(ask)?,
        };
        let room = (self.context() + 1).saturating_sub(encoded.ids.len());
        let max_tokens = ask.settings.max_tokens.unwrap_or(room).min(room);
        let grammar = match forced {
            Some(form) => Some(self.compile(form, "model")?),
            None => self.grammar(ask, &encoded.tail)?,
        };
        let random = || repeatable.as_ref().map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |r| r.seed);
        let seed = ask.settings.seed.unwrap_or_else(random);
        let (calls, priority) = match &repeatable {
            Some(repeatable) => (Some(repeatable.calls), repeatable.priority),
            None => (None, Priority::Usual),
        };
        let is_repeatable = repeatable.is_some();
        let mut earlier = repeatable.map(|repeatable| repeatable.answers).unwrap_or_default().into_iter();
        let tools = tools_of(ask, false)?;
        let marks = self.marks(&encoded.ids);
        let mut answers = Vec::new();
        for index in 0..ask.n.max(1) {
            let usual = self.model.tokens(encoded.ids.clone());
            let sampling = sampling(&ask.settings, usual.sampling, seed.wrapping_add(index as u64));
            let is_chat = ask.input.is_chat();
            let (stop, strings) = self.stops(&ask.settings.stop, is_chat)?;
            // A prompt that is scored is read before anything is sampled, and little follows it.
            let scored = ask.settings.logprobs.filter(|_| ask.echo);
            let (sampled, hears) = earlier.next().filter(|_| scored.is_none()).unzip();
            let request = Request {
                max_tokens,
                sampling,
                stop,
                special: if is_chat { Special::Markup } else { usual.special },
                bias: ask.settings.bias.clone(),
                logprobs: ask.settings.logprobs,
                prompt_logprobs: scored,
                penalties: ask.settings.penalties,
                marks: marks.clone(),
                keep: ask.keep,
                title: title(&ask.input).filter(|_| !is_repeatable),
                sampled: sampled.unwrap_or_default(),
                priority,
                constraint: grammar.as_ref().map(Grammar::constraint),
                ..usual
            };
            let parser = is_chat.then(|| self.dialect.parser(&encoded.tail, &tools));
            let parser = match calls {
                Some(calls) => parser.map(|parser| parser.with_seed(calls.wrapping_add(index as u64))),
                None => parser,
            };
            let tokenizer = self.model.tokenizer().cloned();
            let reading = Reading { parser, strings, tokenizer, hears, forgets: is_repeatable };
            answers.push(Answer::start(Arc::clone(self), request, reading, ask, live)?);
        }
        Ok(answers)
    }

    /// Forgets the tokens of all conversations. Their next turns use the tokenizer's tokens for their texts.
    pub fn forget(&self) {
        self.transcripts.clear();
    }

    /// Remembers the tokens of a conversation, so that its next turn continues from them.
    pub fn remember(&self, tokens: Vec<u32>) {
        self.transcripts.remember(tokens);
    }

    /// Positions where later prompts may diverge from this one: before the control tokens at its end. These begin the answer's
    /// message, or its thinking, which many templates drop later.
    fn marks(&self, ids: &[u32]) -> Vec<usize> {
        let Some(tokenizer) = self.model.tokenizer() else { return Vec::new() };
        let positions = (1..ids.len()).rev().filter(|&at| tokenizer.is_control(ids[at]));
        let mut marks: Vec<usize> = positions.take(MARKS).collect();
        marks.reverse();
        marks
    }

    /// What ends an answer: tokens and strings for the generation, and strings that count only in the text of an answer, not in
    /// thinking or calls.
    fn stops(&self, strings: &[String], is_chat: bool) -> Result<(StopCondition, StopCondition), ApiError> {
        let wrong = |error: sluice_text::TextError| ApiError::field("stop", error.to_string());
        let end = self.end().iter().copied();
        if !is_chat {
            let none = StopCondition::default();
            return Ok((StopCondition::new(end, strings.to_vec()).map_err(wrong)?, none));
        }
        // A special token is not part of the text, but clients name it as a stop string.
        let special = |text: &String| {
            let id = self.model.tokenizer()?.token_id(text)?;
            self.model.tokenizer()?.is_special(id).then_some(id)
        };
        let tokens = strings.iter().filter_map(special);
        let stop = StopCondition::new(end.chain(tokens), Vec::new()).map_err(wrong)?;
        Ok((stop, StopCondition::new([], strings.to_vec()).map_err(wrong)?))
    }

    /// The grammar for a request: for its text, or for its tool calls.
    fn grammar(&self, ask: &Ask, tail: &str) -> Result<Option<Grammar>, ApiError> {
        let calls = |forced: bool| {
            // A client that names one function wants one call.
            let parallel = ask.parallel && !matches!(ask.choice, ToolChoice::Named(_));
            let tools = tools_of(ask, forced)?;
            Ok::<_, ApiError>(self.dialect.tool_grammar(&tools, &ask.choice, parallel, tail))
        };
        let is_forced = matches!(ask.choice, ToolChoice::Required | ToolChoice::Named(_));
        let form = match (&ask.form, calls(false)?) {
            (TextForm::Free, None) => return Ok(None),
            (TextForm::Free, Some(lark)) => {
                // A forced call follows its schema, unless the schema cannot be enforced and the client did not ask for strictness.
                let strict = if is_forced { calls(true)? } else { None };
                let strict = strict.and_then(|lark| self.compile(&Form::Lark(lark), "tools").ok());
                return strict.map_or_else(|| self.compile(&Form::Lark(lark), "tools"), Ok).map(Some);
            }
            (_, Some(_)) => {
                let message = "tool calls cannot be forced while `response_format` forces a form: choose one";
                return Err(ApiError::field("response_format", message));
            }
            (TextForm::JsonObject, None) => Form::JsonObject,
            (TextForm::JsonSchema(schema), None) => Form::JsonSchema(schema.clone()),
            (TextForm::Regex(regex), None) => Form::Regex(regex.clone()),
            (TextForm::Lark(lark), None) => Form::Lark(lark.clone()),
        };
        let grammar = self.compile(&form, "response_format")?;
        let marker = ask.input.is_chat().then(|| self.dialect.before_answer(tail)).flatten();
        Ok(Some(match marker {
            Some(marker) => grammar.behind(marker),
            None => grammar,
        }))
    }

    /// Compiles a form for this model's vocabulary.
    ///
    /// # Errors
    /// If something in it is not supported, under the name of the requesting field.
    pub fn compile(&self, form: &Form, field: &'static str) -> Result<Grammar, ApiError> {
        let tokenizer = self.tokenizer()?;
        let vocabulary = self.vocabulary.get_or_init(|| {
            let end: Vec<u32> = self.end().iter().copied().collect();
            Vocabulary::new(tokenizer, self.model.vocab_size(), &end).map_err(|error| error.to_string())
        });
        let vocabulary = vocabulary.as_ref().map_err(|error| ApiError::new(Kind::NotImplemented, error.clone()))?;
        Grammar::compile(vocabulary, form).map_err(|error| ApiError::field(field, error.to_string()))
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    i64::try_from(clock::now().as_secs()).unwrap_or(i64::MAX)
}

/// The chat template of a model file: its own, or the one that its family has here.
///
/// # Errors
/// What is wrong with the tokenizer or the template.
pub fn template_of(file: &ModelFile) -> Result<Option<ChatTemplate>, GenerationError> {
    if let Some(template) = ChatTemplate::find(|name| file.metadata().get(name))? {
        return Ok(Some(template));
    }
    let tokenizer = Tokenizer::of(file.metadata())?;
    let has_token = |text: &str| tokenizer.as_ref().is_some_and(|t| t.token_id(text).is_some());
    own_template(&file.spec().family, tokenizer.as_ref(), &has_token)
}

/// The template of a family that publishes none, if this model is one of them.
fn own_template(
    family: &str,
    tokenizer: Option<&Tokenizer>,
    has_token: &dyn Fn(&str) -> bool,
) -> Result<Option<ChatTemplate>, GenerationError> {
    let (Some(tokenizer), Some(source)) = (tokenizer, Dialect::own_template(Some(family), has_token)) else {
        return Ok(None);
    };
    Ok(Some(ChatTemplate::new(source, tokenizer.names().clone())?))
}

/// The tools that are declared to the model: none if it must not call any.
fn declarations(ask: &Ask) -> Vec<Value> {
    match ask.choice {
        ToolChoice::None => Vec::new(),
        _ => ask.tools.iter().map(Tool::declaration).collect(),
    }
}

/// The tools of a request. `strict`: all of them count as strict.
fn tools_of(ask: &Ask, strict: bool) -> Result<Tools, ApiError> {
    let with_strictness = |(tool, mut declaration): (&Tool, Value)| {
        declaration["function"]["strict"] = (strict || tool.strict).into();
        declaration
    };
    let tools = ask.tools.iter().zip(declarations(ask)).map(with_strictness).collect();
    Tools::from_openai(&Value::Array(tools)).map_err(|error| ApiError::field("tools", error.to_string()))
}

/// The request's settings, completed with those that the model's authors recommend.
fn sampling(asked: &Settings, usual: SamplerConfig, seed: u64) -> SamplerConfig {
    // A client that narrows the choice wants sampling, even if the authors recommend the likeliest token.
    let narrowed = asked.top_k.is_some() || asked.top_p.is_some_and(|p| p < 1.0) || asked.min_p.is_some();
    let temperature = match asked.temperature {
        Some(temperature) => temperature,
        None if usual.temperature == 0.0 && narrowed => 1.0,
        None => usual.temperature,
    };
    SamplerConfig {
        temperature,
        top_k: asked.top_k.unwrap_or(usual.top_k),
        // Clients write 0 for the likeliest token alone.
        top_p: asked.top_p.unwrap_or(usual.top_p).max(f32::MIN_POSITIVE),
        min_p: asked.min_p.unwrap_or(usual.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(usual.repetition_penalty),
        seed,
    }
}

/// The title of a stored sequence: the beginning of the user's first message.
fn title(input: &Input) -> Option<String> {
    let text = match input {
        Input::Chat(chat) | Input::After { chat, .. } => {
            let user =
                chat.messages.iter().find(|message| message.fields.get("role").is_some_and(|role| role == "user"));
            user?.fields.get("content")?.as_str()?
        }
        Input::Text(text) => text,
        Input::Tokens(_) => return None,
    };
    let line = text.split_whitespace().take(TITLE).collect::<Vec<_>>().join(" ");
    Some(line.chars().take(TITLE).collect()).filter(|title: &String| !title.is_empty())
}

/// The end of a text, cut at a character boundary.
fn tail_of(text: &str) -> &str {
    let from = (text.len().saturating_sub(TAIL)..text.len()).find(|&at| text.is_char_boundary(at));
    from.map_or("", |from| &text[from..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_cut_between_characters() {
        assert_eq!(tail_of(""), "");
        assert_eq!(tail_of("short"), "short");
        let long = "ä".repeat(200);
        assert_eq!(tail_of(&long), "ä".repeat(128));
        assert_eq!(tail_of(&format!("{long}x")).chars().count(), 128);
    }

    #[test]
    fn the_authors_recommend_and_the_client_decides() {
        let usual = SamplerConfig { temperature: 0.6, top_p: 0.9, ..SamplerConfig::default() };
        let own = sampling(&Settings::default(), usual, 7);
        assert_eq!((own.temperature, own.top_p, own.seed), (0.6, 0.9, 7));
        let greedy = Settings { temperature: Some(0.0), ..Settings::default() };
        assert_eq!(sampling(&greedy, usual, 7).temperature, 0.0);
        let narrowed = Settings { top_p: Some(0.5), ..Settings::default() };
        assert_eq!(sampling(&narrowed, SamplerConfig::default(), 0).temperature, 1.0);
        let all = Settings { top_p: Some(1.0), ..Settings::default() };
        assert_eq!(sampling(&all, SamplerConfig::default(), 0).temperature, 0.0, "1 narrows nothing");
    }
}

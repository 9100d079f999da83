//! What a model's text files make of requests: tokens, grammars and settings. This needs no engine, so requests are checked before a model
//! is loaded for them.

use std::sync::{Arc, OnceLock};

use serde_json::Value;
use sluice_checksum::xxh3_64;
use sluice_dialect::{Dialect, Tools};
use sluice_format::ModelFile;
use sluice_generate::{GenerationError, Priority, Request, Sampled, SamplerConfig, Shape, recommended};
use sluice_grammar::{Form, Grammar, GrammarError, Vocabulary};
use sluice_text::{ChatTemplate, Prompt, RenderOptions, Special, StopCondition, TextFiles, Tokenizer};

use crate::answer::Reading;
use crate::ask::{Ask, Chat, Input, Settings, TextForm, Tool, ToolChoice};
use crate::clock;
use crate::error::{ApiError, Kind};
use crate::transcripts::Transcripts;

/// Places at the end of a prompt at which its sequence is marked.
const MARKS: usize = 2;
/// Most characters of the title of a stored sequence.
const TITLE: usize = 80;
/// Bytes at the end of a prompt that a dialect reads.
const TAIL: usize = 256;

/// Files of a model besides its weights and its tokenizer on which answers depend: templates, and settings that its authors recommend.
const FILES: [&str; 6] = [
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
];

/// How a model reads requests.
pub struct Texts {
    files: TextFiles,
    /// Settings that the model's authors recommend.
    recommended: SamplerConfig,
    /// The model's own template, or that of its family here.
    template: Option<ChatTemplate>,
    dialect: Dialect,
    /// State id and [`digest`] of the model file.
    of: (String, u64),
    vocab_size: usize,
    /// Most tokens of a conversation, …
    context: usize,
    /// … and of any, with all the context that the model takes.
    most_context: usize,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    /// Bytes of the longest token.
    longest_token: OnceLock<usize>,
}

/// A prompt as tokens.
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Its text, if it is a conversation.
    text: Option<String>,
    /// Whether the tokens of earlier answers have replaced the tokenizer's tokens for their texts.
    continued: bool,
}

impl Encoded {
    fn of_tokens(ids: Vec<u32>) -> Self {
        Encoded { ids, text: None, continued: false }
    }

    /// The end of a conversation's text.
    fn tail(&self) -> &str {
        self.text.as_deref().map_or("", tail_of)
    }

    /// Lets the tokens of the conversation's earlier answers replace the tokenizer's tokens for their texts.
    pub fn continue_from(&mut self, transcripts: &Transcripts, tokenizer: &Tokenizer) {
        if let Some(text) = self.text.as_deref().filter(|_| !self.continued) {
            self.ids = transcripts.continue_from(tokenizer, text, std::mem::take(&mut self.ids));
        }
        self.continued = true;
    }
}

/// A request that is right, as far as can be said without its model: its prompt fits, its settings are possible, and its grammar is compiled.
pub struct Prepared {
    /// What has prepared it.
    pub texts: Arc<Texts>,
    /// The prompt.
    pub encoded: Encoded,
    grammar: Option<Grammar>,
    tools: Tools,
}

/// What one of the answers to a request has of its own.
#[derive(Default)]
pub struct Own {
    /// Seed of its random numbers.
    pub seed: u64,
    /// Tokens that an earlier run sampled.
    pub sampled: Vec<Sampled>,
    /// Whether it comes before other requests.
    pub priority: Priority,
    /// Whether its sequence has a title.
    pub titled: bool,
}

impl Texts {
    /// Reads the text files of a model that is opened with `context` tokens. `template`: a chat template to use instead of the model's own.
    ///
    /// # Errors
    /// What is wrong with a file.
    pub fn of(file: &ModelFile, context: usize, template: Option<ChatTemplate>) -> Result<Self, GenerationError> {
        Self::with_files(file, TextFiles::of(file.metadata())?, context, template)
    }

    /// As [`of`](Self::of), where somebody has read the text files already.
    ///
    /// # Errors
    /// What is wrong with the template.
    pub fn with_files(
        file: &ModelFile,
        files: TextFiles,
        context: usize,
        template: Option<ChatTemplate>,
    ) -> Result<Self, GenerationError> {
        let family = file.spec().family.as_str();
        let tokenizer = files.tokenizer.as_ref();
        let has_token = |text: &str| tokenizer.is_some_and(|t| t.token_id(text).is_some());
        let template = match template.or_else(|| files.template.clone()) {
            Some(template) => Some(template),
            None => own_template(family, tokenizer, &has_token)?,
        };
        let source = template.as_ref().map(|template| template.source(true));
        let special = |text: &str| {
            let tokenizer = tokenizer?;
            tokenizer.token_id(text).filter(|&id| tokenizer.is_control(id))
        };
        let dialect = Dialect::detect(Some(family), source, &has_token).with_special_tokens(&special);
        Ok(Texts {
            recommended: recommended(&files.defaults),
            template,
            dialect,
            of: (file.state_id().to_string(), digest(file)),
            vocab_size: file.spec().vocab_size,
            context,
            most_context: file.spec().max_positions,
            vocabulary: OnceLock::new(),
            longest_token: OnceLock::new(),
            files,
        })
    }

    /// The files.
    pub fn files(&self) -> &TextFiles {
        &self.files
    }

    /// Whether they are those of this file, opened with so many tokens of context.
    pub fn are_of(&self, file: &ModelFile, context: usize) -> bool {
        self.context == context && self.of == (file.state_id().to_string(), digest(file))
    }

    /// Most tokens of a conversation.
    pub fn context(&self) -> usize {
        self.context
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
        self.files.tokenizer.as_ref().ok_or_else(|| GenerationError::NoTokenizer.into())
    }

    /// Checks and prepares a request, at this time (seconds since 1970). `forced`: a form that the answer must have instead of the requested one;
    /// `transcripts`: earlier conversations whose tokens it may continue.
    ///
    /// # Errors
    /// If the request is invalid.
    pub fn prepare(
        self: &Arc<Self>,
        ask: &Ask,
        forced: Option<&Form>,
        now: i64,
        transcripts: Option<&Transcripts>,
    ) -> Result<Prepared, ApiError> {
        ask.settings.check()?;
        let mut encoded = self.encode(ask, now)?;
        if let (Some(transcripts), Some(tokenizer)) = (transcripts, &self.files.tokenizer) {
            encoded.continue_from(transcripts, tokenizer);
        }
        let tools = tools_of(ask, false)?;
        let (request, _) = self.request(ask, encoded.ids.clone(), Own::default())?;
        request.check(&self.shape())?;
        let grammar = match forced {
            Some(form) => Some(self.compile(form, "model")?),
            None => self.grammar(ask, encoded.tail())?,
        };
        Ok(Prepared { texts: Arc::clone(self), encoded, grammar, tools })
    }

    /// What a generation has to know about the model, except for how its numbers are made.
    fn shape(&self) -> Shape {
        Shape {
            vocab: self.vocab_size,
            context: self.context,
            most_context: self.most_context,
            tokenizer: self.files.tokenizer.clone(),
            phases: false,
        }
    }

    /// A generation that answers a request with this prompt, without its grammar, and the strings that end only the text of an answer.
    fn request(&self, ask: &Ask, prompt: Vec<u32>, own: Own) -> Result<(Request, StopCondition), ApiError> {
        let is_chat = ask.input.is_chat();
        let (stop, strings) = self.stops(&ask.settings.stop, is_chat)?;
        let room = (self.context + 1).saturating_sub(prompt.len());
        let usual = Request::new(Vec::new(), 0);
        let request = Request {
            max_tokens: ask.settings.max_tokens.unwrap_or(room).min(room),
            sampling: sampling(&ask.settings, self.recommended, own.seed),
            stop,
            special: if is_chat { Special::Markup } else { usual.special },
            bias: ask.settings.bias.clone(),
            logprobs: ask.settings.logprobs,
            // A prompt that is scored is read before anything is sampled, and little follows it.
            prompt_logprobs: ask.scored(),
            penalties: ask.settings.penalties,
            marks: self.marks(&prompt),
            keep: ask.keep,
            title: title(&ask.input).filter(|_| own.titled),
            sampled: own.sampled,
            priority: own.priority,
            prompt,
            ..usual
        };
        Ok((request, strings))
    }

    /// The prompt of a conversation as text, at this time (seconds since 1970).
    ///
    /// # Errors
    /// If the model has no template, or the template refuses the conversation.
    pub fn prompt(&self, chat: &Chat, ask: &Ask, now: i64) -> Result<Prompt, ApiError> {
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
        let Some(tokenizer) = &self.files.tokenizer else { return Ok(()) };
        let longest = *self.longest_token.get_or_init(|| {
            let ids = 0..u32::try_from(self.vocab_size).unwrap_or(u32::MAX);
            ids.filter_map(|id| Some(tokenizer.token_text(id)?.len())).max().unwrap_or(1).max(1)
        });
        // Tokenizers may merge several bytes into one before they search for tokens.
        let fewest = bytes / longest / 4;
        match fewest > self.context {
            true => Err(self.too_long(fewest)),
            false => Ok(()),
        }
    }

    /// The error for a prompt of so many tokens, or more.
    fn too_long(&self, prompt: usize) -> ApiError {
        GenerationError::PromptTooLong { prompt, context: self.context, most: self.most_context }.into()
    }

    /// The tokens of the text to continue, at this time (seconds since 1970).
    ///
    /// # Errors
    /// Like [`Texts::prompt`], and if the tokenizer refuses the text.
    pub fn encode(&self, ask: &Ask, now: i64) -> Result<Encoded, ApiError> {
        // Each message adds tokens of its own.
        let messages = ask.messages();
        if messages > self.context {
            return Err(self.too_long(messages));
        }
        self.check_size(ask.text_bytes())?;
        match &ask.input {
            Input::Chat(chat) => {
                let prompt = self.prompt(chat, ask, now)?;
                let ids = prompt.encode(self.tokenizer()?)?;
                Ok(Encoded { ids, text: Some(prompt.text().to_owned()), continued: false })
            }
            Input::After { before, chat } => {
                let prompt = self.prompt(chat, ask, now)?;
                let tokenizer = self.tokenizer()?;
                let mut ids = prompt.encode(tokenizer)?;
                // A text has only one beginning token.
                if ids.first() == before.first() && ids.first().is_some_and(|&id| tokenizer.is_special(id)) {
                    ids.remove(0);
                }
                ids.splice(..0, before.iter().copied());
                // Its tokens are given, so that no others may take their place.
                Ok(Encoded { ids, text: Some(prompt.text().to_owned()), continued: true })
            }
            Input::Text(text) => Ok(Encoded::of_tokens(self.tokenizer()?.encode(text, true)?)),
            Input::Tokens(ids) => Ok(Encoded::of_tokens(ids.clone())),
        }
    }

    /// Positions where later prompts may diverge from this one: before the control tokens at its end. These begin the answer's
    /// message, or its thinking, which many templates drop later.
    fn marks(&self, ids: &[u32]) -> Vec<usize> {
        let Some(tokenizer) = &self.files.tokenizer else { return Vec::new() };
        let positions = (1..ids.len()).rev().filter(|&at| tokenizer.is_control(ids[at]));
        let mut marks: Vec<usize> = positions.take(MARKS).collect();
        marks.reverse();
        marks
    }

    /// What ends an answer: tokens and strings for the generation, and strings that count only in the text of an answer, not in
    /// thinking or calls.
    fn stops(&self, strings: &[String], is_chat: bool) -> Result<(StopCondition, StopCondition), ApiError> {
        let wrong = |error: sluice_text::TextError| ApiError::field("stop", error.to_string());
        let end = self.files.stop.eos().iter().copied();
        if !is_chat {
            let none = StopCondition::default();
            return Ok((StopCondition::new(end, strings.to_vec()).map_err(wrong)?, none));
        }
        // A special token is not part of the text, but clients name it as a stop string.
        let special = |text: &String| {
            let id = self.files.tokenizer.as_ref()?.token_id(text)?;
            self.files.tokenizer.as_ref()?.is_special(id).then_some(id)
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
            let end: Vec<u32> = self.files.stop.eos().iter().copied().collect();
            Vocabulary::new(tokenizer, self.vocab_size, &end).map_err(|error| error.to_string())
        });
        let vocabulary = vocabulary.as_ref().map_err(|error| ApiError::new(Kind::NotImplemented, error.clone()))?;
        Grammar::compile(vocabulary, form).map_err(|error| match error {
            GrammarError::Busy { .. } => {
                let error = ApiError::new(Kind::Busy, format!("`{field}`: {error}")).code("rate_limit_exceeded");
                ApiError { retry_after: Some(10), ..error }
            }
            error => ApiError::field(field, error.to_string()),
        })
    }
}

impl Prepared {
    /// The generation for answer number `index`, and how its events are read. `calls`: seed of the ids of its calls.
    ///
    /// # Errors
    /// If a stop string is invalid.
    pub fn answer(&self, ask: &Ask, own: Own, calls: Option<u64>) -> Result<(Request, Reading), ApiError> {
        let texts = &self.texts;
        let (request, strings) = texts.request(ask, self.encoded.ids.clone(), own)?;
        let request = Request { constraint: self.grammar.as_ref().map(Grammar::constraint), ..request };
        let parser = ask.input.is_chat().then(|| texts.dialect.parser(self.encoded.tail(), &self.tools));
        let parser = match calls {
            Some(calls) => parser.map(|parser| parser.with_seed(calls)),
            None => parser,
        };
        let tokenizer = texts.files.tokenizer.clone();
        Ok((request, Reading { parser, strings, tokenizer, hears: None, forgets: false }))
    }
}

/// A number that changes with the template and the recommended settings of a model file.
pub fn digest(file: &ModelFile) -> u64 {
    let texts = FILES.map(|name| file.metadata().get(name).map_or(0, xxh3_64));
    texts.into_iter().fold(0_u64, |all, one| all.rotate_left(7) ^ one)
}

/// Seconds since 1970.
pub fn now() -> i64 {
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

//! Conversations in the form that models read: chat templates, and their encoding.
//!
//! A model's template is a program in Jinja, written for Hugging Face's Jinja2. [`ChatTemplate`] runs
//! it with `minijinja`, and this module makes up for the differences that real templates show:
//! Python's string methods and its ways to print values, `tojson` with Hugging Face's options,
//! Jinja2's undefined values, `{% generation %}`. Templates come from strangers, so steps, memory
//! and recursion are bounded.
//!
//! # User text cannot forge control tokens
//!
//! A rendered prompt is one string in which `<|im_start|>` written by the template and `<|im_start|>`
//! typed by a user look the same, and Hugging Face's tokenizers make control tokens of both. Here
//! [`encode_chat`] gives control tokens to the template alone:
//!
//! 1. **Marking.** Before rendering, each character of the user's strings (all contents, names, tool calls, tools and
//!    options, keys included) is exchanged for a stand-in: a code point of Unicode's empty or private planes that
//!    occurs nowhere in the conversation or the template. So marks are part of the characters and survive everything
//!    that a template can do to text: trimming, splitting, slicing, concatenation, JSON. Code that reads characters
//!    reads what the stand-ins stand for: the string methods, filters, `tojson` and the operator `in` find `</think>`
//!    in the user's text as always, and the parts that they return are still marked. White space is not marked.
//!    Neither are the usual roles and words that the template itself contains (`type == 'object'`), unless they could
//!    help to form a control token (`'<' ~ name ~ '>'`).
//! 2. **Separating.** After rendering, stand-ins turn back into characters, and their places are the user's. The text
//!    must equal that of an ordinary rendering. If a template reads text in a way that sees only the marks
//!    (`content[0] == '{'`), the text differs. Then a second rendering marks only characters with which control
//!    tokens begin or end, and parts of control tokens between them. If that differs too, the first result is used:
//!    the user's text stays opaque to such a template, which is safe.
//! 3. **Encoding.** [`Tokenizer::encode_untrusted`] takes the whole text at once, as Hugging Face's `encode` does,
//!    except that an added token is recognised only if none of its characters is the user's. Everything between
//!    control tokens goes through the tokenizer in one piece, so tokens do not depend on who wrote what. A harmless
//!    conversation gets exactly the ids that encoding its rendering gives.
//!
//! The template still sees what the user's text *says*: a template that takes apart an assistant's `<think>…</think>`
//! does so, and writes its own tokens in their place.

mod clock;
mod engine;
mod marks;
mod python;
mod source;
mod strings;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::effective::{self, TOKENIZER_CONFIG};
use super::{TextError, Tokenizer};
use marks::{Marker, Marks};
use source::Source;

/// The file in which older vision models have the template.
const PROCESSOR_TEMPLATE: &str = "chat_template.json";

/// One message of a conversation: an object with `role` and, mostly, `content`. Templates may look
/// at any field (`tool_calls`, `reasoning_content`, `name`, …).
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The fields, in their order.
    pub fields: Map<String, Json>,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), content.into());
        Self { fields }
    }
}

impl From<Map<String, Json>> for Message {
    fn from(fields: Map<String, Json>) -> Self {
        Self { fields }
    }
}

/// The special tokens that templates can name, as text: `bos_token`, `eos_token`, ….
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpecialTokens {
    /// Beginning of the sequence.
    pub bos: Option<String>,
    /// End of the sequence.
    pub eos: Option<String>,
    /// Padding.
    pub pad: Option<String>,
    /// Unknown text.
    pub unk: Option<String>,
    /// All other tokens, by their full names (`sep_token`, `image_token`, …).
    pub others: Map<String, Json>,
}

impl SpecialTokens {
    /// Reads tokenizer_config.json: every field whose name ends in `_token` and whose value is text
    /// (or an object with the text as its `content`).
    ///
    /// # Errors
    /// When the file is not a JSON object.
    pub fn from_config(tokenizer_config: &[u8]) -> Result<Self, TextError> {
        effective::names(&|name: &str| (name == TOKENIZER_CONFIG).then_some(tokenizer_config))
    }

    /// Names a token by the name of its field, such as `bos_token`.
    pub(super) fn set(&mut self, name: &str, text: &str) {
        let text = text.to_owned();
        match name {
            "bos_token" => self.bos = Some(text),
            "eos_token" => self.eos = Some(text),
            "pad_token" => self.pad = Some(text),
            "unk_token" => self.unk = Some(text),
            _ => {
                self.others.insert(name.to_owned(), text.into());
            }
        }
    }

    pub(super) fn of(config: &Map<String, Json>) -> Self {
        let mut tokens = Self::default();
        for (name, value) in config {
            let Some(text) = value.as_str().or_else(|| value["content"].as_str()) else {
                continue;
            };
            if name.ends_with("_token") {
                tokens.set(name, text);
            }
        }
        tokens
    }

    fn context(&self) -> impl Iterator<Item = (&str, &str)> {
        let named =
            [("bos_token", &self.bos), ("eos_token", &self.eos), ("pad_token", &self.pad), ("unk_token", &self.unk)];
        let named = named.into_iter().filter_map(|(name, text)| Some((name, text.as_deref()?)));
        named.chain(self.others.iter().filter_map(|(name, text)| Some((name.as_str(), text.as_str()?))))
    }
}

/// Everything besides the messages on which a rendering depends.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// Whether to end with the start of the assistant's answer.
    pub add_generation_prompt: bool,
    /// The tools that the model may call: a list of JSON schemas.
    pub tools: Option<Json>,
    /// Variables that this model's template knows (`enable_thinking`, `reasoning_effort`, …).
    pub extra: Map<String, Json>,
    /// The moment for templates that ask for it: seconds since 1970 on the user's own clock.
    pub now: i64,
}

/// A model's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    default: Arc<Source>,
    /// Another template, used when there are tools.
    tool_use: Option<Arc<Source>>,
    tokens: SpecialTokens,
}

impl ChatTemplate {
    /// Reads a template and checks its syntax.
    ///
    /// # Errors
    /// When it is too large or not a template.
    pub fn new(source: &str, tokens: SpecialTokens) -> Result<Self, TextError> {
        Ok(Self { default: Arc::new(parse(source)?), tool_use: None, tokens })
    }

    /// Finds a model's template among its files: `chat_template.jinja` if there is one, otherwise the template in
    /// `tokenizer_config.json`, otherwise `chat_template.json`. The special tokens come from `tokenizer_config.json` or
    /// `special_tokens_map.json`. `file` gives a file's bytes. `None` if the model has no template.
    ///
    /// Of several templates, the one called `default` is used, or `tool_use` when there are tools. A single template is used
    /// whatever it is called.
    ///
    /// # Errors
    /// When a file does not have the content that it should have.
    pub fn find<'f>(file: impl Fn(&str) -> Option<&'f [u8]>) -> Result<Option<Self>, TextError> {
        let tokens = effective::names(&file)?;
        let config = effective::object(&file, TOKENIZER_CONFIG)?.unwrap_or_default();
        if let Some(bytes) = file("chat_template.jinja") {
            let mut template = Self::new(utf8(bytes)?, tokens)?;
            if let Some(bytes) = file("additional_chat_templates/tool_use.jinja") {
                template.tool_use = Some(Arc::new(parse(utf8(bytes)?)?));
            }
            return Ok(Some(template));
        }
        // Processors of images and sound keep the template here.
        let processor = effective::object(&file, PROCESSOR_TEMPLATE)?.unwrap_or_default();
        let found = |fields: &'_ Map<String, Json>| fields.get("chat_template").filter(|t| !t.is_null()).cloned();
        let (place, template) = match (found(&config), found(&processor)) {
            (Some(template), _) => (TOKENIZER_CONFIG, Some(template)),
            (None, template) => (PROCESSOR_TEMPLATE, template),
        };
        let (default, tool_use) = match &template {
            None | Some(Json::Null) => return Ok(None),
            Some(Json::String(source)) => (Some(source.as_str()), None),
            Some(Json::Array(list)) => {
                let named = |name: &str| {
                    let entry = list.iter().find(|entry| entry["name"] == name);
                    entry.and_then(|entry| entry["template"].as_str())
                };
                let only = || list.first().filter(|_| list.len() == 1).and_then(|entry| entry["template"].as_str());
                (named("default").or_else(only), named("tool_use"))
            }
            Some(_) => (None, None),
        };
        let Some(source) = default.or(tool_use) else {
            return Err(TextError::BadConfigField {
                file: place,
                field: "chat_template",
                expected: "a template, or a list of templates with one called `default`",
                found: "something else".into(),
            });
        };
        let mut template = Self::new(source, tokens)?;
        if let Some(source) = tool_use {
            template.tool_use = Some(Arc::new(parse(source)?));
        }
        Ok(Some(template))
    }

    /// The conversation as text, exactly as Hugging Face's `apply_chat_template` renders it. To give
    /// it to a model, use [`encode_chat`]: this text does not show who wrote what.
    ///
    /// # Errors
    /// When the template fails, refuses the conversation, or takes too many steps.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TextError> {
        let job = Job::new(self, messages, options);
        job.render(&Arc::default(), &[], false)
    }

    /// The conversation as a prompt, from which [`Prompt::encode`] makes token ids.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<Prompt, TextError> {
        let (text, untrusted) = self.render_untrusted(tokenizer.controls(), messages, options)?;
        Ok(Prompt { text, untrusted })
    }

    /// The template's source in Jinja: the one for tools, if there is one and `tools` is true.
    pub fn source(&self, tools: bool) -> &str {
        match &self.tool_use {
            Some(tool_use) if tools => &tool_use.text,
            _ => &self.default.text,
        }
    }

    /// The conversation as text, and the parts of it that the template did not write.
    fn render_untrusted(
        &self,
        controls: &[String],
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<(String, Vec<Range<usize>>), TextError> {
        let job = Job::new(self, messages, options);
        let ordinary = job.render(&Arc::default(), &[], false)?;
        let marks = Arc::new(job.marks()?);
        let strict = job.render(&marks, controls, false).map(|text| marks.separate(&text));
        if strict.as_ref().is_ok_and(|(text, _)| *text == ordinary) {
            return strict;
        }
        let relaxed = job.render(&marks, controls, true).map(|text| marks.separate(&text));
        match relaxed {
            Ok(relaxed) if relaxed.0 == ordinary || strict.is_err() => Ok(relaxed),
            _ => strict,
        }
    }
}

/// The token ids of a conversation. The template's control tokens are recognised, and nothing in the user's text is
/// taken for one; the [module](self) explains how. No tokens are added around the whole text, because templates write
/// their own.
///
/// # Errors
/// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: &RenderOptions,
) -> Result<Vec<u32>, TextError> {
    template.prompt(tokenizer, messages, options)?.encode(tokenizer)
}

/// A conversation as text that remembers who wrote which part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    /// Byte ranges that the template did not write, in ascending order.
    untrusted: Vec<Range<usize>>,
}

impl Prompt {
    /// The whole text, as the template rendered it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The parts that the template did not write: byte ranges in ascending order.
    pub fn untrusted(&self) -> &[Range<usize>] {
        &self.untrusted
    }

    /// Its token ids. Nothing outside the template's own text becomes a control token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        tokenizer.encode_untrusted(&self.text, &self.untrusted)
    }

    /// Cuts the text after the last occurrence of `content`, so that a model continues the message with that content. False if the
    /// text does not contain it, because the template has changed it.
    pub fn end_with(&mut self, content: &str) -> bool {
        let content = content.trim_end();
        let Some(at) = self.text.rfind(content) else { return false };
        let end = at + content.len();
        self.text.truncate(end);
        self.untrusted.retain_mut(|range| {
            range.end = range.end.min(end);
            range.start < range.end
        });
        true
    }
}

/// One conversation to render, perhaps several times.
struct Job<'a> {
    template: &'a ChatTemplate,
    source: &'a Source,
    messages: Vec<Map<String, Json>>,
    options: &'a RenderOptions,
}

impl<'a> Job<'a> {
    fn new(template: &'a ChatTemplate, messages: &[Message], options: &'a RenderOptions) -> Self {
        let has_tools = options.tools.as_ref().is_some_and(|t| !t.is_null());
        let source = match &template.tool_use {
            Some(tool_use) if has_tools => tool_use,
            _ => &template.default,
        };
        Self { template, source, messages: messages.iter().map(with_reasoning_aliases).collect(), options }
    }

    /// Every string that does not come from the template.
    fn user_strings(&self) -> Vec<&str> {
        let mut strings = Vec::new();
        self.messages.iter().for_each(|m| marks::strings_of(m, &mut strings));
        marks::strings_of(&self.options.extra, &mut strings);
        if let Some(tools) = &self.options.tools {
            marks::strings(tools, &mut strings);
        }
        strings
    }

    fn marks(&self) -> Result<Marks, TextError> {
        let mut own = self.source.text.clone();
        self.template.tokens.context().for_each(|(_, text)| own.push_str(text));
        Marks::new(&self.user_strings(), &own)
    }

    fn render(&self, marks: &Arc<Marks>, controls: &[String], relaxed: bool) -> Result<String, TextError> {
        let marker = Marker::new(marks, self.source, controls, relaxed);
        let options = self.options;
        let mut context: Vec<(String, Value)> = Vec::new();
        for (name, text) in self.template.tokens.context() {
            context.push((name.to_owned(), Value::from(text)));
        }
        for (name, value) in &options.extra {
            context.push((name.clone(), marker.value(value)));
        }
        let none = Json::Null;
        let tools = marker.value(options.tools.as_ref().unwrap_or(&none));
        context.push(("tools".into(), tools));
        if !options.extra.contains_key("documents") {
            context.push(("documents".into(), Value::from(())));
        }
        context.push(("messages".into(), marker.messages(&self.messages)));
        let prompt = Value::from(options.add_generation_prompt);
        context.push(("add_generation_prompt".into(), prompt));

        let strings = self.user_strings();
        // A stand-in takes four bytes.
        let bytes = strings.iter().map(|s| s.len() * 4 + 64).sum();
        let env = engine::engine(marks, options.now, self.messages.len(), bytes);
        engine::render(&env, self.source, Value::from_pairs(context))
    }
}

/// A message with its reasoning under every name that templates use for it, as transformers does since version 5.
fn with_reasoning_aliases(message: &Message) -> Map<String, Json> {
    let given = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| message.fields.get(*name).filter(|v| !v.is_null()));
    let Some(reasoning) = given else {
        return message.fields.clone();
    };
    let mut fields = Map::new();
    // In this order, because templates may print whole messages.
    fields.insert("thinking".into(), reasoning.clone());
    fields.extend(message.fields.clone());
    fields.insert("reasoning_content".into(), reasoning.clone());
    fields
}

/// Reads a template, and checks that the engine accepts it.
fn parse(source: &str) -> Result<Source, TextError> {
    let source = Source::read(source)?;
    let env = engine::engine(&Arc::default(), 0, 0, 0);
    engine::check(&env, &source)?;
    Ok(source)
}

fn utf8(bytes: &[u8]) -> Result<&str, TextError> {
    std::str::from_utf8(bytes).map_err(|e| TextError::ChatTemplate { line: None, reason: e.to_string() })
}

//! The family of a model.

use serde_json::{Map, Value};
use sluice_text::Message;

use crate::error::DialectError;
use crate::messages::{self, Wants};
use crate::parser::AnswerParser;
use crate::syntax::{self, Calls, Syntax};
use crate::tools::{ToolChoice, Tools};
use crate::{grammar, templates};

/// How a model's family writes, as far as its own files show. Cheap to clone, usable from many threads.
#[derive(Debug, Clone)]
pub struct Dialect {
    syntax: &'static Syntax,
    wants: Wants,
    /// Markers that are special tokens, and their ids.
    special: Vec<(&'static str, u32)>,
    /// Whether the template has a variable for how hard to think.
    knows_effort: bool,
}

impl Dialect {
    /// Examines the source of the chat template, `model_type` of config.json, and the vocabulary. The template counts most, because
    /// it shows what the model was trained to write. A model about which nothing is known is assumed to write like Hermes and
    /// Qwen3, because most do.
    ///
    /// Renders a few conversations with the template, to find out what it accepts and what it leaves out, which takes some
    /// milliseconds.
    pub fn detect(model_type: Option<&str>, template: Option<&str>, has_token: &dyn Fn(&str) -> bool) -> Self {
        let syntax = detect(model_type.unwrap_or_default(), template, has_token);
        let knows_effort = template.is_none_or(|template| template.contains("reasoning_effort"));
        Self { syntax, wants: Wants::of(syntax, template), special: Vec::new(), knows_effort }
    }

    /// Sets which markers are special tokens, by their ids. Grammars have to name such tokens by id, because no text matches them.
    #[must_use]
    pub fn with_special_tokens(mut self, id: &dyn Fn(&str) -> Option<u32>) -> Self {
        let markers = grammar::markers(self.syntax).into_iter();
        self.special = markers.filter_map(|marker| Some((marker, id(marker)?))).collect();
        self
    }

    /// The family's name, for logs and messages.
    pub fn name(&self) -> &'static str {
        self.syntax.name
    }

    /// A parser for one answer. `prompt_tail` is the end of the rendered prompt, which may have opened thinking
    /// (`<think>\n`); a hundred characters are enough. Without tools, nothing in the answer is a call.
    pub fn parser(&self, prompt_tail: &str, tools: &Tools) -> AnswerParser {
        AnswerParser::new(self.syntax, prompt_tail, tools)
    }

    /// Messages in the form of OpenAI's chat completions, converted to the form that the template of this family takes.
    ///
    /// * Lists of text parts become one text, joined by line breaks.
    /// * `arguments` of calls become objects if templates iterate over them. Anything that is not a JSON object becomes
    ///   `{"arguments": …}`, as in DeepSeek's own encoder.
    /// * `developer` becomes `system`, except for gpt-oss. If templates take one system message, all become one. If they take none,
    ///   it becomes the beginning of the first message of the user. If users and the model must take turns, consecutive messages of
    ///   a user become one.
    /// * If templates take one call per message, each call becomes a message, followed by its result. Results are always in the
    ///   order of their calls.
    /// * If templates take results in the message of their calls (`tool_responses`), they are moved there, together with the answer
    ///   that follows: the model continues in the same turn.
    /// * If templates leave out the text of messages with calls, it becomes a message of its own. If they do not take that either,
    ///   it becomes the beginning of the model's next text, and it is left out until there is one.
    /// * Ids of calls get the form that the family writes (Kimi, Mistral).
    ///
    /// # Errors
    /// If a message is malformed, is not text, or cannot be expressed.
    pub fn messages(&self, messages: Vec<Message>) -> Result<Vec<Message>, DialectError> {
        messages::convert(self.syntax, self.wants, messages)
    }

    /// Variables for the template: whether to think, and how hard (`none`, `minimal`, `low`, `medium`, `high`, `xhigh`, `max`). An
    /// effort also decides whether to think if `thinking` does not; any other effort has no effect.
    pub fn template_options(&self, thinking: Option<bool>, effort: Option<&str>) -> Map<String, Value> {
        let effort = effort.filter(|effort| EFFORTS.contains(effort));
        let thinking = thinking.or_else(|| Some(!matches!(effort?, "none")));
        let mut options = Map::new();
        if let Calls::Harmony = self.syntax.calls {
            let effort = match (thinking, effort) {
                (Some(false), _) | (_, Some("none" | "minimal")) => Some("low"),
                (_, Some("xhigh" | "max")) => Some("high"),
                (_, other) => other,
            };
            options.extend(effort.map(|effort| ("reasoning_effort".to_owned(), effort.into())));
            return options;
        }
        if let Some(thinking) = thinking {
            options.insert("enable_thinking".into(), thinking.into());
            options.insert("thinking".into(), thinking.into());
            if self.syntax.name == "minimax-m3" {
                options.insert("thinking_mode".into(), if thinking { "enabled" } else { "disabled" }.into());
            }
        }
        let is_mistral = matches!(self.syntax.name, "mistral" | "mistral-list");
        let is_hunyuan = matches!(self.syntax.name, "hunyuan-3" | "hunyuan-3-plain");
        let effort = match (effort, thinking) {
            _ if !self.knows_effort => None,
            // This family knows three values.
            (_, Some(false)) if is_hunyuan => Some("no_think"),
            (Some("minimal" | "low"), Some(true)) if is_hunyuan => Some("low"),
            (_, Some(true)) if is_hunyuan => Some("high"),
            (_, Some(thinking)) if is_mistral => Some(if thinking { "high" } else { "none" }),
            (Some("xhigh" | "max"), _) => Some("max"),
            (Some(effort), Some(true)) => Some(effort),
            _ => None,
        };
        options.extend(effort.map(|effort| ("reasoning_effort".to_owned(), effort.into())));
        options
    }

    /// A grammar in llguidance's dialect of Lark that lets the model answer only as `choice` allows; it includes thinking before
    /// calls. `None` if nothing needs to be constrained: the model decides, and no tool is strict.
    ///
    /// Markers that are special tokens are written as their ids ([`with_special_tokens`](Self::with_special_tokens)), all others as
    /// text.
    pub fn tool_grammar(
        &self,
        tools: &Tools,
        choice: &ToolChoice,
        parallel: bool,
        prompt_tail: &str,
    ) -> Option<String> {
        grammar::tool_grammar(self.syntax, &self.special, tools, (choice, parallel), prompt_tail)
    }

    /// What the model writes before the text of its answer, if the prompt makes it think first or the family marks answers. A
    /// requested form begins after it.
    pub fn before_answer(&self, prompt_tail: &str) -> Option<&'static str> {
        match self.syntax.calls {
            Calls::Harmony => Some("<|channel|>final<|message|>"),
            _ if self.syntax.answer.is_some() => {
                let open = self.syntax.answer.map_or("", |answer| answer.open);
                (!prompt_tail.trim_end().ends_with(open)).then_some("<answer>\n")
            }
            _ => prompt_tail.trim_end().ends_with(self.syntax.think.open).then_some(self.syntax.think.close),
        }
    }

    /// A template for models whose published checkpoint has none: it writes what the published encoder writes, as Jinja for
    /// [`sluice_text::ChatTemplate`].
    pub fn own_template(model_type: Option<&str>, has_token: &dyn Fn(&str) -> bool) -> Option<&'static str> {
        templates::own(detect(model_type.unwrap_or_default(), None, has_token))
    }
}

/// How hard a model can be asked to think.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

fn detect(model_type: &str, template: Option<&str>, has_token: &dyn Fn(&str) -> bool) -> &'static Syntax {
    let source = template.unwrap_or_default();
    by_template(source, has_token)
        .or_else(|| by_type(model_type))
        .or_else(|| by_tokens(has_token))
        .unwrap_or(&syntax::HERMES)
}

/// The family according to what the template writes itself, or tells the model to write.
fn by_template(source: &str, has_token: &dyn Fn(&str) -> bool) -> Option<&'static Syntax> {
    let has = |text: &str| source.contains(text);
    let family = match () {
        () if has("<|channel|>") && has("<|message|>") => &syntax::HARMONY,
        () if has("<|tool_call>call:") => &syntax::GEMMA_4,
        () if has(syntax::M3) => &syntax::MINIMAX_M3,
        () if has("<minimax:tool_call>") => &syntax::MINIMAX_M2,
        () if has("DSML｜ calls") || has("DSML｜ invoke") => &syntax::DEEPSEEK_V41,
        () if has("DSML｜") && has("function_calls") => &syntax::DEEPSEEK_V32,
        () if has("DSML｜") => &syntax::DEEPSEEK_V4,
        () if has("<｜tool▁calls▁begin｜>") && has("```json") => &syntax::DEEPSEEK_V3,
        () if has("<｜tool▁calls▁begin｜>") => &syntax::DEEPSEEK_V31,
        () if has("<|tool_calls_section_begin|>") => &syntax::KIMI_K2,
        // It makes its markers from a suffix: `'<tool_sep{}>'.format(HYTK)`.
        () if has("<tool_sep") && has(":opensource") => &syntax::HUNYUAN_3,
        () if has("<tool_sep") => &syntax::HUNYUAN_3_PLAIN,
        () if has("<arg_key>") && (has("'\\n<tool_call>'") || has("{function-name}\n")) => &syntax::GLM_45,
        () if has("<arg_key>") => &syntax::GLM_47,
        () if has("<function=") && has("<parameter=") => &syntax::QWEN_XML,
        () if has("<tool_calls>") && has("<tool_response>") => &syntax::HUNYUAN,
        () if has("<tool_call>") => &syntax::HERMES,
        () if has("[TOOL_CALLS]") && has("[ARGS]") => &syntax::MISTRAL,
        () if has("[TOOL_CALLS]") => &syntax::MISTRAL_LIST,
        () if has("<|start_of_role|>") && has("<|tool_call|>") => &syntax::GRANITE,
        () if has("<|python_start|>") || has("<|header_start|>") => &syntax::LLAMA_4,
        () if has("<|start_header_id|>") && has("\"parameters\"") => &syntax::LLAMA_3,
        () if has("<|python_tag|>") && has_token("<|python_tag|>") => &syntax::LLAMA_3,
        () => return None,
    };
    Some(family)
}

/// The family according to config.json, for models without a template.
fn by_type(model_type: &str) -> Option<&'static Syntax> {
    let family = match model_type {
        "gpt_oss" => &syntax::HARMONY,
        "deepseek_v32" => &syntax::DEEPSEEK_V32,
        "deepseek_v4" => &syntax::DEEPSEEK_V4,
        "deepseek_v41" => &syntax::DEEPSEEK_V41,
        "minimax_m2" => &syntax::MINIMAX_M2,
        "minimax_m3" | "minimax_m3_vl" | "minimax_m3_vl_text" => &syntax::MINIMAX_M3,
        "kimi_k2" | "kimi_k25" | "kimi_linear" => &syntax::KIMI_K2,
        "glm4_moe" => &syntax::GLM_45,
        "glm4_moe_lite" | "glm_moe_dsa" => &syntax::GLM_47,
        "qwen3_5_moe" | "qwen3_5" => &syntax::QWEN_XML,
        "llama4" | "llama4_text" => &syntax::LLAMA_4,
        "granitemoe" => &syntax::GRANITE,
        "mimo_v2_flash" => &syntax::QWEN_XML,
        "hunyuan_v1_moe" => &syntax::HUNYUAN,
        "hy_v3" => &syntax::HUNYUAN_3,
        "gemma4" | "gemma4_text" => &syntax::GEMMA_4,
        _ => return None,
    };
    Some(family)
}

/// The family according to the tokens in the vocabulary.
fn by_tokens(has: &dyn Fn(&str) -> bool) -> Option<&'static Syntax> {
    let family = match () {
        () if has("<|channel|>") && has("<|message|>") && has("<|call|>") => &syntax::HARMONY,
        () if has(syntax::M3) => &syntax::MINIMAX_M3,
        () if has("<minimax:tool_call>") => &syntax::MINIMAX_M2,
        () if has("<|tool_calls_section_begin|>") => &syntax::KIMI_K2,
        () if has("｜DSML｜") => &syntax::DEEPSEEK_V32,
        () if has("<｜tool▁calls▁begin｜>") => &syntax::DEEPSEEK_V31,
        () if has("<tool_sep:opensource>") => &syntax::HUNYUAN_3,
        () if has("<tool_sep>") => &syntax::HUNYUAN_3_PLAIN,
        () if has("<arg_key>") => &syntax::GLM_47,
        () if has("<|tool_call>") && has("<tool_call|>") => &syntax::GEMMA_4,
        () if has("[TOOL_CALLS]") && has("[ARGS]") => &syntax::MISTRAL,
        () if has("[TOOL_CALLS]") => &syntax::MISTRAL_LIST,
        () if has("<|start_of_role|>") && has("<|tool_call|>") => &syntax::GRANITE,
        () if has("<|python_start|>") => &syntax::LLAMA_4,
        () if has("<|python_tag|>") => &syntax::LLAMA_3,
        () => return None,
    };
    Some(family)
}

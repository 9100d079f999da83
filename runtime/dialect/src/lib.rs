//! Dialects: how families of models write thinking and tool calls.
//!
//! Models agree on nothing here: Qwen writes calls as JSON in `<tool_call>`, GLM as `<arg_key>` and `<arg_value>`, DeepSeek with
//! control tokens or in its own markup, gpt-oss as messages to recipients. A [`Dialect`] knows the format of one family:
//!
//! * [`Dialect::detect`] finds the family from the model's own files,
//! * [`Dialect::messages`] and [`Dialect::template_options`] give a chat template the input that it takes,
//! * [`Dialect::parser`] takes an answer apart while it arrives: thinking, text, calls and their arguments,
//! * [`Dialect::tool_grammar`] restricts the model to the calls that a request asks for,
//! * [`Dialect::own_template`] is a template for checkpoints that have none.
//!
//! # Whose text is parsed
//!
//! Only text that the model itself wrote in this answer is parsed. Prompts are never searched for calls. Only one thing in a prompt
//! counts: whether it ends with the marker that opens thinking, which the template writes.
//!
//! # Families
//!
//! | name | models | calls |
//! |---|---|---|
//! | `hermes` | Qwen3, Qwen3-Next, Hermes, all others | `<tool_call>{"name": …, "arguments": …}</tool_call>` |
//! | `qwen-xml` | Qwen3-Coder, Qwen3.5 and later | `<tool_call><function=…><parameter=…>` |
//! | `deepseek-v3`, `deepseek-v3.1` | DeepSeek V3 and R1; V3.1 | `<｜tool▁call▁begin｜>…<｜tool▁sep｜>…`, in V3 with a fence |
//! | `deepseek-v3.2`, `-v4`, `-v4.1` | DeepSeek V3.2, V4, V4.1 | DSML: `<｜DSML｜invoke name="…">` |
//! | `kimi-k2` | Kimi K2, K2-Thinking, K2.5 | `<|tool_call_begin|>functions.…:0<|tool_call_argument_begin|>…` |
//! | `glm-4.5`, `glm-4.7` | GLM-4.5 and 4.6; 4.7 and 5 | `<tool_call>…<arg_key>…</arg_key><arg_value>…</arg_value>` |
//! | `harmony` | gpt-oss | `<|channel|>commentary to=functions.… <|constrain|>json<|message|>…` |
//! | `minimax-m2`, `minimax-m3` | MiniMax M2 to M2.7; M3 | `<invoke name="…"><parameter name="…">`; nested tags |
//! | `mistral`, `mistral-list` | Mistral and Magistral | `[TOOL_CALLS]…[ARGS]…`; `[TOOL_CALLS] [{"name": …}]` |
//! | `granite` | Granite 3 | `<|tool_call|>[{"name": …, "arguments": …}]` |
//! | `llama-3`, `llama-4` | Llama | `{"name": …, "parameters": …}`; `[name(parameter=value)]` |
//!
//! # Why not one of the parser crates
//!
//! These were examined in November 2026: `tool-parser` 1.10 and `reasoning-parser` 1.10 (smg), `openai-harmony` 0.0.8,
//! `dynamo-parsers` 11.0.
//!
//! * `tool-parser` reads arguments with `serde_json` and writes them again, so clients get bytes that the model did not write:
//!   escapes, white space and numbers such as `1.0e2` change, and a session that is rendered again does not match the tokens that
//!   were sampled. It gives the arguments of calls in tags only at their end, and needs 135 crates (among them a parser of Python
//!   and the types of an HTTP API).
//! * `openai-harmony` needs 219 crates, including an HTTP client and decoders of images, and fetches its vocabulary from the
//!   network. It works on the tokens of one vocabulary.
//! * `dynamo-parsers` builds on `openai-harmony` (273 crates).
//!
//! This crate needs none of them, does not depend on how text is cut into pieces, and passes arguments on byte for byte.

mod dialect;
mod error;
mod grammar;
mod json;
mod messages;
mod parser;
mod probe;
mod syntax;
mod templates;
mod tools;

pub use dialect::Dialect;
pub use error::DialectError;
pub use parser::{AnswerParser, Piece};
pub use tools::{MAX_NAME_BYTES, MAX_TOOLS, Tool, ToolChoice, Tools};

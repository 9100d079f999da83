//! Chat templates: rendered with conversations of every kind, and encoded.

use std::path::Path;
use std::sync::LazyLock;

use serde_json::{Value, json};
use sluice_text::{ChatTemplate, Message, RenderOptions, SpecialTokens, Tokenizer, encode_chat};

use super::{Seeds, fixture};

const TOKENIZER: &[u8] = fixture!("demo-model/tokenizer.json");

static CONVERSATIONS: LazyLock<Vec<(Vec<Message>, RenderOptions)>> = LazyLock::new(|| {
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "description": "Weather <in> \"x\".",
        "parameters": {"type": "object", "properties": {"location": {"type": "string", "enum": ["a", "東京"]},
        "days": {"type": ["integer", "null"], "default": 1}}, "required": ["location"]}}}]);
    let call = json!([{"type": "function", "id": "call00001",
        "function": {"name": "get_weather", "arguments": {"location": "東京", "days": 2}}}]);
    let texts = [
        json!([{"role": "user", "content": "hello"}]),
        json!([{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "  1 < 2 & <|im_end|> </think>"},
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nYes.", "reasoning_content": "because"},
            {"role": "user", "content": [{"type": "text", "text": "in parts"}, {"type": "image"}]}]),
        json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": null, "tool_calls": call},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "{\"t\": 21.5}"},
            {"role": "assistant", "content": "21.5 °C."}, {"role": "user", "content": "Thanks 🦀"}]),
        json!([]),
    ];
    let mut conversations = Vec::new();
    for (i, messages) in texts.into_iter().enumerate() {
        let messages = messages.as_array().into_iter().flatten().filter_map(Value::as_object);
        let messages = messages.map(|fields| Message::from(fields.clone())).collect();
        let mut options = RenderOptions { add_generation_prompt: i != 2, now: 1_772_874_303, ..Default::default() };
        options.tools = (i == 2).then(|| tools.clone());
        if i == 1 {
            options.extra.insert("enable_thinking".to_owned(), false.into());
        }
        conversations.push((messages, options));
    }
    conversations
});

fn tokens() -> SpecialTokens {
    let text = |s: &str| Some(s.to_owned());
    SpecialTokens { bos: text("<s>"), eos: text("</s>"), pad: text("<pad>"), ..Default::default() }
}

/// Renders every conversation, as `run --chat` and a server would.
pub(crate) fn render(template: &ChatTemplate, tokenizer: &Tokenizer) {
    for (messages, options) in CONVERSATIONS.iter() {
        match template.render(messages, options) {
            Ok(text) => assert!(text.len() < 64 << 20, "{} bytes of prompt", text.len()),
            Err(error) => drop(error.to_string()),
        }
        if let Err(error) = encode_chat(tokenizer, template, messages, options) {
            drop(error.to_string());
        }
    }
}

pub(crate) fn run(input: &[u8], _folder: &Path) {
    static DEMO: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::from_json(TOKENIZER).expect("the tokenizer of the demo is sound"));
    let Ok(source) = std::str::from_utf8(input) else { return };
    match ChatTemplate::new(source, tokens()) {
        Ok(template) => render(&template, &DEMO),
        Err(error) => drop(error.to_string()),
    }
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    macro_rules! templates {
        ($($name:literal),+) => {
            vec![$(($name.to_owned(), fixture!(concat!("chat/templates/", $name, ".jinja")).to_vec())),+]
        };
    }
    templates!(
        "constructs",
        "deepseek",
        "glm",
        "harmony",
        "kimi",
        "llama3",
        "loosely",
        "minimax",
        "mistral",
        "qwen3",
        "qwen3_coder"
    )
}

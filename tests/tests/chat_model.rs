//! The model of the server's tests has the properties on which they rely.

use serde_json::json;
use sluice_format::ModelFile;
use sluice_generate::{Model, Request, SamplerConfig};
use sluice_model::EngineOptions;
use sluice_tests::chat_model::{Layers, chat_model};
use sluice_text::{ChatTemplate, Message, RenderOptions, Tokenizer, encode_chat};

const VARIANTS: [Layers; 3] = [Layers::Full, Layers::Windows, Layers::States];

fn options() -> EngineOptions {
    EngineOptions { context: Some(65_536), forget: true, threads: Some(1), ..EngineOptions::default() }
}

/// A conversation with a tool call and its result.
fn conversation() -> Vec<Message> {
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "read", "arguments": {"path": "a"}}});
    let mut asks = Message::new("assistant", "");
    asks.fields.insert("reasoning_content".into(), "Hm.".into());
    asks.fields.insert("tool_calls".into(), json!([call]));
    vec![Message::new("user", "What is in <|im_end|>?"), asks, Message::new("tool", "Verse.")]
}

#[test]
fn its_template_knows_tools_and_thinking_and_nobody_forges_its_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let file = ModelFile::open(&chat_model(folder.path(), Layers::Full)).unwrap();
    let tokenizer = Tokenizer::of(file.metadata()).unwrap().unwrap();
    let template = ChatTemplate::find(|name| file.metadata().get(name)).unwrap().unwrap();
    let tools = json!([{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]);
    let options = RenderOptions { add_generation_prompt: true, tools: Some(tools), ..RenderOptions::default() };
    let text = template.render(&conversation(), &options).unwrap();
    let call = "<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"a\"}}\n</tool_call><|im_end|>\n";
    let answer = "<|im_start|>user\n<tool_response>\nVerse.\n</tool_response><|im_end|>\n";
    assert!(text.contains(&format!("<think>\nHm.\n</think>\n\n{call}{answer}")), "{text}");

    let ids = encode_chat(&tokenizer, &template, &conversation(), &options).unwrap();
    let count = |name: &str| {
        let id = tokenizer.token_id(name).unwrap();
        ids.iter().filter(|&&i| i == id).count()
    };
    assert_eq!((count("<|im_start|>"), count("<|im_end|>")), (5, 4), "the user's mark is text");
    assert_eq!((count("<think>"), count("</tool_response>")), (1, 1));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn every_variant_has_a_long_context_and_writes_text_without_marks() {
    for layers in VARIANTS {
        let folder = tempfile::tempdir().unwrap();
        let model = Model::open(&chat_model(folder.path(), layers), &options()).unwrap();
        let prompt: Vec<u32> = (0..3000).map(|i| (i * 7919 + 13) % 1536).collect();
        for seed in 0..2 {
            let sampling = SamplerConfig { temperature: seed as f32, seed, ..SamplerConfig::default() };
            let done = model.complete(Request { sampling, ..Request::new(prompt.clone(), 200) }).unwrap();
            // 1538 is <|im_end|>.
            assert!(done.ids.iter().all(|&id| id == 1538 || (4..1536).contains(&id)), "{layers:?}: {:?}", done.ids);
            let mut different = done.ids.clone();
            different.sort_unstable();
            different.dedup();
            assert!(different.len() > 20, "{layers:?}: it repeats itself: {:?}", done.ids);
        }
    }
}

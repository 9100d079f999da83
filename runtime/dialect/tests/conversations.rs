//! Conversations through templates and back: parsing the assistant's part of a rendered conversation gives its calls.
//!
//! The templates mimic those of the families (see tests/fixtures/chat/README.md); the last three are this crate's own.

use serde_json::{Value, json};
use sluice_dialect::{Dialect, DialectError, Piece, Tools};
use sluice_text::{ChatTemplate, Message, RenderOptions, SpecialTokens};

macro_rules! template {
    ($name:literal) => {
        include_str!(concat!("../../../tests/fixtures/chat/templates/", $name, ".jinja"))
    };
}

/// A family's name, its name in config.json, a template, and the markers that end an answer.
const FAMILIES: [(&str, &str, Option<&str>, &[&str]); 16] = [
    ("hermes", "qwen3_moe", Some(template!("qwen3")), &["<|im_end|>"]),
    ("qwen-xml", "qwen3_moe", Some(template!("qwen3_coder")), &["<|im_end|>"]),
    ("deepseek-v3.1", "deepseek_v3", Some(template!("deepseek")), &["<｜end▁of▁sentence｜>"]),
    ("glm-4.5", "glm4_moe", Some(template!("glm")), &["<|observation|>", "<|user|>"]),
    ("kimi-k2", "kimi_k2", Some(template!("kimi")), &["<|im_end|>"]),
    ("minimax-m2", "minimax_m2", Some(template!("minimax")), &["[e~["]),
    ("mistral-list", "mistral", Some(template!("mistral")), &["</s>"]),
    ("granite", "granitemoe", Some(template!("granite")), &["<|end_of_text|>"]),
    ("llama-3", "llama", Some(template!("llama3")), &["<|eot_id|>"]),
    ("harmony", "gpt_oss", Some(template!("harmony")), &["<|call|>"]),
    ("hunyuan", "hunyuan_v1_moe", Some(template!("hunyuan")), &["<|eos|>"]),
    ("hunyuan-3", "hy_v3", Some(template!("hunyuan_3")), &["<｜hy_eos:opensource｜>"]),
    ("gemma-4", "gemma4", Some(template!("gemma4")), &["<turn|>"]),
    ("deepseek-v3.2", "deepseek_v32", None, &["<｜end▁of▁sentence｜>"]),
    ("deepseek-v4", "deepseek_v4", None, &["<｜end▁of▁sentence｜>"]),
    ("harmony", "gpt_oss", None, &["<|call|>"]),
];

fn none(_: &str) -> bool {
    false
}

fn messages(list: Value) -> Vec<Message> {
    list.as_array().unwrap().iter().map(|m| Message::from(m.as_object().unwrap().clone())).collect()
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "hours": {"type": "array"}, "more": {"type": "object"},
        }, "required": ["city"]}}},
        {"type": "function", "function": {"name": "clock", "description": "Time.", "parameters": {"type": "object", "properties": {}}}},
    ])
}

fn call(id: &str, name: &str, arguments: &str) -> Value {
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

const ARGUMENTS: &str = r#"{"city": "Köln \"D\" <b>\nline", "days": 2, "hours": [1, 2], "more": {"a": null}}"#;

#[test]
fn rendered_calls_are_parsed() {
    for (name, model_type, source, ends) in FAMILIES {
        let dialect = Dialect::detect(Some(model_type), source, &none);
        assert_eq!(dialect.name(), name);
        let source = source.or_else(|| Dialect::own_template(Some(model_type), &none)).unwrap();
        let tokens =
            SpecialTokens { bos: Some("<s>".into()), eos: Some(ends[0].to_owned()), ..SpecialTokens::default() };
        let template = ChatTemplate::new(source, tokens).unwrap();
        let single = ["llama-3", "harmony"].contains(&name);
        let mut calls = vec![call("call_1", "get_weather", ARGUMENTS)];
        calls.extend((!single).then(|| call("call_2", "clock", "{}")));
        let asked = json!([{"role": "user", "content": "Weather?"}]);
        let mut answered = asked.as_array().unwrap().clone();
        answered
            .push(json!({"role": "assistant", "content": null, "reasoning_content": "I look.", "tool_calls": calls}));
        let render = |list: Value, prompt: bool| {
            let options = RenderOptions {
                add_generation_prompt: prompt,
                tools: Some(tools()),
                extra: dialect.template_options(Some(true), None),
                now: 0,
            };
            template.render(&dialect.messages(messages(list)).unwrap(), &options).unwrap()
        };
        let prompt = render(asked, true);
        let whole = render(Value::Array(answered), false);
        // This template opens thinking only after the last question.
        let prompt = if whole.starts_with(&prompt) { prompt } else { prompt.replace("<think>", "</think>") };
        let answer = whole.strip_prefix(&prompt).unwrap_or_else(|| panic!("{name}\n{prompt}\n{whole}"));
        let answer = ends.iter().fold(answer, |answer, end| answer.split(end).next().unwrap());

        let mut parser = dialect.parser(&prompt, &Tools::from_openai(&tools()).unwrap());
        let mut pieces = parser.push(answer);
        pieces.extend(parser.finish());
        let mut parsed: Vec<(String, String)> = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Thinking(text) => assert_eq!(text, "I look.", "{name}"),
                Piece::Text(text) => panic!("{name}: {text:?} is no part of a call in {answer}"),
                Piece::Call { name, .. } => parsed.push((name, String::new())),
                Piece::Arguments { index, delta } => parsed[index].1.push_str(&delta),
            }
        }
        assert_eq!(parsed.len(), calls.len(), "{name} {answer}");
        for ((name, arguments), call) in parsed.iter().zip(&calls) {
            assert_eq!(name, call["function"]["name"].as_str().unwrap());
            let want: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), want, "{answer}");
        }
    }
}

fn fields(messages: Vec<Message>) -> Value {
    messages.into_iter().map(|m| Value::Object(m.fields)).collect()
}

#[test]
fn messages_are_as_the_template_wants_them() {
    let source = template!("qwen3");
    let dialect = Dialect::detect(None, Some(source), &none);
    let given = json!([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "extra": 1},
        {"role": "assistant", "content": null, "tool_calls": [call("x", "f", "{\"a\":  1}")], "reasoning": "r", "refusal": null},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e", "tool_calls": []},
    ]);
    let want = json!([
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [call("x", "f", "{\"a\":  1}")]},
        {"role": "tool", "content": "d", "tool_call_id": "x"},
        {"role": "assistant", "content": "e"},
    ]);
    // This template prints arguments as they are if they are text.
    assert_eq!(fields(dialect.messages(messages(given)).unwrap()), want);

    let dialect = Dialect::detect(None, Some(template!("glm")), &none);
    let broken = json!([{"role": "assistant", "tool_calls": [call("x", "f", "{\"a"), call("y", "g", "")]}]);
    let got = fields(dialect.messages(messages(broken)).unwrap());
    assert_eq!(got[0]["tool_calls"][0]["function"]["arguments"], json!({"arguments": "{\"a"}));
    assert_eq!(got[0]["tool_calls"][1]["function"]["arguments"], json!({}));
}

/// Gemma 4 continues after the results in the same turn.
#[test]
fn results_stand_with_their_calls_where_templates_want_them() {
    let source = template!("gemma4");
    let dialect = Dialect::detect(None, Some(source), &none);
    let result = |id: &str, content: &str| json!({"role": "tool", "tool_call_id": id, "content": content});
    let asked = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call("x", "f", "{\"k\": 1}"), call("y", "g", "{}")]},
        result("y", "two"),
        result("x", "{\"one\": 1}"),
    ]);
    let answered = [
        asked.as_array().unwrap().clone(),
        vec![json!({"role": "assistant", "content": "c"}), json!({"role": "user", "content": "d"})],
    ]
    .concat();
    let render = |list: Value| {
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: None,
            extra: dialect.template_options(Some(true), None),
            now: 0,
        };
        let template = ChatTemplate::new(source, SpecialTokens::default()).unwrap();
        template.render(&dialect.messages(messages(list)).unwrap(), &options).unwrap()
    };
    let turn = "<|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>model\n<|tool_call>call:f{k:1}<tool_call|>\
                <|tool_call>call:g{}<tool_call|><|tool_response>response:f{one:1}<tool_response|>\
                <|tool_response>response:g{value:<|\"|>two<|\"|>}<tool_response|>";
    assert_eq!(render(asked), format!("<|turn>system\n<|think|>\n<turn|>\n{turn}"));
    let end = "c<turn|>\n<|turn>user\nd<turn|>\n<|turn>model\n";
    assert_eq!(render(Value::Array(answered)), format!("<|turn>system\n<|think|>\n<turn|>\n{turn}{end}"));
}

#[test]
fn templates_that_take_less_get_no_less() {
    // One call per message, one system message, no text beside calls.
    let dialect = Dialect::detect(Some("gpt_oss"), Some(template!("harmony")), &none);
    let given = json!([
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": [call("x", "f", "{}"), call("y", "g", "{}")]},
        {"role": "tool", "tool_call_id": "y", "content": "2"},
        {"role": "tool", "tool_call_id": "x", "content": "1"},
        {"role": "system", "content": "d"},
    ]);
    let object =
        |id: &str, name: &str| json!([{"id": id, "type": "function", "function": {"name": name, "arguments": {}}}]);
    let want = json!([
        {"role": "system", "content": "a\n\nd"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": object("x", "f")},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {"role": "assistant", "content": "", "tool_calls": object("y", "g")},
        {"role": "tool", "content": "2", "tool_call_id": "y"},
    ]);
    assert_eq!(fields(dialect.messages(messages(given)).unwrap()), want);
    let orphan = json!([{"role": "user", "content": "b"}, {"role": "tool", "tool_call_id": "z", "content": "2"}]);
    let error = dialect.messages(messages(orphan)).unwrap_err();
    assert_eq!(error, DialectError::UnknownCall { field: "messages[1].tool_call_id".into(), id: "z".into() });

    let dialect = Dialect::detect(None, Some(template!("mistral")), &none);
    let twice = json!([
        {"role": "user", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "tool_calls": [call("toolu_long", "f", "{}")]},
        {"role": "tool", "tool_call_id": "toolu_long", "content": "1"},
        {"role": "assistant", "content": "d"},
    ]);
    let got = fields(dialect.messages(messages(twice)).unwrap());
    assert_eq!(got[0], json!({"role": "user", "content": "a\n\nb"}));
    // This template has no other place for a text beside calls.
    assert_eq!(got[3], json!({"role": "assistant", "content": "c\n\nd"}));
    let id = got[1]["tool_calls"][0]["id"].as_str().unwrap();
    assert_eq!((id.len(), got[2]["tool_call_id"].as_str()), (9, Some(id)));

    let no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}";
    let dialect = Dialect::detect(None, Some(no_system), &none);
    let given = json!([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]);
    let got = fields(dialect.messages(messages(given)).unwrap());
    assert_eq!(got, json!([{"role": "user", "content": "a\n\nb"}]));
}

#[test]
fn ids_become_kimis_own() {
    let dialect = Dialect::detect(None, Some(template!("kimi")), &none);
    let given = json!([
        {"role": "assistant", "content": "", "tool_calls": [call("functions.f:0", "f", "{}"), call("call_9", "g", "{}")]},
        {"role": "tool", "tool_call_id": "call_9", "content": "2"},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "1"},
    ]);
    let got = fields(dialect.messages(messages(given)).unwrap());
    assert_eq!(got[0]["tool_calls"][1]["id"], "functions.g:1");
    assert_eq!((&got[1]["tool_call_id"], &got[1]["content"]), (&json!("functions.f:0"), &json!("1")));
    assert_eq!(got[2]["tool_call_id"], "functions.g:1");
}

#[test]
fn what_is_no_message_is_refused_by_name() {
    let dialect = Dialect::detect(None, None, &none);
    for (bad, says) in [
        (json!({"role": "narrator", "content": "a"}), "`messages[0].role`"),
        (json!({"role": "user"}), "`messages[0].content`"),
        (json!({"role": "user", "content": 1}), "`messages[0].content`"),
        (json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), "\"image_url\""),
        (json!({"role": "user", "content": ["a"]}), "`messages[0].content[0]`"),
        (json!({"role": "tool", "content": "a"}), "`messages[0].tool_call_id`"),
        (json!({"role": "assistant", "tool_calls": {}}), "`messages[0].tool_calls`"),
        (json!({"role": "assistant", "tool_calls": [{"function": {}}]}), "`messages[0].tool_calls[0].function.name`"),
        (json!({"role": "assistant", "function_call": {"name": "f"}}), "\"function_call\""),
        (json!({"role": "assistant", "reasoning_content": 1}), "`messages[0].reasoning_content`"),
    ] {
        let error = dialect.messages(messages(json!([bad]))).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn wishes_become_variables_of_the_template() {
    let qwen = Dialect::detect(None, Some(template!("qwen3")), &none);
    assert_eq!(Value::Object(qwen.template_options(None, None)), json!({}));
    assert_eq!(
        Value::Object(qwen.template_options(None, Some("none"))),
        json!({"enable_thinking": false, "thinking": false})
    );
    assert_eq!(
        Value::Object(qwen.template_options(None, Some("low"))),
        json!({"enable_thinking": true, "thinking": true})
    );
    assert_eq!(Value::Object(qwen.template_options(None, Some("\n# Rules"))), json!({}));
    let hunyuan = Dialect::detect(Some("hy_v3"), Some(template!("hunyuan_3")), &none);
    let effort = |thinking, effort| hunyuan.template_options(thinking, effort)["reasoning_effort"].clone();
    assert_eq!((effort(Some(false), None), effort(Some(true), None)), (json!("no_think"), json!("high")));
    assert_eq!((effort(None, Some("none")), effort(None, Some("minimal"))), (json!("no_think"), json!("low")));
    assert_eq!((effort(None, Some("low")), effort(None, Some("max"))), (json!("low"), json!("high")));
    assert_eq!(Value::Object(hunyuan.template_options(None, None)), json!({}));
    let harmony = Dialect::detect(Some("gpt_oss"), None, &none);
    assert_eq!(Value::Object(harmony.template_options(Some(true), None)), json!({}));
    assert_eq!(Value::Object(harmony.template_options(None, Some("minimal"))), json!({"reasoning_effort": "low"}));
    assert_eq!(Value::Object(harmony.template_options(None, Some("xhigh"))), json!({"reasoning_effort": "high"}));
    let v4 = Dialect::detect(Some("deepseek_v4"), None, &none);
    let want = json!({"enable_thinking": true, "thinking": true, "reasoning_effort": "max"});
    assert_eq!(Value::Object(v4.template_options(None, Some("max"))), want);
}

/// A form begins where the text of an answer begins.
#[test]
fn answers_begin_behind_their_marker() {
    let hunyuan = Dialect::detect(Some("hunyuan_v1_moe"), Some(template!("hunyuan")), &none);
    assert_eq!(hunyuan.before_answer("<|extra_0|>"), Some("<answer>\n"));
    assert_eq!(hunyuan.before_answer("<think>\n\n</think>\n"), Some("<answer>\n"));
    assert_eq!(hunyuan.before_answer("<think>\n\n</think>\n<answer>\n"), None);
    let hunyuan = Dialect::detect(Some("hy_v3"), None, &none);
    assert_eq!(hunyuan.before_answer("<think:opensource>"), Some("</think:opensource>"));
    assert_eq!(hunyuan.before_answer("<think:opensource></think:opensource>"), None);
    let plain = |token: &str| token == "<tool_sep>";
    assert_eq!(Dialect::detect(None, None, &plain).name(), "hunyuan-3-plain");
}

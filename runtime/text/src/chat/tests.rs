//! Templates against Hugging Face's renderings of them, and the promise about control tokens.

use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::fixtures;

const GOLDENS: &str = include_str!("../../../../tests/fixtures/chat/goldens.json");

macro_rules! templates {
    ($($name:literal),*) => {
        [$(($name, include_str!(concat!("../../../../tests/fixtures/chat/templates/", $name, ".jinja")))),*]
    };
}

const TEMPLATES: [(&str, &str); 11] = templates!(
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
);

/// The control tokens of all those formats.
const CONTROLS: [&str; 58] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<think>",
    "</think>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|object_ref_start|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|end|>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|call|>",
    "<|return|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "]~!b[",
    "]~b]",
    "[e~[",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
];

/// A tokenizer with all of them, special and ordinary in turn.
fn tokenizer() -> Tokenizer {
    let mut json: Json = serde_json::from_str(&fixtures::byte_level()).unwrap();
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    tokens.clear();
    let first = json["model"]["vocab"].as_object().unwrap().len();
    let added = CONTROLS.iter().enumerate().map(|(i, token)| {
        json!({"id": first + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": i % 2 == 0})
    });
    json["added_tokens"] = added.collect();
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

fn messages(json: &Json) -> Vec<Message> {
    let list = json.as_array().unwrap().iter();
    list.map(|m| Message::from(m.as_object().unwrap().clone())).collect()
}

fn options(json: &Json, now: i64) -> RenderOptions {
    RenderOptions {
        add_generation_prompt: json["add_generation_prompt"].as_bool().unwrap(),
        tools: json.get("tools").cloned(),
        extra: json.get("extra").map_or_else(Map::new, |e| e.as_object().unwrap().clone()),
        now,
    }
}

fn template(name: &str) -> ChatTemplate {
    let goldens: Json = serde_json::from_str(GOLDENS).unwrap();
    let tokens = goldens["tokens"].get(name).cloned().unwrap_or(json!({}));
    let source = TEMPLATES.iter().find(|(n, _)| *n == name).unwrap().1;
    ChatTemplate::new(source, SpecialTokens::of(tokens.as_object().unwrap())).unwrap()
}

fn inline(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, SpecialTokens::default()).unwrap()
}

/// Renders a source with one message of the user's.
fn show(source: &str, content: &str) -> Result<String, TextError> {
    let template = ChatTemplate::new(source, SpecialTokens::default())?;
    template.render(&[Message::new("user", content)], &RenderOptions::default())
}

/// The control tokens among the ids, and how much text stands before each.
fn controls(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, &id) in ids.iter().enumerate() {
        let spelling = tokenizer.token_text(id).unwrap();
        if CONTROLS.contains(&spelling.as_str()) {
            found.push((spelling, tokenizer.decode(&ids[..at], false).unwrap().len()));
        }
    }
    found
}

/// Runs a closure for every golden case, which returns what is wrong with it.
fn each_golden(check: impl Fn(&ChatTemplate, &[Message], &RenderOptions, &Json) -> Result<(), String>) {
    let goldens: Json = serde_json::from_str(GOLDENS).unwrap();
    let templates: HashMap<&str, ChatTemplate> = TEMPLATES.iter().map(|(name, _)| (*name, template(name))).collect();
    let cases = goldens["cases"].as_array().unwrap();
    assert_eq!(cases.len() % TEMPLATES.len(), 0);
    let now = goldens["now"].as_i64().unwrap();
    let mut wrong = Vec::new();
    for case in cases {
        let [name, conversation, variant] =
            ["template", "conversation", "options"].map(|field| case[field].as_str().unwrap());
        let want = case["as"].as_u64().map_or(case, |same| &cases[same as usize]);
        let messages = messages(&goldens["conversations"][conversation]);
        let options = options(&goldens["options"][variant], now);
        if let Err(reason) = check(&templates[name], &messages, &options, want) {
            wrong.push(format!("{name} / {conversation} / {variant}: {reason}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong[..wrong.len().min(5)].join("\n"));
}

/// Where two texts part.
fn difference(got: &str, want: &str) -> String {
    let same = got.bytes().zip(want.bytes()).take_while(|(a, b)| a == b).count();
    let from = (0..=same.saturating_sub(30)).rev().find(|i| got.is_char_boundary(*i)).unwrap_or(0);
    let tail = |text: &str| text.get(from..).unwrap_or("").chars().take(90).collect::<String>();
    format!("\n   got {:?}\n  want {:?}", tail(got), tail(want))
}

#[test]
fn renders_as_hugging_face_does() {
    each_golden(|template, messages, options, want| {
        match (template.render(messages, options), want["text"].as_str()) {
            (Ok(got), Some(want)) if got == want => Ok(()),
            (Ok(got), Some(want)) => Err(difference(&got, want)),
            (Ok(got), None) => Err(format!("should fail with {}, but is {got:?}", want["message"])),
            (Err(error), Some(_)) => Err(error.to_string()),
            (Err(TextError::ChatRefused { reason }), None) if want["error"] == "TemplateError" => {
                if want["message"] == *reason { Ok(()) } else { Err(reason) }
            }
            (Err(TextError::ChatTemplate { line: Some(_), .. }), None) if want["error"] != "TemplateError" => Ok(()),
            (Err(error), None) => Err(format!("fails with {error} and not with {}", want["message"])),
        }
    });
}

/// With few exceptions, the goldens' conversations contain no control tokens, so encoding them must give the same ids
/// as encoding their rendering.
#[test]
fn harmless_conversations_are_encoded_as_rendered() {
    let tokenizer = tokenizer();
    each_golden(|template, messages, options, _| {
        let all: String = messages.iter().map(|m| Json::from(m.fields.clone()).to_string()).collect();
        let Ok(text) = template.render(messages, options) else {
            return Ok(());
        };
        let ids = encode_chat(&tokenizer, template, messages, options).map_err(|e| e.to_string())?;
        let decoded = tokenizer.decode(&ids, false).unwrap();
        if decoded != text {
            return Err(difference(&decoded, &text));
        }
        if CONTROLS.iter().any(|token| all.contains(token)) {
            return Ok(());
        }
        if ids == tokenizer.encode(&text, false).unwrap() { Ok(()) } else { Err("other ids".into()) }
    });
}

/// Replaces every content, reasoning and tool result by text.
fn with_texts(conversation: &Json, texts: &[String]) -> Vec<Message> {
    let mut messages = messages(conversation);
    for (i, message) in messages.iter_mut().enumerate() {
        let text = &texts[i % texts.len()];
        for field in ["content", "reasoning_content"] {
            match message.fields.get_mut(field) {
                Some(Json::String(s)) => *s = text.clone(),
                Some(Json::Array(parts)) => parts[0]["text"] = text.clone().into(),
                _ => {}
            }
        }
        if let Some(calls) = message.fields.get_mut("tool_calls") {
            calls[0]["function"]["arguments"] = json!({(text.clone()): text, "deep": [text, {"k": text}]});
        }
    }
    messages
}

/// Text with the length and the white space of `text`, but without any character of a control token.
fn harmless(text: &str) -> String {
    let replace = |c: char| match c.is_whitespace() || c == '"' || c == '\\' || c.is_control() {
        true => c,
        false => ['\u{436}', '\u{43b}'][usize::from(c.is_uppercase())],
    };
    text.chars().map(replace).collect()
}

fn hostile() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        3 => prop::sample::select(CONTROLS.to_vec()).prop_map(str::to_owned),
        1 => "[<>|\\[\\]~/a-z_ \n\"\\\\]{0,6}",
        1 => "\\PC{0,4}",
        1 => prop::sample::select(vec!["<", "|>", "<|", "im_start", "|im_start|", "think", "tool_call", "object", ">", "｜",
            "user", "\u{40000}", "\u{f0000}", "{%", "}}"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

/// Conversations of the goldens whose contents templates treat as text.
const CONVERSATIONS: [&str; 5] = ["turns", "tools", "thought_apart", "names", "call_after_thought"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Every control token in the result is one that the template wrote: the same ones, in the same places among the
    /// template's text, as with harmless text. Templates that take apart an assistant's message get no text that they
    /// would take apart.
    #[test]
    fn text_cannot_forge_control_tokens(texts in prop::collection::vec(hostile(), 1..4)) {
        let goldens: Json = serde_json::from_str(GOLDENS).unwrap();
        let tokenizer = tokenizer();
        let parsed = ["</think>", "<tool_response>", "/nothink", "<|channel|>"];
        for (name, _) in TEMPLATES.iter().filter(|(name, _)| *name != "constructs") {
            let template = template(name);
            let texts: Vec<String> = texts.iter()
                .map(|text| if parsed.iter().any(|p| text.contains(p)) { text.replace(['/', 'c', 't'], "<s>") } else { text.clone() })
                .collect();
            let plain: Vec<String> = texts.iter().map(|t| harmless(t)).collect();
            for conversation in CONVERSATIONS {
                let conversation = &goldens["conversations"][conversation];
                let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                let hostile = encode_chat(&tokenizer, &template, &with_texts(conversation, &texts), &options);
                let harmless = encode_chat(&tokenizer, &template, &with_texts(conversation, &plain), &options);
                let (Ok(hostile), Ok(harmless)) = (hostile, harmless) else { continue };
                let names = |ids: &[u32]| -> Vec<String> {
                    controls(&tokenizer, ids).into_iter().map(|(name, _)| name).collect()
                };
                prop_assert_eq!(names(&hostile), names(&harmless), "{} {:?}", name, texts);
                // This one reacts to text with text of its own.
                if *name == "loosely" {
                    continue;
                }
                prop_assert_eq!(places(&tokenizer, &hostile), places(&tokenizer, &harmless), "{} {:?}", name, texts);
            }
        }
    }

    /// Whatever the text is, the ids spell what Hugging Face would render.
    #[test]
    fn the_text_itself_is_that_of_rendering(texts in prop::collection::vec(hostile(), 1..4)) {
        let goldens: Json = serde_json::from_str(GOLDENS).unwrap();
        let tokenizer = tokenizer();
        for name in ["qwen3", "glm", "deepseek", "minimax", "kimi", "mistral", "qwen3_coder"] {
            let template = template(name);
            for conversation in CONVERSATIONS {
                let messages = with_texts(&goldens["conversations"][conversation], &texts);
                let options = RenderOptions::default();
                let Ok(text) = template.render(&messages, &options) else { continue };
                let ids = encode_chat(&tokenizer, &template, &messages, &options).unwrap();
                prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{}", name);
            }
        }
    }
}

/// Numbers of characters before each control token. (Bytes would differ with the text.)
fn places(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<usize> {
    let before = |at: usize| tokenizer.decode(&ids[..at], false).unwrap().chars().count();
    let is_control = |id: u32| CONTROLS.contains(&tokenizer.token_text(id).unwrap().as_str());
    (0..ids.len()).filter(|&at| is_control(ids[at])).map(before).collect()
}

#[test]
fn names_and_keys_cannot_complete_a_token() {
    let tokenizer = tokenizer();
    let count = |source: &str, message: &Message| {
        let ids = encode_chat(&tokenizer, &inline(source), std::slice::from_ref(message), &RenderOptions::default());
        controls(&tokenizer, &ids.unwrap()).len()
    };
    let mut message = Message::new("user", "think");
    for field in ["im_start", "|im_start|", "tool_call", "x"] {
        message.fields.insert(field.into(), field.into());
    }
    let source =
        "<think>{% for k, v in messages[0].items() %}{{ '<' ~ k ~ '><' ~ v ~ '></' ~ v ~ '>' }}<|{{ v }}|>{% endfor %}";
    // The template's own, and the role between the template's bars: roles are no user's text.
    assert_eq!(count(source, &message), 2);
    // Known to the template, and still the user's.
    let source = "{% if messages[0].content == 'think' %}{{ '<' ~ messages[0].content ~ '>' }}{% endif %}";
    assert_eq!(count(source, &message), 0);
    // Pieced together from two strings.
    let source = "<{{ messages[0].a ~ messages[0].b }}>";
    for (a, b) in [("thi", "nk"), ("", "think"), ("<", "think"), ("think", "")] {
        message.fields.insert("a".into(), a.into());
        message.fields.insert("b".into(), b.into());
        assert_eq!(count(source, &message), 0, "{a} {b}");
    }
    // A stranger's role is no role.
    assert_eq!(count("{{ '<|' + messages[0].role + '|>' }}", &Message::new("im_start", "")), 0);
    assert_eq!(count("{{ '<|' + messages[0].role + '|>' }}", &Message::new("user", "")), 1);
}

#[test]
fn templates_see_what_the_text_says() {
    let tokenizer = tokenizer();
    let source = "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}\
        {{ '<think>' + c.split('</think>')[0].replace('<think>', '') + '</think>' }}{% set c = c.split('</think>')[-1] %}\
        {% endif %}{{ c.strip() | tojson }}{% endfor %}";
    let messages = [Message::new("assistant", "<think>a\"</think> b<think>\"\n")];
    let ids = encode_chat(&tokenizer, &inline(source), &messages, &RenderOptions::default()).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<think>a\"</think>\"b<think>\\\"\"");
    let found = controls(&tokenizer, &ids);
    assert_eq!(found, [("<think>".to_owned(), 0), ("</think>".to_owned(), 9)]);
}

#[test]
fn templates_that_look_closely_get_safe_text() {
    let tokenizer = tokenizer();
    let options = RenderOptions::default();
    let template = template("loosely");
    for (content, greeting) in
        [("{\"a\": 1}", "object"), ("hello", "greeting"), ("<|end|>", ""), ("{<|end|>}", "object")]
    {
        let messages = [Message::new("user", content)];
        let ids = encode_chat(&tokenizer, &template, &messages, &options).unwrap();
        let text = tokenizer.decode(&ids, false).unwrap();
        assert_eq!(text, format!("<|user|>{greeting}{content}<|end|>"));
        assert_eq!(controls(&tokenizer, &ids).len(), 2, "{content}");
    }
}

#[test]
fn templates_are_found_in_their_order() {
    let find = |files: &[(&str, &str)]| {
        let files: HashMap<&str, &str> = files.iter().copied().collect();
        let found = ChatTemplate::find(|name| files.get(name).map(|text| text.as_bytes()));
        found.map(|t| {
            t.map(|t| {
                let tools = |tools| RenderOptions { tools, ..RenderOptions::default() };
                [None, Some(json!([{}]))].map(|t2| t.render(&[], &tools(t2)).unwrap())
            })
        })
    };
    let both = |text: &str| Ok(Some([text.to_owned(), text.to_owned()]));
    let config = |template: Json| {
        json!({"bos_token": {"content": "B"}, "eos_token": "E", "x_token": "X", "pad_token": null,
            "chat_template": template})
        .to_string()
    };
    assert_eq!(find(&[]), Ok(None));
    assert_eq!(find(&[("tokenizer_config.json", "{}")]), Ok(None));
    let text = config("{{ bos_token }}{{ eos_token }}{{ x_token }}{{ pad_token }}".into());
    assert_eq!(find(&[("tokenizer_config.json", &text)]), both("BEX"));
    assert_eq!(find(&[("tokenizer_config.json", &text), ("chat_template.jinja", "J{{ bos_token }}")]), both("JB"));
    let list = config(json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]));
    assert_eq!(find(&[("tokenizer_config.json", &list)]), Ok(Some(["D".to_owned(), "T".to_owned()])));
    assert!(find(&[("tokenizer_config.json", &config(json!([{"name": "other"}])))]).is_err());
    assert!(find(&[("tokenizer_config.json", &config(json!(5)))]).is_err());
    assert!(find(&[("tokenizer_config.json", "[")]).is_err());
    assert!(ChatTemplate::find(|_| Some(&[0xff][..])).is_err());
}

#[test]
fn errors_are_short_and_name_the_line() {
    let line = |error: TextError| match error {
        TextError::ChatTemplate { line, reason } => {
            assert!(!reason.contains('\n') && reason.chars().count() <= 201, "{reason}");
            line
        }
        other => panic!("{other}"),
    };
    assert_eq!(line(show("a\n{% if %}", "").unwrap_err()), Some(2));
    assert_eq!(line(show("a\n\n{{ messages.x.y }}", "").unwrap_err()), Some(3));
    assert_eq!(line(show("\n{{ messages[0].content + 1 }}", "").unwrap_err()), Some(2));
    assert_eq!(line(show("{{ 'x' | nofilter }}", "").unwrap_err()), Some(1));
    assert_eq!(line(show("{{ ''.nomethod() }}", "").unwrap_err()), Some(1));
    let refused =
        show("{% macro m() %}{{ raise_exception('No ' + messages[0].content) }}{% endmacro %}{{ m() }}", "way");
    assert_eq!(refused, Err(TextError::ChatRefused { reason: "No way".into() }));
    let long = show("{{ raise_exception(messages[0].content) }}", &"x".repeat(10_000)).unwrap_err();
    assert!(long.to_string().len() < 500);
}

#[test]
fn hostile_templates_end() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='0123456789') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='0123456789') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for a in range(99) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x.join(n.x | list) %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string | length }}",
        "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x] %}{% endfor %}",
        "{% set n = namespace(x={}) %}{% for a in range(99999) %}{% set n.x = {'a': n.x} %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% set n.x = namespace(y=n.x) %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% set n.x = (1, n.x) %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% set n.x = dict(n=n.x) %}{% endfor %}",
        "{% set n = namespace(x=1, y=1) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}\
         {% endfor %}{{ n.x == n.y }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(19) %}{% set n.x = n.x ~ n.x %}{% endfor %}\
         {% for a in range(9999) %}{{ ('b' ~ n.x) in n.x }}{% endfor %}",
        "{% set x = range(9999) | list %}{% for a in range(99999) %}{% if x == range(9999) | list %}{% endif %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{{ 'x' * 99999999999 }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ] {
        assert!(show(source, "x").is_err(), "{source}");
    }
    for (before, repeated, after) in [
        ("", "(", ""),
        ("{{ ", "(", ""),
        ("{{ ", "[", ""),
        ("{{ ", "-", "1 }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ x", ".y", " }}"),
        ("{{ x", "|e", " }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ 1", "~1", " }}"),
        ("{{ 1", " if 1 else 1", " }}"),
        ("", "{% if x %}", ""),
        ("", "{% for x in y %}", ""),
        ("{% if x %}", "{% elif x %}", "{% endif %}"),
        ("", "{% set x %}", ""),
        ("", "{{ 1 }}", ""),
        ("", "{% set x = [x] %}", ""),
        ("", "{% set x = x[::-1] %}", ""),
    ] {
        for times in [900, 100_000] {
            let _ = show(&(before.to_owned() + &repeated.repeat(times) + after), "x");
        }
    }
}

#[test]
fn long_conversations_are_no_hostile_templates() {
    let template = template("qwen3");
    let text = "word ".repeat(20_000);
    let messages: Vec<Message> = (0..40).map(|i| Message::new(["user", "assistant"][i % 2], &text)).collect();
    assert!(template.render(&messages, &RenderOptions::default()).is_ok());
    let messages: Vec<Message> = (0..5_000).map(|i| Message::new(["user", "assistant"][i % 2], "x")).collect();
    assert!(template.render(&messages, &RenderOptions::default()).is_ok());
}

proptest! {
    #[test]
    fn noise_never_panics(source in "(\\{\\{|\\}\\}|\\{%|%\\}| in |'|messages|\\[|\\]|[a-z.|(): \n-]|if|for|endif|é){0,20}") {
        let _ = show(&source, "é<");
    }
}

//! Answers of all families, cut at every place.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::syntax;

/// The contents of an answer, independent of the pieces in which it arrived.
#[derive(Debug, Default, Clone, PartialEq)]
struct Said {
    thinking: String,
    text: String,
    calls: Vec<(String, String)>,
}

impl Said {
    fn add(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Thinking(more) => self.thinking.push_str(&more),
                Piece::Text(more) => self.text.push_str(&more),
                Piece::Call { index, name, .. } => {
                    assert_eq!(index, self.calls.len());
                    self.calls.push((name, String::new()));
                }
                Piece::Arguments { index, delta } => {
                    assert_eq!(index + 1, self.calls.len());
                    self.calls[index].1.push_str(&delta);
                }
            }
        }
    }
}

fn tools() -> Tools {
    let weather = json!({"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "wind": {"type": "boolean"},
            "hours": {"type": "array", "items": {"type": "integer"}}, "more": {"type": "object"},
        },
        "required": ["city"],
    }}});
    let clock = json!({"type": "function", "function": {"name": "clock"}});
    Tools::from_openai(&json!([weather, clock])).unwrap()
}

/// Parses an answer that arrives in pieces that end at these bytes.
fn parse_cut(syntax: &'static Syntax, tail: &str, text: &str, cuts: &[usize], tools: &Tools) -> Said {
    let mut parser = AnswerParser::new(syntax, tail, tools).with_seed(7);
    let mut said = Said::default();
    let mut from = 0;
    for &to in cuts {
        said.add(parser.push(&text[from..to]));
        from = to;
    }
    said.add(parser.push(&text[from..]));
    said.add(parser.finish());
    assert_eq!(parser.has_calls(), !said.calls.is_empty());
    said
}

/// Parses an answer in one piece, character by character, and in pieces of a few characters; all results must be equal.
fn parse(syntax: &'static Syntax, tail: &str, text: &str) -> Said {
    let tools = tools();
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let whole = parse_cut(syntax, tail, text, &[], &tools);
    for step in [1, 2, 3, 7] {
        let cuts: Vec<usize> = ends.iter().copied().step_by(step).collect();
        assert_eq!(parse_cut(syntax, tail, text, &cuts, &tools), whole, "pieces of {step} characters: {text}");
    }
    whole
}

fn said(thinking: &str, text: &str, calls: &[(&str, &str)]) -> Said {
    let calls = calls.iter().map(|&(name, arguments)| (name.to_owned(), arguments.to_owned())).collect();
    Said { thinking: thinking.into(), text: text.into(), calls }
}

const WEATHER: &str = r#"{"city": "Köln \"D\"", "days": 2}"#;

#[test]
fn hermes() {
    let text = format!(
        "<think>\nHmm, <tool_call>?\n</think>\n\nLook:\n<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}\n\
         </tool_call>\n<tool_call>\n{{\"arguments\": {{}}, \"name\": \"clock\"}}\n</tool_call>"
    );
    let want = said("Hmm, <tool_call>?", "Look:", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::HERMES, "<|im_start|>assistant\n", &text), want);
    // Arguments keep their bytes, markers in strings are text, and strings that contain JSON are unquoted.
    let odd = r#"{ "city":"</tool_call>",  "days":1.0e2 }"#;
    let text = format!("<tool_call>{{\"name\":\"get_weather\",\"arguments\":{odd}}}</tool_call>after");
    assert_eq!(parse(&syntax::HERMES, "", &text), said("", "after", &[("get_weather", odd)]));
    let text = r#"<tool_call>{"name":"f","arguments":"{\"a\": \"\\n\"}"}</tool_call>"#;
    assert_eq!(parse(&syntax::HERMES, "", text), said("", "", &[("f", r#"{"a": "\n"}"#)]));
}

#[test]
fn gemma_4() {
    let quoted = |text: &str| format!("<|\"|>{text}<|\"|>");
    let text = format!(
        "<|channel>thought\nHmm.\n<channel|>Look:<|tool_call>call:get_weather{{city:{},days:2,hours:[1,2],more:{{a:{},{}:None}},\
         wind:true}}<tool_call|><|tool_call>call:clock{{}}<tool_call|>",
        quoted("Köln \"D\" {,}\n"),
        quoted(""),
        quoted("b:")
    );
    let weather = "{\"city\": \"Köln \\\"D\\\" {,}\\n\", \"days\": 2, \"hours\": [1, 2], \"more\": {\"a\": \"\", \"b:\": null}, \
                   \"wind\": true}";
    let want = said("Hmm.", "Look:", &[("get_weather", weather), ("clock", "{}")]);
    assert_eq!(parse(&syntax::GEMMA_4, "<|turn>model\n", &text), want);
    // A prompt without thinking has closed it, and a call ends anything that nothing else ends.
    let tail = "<|turn>model\n<|channel>thought\n<channel|>";
    assert_eq!(parse(&syntax::GEMMA_4, tail, "Yes."), said("", "Yes.", &[]));
    let call = "<|tool_call>call:clock{}<tool_call|>";
    assert_eq!(
        parse(&syntax::GEMMA_4, "", &format!("<|channel>thought\nHm.{call}")),
        said("Hm.", "", &[("clock", "{}")])
    );
    for (text, want) in [
        ("<|tool_call>call:clock{a:<|\"|>x", said("", "", &[("clock", "{a:<|\"|>x")])),
        ("<|tool_call>call:clock{a:b c}<tool_call|>d", said("", "d", &[("clock", "{a:b c}")])),
        ("<|tool_call>clock{}<tool_call|>", said("", "<|tool_call>clock{}<tool_call|>", &[])),
    ] {
        assert_eq!(parse(&syntax::GEMMA_4, "", text), want, "{text}");
    }
}

#[test]
fn what_is_no_call_is_text() {
    for text in [
        "The marker <tool_call> begins a call.",
        "<tool_call>\n{\"title\": 1}\n</tool_call>",
        "<tool_call>",
        "a < b, <think>not thinking</think>\n\n",
        "```\n<tool_call>\n```",
        "\u{1f980} <tool",
    ] {
        assert_eq!(parse(&syntax::HERMES, "", text), said("", text, &[]), "{text}");
    }
    let without = parse_cut(&syntax::HERMES, "", "<tool_call>{\"name\":\"f\"}</tool_call>", &[], &Tools::default());
    assert_eq!(without.text, "<tool_call>{\"name\":\"f\"}</tool_call>");
}

#[test]
fn broken_calls_are_handed_on() {
    for (text, want) in [
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x", said("", "", &[("f", "{\"a\": \"x")])),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1</tool_call>b", said("", "b", &[("f", "{\"a\": 1")])),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {}}}</tool_call>b", said("", "b", &[("f", "{}")])),
        ("<tool_call>{\"name\": \"f\", \"arguments\": nonsense}</tool_call>", said("", "", &[("f", "nonsense")])),
        ("<tool_call>{\"name\": \"unknown\", \"arguments\": {}}", said("", "", &[("unknown", "{}")])),
    ] {
        assert_eq!(parse(&syntax::HERMES, "", text), want, "{text}");
    }
}

#[test]
fn thinking_that_the_prompt_opens() {
    assert_eq!(parse(&syntax::HERMES, "x<think>\n", "Hm.\n</think>\n\nYes."), said("Hm.", "Yes.", &[]));
    assert_eq!(parse(&syntax::HERMES, "<think>", "cut \n"), said("cut \n", "", &[]));
    assert_eq!(parse(&syntax::HERMES, "<think>\n\n</think>\n\n", "Yes."), said("", "Yes.", &[]));
    assert_eq!(parse(&syntax::HERMES, "", "\n</think>Yes."), said("", "Yes.", &[]));
    assert_eq!(parse(&syntax::MISTRAL, "", "[THINK]Hm.[/THINK]Yes."), said("Hm.", "Yes.", &[]));
}

#[test]
fn calls_end_thinking_that_nothing_else_ends() {
    let call = "<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_call>";
    let two = format!("Hm.\n\n{call}\n{call}\n");
    let calls = [("clock", "{}"), ("clock", "{}")];
    assert_eq!(parse(&syntax::HERMES, "<think>\n", &two), said("Hm.", "", &calls));
    for behind in ["</think>", "or not</think>", "\n\nor not\n</think>"] {
        let thought = format!("Hm.\n{call}{behind}");
        let want = said(thought.strip_suffix("</think>").unwrap().trim_end(), "Yes.", &[]);
        assert_eq!(parse(&syntax::HERMES, "<think>", &format!("{thought}Yes.")), want);
    }
    let unknown = call.replace("clock", "other");
    assert_eq!(parse(&syntax::HERMES, "<think>", &unknown), said(&unknown, "", &[]));
    let qwen = "Hm.<tool_call>\n<function=clock>\n</function>\n</tool_call>";
    assert_eq!(parse(&syntax::QWEN_XML, "<think>", qwen), said("Hm.", "", &[("clock", "{}")]));
}

#[test]
fn deepseek_v3() {
    let text = format!(
        "Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{WEATHER}\n```<｜tool▁call▁end｜>\n\
         <｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    let want = said("Hm.", "Look.", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::DEEPSEEK_V3, "", &format!("<think>\nHm.\n</think>\n\n{text}")), want);
    let text = format!(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>\
         <｜tool▁call▁begin｜>clock<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    let want = said("Hm.", "", &[("get_weather", WEATHER), ("clock", "{}")]);
    // The calls end the thinking.
    assert_eq!(parse(&syntax::DEEPSEEK_V31, "<｜Assistant｜><think>", &format!("Hm.{text}")), want);
    let bare = text.replace("<｜tool▁calls▁begin｜>", "");
    assert_eq!(parse(&syntax::DEEPSEEK_V31, "</think>", &bare), Said { thinking: String::new(), ..want });
    let alone = "<｜tool▁calls▁begin｜> is a token";
    assert_eq!(parse(&syntax::DEEPSEEK_V31, "", alone), said("", alone, &[]));
}

#[test]
fn dsml() {
    let call = "<｜DSML｜invoke name=\"get_weather\">\n\
                <｜DSML｜parameter name=\"city\" string=\"true\">Köln \"D\"</｜DSML｜parameter>\n\
                <｜DSML｜parameter name=\"hours\" string=\"false\">[1,  2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
                <｜DSML｜invoke name=\"clock\">\n</｜DSML｜invoke>\n";
    let want = said("Hm.", "Look.", &[("get_weather", r#"{"city": "Köln \"D\"", "hours": [1,  2]}"#), ("clock", "{}")]);
    for (syntax, name) in [(&syntax::DEEPSEEK_V32, "function_calls"), (&syntax::DEEPSEEK_V4, "tool_calls")] {
        let text = format!("Hm.</think>Look.\n\n<｜DSML｜{name}>\n{call}</｜DSML｜{name}>");
        assert_eq!(parse(syntax, "<think>", &text), want);
    }
    let spaced = call.replace("DSML｜", "DSML｜ ");
    let text = format!("Hm.</think>Look.\n\n<｜DSML｜ calls>\n{spaced}</｜DSML｜ calls>");
    assert_eq!(parse(&syntax::DEEPSEEK_V41, "<think>", &text), want);
}

#[test]
fn kimi() {
    let text = format!(
        "<think>Hm.</think>Look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0\
         <|tool_call_argument_begin|>{WEATHER}<|tool_call_end|><|tool_call_begin|>functions.clock:1\
         <|tool_call_argument_begin|>{{}}<|tool_call_end|><|tool_calls_section_end|>"
    );
    let want = said("Hm.", "Look.", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::KIMI_K2, "<|im_middle|>", &text), want);
    let mut parser = AnswerParser::new(&syntax::KIMI_K2, "", &tools());
    let ids: Vec<String> = parser.push(&text).into_iter().filter_map(id).collect();
    assert_eq!(ids, ["functions.get_weather:0", "functions.clock:1"]);
}

fn id(piece: Piece) -> Option<String> {
    match piece {
        Piece::Call { id, .. } => Some(id),
        _ => None,
    }
}

#[test]
fn glm() {
    let want = said(
        "Hm.",
        "Look.",
        &[
            ("get_weather", r#"{"city": "12\nKöln", "days": 2, "more": {"a": [1]}, "unknown": "word"}"#),
            ("clock", "{}"),
        ],
    );
    let old = "\n<think>Hm.</think>\nLook.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12\nKöln</arg_value>\n\
               <arg_key>days</arg_key>\n<arg_value>2</arg_value>\n<arg_key>more</arg_key>\n<arg_value>{\"a\": [1]}</arg_value>\n\
               <arg_key>unknown</arg_key>\n<arg_value>word</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>";
    assert_eq!(parse(&syntax::GLM_45, "<|assistant|>", old), want);
    let new = old.replace(">\n<", "><").replace("get_weather\n", "get_weather").replace("clock\n", "clock");
    assert_eq!(parse(&syntax::GLM_47, "<|assistant|>", &new), want);
    let mention = "<tool_call> is how a call begins\n";
    assert_eq!(parse(&syntax::GLM_45, "", mention), said("", mention, &[]));
}

#[test]
fn qwen_xml() {
    let text = "Hm.\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nline <one>\n\nline \"two\"\n</parameter>\n\
                <parameter=wind>\nTrue\n</parameter>\n<parameter=hours>\n[1, 2]\n</parameter>\n</function>\n</tool_call>\n\
                <tool_call>\n<function=clock>\n</function>\n</tool_call>";
    let want = said(
        "Hm.",
        "",
        &[("get_weather", r#"{"city": "line <one>\n\nline \"two\"", "wind": true, "hours": [1, 2]}"#), ("clock", "{}")],
    );
    assert_eq!(parse(&syntax::QWEN_XML, "<think>\n", text), want);
    // Models forget the first marker.
    let bare = text.replace("<tool_call>\n<function=get", "<function=get");
    assert_eq!(parse(&syntax::QWEN_XML, "<think>\n", &bare), want);
    let mention = "write <function=name> or <tool_call> so";
    assert_eq!(parse(&syntax::QWEN_XML, "", mention), said("", mention, &[]));
    for (text, arguments) in [
        ("<function=get_weather><parameter=city>\n</parameter></function>", r#"{"city": ""}"#),
        ("<function=get_weather><parameter=city>\n\n</parameter></function>", r#"{"city": ""}"#),
        ("<function=get_weather><parameter=city>\n\n\n</parameter></function>", r#"{"city": "\n"}"#),
        ("<function=get_weather><parameter=city>a</parameter>", r#"{"city": "a"}"#),
        ("<function=get_weather><parameter=days>3</parameter>", r#"{"days": 3"#),
        ("<function=get_weather><parameter=city>a</para", r#"{"city": "a</para"#),
        ("<function=get_weather><parameter=city>\na\n</function>\n</tool_call>", r#"{"city": "a"}"#),
    ] {
        assert_eq!(parse(&syntax::QWEN_XML, "", text), said("", "", &[("get_weather", arguments)]), "{text}");
    }
}

#[test]
fn minimax() {
    let text = "Hm.\n</think>\n\nLook.\n<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Köln</parameter>\n\
                <parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"clock\">\n</invoke>\n</minimax:tool_call>";
    let want = said("Hm.", "Look.", &[("get_weather", r#"{"city": "Köln", "days": 2}"#), ("clock", "{}")]);
    assert_eq!(parse(&syntax::MINIMAX_M2, "]~b]ai\n<think>\n", text), want);
    let html = "<invoke name=\"x\"> and <minimax:tool_call> alone";
    assert_eq!(parse(&syntax::MINIMAX_M2, "", html), said("", html, &[]));
    let text = "]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name=\"get_weather\">]<]minimax[>[<city>Köln]<]minimax[>[</city>\
                ]<]minimax[>[<hours>]<]minimax[>[<item>1]<]minimax[>[</item>]<]minimax[>[<item>2]<]minimax[>[</item>]<]minimax[>[</hours>\
                ]<]minimax[>[<more>]<]minimax[>[<a>x]<]minimax[>[</a>]<]minimax[>[</more>]<]minimax[>[</invoke>\n\
                ]<]minimax[>[</tool_call>";
    let want = said("", "", &[("get_weather", r#"{"city": "Köln", "hours": [1,2], "more": {"a":"x"}}"#)]);
    assert_eq!(parse(&syntax::MINIMAX_M3, "", text), want);
}

#[test]
fn mistral() {
    let text = format!("Look.[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]clock[CALL_ID]abc123DEF[ARGS]{{}}");
    let want = said("", "Look.", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::MISTRAL, "", &text), want);
    let mut parser = AnswerParser::new(&syntax::MISTRAL, "", &tools()).with_seed(1);
    let ids: Vec<String> = parser.push(&text).into_iter().filter_map(id).collect();
    assert_eq!((ids[0].len(), ids[1].as_str()), (9, "abc123DEF"));
    let list = format!(
        "Look.[TOOL_CALLS] [{{\"name\": \"get_weather\", \"arguments\": {WEATHER}, \"id\": \"123456789\"}}, \
         {{\"name\": \"clock\", \"arguments\": {{}}}}]"
    );
    for syntax in [&syntax::MISTRAL, &syntax::MISTRAL_LIST] {
        assert_eq!(parse(syntax, "", &list), want);
    }
}

#[test]
fn granite() {
    let text = format!(
        "Look.<|tool_call|>[{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}, {{\"name\": \"clock\", \"arguments\": {{}}}}]"
    );
    let want = said("", "Look.", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::GRANITE, "", &text), want);
}

#[test]
fn hunyuan() {
    let parse = |tail: &str, text: &str| parse(&syntax::HUNYUAN, tail, text);
    let thought = "<think>\nHm.\n</think>\n";
    assert_eq!(parse("", &format!("{thought}<answer>\nYes.\n</answer>")), said("Hm.", "Yes.", &[]));
    // Without thinking, whichever part of its markup the prompt already has.
    for (tail, open) in [("", "<answer>\n"), ("<think>\n\n</think>\n", "<answer>\n"), ("</think>\n<answer>\n", "")] {
        assert_eq!(parse(tail, &format!("{open}Yes.\nNo.\n</answer>\n")), said("", "Yes.\nNo.", &[]), "{tail}");
        assert_eq!(parse(tail, &format!("{open}cut")), said("", "cut", &[]));
    }
    let calls = format!(
        "<tool_calls>[{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}, {{\"name\": \"clock\", \"arguments\": {{}}}}]</tool_calls>"
    );
    let want = [("get_weather", WEATHER), ("clock", "{}")];
    assert_eq!(parse("", &calls), said("", "", &want));
    assert_eq!(parse("", &format!("{thought}<answer>\nLook.\n{calls}\n</answer>")), said("Hm.", "Look.", &want));
    assert_eq!(parse("", &format!("{thought}{calls}")), said("Hm.", "", &want));
    // Answers may speak of marks; only what closes at the very end is one, and only where one was opened.
    let mention = "It writes <answer> and\n</answer> around it.";
    assert_eq!(parse("", mention), said("", mention, &[]));
    assert_eq!(parse("", &format!("<answer>\n{mention}\n</answer>")), said("", mention, &[]));
    assert_eq!(parse("", "Yes.\n</answer>"), said("", "Yes.\n</answer>", &[]));
    assert_eq!(parse("", "<answer>\n<answ"), said("", "<answ", &[]));
}

#[test]
fn hunyuan_3() {
    let plain = "<think>Hm.</think>Look.<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n\
         <arg_value>12\nKöln</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n\
         <tool_call>clock<tool_sep>\n</tool_call>\n</tool_calls>";
    let want = said("Hm.", "Look.", &[("get_weather", r#"{"city": "12\nKöln", "days": 2}"#), ("clock", "{}")]);
    let suffixed = plain.replace('>', ":opensource>");
    for (syntax, text) in [(&syntax::HUNYUAN_3_PLAIN, plain), (&syntax::HUNYUAN_3, &*suffixed)] {
        assert_eq!(parse(syntax, "", text), want);
        // Calls end thinking that nothing else ends, and the separator may be missing.
        let open = text.replace(syntax.think.close, "").replace("Look.", "");
        assert_eq!(parse(syntax, "", &open), Said { text: String::new(), ..want.clone() });
        let Calls::Tagged(tags) = &syntax.calls else { panic!("it has tags") };
        assert_eq!(parse(syntax, "", &text.replace(tags.name_ends[0].0, "")), want);
        let thinks = format!("<hy_Assistant>{}", syntax.think.open);
        assert_eq!(parse(syntax, &thinks, &text[syntax.think.open.len()..]), want);
    }
    // Each family knows only its own markers.
    assert_eq!(parse(&syntax::HUNYUAN_3, "", plain), said("", plain, &[]));
}

#[test]
fn llama() {
    let text = format!(
        "{{\"name\": \"get_weather\", \"parameters\": {WEATHER}}}; {{\"name\": \"clock\", \"parameters\": {{}}}}"
    );
    let want = said("", "", &[("get_weather", WEATHER), ("clock", "{}")]);
    assert_eq!(parse(&syntax::LLAMA_3, "", &text), want);
    assert_eq!(parse(&syntax::LLAMA_3, "", &format!("<|python_tag|>{text}")), want);
    assert_eq!(parse(&syntax::LLAMA_4, "", &format!("<|python_start|>{text}<|python_end|>")), want);
    let built_in = "<|python_tag|>brave_search.call(query=\"a \\\"b\\\"\")";
    assert_eq!(parse(&syntax::LLAMA_3, "", built_in), said("", "", &[("brave_search", r#"{"query": "a \"b\""}"#)]));
    let python = "[get_weather(city='Köln', hours=[1, 2], more={'a': None}), clock()]";
    let want =
        said("", "", &[("get_weather", r#"{"city": "Köln", "hours": [1, 2], "more": {"a": null}}"#), ("clock", "{}")]);
    assert_eq!(parse(&syntax::LLAMA_4, "", python), want);
    assert_eq!(parse(&syntax::LLAMA_4, "", &format!("<|python_start|>{python}<|python_end|>")), want);
    for answer in ["{\"name\": \"Bob\", \"parameters\": {}}", "{\"name\": \"clock\"}", "[1, 2]", "[a(b)](c)", "{"] {
        assert_eq!(parse(&syntax::LLAMA_3, "", answer), said("", answer, &[]));
        assert_eq!(parse(&syntax::LLAMA_4, "", answer), said("", answer, &[]));
    }
}

#[test]
fn harmony() {
    let text = format!(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>Well.<|end|>\
         <|start|>assistant<|channel|>commentary<|message|>Look.<|end|><|start|>assistant<|channel|>commentary \
         to=functions.get_weather <|constrain|>json<|message|>{WEATHER}<|call|>"
    );
    let want = said("Hm.\n\nWell.", "Look.", &[("get_weather", WEATHER)]);
    assert_eq!(parse(&syntax::HARMONY, "<|start|>assistant", &text), want);
    let text = " to=functions.clock<|channel|>commentary json<|message|>{}<|call|>";
    assert_eq!(parse(&syntax::HARMONY, "<|start|>assistant", text), said("", "", &[("clock", "{}")]));
    let text = "<|channel|>final<|message|>Yes. to=functions.x<|return|>";
    assert_eq!(parse(&syntax::HARMONY, "<|start|>assistant", text), said("", "Yes. to=functions.x", &[]));
    assert_eq!(parse(&syntax::HARMONY, "<|channel|>final<|message|>", "Yes."), said("", "Yes.", &[]));
    for text in ["just text", "<|channel|>fin", "<|message"] {
        assert_eq!(parse(&syntax::HARMONY, "", text), said("", text, &[]));
    }
}

/// Text outside of markup is passed on at once.
#[test]
fn nothing_is_held_back_without_need() {
    let mut parser = AnswerParser::new(&syntax::QWEN_XML, "", &tools());
    assert_eq!(parser.push("Hello"), [Piece::Text("Hello".into())]);
    assert_eq!(parser.push(" a < b\n"), [Piece::Text(" a < b".into())]);
    assert_eq!(parser.push("<tool_call>\n<function="), []);
    let pieces = parser.push("get_weather>");
    assert!(matches!(&pieces[..], [Piece::Call { index: 0, name, .. }, Piece::Arguments { delta, .. }]
        if name == "get_weather" && delta == "{"));
    let delta = |pieces: Vec<Piece>| match &pieces[..] {
        [Piece::Arguments { delta, .. }] => delta.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(delta(parser.push("\n<parameter=city>\nK")), "\"city\": \"K");
    assert_eq!(delta(parser.push("ö\"ln</")), "ö\\\"ln");
    assert_eq!(delta(parser.push("x")), "</x");
}

#[test]
fn ids_are_unique_and_follow_from_the_seed() {
    let call = "<tool_call>{\"name\":\"f\"}</tool_call>".repeat(3);
    let ids = |seed: Option<u64>| -> Vec<String> {
        let parser = AnswerParser::new(&syntax::HERMES, "", &tools());
        let mut parser = match seed {
            Some(seed) => parser.with_seed(seed),
            None => parser,
        };
        parser.push(&call).into_iter().filter_map(id).collect()
    };
    let first = ids(Some(1));
    assert!(first.iter().all(|id| id.len() == 29 && id.starts_with("call_")), "{first:?}");
    assert_eq!(first, ids(Some(1)));
    let mut all = [first, ids(Some(2)), ids(None), ids(None)].concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 12);
}

const SYNTAXES: [&Syntax; 22] = [
    &syntax::HERMES,
    &syntax::DEEPSEEK_V3,
    &syntax::DEEPSEEK_V31,
    &syntax::DEEPSEEK_V32,
    &syntax::DEEPSEEK_V4,
    &syntax::DEEPSEEK_V41,
    &syntax::KIMI_K2,
    &syntax::GLM_45,
    &syntax::GLM_47,
    &syntax::QWEN_XML,
    &syntax::HARMONY,
    &syntax::MINIMAX_M2,
    &syntax::MINIMAX_M3,
    &syntax::GEMMA_4,
    &syntax::MISTRAL_LIST,
    &syntax::MISTRAL,
    &syntax::GRANITE,
    &syntax::LLAMA_3,
    &syntax::LLAMA_4,
    &syntax::HUNYUAN,
    &syntax::HUNYUAN_3_PLAIN,
    &syntax::HUNYUAN_3,
];

/// An answer with two calls for each family. `@` represents the arguments.
const ANSWERS: [&str; 22] = [
    "a\n<tool_call>\n{\"name\": \"clock\", \"arguments\": @}\n</tool_call>\n<tool_call>{\"arguments\": @, \"name\": \"clock\"}</tool_call>\n",
    "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n@\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n@\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>@<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>@<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "a\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"clock\">\n<｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n<｜DSML｜parameter name=\"b\" string=\"false\">@</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name=\"clock\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "a\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"clock\">\n<｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n<｜DSML｜parameter name=\"b\">@</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    "a\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name=\"clock\">\n<｜DSML｜ parameter name=\"a\" string=\"true\">x</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>",
    "a<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>@<|tool_call_end|><|tool_call_begin|>clock<|tool_call_argument_begin|>@<|tool_call_end|><|tool_calls_section_end|>",
    "a\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n<arg_key>days</arg_key>\n<arg_value>@</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>",
    "a<tool_call>get_weather<arg_key>city</arg_key><arg_value>x</arg_value><arg_key>days</arg_key><arg_value>@</arg_value></tool_call><tool_call>clock</tool_call>",
    "a\n<tool_call>\n<function=get_weather>\n<parameter=city>\nx\n</parameter>\n<parameter=more>\n@\n</parameter>\n</function>\n</tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|><|start|>assistant to=functions.clock<|channel|>commentary json<|message|>@<|call|>",
    "a\n<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">x</parameter>\n<parameter name=\"days\">@</parameter>\n</invoke>\n<invoke name=\"clock\">\n</invoke>\n</minimax:tool_call>",
    "a]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name=\"get_weather\">]<]minimax[>[<city>x]<]minimax[>[</city>]<]minimax[>[<hours>]<]minimax[>[<item>1]<]minimax[>[</item>]<]minimax[>[</hours>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
    "a<|tool_call>call:get_weather{city:<|\"|>x<|\"|>,more:@}<tool_call|><|tool_call>call:clock{}<tool_call|>",
    "a[TOOL_CALLS] [{\"name\": \"clock\", \"arguments\": @, \"id\": \"123456789\"}, {\"name\": \"clock\", \"arguments\": @}]",
    "a[TOOL_CALLS]clock[ARGS]@[TOOL_CALLS]clock[CALL_ID]abc123DEF[ARGS]@",
    "a<|tool_call|>[{\"name\": \"clock\", \"arguments\": @}, {\"name\": \"clock\", \"arguments\": @}]",
    "{\"name\": \"clock\", \"parameters\": @}; {\"name\": \"clock\", \"parameters\": @}<|python_tag|>x.call(a=\"b\")",
    "<|python_start|>[clock(), get_weather(city='x', hours=[1, {'a': None}])]<|python_end|>",
    "<answer>\na<tool_calls>[{\"name\": \"clock\", \"arguments\": @}, {\"name\": \"clock\", \"arguments\": @}]</tool_calls>\n</answer>",
    "a<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n<arg_key>more</arg_key>\n<arg_value>@</arg_value>\n</tool_call>\n<tool_call>clock<tool_sep>\n</tool_call>\n</tool_calls>",
    "a<tool_calls:opensource>\n<tool_call:opensource>get_weather<tool_sep:opensource>\n<arg_key:opensource>city</arg_key:opensource>\n<arg_value:opensource>x</arg_value:opensource>\n<arg_key:opensource>more</arg_key:opensource>\n<arg_value:opensource>@</arg_value:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
];

/// Pieces of answers, well formed or not.
const BITS: [&str; 78] = [
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "\n",
    "\n\n",
    " ",
    "a",
    "é",
    "\u{1f980}",
    "<",
    ">",
    "</",
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "(",
    ")",
    "=",
    "1",
    "true",
    "text and more",
    "get_weather",
    "clock",
    "city",
    "days",
    "more",
    "{\"name\": \"get_weather\", ",
    "\"arguments\": ",
    "\"parameters\": ",
    "{\"city\": \"x\"}",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<function=get_weather>",
    "</function>",
    "<parameter=city>",
    "<parameter=days>",
    "</parameter>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=\"get_weather\">",
    "<parameter name=\"days\">",
    "</invoke>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "```json\n",
    "\n```",
    "<｜tool▁call▁end｜>",
    "<｜DSML｜function_calls>",
    "<｜DSML｜invoke name=\"clock\">",
    "<｜DSML｜parameter name=\"more\" string=\"false\">",
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
    "<|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "]<]minimax[>[<city>",
    "<|\"|>",
    "<tool_call|>",
    "<|channel|>commentary to=functions.clock ",
    "<|message|>",
    "<|end|>",
    "<answer>",
    "</answer>",
    "<tool_calls>",
    "</tool_calls>",
    "<tool_call>get_weather<tool_sep>",
    "<tool_call:opensource>clock<tool_sep:opensource>",
];

/// The last character boundary up to a byte.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&at| text.is_char_boundary(at)).unwrap()
}

#[test]
fn the_samples_are_well_formed() {
    for (syntax, answer) in SYNTAXES.iter().zip(ANSWERS) {
        let said = parse(syntax, "", &answer.replace('@', "{\"a\": 1}"));
        assert!(!said.calls.is_empty(), "{}", syntax.name);
        for (_, arguments) in &said.calls {
            assert!(serde_json::from_str::<Value>(arguments).unwrap().is_object(), "{}: {arguments}", syntax.name);
        }
        assert!(said.text.len() <= 1, "{}: {}", syntax.name, said.text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// An answer has the same contents however it is cut.
    #[test]
    fn cuts_do_not_matter(
        which in 0..SYNTAXES.len(),
        thinks in any::<bool>(),
        bits in prop::collection::vec(prop::sample::select(&BITS[..]), 0..24),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let text = bits.concat();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundary(&text, cut.index(text.len() + 1))).collect();
        cuts.sort_unstable();
        let tail = if thinks { "<think>\n" } else { "" };
        let tools = tools();
        let whole = parse_cut(SYNTAXES[which], tail, &text, &[], &tools);
        prop_assert_eq!(&parse_cut(SYNTAXES[which], tail, &text, &cuts, &tools), &whole);
        let every: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        prop_assert_eq!(&parse_cut(SYNTAXES[which], tail, &text, &every, &tools), &whole);
    }

    /// The same for answers that are well formed except for a mistake or two.
    #[test]
    fn cuts_do_not_matter_in_calls(
        which in 0..SYNTAXES.len(),
        arguments in prop::sample::select(&["{\"a\": \"</\\\"x\"}", "{}", "\"{}\"", "[1, {", "7 ", "a < b\n", "{\"a\": 1}}"][..]),
        bit in prop::sample::select(&BITS[..]),
        place in any::<prop::sample::Index>(),
        gone in 0..4usize,
        thinks in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut text = ANSWERS[which].replace('@', arguments);
        let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        let at = place.index(boundaries.len());
        let end = boundaries.get(at + gone).copied().unwrap_or(text.len());
        text.replace_range(boundaries[at]..end, if gone == 3 { "" } else { bit });
        let tail = if thinks { "<think>" } else { "" };
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundary(&text, cut.index(text.len() + 1))).collect();
        cuts.sort_unstable();
        let tools = tools();
        let whole = parse_cut(SYNTAXES[which], tail, &text, &[], &tools);
        prop_assert_eq!(&parse_cut(SYNTAXES[which], tail, &text, &cuts, &tools), &whole);
        let every: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        prop_assert_eq!(&parse_cut(SYNTAXES[which], tail, &text, &every, &tools), &whole);
    }

    /// Without tools and thinking, an answer is its text. Only line breaks at its beginning are dropped.
    #[test]
    fn no_text_is_lost(
        which in 0..SYNTAXES.len(),
        bits in prop::collection::vec(prop::sample::select(&BITS[..]), 0..24),
    ) {
        let text = "x".to_owned() + &bits.concat();
        // A marker of this family always belongs to a message.
        if matches!(SYNTAXES[which].calls, Calls::Harmony) {
            return Ok(());
        }
        let said = parse_cut(SYNTAXES[which], "", &text, &[], &Tools::default());
        prop_assert_eq!(said, self::said("", &text, &[]));
    }

    /// Tags always become JSON, whatever the parameters contain.
    #[test]
    fn parameters_become_json(city in "[^<\\]\u{ff5c}]{0,40}", days in any::<i64>()) {
        let city = city.trim_matches('\n');
        let tools = tools();
        for (syntax, text) in [
            (&syntax::QWEN_XML, format!("<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n</parameter>\n</function>\n</tool_call>")),
            (&syntax::GLM_45, format!("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>{days}</arg_value>\n</tool_call>")),
            (&syntax::HUNYUAN_3_PLAIN, format!("<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>{days}</arg_value>\n</tool_call>\n</tool_calls>")),
            (&syntax::MINIMAX_M2, format!("<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">{city}</parameter>\n<parameter name=\"days\">{days}</parameter>\n</invoke>\n</minimax:tool_call>")),
            (&syntax::DEEPSEEK_V4, format!("<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">{city}</｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">{days}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>")),
        ] {
            let said = parse_cut(syntax, "", &text, &[], &tools);
            prop_assert_eq!(said.calls.len(), 1, "{}", text);
            let arguments: Value = serde_json::from_str(&said.calls[0].1).unwrap();
            prop_assert_eq!(arguments, json!({"city": city, "days": days}));
        }
    }
}

//! Grammars, tested with llguidance: the answers that they allow are those that the parser understands.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::*;
use crate::parser::{AnswerParser, Piece};

/// Every byte is a token. After them come the special tokens and the end token.
fn environment(special: &[(&'static str, u32)]) -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    for (marker, id) in special {
        assert_eq!(words.len(), *id as usize);
        words.push([b"\xff", marker.as_bytes()].concat());
    }
    words.push(b"\xff<|eos|>".to_vec());
    let end = words.len() as u32 - 1;
    Arc::new(ApproximateTokEnv::new(TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words)))
}

fn matcher(grammar: &str, special: &[(&'static str, u32)]) -> Matcher {
    let factory = ParserFactory::new_simple(&environment(special)).unwrap();
    let parser = factory.create_parser(TopLevelGrammar::from_lark(grammar.to_owned()));
    Matcher::new(Ok(parser.unwrap_or_else(|e| panic!("{e}\n{grammar}"))))
}

/// How many bytes of a text the grammar allows, and whether the answer may end there.
fn passes(grammar: &str, special: &[(&'static str, u32)], text: &str) -> (usize, bool) {
    let mut matcher = matcher(grammar, special);
    let mut at = 0;
    while at < text.len() {
        let found = special.iter().find(|(marker, _)| text[at..].starts_with(marker));
        let (token, length) = match found {
            Some((marker, id)) => (*id, marker.len()),
            None => (u32::from(text.as_bytes()[at]), 1),
        };
        match matcher.try_consume_tokens(&[token]) {
            Ok(1) => at += length,
            _ => return (at, false),
        }
    }
    (at, matcher.is_accepting().unwrap())
}

fn tools(strict: bool) -> Tools {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    let weather =
        json!({"type": "function", "function": {"name": "get_weather", "strict": strict, "parameters": parameters}});
    Tools::from_openai(&json!([weather, {"type": "function", "function": {"name": "clock"}}])).unwrap()
}

fn grammar(syntax: &'static Syntax, special: &[(&'static str, u32)], choice: &ToolChoice, tail: &str) -> String {
    tool_grammar(syntax, special, &tools(true), (choice, true), tail).unwrap()
}

/// A family, an answer with a correct call, and the same with a call that the schema forbids.
fn samples() -> Vec<(&'static Syntax, String, String)> {
    let right = r#"{"city": "a b", "days": 2}"#;
    let wrong = r#"{"city": "a b", "days": "x"}"#;
    let json = |syntax, before: &str, behind: &str| {
        (syntax, format!("{before}{right}{behind}"), format!("{before}{wrong}{behind}"))
    };
    let tags = |syntax, text: &str| (syntax, text.replace('@', "2"), text.replace('@', "x"));
    vec![
        json(&syntax::HERMES, "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": ", "}\n</tool_call>"),
        json(
            &syntax::DEEPSEEK_V3,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n",
            "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        json(
            &syntax::DEEPSEEK_V31,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        json(
            &syntax::KIMI_K2,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>",
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
        json(&syntax::MISTRAL, "[TOOL_CALLS]get_weather[ARGS]", ""),
        json(&syntax::MISTRAL_LIST, "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": ", "}]"),
        json(&syntax::GRANITE, "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": ", "}]"),
        json(&syntax::HUNYUAN, "<tool_calls>[{\"name\": \"get_weather\", \"arguments\": ", "}]</tool_calls>"),
        json(&syntax::LLAMA_3, "{\"name\": \"get_weather\", \"parameters\": ", "}"),
        json(&syntax::LLAMA_4, "{\"name\": \"get_weather\", \"parameters\": ", "}"),
        json(&syntax::HARMONY, "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>", ""),
        tags(&syntax::DEEPSEEK_V32, &dsml("function_calls")),
        tags(&syntax::DEEPSEEK_V4, &dsml("tool_calls")),
        tags(&syntax::DEEPSEEK_V41, &dsml(" calls").replace("DSML｜in", "DSML｜ in").replace("DSML｜pa", "DSML｜ pa")),
        tags(&syntax::HUNYUAN_3_PLAIN, HUNYUAN_3),
        tags(&syntax::HUNYUAN_3, &HUNYUAN_3.replace('>', ":opensource>")),
        tags(
            &syntax::GLM_45,
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a b</arg_value>\n<arg_key>days</arg_key>\n\
             <arg_value>@</arg_value>\n</tool_call>",
        ),
        tags(
            &syntax::GLM_47,
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a b</arg_value><arg_key>days</arg_key>\
             <arg_value>@</arg_value></tool_call>",
        ),
        tags(
            &syntax::QWEN_XML,
            "<tool_call>\n<function=get_weather>\n<parameter=city>\na b\n</parameter>\n<parameter=days>\n@\n</parameter>\n\
             </function>\n</tool_call>",
        ),
        tags(
            &syntax::MINIMAX_M2,
            "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">a b</parameter>\n\
             <parameter name=\"days\">@</parameter>\n</invoke>\n</minimax:tool_call>",
        ),
        (
            &syntax::GEMMA_4,
            "<|tool_call>call:get_weather{city:<|\"|>a b<|\"|>,days:2}<tool_call|>".into(),
            "<|tool_call>call:unknown{days:2}<tool_call|>".into(),
        ),
        tags(
            &syntax::MINIMAX_M3,
            "]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name=\"get_weather\">]<]minimax[>[<city>a b]<]minimax[>[</city>\
             ]<]minimax[>[<days>@]<]minimax[>[</days>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
        ),
    ]
}

const HUNYUAN_3: &str = "<tool_calls>\n<tool_call>get_weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>a b</arg_value>\n\
    <arg_key>days</arg_key>\n<arg_value>@</arg_value>\n</tool_call>\n</tool_calls>";

fn dsml(section: &str) -> String {
    format!(
        "<｜DSML｜{section}>\n<｜DSML｜invoke name=\"get_weather\">\n\
         <｜DSML｜parameter name=\"city\" string=\"true\">a b</｜DSML｜parameter>\n\
         <｜DSML｜parameter name=\"days\" string=\"false\">@</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜{section}>"
    )
}

/// All markers of a family as special tokens.
fn all_special(syntax: &Syntax) -> Vec<(&'static str, u32)> {
    let single = |marker: &&str| !marker.contains(' ') && !marker.contains('\n') && *marker != "\">" && *marker != ">";
    let plain = ["<parameter=", "<parameter name=\"", "</parameter>", "</function>", "</invoke>"];
    let tokens = markers(syntax)
        .into_iter()
        .filter(single)
        .filter(|m| !plain.contains(m) && !m.contains("｜DSML｜") || *m == "｜DSML｜");
    // Longer ones contain this one.
    let tokens = tokens.filter(|marker| !marker.contains(syntax::M3) || *marker == syntax::M3);
    // In this family, the first word of thinking belongs to the marker.
    let tokens = tokens.filter(|marker| *marker != syntax::GEMMA_4.think.open);
    tokens.zip(256..).collect()
}

#[test]
fn calls_pass_and_wrong_ones_do_not() {
    for (syntax, right, wrong) in samples() {
        for special in [Vec::new(), all_special(syntax)] {
            for (choice, before) in [
                (ToolChoice::Required, ""),
                (ToolChoice::Named("get_weather".into()), ""),
                (ToolChoice::Auto, ""),
                (ToolChoice::Auto, "Let me look.\n"),
            ] {
                let grammar = grammar(syntax, &special, &choice, "");
                let bare =
                    matches!(syntax.calls, Calls::Harmony | Calls::Python | Calls::Objects(Objects { bare: true, .. }));
                let before = if bare { "" } else { before };
                let text = format!("{before}{right}");
                let found = passes(&grammar, &special, &text);
                assert_eq!(found, (text.len(), true), "{} {choice:?} {text}\n{grammar}", syntax.name);
                let text = format!("{before}{wrong}");
                let found = passes(&grammar, &special, &text);
                assert!(!found.1, "{} {choice:?} {text}\n{grammar}", syntax.name);
            }
        }
    }
}

#[test]
fn what_passes_is_parsed_as_calls() {
    for (syntax, right, _) in samples() {
        let mut parser = AnswerParser::new(syntax, "", &tools(true));
        let mut pieces = parser.push(&right);
        pieces.extend(parser.finish());
        let arguments: String = pieces
            .iter()
            .map(|piece| match piece {
                Piece::Arguments { delta, .. } => delta.as_str(),
                _ => "",
            })
            .collect();
        let arguments: Value = serde_json::from_str(&arguments).unwrap();
        assert_eq!(arguments, json!({"city": "a b", "days": 2}), "{}", syntax.name);
    }
}

#[test]
fn thinking_may_come_first() {
    for (syntax, right, wrong) in samples() {
        let Calls::Harmony = syntax.calls else {
            let (open, close) = (syntax.think.open, syntax.think.close);
            for special in [Vec::new(), all_special(syntax)] {
                for choice in [ToolChoice::Required, ToolChoice::Auto] {
                    let grammar = grammar(syntax, &special, &choice, &format!("{open}\n"));
                    let text = format!("Hm < \n{close}\n\n{right}");
                    let found = passes(&grammar, &special, &text);
                    assert_eq!(found, (text.len(), true), "{} {text}\n{grammar}", syntax.name);
                    assert!(!passes(&grammar, &special, &format!("Hm{close}\n\n{wrong}")).1, "{}", syntax.name);
                    let closed = self::grammar(syntax, &special, &choice, "");
                    let text = format!("{open}Hm{close}{right}");
                    assert_eq!(passes(&closed, &special, &text), (text.len(), true), "{}\n{closed}", syntax.name);
                }
            }
            continue;
        };
        let text = format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{right}");
        for special in [Vec::new(), all_special(syntax)] {
            let grammar = grammar(syntax, &special, &ToolChoice::Required, "<|start|>assistant");
            assert_eq!(passes(&grammar, &special, &text), (text.len(), true), "{grammar}");
        }
    }
}

#[test]
fn text_alone_passes_only_where_the_model_decides() {
    for (syntax, ..) in samples() {
        let text = match syntax.calls {
            Calls::Harmony => "<|channel|>final<|message|>Hello",
            _ => "Hello\n< there",
        };
        for special in [Vec::new(), all_special(syntax)] {
            let free = grammar(syntax, &special, &ToolChoice::Auto, "");
            assert_eq!(passes(&free, &special, text), (text.len(), true), "{}\n{free}", syntax.name);
            let bound = grammar(syntax, &special, &ToolChoice::Required, "");
            assert!(!passes(&bound, &special, text).1, "{}", syntax.name);
        }
    }
}

#[test]
fn one_or_several_calls() {
    let call = "<tool_call>\n{\"name\": \"clock\", \"arguments\": {\"any\": [1]}}\n</tool_call>";
    let two = format!("{call}\n{call}");
    let write =
        |parallel| tool_grammar(&syntax::HERMES, &[], &tools(false), (&ToolChoice::Required, parallel), "").unwrap();
    assert_eq!(passes(&write(true), &[], &two), (two.len(), true));
    assert!(!passes(&write(false), &[], &two).1);
    assert_eq!(passes(&write(false), &[], call), (call.len(), true));
}

#[test]
fn nothing_is_constrained_without_need() {
    let none =
        |tools: &Tools, choice: &ToolChoice| tool_grammar(&syntax::HERMES, &[], tools, (choice, true), "").is_none();
    assert!(none(&tools(false), &ToolChoice::Auto));
    assert!(none(&tools(true), &ToolChoice::None));
    assert!(none(&Tools::default(), &ToolChoice::Required));
    assert!(none(&tools(true), &ToolChoice::Named("other".into())));
    assert!(!none(&tools(true), &ToolChoice::Auto));
}

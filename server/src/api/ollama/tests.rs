use serde_json::{Value, json};
use sluice_dialect::Piece;

use super::reply::{Head, OllamaFold, OllamaWriter, Shape};
use super::request::lets_go;
use super::{ChatRequest, GenerateRequest};
use crate::answer::{Ending, Step, Usage, Waiting, Why};
use crate::ask::{Ask, Chat, Input, TextForm};
use crate::error::{ApiError, Kind};
use crate::reply::{Events, Fold, Writer};

fn chat(body: Value) -> Result<Ask, ApiError> {
    serde_json::from_value::<ChatRequest>(body).unwrap().into_ask()
}

fn generate(body: Value) -> Result<Ask, ApiError> {
    serde_json::from_value::<GenerateRequest>(body).unwrap().into_ask()
}

fn messages(chat: Chat) -> Vec<Value> {
    chat.messages.into_iter().map(|message| message.fields.into()).collect()
}

#[test]
fn calls_and_results_find_each_other() {
    let call = |name: &str, arguments: Value| json!({"function": {"name": name, "arguments": arguments}});
    let ask = chat(json!({"model": "m", "messages": [
        {"role": "user", "content": "Weather in Bonn and Rome, and the time?", "images": []},
        {"role": "assistant", "content": "", "thinking": "Two places.", "tool_calls": [
            call("weather", json!({"city": "Bonn"})), call("time", json!({})), call("weather", json!({"city": "Rome"})),
        ]},
        {"role": "tool", "tool_name": "weather", "content": "Rain"},
        {"role": "tool", "content": "12:00"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Sun"},
        {"role": "tool", "tool_name": "stray", "content": "?"},
    ]}));
    let Input::Chat(chat) = ask.unwrap().input else { panic!() };
    assert!(!chat.continues);
    let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let result = |id: &str, name: &str, content: &str| json!({"role": "tool", "tool_call_id": id, "name": name, "content": content});
    assert_eq!(
        messages(chat),
        [
            json!({"role": "user", "content": "Weather in Bonn and Rome, and the time?"}),
            json!({"role": "assistant", "content": null, "reasoning_content": "Two places.", "tool_calls": [
                call("call_0", "weather", "{\"city\":\"Bonn\"}"),
                call("call_1", "time", "{}"),
                call("call_2", "weather", "{\"city\":\"Rome\"}"),
            ]}),
            result("call_0", "weather", "Rain"),
            result("call_1", "time", "12:00"),
            result("call_2", "weather", "Sun"),
            result("call_3", "stray", "?"),
        ]
    );
}

#[test]
fn options_are_taken_over() {
    let ask = generate(json!({
        "model": "m", "prompt": "Why?", "system": "Be brief.", "format": "json", "think": "high", "keep_alive": "5m",
        "options": {
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "num_predict": 9, "num_ctx": 4096,
            "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 1, "stop": ["\n"],
        },
    }));
    let ask = ask.unwrap();
    let settings = &ask.settings;
    assert_eq!((settings.temperature, settings.top_p, settings.top_k), (Some(0.5), Some(0.9), Some(40)));
    assert_eq!((settings.min_p, settings.seed, settings.max_tokens), (Some(0.05), Some(7), Some(9)));
    assert_eq!((settings.penalties.presence, settings.penalties.frequency), (0.5, 1.0));
    assert_eq!((settings.repetition_penalty, &settings.stop), (Some(1.1), &vec!["\n".to_owned()]));
    assert_eq!((ask.thinking.enabled, ask.thinking.effort.as_deref()), (Some(true), Some("high")));
    assert_eq!(ask.form, TextForm::JsonObject);
    let Input::Chat(told) = ask.input else { panic!() };
    let told = messages(told);
    assert_eq!(told, [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "Why?"})]);
    let endless = generate(json!({"prompt": "x", "options": {"num_predict": -1, "seed": -1}})).unwrap();
    assert_eq!((endless.settings.max_tokens, endless.settings.seed), (None, None));
    let raw = generate(json!({"prompt": "Once", "raw": true})).unwrap();
    assert!(matches!(raw.input, Input::Text(text) if text == "Once"));
    let after = generate(json!({"prompt": "And?", "context": [1, 2]})).unwrap();
    assert!(matches!(after.input, Input::After { before, .. } if before == [1, 2]));
    let schema = generate(json!({"prompt": "x", "format": {"type": "object"}})).unwrap();
    assert_eq!(schema.form, TextForm::JsonSchema(json!({"type": "object"})));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (more, field) in [
        (json!({"suffix": "end"}), "suffix"),
        (json!({"images": ["aGk="]}), "images"),
        (json!({"template": "{{ .Prompt }}"}), "template"),
        (json!({"raw": true, "system": "s"}), "raw"),
        (json!({"format": "xml"}), "format"),
        (json!({"think": 3}), "think"),
        (json!({"options": {"temperature": 3}}), "options.temperature"),
        (json!({"options": {"repeat_penalty": 0}}), "options.repeat_penalty"),
        (json!({"options": {"top_k": -1}}), "options.top_k"),
        (json!({"options": {"presence_penalty": 3}}), "options.presence_penalty"),
        (json!({"options": {"stop": ""}}), "options.stop"),
    ] {
        let mut body = json!({"prompt": "x"});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        let error = generate(body).expect_err(field);
        assert_eq!(error.param.as_deref(), Some(field));
    }
    for (message, field) in [
        (json!({"role": "user", "content": "?", "images": ["aGk="]}), "messages[0].images"),
        (json!({"role": "user", "content": []}), "messages[0].content"),
        (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls"),
        (json!({"role": "bot", "content": ""}), "messages[0].role"),
    ] {
        assert_eq!(chat(json!({"messages": [message]})).expect_err(field).param.as_deref(), Some(field));
    }
}

#[test]
fn zero_lets_a_model_go() {
    assert!([json!(0), json!("0"), json!("0s")].iter().all(lets_go));
    assert!(![json!(null), json!(-1), json!("5m"), json!("10s"), json!(300)].iter().any(lets_go));
}

fn steps() -> Vec<Step> {
    let piece = |piece| Step::Piece(piece, Vec::new());
    let call = |index: usize, name: &str| piece(Piece::Call { index, id: format!("id{index}"), name: name.into() });
    let more = |index: usize, delta: &str| piece(Piece::Arguments { index, delta: delta.into() });
    vec![
        Step::Waiting(Waiting::Queued { ahead: 1 }),
        piece(Piece::Thinking("Hm.".into())),
        piece(Piece::Text("Let ".into())),
        piece(Piece::Text("me.".into())),
        call(0, "f"),
        more(0, "{\"x\":"),
        more(0, "1}"),
        call(1, "g"),
        Step::End(Ending { why: Why::Calls, usage: Usage { prompt: 10, cached: 0, generated: 5, thinking: 1 } }),
    ]
}

fn lines(shape: Shape, steps: Vec<Step>) -> Vec<Value> {
    let mut writer = OllamaWriter::new(Head::new("m:latest".into(), shape), None);
    let mut out = Events::default();
    writer.begin(&mut out);
    steps.into_iter().for_each(|step| writer.step(0, step, &mut out));
    writer.end(&mut out);
    out.as_str().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_stream_has_an_object_a_line() {
    let lines = lines(Shape::Chat, steps());
    let call = |index: usize, name: &str, arguments: Value| json!([{"id": format!("id{index}"), "function": {"index": index, "name": name, "arguments": arguments}}]);
    let told: Vec<&Value> = lines.iter().map(|line| &line["message"]).collect();
    assert_eq!(
        told,
        [
            &json!({"role": "assistant", "content": ""}),
            &json!({"role": "assistant", "content": "", "thinking": "Hm."}),
            &json!({"role": "assistant", "content": "Let "}),
            &json!({"role": "assistant", "content": "me."}),
            &json!({"role": "assistant", "content": "", "tool_calls": call(0, "f", json!({"x": 1}))}),
            &json!({"role": "assistant", "content": "", "tool_calls": call(1, "g", json!({}))}),
            &json!({"role": "assistant", "content": ""}),
        ]
    );
    let (last, before) = lines.split_last().unwrap();
    assert!(before.iter().all(|line| line["done"] == false && line["model"] == "m:latest"));
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("stop")));
    assert_eq!((&last["prompt_eval_count"], &last["eval_count"]), (&json!(10), &json!(5)));
    let time = |name: &str| last[name].as_u64().unwrap();
    let parts = ["load_duration", "prompt_eval_duration", "eval_duration"].map(time);
    assert_eq!(parts.iter().sum::<u64>(), time("total_duration"));
}

#[test]
fn an_error_in_the_middle_is_the_last_line() {
    let mut steps = steps();
    steps.truncate(3);
    steps.push(Step::Failed(ApiError::new(Kind::Internal, "the drive is gone")));
    let lines = lines(Shape::Generate, steps);
    assert_eq!(lines[1]["thinking"], "Hm.");
    assert_eq!(lines[2]["response"], "Let ");
    assert_eq!(lines.last(), Some(&json!({"error": "the drive is gone"})));
}

#[test]
fn the_whole_object_has_everything() {
    let mut fold = OllamaFold::new(Head::new("m".into(), Shape::Chat), None);
    steps().into_iter().for_each(|step| fold.step(0, step).unwrap());
    let whole = Box::new(fold).finish();
    let message = &whole["message"];
    assert_eq!((&message["content"], &message["thinking"]), (&json!("Let me."), &json!("Hm.")));
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 2);
    assert_eq!(whole["done"], true);
    let nothing = Head::new("m".into(), Shape::Generate).nothing("load");
    assert_eq!((&nothing["done_reason"], &nothing["response"]), (&json!("load"), &json!("")));
}

use serde_json::{Value, json};
use sluice_dialect::Piece;

use super::{MessageFold, MessageWriter, MessagesRequest};
use crate::answer::{Ending, Step, Usage, Waiting, Why};
use crate::ask::{Ask, Chat, Input, TextForm, ToolChoice};
use crate::error::{ApiError, Kind};
use crate::hygiene;
use crate::options::ServerOptions;
use crate::reply::{Events, Fold, Writer};

fn request(more: Value) -> Result<Ask, ApiError> {
    let mut body = json!({"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    serde_json::from_value::<MessagesRequest>(body).unwrap().into_ask()
}

fn chat(ask: Ask) -> Chat {
    match ask.input {
        Input::Chat(chat) => chat,
        other => panic!("{other:?}"),
    }
}

fn messages(more: Value) -> Vec<Value> {
    chat(request(more).unwrap()).messages.into_iter().map(|message| message.fields.into()).collect()
}

fn wrong_field(more: Value) -> String {
    request(more.clone()).expect_err(&more.to_string()).param.unwrap()
}

#[test]
fn a_turn_of_an_agent_becomes_messages_of_a_template() {
    let cached = json!({"type": "ephemeral"});
    let told = messages(json!({
        "system": [
            {"type": "text", "text": "You are Claude Code.", "cache_control": cached},
            {"type": "text", "text": "Be brief."},
        ],
        "metadata": {"user_id": "user_0"},
        "betas": ["interleaved-thinking-2025-05-14"],
        "context_management": {"edits": []},
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "<system-reminder>\nIt is Saturday.\n</system-reminder>"},
                {"type": "text", "text": "What is here?", "cache_control": cached},
            ]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "EqQB"},
                {"type": "redacted_thinking", "data": "EmwK"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls", "timeout": 5}},
                {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "text", "text": "Go on."},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "No such file", "is_error": true},
            ]},
        ],
    }));
    let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    assert_eq!(
        told,
        [
            json!({"role": "system", "content": "You are Claude Code.\n\nBe brief."}),
            json!({"role": "user", "content": "<system-reminder>\nIt is Saturday.\n</system-reminder>\n\nWhat is here?"}),
            json!({"role": "assistant", "content": "Let me look.", "reasoning_content": "I look.", "tool_calls": [
                call("toolu_1", "Bash", "{\"command\":\"ls\",\"timeout\":5}"),
                call("toolu_2", "Read", "{}"),
            ]}),
            json!({"role": "tool", "tool_call_id": "toolu_1", "name": "Bash", "content": "a\nb"}),
            json!({"role": "tool", "tool_call_id": "toolu_2", "name": "Read", "content": "Error: No such file"}),
            json!({"role": "user", "content": "Go on."}),
        ]
    );
}

/// Two calls of Claude Code in one session: the billing line differs, and the conversation continues.
#[test]
fn the_second_call_of_an_agent_begins_like_the_first() {
    let call = |cch: &str, more: &[Value]| {
        let reminder = "<system-reminder>\nAs you answer the user's questions, you can use the following context:\n# currentDate\n\
                        Today's date is 2026-11-28.\n\n      IMPORTANT: this context may or may not be relevant to your tasks.\n\
                        </system-reminder>\n";
        let billing = format!("x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={cch};");
        let cached = json!({"type": "ephemeral", "ttl": "1h"});
        let mut conversation = vec![json!({"role": "user", "content": [
            {"type": "text", "text": reminder},
            {"type": "text", "text": "Fix the test.", "cache_control": cached},
        ]})];
        conversation.extend_from_slice(more);
        let mut ask = request(json!({
            "model": "claude-sonnet-4-5-20250929",
            "system": [
                {"type": "text", "text": billing},
                {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude.", "cache_control": cached},
                {"type": "text", "text": "\nYou are an interactive CLI tool.\n\n<env>\nPlatform: linux\n</env>", "cache_control": cached},
            ],
            "tools": [{"name": "Bash", "description": "Runs.", "input_schema": {"type": "object", "properties": {}}}],
            "thinking": {"type": "adaptive"},
            "metadata": {"user_id": "user_1_account__session_2"},
            "messages": conversation,
            "stream": true,
        }))
        .unwrap();
        hygiene::apply(&ServerOptions { normalise: true, ..ServerOptions::default() }, &mut ask);
        chat(ask).messages
    };
    let first = call("36ee5", &[]);
    let second = call(
        "0aaa9",
        &[
            json!({"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}]}),
            json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}]}),
        ],
    );
    assert_eq!(second[..first.len()], first);
    assert_eq!(second.len(), first.len() + 2);
}

#[test]
fn turns_of_one_role_are_one_and_the_system_may_speak_later() {
    let told = messages(json!({"messages": [
        {"role": "system", "content": "First."},
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "Three."},
        {"role": "system", "content": "Plan mode is on."},
    ]}));
    assert_eq!(
        told,
        [
            json!({"role": "system", "content": "First."}),
            json!({"role": "user", "content": "One.\n\nTwo."}),
            json!({"role": "assistant", "content": "Abcd"}),
            json!({"role": "user", "content": "Three.\n\n<system-reminder>\nPlan mode is on.\n</system-reminder>"}),
        ]
    );
}

#[test]
fn an_assistants_last_message_is_continued() {
    let last = |content: Value| {
        let messages = json!([{"role": "user", "content": "JSON, please."}, {"role": "assistant", "content": content}]);
        request(json!({"messages": messages})).map(chat)
    };
    let continued = last(json!([{"type": "text", "text": "{\"a\":"}])).unwrap();
    assert!(continued.continues);
    assert_eq!(continued.messages[1].fields["content"], "{\"a\":");
    let empty = last(json!("")).unwrap();
    assert!(!empty.continues, "there is nothing to continue");
    assert_eq!(empty.messages.len(), 1);
    let calls = last(json!([{"type": "tool_use", "id": "t", "name": "f", "input": {}}])).unwrap_err();
    assert_eq!(calls.param.as_deref(), Some("messages[1]"));
}

#[test]
fn what_the_models_cannot_read_is_refused_by_name() {
    for kind in ["image", "document", "search_result", "server_tool_use", "container_upload"] {
        let error = request(
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": kind}]}]}),
        );
        let error = error.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages[0].content[1]"), "{kind}");
        assert!(error.message.contains(kind), "{}", error.message);
    }
    let call = json!({"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]});
    let image = json!({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]});
    let messages = json!([call, {"role": "user", "content": [image]}]);
    assert_eq!(wrong_field(json!({"messages": messages})), "messages[1].content[0].content[0]");
}

#[test]
fn impossible_values_are_refused_by_field() {
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let tool = json!({"name": "f", "input_schema": {"type": "object"}});
    for (more, field) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"temperature": 1.5}), "temperature"),
        (json!({"top_p": -1}), "top_p"),
        (json!({"top_k": -1}), "top_k"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages"),
        (json!({"messages": [{"role": "tool", "content": ""}]}), "messages[0].role"),
        (json!({"messages": [{"content": ""}]}), "messages[0].role"),
        (user(json!(3)), "messages[0].content"),
        (user(json!([{}])), "messages[0].content[0].type"),
        (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
        (user(json!([{"type": "tool_result", "tool_use_id": "x"}])), "messages[0].content[0].tool_use_id"),
        (user(json!([{"type": "tool_use", "id": "x", "name": "f", "input": {}}])), "messages[0].content[0]"),
        (json!({"system": {"text": "x"}}), "system"),
        (json!({"thinking": {"type": "much"}}), "thinking.type"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 0}}), "thinking.budget_tokens"),
        (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
        (json!({"tools": [{"name": "two words", "input_schema": {}}]}), "tools[0]"),
        (json!({"tools": [tool, tool]}), "tools[1]"),
        (json!({"tools": [tool], "tool_choice": {"type": "tool", "name": "g"}}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": {"type": "tool"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"output_format": {"type": "xml"}}), "output_format"),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format"),
        (json!({"output_config": {"effort": 3}}), "output_config.effort"),
    ] {
        assert_eq!(wrong_field(more.clone()), field, "{more}");
    }
}

#[test]
fn tools_of_the_servers_own_are_left_out() {
    let tools = json!([
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "custom", "name": "f", "description": "Does.", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
        {"name": "g", "input_schema": {"type": "object"}, "strict": true},
    ]);
    let ask =
        request(json!({"tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": true}})).unwrap();
    let names: Vec<(&str, bool)> = ask.tools.iter().map(|tool| (tool.name.as_str(), tool.strict)).collect();
    assert_eq!(names, [("f", false), ("g", true)]);
    assert_eq!((ask.choice, ask.parallel), (ToolChoice::Required, false));
    let named = request(json!({"tools": tools, "tool_choice": {"type": "tool", "name": "g"}})).unwrap();
    assert_eq!((named.choice, named.parallel), (ToolChoice::Named("g".into()), true));
    assert_eq!(request(json!({"tools": tools, "tool_choice": {"type": "none"}})).unwrap().choice, ToolChoice::None);
}

#[test]
fn settings_thinking_and_form_are_taken_over() {
    let ask =
        request(json!({"temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop_sequences": ["\n\nHuman:"]})).unwrap();
    assert_eq!((ask.settings.temperature, ask.settings.top_p, ask.settings.top_k), (Some(0.5), Some(0.9), Some(40)));
    assert_eq!((ask.settings.max_tokens, ask.settings.stop), (Some(64), vec!["\n\nHuman:".to_owned()]));
    assert_eq!(ask.thinking.enabled, Some(false), "a model thinks only if it is asked to");
    let thinks = json!({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "high"}});
    let thinks = request(thinks).unwrap().thinking;
    assert_eq!((thinks.enabled, thinks.effort.as_deref()), (Some(true), Some("high")));
    assert_eq!(request(json!({"thinking": {"type": "adaptive"}})).unwrap().thinking.enabled, Some(true));
    let schema = json!({"type": "object"});
    let form = json!({"type": "json_schema", "schema": schema});
    for more in [json!({"output_format": form}), json!({"output_config": {"format": form}})] {
        assert_eq!(request(more).unwrap().form, TextForm::JsonSchema(schema.clone()));
    }
}

fn steps() -> Vec<Step> {
    let piece = |piece| Step::Piece(piece, Vec::new());
    let call = |index: usize, id: &str| piece(Piece::Call { index, id: id.into(), name: "f".into() });
    let more = |index: usize, delta: &str| piece(Piece::Arguments { index, delta: delta.into() });
    vec![
        Step::Waiting(Waiting::Reading { read: 64, prompt: 100 }),
        piece(Piece::Thinking("I ".into())),
        piece(Piece::Thinking("think.".into())),
        piece(Piece::Text("Well".into())),
        Step::Waiting(Waiting::Generating { generated: 9 }),
        piece(Piece::Text(", yes.".into())),
        call(0, "call_a"),
        more(0, "{\"x\":"),
        more(0, "1}"),
        call(1, "call_b"),
        Step::End(Ending { why: Why::Calls, usage: Usage { prompt: 100, cached: 64, generated: 20, thinking: 3 } }),
    ]
}

/// The events of a stream: names and data.
fn events(steps: Vec<Step>, shows_thinking: bool) -> Vec<(String, Value)> {
    let mut writer = MessageWriter::new("m".into(), "req_1".into(), shows_thinking);
    let mut out = Events::default();
    writer.begin(&mut out);
    writer.started(100, &mut out);
    steps.into_iter().for_each(|step| writer.step(0, step, &mut out));
    writer.end(&mut out);
    let event = |text: &str| {
        let (name, data) = text.split_once('\n').unwrap();
        let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        (name.strip_prefix("event: ").unwrap().to_owned(), data)
    };
    out.as_str().trim_end().split("\n\n").map(event).collect()
}

#[test]
fn events_come_in_the_order_of_the_specification() {
    let mut events = events(steps(), true);
    let (name, start) = events.remove(0);
    assert_eq!(name, "message_start");
    assert!(start["message"]["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(start["message"]["content"], json!([]));
    assert_eq!(start["message"]["stop_reason"], Value::Null);
    assert_eq!(start["message"]["usage"]["input_tokens"], 100);
    for (name, data) in &events {
        assert_eq!(data["type"], **name, "each event says what it is in its data as well");
    }
    let data: Vec<Value> = events.into_iter().map(|(_, data)| data).collect();
    let start =
        |index: usize, block: Value| json!({"type": "content_block_start", "index": index, "content_block": block});
    let delta = |index: usize, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
    let stop = |index: usize| json!({"type": "content_block_stop", "index": index});
    let json_delta = |text: &str| json!({"type": "input_json_delta", "partial_json": text});
    let ping = json!({"type": "ping"});
    let expected = [
        ping.clone(),
        ping.clone(),
        start(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
        delta(0, json!({"type": "thinking_delta", "thinking": "I "})),
        delta(0, json!({"type": "thinking_delta", "thinking": "think."})),
        delta(0, json!({"type": "signature_delta", "signature": "c2x1aWNl"})),
        stop(0),
        start(1, json!({"type": "text", "text": ""})),
        delta(1, json!({"type": "text_delta", "text": "Well"})),
        ping,
        delta(1, json!({"type": "text_delta", "text": ", yes."})),
        stop(1),
        start(2, json!({"type": "tool_use", "id": "call_a", "name": "f", "input": {}})),
        delta(2, json_delta("{\"x\":")),
        delta(2, json_delta("1}")),
        stop(2),
        start(3, json!({"type": "tool_use", "id": "call_b", "name": "f", "input": {}})),
        stop(3),
        json!({
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": null},
            "usage": {
                "input_tokens": 36, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 64, "output_tokens": 20,
            },
        }),
        json!({"type": "message_stop"}),
    ];
    assert_eq!(data, expected);
}

#[test]
fn thinking_that_is_not_to_be_shown_is_a_block_without_text() {
    let data: Vec<Value> = events(steps(), false).into_iter().map(|(_, data)| data).collect();
    assert!(!data.iter().any(|data| data["delta"]["type"] == "thinking_delta"));
    assert!(data.iter().any(|data| data["delta"]["type"] == "signature_delta"));
}

#[test]
fn an_error_in_the_middle_is_the_last_event() {
    let mut steps = steps();
    steps.truncate(4);
    steps.push(Step::Failed(ApiError::new(Kind::Closing, "the server ends")));
    let (name, data) = events(steps, true).pop().unwrap();
    assert_eq!(name, "error");
    let error = json!({"type": "overloaded_error", "message": "the server ends"});
    assert_eq!(data, json!({"type": "error", "error": error, "request_id": "req_1"}));
}

#[test]
fn a_model_that_is_being_loaded_is_waited_for_with_pings() {
    let mut writer = MessageWriter::new("m".into(), "req_1".into(), true);
    let mut out = Events::default();
    writer.begin(&mut out);
    writer.step(0, Step::Waiting(Waiting::Loading), &mut out);
    assert_eq!(out.as_str(), "event: ping\ndata: {\"type\":\"ping\"}\n\n");
}

fn whole(steps: Vec<Step>) -> Value {
    let mut fold = MessageFold::new("m".into(), true);
    steps.into_iter().for_each(|step| fold.step(0, step).unwrap());
    Box::new(fold).finish()
}

#[test]
fn the_whole_message_has_the_same_blocks() {
    let message = whole(steps());
    assert_eq!(
        message["content"],
        json!([
            {"type": "thinking", "thinking": "I think.", "signature": "c2x1aWNl"},
            {"type": "text", "text": "Well, yes."},
            {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "call_b", "name": "f", "input": {}},
        ])
    );
    assert_eq!((&message["role"], &message["type"]), (&json!("assistant"), &json!("message")));
    assert_eq!(message["stop_reason"], "tool_use");
    assert_eq!(message["usage"]["cache_read_input_tokens"], 64);
    let failed = MessageFold::new("m".into(), true).step(0, Step::Failed(ApiError::invalid("no")));
    assert_eq!(failed.unwrap_err().message, "no");
}

#[test]
fn the_end_has_its_reason() {
    for (why, reason, sequence) in [
        (Why::Done, "end_turn", Value::Null),
        (Why::Stop(Some("END".into())), "stop_sequence", json!("END")),
        (Why::Length, "max_tokens", Value::Null),
    ] {
        let message = whole(vec![Step::End(Ending { why, usage: Usage::default() })]);
        assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!(reason), &sequence));
        assert_eq!(message["content"], json!([]));
    }
}

//! The order and the contents of events follow the specification; steps come from a script.

use std::sync::Arc;

use serde_json::{Value, json};
use sluice_dialect::Piece;

use super::reply::{Keep, Maker, ResponsesFold, ResponsesWriter};
use super::request::ResponsesRequest;
use super::store::ResponseStore;
use crate::answer::{Ending, Step, TokenLogprob, TokenText, Usage, Waiting, Why};
use crate::error::{ApiError, Kind};
use crate::reply::{Events, Fold, Writer};

fn text(text: &str) -> Step {
    Step::Piece(Piece::Text(text.into()), Vec::new())
}

fn thinking(text: &str) -> Step {
    Step::Piece(Piece::Thinking(text.into()), Vec::new())
}

fn call(index: usize, name: &str) -> Step {
    Step::Piece(Piece::Call { index, id: format!("call_{index}"), name: name.into() }, Vec::new())
}

fn arguments(index: usize, delta: &str) -> Step {
    Step::Piece(Piece::Arguments { index, delta: delta.into() }, Vec::new())
}

fn end(why: Why) -> Step {
    let usage = Usage { prompt: 10, cached: 4, generated: 7, thinking: 2 };
    Step::End(Ending { why, usage })
}

fn maker(request: Value, keep: Option<Keep>) -> Maker {
    let mut request = request;
    if request["input"].is_null() {
        request["input"] = "Hello.".into();
    }
    let request: ResponsesRequest = serde_json::from_value(request).unwrap();
    let prepared = request.prepare("demo".into(), &[]).unwrap();
    Maker::new(prepared.head, prepared.wants, keep)
}

/// The events of a stream. Checks the rules for all streams.
fn streamed(request: Value, steps: Vec<Step>) -> Vec<Value> {
    let mut writer = ResponsesWriter::new(maker(request, None));
    let mut out = Events::default();
    writer.begin(&mut out);
    for step in steps {
        writer.step(0, step, &mut out);
    }
    writer.end(&mut out);
    let blocks: Vec<&str> = out.as_str().split_terminator("\n\n").collect();
    let (last, blocks) = blocks.split_last().unwrap();
    assert_eq!(*last, "data: [DONE]");
    let events: Vec<Value> = blocks.iter().map(|block| event(block)).collect();
    check(&events);
    events
}

fn event(block: &str) -> Value {
    let (name, data) = block.split_once('\n').unwrap();
    let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(name.strip_prefix("event: "), event["type"].as_str());
    event
}

/// The rules: sequence numbers have no gaps; every item and every part that is added is finished once; deltas add up to the whole;
/// an item at its end is the same as in the response at the end.
fn check(events: &[Value]) {
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"]);
    let last = kinds[kinds.len() - 1];
    assert!(["response.completed", "response.incomplete", "response.failed"].contains(&last), "{last}");
    let mut added: Vec<Value> = Vec::new();
    let mut done: Vec<Option<Value>> = Vec::new();
    let mut deltas: Vec<String> = Vec::new();
    let mut parts = Vec::new();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i, "{event}");
        let at = event["output_index"].as_u64().map(|at| at as usize);
        if let Some(id) = event["item_id"].as_str() {
            assert_eq!(added[at.unwrap()]["id"], id);
            assert!(done[at.unwrap()].is_none(), "an event of an item that is done: {event}");
        }
        let kind = event["type"].as_str().unwrap();
        match kind {
            "response.output_item.added" => {
                assert_eq!(at, Some(added.len()));
                assert_eq!(event["item"]["status"], "in_progress");
                added.push(event["item"].clone());
                done.push(None);
                deltas.push(String::new());
                parts.push(0);
            }
            "response.output_item.done" => {
                let at = at.unwrap();
                assert_eq!(added[at]["id"], event["item"]["id"]);
                assert_eq!(parts[at], 0, "a part is not done");
                assert!(done[at].replace(event["item"].clone()).is_none());
            }
            _ if kind.ends_with("part.added") => parts[at.unwrap()] += 1,
            _ if kind.ends_with("part.done") => {
                parts[at.unwrap()] -= 1;
                assert_eq!(event["part"]["text"].as_str(), Some(deltas[at.unwrap()].as_str()));
            }
            _ if kind.ends_with(".delta") => deltas[at.unwrap()] += event["delta"].as_str().unwrap(),
            _ if kind.ends_with(".done") => {
                let whole = ["text", "arguments", "input"].iter().find_map(|name| event[*name].as_str());
                assert_eq!(whole, Some(deltas[at.unwrap()].as_str()), "{event}");
            }
            _ => {}
        }
    }
    let done: Vec<Value> = done.into_iter().map(|item| item.expect("every item is done")).collect();
    assert_eq!(events[events.len() - 1]["response"]["output"], Value::Array(done));
}

/// The whole object for the same steps.
fn whole(request: Value, steps: Vec<Step>) -> Result<Value, ApiError> {
    let mut fold = Box::new(ResponsesFold::new(maker(request, None)));
    for step in steps {
        fold.step(0, step)?;
    }
    Ok(fold.finish())
}

/// A response without the fields that differ between responses: ids and times.
fn without_ids(mut response: Value) -> Value {
    for name in ["id", "created_at", "completed_at"] {
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().into_iter().flatten() {
        item["id"] = Value::Null;
    }
    response
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap().trim_start_matches("response.")).collect()
}

fn agent_steps() -> Vec<Step> {
    vec![
        Step::Waiting(Waiting::Queued { ahead: 1 }),
        Step::Waiting(Waiting::Reading { read: 5, prompt: 10 }),
        thinking("Let me "),
        thinking("see."),
        text("\n"),
        text("\nI look."),
        text("\n"),
        call(0, "read"),
        arguments(0, "{\"path\":"),
        call(1, "read"),
        arguments(1, "{}"),
        arguments(0, " \"a\"}"),
        end(Why::Calls),
    ]
}

#[test]
fn a_text_has_the_events_of_the_specification() {
    let steps = vec![text("Hel"), text("lo."), end(Why::Done)];
    let events = streamed(json!({}), steps);
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds(&events), expected);
    assert_eq!(events[2]["item"]["content"], json!([]));
    assert_eq!(events[4]["content_index"], 0);
    let response = &events[9]["response"];
    assert_eq!(response["status"], "completed");
    assert_eq!(response["output"][0]["content"][0]["text"], "Hello.");
    assert_eq!(response["usage"]["input_tokens_details"]["cached_tokens"], 4);
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 2);
    assert_eq!(response["usage"]["total_tokens"], 17);
    assert!(response["completed_at"].is_u64());
}

#[test]
fn thinking_text_and_parallel_calls_are_items() {
    let events = streamed(json!({}), agent_steps());
    assert_eq!(events[2]["progress"], json!({"state": "queued", "ahead": 1}));
    assert_eq!(events[3]["type"], "response.in_progress");
    let output = &events[events.len() - 1]["response"]["output"];
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "Let me see."}]));
    assert_eq!(output[0]["summary"], json!([]));
    assert!(output[0].get("encrypted_content").is_none());
    assert_eq!(output[1]["content"][0]["text"], "\n\nI look.\n");
    assert_eq!(output[2]["arguments"], "{\"path\": \"a\"}");
    assert_eq!(output[3]["arguments"], "{}");
    assert_eq!(output[3]["call_id"], "call_1");
    assert_eq!(output.as_array().unwrap().len(), 4);
}

#[test]
fn the_whole_object_is_the_streamed_one() {
    for request in [
        json!({}),
        json!({"reasoning": {"effort": "high", "summary": "auto"}, "include": ["reasoning.encrypted_content"]}),
        json!({"tools": [{"type": "custom", "name": "read"}]}),
    ] {
        let events = streamed(request.clone(), agent_steps());
        let streamed = events[events.len() - 1]["response"].clone();
        assert_eq!(without_ids(streamed), without_ids(whole(request, agent_steps()).unwrap()));
    }
}

#[test]
fn thinking_is_a_summary_where_one_is_asked_for() {
    let request = json!({"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]});
    let events = streamed(request, vec![thinking("Hm."), text("A."), end(Why::Done)]);
    let expected = [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ];
    assert_eq!(kinds(&events)[2..8], expected);
    assert_eq!(events[4]["summary_index"], 0);
    let item = &events[7]["item"];
    assert_eq!(item["summary"], json!([{"type": "summary_text", "text": "Hm."}]));
    assert_eq!(super::reasoning::opened(item["encrypted_content"].as_str().unwrap()).as_deref(), Some("Hm."));
}

#[test]
fn a_client_that_stores_nothing_can_send_thinking_back() {
    let response = whole(json!({"store": false}), vec![thinking("Hm."), text("A."), end(Why::Done)]).unwrap();
    let mut item = response["output"][0].clone();
    item["content"] = Value::Null;
    let next: ResponsesRequest =
        serde_json::from_value(json!({"input": [item, response["output"][1], {"role": "user", "content": "And?"}]}))
            .unwrap();
    let prepared = next.prepare("demo".into(), &[]).unwrap();
    let crate::ask::Input::Chat(chat) = &prepared.ask.input else { panic!("a conversation") };
    assert_eq!(chat.messages[0].fields["reasoning_content"], "Hm.");
    assert_eq!(chat.messages[0].fields["content"], "A.");
}

#[test]
fn a_custom_tool_gets_its_text() {
    let steps = || {
        vec![call(0, "apply_patch"), arguments(0, "{\"input\": \"*** Begin"), arguments(0, "\\n\"}"), end(Why::Calls)]
    };
    let events = streamed(json!({"tools": [{"type": "custom", "name": "apply_patch"}]}), steps());
    let middle =
        ["output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"];
    assert_eq!(kinds(&events)[2..6], middle);
    assert_eq!(events[5]["item"]["input"], "*** Begin\n");
    assert_eq!(events[5]["item"]["type"], "custom_tool_call");
}

#[test]
fn an_answer_that_is_cut_off_is_incomplete() {
    let events = streamed(json!({"max_output_tokens": 3}), vec![text("Hello"), end(Why::Length)]);
    let last = &events[events.len() - 1];
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(last["response"]["output"][0]["status"], "incomplete");
    assert_eq!(last["response"]["completed_at"], Value::Null);
}

#[test]
fn an_error_in_the_middle_ends_all_items() {
    let error = || Step::Failed(ApiError::new(Kind::Internal, "the drive is gone"));
    let steps = || vec![thinking("Hm"), call(0, "read"), arguments(0, "{"), error()];
    let events = streamed(json!({}), steps());
    let last = &events[events.len() - 1];
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "the drive is gone"}));
    assert_eq!(last["response"]["output"][1]["status"], "incomplete");
    assert_eq!(whole(json!({}), steps()).unwrap_err().message, "the drive is gone");
    let too_long = ApiError::invalid("too long").code("context_length_exceeded");
    let events = streamed(json!({}), vec![Step::Failed(too_long)]);
    assert_eq!(events[2]["response"]["error"]["code"], "context_length_exceeded");
}

#[test]
fn an_empty_answer_is_an_empty_text() {
    for steps in [vec![end(Why::Done)], vec![text(" \n"), end(Why::Done)]] {
        let response = whole(json!({}), steps).unwrap();
        assert_eq!(response["output"][0]["type"], "message");
        assert_eq!(response["output"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn log_probabilities_come_with_their_text() {
    let token = |text: &str| TokenLogprob {
        token: TokenText { id: 1, text: text.into(), bytes: text.into() },
        logprob: Some(-0.5),
        top: vec![(TokenText { id: 2, text: "b".into(), bytes: "b".into() }, f32::NEG_INFINITY)],
    };
    let steps = || {
        vec![
            Step::Piece(Piece::Text("\n".into()), vec![token("\n")]),
            Step::Piece(Piece::Text("a".into()), vec![token("a")]),
            end(Why::Done),
        ]
    };
    let request = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let events = streamed(request, steps());
    let delta = &events[4]["logprobs"];
    assert_eq!(delta.as_array().unwrap().len(), 2);
    assert_eq!(delta[1]["bytes"], json!([97]));
    assert_eq!(delta[1]["top_logprobs"][0]["logprob"], -9999.0);
    assert_eq!(events[7]["item"]["content"][0]["logprobs"], *delta);
}

#[test]
fn what_has_ended_is_stored_before_the_client_hears_of_it() {
    let store = Arc::new(ResponseStore::new(None));
    let keep =
        Keep { store: Arc::clone(&store), input: vec![json!({"type": "message", "role": "user", "content": "Hi."})] };
    let mut writer = ResponsesWriter::new(maker(json!({}), Some(keep)));
    let mut out = Events::default();
    writer.begin(&mut out);
    writer.step(0, text("Ho."), &mut out);
    writer.step(0, end(Why::Done), &mut out);
    let last = out.as_str().split_terminator("\n\n").last().map(event).unwrap();
    let id = last["response"]["id"].as_str().unwrap();
    assert_eq!(store.get(id).unwrap().response, last["response"]);
    let history = store.history(id).unwrap();
    assert_eq!(history.len(), 2);
    let next: ResponsesRequest =
        serde_json::from_value(json!({"input": "And?", "previous_response_id": id, "instructions": "New."})).unwrap();
    let prepared = next.prepare("demo".into(), &history).unwrap();
    let crate::ask::Input::Chat(chat) = &prepared.ask.input else { panic!("a conversation") };
    let roles: Vec<&Value> = chat.messages.iter().map(|message| &message.fields["role"]).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    assert_eq!(prepared.input.len(), 1, "only what is new");
}

#[test]
fn impossible_values_are_named() {
    let of = |request: Value| {
        let request: ResponsesRequest = serde_json::from_value(request).unwrap();
        request.prepare("demo".into(), &[]).unwrap_err().param.unwrap()
    };
    assert_eq!(of(json!({})), "input");
    assert_eq!(of(json!({"input": [], "instructions": "x"})), "input");
    assert_eq!(of(json!({"input": 1})), "input");
    for (name, value) in [
        ("background", json!(true)),
        ("conversation", json!("conv_1")),
        ("prompt", json!({"id": "p"})),
        ("temperature", json!(3)),
        ("top_p", json!(1.5)),
        ("top_logprobs", json!(21)),
        ("max_output_tokens", json!(0)),
        ("truncation", json!("middle")),
        ("tool_choice", json!("required")),
        ("tools[0]", json!(null)),
    ] {
        let mut request = json!({"input": "x"});
        match name {
            "tools[0]" => request["tools"] = json!([{"type": "function"}]),
            name => request[name] = value,
        }
        assert_eq!(of(request), name);
    }
    assert_eq!(of(json!({"input": "x", "text": {"format": {"type": "xml"}}})), "text.format");
    assert_eq!(of(json!({"input": "x", "metadata": {"k": "v".repeat(513)}})), "metadata");
    assert_eq!(of(json!({"input": "x", "reasoning": {"summary": "long"}})), "reasoning.summary");
}

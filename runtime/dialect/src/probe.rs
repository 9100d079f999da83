//! The abilities of a chat template with messages, found out by rendering some.
//!
//! Templates do not state whether they take arguments as text or as objects, whether they take one call or several, or whether they
//! print a text beside calls; they fail, or leave parts out. So each question is a conversation, and the answer is whether all of
//! its parts are rendered.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use sluice_text::{ChatTemplate, Message, RenderOptions, SpecialTokens};

use crate::messages::Wants;

/// If a template takes longer than this for all questions together, no more questions are asked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Arguments with two consecutive spaces, which survive only if text stays text.
const RAW: &str = r#"{"first-key":  "first-value"}"#;

struct Probe {
    template: ChatTemplate,
    started: Instant,
}

/// Examines a template. `None` if it cannot render even one message of a user.
pub(crate) fn probe(source: &str) -> Option<Wants> {
    let tokens = SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..SpecialTokens::default() };
    let probe = Probe { template: ChatTemplate::new(source, tokens).ok()?, started: Instant::now() };
    let user = |text: &str| json!({"role": "user", "content": text});
    let said = |text: &str| json!({"role": "assistant", "content": text});
    let system = |text: &str| json!({"role": "system", "content": text});
    let result = json!({"role": "tool", "content": "a-result", "tool_call_id": "abcdefgh1", "name": "first"});
    if !probe.shows(json!([user("a-question")]), &["a-question"]) {
        return None;
    }
    let with_text = |text: Value, arguments: Value| calls(text, &[arguments]);
    let prints = |text: Value| probe.shows(json!([user("q"), with_text(text, RAW.into()), result]), &[RAW]);
    let text_arguments = prints("".into()) || prints(Value::Null);
    let first: Value = if text_arguments { RAW.into() } else { json!({"first-key": "first-value"}) };
    let second: Value = if text_arguments { r#"{"k": "second-value"}"#.into() } else { json!({"k": "second-value"}) };
    let call = |text: Value| with_text(text, first.clone());
    let calls_with = |text: Value| probe.shows(json!([user("q"), call(text)]), &["first-value"]);
    let (empty, null) = (calls_with("".into()), calls_with(Value::Null));
    let null_text = null && !empty;
    let none: Value = if null_text { Value::Null } else { "".into() };
    let knows_calls = empty || null;
    let two = calls(none.clone(), &[first.clone(), second]);
    let one_call = knows_calls && !probe.shows(json!([user("q"), two]), &["first-value", "second-value"]);
    // Some templates print a text only without thinking, or only until the answer.
    let mut both = call("a-remark".into());
    both["reasoning_content"] = "r".into();
    let both = json!([user("q"), both, result, said("an-answer"), user("q2")]);
    let calls_without_text = knows_calls && !probe.shows(both, &["a-remark", "first-value"]);
    let split = json!([user("q"), said("a-remark"), call(none.clone()), result, said("an-answer"), user("q2")]);
    let text_moves = calls_without_text && !probe.shows(split, &["a-remark", "first-value", "an-answer"]);
    let no_system = !probe.shows(json!([system("a-rule"), user("a-question")]), &["a-rule", "a-question"]);
    let in_turn = json!([system("a-rule"), user("a-question"), call(none), result]);
    let systems = json!([system("a-rule"), user("q"), said("a"), system("new-rule"), user("a-question")]);
    let wants = Wants {
        text_arguments,
        one_system: !probe.shows(systems, &["a-rule", "new-rule", "a-question"]),
        no_system: no_system || knows_calls && !probe.shows(in_turn, &["a-rule", "a-question"]),
        developer: false,
        turns: !probe.shows(json!([user("a-question"), user("q2-question")]), &["a-question", "q2-question"]),
        one_call,
        calls_without_text,
        text_moves,
        null_text,
        results_inside: false,
    };
    (probe.started.elapsed() <= PATIENCE).then_some(wants)
}

/// A message with calls of the first tools.
fn calls(text: Value, arguments: &[Value]) -> Value {
    let call = |(i, arguments): (usize, &Value)| {
        let name = ["first", "second"][i];
        json!({"id": format!("abcdefgh{}", i + 1), "type": "function", "function": {"name": name, "arguments": arguments}})
    };
    let calls: Vec<Value> = arguments.iter().enumerate().map(call).collect();
    json!({"role": "assistant", "content": text, "tool_calls": calls})
}

impl Probe {
    /// Whether a conversation can be rendered, and all of these words appear.
    fn shows(&self, conversation: Value, words: &[&str]) -> bool {
        if self.started.elapsed() > PATIENCE {
            return false;
        }
        let messages = conversation.as_array().into_iter().flatten().filter_map(Value::as_object);
        let messages: Vec<Message> = messages.cloned().map(Message::from).collect();
        let tool = |name: &str| {
            json!({"type": "function", "function": {"name": name, "description": "", "parameters":
                {"type": "object", "properties": {}}}})
        };
        let options = RenderOptions {
            add_generation_prompt: false,
            tools: Some(json!([tool("first"), tool("second")])),
            extra: Map::new(),
            now: 0,
        };
        self.template.render(&messages, &options).is_ok_and(|text| words.iter().all(|word| text.contains(word)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Dialect;
    use crate::{syntax, templates};

    #[test]
    fn own_templates_are_what_they_are_taken_for() {
        for family in [&syntax::DEEPSEEK_V32, &syntax::DEEPSEEK_V4, &syntax::HARMONY] {
            let source = templates::own(family).unwrap();
            assert_eq!(Wants::of(family, Some(source)), Wants::of(family, None), "{}", family.name);
            assert_eq!(Dialect::detect(None, Some(source), &|_| false).name(), family.name);
        }
    }

    #[test]
    fn templates_that_cannot_be_asked_get_what_most_take() {
        for source in ["{% if %}", "{{ raise_exception('never') }}", "nothing of it"] {
            assert_eq!(probe(source), None);
            assert_eq!(Wants::of(&syntax::HERMES, Some(source)), Wants::default());
        }
    }
}

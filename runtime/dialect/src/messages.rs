//! Messages in the form that templates take.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sluice_text::Message;

use crate::error::{DialectError, clip};
use crate::parser::letters;
use crate::probe::probe;
use crate::syntax::{Calls, Ids, Syntax};

/// The abilities of a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    /// Whether it prints the arguments of calls as they are. Otherwise it iterates over them.
    pub(crate) text_arguments: bool,
    /// Whether it takes a system message only at the beginning.
    pub(crate) one_system: bool,
    /// Whether it takes none.
    pub(crate) no_system: bool,
    /// Whether it knows the role `developer`.
    pub(crate) developer: bool,
    /// Whether it requires that users and the model take turns.
    pub(crate) turns: bool,
    /// Whether it takes only one call per message.
    pub(crate) one_call: bool,
    /// Whether it leaves out the text of messages with calls.
    pub(crate) calls_without_text: bool,
    /// Whether such a text cannot be a message of its own either.
    pub(crate) text_moves: bool,
    /// Whether the text of a message with calls must be `null`.
    pub(crate) null_text: bool,
    /// Whether it takes results in the message of their calls.
    pub(crate) results_inside: bool,
}

impl Wants {
    /// The abilities of a family's template. Without one, those of this crate's own template.
    pub(crate) fn of(syntax: &Syntax, template: Option<&str>) -> Self {
        let harmony = matches!(syntax.calls, Calls::Harmony);
        let own = Self { text_arguments: harmony, one_system: harmony, one_call: harmony, ..Self::default() };
        let wants = template.map_or(own, |source| probe(source).unwrap_or_default());
        let results_inside = template.is_some_and(|source| source.contains("'tool_responses'"));
        let calls_without_text = wants.calls_without_text || results_inside;
        // Text would be printed, but not in the notation that the model knows.
        let text_arguments = wants.text_arguments && !matches!(syntax.calls, Calls::Fields(_));
        Self { text_arguments, developer: harmony, results_inside, calls_without_text, ..wants }
    }
}

/// Checks messages and gives them the form that the template takes.
pub(crate) fn convert(
    syntax: &'static Syntax,
    wants: Wants,
    messages: Vec<Message>,
) -> Result<Vec<Message>, DialectError> {
    let read =
        messages.into_iter().enumerate().map(|(i, message)| read(&format!("messages[{i}]"), message.fields, wants));
    let mut messages: Vec<Map<String, Value>> = read.collect::<Result<_, _>>()?;
    rename_calls(syntax.ids, &mut messages);
    sort_results(&mut messages);
    if wants.one_system || wants.no_system {
        messages = merge_system(messages);
    }
    if wants.no_system {
        messages = fold_system(messages);
    }
    messages = match wants.text_moves {
        true => move_text(messages),
        false => messages.into_iter().flat_map(|message| split_text(message, wants)).collect(),
    };
    if wants.results_inside {
        messages = move_results(messages);
    }
    if wants.one_call {
        messages = split_calls(messages)?;
    }
    if wants.turns {
        messages = merge_turns(messages);
    }
    Ok(messages.into_iter().map(Message::from).collect())
}

/// One message, with the fields that templates know.
fn read(field: &str, mut given: Map<String, Value>, wants: Wants) -> Result<Map<String, Value>, DialectError> {
    let role = given.remove("role").unwrap_or(Value::Null);
    let role = match role.as_str() {
        Some("developer") if !wants.developer => "system",
        Some(role @ ("system" | "developer" | "user" | "assistant" | "tool")) => role,
        _ => {
            let expected = "`system`, `developer`, `user`, `assistant` or `tool`";
            return Err(DialectError::bad(format!("{field}.role"), expected, &role));
        }
    };
    let text = content(&format!("{field}.content"), given.remove("content").unwrap_or(Value::Null))?;
    let refusal = given.get("refusal").and_then(Value::as_str);
    let text = match (text, refusal, role) {
        (None, Some(refusal), "assistant") => Some(refusal.to_owned()),
        (None, None, "system" | "developer" | "user" | "tool") => {
            return Err(DialectError::bad(format!("{field}.content"), "text", &Value::Null));
        }
        (text, ..) => text,
    };
    let mut message = Map::new();
    message.insert("role".into(), role.into());
    message.insert("content".into(), text.unwrap_or_default().into());
    if let Some(name @ Value::String(_)) = given.remove("name") {
        message.insert("name".into(), name);
    }
    match role {
        "assistant" => read_answer(field, &mut given, wants, &mut message)?,
        "tool" => match given.remove("tool_call_id") {
            Some(id @ Value::String(_)) => {
                message.insert("tool_call_id".into(), id);
            }
            other => {
                let other = other.unwrap_or(Value::Null);
                return Err(DialectError::bad(format!("{field}.tool_call_id"), "the id of a tool call", &other));
            }
        },
        _ => {}
    }
    Ok(message)
}

/// Reads the fields that only answers of the model have.
fn read_answer(
    field: &str,
    given: &mut Map<String, Value>,
    wants: Wants,
    message: &mut Map<String, Value>,
) -> Result<(), DialectError> {
    let thinking =
        ["reasoning_content", "reasoning"].iter().find_map(|name| given.remove(*name).filter(|v| !v.is_null()));
    match thinking {
        None => {}
        Some(Value::String(thinking)) if thinking.is_empty() => {}
        Some(thinking @ Value::String(_)) => {
            message.insert("reasoning_content".into(), thinking);
        }
        Some(other) => return Err(DialectError::bad(format!("{field}.reasoning_content"), "text", &other)),
    }
    if let Some(Value::Object(_)) = given.get("function_call") {
        let kind = "function_call".to_owned();
        return Err(DialectError::Unsupported { field: format!("{field}.function_call"), kind });
    }
    let calls = match given.remove("tool_calls") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(DialectError::bad(format!("{field}.tool_calls"), "a list", &other)),
    };
    if calls.is_empty() {
        return Ok(());
    }
    let read =
        calls.into_iter().enumerate().map(|(i, call)| read_call(&format!("{field}.tool_calls[{i}]"), call, wants));
    message.insert("tool_calls".into(), Value::Array(read.collect::<Result<_, _>>()?));
    if wants.null_text && message["content"] == "" {
        message.insert("content".into(), Value::Null);
    }
    Ok(())
}

fn read_call(field: &str, call: Value, wants: Wants) -> Result<Value, DialectError> {
    let function = &call["function"];
    let Some(name) = function["name"].as_str() else {
        return Err(DialectError::bad(format!("{field}.function.name"), "the name of a function", &function["name"]));
    };
    let id = match &call["id"] {
        Value::Null => "",
        Value::String(id) => id,
        other => return Err(DialectError::bad(format!("{field}.id"), "text", other)),
    };
    let arguments = match &function["arguments"] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        object @ Value::Object(_) => object.to_string(),
        other => {
            let expected = "a JSON object as text";
            return Err(DialectError::bad(format!("{field}.function.arguments"), expected, other));
        }
    };
    let arguments = match wants.text_arguments {
        true if arguments.trim().is_empty() => "{}".into(),
        true => Value::String(arguments),
        false => object(arguments),
    };
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// Arguments as an object. Anything else is kept as text.
fn object(arguments: String) -> Value {
    match serde_json::from_str(&arguments) {
        Ok(object @ Value::Object(_)) => object,
        _ if arguments.trim().is_empty() => json!({}),
        _ => json!({"arguments": arguments}),
    }
}

/// The text of a message's content, which may be in parts.
fn content(field: &str, content: Value) -> Result<Option<String>, DialectError> {
    let parts = match content {
        Value::Null => return Ok(None),
        Value::String(text) => return Ok(Some(text)),
        Value::Array(parts) => parts,
        other => return Err(DialectError::bad(field, "text or a list of parts", &other)),
    };
    let text = |(i, part): (usize, &Value)| {
        let field = || format!("{field}[{i}]");
        let name = match part["type"].as_str() {
            Some("text" | "input_text" | "output_text") => "text",
            Some("refusal") => "refusal",
            Some(kind) => return Err(DialectError::Unsupported { field: field(), kind: clip(kind) }),
            None => return Err(DialectError::bad(field(), "a part with a type", part)),
        };
        let text = part[name].as_str().ok_or_else(|| DialectError::bad(field(), "a part with text", part))?;
        Ok(text.to_owned())
    };
    let texts: Vec<String> = parts.iter().enumerate().map(text).collect::<Result<_, _>>()?;
    Ok(Some(texts.join("\n")))
}

/// Gives calls ids in the form that the family writes.
fn rename_calls(ids: Ids, messages: &mut [Map<String, Value>]) {
    if ids == Ids::Long {
        return;
    }
    let mut renamed: HashMap<String, String> = HashMap::new();
    let mut count = 0;
    for message in messages {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let old = call["id"].as_str().unwrap_or_default().to_owned();
            let new = match ids {
                Ids::Own => own_id(&old, call["function"]["name"].as_str().unwrap_or_default(), count),
                Ids::Nine | Ids::Long => nine(&old, count),
            };
            count += 1;
            call["id"] = new.clone().into();
            renamed.insert(old, new);
        }
        if let Some(Value::String(id)) = message.get_mut("tool_call_id")
            && let Some(new) = renamed.get(id)
        {
            id.clone_from(new);
        }
    }
}

/// Sorts results in the order of their calls, because many templates distinguish them only by that. Results of unknown calls come
/// last.
fn sort_results(messages: &mut [Map<String, Value>]) {
    let mut order: Vec<Value> = Vec::new();
    for group in messages.chunk_by_mut(|a, b| role(a) == "tool" && role(b) == "tool") {
        match group[0].get("tool_calls").and_then(Value::as_array) {
            Some(calls) => order = calls.iter().map(|call| call["id"].clone()).collect(),
            None if role(&group[0]) == "tool" => {
                let place =
                    |result: &Map<String, Value>| order.iter().position(|id| Some(id) == result.get("tool_call_id"));
                group.sort_by_key(|result| place(result).unwrap_or(usize::MAX));
            }
            None => {}
        }
    }
}

/// The id itself if it has the form `functions.name:0`, otherwise a new one of this form, counted over the conversation.
fn own_id(old: &str, name: &str, count: usize) -> String {
    let number = old.strip_prefix("functions.").and_then(|rest| rest.strip_prefix(name)?.strip_prefix(':'));
    match number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())) {
        true => old.to_owned(),
        false => format!("functions.{name}:{count}"),
    }
}

/// Nine letters and digits, derived from the old id, or, without one, from the number of the call.
fn nine(old: &str, count: usize) -> String {
    if old.len() == 9 && old.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return old.to_owned();
    }
    // FNV-1a (Fowler, Noll, Vo, 1991).
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let seed = old.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    letters(seed, if old.is_empty() { count } else { 0 }, 9)
}

fn role(message: &Map<String, Value>) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// Merges all system messages into one, at the beginning. If there are two roles, that of the first message is used.
fn merge_system(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let is_system = |message: &Map<String, Value>| matches!(role(message), "system" | "developer");
    let (system, mut others): (Vec<_>, Vec<_>) = messages.into_iter().partition(is_system);
    if let Some(first) = system.into_iter().reduce(join) {
        others.insert(0, first);
    }
    others
}

/// Makes the system message the beginning of the first message of a user, or a message of a user if there is none.
fn fold_system(mut messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    if messages.first().is_none_or(|first| role(first) != "system") {
        return messages;
    }
    let mut system = messages.remove(0);
    system.insert("role".into(), "user".into());
    match messages.first() {
        Some(first) if role(first) == "user" => messages[0] = join(system, messages[0].clone()),
        _ => messages.insert(0, system),
    }
    messages
}

/// Moves the text of messages with calls to the beginning of the model's next text in the same turn. Until there is one, the
/// template leaves it out.
fn move_text(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let mut moved: Vec<Map<String, Value>> = Vec::new();
    let mut waiting: Vec<Map<String, Value>> = Vec::new();
    for message in messages {
        let has_text = message.get("content").and_then(Value::as_str).is_some_and(|text| !text.trim().is_empty());
        match (role(&message), message.contains_key("tool_calls")) {
            ("user", _) => waiting.clear(),
            ("assistant", true) if has_text => waiting.push(message.clone()),
            ("assistant", false) if !waiting.is_empty() => {
                let before = waiting.drain(..).reduce(join).unwrap_or_default();
                let content = join(before, message.clone()).remove("content").unwrap_or_default();
                moved.push(Map::from_iter(message.into_iter().chain([("content".to_owned(), content)])));
                continue;
            }
            _ => {}
        }
        moved.push(message);
    }
    moved
}

/// Merges consecutive messages of a user.
fn merge_turns(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let mut merged: Vec<Map<String, Value>> = Vec::new();
    for message in messages {
        match merged.pop() {
            Some(last) if role(&last) == "user" && role(&message) == "user" => merged.push(join(last, message)),
            last => merged.extend(last.into_iter().chain([message])),
        }
    }
    merged
}

fn join(mut first: Map<String, Value>, second: Map<String, Value>) -> Map<String, Value> {
    let text =
        |message: &Map<String, Value>| message.get("content").and_then(Value::as_str).unwrap_or_default().to_owned();
    let texts = [text(&first), text(&second)];
    first.insert("content".into(), texts.join("\n\n").into());
    first
}

/// Makes the text of a message with calls a message of its own, before it.
fn split_text(mut message: Map<String, Value>, wants: Wants) -> Vec<Map<String, Value>> {
    let has_text = message.get("content").and_then(Value::as_str).is_some_and(|text| !text.trim().is_empty());
    if !wants.calls_without_text || !has_text || !message.contains_key("tool_calls") {
        return vec![message];
    }
    let empty = if wants.null_text { Value::Null } else { "".into() };
    let text = message.insert("content".into(), empty).unwrap_or_default();
    let mut before = Map::new();
    before.insert("role".into(), "assistant".into());
    before.insert("content".into(), text);
    vec![before, message]
}

/// Moves results into the message of their calls, followed by the answer after them: the model continues in the same turn.
fn move_results(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let is_open = |message: &Map<String, Value>| {
        message.contains_key("tool_responses")
            && message.get("content").and_then(Value::as_str).unwrap_or_default().is_empty()
    };
    let mut moved: Vec<Map<String, Value>> = Vec::new();
    for mut message in messages {
        let last = moved.last_mut().filter(|last| last.contains_key("tool_calls"));
        match (role(&message), last) {
            ("tool", Some(last)) => {
                let id = message.get("tool_call_id");
                let calls = last.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
                let name =
                    calls.into_iter().find(|call| Some(&call["id"]) == id).map(|call| call["function"]["name"].clone());
                let content = message.remove("content").unwrap_or_default();
                let object = content.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
                let response = object.map_or(content, Value::Object);
                let result = json!({"name": name.unwrap_or_else(|| "unknown".into()), "response": response});
                let results = last.entry("tool_responses").or_insert_with(|| json!([]));
                if let Value::Array(results) = results {
                    results.push(result);
                }
            }
            ("assistant", Some(last)) if is_open(last) && !message.contains_key("tool_calls") => {
                last.insert("content".into(), message.remove("content").unwrap_or_default());
            }
            _ => moved.push(message),
        }
    }
    moved
}

/// Makes each call a message of its own, followed by its result.
fn split_calls(messages: Vec<Map<String, Value>>) -> Result<Vec<Map<String, Value>>, DialectError> {
    let mut split: Vec<Map<String, Value>> = Vec::new();
    let mut results = Vec::new();
    // From the end, so that results are known before their calls are reached.
    for (i, mut message) in messages.into_iter().enumerate().rev() {
        if role(&message) == "tool" {
            results.push((i, message));
            continue;
        }
        let calls = match message.remove("tool_calls") {
            Some(Value::Array(calls)) => calls,
            _ => Vec::new(),
        };
        let mut group = Vec::new();
        for (n, call) in calls.into_iter().enumerate() {
            let mut single = match n {
                0 => message.clone(),
                _ => [("role".to_owned(), "assistant".into()), ("content".to_owned(), "".into())].into_iter().collect(),
            };
            let is_result = |(_, result): &(usize, Map<String, Value>)| result.get("tool_call_id") == Some(&call["id"]);
            let result = results.iter().rposition(is_result).map(|at| results.remove(at).1);
            single.insert("tool_calls".into(), json!([call]));
            group.push(single);
            group.extend(result);
        }
        if let Some((i, orphan)) = results.pop() {
            let id = orphan.get("tool_call_id").and_then(Value::as_str).unwrap_or_default();
            return Err(DialectError::UnknownCall { field: format!("messages[{i}].tool_call_id"), id: clip(id) });
        }
        if group.is_empty() {
            group.push(message);
        }
        split.extend(group.into_iter().rev());
    }
    match results.pop() {
        Some((i, orphan)) => {
            let id = orphan.get("tool_call_id").and_then(Value::as_str).unwrap_or_default();
            Err(DialectError::UnknownCall { field: format!("messages[{i}].tool_call_id"), id: clip(id) })
        }
        None => {
            split.reverse();
            Ok(split)
        }
    }
}

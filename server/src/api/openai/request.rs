//! Parts of requests that several paths share.

use std::collections::{BTreeMap, HashSet};

use serde::Deserialize;
use serde_json::{Map, Value};
use sluice_generate::Penalties;

use crate::ask::{TextForm, Tool, ToolChoice, out_of_range};
use crate::error::ApiError;

/// One string or several.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// The strings.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// What streams report.
#[derive(Clone, Copy, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct StreamOptions {
    /// Whether the last event reports the numbers of tokens.
    #[serde(default)]
    pub include_usage: bool,
}

/// `logit_bias`: numbers from -100 to 100 by token id.
pub fn bias(map: Option<BTreeMap<String, f32>>) -> Result<Vec<(u32, f32)>, ApiError> {
    let entry = |(id, bias): (String, f32)| {
        if !(-100.0..=100.0).contains(&bias) {
            return Err(out_of_range("logit_bias", bias, -100, 100));
        }
        let id =
            id.parse().map_err(|_| ApiError::field("logit_bias", format!("`logit_bias`: {id:?} is not a token id")))?;
        // OpenAI's documentation: -100 bans a token.
        Ok((id, if bias <= -100.0 { f32::NEG_INFINITY } else { bias }))
    };
    map.into_iter().flatten().map(entry).collect()
}

/// `presence_penalty` and `frequency_penalty`.
pub fn penalties(presence: Option<f32>, frequency: Option<f32>) -> Penalties {
    Penalties { presence: presence.unwrap_or(0.0), frequency: frequency.unwrap_or(0.0) }
}

/// A whole number, which JSON may write as a float.
pub fn count(name: &str, value: Option<i64>, least: i64, most: i64) -> Result<Option<usize>, ApiError> {
    match value {
        Some(value) if !(least..=most).contains(&value) => Err(out_of_range(name, value, least, most)),
        Some(value) => Ok(usize::try_from(value).ok()),
        None => Ok(None),
    }
}

/// A `tools` entry, either of chat completions, where the function is an object of its own, or of responses, where it is not.
pub fn tool(value: &Value, place: &str) -> Result<Tool, ApiError> {
    let wrong = |what: &str| ApiError::field(place, format!("`{place}`: {what}")).code("invalid_value");
    match value["type"].as_str() {
        Some("function") | None => {}
        Some(other) => {
            return Err(wrong(&format!("tools of type {other:?} are not supported: give functions")));
        }
    }
    let function = match &value["function"] {
        Value::Null => value,
        function => function,
    };
    let name = function["name"].as_str().ok_or_else(|| wrong("a function needs a `name`"))?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(is_name) {
        return Err(wrong("a name has letters, digits, `_`, `-`, `.`, and at most 128 of them"));
    }
    let parameters = match &function["parameters"] {
        Value::Null => serde_json::json!({"type": "object", "properties": {}}),
        object @ Value::Object(_) => object.clone(),
        _ => return Err(wrong("`parameters` is a JSON schema, so it is an object")),
    };
    Ok(Tool {
        name: name.to_owned(),
        description: function["description"].as_str().map(str::to_owned),
        parameters,
        strict: function["strict"].as_bool().unwrap_or(false),
    })
}

/// Most tools of a request. Agents have some hundreds.
const MOST_TOOLS: usize = 1024;

/// Refuses more tools than a request may have.
pub fn check_count(tools: &[Value]) -> Result<(), ApiError> {
    if tools.len() > MOST_TOOLS {
        let message = format!("`tools` has {} functions, {MOST_TOOLS} are the most", tools.len());
        return Err(ApiError::field("tools", message));
    }
    Ok(())
}

/// `tools`.
pub fn tools(list: &[Value]) -> Result<Vec<Tool>, ApiError> {
    check_count(list)?;
    let tools: Vec<Tool> =
        list.iter().enumerate().map(|(i, value)| tool(value, &format!("tools[{i}]"))).collect::<Result<_, _>>()?;
    let mut names = HashSet::new();
    for tool in &tools {
        if !names.insert(&tool.name) {
            return Err(ApiError::field("tools", format!("`tools`: there are two functions {:?}", tool.name)));
        }
    }
    Ok(tools)
}

/// `tool_choice`.
pub fn tool_choice(value: &Value, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    let wrong = |what: String| ApiError::field("tool_choice", format!("`tool_choice`: {what}")).code("invalid_value");
    let choice = match value {
        Value::Null => return Ok(ToolChoice::Auto),
        Value::String(word) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" | "any" => ToolChoice::Required,
            other => return Err(wrong(format!("{other:?} must be one of auto, none, required"))),
        },
        Value::Object(object) => {
            let name = object.get("function").and_then(|f| f["name"].as_str()).or_else(|| object.get("name")?.as_str());
            let name = name.ok_or_else(|| wrong("say which function, as `function.name`".into()))?;
            ToolChoice::Named(name.to_owned())
        }
        _ => return Err(wrong("it must be a word or an object".into())),
    };
    match &choice {
        ToolChoice::Required if tools.is_empty() => Err(wrong("a call is required, but there are no `tools`".into())),
        ToolChoice::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
            Err(wrong(format!("there is no function {name:?} among `tools`")))
        }
        _ => Ok(choice),
    }
}

/// `response_format` of chat completions, and `text.format` of responses.
pub fn form(value: &Value, place: &str) -> Result<TextForm, ApiError> {
    let wrong = |what: String| ApiError::field(place, format!("`{place}`: {what}")).code("invalid_value");
    let schema = |holder: &Value| match &holder["schema"] {
        Value::Null => Err(wrong("a JSON schema is needed, as `schema`".into())),
        schema => Ok(TextForm::JsonSchema(schema.clone())),
    };
    let text = |name: &str| match value[name].as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong(format!("`{name}` is needed"))),
    };
    match (value, value["type"].as_str()) {
        (Value::Null, _) | (_, Some("text")) => Ok(TextForm::Free),
        (_, Some("json_object")) if value["schema"].is_object() => schema(value),
        (_, Some("json_object")) => Ok(TextForm::JsonObject),
        (_, Some("json_schema")) if value["json_schema"].is_object() => schema(&value["json_schema"]),
        (_, Some("json_schema")) => schema(value),
        (_, Some("regex")) => text("regex").map(TextForm::Regex),
        (_, Some("grammar" | "lark")) => text("grammar").map(TextForm::Lark),
        (_, Some(other)) => {
            Err(wrong(format!("{other:?} must be one of text, json_object, json_schema, regex, grammar")))
        }
        (_, None) => Err(wrong("say which, as `type`".into())),
    }
}

/// Checks the roles of messages.
pub fn check_messages(messages: &[Map<String, Value>]) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "`messages` is empty: a conversation has at least one message"));
    }
    for (i, message) in messages.iter().enumerate() {
        let role = message.get("role").and_then(Value::as_str);
        let missing = |name: &str| message.get(name).is_none_or(Value::is_null);
        let speaks = matches!(role, Some("system" | "developer" | "user" | "tool" | "function"));
        if speaks && missing("content") {
            let place = format!("messages[{i}].content");
            return Err(ApiError::field(place.clone(), format!("`{place}` is missing")).code("invalid_value"));
        }
        let known = ["system", "developer", "user", "assistant", "tool", "function"];
        if !role.is_some_and(|role| known.contains(&role)) {
            let place = format!("messages[{i}].role");
            let message = format!("`{place}` is {role:?}, it must be one of {}", known.join(", "));
            return Err(ApiError::field(place, message).code("invalid_value"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tools_are_their_own_and_not_too_many() {
        let named = |name: String| serde_json::json!({"type": "function", "function": {"name": name}});
        let many = |count: usize| (0..count).map(|i| named(i.to_string())).collect::<Vec<_>>();
        assert_eq!(tools(&many(MOST_TOOLS)).unwrap().len(), MOST_TOOLS);
        assert_eq!(tools(&many(MOST_TOOLS + 1)).unwrap_err().param.as_deref(), Some("tools"));
        let twice = [named("a".into()), named("b".into()), named("a".into())];
        assert!(tools(&twice).unwrap_err().message.contains("two functions"));
    }
}

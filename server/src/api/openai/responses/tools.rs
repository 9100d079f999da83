//! `tools` and `tool_choice` of `/v1/responses`.

use std::collections::BTreeSet;

use crate::ask::{Tool, ToolChoice};
use serde_json::{Value, json};

use crate::api::openai::request::{check_count, tool, tool_choice};
use crate::error::ApiError;

/// The argument of the function that represents a `custom` tool.
pub const INPUT: &str = "input";

/// The tools of a request.
#[derive(Debug, Default)]
pub struct Declared {
    /// The functions that are declared to the model.
    pub tools: Vec<Tool>,
    /// Names of `custom` tools, whose only argument is a text.
    pub custom: BTreeSet<String>,
    /// The tools, as the response repeats them.
    pub echo: Vec<Value>,
    /// The tools that were left out, and why.
    pub notes: Vec<String>,
}

/// Reads `tools`: functions, and `custom` tools, which become functions with one text. Tools that run at OpenAI are left out,
/// because the model would call them if it knew about them, and nothing here runs them.
///
/// # Errors
/// Names the invalid tool.
pub fn declared(list: &[Value]) -> Result<Declared, ApiError> {
    check_count(list)?;
    let mut declared = Declared::default();
    for (i, value) in list.iter().enumerate() {
        let place = format!("tools[{i}]");
        if !value.is_object() {
            return Err(ApiError::field(&place, format!("`{place}` must be an object")).code("invalid_type"));
        }
        let (tool, echo) = match value["type"].as_str() {
            Some("function") | None => function(value, &place)?,
            Some("custom") => custom(value, &place)?,
            Some(other) => {
                declared.notes.push(format!("{place} is left out: this server has no tool of type {other:?}"));
                continue;
            }
        };
        if declared.tools.iter().any(|other| other.name == tool.name) {
            return Err(ApiError::field(&place, format!("`{place}`: there are two functions {:?}", tool.name)));
        }
        if echo["type"] == "custom" {
            declared.custom.insert(tool.name.clone());
        }
        declared.tools.push(tool);
        declared.echo.push(echo);
    }
    Ok(declared)
}

fn function(value: &Value, place: &str) -> Result<(Tool, Value), ApiError> {
    let tool = tool(value, place)?;
    let echo = json!({
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    });
    Ok((tool, echo))
}

/// A tool that takes a text, either any text or one in a grammar. The grammar is described to the model, but not enforced, because
/// it would have to apply inside a JSON string.
fn custom(value: &Value, place: &str) -> Result<(Tool, Value), ApiError> {
    let format = &value["format"];
    let mut text = String::from("The text that the tool takes, as it is.");
    if let Some(definition) = format["definition"].as_str() {
        let syntax = format["syntax"].as_str().unwrap_or("lark");
        text = format!("The text that the tool takes. It must match this {syntax} grammar:\n{definition}");
    }
    let stand_in = json!({
        "type": "function",
        "name": value["name"],
        "description": value["description"],
        "parameters": {
            "type": "object",
            "properties": {INPUT: {"type": "string", "description": text}},
            "required": [INPUT],
            "additionalProperties": false,
        },
    });
    Ok((tool(&stand_in, place)?, value.clone()))
}

/// Reads `tool_choice`. Returns it, and the declared tools that it allows.
///
/// # Errors
/// If it is invalid.
pub fn choice(value: &Value, declared: &Declared) -> Result<(ToolChoice, Vec<Tool>), ApiError> {
    let wrong = |what: String| ApiError::field("tool_choice", format!("`tool_choice`: {what}")).code("invalid_value");
    let all = || declared.tools.clone();
    match value["type"].as_str() {
        Some("allowed_tools") => {
            let list = value["tools"].as_array().ok_or_else(|| wrong("say which tools, as `tools`".into()))?;
            let names: BTreeSet<&str> = list.iter().filter_map(|tool| tool["name"].as_str()).collect();
            let allowed: Vec<Tool> = all().into_iter().filter(|tool| names.contains(tool.name.as_str())).collect();
            if let Some(name) = names.iter().find(|name| allowed.iter().all(|tool| tool.name != **name)) {
                return Err(wrong(format!("there is no function {name:?} among `tools`")));
            }
            let mode = match &value["mode"] {
                mode @ (Value::Null | Value::String(_)) => mode,
                _ => return Err(wrong("`mode` is one of auto, none, required".into())),
            };
            Ok((tool_choice(mode, &allowed)?, allowed))
        }
        Some("function" | "custom") | None => Ok((tool_choice(value, &declared.tools)?, all())),
        Some(other) => Err(wrong(format!("this server has no tool of type {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_and_texts_are_told_and_the_rest_is_left_out() {
        let list = [
            json!({"type": "function", "name": "read", "parameters": {"type": "object"}, "strict": true}),
            json!({"type": "web_search"}),
            json!({"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: \"x\""}}),
        ];
        let declared = declared(&list).unwrap();
        assert_eq!(declared.tools.iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["read", "apply_patch"]);
        assert!(declared.custom.contains("apply_patch"));
        let text = declared.tools[1].parameters["properties"]["input"]["description"].as_str().unwrap();
        assert!(text.contains("start: \"x\""), "{text}");
        assert_eq!(declared.notes.len(), 1);
        assert!(declared.notes[0].contains("web_search"), "{:?}", declared.notes);
        assert_eq!(declared.echo[0]["description"], Value::Null);
    }

    #[test]
    fn only_allowed_tools_are_left() {
        let list = ["a", "b"].map(|name| json!({"type": "function", "name": name}));
        let declared = declared(&list).unwrap();
        let of = |value: Value| choice(&value, &declared);
        let only_a = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "a"}]});
        let (choice, tools) = of(only_a).unwrap();
        assert_eq!((choice, tools.len()), (ToolChoice::Required, 1));
        assert_eq!(of(json!({"type": "function", "name": "b"})).unwrap().0, ToolChoice::Named("b".into()));
        assert_eq!(of(Value::Null).unwrap().0, ToolChoice::Auto);
        for wrong in [
            json!({"type": "function", "name": "c"}),
            json!({"type": "web_search"}),
            json!({"type": "allowed_tools", "tools": [{"name": "c"}]}),
            json!({"type": "allowed_tools"}),
            json!("sometimes"),
            json!(1),
        ] {
            assert_eq!(of(wrong.clone()).unwrap_err().param.as_deref(), Some("tool_choice"), "{wrong}");
        }
    }
}

//! The tools that a request offers to the model.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::{DialectError, clip};

/// Most tools of a request.
pub const MAX_TOOLS: usize = 1024;

/// Longest name of a tool, in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// How deep schemas are searched for the types of a parameter.
const MAX_SCHEMA_DEPTH: usize = 16;

/// Tools, in the order of the request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tools {
    tools: Vec<Tool>,
}

/// A function that the model can call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name, without white space, quotes or angle brackets.
    pub name: String,
    /// JSON schema of its arguments; if the request has none, an object without properties.
    pub parameters: Value,
    /// Whether arguments must follow the schema.
    pub strict: bool,
}

/// Which tools the answer may or must call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl Tools {
    /// Reads `tools` of OpenAI's chat completions: a list of `{"type": "function", "function": {"name", "parameters", …}}`. It also
    /// reads the flat form of the Responses API (`{"type": "function", "name", "parameters"}`); `null` means no tools.
    ///
    /// # Errors
    /// If it has another form, names repeat, or a name could be mistaken for markup.
    pub fn from_openai(tools: &Value) -> Result<Self, DialectError> {
        let list = match tools {
            Value::Null => return Ok(Self::default()),
            Value::Array(list) if list.len() <= MAX_TOOLS => list,
            other => return Err(DialectError::bad("tools", "a list of at most 1024 tools", other)),
        };
        let read = list.iter().enumerate().map(|(i, tool)| Tool::read(&format!("tools[{i}]"), tool));
        let tools: Vec<Tool> = read.collect::<Result<_, _>>()?;
        let mut names = BTreeSet::new();
        match tools.iter().find(|tool| !names.insert(tool.name.as_str())) {
            Some(twice) => Err(DialectError::DuplicateTool { name: twice.name.clone() }),
            None => Ok(Self { tools }),
        }
    }

    /// Whether there are none. Then an answer contains no calls.
    pub fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    /// All tools.
    pub fn iter(&self) -> impl Iterator<Item = &Tool> {
        self.tools.iter()
    }

    /// Only the tools to which a request restricts itself.
    #[must_use]
    pub fn only(&self, allows: impl Fn(&str) -> bool) -> Self {
        Self { tools: self.iter().filter(|tool| allows(&tool.name)).cloned().collect() }
    }

    /// The tool with this name.
    pub fn get(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }
}

impl Tool {
    fn read(field: &str, tool: &Value) -> Result<Self, DialectError> {
        let kind = tool.get("type").unwrap_or(&Value::Null);
        match kind.as_str() {
            Some("function") => {}
            None if kind.is_null() && tool.is_object() => {}
            Some(kind) => return Err(DialectError::Unsupported { field: field.to_owned(), kind: clip(kind) }),
            None => return Err(DialectError::bad(field, "an object with the type `function`", tool)),
        }
        let function = tool.get("function").unwrap_or(tool);
        let name = function.get("name").unwrap_or(&Value::Null);
        let usable = |name: &&str| !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(is_plain);
        let Some(usable) = name.as_str().filter(usable) else {
            let expected = "a name of at most 256 bytes without white space, quotes and brackets";
            return Err(DialectError::bad(format!("{field}.function.name"), expected, name));
        };
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => serde_json::json!({"type": "object", "properties": {}}),
            Some(schema @ Value::Object(_)) => schema.clone(),
            Some(other) => {
                return Err(DialectError::bad(format!("{field}.function.parameters"), "a JSON schema", other));
            }
        };
        let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { name: usable.to_owned(), parameters, strict })
    }

    /// Names of the parameters that a call must have.
    pub(crate) fn required(&self) -> Vec<&str> {
        let names = self.parameters.get("required").and_then(Value::as_array);
        names.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// The types that a parameter may have, as far as the schema tells.
    pub(crate) fn types(&self, parameter: &str) -> Types {
        let mut types = Types::default();
        let schema = Schema { root: &self.parameters };
        match schema.property(&self.parameters, parameter) {
            Some(property) => schema.collect(property, &mut types, 0),
            None => types.any = true,
        }
        types
    }
}

/// Whether no family could mistake the character for markup.
fn is_plain(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !matches!(c, '<' | '>' | '"' | '\'' | '{' | '}' | '[' | ']' | '(' | ')')
}

/// JSON types that a schema allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Types {
    pub(crate) string: bool,
    pub(crate) null: bool,
    pub(crate) boolean: bool,
    pub(crate) number: bool,
    pub(crate) object: bool,
    pub(crate) array: bool,
    /// Whether the schema says nothing.
    pub(crate) any: bool,
}

impl Types {
    /// Whether every value is a string.
    pub(crate) fn is_string(self) -> bool {
        self == Self { string: true, ..Self::default() }
    }

    /// The value of a parameter's text. Python's spellings of constants count, because models write them.
    ///
    /// If the text is JSON of a type that the schema allows, the value is that JSON, byte for byte. Otherwise it is a string, if
    /// strings are allowed or the text is not JSON at all.
    pub(crate) fn json(self, text: &str) -> String {
        let trimmed = text.trim();
        let constant = match trimmed {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            other => other,
        };
        let admitted = match serde_json::from_str::<serde::de::IgnoredAny>(constant) {
            Err(_) => false,
            Ok(_) => match constant.as_bytes().first() {
                Some(b'"') => !self.string,
                Some(b'{') => self.object || !self.string,
                Some(b'[') => self.array || !self.string,
                Some(b't' | b'f') => self.boolean || !self.string,
                Some(b'n') => self.null || !self.string,
                _ => self.number || !self.string,
            },
        };
        match admitted {
            true => constant.to_owned(),
            false => Value::from(text).to_string(),
        }
    }

    fn add(&mut self, name: &str) {
        match name {
            "string" => self.string = true,
            "null" => self.null = true,
            "boolean" => self.boolean = true,
            "number" | "integer" => self.number = true,
            "object" => self.object = true,
            "array" => self.array = true,
            _ => self.any = true,
        }
    }

    fn add_value(&mut self, value: &Value) {
        self.add(match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        });
    }
}

/// A schema, to resolve references into it.
struct Schema<'a> {
    root: &'a Value,
}

impl<'a> Schema<'a> {
    fn property(&self, schema: &'a Value, name: &str) -> Option<&'a Value> {
        let own = schema.get("properties").and_then(|properties| properties.get(name));
        own.or_else(|| schema.get("additionalProperties").filter(|more| more.is_object()))
    }

    fn collect(&self, schema: &'a Value, types: &mut Types, depth: usize) {
        if depth > MAX_SCHEMA_DEPTH {
            types.any = true;
            return;
        }
        if let Some(target) = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix('#')) {
            return match self.root.pointer(target) {
                Some(target) => self.collect(target, types, depth + 1),
                None => types.any = true,
            };
        }
        let branches: Vec<&Value> =
            ["anyOf", "oneOf", "allOf"].iter().filter_map(|name| schema.get(*name)?.as_array()).flatten().collect();
        match (schema.get("type"), schema.get("enum"), schema.get("const")) {
            (Some(Value::String(name)), ..) => types.add(name),
            (Some(Value::Array(names)), ..) => names.iter().filter_map(Value::as_str).for_each(|n| types.add(n)),
            (None, Some(Value::Array(values)), _) => values.iter().for_each(|value| types.add_value(value)),
            (None, _, Some(value)) => types.add_value(value),
            _ if branches.is_empty() => types.any = true,
            _ => {}
        }
        if schema.get("nullable") == Some(&Value::Bool(true)) {
            types.null = true;
        }
        branches.into_iter().for_each(|branch| self.collect(branch, types, depth + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tool(properties: Value) -> Tool {
        let parameters = json!({"type": "object", "properties": properties, "$defs": {"n": {"type": "integer"}}});
        Tool { name: "t".into(), parameters, strict: false }
    }

    #[test]
    fn values_get_the_type_that_the_schema_says() {
        let tool = tool(json!({
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "maybe": {"type": ["string", "null"]},
            "either": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "string"}]},
            "list": {"type": "array"},
            "colour": {"enum": ["red", "green"]},
            "free": {},
        }));
        for (parameter, text, json) in [
            ("text", "5", "\"5\""),
            ("text", "a\"b", "\"a\\\"b\""),
            ("count", "5", "5"),
            ("count", " 1e3 ", "1e3"),
            ("count", "many", "\"many\""),
            ("maybe", "null", "null"),
            ("maybe", "5", "\"5\""),
            ("either", "5", "5"),
            ("either", "five", "\"five\""),
            ("list", "[1,  2]", "[1,  2]"),
            ("colour", "red", "\"red\""),
            ("free", "{\"a\": True}", "\"{\\\"a\\\": True}\""),
            ("free", "True", "true"),
            ("free", "\"quoted\"", "\"quoted\""),
            ("unknown", "0.10", "0.10"),
            ("unknown", "word", "\"word\""),
        ] {
            assert_eq!(tool.types(parameter).json(text), json, "{parameter} {text}");
        }
        assert!(tool.types("text").is_string() && tool.types("colour").is_string() && !tool.types("maybe").is_string());
    }

    #[test]
    fn schemas_that_refer_to_themselves_end() {
        let parameters = json!({"properties": {"a": {"$ref": "#/properties/a"}}});
        let tool = Tool { name: "t".into(), parameters, strict: false };
        assert_eq!(tool.types("a").json("7"), "7");
    }

    #[test]
    fn tools_are_read_and_bad_ones_refused() {
        let good = json!([{"type": "function", "function": {"name": "a", "strict": true}}, {"type": "function", "name": "b.c"}]);
        let tools = Tools::from_openai(&good).unwrap();
        assert!(tools.get("a").unwrap().strict && tools.get("b.c").is_some());
        assert_eq!(tools.only(|name| name == "a").iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["a"]);
        assert!(Tools::from_openai(&Value::Null).unwrap().is_empty());
        for (bad, field) in [
            (json!({}), "tools"),
            (json!([1]), "tools[0]"),
            (json!([{"type": "web_search"}]), "tools[0]"),
            (json!([{"type": "function", "function": {"name": "a>b"}}]), "tools[0].function.name"),
            (json!([{"type": "function", "function": {"name": "a", "parameters": 1}}]), "tools[0].function.parameters"),
        ] {
            let error = Tools::from_openai(&bad).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
        let twice = json!([{"type": "function", "name": "a"}, {"type": "function", "name": "a"}]);
        assert_eq!(Tools::from_openai(&twice), Err(DialectError::DuplicateTool { name: "a".into() }));
    }
}

//! Grammars of calls, for all families except gpt-oss.

use serde_json::{Map, Value};

use super::write::{Writer, schema};
use crate::syntax::{Calls, Fields, Named, Objects, Parameter, QUOTE, Tagged};
use crate::tools::Tool;

/// One way in which calls can begin.
pub(super) struct Entry {
    /// The marker that begins them.
    pub(super) marker: String,
    /// Everything that follows it, as part of a rule.
    pub(super) behind: String,
}

/// The text around calls.
struct Frame {
    /// Before the first call, between two calls, and after the last.
    open: String,
    between: String,
    close: String,
}

/// The ways in which calls can begin, the usual one first.
pub(super) fn entries(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool) -> Vec<Entry> {
    let alternatives: Vec<String> = tools.iter().enumerate().map(|(i, tool)| call(writer, i, tool)).collect();
    writer.rule("call", &alternatives.join(" | "));
    let syntax = writer.syntax;
    let own = frame(&syntax.calls, syntax.name);
    // Calls that begin without a marker.
    let bare = matches!(syntax.calls, Calls::Objects(Objects { bare: true, .. }) | Calls::Python);
    let marker = if bare { "" } else { syntax.calls.open() };
    let (section, lines) = match (syntax.section, &syntax.calls) {
        (Some(section), Calls::Tagged(_)) => (Some(section), "\n"),
        (section, _) => (section, ""),
    };
    let mut entries = Vec::new();
    let mut add = |marker: &str, before: &str, after: &str| {
        let again = match parallel {
            true => format!("( {} call )*", writer.literal(&own.between)),
            false => String::new(),
        };
        let open = writer.literal(before);
        let close = writer.literal(&format!("{}{after}", own.close));
        entries.push(Entry { marker: marker.to_owned(), behind: format!("{open} call {again} {close}") });
    };
    match section {
        Some(section) => {
            add(section.open, &format!("{lines}{}", own.open), &format!("{lines}{}", section.close));
            match &syntax.calls {
                Calls::Tagged(Tagged { bare: false, .. }) => {}
                _ => add(marker, &own.open[marker.len()..], ""),
            }
        }
        None => add(marker, &own.open[marker.len()..], ""),
    }
    if let Calls::Tagged(Tagged { open, name, bare: true, .. }) = syntax.calls
        && !open.is_empty()
    {
        add(name, "", "");
    }
    entries
}

fn frame(calls: &Calls, name: &str) -> Frame {
    let frame = |open: &str, close: &str, line: &str| Frame {
        open: open.to_owned(),
        between: format!("{close}{line}{open}"),
        close: close.to_owned(),
    };
    match calls {
        Calls::Objects(Objects { bare: true, .. }) | Calls::Python => frame("", "", "; "),
        Calls::Objects(Objects { open, close, list: true, .. }) => Frame {
            open: format!("{open}["),
            between: ", ".to_owned(),
            close: format!("]{}", close.unwrap_or_default()),
        },
        Calls::Objects(Objects { open, close, .. }) => {
            frame(&format!("{open}\n"), &format!("\n{}", close.unwrap_or_default()), "\n")
        }
        Calls::Named(Named { open, close, .. }) => {
            frame(open, close.unwrap_or_default(), if name == "deepseek-v3" { "\n" } else { "" })
        }
        Calls::Tagged(Tagged { open, name, close, trailer, .. }) => {
            let line = if open.is_empty() || name.is_empty() { "" } else { "\n" };
            let trailer = trailer.map_or(String::new(), |trailer| format!("\n{trailer}"));
            frame(&format!("{open}{line}{name}"), &format!("{close}{trailer}"), "\n")
        }
        // The end of a call is part of its arguments.
        Calls::Fields(Fields { open, name, .. }) => frame(&format!("{open}{name}"), "", ""),
        Calls::Harmony => frame("", "", ""),
    }
}

/// The call of a tool, from its name to its arguments.
fn call(writer: &mut Writer<'_>, i: usize, tool: &Tool) -> String {
    let name = &tool.name;
    let family = writer.syntax.name;
    let (before, behind) = match &writer.syntax.calls {
        Calls::Tagged(syntax) => return tagged(writer, syntax, i, tool),
        Calls::Fields(Fields { close, .. }) => {
            let (begun, quote) = (writer.literal(&format!("{name}{{")), writer.literal(QUOTE));
            let last = writer.until(&format!("arguments_{i}"), &format!("}}{close}"));
            // Text never contains a special token.
            if !quote.starts_with("<[") {
                return format!("{begun} {last}");
            }
            writer.rule(&format!("FIELDS_{i}"), "/(?s:.*)/");
            return format!("{begun} ( FIELDS_{i}? {quote} )* {last}");
        }
        Calls::Named(Named { separator, .. }) => match family {
            "deepseek-v3" => (format!("function{separator}{name}\n```json\n"), "\n```"),
            "kimi-k2" => {
                let arguments = writer.json(&format!("arguments_{i}"), &schema(tool));
                let (id, separator) = (writer.literal(&format!("functions.{name}:")), writer.literal(separator));
                return format!("{id} /[0-9]+/ {separator} {arguments}");
            }
            _ => (format!("{name}{separator}"), ""),
        },
        Calls::Objects(Objects { bare: true, .. }) | Calls::Python => {
            (format!("{{\"name\": {}, \"parameters\": ", Value::from(name.as_str())), "}")
        }
        Calls::Objects(_) | Calls::Harmony => {
            (format!("{{\"name\": {}, \"arguments\": ", Value::from(name.as_str())), "}")
        }
    };
    let arguments = writer.json(&format!("arguments_{i}"), &schema(tool));
    format!("{} {arguments} {}", writer.literal(&before), writer.literal(behind))
}

/// The call of a tool with a tag for each parameter.
fn tagged(writer: &mut Writer<'_>, syntax: &Tagged, i: usize, tool: &Tool) -> String {
    let line = match (writer.syntax.name, syntax.parameter) {
        ("glm-4.7", _) | (_, Parameter::Nested(_)) => "",
        _ => "\n",
    };
    // If a line break ends a name, this name has its line break here.
    let ends = syntax.name_ends.first().map_or("", |(end, _)| end).trim_end();
    let name = writer.literal(&format!("{}{ends}{line}", tool.name));
    let properties = tool.parameters.get("properties").and_then(Value::as_object);
    let none = Map::new();
    let parameters = match tool.strict {
        true => {
            let required = tool.required();
            let parameter = |(j, (key, property)): (usize, (&String, &Value))| {
                let types = tool.types(key);
                let value = match types.string || types.any {
                    true => choices(property).map_or(Allowed::Text, Allowed::Choices),
                    false => Allowed::Json(within(&tool.parameters, property)),
                };
                let written = parameter(writer, syntax.parameter, (i, j), key, (value, line));
                if required.contains(&key.as_str()) { format!("( {written} )") } else { format!("( {written} )?") }
            };
            properties.unwrap_or(&none).iter().enumerate().map(parameter).collect::<Vec<_>>().join(" ")
        }
        false => format!("( {} )*", any_parameter(writer, syntax.parameter, i, line)),
    };
    format!("{name} {parameters}")
}

/// The values that a parameter can have.
enum Allowed {
    Text,
    Choices(Vec<String>),
    Json(Value),
}

fn parameter(
    writer: &mut Writer<'_>,
    syntax: Parameter,
    (i, j): (usize, usize),
    key: &str,
    (allowed, line): (Allowed, &str),
) -> String {
    let is_text = !matches!(allowed, Allowed::Json(_));
    let (before, pad, close) = match syntax {
        Parameter::Plain { open, middle, value, close, lines } => {
            let gap = if value.is_empty() { "" } else { line };
            let pad = if lines { "\n" } else { "" };
            (format!("{open}{key}{middle}{gap}{value}{pad}"), pad, close.to_owned())
        }
        Parameter::Typed { open, close } => (format!("{open}{key}\" string=\"{is_text}\">"), "", close.to_owned()),
        Parameter::Nested(token) => (format!("{token}<{key}>"), "", format!("{token}</{key}>")),
    };
    let nested = matches!((syntax, &allowed), (Parameter::Nested(_), Allowed::Json(schema)) if is_nested(schema));
    let value = match allowed {
        Allowed::Choices(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| writer.literal(choice)).collect();
            format!("( {} ) {}", choices.join(" | "), writer.literal(&format!("{pad}{close}")))
        }
        Allowed::Json(schema) if !nested => {
            let json = writer.json(&format!("value_{i}_{j}"), &schema);
            format!("{json} {}", writer.literal(&format!("{pad}{close}")))
        }
        Allowed::Text | Allowed::Json(_) => writer.until(&format!("value_{i}_{j}"), &close),
    };
    format!("{} {value} {}", writer.literal(&before), writer.literal(line))
}

/// Any parameter with any text.
fn any_parameter(writer: &mut Writer<'_>, syntax: Parameter, i: usize, line: &str) -> String {
    const KEY: &str = "/[^<>\"\\/\\s][^<>\"\\s]*/";
    let (open, middle, close) = match syntax {
        Parameter::Plain { open, middle, value, close, .. } => {
            let gap = if value.is_empty() { "" } else { line };
            (open.to_owned(), writer.literal(&format!("{middle}{gap}{value}")), close.to_owned())
        }
        Parameter::Typed { open, close } => {
            let is = |what: bool| writer.literal(&format!("\" string=\"{what}\">"));
            (open.to_owned(), format!("( {} | {} )", is(true), is(false)), close.to_owned())
        }
        // The closing tag would have to repeat the name, so this family's grammar can guarantee only an empty object.
        Parameter::Nested(_) => return "\"\"".to_owned(),
    };
    let value = writer.until(&format!("value_{i}"), &close);
    format!("{} {KEY} {middle} {value} {}", writer.literal(&open), writer.literal(line))
}

/// The possible strings of a value, if its schema lists them.
fn choices(property: &Value) -> Option<Vec<String>> {
    let values = match (property.get("enum"), property.get("const")) {
        (Some(Value::Array(values)), _) => values.clone(),
        (_, Some(value)) => vec![value.clone()],
        _ => return None,
    };
    let text = |value: Value| match value {
        Value::String(text) => Some(text).filter(|text| !text.is_empty()),
        Value::Null => Some("null".to_owned()),
        _ => None,
    };
    values.into_iter().map(text).collect()
}

/// A property's schema with the definitions to which it may refer.
fn within(root: &Value, property: &Value) -> Value {
    let mut schema = property.clone();
    if let Some(fields) = schema.as_object_mut() {
        for name in ["$defs", "definitions"] {
            if let Some(definitions) = root.get(name) {
                fields.entry(name).or_insert_with(|| definitions.clone());
            }
        }
    }
    schema
}

fn is_nested(schema: &Value) -> bool {
    let scalar = |name: &Value| matches!(name.as_str(), Some("integer" | "number" | "boolean" | "null"));
    match schema.get("type") {
        Some(Value::Array(names)) => !names.iter().all(scalar),
        Some(name) => !scalar(name),
        None => true,
    }
}

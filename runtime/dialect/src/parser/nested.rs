//! Values of MiniMax M3, in which objects and lists are nested tags.

use serde_json::{Map, Value};

use crate::syntax::M3;
use crate::tools::{Tool, Types};

/// How deep values may be nested; deeper ones are text.
const MAX_DEPTH: usize = 32;

/// The JSON of a parameter's text.
pub(super) fn json(text: &str, parameter: &str, tool: Option<&Tool>) -> String {
    let types = tool.map_or(Types { any: true, ..Types::default() }, |tool| tool.types(parameter));
    match fields(text, 0) {
        Some(value) => value.to_string(),
        None if text.trim().is_empty() && types.object && !types.string => "{}".to_owned(),
        None if text.trim().is_empty() && types.array && !types.string => "[]".to_owned(),
        None => types.json(text),
    }
}

/// Reads a sequence of tags: a list if all are items, otherwise an object. `None` if the text is something else.
fn fields(text: &str, depth: usize) -> Option<Value> {
    let mut rest = text.trim();
    if rest.is_empty() || depth > MAX_DEPTH {
        return None;
    }
    let mut fields: Vec<(&str, Value)> = Vec::new();
    while !rest.is_empty() {
        let (name, behind) = rest.strip_prefix(M3)?.strip_prefix('<')?.split_once('>')?;
        let (value, behind) = closed(name, behind)?;
        let any = Types { any: true, ..Types::default() };
        let leaf = || serde_json::from_str(&any.json(value)).unwrap_or(Value::Null);
        fields.push((name, self::fields(value, depth + 1).unwrap_or_else(leaf)));
        rest = behind.trim_start();
    }
    Some(match fields.iter().all(|(name, _)| *name == "item") {
        true => Value::Array(fields.into_iter().map(|(_, value)| value).collect()),
        false => Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>()),
    })
}

/// The text up to the tag that closes `name`, and the text after it. Tags of the same name may be nested in it.
fn closed<'a>(name: &str, text: &'a str) -> Option<(&'a str, &'a str)> {
    let (open, close) = (format!("{M3}<{name}>"), format!("{M3}</{name}>"));
    let mut depth = 0;
    let mut at = 0;
    loop {
        let end = at + text[at..].find(&close)?;
        match text[at..end].find(&open) {
            Some(inner) => {
                depth += 1;
                at += inner + open.len();
            }
            None if depth == 0 => return Some((&text[..end], &text[end + close.len()..])),
            None => {
                depth -= 1;
                at = end + close.len();
            }
        }
    }
}

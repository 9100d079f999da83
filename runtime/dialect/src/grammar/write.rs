//! Writes Lark.

use serde_json::{Value, json};

use crate::syntax::Syntax;
use crate::tools::Tool;

/// Rules of a grammar that is being written.
pub(super) struct Writer<'a> {
    pub(super) syntax: &'static Syntax,
    special: &'a [(&'static str, u32)],
    rules: String,
}

/// A part of a text.
enum Part<'t> {
    Text(&'t str),
    Special(u32),
}

impl<'a> Writer<'a> {
    pub(super) fn new(syntax: &'static Syntax, special: &'a [(&'static str, u32)]) -> Self {
        Self { syntax, special, rules: String::new() }
    }

    pub(super) fn finish(self) -> String {
        self.rules
    }

    /// Adds a rule.
    pub(super) fn rule(&mut self, name: &str, body: &str) {
        self.rules.push_str(&format!("{name}: {body}\n"));
    }

    fn parts<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = self.special.iter().filter_map(|&(marker, id)| Some((rest.find(marker)?, marker, id)));
            let next = found.min_by_key(|&(at, marker, _)| (at, usize::MAX - marker.len()));
            let (before, behind) = match next {
                Some((at, marker, _)) => (&rest[..at], &rest[at + marker.len()..]),
                None => (rest, ""),
            };
            parts.extend((!before.is_empty()).then_some(Part::Text(before)));
            parts.extend(next.map(|(.., id)| Part::Special(id)));
            rest = behind;
        }
        parts
    }

    /// A text, as part of a rule.
    pub(super) fn literal(&self, text: &str) -> String {
        written(&self.parts(text))
    }

    /// Any text up to a marker, and the marker, as part of a rule.
    pub(super) fn until(&mut self, name: &str, marker: &str) -> String {
        let parts = self.parts(marker);
        let (text, rest) = match parts.split_first() {
            Some((Part::Text(text), rest)) => (*text, rest),
            _ => ("", parts.as_slice()),
        };
        match rest {
            [] => {
                self.rule(&format!("{name}[lazy]"), &format!("/(?s:.*){}/", regex(text)));
                name.to_owned()
            }
            rest => {
                let (name, rest) = (name.to_uppercase(), written(rest));
                self.rule(&name, &format!("/(?s:.*){}/", regex(text)));
                format!("{name} {rest}")
            }
        }
    }

    /// A value in JSON, as part of a rule.
    pub(super) fn json(&mut self, name: &str, schema: &Value) -> String {
        self.rule(name, &format!("%json {schema}"));
        name.to_owned()
    }
}

fn written(parts: &[Part<'_>]) -> String {
    let parts: Vec<String> = parts
        .iter()
        .map(|part| match part {
            Part::Text(text) => Value::from(*text).to_string(),
            Part::Special(id) => format!("<[{id}]>"),
        })
        .collect();
    parts.join(" ")
}

/// A text as part of a regular expression.
fn regex(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            c if c.is_ascii_punctuation() && !matches!(c, '_' | '<' | '>' | '"' | '=') => escaped.extend(['\\', c]),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The schema of a tool's arguments: its own if it is strict, otherwise that of any object.
pub(super) fn schema(tool: &Tool) -> Value {
    match tool.strict {
        true => tool.parameters.clone(),
        false => json!({"type": "object"}),
    }
}

//! Arguments that are written as a tag for each parameter, and become JSON.

use super::nested;
use super::output::Output;
use super::scan::{Scan, begins, scan};
use crate::json::escaped;
use crate::syntax::{Parameter, Tagged};
use crate::tools::{Tool, Types};

/// Longest name of a parameter with its attributes, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// A call while it is being read.
#[derive(Debug, Clone)]
pub(super) struct Tags {
    syntax: &'static Tagged,
    tool: Option<Tool>,
    /// Names of the parameters so far.
    given: Vec<String>,
    /// The parameter whose value is being read.
    value: Option<Reading>,
    /// Whether there is text between parameters that does not belong there.
    astray: bool,
}

#[derive(Debug, Clone)]
struct Reading {
    /// Markers that end the value; only the first two are part of it.
    closes: Vec<String>,
    kind: Kind,
    /// Whether a line break would belong to the markup.
    skips_line: bool,
}

#[derive(Debug, Clone)]
enum Kind {
    /// A string, which is passed on as it arrives.
    String,
    /// JSON, which is passed on as it arrives.
    Json,
    /// Anything else.
    Whole { name: String, types: Types, text: String, nested: bool },
}

/// The beginning of a parameter.
enum Begin {
    Wait,
    Not,
    Parameter { used: usize, reading: Reading, name: String },
}

impl Tags {
    /// A call whose name has been read.
    pub(super) fn new(syntax: &'static Tagged, tool: Option<Tool>) -> Self {
        Self { syntax, tool, given: Vec::new(), value: None, astray: false }
    }

    /// Reads on. Returns how many bytes were consumed, and whether the call has ended.
    pub(super) fn read(&mut self, text: &str, end: bool, out: &mut Output) -> (usize, bool) {
        let mut used = 0;
        loop {
            let rest = &text[used..];
            let (more, goes_on) = match self.value.take() {
                Some(reading) => self.read_value(reading, rest, end, out),
                None if self.is_close(rest) => {
                    out.arguments("}");
                    return (used + rest.len() - rest.trim_start().len() + self.syntax.close.len(), true);
                }
                None => self.read_between(rest, end, out),
            };
            used += more;
            if !goes_on {
                return (used, false);
            }
        }
    }

    /// Handles an answer that ends within the call, once everything has been read.
    pub(super) fn finish(&mut self, out: &mut Output) {
        match self.value.take() {
            None if self.is_complete() => out.arguments("}"),
            None => {}
            Some(Reading { kind: Kind::Whole { text, .. }, .. }) => out.arguments(&text),
            Some(_) => {}
        }
    }

    /// Whether only the end of the call is missing: it has parameters, and all that the tool requires.
    fn is_complete(&self) -> bool {
        let required = self.tool.as_ref().map(|tool| tool.required());
        let has = |name: &str| self.given.iter().any(|given| given == name);
        !self.astray && !self.given.is_empty() && required.is_some_and(|names| names.into_iter().all(has))
    }

    fn is_close(&self, rest: &str) -> bool {
        !self.astray && rest.trim_start().starts_with(self.syntax.close)
    }

    /// Reads up to the next parameter or the end of the call. Returns how much was consumed, and whether there is more to do.
    fn read_between(&mut self, rest: &str, end: bool, out: &mut Output) -> (usize, bool) {
        let space = if self.astray { 0 } else { rest.len() - rest.trim_start().len() };
        let rest = &rest[space..];
        let open = self.syntax.parameter.open();
        let markers = [open.as_str(), self.syntax.close];
        let (at, marker) = match scan(rest, &markers, end) {
            Scan::Found { at, marker } => (at, marker),
            Scan::Safe(safe) => {
                let kept = if end { safe } else { rest[..safe].trim_end().len() };
                out.text(&rest[..kept]);
                self.astray |= kept > 0;
                return (space + kept, false);
            }
        };
        if at > 0 {
            out.text(rest[..at].trim_end());
            self.astray = false;
            return (space + at, true);
        }
        self.astray = false;
        if marker == 1 {
            return (space, true);
        }
        match self.begin(&rest[open.len()..], end) {
            Begin::Wait => (space, false),
            Begin::Not => {
                out.text(&open);
                self.astray = true;
                (space + open.len(), true)
            }
            Begin::Parameter { used, reading, name } => {
                let comma = if self.given.is_empty() { "" } else { ", " };
                let quote = if matches!(reading.kind, Kind::String) { "\"" } else { "" };
                out.arguments(&format!("{comma}\"{}\": {quote}", escaped(&name)));
                self.given.push(name);
                self.value = Some(reading);
                (space + open.len() + used, true)
            }
        }
    }

    /// Reads the name of a parameter and the text up to its value.
    fn begin(&self, rest: &str, end: bool) -> Begin {
        let (middle, value) = match self.syntax.parameter {
            Parameter::Plain { middle, value, .. } => (middle, value),
            Parameter::Typed { .. } | Parameter::Nested(_) => (">", ""),
        };
        let Some(at) = rest.find(middle) else {
            return if end || rest.len() > MAX_NAME_BYTES + middle.len() { Begin::Not } else { Begin::Wait };
        };
        let mut used = at + middle.len();
        if !value.is_empty() {
            let behind = rest[used..].trim_start();
            if !end && (behind.is_empty() || begins(behind, value)) {
                return Begin::Wait;
            }
            if !behind.starts_with(value) {
                return Begin::Not;
            }
            used = rest.len() - behind.len() + value.len();
        }
        let name = &rest[..at];
        if at > MAX_NAME_BYTES || name.contains('\n') || name.starts_with('/') {
            return Begin::Not;
        }
        let (name, is_string) = match self.syntax.parameter {
            Parameter::Typed { .. } => match name.split_once('"') {
                Some((name, attributes)) => (name, attribute(attributes)),
                None => return Begin::Not,
            },
            _ => (name.trim(), None),
        };
        Begin::Parameter { used, reading: self.reading(name, is_string), name: name.to_owned() }
    }

    fn reading(&self, name: &str, is_string: Option<bool>) -> Reading {
        let any = Types { any: true, ..Types::default() };
        let types = self.tool.as_ref().map_or(any, |tool| tool.types(name));
        let kind = match is_string {
            Some(true) => Kind::String,
            Some(false) => Kind::Json,
            None if types.is_string() => Kind::String,
            None => {
                let nested = matches!(self.syntax.parameter, Parameter::Nested(_));
                Kind::Whole { name: name.to_owned(), types, text: String::new(), nested }
            }
        };
        let (closes, skips_line) = match self.syntax.parameter {
            Parameter::Plain { close, lines: true, .. } => {
                let unclosed = self.syntax.trailer.map(|trailer| format!("\n{}\n{trailer}", self.syntax.close));
                (["\n", ""].iter().map(|line| format!("{line}{close}")).chain(unclosed).collect(), true)
            }
            Parameter::Plain { close, .. } | Parameter::Typed { close, .. } => (vec![close.to_owned()], false),
            Parameter::Nested(token) => (vec![format!("{token}</{name}>")], false),
        };
        Reading { closes, kind, skips_line }
    }

    fn read_value(&mut self, mut reading: Reading, rest: &str, end: bool, out: &mut Output) -> (usize, bool) {
        if rest.is_empty() {
            self.value = Some(reading);
            return (0, false);
        }
        let markers: Vec<&str> = reading.closes.iter().map(String::as_str).collect();
        let line = usize::from(reading.skips_line && rest.starts_with('\n') && !rest.starts_with(markers[0]));
        // A line break that may belong to the end must not be counted as one after the beginning.
        if reading.skips_line && !end && begins(rest, markers[0]) {
            self.value = Some(reading);
            return (0, false);
        }
        let text = &rest[line..];
        let found = scan(text, &markers, end);
        let length = match found {
            Scan::Found { marker, .. } if marker < 2 => markers[marker].len(),
            _ => 0,
        };
        reading.skips_line = false;
        match found {
            Scan::Safe(safe) => {
                reading.kind.more(&text[..safe], out);
                self.value = Some(reading);
                (line + safe, false)
            }
            Scan::Found { at, .. } => {
                reading.kind.more(&text[..at], out);
                reading.kind.finish(self.tool.as_ref(), out);
                (line + at + length, true)
            }
        }
    }
}

impl Kind {
    fn more(&mut self, more: &str, out: &mut Output) {
        match self {
            Self::String => out.arguments(&escaped(more)),
            Self::Json => out.arguments(more),
            Self::Whole { text, .. } => text.push_str(more),
        }
    }

    fn finish(self, tool: Option<&Tool>, out: &mut Output) {
        match self {
            Self::String => out.arguments("\""),
            Self::Json => {}
            Self::Whole { name, text, nested: true, .. } => out.arguments(&nested::json(&text, &name, tool)),
            Self::Whole { text, types, .. } => out.arguments(&types.json(&text)),
        }
    }
}

impl Parameter {
    fn open(self) -> String {
        match self {
            Self::Plain { open, .. } | Self::Typed { open, .. } => open.to_owned(),
            Self::Nested(token) => format!("{token}<"),
        }
    }
}

/// The attribute that tells whether a value is a string.
fn attribute(attributes: &str) -> Option<bool> {
    match attributes.trim() {
        "string=\"true\"" => Some(true),
        "string=\"false\"" => Some(false),
        _ => None,
    }
}

//! The beginning of a call, up to its arguments.

use super::arguments::Arguments;
use super::fields;
use super::python;
use super::scan::begins;
use super::tags::Tags;
use crate::json::value_length;
use crate::syntax::{Calls, Fields, Ids, Marks, Named, Objects, Syntax, Tagged};
use crate::tools::{MAX_NAME_BYTES, Tools};

/// The name of a call must be known within this many bytes. A call in JSON may have its arguments first.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// Most bytes of a name, including the text written around it.
const MAX_WRITTEN_BYTES: usize = 2 * MAX_NAME_BYTES;

/// The text at a place where a call could begin.
#[derive(Debug)]
pub(super) enum Header {
    /// It is too short to tell.
    Wait,
    /// It is not a call.
    Not,
    /// It is a call.
    Call(Begun),
}

/// A call that has begun.
#[derive(Debug)]
pub(super) struct Begun {
    /// Bytes up to its arguments.
    pub(super) length: usize,
    pub(super) name: String,
    /// An id that the model wrote.
    pub(super) id: Option<String>,
    pub(super) body: Body,
}

/// The form in which the arguments of a call follow.
#[derive(Debug, Clone)]
pub(super) enum Body {
    Json(Box<Arguments>),
    /// The call is one of a list of objects.
    Object(Box<Arguments>),
    Tags(Box<Tags>),
    Fields(fields::Fields),
    /// They have all been read.
    Whole(String),
}

/// Reads the beginning of a call at a marker with which `text` begins.
pub(super) fn header(syntax: &'static Syntax, tools: &Tools, text: &str, end: bool) -> Header {
    let bounded = bounded(text);
    let end = end || bounded.len() < text.len();
    let found = match &syntax.calls {
        Calls::Objects(objects) => marked_object(objects, bounded),
        Calls::Named(call) => named(syntax, call, bounded),
        Calls::Tagged(call) => tagged(call, tools, bounded),
        Calls::Fields(call) => of_fields(call, bounded),
        Calls::Python => python::header(bounded, tools),
        Calls::Harmony => Header::Not,
    };
    match found {
        Header::Wait if end || bounded.len() >= MAX_HEADER_BYTES - 4 => Header::Not,
        found => found,
    }
}

/// The part of a text that is examined.
fn bounded(text: &str) -> &str {
    let most = text.len().min(MAX_HEADER_BYTES);
    let fits = (0..=most).rev().find(|&at| text.is_char_boundary(at));
    &text[..fits.unwrap_or(0)]
}

fn marked_object(objects: &Objects, text: &str) -> Header {
    let rest = text[objects.open.len()..].trim_start();
    if objects.bare && rest.starts_with(char::is_alphabetic) {
        return shifted(python::built_in(rest), text.len() - rest.len());
    }
    let rest = rest.strip_prefix('[').map_or(rest, str::trim_start);
    let begun = object(rest, objects.close.into_iter().collect());
    shifted(begun, text.len() - rest.len())
}

/// An object that begins the answer or follows another one: it is a call only if it names a tool and has arguments.
pub(super) fn bare_object(text: &str, tools: &Tools) -> Header {
    match object(text, Vec::new()) {
        Header::Call(begun) if tools.get(&begun.name).is_none() || matches!(begun.body, Body::Whole(_)) => Header::Not,
        found => found,
    }
}

pub(super) fn shifted(found: Header, by: usize) -> Header {
    match found {
        Header::Call(begun) => Header::Call(Begun { length: begun.length + by, ..begun }),
        found => found,
    }
}

/// Reads `{"name": …, "arguments": ` up to the arguments, or the whole object if they come first or are missing.
pub(super) fn object(text: &str, ends: Vec<&'static str>) -> Header {
    let mut reader = Reader { text, at: 0 };
    match reader.next_char() {
        None => return Header::Wait,
        Some('{') => reader.at += 1,
        Some(_) => return Header::Not,
    }
    let mut name: Option<String> = None;
    let mut arguments: Option<String> = None;
    loop {
        match reader.next_char() {
            None => return Header::Wait,
            Some('}') => {
                let Some(name) = name else { return Header::Not };
                let body = Body::Whole(arguments.unwrap_or_else(|| "{}".to_owned()));
                return Header::Call(Begun { length: reader.at + 1, name, id: None, body });
            }
            Some(',') => reader.at += 1,
            Some('"') => {
                let Some(key) = reader.value() else { return Header::Wait };
                match reader.next_char() {
                    None => return Header::Wait,
                    Some(':') => reader.at += 1,
                    Some(_) => return Header::Not,
                }
                let is_arguments = matches!(key, "\"arguments\"" | "\"parameters\"");
                match (reader.next_char(), &name) {
                    (None, _) => return Header::Wait,
                    (Some(_), Some(name)) if is_arguments => {
                        let body = Body::Object(Box::new(Arguments::within(&text[..reader.at], ends)));
                        return Header::Call(Begun { length: reader.at, name: name.clone(), id: None, body });
                    }
                    _ => {}
                }
                let Some(value) = reader.value() else { return Header::Wait };
                match key {
                    "\"name\"" => match serde_json::from_str::<String>(value) {
                        Ok(string) if is_name(&string) => name = Some(string),
                        _ => return Header::Not,
                    },
                    _ if is_arguments => arguments = Some(value.to_owned()),
                    _ => {}
                }
            }
            Some(_) => return Header::Not,
        }
    }
}

/// A position in JSON.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next character that is not white space.
    fn next_char(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    /// The value here, if it is complete.
    fn value(&mut self) -> Option<&'a str> {
        let rest = &self.text[self.at..];
        let length = value_length(rest)?;
        self.at += length;
        Some(&rest[..length])
    }
}

/// Reads a name and the separator after it.
fn named(syntax: &'static Syntax, call: &'static Named, text: &str) -> Header {
    let rest = &text[call.open.len()..];
    // The older form of a marker that has two.
    if call.close.is_none() {
        match rest.trim_start().chars().next() {
            None => return Header::Wait,
            Some('[' | '{') => {
                return marked_object(&Objects { open: call.open, close: None, list: true, bare: false }, text);
            }
            Some(_) => {}
        }
    }
    let Some(at) = rest.find(call.separator) else { return short(rest, call.separator) };
    let mut length = call.open.len() + at + call.separator.len();
    let mut written = rest[..at].trim();
    // DeepSeek V3 writes a type at the place of the name, then the name on a line, and a fence.
    let behind = text[length..].trim_start();
    if written == "function" && !behind.starts_with('{') {
        const FENCE: &str = "```json";
        let Some(line) = behind.find('\n') else { return short(behind, "\n") };
        let fence = &behind[line + 1..];
        if line > MAX_WRITTEN_BYTES {
            return Header::Not;
        }
        if begins(fence, FENCE) {
            return Header::Wait;
        }
        written = behind[..line].trim();
        let fence = if fence.starts_with(FENCE) { FENCE.len() } else { 0 };
        length = text.len() - behind.len() + line + 1 + fence;
    }
    let (name, id) = match syntax.ids {
        Ids::Own => own_id(written),
        _ => match written.split_once("[CALL_ID]") {
            Some((name, id)) => (name.trim(), Some(id.trim())),
            None => (written, None),
        },
    };
    if !is_name(name) || at > MAX_WRITTEN_BYTES {
        return Header::Not;
    }
    let section = syntax.section.map(|marks| marks.close);
    let ends = match call.close {
        Some(close) => [close, call.open].into_iter().chain(section).collect(),
        None => Vec::new(),
    };
    let body = Body::Json(Box::new(Arguments::until(ends)));
    Header::Call(Begun { length, name: name.to_owned(), id: id.map(str::to_owned), body })
}

/// The meaning of a missing end of a name: after many bytes, there is no name.
fn short(text: &str, end: &str) -> Header {
    if text.len() > MAX_WRITTEN_BYTES + end.len() { Header::Not } else { Header::Wait }
}

/// Kimi's ids contain the name: `functions.name:0`.
fn own_id(written: &str) -> (&str, Option<&str>) {
    let name = written.strip_prefix("functions.").unwrap_or(written);
    match name.rsplit_once(':') {
        Some((name, number)) if number.bytes().all(|b| b.is_ascii_digit()) => (name, Some(written)),
        _ => (name, None),
    }
}

/// Reads a name up to the brace before its fields.
fn of_fields(call: &'static Fields, text: &str) -> Header {
    let rest = text[call.open.len()..].trim_start();
    if begins(rest, call.name) {
        return Header::Wait;
    }
    let Some(written) = rest.strip_prefix(call.name) else { return Header::Not };
    let Some(at) = written.find('{') else { return short(written, "{") };
    let name = written[..at].trim();
    if !is_name(name) {
        return Header::Not;
    }
    let length = text.len() - written.len() + at;
    Header::Call(Begun { length, name: name.to_owned(), id: None, body: Body::Fields(fields::Fields::new(call.close)) })
}

/// Reads a name up to the tags of parameters.
fn tagged(call: &'static Tagged, tools: &Tools, text: &str) -> Header {
    let (rest, is_open) = match text.strip_prefix(call.open) {
        Some(rest) if !call.open.is_empty() => (rest.trim_start(), true),
        _ => (text, call.name.is_empty()),
    };
    if rest.is_empty() || begins(rest, call.name) {
        return Header::Wait;
    }
    let Some(name) = rest.strip_prefix(call.name) else { return Header::Not };
    let ends = call.name_ends.iter().filter_map(|&(end, belongs)| Some((name.find(end)?, end, belongs)));
    let Some((at, end, belongs)) = ends.min_by_key(|&(at, ..)| at) else { return short(name, "<arg_key>") };
    let written = name[..at].trim();
    let is_call = is_name(written) && (is_open || call.open.is_empty() || tools.get(written).is_some());
    if !is_call {
        return Header::Not;
    }
    let length = text.len() - name.len() + at + if belongs { end.len() } else { 0 };
    let body = Body::Tags(Box::new(Tags::new(call, tools.get(written).cloned())));
    Header::Call(Begun { length, name: written.to_owned(), id: None, body })
}

/// Whether this can be the name of a function.
pub(super) fn is_name(name: &str) -> bool {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '<' | '>' | '"' | '{' | '}');
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(plain)
}

/// Reads the marker of a section and the first call after it. Without a call, it is not a section.
pub(super) fn section(syntax: &'static Syntax, marks: Marks, tools: &Tools, text: &str, end: bool) -> Header {
    let rest = text[marks.open.len()..].trim_start();
    let open = syntax.calls.open();
    if rest.is_empty() || begins(rest, open) {
        return if end { Header::Not } else { Header::Wait };
    }
    match rest.starts_with(open) {
        true => shifted(header(syntax, tools, rest, end), text.len() - rest.len()),
        false => Header::Not,
    }
}

//! Arguments as Gemma 4 writes them: `{name:value,…}`, where texts stand between tokens that never occur in texts.

use super::output::Output;
use crate::json::escaped;
use crate::syntax::QUOTE;

/// How deep lists and objects may be nested.
const MAX_DEPTH: usize = 64;

/// The arguments of a call that ends with a marker. They are passed on once it has arrived, because only its end tells what a text
/// is.
#[derive(Debug, Clone)]
pub(super) struct Fields {
    close: &'static str,
}

impl Fields {
    pub(super) fn new(close: &'static str) -> Self {
        Self { close }
    }

    /// Returns how much of the text was consumed, and whether the arguments are complete.
    pub(super) fn read(&mut self, text: &str, end: bool, out: &mut Output) -> (usize, bool) {
        let length = match text.find(self.close) {
            Some(at) => at,
            None if end => text.len(),
            None => return (0, false),
        };
        let written = text[..length].trim();
        // Malformed arguments are passed on as they are.
        out.arguments(&json(written).unwrap_or_else(|| written.to_owned()));
        (length, true)
    }
}

/// The arguments in JSON; `None` if they do not have this form.
fn json(written: &str) -> Option<String> {
    let mut reader = Reader { rest: written };
    let mut json = String::new();
    if !written.starts_with('{') {
        return None;
    }
    reader.value(&mut json, 0)?;
    reader.rest.trim().is_empty().then_some(json)
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    /// The next character that is not white space.
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    /// Moves past `part`, if it is next.
    fn take(&mut self, part: &str) -> bool {
        self.rest = self.rest.trim_start();
        let behind = self.rest.strip_prefix(part);
        self.rest = behind.unwrap_or(self.rest);
        behind.is_some()
    }

    /// The text before the first of `ends`, without white space around it.
    fn word(&mut self, ends: &[char]) -> Option<&'a str> {
        let (word, rest) = self.rest.split_at(self.rest.find(ends)?);
        self.rest = rest;
        Some(word.trim())
    }

    /// The text after a quote, up to the next quote.
    fn text(&mut self) -> Option<&'a str> {
        let (text, rest) = self.rest.split_once(QUOTE)?;
        self.rest = rest;
        Some(text)
    }

    fn value(&mut self, json: &mut String, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        if self.take(QUOTE) {
            json.push_str(&format!("\"{}\"", escaped(self.text()?)));
        } else if self.take("{") {
            self.items(json, ['{', '}'], depth)?;
        } else if self.take("[") {
            self.items(json, ['[', ']'], depth)?;
        } else {
            let word = self.word(&[',', '}', ']'])?;
            match word {
                "true" | "false" | "null" => json.push_str(word),
                "None" | "none" => json.push_str("null"),
                number if serde_json::from_str::<serde_json::Number>(number).is_ok() => json.push_str(number),
                _ => return None,
            }
        }
        Some(())
    }

    /// The contents of brackets, the first of which has been read; braces contain names too.
    fn items(&mut self, json: &mut String, [open, close]: [char; 2], depth: usize) -> Option<()> {
        json.push(open);
        let mut first = true;
        while self.peek()? != close {
            if !first {
                if !self.take(",") {
                    return None;
                }
                json.push_str(", ");
            }
            first = false;
            if open == '{' {
                let name = if self.take(QUOTE) { self.text()? } else { self.word(&[':'])? };
                if !self.take(":") {
                    return None;
                }
                json.push_str(&format!("\"{}\": ", escaped(name)));
            }
            self.value(json, depth + 1)?;
        }
        self.rest = &self.rest[close.len_utf8()..];
        json.push(close);
        Some(())
    }
}

//! Calls in the syntax of Python: `name(parameter=value, …)`.

use super::header::{Begun, Body, Header, bare_object, is_name, shifted};
use super::scan::begins;
use crate::json::escaped;
use crate::tools::Tools;

/// Marker before calls, which the model may write.
pub(super) const OPEN: &str = "<|python_start|>";
/// Marker after calls.
pub(super) const CLOSE: &str = "<|python_end|>";

/// How deep lists and dictionaries may be nested.
const MAX_DEPTH: usize = 64;

/// Why a text could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// It is not complete.
    Wait,
    /// It does not have this form.
    Not,
}

/// Reads the beginning of calls at their marker.
pub(super) fn header(text: &str, tools: &Tools) -> Header {
    let rest = text[OPEN.len()..].trim_start();
    shifted(bare(rest, tools), text.len() - rest.len())
}

/// Calls at the beginning of an answer: `[name(…), …]` or an object.
pub(super) fn bare(text: &str, tools: &Tools) -> Header {
    match text.chars().next() {
        None => Header::Wait,
        Some('{') => bare_object(text, tools),
        Some('[') => {
            let rest = text[1..].trim_start();
            shifted(next(rest, tools), text.len() - rest.len())
        }
        Some(_) if begins(text, OPEN) => Header::Wait,
        Some(_) => Header::Not,
    }
}

/// Another call of a list.
pub(super) fn next(text: &str, tools: &Tools) -> Header {
    if text.starts_with('{') {
        return bare_object(text, tools);
    }
    match call(text) {
        Header::Call(begun) if tools.get(&begun.name).is_none() => Header::Not,
        found => found,
    }
}

/// A call of a tool that Llama 3 was trained with: `brave_search.call(query="…")`.
pub(super) fn built_in(text: &str) -> Header {
    match call(text) {
        Header::Call(begun) => match begun.name.strip_suffix(".call") {
            Some(name) => Header::Call(Begun { name: name.to_owned(), ..begun }),
            None => Header::Not,
        },
        found => found,
    }
}

fn call(text: &str) -> Header {
    let mut reader = Reader { text, at: 0 };
    match reader.call() {
        Ok((name, arguments)) => {
            Header::Call(Begun { length: reader.at, name, id: None, body: Body::Whole(arguments) })
        }
        Err(Stop::Wait) => Header::Wait,
        Err(Stop::Not) => Header::Not,
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// The next character.
    fn peek(&self) -> Result<char, Stop> {
        self.rest().chars().next().ok_or(Stop::Wait)
    }

    /// The next character that is not white space.
    fn token(&mut self) -> Result<char, Stop> {
        self.at = self.text.len() - self.rest().trim_start().len();
        self.peek()
    }

    fn expect(&mut self, c: char) -> Result<(), Stop> {
        if self.token()? != c {
            return Err(Stop::Not);
        }
        self.at += c.len_utf8();
        Ok(())
    }

    fn call(&mut self) -> Result<(String, String), Stop> {
        let name = self.word()?;
        if !is_name(name) || name.starts_with(|c: char| c.is_numeric()) {
            return Err(Stop::Not);
        }
        self.expect('(')?;
        let mut json = String::from("{");
        while self.token()? != ')' {
            if json.len() > 1 {
                self.expect(',')?;
                if self.token()? == ')' {
                    break;
                }
                json.push_str(", ");
            }
            let parameter = self.word()?;
            self.expect('=')?;
            json.push_str(&format!("\"{}\": ", escaped(parameter)));
            self.value(&mut json, 0)?;
        }
        self.at += 1;
        json.push('}');
        Ok((name.to_owned(), json))
    }

    /// Letters, digits and other characters of names.
    fn word(&mut self) -> Result<&'a str, Stop> {
        self.token()?;
        let rest = self.rest();
        let is_end = |c: char| !(c.is_alphanumeric() || matches!(c, '_' | '.' | '-'));
        match rest.find(is_end) {
            Some(0) => Err(Stop::Not),
            Some(length) => {
                self.at += length;
                Ok(&rest[..length])
            }
            None => Err(Stop::Wait),
        }
    }

    fn value(&mut self, json: &mut String, depth: usize) -> Result<(), Stop> {
        match self.token()? {
            _ if depth > MAX_DEPTH => Err(Stop::Not),
            quote @ ('"' | '\'') => self.string(quote, json),
            '[' => self.sequence(']', json, depth),
            '(' => self.sequence(')', json, depth),
            '{' => self.dictionary(json, depth),
            '+' => Err(Stop::Not),
            _ => {
                let word = self.number_or_word()?;
                let constant = match word {
                    "True" | "true" => "true",
                    "False" | "false" => "false",
                    "None" | "null" => "null",
                    number if serde_json::from_str::<serde_json::Number>(number).is_ok() => number,
                    _ => return Err(Stop::Not),
                };
                json.push_str(constant);
                Ok(())
            }
        }
    }

    fn number_or_word(&mut self) -> Result<&'a str, Stop> {
        let rest = self.rest();
        let is_end = |c: char| !(c.is_alphanumeric() || matches!(c, '.' | '-' | '+'));
        let length = rest.find(is_end).ok_or(Stop::Wait)?;
        self.at += length;
        Ok(&rest[..length])
    }

    fn sequence(&mut self, close: char, json: &mut String, depth: usize) -> Result<(), Stop> {
        self.at += 1;
        json.push('[');
        let mut first = true;
        while self.token()? != close {
            if !first {
                self.expect(',')?;
                if self.token()? == close {
                    break;
                }
                json.push_str(", ");
            }
            first = false;
            self.value(json, depth + 1)?;
        }
        self.at += 1;
        json.push(']');
        Ok(())
    }

    fn dictionary(&mut self, json: &mut String, depth: usize) -> Result<(), Stop> {
        self.at += 1;
        json.push('{');
        let mut first = true;
        while self.token()? != '}' {
            if !first {
                self.expect(',')?;
                if self.token()? == '}' {
                    break;
                }
                json.push_str(", ");
            }
            first = false;
            match self.token()? {
                quote @ ('"' | '\'') => self.string(quote, json)?,
                _ => return Err(Stop::Not),
            }
            self.expect(':')?;
            json.push_str(": ");
            self.value(json, depth + 1)?;
        }
        self.at += 1;
        json.push('}');
        Ok(())
    }

    fn string(&mut self, quote: char, json: &mut String) -> Result<(), Stop> {
        self.at += 1;
        let mut text = String::new();
        let mut characters = self.rest().char_indices();
        loop {
            let (at, c) = characters.next().ok_or(Stop::Wait)?;
            match c {
                c if c == quote => {
                    self.at += at + 1;
                    json.push('"');
                    json.push_str(&escaped(&text));
                    json.push('"');
                    return Ok(());
                }
                '\\' => match characters.next().ok_or(Stop::Wait)?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    '\n' => {}
                    'u' => {
                        let digits: String = characters.by_ref().take(4).map(|(_, c)| c).collect();
                        if digits.chars().count() < 4 {
                            return Err(Stop::Wait);
                        }
                        let code = u32::from_str_radix(&digits, 16).map_err(|_| Stop::Not)?;
                        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                    }
                    c @ ('\\' | '"' | '\'') => text.push(c),
                    c => text.extend(['\\', c]),
                },
                c => text.push(c),
            }
        }
    }
}

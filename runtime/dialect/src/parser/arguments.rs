//! Arguments that are written in JSON.

use super::output::Output;
use super::scan::begins;
use crate::json::Value;

/// Arguments while they are being read.
#[derive(Debug, Clone)]
pub(super) struct Arguments {
    value: Value,
    /// The object that contains the arguments, up to them; the rest of it is dropped.
    envelope: Option<Value>,
    /// Markers that end the call, wherever they occur outside of strings. Without any, the call ends with the arguments.
    ends: Vec<&'static str>,
    /// Arguments that are written as a string with JSON in it.
    quoted: Option<String>,
    /// White space and fences after the arguments. They are dropped, unless more follows.
    behind: String,
}

/// The effect of a character.
enum Taken {
    /// The call continues.
    Goes,
    /// The call ends with it.
    Ends,
    /// The call has ended before it.
    Ended,
}

impl Arguments {
    /// Arguments between a separator and one of the markers.
    pub(super) fn until(ends: Vec<&'static str>) -> Self {
        Self { value: Value::default(), envelope: None, ends, quoted: None, behind: String::new() }
    }

    /// Arguments within an object; `before` is the part of it before them.
    pub(super) fn within(before: &str, ends: Vec<&'static str>) -> Self {
        let mut envelope = Value::default();
        before.chars().for_each(|c| {
            envelope.step(c);
        });
        Self { envelope: Some(envelope), ..Self::until(ends) }
    }

    /// Reads on. Returns how many bytes were consumed, and whether the call has ended. A marker that ends it is not consumed.
    pub(super) fn read(&mut self, text: &str, end: bool, out: &mut Output) -> (usize, bool) {
        let mut delta = String::new();
        let mut used = text.len();
        let mut over = false;
        for (at, c) in text.char_indices() {
            let rest = &text[at..];
            let is_marker = !self.in_string() && self.ends.iter().any(|marker| rest.starts_with(marker));
            if is_marker || !end && !self.in_string() && self.ends.iter().any(|marker| begins(rest, marker)) {
                (used, over) = (at, is_marker);
                break;
            }
            match self.take(c, &mut delta) {
                Taken::Goes => continue,
                Taken::Ends => used = at + c.len_utf8(),
                Taken::Ended => used = at,
            }
            over = true;
            break;
        }
        out.arguments(&delta);
        (used, over)
    }

    /// Handles an answer that ends within the call.
    pub(super) fn finish(&mut self, out: &mut Output) {
        out.arguments(&self.quoted.take().unwrap_or_default());
    }

    fn in_string(&self) -> bool {
        match &self.envelope {
            Some(envelope) if self.value.is_over() => envelope.in_string(),
            _ => self.value.in_string(),
        }
    }

    fn take(&mut self, c: char, delta: &mut String) -> Taken {
        let was_over = self.value.is_over();
        let belongs = self.value.step(c);
        if belongs {
            self.belongs(c, delta);
        }
        let ends_here = self.value.is_over() && !was_over;
        match &mut self.envelope {
            Some(envelope) => {
                envelope.step(c);
                if envelope.is_over() { Taken::Ends } else { Taken::Goes }
            }
            None if self.ends.is_empty() && ends_here => {
                if belongs {
                    Taken::Ends
                } else {
                    Taken::Ended
                }
            }
            None if belongs || !self.value.is_over() => Taken::Goes,
            None => {
                self.behind.push(c);
                if !c.is_whitespace() && c != '`' {
                    delta.push_str(&std::mem::take(&mut self.behind));
                }
                Taken::Goes
            }
        }
    }

    /// Takes a character of the arguments themselves.
    fn belongs(&mut self, c: char, delta: &mut String) {
        if c == '"' && self.envelope.is_some() && self.quoted.is_none() && self.value.is_string_only() {
            self.quoted = Some(String::new());
        }
        let Some(quoted) = &mut self.quoted else { return delta.push(c) };
        quoted.push(c);
        if self.value.is_over() {
            let quoted = self.quoted.take().unwrap_or_default();
            delta.push_str(&serde_json::from_str::<String>(&quoted).unwrap_or(quoted));
        }
    }
}

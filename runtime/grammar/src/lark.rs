//! Lark grammars as text: reads what is in them, and writes them.

use std::ops::Range;

use serde_json::Value;

use crate::GrammarError;
use crate::error::clip;

/// Longest grammar that a caller may bring, in bytes.
pub(crate) const MAX_BYTES: usize = 512 << 10;

/// Most rules and terminals in it. The library follows each reference with a nested call.
const MAX_DEFINITIONS: usize = 4000;

/// Most nested parentheses and brackets.
const MAX_DEPTH: usize = 64;

/// A JSON schema inside a Lark grammar, wherever the name of a rule may stand. The rest of the grammar does not affect its
/// value: for example, white space that the grammar ignores may not stand inside.
pub fn lark_json(schema: &Value) -> String {
    format!("%json {schema}")
}

/// A string literal.
pub(crate) fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// One of these texts, of which none is empty, as a terminal.
pub(crate) fn one_of(texts: &[String]) -> String {
    texts.iter().map(|text| literal(text)).collect::<Vec<_>>().join(" | ")
}

/// A schema inside a grammar: where `%json` and the schema stand, and the schema.
pub(crate) type Embedded = (Range<usize>, Value);

/// Checks the size and the depth of a grammar, and finds the schemas in it.
pub(crate) fn scan(text: &str) -> Result<Vec<Embedded>, GrammarError> {
    if text.len() > MAX_BYTES {
        return Err(GrammarError::TooLarge { what: format!("a grammar of {} bytes", text.len()), limit: MAX_BYTES });
    }
    let mut scanner = Scanner { text, at: 0, depth: 0, definitions: 0, schemas: Vec::new() };
    while scanner.at < text.len() {
        scanner.step()?;
    }
    Ok(scanner.schemas)
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
    definitions: usize,
    schemas: Vec<Embedded>,
}

impl Scanner<'_> {
    /// Goes past the next sign, or past a literal or comment, inside which signs mean nothing.
    fn step(&mut self) -> Result<(), GrammarError> {
        let rest = &self.text[self.at..];
        let Some(first) = rest.chars().next() else { return Ok(()) };
        let length = match first {
            '"' => quoted(rest, '"').ok_or_else(|| self.unfinished("a string"))?,
            '#' => line(rest),
            '/' if rest.starts_with("//") => line(rest),
            '/' => quoted(rest, '/').ok_or_else(|| self.unfinished("a regular expression"))?,
            '<' => name(rest).unwrap_or(1),
            '%' => return self.statement(),
            '(' | '[' | '{' => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    let what = format!("{} nested parentheses", self.depth);
                    return Err(GrammarError::TooLarge { what, limit: MAX_DEPTH });
                }
                1
            }
            ')' | ']' | '}' => {
                self.depth = self.depth.saturating_sub(1);
                1
            }
            ':' => {
                self.definitions += 1;
                if self.definitions > MAX_DEFINITIONS {
                    let what = format!("{} rules and terminals", self.definitions);
                    return Err(GrammarError::TooLarge { what, limit: MAX_DEFINITIONS });
                }
                1
            }
            other => other.len_utf8(),
        };
        self.at += length;
        Ok(())
    }

    /// A `%` and its operand.
    fn statement(&mut self) -> Result<(), GrammarError> {
        let rest = &self.text[self.at + 1..];
        let length = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
        let (word, rest) = rest.split_at(length);
        let start = self.at;
        self.at += 1 + length;
        if !matches!(word, "json" | "llguidance" | "regex") {
            return Ok(());
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(e)) => return Err(invalid(&format!("what follows `%{word}` is not JSON: {e}"))),
            None => return Err(self.unfinished("a `%` statement")),
        };
        self.at += values.byte_offset();
        if word == "json" {
            self.schemas.push((start..self.at, value));
        }
        Ok(())
    }

    fn unfinished(&self, what: &str) -> GrammarError {
        let line = self.text[..self.at].lines().count().max(1);
        invalid(&format!("line {line}: {what} does not end"))
    }
}

pub(crate) fn invalid(reason: &str) -> GrammarError {
    GrammarError::Invalid { what: "grammar", reason: clip(reason) }
}

/// Length of a text between two equal delimiters.
fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn line(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

/// Length of a token's name in angle brackets.
fn name(text: &str) -> Option<usize> {
    let end = text[1..].find(|c: char| c == '<' || c == '>' || c.is_whitespace())? + 1;
    text[end..].starts_with('>').then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn schemas_are_found_where_they_are_schemas() {
        let text = "start: \"%json {}\" /%json {}/ <%json> a // %json {}\n# \"\na: %json {\"const\": \"}\\\"/\"} \"x\"\n\
                    b: %json true";
        let found = scan(text).unwrap();
        let values: Vec<&Value> = found.iter().map(|(_, value)| value).collect();
        assert_eq!(values, [&json!({"const": "}\"/"}), &json!(true)]);
        assert_eq!(&text[found[0].0.clone()], "%json {\"const\": \"}\\\"/\"}");
        assert_eq!(&text[found[1].0.clone()], "%json true");
        let schema = json!({"const": "\u{7f}\n\"\u{2028}/*"});
        assert_eq!(scan(&format!("start: {}", lark_json(&schema))).unwrap()[0].1, schema);
    }

    #[test]
    fn sizes_and_depths_are_bounded() {
        for (text, word) in [
            ("a".repeat(MAX_BYTES + 1), "bytes"),
            ("start: ".to_owned() + &"(".repeat(1000), "parentheses"),
            ("a: \"b\"\n".repeat(10_000), "rules"),
            ("start: \"".to_owned(), "line 1"),
            ("\n\nstart: /a".to_owned(), "line 3"),
            ("start: %json {".to_owned(), "%json"),
            ("start: %json".to_owned(), "does not end"),
        ] {
            let error = scan(&text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}

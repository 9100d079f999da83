//! Finds where JSON values end, without changing a byte of them.

/// Position inside a value that is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Place {
    /// Before its first character.
    #[default]
    Before,
    /// Between brackets.
    Open,
    /// In a string, with or without brackets around it.
    String,
    /// In a string, after a backslash.
    Escape,
    /// In a number, `true`, `false`, `null`, or something that is not JSON.
    Scalar,
    /// Behind its end.
    After,
}

/// Follows one JSON value character by character. It knows only strings and brackets, so it can also follow most text that is
/// almost JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Value {
    place: Place,
    depth: usize,
}

impl Value {
    /// Moves on by a character. Returns whether the character belongs to the value: the character after a number does not, and
    /// neither does white space before the value.
    pub(crate) fn step(&mut self, c: char) -> bool {
        match (self.place, c) {
            (Place::After, _) => return false,
            (Place::Before, c) if c.is_ascii_whitespace() => return false,
            (Place::String, '\\') => self.place = Place::Escape,
            (Place::Escape, _) => self.place = Place::String,
            (Place::String, '"') => self.close(self.depth),
            (Place::String, _) => {}
            (Place::Scalar, ',' | ':' | ']' | '}') => return self.end(),
            (Place::Scalar, c) if c.is_ascii_whitespace() => return self.end(),
            (Place::Before | Place::Open, '"') => self.place = Place::String,
            (Place::Before | Place::Open, '{' | '[') => {
                self.depth += 1;
                self.place = Place::Open;
            }
            (Place::Open, '}' | ']') => {
                self.depth -= 1;
                self.close(self.depth);
            }
            (Place::Before, _) => self.place = Place::Scalar,
            (Place::Open | Place::Scalar, _) => {}
        }
        true
    }

    fn close(&mut self, depth: usize) {
        self.place = if depth == 0 { Place::After } else { Place::Open };
    }

    fn end(&mut self) -> bool {
        self.place = Place::After;
        false
    }

    /// Whether the value has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.place == Place::After
    }

    /// Whether a marker here would be text.
    pub(crate) fn in_string(&self) -> bool {
        matches!(self.place, Place::String | Place::Escape)
    }

    /// Whether the value as a whole is a string that has begun but not ended.
    pub(crate) fn is_string_only(&self) -> bool {
        self.depth == 0 && self.in_string()
    }
}

/// Length of the complete value at the beginning of `text`, with white space before it. `None` if it is not complete.
pub(crate) fn value_length(text: &str) -> Option<usize> {
    let mut value = Value::default();
    for (at, c) in text.char_indices() {
        let belongs = value.step(c);
        if value.is_over() {
            return Some(if belongs { at + c.len_utf8() } else { at });
        }
    }
    None
}

/// The text, as it is written inside a JSON string.
pub(crate) fn escaped(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_end_where_they_end() {
        for (text, length) in [
            (r#"{"a": "}\"]", "b": [1, {}]} rest"#, Some(27)),
            ("  12, 3", Some(4)),
            (r#""a\\" "#, Some(5)),
            ("true", None),
            (r#"{"a": "#, None),
            ("[]", Some(2)),
            ("", None),
        ] {
            assert_eq!(value_length(text), length, "{text}");
        }
    }

    #[test]
    fn text_is_escaped_as_json() {
        assert_eq!(escaped("a\"b\\\n\u{1}\u{e9}"), "a\\\"b\\\\\\n\\u0001\u{e9}");
    }
}

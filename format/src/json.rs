//! JSON as Python's `json` module writes it: with `NaN`, `Infinity` and `-Infinity`, which JSON does not have.
//!
//! Checkpoints are written by Python, whose `json.dump` writes these words by default, and whose reader accepts them. A
//! file should not be refused because of a key that nobody reads, but a key that is read must still hold something
//! sensible. So these words become strings of the same text: code that expects a number refuses them, and the message shows
//! what is in the file.

use std::borrow::Cow;

use serde::de::DeserializeOwned;

/// Python's words for numbers that JSON cannot express. None is the beginning of another.
const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

/// Reads JSON in which Python's words for numbers that are not finite may stand in the place of values; they become
/// strings.
///
/// # Errors
/// As [`serde_json::from_slice`]. Columns count the quotes that such words were given.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(strict) => match quote_words(bytes) {
            Cow::Borrowed(_) => Err(strict),
            Cow::Owned(quoted) => serde_json::from_slice(&quoted),
        },
    }
}

/// The same bytes with quotes around every such word outside of strings; borrowed if there is none.
fn quote_words(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut quoted = Vec::new();
    // Bytes up to here are in `quoted`.
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'"' {
            at += text_len(&bytes[at..]);
            continue;
        }
        let word = WORDS.iter().find(|word| bytes[at..].starts_with(word));
        let Some(word) = word.filter(|w| is_value(&bytes[..at], &bytes[at + w.len()..])) else {
            at += 1;
            continue;
        };
        quoted.extend_from_slice(&bytes[copied..at]);
        quoted.push(b'"');
        quoted.extend_from_slice(word);
        quoted.push(b'"');
        at += word.len();
        copied = at;
    }
    if copied == 0 {
        return Cow::Borrowed(bytes);
    }
    quoted.extend_from_slice(&bytes[copied..]);
    Cow::Owned(quoted)
}

/// Length in bytes of the string at the beginning of `bytes`, quotes included; that of all `bytes` if the string has
/// no end.
fn text_len(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Whether a word between `before` and `after` is a value.
fn is_value(before: &[u8], after: &[u8]) -> bool {
    let solid = |b: &&u8| !b.is_ascii_whitespace();
    before.iter().rev().find(solid).is_none_or(|b| b",:[".contains(b))
        && after.iter().find(solid).is_none_or(|b| b",]}".contains(b))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn words_of_python_read_as_texts() {
        let text = br#"{"a": NaN, "b":[Infinity,-Infinity], "time_step_limit": [0.0, Infinity]
            ,"c":{"d":-Infinity}, "e": 1.5}"#;
        let value: Value = from_slice(text).unwrap();
        let expected = json!({"a": "NaN", "b": ["Infinity", "-Infinity"], "time_step_limit": [0.0, "Infinity"],
            "c": {"d": "-Infinity"}, "e": 1.5});
        assert_eq!(value, expected);
        assert_eq!(from_slice::<Value>(b"NaN").unwrap(), json!("NaN"));
        assert_eq!(from_slice::<Value>(b" -Infinity ").unwrap(), json!("-Infinity"));
    }

    #[test]
    fn texts_that_hold_the_words_stay_as_they_are() {
        let text =
            br#"{"NaN": "x, NaN, \" Infinity ,", "Infinity": [-Infinity, "\\", "\\\"[NaN]"], "u": "\u0022,NaN,"}"#;
        let value: Value = from_slice(text).unwrap();
        let expected = json!({"NaN": "x, NaN, \" Infinity ,", "Infinity": ["-Infinity", "\\", "\\\"[NaN]"],
            "u": "\",NaN,"});
        assert_eq!(value, expected);
    }

    #[test]
    fn nothing_else_is_tolerated() {
        for text in [
            "[-NaN]",
            "[NaN1]",
            "[Infinityx]",
            "[1Infinity]",
            "[+Infinity]",
            "[nan]",
            "[Inf]",
            "{NaN: 1}",
            "{\"a\": 1, NaN : 1}",
            "[NaN",
            "[NaN NaN]",
            "[\"NaN",
            "[\"\\",
            "\"",
            "[NaN \"\\\"",
            "",
        ] {
            assert!(from_slice::<Value>(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_number_is_not_made_of_them() {
        let error = from_slice::<std::collections::BTreeMap<String, f64>>(br#"{"temperature": Infinity}"#).unwrap_err();
        assert!(error.to_string().contains("\"Infinity\""), "{error}");
    }
}

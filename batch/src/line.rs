//! A line of the input: a request in the form of OpenAI's batches
//! (<https://platform.openai.com/docs/guides/batch>), or the body of one alone.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};
use sluice_checksum::xxh3_128;

/// Most bytes of a `custom_id`.
const LONGEST_ID: usize = 512;
/// Tokens that a body alone with a `prompt` generates unless it says how many.
pub const PLAIN_TOKENS: u32 = 256;
/// Tokens that OpenAI's completions generate unless they say how many.
const COMPLETION_TOKENS: u32 = 16;
/// Characters of a name that errors show.
const SHOWN: usize = 80;

/// What plain lines ask for, by the field that they have.
const PLAIN: [(&str, &str); 3] =
    [("messages", "/v1/chat/completions"), ("prompt", "/v1/completions"), ("input", "/v1/responses")];

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The name that its result has.
    pub custom_id: String,
    /// The path that it would have been sent to.
    pub url: String,
    /// The body that would have been sent.
    pub body: Map<String, Value>,
    /// Whether the line was a body alone.
    pub plain: bool,
    /// Names of further fields beside the body, which mean nothing.
    pub others: Vec<String>,
}

/// Which line of the input a request is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Named {
    /// The line, from 1.
    pub line: u32,
    /// The name that its result has.
    pub custom_id: String,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Named { line, custom_id } = self;
        // The name of a request that has none says nothing new.
        match *custom_id == unnamed(*line as usize) {
            true => write!(f, "line {line}"),
            false => write!(f, "line {line}, custom_id {:?}", shown(custom_id)),
        }
    }
}

/// The name of a request without a `custom_id`.
fn unnamed(line: usize) -> String {
    format!("line-{line}")
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// The name that its result has.
    pub custom_id: String,
    /// A word for programs.
    pub code: &'static str,
    /// What is wrong, and what can be done.
    pub message: String,
}

/// What a request asks for, as far as it shows in its body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes of the text that is to be read, as JSON.
    pub text_bytes: u32,
    /// Most tokens of an answer, if the request says so or its path has a usual number.
    pub max_tokens: Option<u32>,
    /// How many answers.
    pub answers: u32,
}

/// 32 hexadecimal digits that follow from a request's name and from what they are for. They do not depend on the batch, so that the same
/// request has the same ids in whichever part of an input it is.
pub fn id_of(custom_id: &str, what: &str) -> String {
    format!("{:032x}", hash(custom_id, what))
}

/// A number that follows from a request's name and from what it is for.
pub fn number_of(custom_id: &str, what: &str) -> u64 {
    hash(custom_id, what) as u64
}

fn hash(custom_id: &str, what: &str) -> u128 {
    xxh3_128([what.as_bytes(), &[0], custom_id.as_bytes()].concat().as_slice())
}

/// The beginning of a name, for messages.
pub(crate) fn shown(id: &str) -> String {
    match id.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &id[..at]),
        None => id.to_owned(),
    }
}

impl Line {
    /// Reads line `number`, counted from 1. A request without a `custom_id` gets the name `line-NUMBER`.
    ///
    /// # Errors
    /// What is wrong with the line itself. The body is not looked at.
    pub fn parse(bytes: &[u8], number: usize) -> Result<Line, LineError> {
        let unnamed = || unnamed(number);
        let wrong = |custom_id: String, code, message: String| LineError { custom_id, code, message };
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| wrong(unnamed(), "invalid_json", format!("line {number} is not JSON: {error}")))?;
        let Value::Object(mut fields) = value else {
            return Err(wrong(unnamed(), "invalid_line", format!("line {number} is no JSON object")));
        };
        let custom_id = match fields.remove("custom_id") {
            None | Some(Value::Null) => unnamed(),
            Some(Value::String(id)) if !id.is_empty() && id.len() <= LONGEST_ID => id,
            Some(_) => {
                let message =
                    format!("line {number}: `custom_id` must be a text of 1 to {LONGEST_ID} bytes, or be left out");
                return Err(wrong(unnamed(), "invalid_custom_id", message));
            }
        };
        match request_of(fields) {
            Ok(Asked { url, body, plain, others }) => Ok(Line { custom_id, url, body, plain, others }),
            Err((code, message)) => Err(wrong(custom_id, code, format!("line {number}: {message}"))),
        }
    }

    /// What it asks for.
    pub fn wanted(&self) -> Wanted {
        self.wanted_of(self.text().len())
    }

    /// The same, where the bytes of its text are known.
    pub(crate) fn wanted_of(&self, text_bytes: usize) -> Wanted {
        let number = |name: &str| self.body.get(name).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let names = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
        let prompts = match self.body.get("prompt") {
            Some(Value::Array(list)) if list.iter().any(|prompt| !prompt.is_number()) => list.len() as u32,
            _ => 1,
        };
        let usual = match (self.plain && self.body.contains_key("prompt"), self.url.as_str()) {
            (true, _) => Some(PLAIN_TOKENS),
            (false, "/v1/completions") => Some(COMPLETION_TOKENS),
            _ => None,
        };
        let answers = number("n").unwrap_or(1).max(1).saturating_mul(prompts.max(1));
        Wanted {
            text_bytes: u32::try_from(text_bytes).unwrap_or(u32::MAX),
            max_tokens: names.iter().find_map(|name| number(name)).or(usual),
            answers,
        }
    }

    /// The text that is to be read, as JSON, in the order in which templates write it: requests whose texts begin alike have prompts that
    /// begin alike.
    pub fn text(&self) -> String {
        let parts = ["tools", "instructions", "messages", "prompt", "input"];
        parts.iter().filter_map(|part| self.body.get(*part)).map(Value::to_string).collect()
    }
}

/// A line without its name.
struct Asked {
    url: String,
    body: Map<String, Value>,
    plain: bool,
    others: Vec<String>,
}

/// A word for programs, and what is wrong.
type Wrong = (&'static str, String);

fn request_of(mut fields: Map<String, Value>) -> Result<Asked, Wrong> {
    match fields.remove("method") {
        None | Some(Value::Null) => {}
        Some(Value::String(method)) if method == "POST" => {}
        Some(other) => {
            return Err(("invalid_method", format!("`method` is {}, it must be \"POST\"", shown(&other.to_string()))));
        }
    }
    match (fields.remove("url"), fields.remove("body")) {
        (None, None) => {
            let plain = PLAIN.iter().find(|(field, _)| fields.contains_key(*field));
            let message = "it has neither `url` and `body`, nor a `prompt`, `messages` or `input`";
            let (_, url) = plain.ok_or(("invalid_line", message.to_owned()))?;
            Ok(Asked { url: (*url).to_owned(), body: fields, plain: true, others: Vec::new() })
        }
        (Some(Value::String(url)), Some(Value::Object(body))) => {
            let others = fields.keys().cloned().collect();
            Ok(Asked { url, body, plain: false, others })
        }
        (Some(Value::String(_)), _) => Err(("invalid_body", "`body` must be a JSON object".to_owned())),
        (None | Some(Value::Null), _) => {
            Err(("missing_url", "`url` is missing: give `/v1/chat/completions`, for instance".to_owned()))
        }
        (Some(_), _) => Err(("invalid_url", "`url` must be a text".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Line, LineError> {
        Line::parse(text.as_bytes(), 7)
    }

    #[test]
    fn requests_and_bodies_alone_are_read() {
        let whole =
            line(r#"{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {"n": 2, "max_tokens": 9}}"#).unwrap();
        assert_eq!((whole.custom_id.as_str(), whole.url.as_str(), whole.plain), ("a", "/v1/x", false));
        assert_eq!(whole.wanted(), Wanted { text_bytes: 0, max_tokens: Some(9), answers: 2 });
        for (text, url) in [
            (r#"{"prompt": "x", "max_tokens": 3}"#, "/v1/completions"),
            (r#"{"messages": []}"#, "/v1/chat/completions"),
            (r#"{"input": "x"}"#, "/v1/responses"),
        ] {
            let plain = line(text).unwrap();
            assert_eq!((plain.custom_id.as_str(), plain.url.as_str(), plain.plain), ("line-7", url, true));
        }
        let many = line(r#"{"prompt": ["a", "b", "c"], "n": 2}"#).unwrap();
        assert_eq!(many.wanted().answers, 6);
        assert_eq!(line(r#"{"prompt": [1, 2, 3]}"#).unwrap().wanted().answers, 1, "tokens of one prompt");
    }

    #[test]
    fn what_is_wrong_is_said_under_the_name_of_the_request() {
        let deep = "[".repeat(100_000);
        for (text, id, code) in [
            ("", "line-7", "invalid_json"),
            ("nonsense", "line-7", "invalid_json"),
            ("{\"prompt\": \"\u{1}\"}", "line-7", "invalid_json"),
            (deep.as_str(), "line-7", "invalid_json"),
            ("[]", "line-7", "invalid_line"),
            ("{}", "line-7", "invalid_line"),
            (r#"{"custom_id": 5, "prompt": "x"}"#, "line-7", "invalid_custom_id"),
            (r#"{"custom_id": "", "prompt": "x"}"#, "line-7", "invalid_custom_id"),
            (r#"{"custom_id": "a"}"#, "a", "invalid_line"),
            (r#"{"custom_id": "a", "method": "GET", "url": "/v1/x", "body": {}}"#, "a", "invalid_method"),
            (r#"{"custom_id": "a", "url": "/v1/x"}"#, "a", "invalid_body"),
            (r#"{"custom_id": "a", "url": "/v1/x", "body": []}"#, "a", "invalid_body"),
            (r#"{"custom_id": "a", "url": 1, "body": {}}"#, "a", "invalid_url"),
            (r#"{"custom_id": "a", "body": {"prompt": "x"}}"#, "a", "missing_url"),
        ] {
            let error = line(text).unwrap_err();
            assert_eq!((error.custom_id.as_str(), error.code), (id, code), "{}", shown(text));
            assert!(error.message.contains("line 7"), "{}", error.message);
        }
    }

    #[test]
    fn ids_follow_from_the_name_and_the_purpose() {
        assert_eq!(id_of("a", "x"), id_of("a", "x"));
        assert_eq!(id_of("a", "x").len(), 32);
        let all = [id_of("a", "x"), id_of("a", "y"), id_of("b", "x"), id_of("xa", "")];
        assert!((1..4).all(|i| !all[..i].contains(&all[i])));
    }
}

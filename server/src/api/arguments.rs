//! Arguments of calls as objects, for the APIs that do not pass them on as text.

use serde_json::{Map, Value};

/// Key for arguments that are not a JSON object, because the answer was cut off or the model wrote something else. Anthropic's
/// documentation of fine-grained tool streaming proposes this name.
const INVALID: &str = "INVALID_JSON";

/// The arguments of a call as an object. An empty text means no arguments. A text that is not an object is stored under
/// `INVALID_JSON`, so that it cannot be taken for arguments.
pub fn object(text: &str) -> Value {
    if text.trim().is_empty() {
        return Value::Object(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => object,
        _ => Value::Object(Map::from_iter([(INVALID.to_owned(), Value::from(text))])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_no_object_is_not_taken_for_one() {
        assert_eq!(object(""), json!({}));
        assert_eq!(object(" {\"b\": 1, \"a\": [2]}\n").to_string(), "{\"b\":1,\"a\":[2]}");
        for text in ["{\"path\": \"/et", "[1]", "3", "{} {}"] {
            assert_eq!(object(text), json!({"INVALID_JSON": text}));
        }
    }
}

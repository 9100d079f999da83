//! Reasoning that clients store for the server. A client that keeps no state at the server sends an opaque `encrypted_content`
//! back. Here it is the text itself in hexadecimal digits, because the model runs on the client's own machine and there is nothing
//! to hide.

use std::fmt::Write;

use serde_json::Value;

/// Prefix of our opaque texts.
const MARK: &str = "sluice-1-";

/// Turns a text into an opaque one.
pub fn sealed(text: &str) -> String {
    let mut sealed = String::with_capacity(MARK.len() + 2 * text.len());
    sealed += MARK;
    for byte in text.bytes() {
        // Writing to a string cannot fail.
        let _ = write!(sealed, "{byte:02x}");
    }
    sealed
}

/// The text of an opaque one; `None` if another server made it.
pub fn opened(sealed: &str) -> Option<String> {
    let digits = sealed.strip_prefix(MARK)?.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let byte = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?);
    let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
    String::from_utf8(bytes?).ok()
}

/// The text of a reasoning item: its content, its opaque text, or its summary.
pub fn text_of(item: &Value) -> Option<String> {
    let joined = |field: &str| {
        let parts = item[field].as_array()?;
        let text: String = parts.iter().filter_map(|part| part["text"].as_str()).collect();
        (!text.is_empty()).then_some(text)
    };
    joined("content").or_else(|| opened(item["encrypted_content"].as_str()?)).or_else(|| joined("summary"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_sealed_can_be_opened() {
        for text in ["", "a", "Ünïcode \u{1F600}\n\0"] {
            assert_eq!(opened(&sealed(text)).as_deref(), Some(text));
        }
        for wrong in ["", "gAAAAABo", "sluice-1-0", "sluice-1-zz", "sluice-1-ff", "sluice-1-ä"] {
            assert_eq!(opened(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_fullest_text_counts() {
        let summary = json!([{"type": "summary_text", "text": "short"}]);
        let item = json!({"summary": summary, "encrypted_content": sealed("long")});
        assert_eq!(text_of(&item).as_deref(), Some("long"));
        let foreign = json!({"summary": summary, "encrypted_content": "gAAAA"});
        assert_eq!(text_of(&foreign).as_deref(), Some("short"));
        assert_eq!(text_of(&json!({"summary": [], "encrypted_content": "gAAAA"})), None);
    }
}

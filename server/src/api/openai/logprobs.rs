//! Log probabilities in OpenAI's objects.

use serde_json::{Value, json};

use crate::answer::{TokenLogprob, TokenText};

/// JSON has no infinity; OpenAI's API writes the least number for a token that cannot occur.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// Tokens with their log probabilities, in the form of chat completions and responses.
pub fn list(tokens: &[TokenLogprob]) -> Vec<Value> {
    let one = |token: &TokenText, logprob: Option<f32>| json!({"token": token.text, "logprob": logprob.map(finite), "bytes": token.bytes});
    let entry = |entry: &TokenLogprob| {
        let mut value = one(&entry.token, entry.logprob);
        value["top_logprobs"] = entry.top.iter().map(|(token, logprob)| one(token, Some(*logprob))).collect();
        value
    };
    tokens.iter().map(entry).collect()
}

/// `logprobs` of a choice of chat completions.
pub fn chat(tokens: &[TokenLogprob]) -> Value {
    json!({"content": list(tokens), "refusal": null})
}

/// `logprobs` of a choice of completions. `offset`: number of bytes of the choice's text before these tokens.
pub fn completion(tokens: &[TokenLogprob], mut offset: usize) -> Value {
    let mut offsets = Vec::new();
    let top = |entry: &TokenLogprob| -> Value {
        if entry.logprob.is_none() {
            return Value::Null;
        }
        // Tokens that decode to the same text have one entry: that of the likeliest, which comes first.
        let mut map = serde_json::Map::new();
        for (token, logprob) in &entry.top {
            map.entry(token.text.clone()).or_insert_with(|| json!(finite(*logprob)));
        }
        map.into()
    };
    for entry in tokens {
        offsets.push(offset);
        offset += entry.token.text.len();
    }
    json!({
        "tokens": tokens.iter().map(|entry| entry.token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|entry| entry.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_text_has_no_probability() {
        let token = |id, text: &str| TokenText { id, text: text.into(), bytes: text.into() };
        let tokens = [
            TokenLogprob { token: token(1, "ab"), logprob: None, top: Vec::new() },
            TokenLogprob {
                token: token(2, "c"),
                logprob: Some(f32::NEG_INFINITY),
                top: vec![(token(3, "d"), -0.5), (token(4, "d"), -0.75)],
            },
        ];
        let value = completion(&tokens, 3);
        assert_eq!(value["tokens"], json!(["ab", "c"]));
        assert_eq!(value["token_logprobs"], json!([null, -9999.0]));
        assert_eq!(value["top_logprobs"], json!([null, {"d": -0.5}]));
        assert_eq!(value["text_offset"], json!([3, 5]));
    }
}

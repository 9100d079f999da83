//! Log probabilities in OpenAI's objects.

use serde_json::{Value, json};

use crate::answer::{TokenLogprob, TokenText};

/// JSON has no infinity; OpenAI's API writes the least number for a token that cannot come.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// Tokens with their log probabilities, as chat completions and responses have them.
pub fn list(tokens: &[TokenLogprob]) -> Vec<Value> {
    let one = |token: &TokenText, logprob: f32| json!({"token": token.text, "logprob": finite(logprob), "bytes": token.text.as_bytes()});
    let entry = |entry: &TokenLogprob| {
        let mut value = one(&entry.token, entry.logprob);
        value["top_logprobs"] = entry.top.iter().map(|(token, logprob)| one(token, *logprob)).collect();
        value
    };
    tokens.iter().map(entry).collect()
}

/// `logprobs` of a choice of chat completions.
pub fn chat(tokens: &[TokenLogprob]) -> Value {
    json!({"content": list(tokens), "refusal": null})
}

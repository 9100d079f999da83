//! Requests of batches: the same bodies as those of the paths, and objects that are the same whenever they are made.

use serde_json::{Map, Value};
use sluice_batch::{Line, PLAIN_TOKENS, id_of};
use utoipa::PartialSchema;
use utoipa::openapi::{RefOr, Schema};

use super::chat::ChatRequest;
use super::chat_reply::ChatFold;
use super::completions::{CompletionFold, CompletionRequest};
use super::responses::request::ResponsesRequest;
use super::responses::{Maker, ResponsesFold};
use crate::api::body::read;
use crate::ask::Ask;
use crate::error::{ApiError, Kind};
use crate::reply::Fold;

/// Paths that a request of a batch can name.
pub const PATHS: [&str; 3] = ["/v1/chat/completions", "/v1/completions", "/v1/responses"];

/// Fields of OpenAI's requests that change nothing here.
const WITHOUT_EFFECT: [&str; 14] = [
    "audio",
    "best_of",
    "function_call",
    "functions",
    "metadata",
    "modalities",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// The fields that a body of a path can have; `None`: no request can name this path. Other fields are ignored, as OpenAI does.
pub fn known_fields(url: &str) -> Option<Vec<String>> {
    let schema = match url {
        "/v1/chat/completions" => ChatRequest::schema(),
        "/v1/completions" => CompletionRequest::schema(),
        "/v1/responses" => ResponsesRequest::schema(),
        _ => return None,
    };
    let RefOr::T(Schema::Object(object)) = schema else { return Some(Vec::new()) };
    Some(object.properties.into_keys().chain(WITHOUT_EFFECT.map(str::to_owned)).collect())
}

/// What a line asks for, and what makes an object of the answers. `model`: the name of the model that serves it.
///
/// # Errors
/// Names the field that has an impossible value.
pub fn prepare(line: &Line, model: &str) -> Result<(Vec<Ask>, Box<dyn Fold>), ApiError> {
    let mut body = line.body.clone();
    if line.plain && body.contains_key("prompt") {
        body.entry("max_tokens").or_insert(PLAIN_TOKENS.into());
    }
    let (body, model) = (Value::Object(body), model.to_owned());
    match line.url.as_str() {
        "/v1/chat/completions" => {
            let request: ChatRequest = read(body)?;
            let n = request.n;
            let ask = request.into_ask()?;
            Ok((vec![ask], Box::new(ChatFold::new(model, n))))
        }
        "/v1/completions" => {
            let asks = read::<CompletionRequest>(body)?.into_asks()?;
            let fold = CompletionFold::new(model, &asks);
            Ok((asks, Box::new(fold)))
        }
        "/v1/responses" => {
            let request: ResponsesRequest = read(body)?;
            if request.previous_response_id.is_some() {
                let message = "`previous_response_id`: requests of a batch continue no response, give the whole conversation as `input`";
                return Err(ApiError::field("previous_response_id", message).code("unsupported_parameter"));
            }
            let prepared = request.prepare(model, &[])?;
            Ok((vec![prepared.ask], Box::new(ResponsesFold::new(Maker::new(prepared.head, prepared.wants, None)))))
        }
        other => {
            let message = format!("`url` is {other:?}, it must be one of {}", PATHS.join(", "));
            Err(ApiError { param: Some("url".into()), ..ApiError::new(Kind::NotFound, message) }.code("invalid_url"))
        }
    }
}

/// Makes an object the same whenever it is made: ids follow from the request's name, times are 0, and nothing says what happened to be in
/// memory.
pub fn make_repeatable(object: &mut Value, custom_id: &str) {
    let Some(fields) = object.as_object_mut() else { return };
    rename(fields, custom_id, "answer");
    for time in ["created", "created_at", "completed_at"] {
        if let Some(value) = fields.get_mut(time).filter(|value| value.is_number()) {
            *value = 0.into();
        }
    }
    // Nothing is stored.
    if let Some(store) = fields.get_mut("store") {
        *store = false.into();
    }
    for (number, item) in fields.get_mut("output").and_then(Value::as_array_mut).into_iter().flatten().enumerate() {
        if let Some(item) = item.as_object_mut() {
            rename(item, custom_id, &format!("item {number}"));
        }
    }
    for details in ["prompt_tokens_details", "input_tokens_details"] {
        let details = fields.get_mut("usage").and_then(|usage| usage.get_mut(details)?.as_object_mut());
        if let Some(cached) = details.and_then(|details| details.get_mut("cached_tokens")) {
            *cached = 0.into();
        }
    }
}

/// Tokens that were generated for an object.
pub fn generated(object: &Value) -> u64 {
    let usage = &object["usage"];
    usage["completion_tokens"].as_u64().or_else(|| usage["output_tokens"].as_u64()).unwrap_or(0)
}

/// Gives an object the id that follows from the request's name; what it begins with, such as `chatcmpl-`, stays.
fn rename(fields: &mut Map<String, Value>, custom_id: &str, what: &str) {
    let Some(id) = fields.get("id").and_then(Value::as_str) else { return };
    let prefix = id.find(['-', '_']).map_or("", |at| &id[..=at]);
    let id = format!("{prefix}{}", id_of(custom_id, what));
    fields.insert("id".into(), id.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn objects_are_the_same_whenever_they_are_made() {
        let made = |id: &str, time: u64, cached: u64| {
            let mut object = json!({
                "id": format!("resp_{id}"), "created_at": time, "completed_at": time, "store": true,
                "output": [{"id": format!("rs_{id}")}, {"id": format!("fc_{id}"), "call_id": "call_x"}],
                "usage": {"input_tokens_details": {"cached_tokens": cached}, "output_tokens": 9},
            });
            make_repeatable(&mut object, "a");
            object
        };
        let one = made("1", 100, 0);
        assert_eq!(one, made("2", 200, 64));
        assert!(
            one["id"].as_str().unwrap().starts_with("resp_")
                && one["output"][1]["id"].as_str().unwrap().starts_with("fc_")
        );
        assert_ne!(one["output"][0]["id"].as_str().unwrap()[3..], one["output"][1]["id"].as_str().unwrap()[3..]);
        assert_eq!((one["created_at"].as_u64(), generated(&one)), (Some(0), 9));
    }

    #[test]
    fn fields_of_requests_are_known() {
        for url in PATHS {
            let fields = known_fields(url).unwrap();
            for field in ["model", "temperature", "seed", "stop", "metadata"] {
                assert!(fields.iter().any(|known| known == field), "{url} lacks {field}");
            }
            assert!(!fields.iter().any(|known| known == "max_token"));
        }
        assert!(known_fields("/v1/chat/completions").unwrap().contains(&"max_completion_tokens".to_owned()));
        assert_eq!(known_fields("/v1/embeddings"), None);
    }

    #[test]
    fn only_paths_of_answers_are_taken() {
        let line = |url: &str, body: Value| Line {
            custom_id: "a".into(),
            url: url.into(),
            body: body.as_object().unwrap().clone(),
            plain: false,
            others: Vec::new(),
        };
        let wrong = |url, body| prepare(&line(url, body), "m").err().unwrap();
        assert_eq!(wrong("/v1/embeddings", json!({})).kind, Kind::NotFound);
        assert_eq!(wrong("/v1/completions", json!({"prompt": 3})).kind, Kind::Invalid);
        let refused = wrong("/v1/responses", json!({"input": "x", "previous_response_id": "resp_1"}));
        assert_eq!(refused.param.as_deref(), Some("previous_response_id"));
        let mut plain = line("/v1/completions", json!({"prompt": "x"}));
        for (is_plain, tokens) in [(false, 16), (true, PLAIN_TOKENS)] {
            plain.plain = is_plain;
            assert_eq!(prepare(&plain, "m").unwrap().0[0].settings.max_tokens, Some(tokens as usize));
            assert_eq!(plain.wanted().max_tokens, Some(tokens), "plans count on it");
        }
    }
}

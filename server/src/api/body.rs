//! Reads JSON bodies within bounds, with errors that name the field.

use std::error::Error;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::Response;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tower_http::timeout::TimeoutError;

use crate::api::openapi::fields_of;
use crate::error::{ApiError, Flavour, Kind};

/// Bodies of at least this many bytes are not parsed on the threads that serve all clients.
const LARGE: usize = 64 << 10;

/// A request's body, read as JSON whatever its `Content-Type`. Unknown fields are ignored.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send + 'static> FromRequest<S> for Json<T> {
    type Rejection = Response<Body>;

    async fn from_request(request: Request, state: &S) -> Result<Self, Self::Rejection> {
        let path = request.uri().path().to_owned();
        let flavour = Flavour::of(&path);
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let kind = match rejection.status().as_u16() {
                413 => Kind::TooLarge,
                _ if is_timeout(&rejection) => Kind::Timeout,
                _ => Kind::Invalid,
            };
            ApiError::new(kind, rejection.body_text()).response(flavour)
        })?;
        parsed(bytes, path).await.map(Json).map_err(|error| error.response(flavour))
    }
}

/// As [`parse`], without delaying others.
///
/// # Errors
/// As [`parse`].
pub async fn parsed<T: DeserializeOwned + Send + 'static>(bytes: Bytes, path: String) -> Result<T, ApiError> {
    match bytes.len() > LARGE {
        false => parse(&bytes, &path),
        true => tokio::task::spawn_blocking(move || parse(&bytes, &path))
            .await
            .unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the body could not be read: the log says why"))),
    }
}

/// Reads a field that is missing or null as its default.
///
/// # Errors
/// If it has another type.
pub fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(reader: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(reader)?.unwrap_or_default())
}

/// Whether a body could not be read because its client was too slow.
fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    error.is::<TimeoutError>() || error.source().is_some_and(is_timeout)
}

/// Reads the JSON object that was sent to this path.
///
/// # Errors
/// Names the field that is wrong, or those that the object must have if there is none.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], path: &str) -> Result<T, ApiError> {
    // A list would be read as an object without names.
    if let Some(what) = not_an_object(bytes) {
        let fields: Vec<String> = fields_of(path).iter().map(|field| format!("`{field}`")).collect();
        let with = if fields.is_empty() { String::new() } else { format!(" with {}", fields.join(", ")) };
        let message = format!("the body is {what}: {path} takes a JSON object{with}; /openapi.json describes it");
        return Err(ApiError::invalid(message));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(wrong)?;
    reader.end().map_err(|error| ApiError::invalid(format!("the body continues after its JSON: {error}")))?;
    Ok(value)
}

/// What a body is that does not begin as an object.
fn not_an_object(bytes: &[u8]) -> Option<&'static str> {
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => Some("empty"),
        Some(b'[') => Some("a list"),
        Some(b'"') => Some("a text"),
        Some(b'-' | b'0'..=b'9') => Some("a number"),
        Some(b't' | b'f' | b'n') => Some("a single value"),
        Some(_) => None,
    }
}

/// Converts a JSON value.
///
/// # Errors
/// Names the field that is wrong.
pub fn read<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(wrong)
}

fn wrong(error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let path = error.path().to_string();
    let inner = error.into_inner();
    if inner.is_data() && path != "." {
        return ApiError::field(path.clone(), format!("`{path}`: {inner}")).code("invalid_type");
    }
    ApiError::invalid(format!("the body is not JSON that this path takes: {inner}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tower_http::timeout::TimeoutBody;

    #[derive(Debug, serde::Deserialize)]
    struct Example {
        list: Vec<Inner>,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Inner {
        number: u32,
    }

    #[tokio::test]
    async fn a_client_that_sends_too_slowly_is_told_so() {
        let never = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        let slow = Body::new(TimeoutBody::new(Duration::from_millis(10), never));
        let request = Request::post("/v1/completions").body(slow).unwrap();
        let Err(response) = Json::<Example>::from_request(request, &()).await else { panic!("nothing was sent") };
        assert_eq!(response.status().as_u16(), 408);
    }

    #[test]
    fn the_wrong_field_is_named() {
        let good: Example = parse(br#"{"list": [{"number": 3, "unknown": null}], "more": 1}"#, "/").unwrap();
        assert_eq!(good.list[0].number, 3);
        let error = parse::<Example>(br#"{"list": [{"number": 1}, {"number": "x"}]}"#, "/").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("list[1].number"));
        for text in ["", "{", "[]x", "nul", "{\"list\": []} {}", &"[".repeat(10_000)] {
            let error = parse::<Example>(text.as_bytes(), "/").unwrap_err();
            assert_eq!(error.kind, Kind::Invalid, "{text}");
        }
    }

    #[test]
    fn whoever_sends_no_object_learns_which_one_is_expected() {
        let said = |text: &str, path| parse::<Example>(text.as_bytes(), path).unwrap_err().message;
        for (text, what) in [
            ("[]", "a list"),
            (" [[{\"number\": 1}]]", "a list"),
            ("\"x\"", "a text"),
            ("-1", "a number"),
            ("null", "a single value"),
        ] {
            let said = said(text, "/v1/chat/completions");
            assert!(
                said.contains(&format!("the body is {what}:")) && said.contains("object with `messages`"),
                "{said}"
            );
        }
        assert!(said("", "/v1/messages").contains("the body is empty: /v1/messages takes a JSON object with "));
        assert!(said("[]", "/tokenize").contains("object with `"));
        assert!(said("[]", "/nowhere").contains("takes a JSON object;"));
    }
}

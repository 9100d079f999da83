//! Access control: keys, hosts and origins.
//!
//! Every page in the browser can reach a server on the same machine. Two headers keep those pages out: their requests carry their
//! `Origin`, and if an attacker points a name at 127.0.0.1 (DNS rebinding), that name is in `Host`.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, AUTHORIZATION, HOST,
    ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use axum::middleware::Next;
use subtle::ConstantTimeEq;

use crate::error::{ApiError, Flavour, Kind};

/// The requests that the guard allows.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// One of these keys must be given; if the list is empty, no key is needed.
    pub keys: Vec<String>,
    /// Names that `Host` may have, besides addresses and `localhost`.
    pub hosts: Vec<String>,
    /// Origins of pages that may send requests, besides the server's own page; `*`: all.
    pub origins: Vec<String>,
}

/// Paths that need no key, because they show no data.
const OPEN_PATHS: [&str; 2] = ["/", "/health"];

/// The middleware.
pub async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response<Body> {
    let flavour = Flavour::of(request.uri().path());
    let origin = match guard.admit(request.method(), request.uri().path(), request.headers()) {
        Ok(origin) => origin,
        Err(error) => return error.response(flavour),
    };
    let mut response = match (request.method(), &origin) {
        (&Method::OPTIONS, Some(_)) => preflight(request.headers()),
        _ => next.run(request).await,
    };
    if let Some(origin) = origin {
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        response.headers_mut().append(VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// The answer to a preflight request, with which a browser asks whether it may send a page's request.
fn preflight(headers: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let wanted = headers.get("access-control-request-headers").cloned();
    let allowed = response.headers_mut();
    allowed.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    allowed.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or(HeaderValue::from_static("*")));
    response
}

impl Guard {
    /// Allows a request, or gives the error. Returns the origin that may read the response, if it is another one.
    fn admit(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<Option<HeaderValue>, ApiError> {
        let host = host_of(headers)?;
        if !self.knows_host(host) {
            let message = format!(
                "this server does not answer to the name {host:?}: use its address, or start it with --allow-host {}",
                name_of(host)
            );
            return Err(ApiError::new(Kind::Forbidden, message));
        }
        let foreign = match headers.get(ORIGIN) {
            Some(origin) if !is_own(origin, host) => Some(origin.clone()),
            _ => None,
        };
        if let Some(origin) = &foreign
            && !self.knows_origin(origin)
        {
            let message = format!(
                "pages of {origin:?} may not use this server: start it with --allow-origin to let them, if you trust them"
            );
            return Err(ApiError::new(Kind::Forbidden, message));
        }
        let open = method == Method::OPTIONS && foreign.is_some()
            || matches!(*method, Method::GET | Method::HEAD)
                && (OPEN_PATHS.contains(&path) || path.starts_with("/page/"));
        if !open && !self.has_key(headers) {
            let message = "a key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`";
            return Err(ApiError::new(Kind::Unauthorized, message).code("invalid_api_key"));
        }
        Ok(foreign)
    }

    /// Whether the name in `Host` is one that no attacker can point here.
    fn knows_host(&self, host: &str) -> bool {
        let name = name_of(host);
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
        // Clients of HTTP/1.0 may send no host; browsers always send one.
        host.is_empty()
            || address
            || name.eq_ignore_ascii_case("localhost")
            || self.hosts.iter().any(|known| known == "*" || known.eq_ignore_ascii_case(name))
    }

    fn knows_origin(&self, origin: &HeaderValue) -> bool {
        self.origins.iter().any(|known| known == "*" || known.as_bytes().eq_ignore_ascii_case(origin.as_bytes()))
    }

    /// Whether one of the keys is given. All are compared, each in constant time.
    fn has_key(&self, headers: &HeaderMap) -> bool {
        if self.keys.is_empty() {
            return true;
        }
        let bearer = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        });
        let given = [bearer, headers.get("x-api-key").map(HeaderValue::as_bytes)];
        let pairs = given.iter().flatten().flat_map(|given| self.keys.iter().map(move |key| (given, key)));
        let known = pairs.fold(subtle::Choice::from(0), |known, (given, key)| known | given.ct_eq(key.as_bytes()));
        known.into()
    }
}

/// The only `Host` of a request, or an empty string if it has none (RFC 9112, 3.2).
fn host_of(headers: &HeaderMap) -> Result<&str, ApiError> {
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next().map_or(Ok(""), HeaderValue::to_str);
    match (host, hosts.next()) {
        (Ok(host), None) => Ok(host),
        _ => Err(ApiError::invalid("a request has one `Host`, and it is ASCII")),
    }
}

/// `Host` without its port.
fn name_of(host: &str) -> &str {
    match host.rfind(':') {
        // A colon inside brackets belongs to an address.
        Some(at) if !host[at..].contains(']') => &host[..at],
        _ => host,
    }
}

/// Whether a page's origin is this server under the name that the page used.
fn is_own(origin: &HeaderValue, host: &str) -> bool {
    let origin = origin.to_str().unwrap_or_default();
    let rest = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    rest.is_some_and(|rest| rest.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    fn admits(guard: &Guard, pairs: &[(&'static str, &'static str)]) -> Result<bool, u16> {
        let admitted = guard.admit(&Method::POST, "/v1/chat/completions", &headers(pairs));
        admitted.map(|origin| origin.is_some()).map_err(|error| error.kind.status().as_u16())
    }

    #[test]
    fn names_that_strangers_can_point_here_are_refused() {
        let guard = Guard::default();
        for host in ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "192.168.1.4:80", ""] {
            assert_eq!(admits(&guard, &[("host", host)]), Ok(false), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example:80"] {
            assert_eq!(admits(&guard, &[("host", host)]), Err(403), "{host}");
        }
        let mut twice = headers(&[("host", "localhost")]);
        twice.append(HOST, HeaderValue::from_static("evil.example"));
        let strange = HeaderMap::from_iter([(HOST, HeaderValue::from_bytes(b"\xff").unwrap())]);
        for headers in [twice, strange] {
            let refused = guard.admit(&Method::GET, "/v1/models", &headers).unwrap_err();
            assert_eq!(refused.kind.status().as_u16(), 400, "{headers:?}");
        }
        let guard = Guard { hosts: vec!["box.lan".into()], ..guard };
        assert_eq!(admits(&guard, &[("host", "Box.lan:8080")]), Ok(false));
    }

    #[test]
    fn pages_of_others_are_refused_unless_they_are_allowed() {
        let guard = Guard::default();
        let from = |guard: &Guard, origin| admits(guard, &[("host", "localhost:8080"), ("origin", origin)]);
        assert_eq!(from(&guard, "http://localhost:8080"), Ok(false));
        for origin in ["http://localhost:3000", "https://evil.example", "null", "file://"] {
            assert_eq!(from(&guard, origin), Err(403), "{origin}");
        }
        let open = Guard { origins: vec!["https://chat.example".into()], ..Guard::default() };
        assert_eq!(from(&open, "https://chat.example"), Ok(true));
        assert_eq!(from(&open, "https://evil.example"), Err(403));
    }

    #[test]
    fn keys_are_needed_everywhere_but_where_nothing_is_shown() {
        let guard = Guard { keys: vec!["first".into(), "second".into()], ..Guard::default() };
        let with = |name, value| admits(&guard, &[("host", "localhost"), (name, value)]);
        assert_eq!(with("authorization", "Bearer first"), Ok(false));
        assert_eq!(with("authorization", "bearer second"), Ok(false));
        assert_eq!(with("x-api-key", "second"), Ok(false));
        for (name, value) in
            [("authorization", "first"), ("authorization", "Bearer "), ("x-api-key", "firs"), ("accept", "first")]
        {
            assert_eq!(with(name, value), Err(401), "{name}: {value}");
        }
        for method in [Method::GET, Method::HEAD] {
            assert!(guard.admit(&method, "/health", &headers(&[("host", "localhost")])).is_ok(), "{method}");
        }
    }
}

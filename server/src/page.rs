//! The page at `/`: files that are part of the program, and headers that keep a model's text from being run as a script.
//!
//! The page has no build step and loads nothing from other servers.

use std::hash::{DefaultHasher, Hash, Hasher};

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Scripts, styles and data come only from this server's files, and no script turns text into markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// A file of the page.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! file {
    ($path:literal, $name:literal, $kind:literal) => {
        File { path: $path, kind: concat!($kind, "; charset=utf-8"), text: include_str!(concat!("page/", $name)) }
    };
}

static FILES: [File; 11] = [
    file!("/", "index.html", "text/html"),
    file!("/page/style.css", "style.css", "text/css"),
    file!("/page/icon.svg", "icon.svg", "image/svg+xml"),
    file!("/page/app.js", "app.js", "text/javascript"),
    file!("/page/dom.js", "dom.js", "text/javascript"),
    file!("/page/highlight.js", "highlight.js", "text/javascript"),
    file!("/page/live.js", "live.js", "text/javascript"),
    file!("/page/markdown.js", "markdown.js", "text/javascript"),
    file!("/page/messages.js", "messages.js", "text/javascript"),
    file!("/page/store.js", "store.js", "text/javascript"),
    file!("/page/stream.js", "stream.js", "text/javascript"),
];

/// Serves the page at `/` and its files below `/page/`. None of them needs a key: they hold no data.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, file| {
        let tag = tag(file.text);
        router.route(file.path, get(move |headers: HeaderMap| async move { file.answer(&headers, &tag) }))
    })
}

impl File {
    /// The file, or the answer that the browser has it already.
    fn answer(&self, headers: &HeaderMap, tag: &str) -> Response {
        let fixed: [(HeaderName, &str); 7] = [
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
            // Browsers check each time, so that the page matches the running program.
            (CACHE_CONTROL, "no-cache"),
            (ETAG, tag),
        ];
        match is_known(headers, tag) {
            true => (StatusCode::NOT_MODIFIED, fixed).into_response(),
            false => (fixed, [(CONTENT_TYPE, self.kind)], self.text).into_response(),
        }
    }
}

/// A strong entity tag (RFC 9110, 8.8.3): different bytes have different tags.
fn tag(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("\"{}-{:016x}\"", env!("CARGO_PKG_VERSION"), hasher.finish())
}

/// Whether the browser says that it already has the version with this tag (RFC 9110, 13.1.2).
fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let lists = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = lists.flat_map(|list| list.split(',')).map(str::trim);
    tags.any(|known| known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{HeaderValue, Method, Request};
    use tower::ServiceExt;

    use super::*;

    /// The response to a request with these entity tags.
    fn ask(method: Method, path: &str, known: Option<&str>) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(known) = known {
            request = request.header(IF_NONE_MATCH, known);
        }
        let request = request.body(Body::empty()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(router::<()>().oneshot(request)).unwrap()
    }

    fn header<'a>(response: &'a Response, name: &str) -> &'a str {
        response.headers().get(name).map(HeaderValue::to_str).unwrap_or_else(|| panic!("no {name}")).unwrap()
    }

    #[test]
    fn every_file_comes_with_the_headers_that_bound_it() {
        for File { path, kind, .. } in &FILES {
            let response = ask(Method::GET, path, None);
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(header(&response, "content-type"), *kind, "{path}");
            let policy = header(&response, "content-security-policy");
            for part in [
                "default-src 'none'",
                "script-src 'self';",
                "style-src 'self';",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            ] {
                assert!(policy.contains(part), "{path}: {part}");
            }
            assert!(!policy.contains("unsafe") && !policy.contains("http"), "{path}: {policy}");
            assert_eq!(header(&response, "x-content-type-options"), "nosniff");
            assert_eq!(header(&response, "referrer-policy"), "no-referrer");
            assert_eq!(header(&response, "cross-origin-opener-policy"), "same-origin");
        }
    }

    #[test]
    fn what_the_browser_has_is_not_sent_again() {
        let first = ask(Method::GET, "/", None);
        let tag = header(&first, "etag").to_owned();
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
            let again = ask(Method::GET, "/", Some(&known));
            assert_eq!(again.status(), StatusCode::NOT_MODIFIED, "{known}");
            assert_eq!(header(&again, "etag"), tag);
            assert!(again.headers().contains_key(CONTENT_SECURITY_POLICY));
        }
        assert_eq!(ask(Method::GET, "/", Some("\"other\"")).status(), StatusCode::OK);
        assert_eq!(ask(Method::GET, "/page/app.js", Some(&tag)).status(), StatusCode::OK, "that is another file's");
    }

    #[test]
    fn nothing_else_is_there() {
        assert_eq!(ask(Method::HEAD, "/", None).status(), StatusCode::OK);
        assert_eq!(ask(Method::POST, "/", None).status(), StatusCode::METHOD_NOT_ALLOWED);
        for path in ["/page/", "/page/../page.rs", "/page/app.js/", "/page/%2e%2e/Cargo.toml"] {
            assert_eq!(ask(Method::GET, path, None).status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    /// The page uses nothing that its policy forbids, because a browser would refuse it.
    #[test]
    fn the_files_name_each_other_and_nobody_else() {
        for File { path, text, .. } in &FILES {
            for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"]
            {
                assert!(!text.contains(forbidden), "{path}: {forbidden}");
            }
            let imports = text.lines().filter_map(|line| line.split_once(" from \"./")).map(|(_, rest)| rest);
            for name in imports.filter_map(|rest| rest.split('"').next()) {
                assert!(FILES.iter().any(|file| file.path == format!("/page/{name}")), "{path} imports {name}");
            }
        }
        let html = FILES[0].text;
        assert!(!html.contains("style=") && !html.contains(" onclick") && !html.contains("<style"));
        assert_eq!(html.matches("<script").count(), html.matches("<script type=\"module\" src=\"/page/").count());
    }
}

//! The document matches the router: every route is in it, and everything in it is a route.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use axum::body::{Body, to_bytes};
use axum::http::Request;
use serde_json::Value;
use sluice_generate::SchedulerOptions;
use tower::ServiceExt;

use super::document;
use crate::app::{App, router};
use crate::models::Models;
use crate::options::ServerOptions;

const METHODS: [&str; 3] = ["get", "post", "delete"];

/// Methods by path, as the sources of the APIs route them. `any` means all methods.
fn routed() -> BTreeMap<String, BTreeSet<String>> {
    let mut routes = BTreeMap::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                collect(&fs::read_to_string(&path).unwrap(), &mut routes);
            }
        }
    }
    routes
}

fn collect(source: &str, routes: &mut BTreeMap<String, BTreeSet<String>>) {
    for part in source.split(".route(\"").skip(1) {
        let (path, rest) = part.split_once('"').unwrap();
        let rest = rest.split_once(['\n', ';']).map_or(rest, |(line, _)| line);
        // The router's "rest of the path" is one parameter.
        let path = path.replace("{*", "{");
        let methods = METHODS.iter().chain(&["any"]).filter(|method| rest.contains(&format!("{method}(")));
        routes.entry(path).or_default().extend(methods.map(|method| (*method).to_owned()));
    }
}

fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let methods = |value: &Value| value.as_object().unwrap().keys().cloned().collect();
    paths.iter().map(|(path, value)| (path.clone(), methods(value))).collect()
}

#[test]
fn every_route_is_in_the_document() {
    let documented = documented();
    let routed = routed();
    assert!(routed.len() > 10, "{routed:?}");
    for (path, methods) in routed {
        let known = documented.get(&path).unwrap_or_else(|| panic!("{path} is not in the document"));
        assert!(!methods.is_empty(), "{path} has no method that this test knows");
        if !methods.contains("any") {
            assert_eq!(*known, methods, "{path}");
        }
    }
}

#[tokio::test]
async fn everything_in_the_document_is_a_route() {
    let options = ServerOptions::default();
    let models = Models::new(&options, SchedulerOptions::default()).unwrap();
    let app = App::new(options, models, None, None);
    for (path, methods) in documented() {
        let filled = path.replace("{id}", "x").replace("{digest}", "x");
        for method in methods {
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(&filled);
            let response = router(&app).oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
            let status = response.status().as_u16();
            let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
            let text = String::from_utf8_lossy(&bytes);
            assert!(status != 405 && !text.contains("there is nothing at"), "{method} {path}: {status} {text}");
            let document = document();
            let known = &document["paths"][&path][&method]["responses"];
            assert!(known.get(status.to_string()).is_some(), "{method} {path}: {status} is not in the document");
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn look(value: &Value, document: &Value, count: &mut usize) {
        match value {
            Value::Object(fields) => {
                if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
                    let pointer = reference.strip_prefix('#').unwrap();
                    assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
                    *count += 1;
                }
                fields.values().for_each(|value| look(value, document, count));
            }
            Value::Array(items) => items.iter().for_each(|value| look(value, document, count)),
            _ => {}
        }
    }
    let document = document();
    let mut count = 0;
    look(&document, &document, &mut count);
    assert!(count > 100);
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.values().flat_map(|path| path.as_object().unwrap().values());
    let ids: Vec<&str> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "ids of operations are unique");
}

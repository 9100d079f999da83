//! A schema's parts, and where its references lead.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::GrammarError;

/// Largest schema, in bytes of its strings and eight for each value.
const MAX_BYTES: usize = 1 << 20;

/// Most nested values.
const MAX_DEPTH: usize = 96;

/// Keywords whose value is a schema.
const ONE: [&str; 15] = [
    "additionalItems",
    "additionalProperties",
    "contains",
    "contentSchema",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$recursiveRef",
    "$dynamicRef",
    "$ref",
];

/// Keywords whose value is a list of schemas.
const LISTS: [&str; 5] = ["allOf", "anyOf", "items", "oneOf", "prefixItems"];

/// Keywords whose value is an object of schemas.
const MAPS: [&str; 6] = ["$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"];

/// The version of JSON Schema that applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Draft {
    /// Drafts 4 to 7: keywords beside `$ref` are ignored.
    Seven,
    /// 2019-09: lists in `items`.
    Nineteen,
    /// 2020-12, and every schema that names no version.
    Twenty,
}

/// A part of the document.
#[derive(Debug)]
pub(crate) struct Node<'v> {
    pub(crate) value: &'v Value,
    /// A JSON pointer from the document's root.
    pub(crate) place: String,
    /// The base URI of the references in it.
    base: String,
}

/// A schema, its parts by number, and its names.
#[derive(Debug)]
pub(crate) struct Document<'v> {
    pub(crate) draft: Draft,
    pub(crate) nodes: Vec<Node<'v>>,
    /// Numbers of nodes by the address of their value.
    numbers: HashMap<usize, usize>,
    /// Resources by their URI.
    resources: HashMap<String, usize>,
    /// Nodes by the resource's URI and an anchor in it.
    anchors: HashMap<(String, String), usize>,
    /// How many resources have this anchor for dynamic references.
    dynamic: HashMap<String, Vec<usize>>,
}

impl<'v> Document<'v> {
    /// Reads a schema's names. The root is node 0.
    pub(crate) fn new(root: &'v Value) -> Result<Self, GrammarError> {
        let bytes = measure(root, 0)?;
        if bytes > MAX_BYTES {
            return Err(GrammarError::TooLarge { what: format!("a schema of {bytes} bytes"), limit: MAX_BYTES });
        }
        let mut document = Document {
            draft: draft_of(root).unwrap_or(Draft::Twenty),
            nodes: Vec::new(),
            numbers: HashMap::new(),
            resources: HashMap::new(),
            anchors: HashMap::new(),
            dynamic: HashMap::new(),
        };
        document.resources.insert(String::new(), 0);
        document.index(root, "#".to_owned(), "")?;
        Ok(document)
    }

    fn index(&mut self, value: &'v Value, place: String, base: &str) -> Result<(), GrammarError> {
        let mut base = base.to_owned();
        let number = self.nodes.len();
        if let Value::Object(map) = value {
            if let Some(draft) = draft_of(value).filter(|draft| *draft != self.draft) {
                return Err(unsupported(
                    "$schema",
                    &place,
                    format!("it changes the version of JSON Schema to {draft:?}"),
                ));
            }
            let ignored = self.draft == Draft::Seven && map.contains_key("$ref");
            if let Some(id) = map.get("$id").and_then(Value::as_str).filter(|_| !ignored) {
                let (uri, fragment) = id.split_once('#').unwrap_or((id, ""));
                if !uri.is_empty() {
                    base = join(&base, uri);
                    self.resources.insert(base.clone(), number);
                }
                if !fragment.is_empty() {
                    self.anchors.insert((base.clone(), fragment.to_owned()), number);
                }
            }
            for keyword in ["$anchor", "$dynamicAnchor"] {
                if let Some(anchor) = map.get(keyword).and_then(Value::as_str) {
                    self.anchors.insert((base.clone(), anchor.to_owned()), number);
                }
            }
            if let Some(anchor) = map.get("$dynamicAnchor").and_then(Value::as_str) {
                self.dynamic.entry(anchor.to_owned()).or_default().push(number);
            }
            if map.get("$recursiveAnchor") == Some(&Value::Bool(true)) {
                self.dynamic.entry(String::new()).or_default().push(number);
            }
        }
        self.numbers.insert(address(value), number);
        self.nodes.push(Node { value, place: place.clone(), base: base.clone() });
        let Value::Object(map) = value else { return Ok(()) };
        for (keyword, value) in map {
            self.index_parts(keyword, value, &format!("{place}/{}", escape(keyword)), &base)?;
        }
        Ok(())
    }

    fn index_parts(&mut self, keyword: &str, value: &'v Value, place: &str, base: &str) -> Result<(), GrammarError> {
        match value {
            Value::Object(map) if MAPS.contains(&keyword) => {
                map.iter().try_for_each(|(name, value)| self.index(value, format!("{place}/{}", escape(name)), base))
            }
            Value::Array(list) if LISTS.contains(&keyword) => {
                let mut parts = list.iter().enumerate();
                parts.try_for_each(|(at, value)| self.index(value, format!("{place}/{at}"), base))
            }
            Value::Object(_) | Value::Bool(_) if ONE.contains(&keyword) => self.index(value, place.to_owned(), base),
            _ => Ok(()),
        }
    }

    /// The number of a value that is a part of a node.
    pub(crate) fn number(&mut self, value: &'v Value, inside: usize, keyword: &str) -> usize {
        let (base, place) = (&self.nodes[inside].base, &self.nodes[inside].place);
        let node = Node { value, place: format!("{place}/{keyword}"), base: base.clone() };
        self.add(node)
    }

    fn add(&mut self, node: Node<'v>) -> usize {
        let Document { nodes, numbers, .. } = self;
        *numbers.entry(address(node.value)).or_insert_with(|| {
            nodes.push(node);
            nodes.len() - 1
        })
    }

    /// Where a reference in a node leads.
    pub(crate) fn follow(&mut self, from: usize, keyword: &'static str, uri: &str) -> Result<usize, GrammarError> {
        let Node { base, place, .. } = &self.nodes[from];
        let lost = |reason: String| unsupported(keyword, place, reason);
        let (resource, fragment) = uri.split_once('#').unwrap_or((uri, ""));
        let resource = if resource.is_empty() { base.clone() } else { join(base, resource) };
        let Some(&root) = self.resources.get(&resource) else {
            return Err(lost(format!(
                "{uri:?} leads out of the schema, and nothing is fetched; put what it refers to into `$defs`"
            )));
        };
        let fragment = unescape_uri(fragment);
        let found = match fragment.strip_prefix('/') {
            _ if fragment.is_empty() => root,
            None => match self.anchors.get(&(resource, fragment)) {
                Some(&node) => node,
                None => return Err(lost(format!("{uri:?} leads nowhere"))),
            },
            Some(path) => {
                let parts = path.split('/').map(|part| part.replace("~1", "/").replace("~0", "~"));
                let mut value = self.nodes[root].value;
                for part in parts {
                    let next = match value {
                        Value::Object(map) => map.get(&part),
                        Value::Array(list) => part.parse().ok().and_then(|at: usize| list.get(at)),
                        _ => None,
                    };
                    value = next.ok_or_else(|| lost(format!("{uri:?} leads nowhere")))?;
                }
                let place = format!("{}/{path}", self.nodes[root].place);
                let base = self.nodes[root].base.clone();
                self.add(Node { value, place, base })
            }
        };
        self.is_static(found, from, keyword, uri)
    }

    /// A dynamic reference leads to the stated place only if nothing can redirect it.
    fn is_static(&self, found: usize, from: usize, keyword: &'static str, uri: &str) -> Result<usize, GrammarError> {
        let name = match keyword {
            "$dynamicRef" => uri.rsplit_once('#').map_or("", |(_, name)| name),
            "$recursiveRef" => "",
            _ => return Ok(found),
        };
        let others = self.dynamic.get(name).map_or(0, |nodes| nodes.iter().filter(|&&node| node != found).count());
        let is_target = self.dynamic.get(name).is_some_and(|nodes| nodes.contains(&found));
        match others > 0 && is_target {
            true => {
                let reason = "which schema it means depends on the one that is being used; write `$ref`".to_owned();
                Err(unsupported(keyword, &self.nodes[from].place, reason))
            }
            false => Ok(found),
        }
    }
}

pub(crate) fn unsupported(keyword: &str, place: &str, reason: String) -> GrammarError {
    GrammarError::Unsupported { keyword: keyword.to_owned(), place: place.to_owned(), reason }
}

fn address(value: &Value) -> usize {
    std::ptr::from_ref(value) as usize
}

/// Size of a value.
fn measure(value: &Value, depth: usize) -> Result<usize, GrammarError> {
    if depth > MAX_DEPTH {
        return Err(GrammarError::TooLarge { what: format!("{depth} nested values in a schema"), limit: MAX_DEPTH });
    }
    let inside = match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(|value| measure(value, depth + 1)).sum::<Result<usize, _>>()?,
        Value::Object(map) => map
            .iter()
            .map(|(name, value)| measure(value, depth + 1).map(|size| name.len() + size))
            .sum::<Result<usize, _>>()?,
        _ => 0,
    };
    Ok(inside + 8)
}

/// The version that a schema's `$schema` names.
fn draft_of(value: &Value) -> Option<Draft> {
    let uri = value.as_object().and_then(|map: &Map<String, Value>| map.get("$schema")?.as_str())?;
    match uri.trim_end_matches('#') {
        uri if uri.contains("json-schema.org/draft-0") => Some(Draft::Seven),
        uri if uri.contains("json-schema.org/draft/2019-09") => Some(Draft::Nineteen),
        uri if uri.contains("json-schema.org/draft/2020-12") => Some(Draft::Twenty),
        _ => None,
    }
}

/// A name as JSON pointers write it (RFC 6901).
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// The text after `#`, with percent-escapes decoded.
fn unescape_uri(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let hex = behind.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A URI relative to another (RFC 3986, section 5.2, without query parts).
fn join(base: &str, uri: &str) -> String {
    let scheme_end = |uri: &str| {
        uri.find(':').filter(|&at| uri[..at].chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c)))
    };
    if scheme_end(uri).is_some() {
        return uri.to_owned();
    }
    let path_start = match base.find("://") {
        Some(at) => base[at + 3..].find('/').map_or(base.len(), |slash| at + 3 + slash),
        None => scheme_end(base).map_or(0, |at| at + 1),
    };
    let (authority, path) = base.split_at(path_start);
    let path = match uri.strip_prefix('/') {
        Some(_) => uri.to_owned(),
        None => format!("{}/{uri}", path.rsplit_once('/').map_or("", |(folder, _)| folder)),
    };
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("{authority}{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn references_lead_by_pointers_anchors_and_names() {
        let schema = json!({"$id": "http://example.com/a/b.json", "$defs": {
            "x/y": {"$anchor": "here"}, "other": {"$id": "c.json", "$defs": {"z": {"const": 1}}}}});
        let mut document = Document::new(&schema).unwrap();
        let mut place = |uri: &str| {
            let node = document.follow(0, "$ref", uri);
            node.map(|node| document.nodes[node].place.clone())
        };
        assert_eq!(place("#").unwrap(), "#");
        assert_eq!(place("#/$defs/x~1y").unwrap(), "#/$defs/x~1y");
        assert_eq!(place("#/%24defs/x%7E1y").unwrap(), "#/$defs/x~1y");
        assert_eq!(place("#here").unwrap(), "#/$defs/x~1y");
        assert_eq!(place("c.json#/$defs/z").unwrap(), "#/$defs/other/$defs/z");
        assert_eq!(place("http://example.com/a/c.json").unwrap(), "#/$defs/other");
        assert_eq!(place("/a/../a/b.json").unwrap(), "#");
        for bad in ["http://example.com/d.json", "#/nothing", "#nothing", "d.json", "#/$defs/x~1y/0"] {
            assert!(matches!(place(bad), Err(GrammarError::Unsupported { .. })), "{bad}");
        }
    }
}

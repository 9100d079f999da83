//! Checks whether a value is valid against a schema.

use std::collections::BTreeSet;
use std::rc::Rc;

use regex::Regex;
use serde_json::{Number, Value};

use super::Schema;
use super::document::{Draft, unsupported};
use super::keywords::{Facet, Items, Keywords, Properties, Type};
use super::numbers::scaled;
use super::strings::ecma;
use crate::GrammarError;

/// Most nested schemas on one value, with references followed.
const MAX_DEPTH: usize = 200;

/// The parts of a value that its schema has looked at.
#[derive(Debug, Default)]
pub(super) struct Evaluated {
    properties: BTreeSet<String>,
    items: BTreeSet<usize>,
}

impl Evaluated {
    fn extend(&mut self, other: Evaluated) {
        self.properties.extend(other.properties);
        self.items.extend(other.items);
    }
}

/// Whether two values are equal for JSON Schema, which compares numbers by value.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => match (a.as_i64(), b.as_i64()) {
            (Some(a), Some(b)) => a == b,
            _ => a.as_f64() == b.as_f64(),
        },
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, a)| b.get(name).is_some_and(|b| equal(a, b)))
        }
        (a, b) => a == b,
    }
}

impl Schema<'_> {
    /// Whether a value is valid against a node. `format` is an annotation, and demands nothing.
    pub(super) fn is_valid(&mut self, value: &Value, node: usize) -> Result<bool, GrammarError> {
        Ok(self.check(value, node, 0)?.is_some())
    }

    fn holds(&mut self, value: &Value, node: usize, depth: usize) -> Result<bool, GrammarError> {
        Ok(self.check(value, node, depth + 1)?.is_some())
    }

    /// Checks a value; returns the parts of it that the node has looked at, or `None` if it is not valid.
    fn check(&mut self, value: &Value, node: usize, depth: usize) -> Result<Option<Evaluated>, GrammarError> {
        self.step()?;
        if depth > MAX_DEPTH {
            return Err(unsupported("$ref", &self.place(node), "it refers to itself without end".into()));
        }
        let keywords = self.keywords(node)?;
        if let Some(boolean) = keywords.boolean {
            return Ok(boolean.then(Evaluated::default));
        }
        let kind = Type::of(value);
        let wrong_type = keywords.types.as_ref().is_some_and(|types| !types.contains(&kind));
        let wrong_number = keywords.integers_only && value.is_number() && !is_integer(value);
        let wrong_value = keywords.values.iter().any(|values| !values.iter().any(|other| equal(value, other)));
        if wrong_type || wrong_number || wrong_value {
            return Ok(None);
        }
        for facet in keywords.facets.iter().filter(|facet| facet.kind().is_none_or(|of| of == kind)) {
            if !self.satisfies(value, facet, depth)? {
                return Ok(None);
            }
        }
        let mut evaluated = Evaluated::default();
        let fits = match value {
            Value::Object(_) => self.properties(value, keywords.properties.as_deref(), &mut evaluated, depth)?,
            Value::Array(_) => self.items(value, keywords.items.as_deref(), &mut evaluated, depth)?,
            _ => true,
        };
        if !fits || !self.combinations(value, &keywords, &mut evaluated, depth)? {
            return Ok(None);
        }
        self.unevaluated(value, &keywords, &mut evaluated, depth).map(|fits| fits.then_some(evaluated))
    }

    fn satisfies(&mut self, value: &Value, facet: &Facet, depth: usize) -> Result<bool, GrammarError> {
        Ok(match (facet, value) {
            (Facet::Integer(is), value) => is_integer(value) == *is,
            (Facet::Minimum(bound, exclusive), Value::Number(number)) => {
                let order = compare(number, bound);
                order.is_gt() || (order.is_eq() && !exclusive)
            }
            (Facet::Maximum(bound, exclusive), Value::Number(number)) => {
                let order = compare(number, bound);
                order.is_lt() || (order.is_eq() && !exclusive)
            }
            (Facet::Multiple(of), Value::Number(number)) => is_multiple(number, of),
            (Facet::MinLength(least), Value::String(text)) => text.chars().count() as u64 >= *least,
            (Facet::MaxLength(most), Value::String(text)) => text.chars().count() as u64 <= *most,
            (Facet::Pattern(pattern, is), Value::String(text)) => self.matches(pattern, text)? == *is,
            (Facet::MinItems(least), Value::Array(items)) => items.len() as u64 >= *least,
            (Facet::MaxItems(most), Value::Array(items)) => items.len() as u64 <= *most,
            (Facet::Unique, Value::Array(items)) => {
                items.iter().enumerate().all(|(at, item)| !items[..at].iter().any(|other| equal(item, other)))
            }
            (Facet::Contains { node, positive, least, most }, Value::Array(items)) => {
                let mut count = 0;
                for item in items {
                    count += u64::from(self.holds(item, *node, depth)? == *positive);
                }
                count >= *least && most.is_none_or(|most| count <= most)
            }
            (Facet::MinProperties(least), Value::Object(map)) => map.len() as u64 >= *least,
            (Facet::MaxProperties(most), Value::Object(map)) => map.len() as u64 <= *most,
            (Facet::Required(name), Value::Object(map)) => map.contains_key(&**name),
            (Facet::Names(node), Value::Object(map)) => {
                for name in map.keys() {
                    if !self.holds(&Value::from(name.as_str()), *node, depth)? {
                        return Ok(false);
                    }
                }
                true
            }
            _ => true,
        })
    }

    /// Whether a part of a text matches a pattern.
    pub(super) fn matches(&mut self, pattern: &Rc<str>, text: &str) -> Result<bool, GrammarError> {
        if let Some(regex) = self.patterns.get(pattern) {
            return Ok(regex.is_match(text));
        }
        let regex = Regex::new(&ecma(pattern)).map_err(|_| {
            let reason = format!(
                "{:?} is not a regular expression, or it has look-around or back references",
                crate::error::clip(pattern)
            );
            unsupported("pattern", "#", reason)
        })?;
        let is_match = regex.is_match(text);
        self.patterns.insert(pattern.clone(), regex);
        Ok(is_match)
    }

    fn properties(
        &mut self,
        value: &Value,
        properties: Option<&Properties>,
        evaluated: &mut Evaluated,
        depth: usize,
    ) -> Result<bool, GrammarError> {
        let (Some(properties), Value::Object(map)) = (properties, value) else { return Ok(true) };
        for (name, value) in map {
            for node in self.nodes_of(properties, name)? {
                if !self.holds(value, node, depth)? {
                    return Ok(false);
                }
                evaluated.properties.insert(name.clone());
            }
        }
        Ok(true)
    }

    /// What a property of this name must satisfy.
    pub(super) fn nodes_of(&mut self, properties: &Properties, name: &str) -> Result<Vec<usize>, GrammarError> {
        let mut nodes: Vec<usize> =
            properties.named.iter().filter(|(named, _)| &**named == name).map(|&(_, node)| node).collect();
        for (pattern, node) in &properties.patterns {
            if self.matches(pattern, name)? {
                nodes.push(*node);
            }
        }
        if nodes.is_empty() {
            nodes.extend(properties.additional);
        }
        Ok(nodes)
    }

    fn items(
        &mut self,
        value: &Value,
        items: Option<&Items>,
        evaluated: &mut Evaluated,
        depth: usize,
    ) -> Result<bool, GrammarError> {
        let (Some(items), Value::Array(list)) = (items, value) else { return Ok(true) };
        for (at, value) in list.iter().enumerate() {
            let Some(node) = items.first.get(at).copied().or(items.rest) else { break };
            if !self.holds(value, node, depth)? {
                return Ok(false);
            }
            evaluated.items.insert(at);
        }
        Ok(true)
    }

    /// The schemas that a schema combines.
    fn combinations(
        &mut self,
        value: &Value,
        keywords: &Keywords,
        evaluated: &mut Evaluated,
        depth: usize,
    ) -> Result<bool, GrammarError> {
        let mut all = keywords.all.clone();
        if let Some((condition, then, otherwise)) = keywords.condition {
            match self.check(value, condition, depth + 1)? {
                Some(parts) => {
                    evaluated.extend(parts);
                    all.extend(then);
                }
                None => all.extend(otherwise),
            }
        }
        if let Value::Object(map) = value {
            let there = |name: &Rc<str>| map.contains_key(&**name);
            all.extend(keywords.dependent.iter().filter(|(name, _)| there(name)).map(|&(_, node)| node));
            if keywords.dependent_required.iter().any(|(name, names)| there(name) && !names.iter().all(there)) {
                return Ok(false);
            }
        }
        for node in all {
            match self.check(value, node, depth + 1)? {
                Some(parts) => evaluated.extend(parts),
                None => return Ok(false),
            }
        }
        for (nodes, one) in [(&keywords.any, false), (&keywords.one, true)] {
            let Some(nodes) = nodes else { continue };
            let mut count = 0;
            for &node in nodes {
                if let Some(parts) = self.check(value, node, depth + 1)? {
                    evaluated.extend(parts);
                    count += 1;
                }
            }
            if count == 0 || (one && count > 1) {
                return Ok(false);
            }
        }
        match keywords.not {
            Some(node) => Ok(!self.holds(value, node, depth)?),
            None => Ok(true),
        }
    }

    fn unevaluated(
        &mut self,
        value: &Value,
        keywords: &Keywords,
        evaluated: &mut Evaluated,
        depth: usize,
    ) -> Result<bool, GrammarError> {
        if let Value::Array(list) = value {
            // In 2020-12, items that `contains` finds count as looked at.
            let counts = self.document.draft == Draft::Twenty;
            for facet in keywords.facets.iter().filter(|_| counts) {
                let Facet::Contains { node, .. } = facet else { continue };
                for (at, item) in list.iter().enumerate() {
                    if self.holds(item, *node, depth)? {
                        evaluated.items.insert(at);
                    }
                }
            }
        }
        match (value, keywords.unevaluated_properties, keywords.unevaluated_items) {
            (Value::Object(map), Some(node), _) => {
                for (name, value) in
                    map.iter().filter(|(name, _)| !evaluated.properties.contains(*name)).collect::<Vec<_>>()
                {
                    if !self.holds(value, node, depth)? {
                        return Ok(false);
                    }
                    evaluated.properties.insert(name.clone());
                }
            }
            (Value::Array(list), _, Some(node)) => {
                for (at, value) in list.iter().enumerate() {
                    if !evaluated.items.contains(&at) && !self.holds(value, node, depth)? {
                        return Ok(false);
                    }
                    evaluated.items.insert(at);
                }
            }
            _ => {}
        }
        Ok(true)
    }
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
}

fn compare(a: &Number, b: &Number) -> std::cmp::Ordering {
    match (scaled(a), scaled(b)) {
        (Some(a), Some(b)) => a.cmp(&b),
        _ => a.as_f64().unwrap_or(f64::NAN).total_cmp(&b.as_f64().unwrap_or(f64::NAN)),
    }
}

fn is_multiple(number: &Number, of: &Number) -> bool {
    match (scaled(number), scaled(of)) {
        (Some(number), Some(of)) if of != 0 => number % of == 0,
        _ => {
            let quotient = number.as_f64().unwrap_or(f64::NAN) / of.as_f64().unwrap_or(f64::NAN);
            quotient.is_finite() && quotient.fract() == 0.0
        }
    }
}

//! Divides goals into cases: what a value of one type must satisfy, without choices.

use std::collections::BTreeSet;
use std::rc::Rc;

use serde_json::Value;

use super::Schema;
use super::document::unsupported;
use super::keywords::{Facet, Items, Keywords, Properties, Type};
use super::validate::equal;
use crate::GrammarError;

/// Most cases of one type of one goal.
const MAX_CASES: usize = 200;

/// Most ways to violate a schema that are considered, if a value must not satisfy it.
const MAX_WAYS: usize = 8;

/// Schemas that a value must satisfy (`true`) or must not satisfy, in order.
pub(super) type Goal = Vec<(usize, bool)>;

/// The schemas through which a schema was reached on the same value; the last is the schema itself.
pub(super) type Chain = Rc<Vec<usize>>;

/// Demands on values of one type.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) kind: Type,
    /// If given, the value is one of these.
    pub(super) values: Option<Vec<Value>>,
    pub(super) facets: Vec<Facet>,
    pub(super) properties: Vec<(Rc<Properties>, Chain)>,
    pub(super) items: Vec<(Rc<Items>, Chain)>,
    /// Schemas for the parts that are not looked at by any schema reached through the node with the first number.
    pub(super) unevaluated: Vec<(usize, usize)>,
}

/// A case with what is still pending.
#[derive(Debug, Clone)]
struct Open {
    case: Case,
    seen: BTreeSet<(usize, bool)>,
    pending: Vec<Part>,
    choices: Vec<Vec<Vec<Part>>>,
    negatives: Vec<usize>,
}

/// A demand of one way of a choice.
#[derive(Debug, Clone)]
enum Part {
    Valid(usize, Chain),
    Invalid(usize),
    Facet(Facet),
}

impl Schema<'_> {
    /// The cases of a goal for values of a type.
    pub(super) fn cases(&mut self, goal: &Goal, kind: Type) -> Result<Vec<Case>, GrammarError> {
        let none: Chain = Rc::new(Vec::new());
        let part = |&(node, positive): &(usize, bool)| match positive {
            true => Part::Valid(node, none.clone()),
            false => Part::Invalid(node),
        };
        let case = Case {
            kind,
            values: None,
            facets: Vec::new(),
            properties: Vec::new(),
            items: Vec::new(),
            unevaluated: Vec::new(),
        };
        let pending = goal.iter().rev().map(part).collect();
        let first = Open { case, seen: BTreeSet::new(), pending, choices: Vec::new(), negatives: Vec::new() };
        let (mut open, mut cases) = (vec![first], Vec::new());
        while let Some(mut next) = open.pop() {
            if !self.settle(&mut next)? {
                continue;
            }
            let Some(ways) = self.choice(&mut next)? else {
                cases.push(next.case);
                if cases.len() > MAX_CASES {
                    return Err(self.too_many(goal));
                }
                continue;
            };
            for way in ways.into_iter().rev() {
                let mut one = next.clone();
                one.pending.extend(way.into_iter().rev());
                open.push(one);
            }
            if open.len() > MAX_CASES * 4 {
                return Err(self.too_many(goal));
            }
        }
        Ok(cases)
    }

    fn too_many(&self, goal: &Goal) -> GrammarError {
        let place = goal.first().map_or_else(|| "#".to_owned(), |&(node, _)| self.place(node));
        GrammarError::TooLarge {
            what: format!("combinations of `anyOf`, `oneOf`, `not` and the like at {place}"),
            limit: MAX_CASES,
        }
    }

    /// Handles what is pending. False if the case allows nothing.
    fn settle(&mut self, open: &mut Open) -> Result<bool, GrammarError> {
        while let Some(part) = open.pending.pop() {
            self.step()?;
            match part {
                Part::Facet(facet) => open.case.facets.push(facet),
                Part::Invalid(node) => {
                    if open.seen.contains(&(node, true)) {
                        return Ok(false);
                    }
                    if open.seen.insert((node, false)) {
                        open.negatives.push(node);
                    }
                }
                Part::Valid(node, chain) if chain.contains(&node) => {
                    return Err(unsupported("$ref", &self.place(node), "it refers to itself without end".into()));
                }
                Part::Valid(node, chain) => {
                    if open.seen.contains(&(node, false)) {
                        return Ok(false);
                    }
                    if open.seen.insert((node, true)) && !self.take(open, node, &chain)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(open.case.values.as_ref().is_none_or(|values| !values.is_empty()))
    }

    /// Adds what a schema says to a case. False if it does not allow the type.
    fn take(&mut self, open: &mut Open, node: usize, chain: &Chain) -> Result<bool, GrammarError> {
        let keywords = self.keywords(node)?;
        let kind = open.case.kind;
        if let Some(boolean) = keywords.boolean {
            return Ok(boolean);
        }
        if keywords.types.as_ref().is_some_and(|types| !types.contains(&kind)) {
            return Ok(false);
        }
        let case = &mut open.case;
        if kind == Type::Number && keywords.integers_only {
            case.facets.push(Facet::Integer(true));
        }
        for values in &keywords.values {
            let is_in = |value: &&Value| {
                Type::of(value) == kind
                    && case.values.as_ref().is_none_or(|old| old.iter().any(|other| equal(value, other)))
            };
            case.values = Some(values.iter().filter(is_in).cloned().collect());
        }
        case.facets.extend(keywords.facets.iter().filter(|facet| facet.kind() == Some(kind)).cloned());
        let chain: Chain = Rc::new([chain.as_slice(), &[node]].concat());
        if kind == Type::Object {
            case.properties.extend(keywords.properties.iter().map(|properties| (properties.clone(), chain.clone())));
            case.unevaluated.extend(keywords.unevaluated_properties.map(|other| (node, other)));
        }
        if kind == Type::Array {
            case.items.extend(keywords.items.iter().map(|items| (items.clone(), chain.clone())));
            case.unevaluated.extend(keywords.unevaluated_items.map(|other| (node, other)));
        }
        open.negatives.extend(keywords.not);
        open.pending.extend(keywords.all.iter().rev().map(|&node| Part::Valid(node, chain.clone())));
        choices_of(open, &keywords, &chain);
        Ok(true)
    }

    /// The next choice: a list of ways, of which one is enough. `None` if there is nothing to choose.
    fn choice(&mut self, open: &mut Open) -> Result<Option<Vec<Vec<Part>>>, GrammarError> {
        // For a list of values, only those that are valid matter.
        if open.case.values.is_some() {
            return Ok(None);
        }
        if let Some(choice) = open.choices.pop() {
            return Ok(Some(choice));
        }
        while let Some(node) = open.negatives.pop() {
            if !self.is_excluded(&open.case, node)?
                && let Some(ways) = self.ways_not(&open.case, node)?
            {
                return Ok(Some(ways));
            }
        }
        Ok(None)
    }

    /// How a value of a case's type can be invalid against a schema. `None` if it always is invalid.
    fn ways_not(&mut self, case: &Case, node: usize) -> Result<Option<Vec<Vec<Part>>>, GrammarError> {
        self.step()?;
        let kind = case.kind;
        let keywords = self.keywords(node)?;
        let no_chain: Chain = Rc::new(Vec::new());
        if let Some(boolean) = keywords.boolean {
            return Ok(boolean.then(Vec::new));
        }
        let wrong_type = keywords.types.as_ref().is_some_and(|types| !types.contains(&kind));
        let no_value = keywords.values.iter().any(|values| values.iter().all(|value| Type::of(value) != kind));
        if wrong_type || no_value {
            return Ok(None);
        }
        let mut ways: Vec<Vec<Part>> = Vec::new();
        if kind == Type::Number && keywords.integers_only {
            ways.push(vec![Part::Facet(Facet::Integer(false))]);
        }
        let mut left_out = None;
        for values in &keywords.values {
            match kind {
                Type::Array | Type::Object => left_out = Some("enum"),
                _ => ways.push(vec![Part::Facet(Facet::NoneOf(values.clone()))]),
            }
        }
        for facet in keywords.facets.iter().filter(|facet| facet.kind() == Some(kind)) {
            match opposite(facet) {
                Ok(opposite) => ways.extend(opposite.map(|facet| vec![Part::Facet(facet)])),
                Err(keyword) => left_out = Some(keyword),
            }
        }
        ways.extend(keywords.all.iter().map(|&node| vec![Part::Invalid(node)]));
        for nodes in keywords.any.iter().chain(&keywords.one) {
            ways.push(nodes.iter().map(|&node| Part::Invalid(node)).collect());
        }
        ways.extend(keywords.not.map(|node| vec![Part::Valid(node, no_chain.clone())]));
        if let Some((condition, then, otherwise)) = keywords.condition {
            ways.extend(then.map(|then| vec![Part::Valid(condition, no_chain.clone()), Part::Invalid(then)]));
            ways.extend(otherwise.map(|otherwise| vec![Part::Invalid(condition), Part::Invalid(otherwise)]));
        }
        if kind == Type::Object && object_ways(&keywords, &mut ways) {
            left_out = Some("additionalProperties");
        }
        if kind == Type::Array && array_ways(&keywords, &mut ways) {
            left_out = Some("items");
        }
        ways.retain(|way| !contradicts(case, way));
        if let Some(keyword) = left_out {
            let reason = "inside `not`, or in another choice of a `oneOf`, it cannot be enforced".to_owned();
            let error = unsupported(keyword, &self.place(node), reason);
            self.left_out.get_or_insert(error);
        }
        ways.truncate(MAX_WAYS);
        Ok(Some(ways))
    }

    /// Whether it is certain that no value of a case is valid against a schema.
    fn is_excluded(&mut self, case: &Case, node: usize) -> Result<bool, GrammarError> {
        if case.kind != Type::Object {
            return Ok(false);
        }
        let required: Vec<Rc<str>> = case
            .facets
            .iter()
            .filter_map(|facet| if let Facet::Required(name) = facet { Some(name.clone()) } else { None })
            .collect();
        for other in self.flat(node)? {
            for facet in &other.facets {
                if let Facet::Required(name) = facet
                    && self.is_absent(case, name)?
                {
                    return Ok(true);
                }
            }
            let Some(properties) = &other.properties else { continue };
            for name in &required {
                for there in self.nodes_of(properties, name)? {
                    if self.keywords(there)?.boolean == Some(false) || self.are_disjoint(case, name, there)? {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Whether no object of a case can have this property.
    fn is_absent(&mut self, case: &Case, name: &Rc<str>) -> Result<bool, GrammarError> {
        if case.facets.contains(&Facet::Absent(name.clone())) {
            return Ok(true);
        }
        for (properties, _) in &case.properties {
            for node in self.nodes_of(properties, name)? {
                if self.keywords(node)?.boolean == Some(false) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Whether a case allows for a property only values that a schema does not allow.
    fn are_disjoint(&mut self, case: &Case, name: &str, other: usize) -> Result<bool, GrammarError> {
        for (properties, _) in &case.properties {
            for node in self.nodes_of(properties, name)? {
                for keywords in self.flat(node)? {
                    for values in &keywords.values {
                        let mut any = false;
                        for value in values.iter() {
                            any |= self.is_valid(value, other)?;
                        }
                        if !any {
                            return Ok(true);
                        }
                    }
                }
            }
        }
        Ok(false)
    }

    /// The demands of a schema together with those of the schemas to which it refers.
    fn flat(&mut self, node: usize) -> Result<Vec<Rc<Keywords>>, GrammarError> {
        let (mut seen, mut pending, mut all) = (BTreeSet::new(), vec![node], Vec::new());
        while let Some(node) = pending.pop() {
            self.step()?;
            if seen.insert(node) {
                let keywords = self.keywords(node)?;
                pending.extend(&keywords.all);
                all.push(keywords);
            }
        }
        Ok(all)
    }
}

/// The choices that a schema leaves.
fn choices_of(open: &mut Open, keywords: &Keywords, chain: &Chain) {
    let valid = |node: usize| Part::Valid(node, chain.clone());
    if let Some(nodes) = &keywords.any {
        open.choices.push(nodes.iter().map(|&node| vec![valid(node)]).collect());
    }
    if let Some(nodes) = &keywords.one {
        let way = |at: usize| {
            let others = nodes.iter().enumerate().filter(|&(other, _)| other != at);
            std::iter::once(valid(nodes[at])).chain(others.map(|(_, &node)| Part::Invalid(node))).collect()
        };
        open.choices.push((0..nodes.len()).map(way).collect());
    }
    if let Some((condition, then, otherwise)) =
        keywords.condition.filter(|(_, then, other)| then.is_some() || other.is_some())
    {
        let yes = std::iter::once(condition).chain(then).map(valid).collect();
        let no = std::iter::once(Part::Invalid(condition)).chain(otherwise.map(valid)).collect();
        open.choices.push(vec![yes, no]);
    }
    if open.case.kind != Type::Object {
        return;
    }
    let there = |name: &Rc<str>| Part::Facet(Facet::Required(name.clone()));
    let not_there = |name: &Rc<str>| vec![Part::Facet(Facet::Absent(name.clone()))];
    for (name, node) in &keywords.dependent {
        open.choices.push(vec![vec![there(name), valid(*node)], not_there(name)]);
    }
    for (name, names) in &keywords.dependent_required {
        let all = std::iter::once(name).chain(names).map(there).collect();
        open.choices.push(vec![all, not_there(name)]);
    }
}

/// Ways in which an object is invalid because of its properties. Returns true if there are more.
fn object_ways(keywords: &Keywords, ways: &mut Vec<Vec<Part>>) -> bool {
    let there = |name: &Rc<str>| Part::Facet(Facet::Required(name.clone()));
    for (name, node) in &keywords.dependent {
        ways.push(vec![there(name), Part::Invalid(*node)]);
    }
    for (name, names) in &keywords.dependent_required {
        let missing = |other: &Rc<str>| vec![there(name), Part::Facet(Facet::Absent(other.clone()))];
        ways.extend(names.iter().map(missing));
    }
    let Some(properties) = &keywords.properties else { return keywords.unevaluated_properties.is_some() };
    for (name, node) in &properties.named {
        ways.push(vec![there(name), Part::Facet(Facet::Property(name.clone(), *node, false))]);
    }
    !properties.patterns.is_empty() || properties.additional.is_some() || keywords.unevaluated_properties.is_some()
}

/// Ways in which an array is invalid because of its items. Returns true if there are more.
fn array_ways(keywords: &Keywords, ways: &mut Vec<Vec<Part>>) -> bool {
    let Some(items) = &keywords.items else { return keywords.unevaluated_items.is_some() };
    if let Some(node) = items.rest.filter(|_| items.first.is_empty()) {
        ways.push(vec![Part::Facet(Facet::Contains { node, positive: false, least: 1, most: None })]);
    }
    !items.first.is_empty() || keywords.unevaluated_items.is_some()
}

/// Whether a way demands the opposite of an existing demand of a case.
fn contradicts(case: &Case, way: &[Part]) -> bool {
    way.iter().any(|part| match part {
        Part::Facet(Facet::Absent(name)) => case.facets.contains(&Facet::Required(name.clone())),
        Part::Facet(Facet::Required(name)) => case.facets.contains(&Facet::Absent(name.clone())),
        _ => false,
    })
}

/// The negation of a facet: it cannot be satisfied, it is a facet, or no facet expresses it (with the keyword).
fn opposite(facet: &Facet) -> Result<Option<Facet>, &'static str> {
    Ok(Some(match facet {
        Facet::Integer(is) => Facet::Integer(!is),
        Facet::Minimum(bound, exclusive) => Facet::Maximum(bound.clone(), !exclusive),
        Facet::Maximum(bound, exclusive) => Facet::Minimum(bound.clone(), !exclusive),
        Facet::Multiple(of) if of.as_f64() == Some(1.0) => Facet::Integer(false),
        Facet::MinLength(0) | Facet::MinItems(0) | Facet::MinProperties(0) => return Ok(None),
        Facet::MinLength(least) => Facet::MaxLength(least - 1),
        Facet::MaxLength(most) => Facet::MinLength(most.saturating_add(1)),
        Facet::Pattern(pattern, is) => Facet::Pattern(pattern.clone(), !is),
        Facet::MinItems(least) => Facet::MaxItems(least - 1),
        Facet::MaxItems(most) => Facet::MinItems(most.saturating_add(1)),
        Facet::Contains { least: 0, most: None, .. } => return Ok(None),
        Facet::Contains { node, positive, least: 1, most: None } => Facet::Every(*node, !positive),
        Facet::MinProperties(least) => Facet::MaxProperties(least - 1),
        Facet::MaxProperties(most) => Facet::MinProperties(most.saturating_add(1)),
        Facet::Required(name) => Facet::Absent(name.clone()),
        Facet::Multiple(_) => return Err("multipleOf"),
        Facet::Format(_) => return Ok(None),
        Facet::Unique => return Err("uniqueItems"),
        Facet::Contains { .. } => return Err("contains"),
        Facet::Names(_) => return Err("propertyNames"),
        Facet::Every(..) | Facet::Absent(_) | Facet::Property(..) | Facet::NoneOf(_) => return Err("not"),
    }))
}

//! Arrays.

use serde_json::Value;

use super::{Case, Emitter, Facet, Goal, List, Member, Symbol};
use crate::GrammarError;
use crate::schema::keywords::Type;

/// Most items that a schema can demand or describe one by one.
const MAX_ITEMS: u64 = 10_000;

/// Most values of items that must all be different.
const MAX_DIFFERENT: usize = 64;

/// How many items must be valid, or must not be, against a node.
struct Contains {
    node: usize,
    positive: bool,
    least: u64,
    most: Option<u64>,
}

impl Emitter<'_, '_> {
    pub(super) fn array(&mut self, goal: &Goal, case: &Case) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let (mut least, mut most, mut unique) = (0, None, false);
        let mut contains = Vec::new();
        for facet in &case.facets {
            match facet {
                Facet::MinItems(count) => least = least.max(*count),
                Facet::MaxItems(count) => most = Some(most.unwrap_or(u64::MAX).min(*count)),
                Facet::Unique => unique = true,
                Facet::Contains { node, positive, least, most } => {
                    contains.push(Contains { node: *node, positive: *positive, least: *least, most: *most });
                }
                _ => {}
            }
        }
        let wanted: u64 = contains.iter().fold(0, |sum, contains| sum.saturating_add(contains.least));
        let described = case.items.iter().map(|(items, _)| items.first.len()).max().unwrap_or(0);
        if least.max(wanted) > MAX_ITEMS || described as u64 > MAX_ITEMS {
            return Err(self.refuse("minItems", goal, &format!("more than {MAX_ITEMS} items are not supported")));
        }
        let most = most.filter(|&most| most < i32::MAX as u64);
        if contains.iter().any(|contains| contains.most.is_some_and(|most| most < contains.least)) {
            return Ok(Vec::new());
        }
        if unique && most.is_none_or(|most| most > 1) {
            return self.different(goal, case, (least, most), &contains);
        }
        // The place where the items for `contains` begin.
        let last = if wanted == 0 { 0 } else { described.min(8) };
        let mut alternatives = Vec::new();
        for start in 0..=last as u64 {
            let count = (described as u64).max(start + wanted);
            let least = if wanted == 0 { least } else { least.max(start + wanted) };
            let mut items = Vec::new();
            for at in 0..count {
                let mut goal = self.item(case, Some(at as usize))?;
                goal.extend(asked_for(&contains, at.checked_sub(start)));
                items.push(goal);
            }
            let mut rest = self.item(case, None)?;
            rest.extend(asked_for(&contains, None));
            alternatives.extend(self.items(items, rest, least, most)?);
        }
        Ok(alternatives)
    }

    /// What the item at a position must satisfy; without a position, what all items after the described ones must
    /// satisfy.
    fn item(&mut self, case: &Case, at: Option<usize>) -> Result<Goal, GrammarError> {
        let mut goal = Goal::new();
        let mut reached = Vec::new();
        for (items, chain) in &case.items {
            let node = at.and_then(|at| items.first.get(at).copied()).or(items.rest);
            if let Some(node) = node {
                goal.push((node, true));
                reached.push(chain);
            }
        }
        for &(owner, node) in &case.unevaluated {
            if !reached.iter().any(|chain| chain.contains(&owner)) {
                goal.push((node, true));
            }
        }
        let every = case.facets.iter();
        goal.extend(
            every.filter_map(|facet| if let Facet::Every(node, is) = facet { Some((*node, *is)) } else { None }),
        );
        Ok(goal)
    }

    /// An array of these items, and then any number of others.
    fn items(
        &mut self,
        items: Vec<Goal>,
        rest: Goal,
        least: u64,
        most: Option<u64>,
    ) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        if most.is_some_and(|most| most < least) {
            return Ok(Vec::new());
        }
        let (open, close, comma) = (self.open('['), self.close(']'), self.comma());
        let described = most.map_or(items.len(), |most| items.len().min(usize::try_from(most).unwrap_or(usize::MAX)));
        let other = Symbol::Rule(self.goal(rest)?);
        let count = described as u64;
        if described == 0 {
            let body = self.rules.add(super::tail(&other, &comma, 0, least, most))?;
            return Ok(vec![vec![open, body, close]]);
        }
        let room = most.map(|most| most - count);
        let mut tail = match described == items.len() && room != Some(0) {
            true => vec![Symbol::Repeat(vec![comma.clone(), other], least.saturating_sub(count), room)],
            false => Vec::new(),
        };
        for (at, goal) in items.into_iter().take(described).enumerate().rev() {
            let item = Symbol::Rule(self.goal(goal)?);
            let before = if at > 0 { Some(comma.clone()) } else { None };
            let with: Vec<Symbol> = before.into_iter().chain([item]).chain(tail).collect();
            // The array may end after each item, once there are enough.
            tail = match (at as u64) < least {
                true => vec![self.rules.add(vec![with])?],
                false => vec![self.rules.add(vec![with, Vec::new()])?],
            };
        }
        Ok(vec![[vec![open], tail, vec![close]].concat()])
    }

    /// An array of items that are all different, if there are few values to choose from.
    fn different(
        &mut self,
        goal: &Goal,
        case: &Case,
        (least, most): (u64, Option<u64>),
        contains: &[Contains],
    ) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let described = case.items.iter().any(|(items, _)| !items.first.is_empty());
        let values = match described || !contains.is_empty() {
            true => None,
            false => {
                let item = self.item(case, None)?;
                self.values(&item)?
            }
        };
        let Some(values) = values else {
            let reason = "items cannot be compared with each other, except where they are from an `enum`; leave it out";
            return Err(self.refuse("uniqueItems", goal, reason));
        };
        let mut members = Vec::new();
        for value in values {
            members.push(Member { symbols: self.value(&value), required: false });
        }
        self.list(List { members, others: None, brackets: ('[', ']'), least, most })
    }

    /// All values that satisfy a goal, if they are few.
    fn values(&mut self, goal: &Goal) -> Result<Option<Vec<Value>>, GrammarError> {
        let mut all: Vec<Value> = Vec::new();
        for kind in Type::ALL {
            for case in self.schema.cases(goal, kind)? {
                let values = match (case.values, kind) {
                    (Some(values), _) => values,
                    (None, Type::Null) => vec![Value::Null],
                    (None, Type::Boolean) => vec![Value::Bool(true), Value::Bool(false)],
                    _ => return Ok(None),
                };
                for value in values {
                    if self.is_in(goal, &value)? && !all.iter().any(|other| super::equal(other, &value)) {
                        all.push(value);
                    }
                }
            }
        }
        Ok((all.len() <= MAX_DIFFERENT).then_some(all))
    }
}

/// What `contains` demands of the item at this distance from the first item for `contains`.
fn asked_for(contains: &[Contains], at: Option<u64>) -> Goal {
    let mut first = 0;
    let mut goal = Goal::new();
    for &Contains { node, positive, least, most } in contains {
        let is_one = at.is_some_and(|at| (first..first + least).contains(&at));
        match is_one {
            true => goal.push((node, positive)),
            // No more items than `contains` asks for.
            false => goal.extend(most.map(|_| (node, !positive))),
        }
        first += least;
    }
    goal
}

//! Objects.

use std::collections::BTreeSet;
use std::rc::Rc;

use serde_json::Value;

use super::{Case, Emitter, Facet, Goal, List, Member, Symbol};
use crate::GrammarError;
use crate::schema::keywords::Type;
use crate::schema::rules::Terminal;
use crate::schema::strings::{matching, of_length, quote};

/// Most patterns for names in one object: each combination of them makes a separate kind of name.
const MAX_PATTERNS: usize = 4;

/// Most properties that a schema names in one object.
const MAX_NAMES: usize = 2000;

/// The demands of the facets of objects.
#[derive(Default)]
struct Demands {
    least: u64,
    most: Option<u64>,
    required: Vec<Rc<str>>,
    absent: BTreeSet<Rc<str>>,
    properties: Vec<(Rc<str>, usize, bool)>,
    /// Schemas for names.
    names: Goal,
}

impl Demands {
    fn of(case: &Case) -> Self {
        let mut demands = Demands::default();
        for facet in &case.facets {
            match facet {
                Facet::MinProperties(count) => demands.least = demands.least.max(*count),
                Facet::MaxProperties(count) => demands.most = Some(demands.most.unwrap_or(u64::MAX).min(*count)),
                Facet::Required(name) if !demands.required.contains(name) => demands.required.push(name.clone()),
                Facet::Absent(name) => {
                    demands.absent.insert(name.clone());
                }
                Facet::Property(name, node, is) => demands.properties.push((name.clone(), *node, *is)),
                Facet::Names(node) => demands.names.push((*node, true)),
                _ => {}
            }
        }
        demands
    }
}

impl Emitter<'_, '_> {
    pub(super) fn object(&mut self, goal: &Goal, case: &Case) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let demands = Demands::of(case);
        let mut names: Vec<Rc<str>> = Vec::new();
        let mut known = BTreeSet::new();
        let described =
            case.properties.iter().flat_map(|(properties, _)| properties.named.iter().map(|(name, _)| name));
        let others =
            demands.required.iter().chain(demands.properties.iter().map(|(name, ..)| name)).chain(&demands.absent);
        for name in described.chain(others) {
            if known.insert(name.clone()) {
                names.push(name.clone());
            }
        }
        if names.len() > MAX_NAMES {
            return Err(GrammarError::TooLarge {
                what: format!("an object of {} properties", names.len()),
                limit: MAX_NAMES,
            });
        }
        let mut members = Vec::new();
        for name in &names {
            let required = demands.required.contains(name);
            let symbols = match demands.absent.contains(name) {
                true => None,
                false => self.property(case, &demands, name)?,
            };
            match symbols {
                Some(symbols) => members.push(Member { symbols, required }),
                None if required => return Ok(Vec::new()),
                None => {}
            }
        }
        let others = self.others(goal, case, &demands, &names)?;
        let Demands { least, most, .. } = demands;
        // Names that are not described might come twice, but would count once.
        let sure = members.iter().filter(|member| member.required).count() as u64;
        if others.is_some() && least > sure.max(1) && least > members.len() as u64 {
            let reason = "properties that the schema does not name might be the same one twice; name more of them";
            return Err(self.refuse("minProperties", goal, reason));
        }
        if others.is_some() && least > 1 && least > sure {
            return self.enough_named(members, least, most);
        }
        self.list(List { members, others, brackets: ('{', '}'), least, most })
    }

    /// An object that has enough of the named properties, and no others.
    fn enough_named(
        &mut self,
        members: Vec<Member>,
        least: u64,
        most: Option<u64>,
    ) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        self.list(List { members, others: None, brackets: ('{', '}'), least, most })
    }

    /// A property that the schema names. `None` if the object cannot have it.
    fn property(
        &mut self,
        case: &Case,
        demands: &Demands,
        name: &Rc<str>,
    ) -> Result<Option<Vec<Symbol>>, GrammarError> {
        for &(node, positive) in &demands.names {
            if self.schema.is_valid(&Value::from(&**name), node)? != positive {
                return Ok(None);
            }
        }
        let (mut goal, mut reached) = (Goal::new(), Vec::new());
        for (properties, chain) in &case.properties {
            let nodes = self.schema.nodes_of(properties, name)?;
            if !nodes.is_empty() {
                reached.push(chain);
            }
            goal.extend(nodes.into_iter().map(|node| (node, true)));
        }
        for &(owner, node) in &case.unevaluated {
            if !reached.iter().any(|chain| chain.contains(&owner)) {
                goal.push((node, true));
            }
        }
        goal.extend(demands.properties.iter().filter(|(other, ..)| other == name).map(|&(_, node, is)| (node, is)));
        if self.is_never(&goal)? {
            return Ok(None);
        }
        let value = Symbol::Rule(self.goal(goal)?);
        Ok(Some(vec![Symbol::Text(quote(name)), self.colon(), value]))
    }

    /// Properties that the schema does not name. `None` if there can be none.
    fn others(
        &mut self,
        goal: &Goal,
        case: &Case,
        demands: &Demands,
        names: &[Rc<str>],
    ) -> Result<Option<Symbol>, GrammarError> {
        let mut patterns: Vec<Rc<str>> = Vec::new();
        for (pattern, _) in case.properties.iter().flat_map(|(properties, _)| &properties.patterns) {
            if !patterns.contains(pattern) {
                patterns.push(pattern.clone());
            }
        }
        if patterns.len() > MAX_PATTERNS {
            let reason = format!("{} patterns in one object are more than {MAX_PATTERNS}", patterns.len());
            return Err(self.refuse("patternProperties", goal, &reason));
        }
        let mut keys: Vec<Terminal> = vec![vec![(true, of_length(0, None))]];
        if !demands.names.is_empty() {
            keys.clear();
            for case in self.schema.cases(&demands.names, Type::String)? {
                keys.extend(self.strings(&demands.names, &case)?);
            }
        }
        let taken: Vec<String> = names.iter().map(|name| regex_syntax::escape(&quote(name))).collect();
        let mut alternatives = Vec::new();
        for class in 0..1_usize << patterns.len() {
            let matched: Vec<&Rc<str>> =
                patterns.iter().enumerate().filter(|(at, _)| class & (1 << at) != 0).map(|(_, p)| p).collect();
            let value = class_goal(case, &matched);
            if self.is_never(&value)? {
                continue;
            }
            let value = Symbol::Rule(self.goal(value)?);
            for key in &keys {
                let mut key = key.clone();
                for pattern in &patterns {
                    let regex = matching(pattern).map_err(|reason| self.refuse("patternProperties", goal, &reason))?;
                    key.push((matched.contains(&pattern), regex));
                }
                if !taken.is_empty() {
                    key.push((false, taken.join("|")));
                }
                let key = self.rules.terminal(key);
                alternatives.push(vec![key, self.colon(), value.clone()]);
            }
        }
        match alternatives.is_empty() {
            true => Ok(None),
            false => self.rules.add(alternatives).map(Some),
        }
    }
}

/// What a property must satisfy if the schema does not name it, and if its name matches exactly these patterns.
fn class_goal(case: &Case, matched: &[&Rc<str>]) -> Goal {
    let (mut goal, mut reached) = (Goal::new(), Vec::new());
    for (properties, chain) in &case.properties {
        let mut nodes: Vec<usize> = Vec::new();
        nodes.extend(
            properties.patterns.iter().filter(|(pattern, _)| matched.contains(&pattern)).map(|&(_, node)| node),
        );
        if nodes.is_empty() {
            nodes.extend(properties.additional);
        }
        if !nodes.is_empty() {
            reached.push(chain);
        }
        goal.extend(nodes.into_iter().map(|node| (node, true)));
    }
    for &(owner, node) in &case.unevaluated {
        if !reached.iter().any(|chain| chain.contains(&owner)) {
            goal.push((node, true));
        }
    }
    goal
}

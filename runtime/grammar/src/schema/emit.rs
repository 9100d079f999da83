//! Writes cases as alternatives of rules.

mod arrays;
mod objects;
mod scalars;

use std::collections::{HashMap, VecDeque};

use serde_json::Value;

use super::Schema;
use super::cases::{Case, Goal};
use super::keywords::{Facet, Type};
use super::rules::{Rules, Symbol};
use super::strings::quote;
use super::validate::equal;
use crate::GrammarError;

/// White space: nothing, a space, or a new line and its indentation. It is bounded, so that no text can be an endless
/// run of spaces.
const SPACE: &str = r"(?: |\r?\n[ \t]{0,60})?";

/// Most states of a list whose members are counted.
const MAX_STATES: usize = 20_000;

/// Schemas as rules, one for each goal.
pub(super) struct Emitter<'s, 'v> {
    schema: &'s mut Schema<'v>,
    rules: Rules,
    goals: HashMap<Goal, usize>,
    queue: VecDeque<(Goal, usize)>,
}

/// The rules of a schema, and the first rule.
pub(super) fn rules(schema: &mut Schema<'_>) -> Result<(Rules, usize), GrammarError> {
    let mut emitter = Emitter { schema, rules: Rules::default(), goals: HashMap::new(), queue: VecDeque::new() };
    let start = emitter.goal(vec![(0, true)])?;
    while let Some((goal, rule)) = emitter.queue.pop_front() {
        let mut alternatives = Vec::new();
        for kind in Type::ALL {
            for case in emitter.schema.cases(&goal, kind)? {
                alternatives.extend(emitter.case(&goal, &case)?);
            }
        }
        emitter.rules.define(rule, alternatives)?;
    }
    Ok((emitter.rules, start))
}

impl Emitter<'_, '_> {
    /// The rule of a goal.
    fn goal(&mut self, goal: Goal) -> Result<usize, GrammarError> {
        self.schema.step()?;
        let mut kept = Goal::new();
        for (node, positive) in goal {
            if self.schema.keywords(node)?.boolean != Some(positive) {
                kept.push((node, positive));
            }
        }
        kept.sort_unstable();
        kept.dedup();
        if let Some(&rule) = self.goals.get(&kept) {
            return Ok(rule);
        }
        let rule = self.rules.reserve();
        self.goals.insert(kept.clone(), rule);
        self.queue.push_back((kept, rule));
        Ok(rule)
    }

    /// Whether a goal certainly allows nothing.
    fn is_never(&mut self, goal: &Goal) -> Result<bool, GrammarError> {
        let mut never = false;
        for &(node, positive) in goal {
            never |= self.schema.keywords(node)?.boolean == Some(!positive);
        }
        Ok(never)
    }

    fn case(&mut self, goal: &Goal, case: &Case) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        if let Some(values) = &case.values {
            let (mut alternatives, mut texts) = (Vec::new(), Vec::new());
            for value in values {
                match value {
                    _ if !self.is_in(goal, value)? => {}
                    Value::String(text) => texts.push(quote(text)),
                    value => alternatives.push(self.value(value)),
                }
            }
            alternatives.extend((!texts.is_empty()).then(|| vec![self.rules.choice(&texts)]));
            return Ok(alternatives);
        }
        let is_out = |value: &Value| {
            case.facets
                .iter()
                .any(|facet| matches!(facet, Facet::NoneOf(values) if values.iter().any(|v| equal(v, value))))
        };
        match case.kind {
            Type::Null | Type::Boolean => {
                let values = [Value::Null, Value::Bool(true), Value::Bool(false)];
                let values = values.iter().filter(|value| Type::of(value) == case.kind && !is_out(value));
                Ok(values.map(|value| vec![Symbol::Text(value.to_string())]).collect())
            }
            Type::Number => self.number(goal, case),
            Type::String => {
                let terminals = self.strings(goal, case)?;
                Ok(terminals.into_iter().map(|terminal| vec![self.rules.terminal(terminal)]).collect())
            }
            Type::Array => self.array(goal, case),
            Type::Object => self.object(goal, case),
        }
    }

    /// Whether a value satisfies a goal.
    fn is_in(&mut self, goal: &Goal, value: &Value) -> Result<bool, GrammarError> {
        for &(node, positive) in goal {
            if self.schema.is_valid(value, node)? != positive {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Exactly this value.
    fn value(&mut self, value: &Value) -> Vec<Symbol> {
        let mut symbols = Vec::new();
        self.write(value, &mut symbols);
        symbols
    }

    fn write(&mut self, value: &Value, symbols: &mut Vec<Symbol>) {
        match value {
            Value::String(text) => symbols.push(Symbol::Text(quote(text))),
            Value::Array(items) => {
                symbols.push(self.open('['));
                for (at, item) in items.iter().enumerate() {
                    symbols.extend((at > 0).then(|| self.comma()));
                    self.write(item, symbols);
                }
                symbols.push(self.close(']'));
            }
            Value::Object(map) => {
                symbols.push(self.open('{'));
                for (at, (name, value)) in map.iter().enumerate() {
                    symbols.extend((at > 0).then(|| self.comma()));
                    symbols.extend([Symbol::Text(quote(name)), self.colon()]);
                    self.write(value, symbols);
                }
                symbols.push(self.close('}'));
            }
            other => symbols.push(Symbol::Text(other.to_string())),
        }
    }

    fn open(&mut self, bracket: char) -> Symbol {
        self.rules.regex(&format!("\\{bracket}{SPACE}"))
    }

    fn close(&mut self, bracket: char) -> Symbol {
        self.rules.regex(&format!("{SPACE}\\{bracket}"))
    }

    fn comma(&mut self) -> Symbol {
        self.rules.regex(&format!(",{SPACE}"))
    }

    fn colon(&mut self) -> Symbol {
        self.rules.regex(": ?")
    }

    /// A list between brackets: first members that come at most once, in their order, some of them always; then any number of
    /// others. In all there are from `least` to `most` members.
    fn list(&mut self, list: List) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let List { members, others, brackets, least, most } = list;
        let (open, close, comma) = (self.open(brackets.0), self.close(brackets.1), self.comma());
        let total = members.len() as u64;
        let most = most.filter(|&most| others.is_some() || most < total);
        // Members are counted up to this number; beyond it, the count makes no difference.
        let cap = most.unwrap_or(least.min(total + 1).max(1));
        if (total + 1).saturating_mul(cap.min(total) + 1) > MAX_STATES as u64 {
            let what = format!("a list of {total} members that are counted up to {cap}");
            return Err(GrammarError::TooLarge { what, limit: MAX_STATES });
        }
        let mut states: HashMap<u64, Symbol> = HashMap::new();
        for count in 0..=total.min(cap) {
            let alternatives = match &others {
                Some(other) => tail(other, &comma, count, least, most),
                None if count >= least.min(cap) => vec![Vec::new()],
                None => Vec::new(),
            };
            states.insert(count, self.rules.add(alternatives)?);
        }
        for (at, member) in members.iter().enumerate().rev() {
            let mut before = HashMap::new();
            for count in 0..=(at as u64).min(cap) {
                let mut alternatives = Vec::new();
                let next = states.get(&(count + 1).min(cap)).filter(|_| most.is_none_or(|most| count < most));
                if let Some(next) = next {
                    let comma = (count > 0).then(|| comma.clone());
                    alternatives
                        .push(comma.into_iter().chain(member.symbols.iter().cloned()).chain([next.clone()]).collect());
                }
                if let Some(skip) = states.get(&count).filter(|_| !member.required) {
                    alternatives.push(vec![skip.clone()]);
                }
                before.insert(count, self.rules.add(alternatives)?);
            }
            states = before;
        }
        Ok(states.remove(&0).map(|body| vec![open, body, close]).into_iter().collect())
    }
}

/// A list between brackets.
struct List {
    members: Vec<Member>,
    /// What may come after them.
    others: Option<Symbol>,
    brackets: (char, char),
    least: u64,
    most: Option<u64>,
}

/// A member of a list.
struct Member {
    symbols: Vec<Symbol>,
    required: bool,
}

/// What may follow `count` members.
fn tail(other: &Symbol, comma: &Symbol, count: u64, least: u64, most: Option<u64>) -> Vec<Vec<Symbol>> {
    let (least, most) = (least.saturating_sub(count), most.map(|most| most.saturating_sub(count)));
    let more = vec![comma.clone(), other.clone()];
    if most.is_some_and(|most| most < least) {
        return Vec::new();
    }
    if count > 0 {
        return vec![vec![Symbol::Repeat(more, least, most)]];
    }
    let mut alternatives = Vec::new();
    if least == 0 {
        alternatives.push(Vec::new());
    }
    if most != Some(0) {
        let rest = Symbol::Repeat(more, least.saturating_sub(1), most.map(|most| most - 1));
        alternatives.push(vec![other.clone(), rest]);
    }
    alternatives
}

//! A grammar under construction: rules, terminals, and which of them can match a finite text.

use std::collections::HashMap;
use std::fmt::Write;

use llguidance::derivre::{RegexAst, RegexBuilder};

use crate::GrammarError;
use crate::lark::{literal, one_of};

/// Most symbols in all rules.
const MAX_SYMBOLS: usize = 100_000;

/// Longest text of a grammar, in bytes.
const MAX_TEXT: usize = 4 << 20;

/// The most effort to find out whether a terminal matches anything.
const FUEL: u64 = 200_000;

/// A symbol of an alternative.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Symbol {
    /// This text.
    Text(String),
    /// A terminal, by number.
    Terminal(usize),
    /// One of several texts, by number.
    Choice(usize),
    /// A rule, by number.
    Rule(usize),
    /// Several symbols, repeated this many times.
    Repeat(Vec<Symbol>, u64, Option<u64>),
    /// A JSON number that fits a schema which the library understands itself.
    Json(String),
}

/// A regular expression for texts that match all patterns with `true` and none with `false`.
pub(crate) type Terminal = Vec<(bool, String)>;

/// Rules and terminals.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    /// Alternatives by rule.
    rules: Vec<Vec<Vec<Symbol>>>,
    terminals: Vec<Terminal>,
    numbers: HashMap<Terminal, usize>,
    choices: Vec<String>,
    symbols: usize,
}

impl Rules {
    /// A rule that will be defined later.
    pub(crate) fn reserve(&mut self) -> usize {
        self.rules.push(Vec::new());
        self.rules.len() - 1
    }

    pub(crate) fn define(&mut self, rule: usize, alternatives: Vec<Vec<Symbol>>) -> Result<(), GrammarError> {
        self.symbols += alternatives.iter().map(|symbols| symbols.len() + 1).sum::<usize>();
        if self.symbols > MAX_SYMBOLS {
            return Err(too_large(self.symbols));
        }
        self.rules[rule] = alternatives;
        Ok(())
    }

    pub(crate) fn add(&mut self, alternatives: Vec<Vec<Symbol>>) -> Result<Symbol, GrammarError> {
        let rule = self.reserve();
        self.define(rule, alternatives)?;
        Ok(Symbol::Rule(rule))
    }

    pub(crate) fn terminal(&mut self, terminal: Terminal) -> Symbol {
        let Rules { terminals, numbers, .. } = self;
        let number = *numbers.entry(terminal).or_insert_with_key(|terminal| {
            terminals.push(terminal.clone());
            terminals.len() - 1
        });
        Symbol::Terminal(number)
    }

    /// One of these texts, as one terminal: the library makes a tree of them, whereas it would look at each alternative of a rule for every
    /// byte that may come first.
    pub(crate) fn choice(&mut self, texts: &[String]) -> Symbol {
        self.choices.push(one_of(texts));
        Symbol::Choice(self.choices.len() - 1)
    }

    pub(crate) fn regex(&mut self, regex: &str) -> Symbol {
        self.terminal(vec![(true, regex.to_owned())])
    }

    /// The grammar in Lark, without rules that can never be finished. `None` if nothing remains.
    pub(crate) fn print(mut self, start: usize) -> Result<Option<String>, GrammarError> {
        let alive: Vec<bool> = self.terminals.iter().map(matches_something).collect::<Result<_, _>>()?;
        let mut finishes = vec![false; self.rules.len()];
        loop {
            let mut changed = false;
            for (rule, alternatives) in self.rules.iter().enumerate() {
                let ends = |symbols: &Vec<Symbol>| symbols.iter().all(|symbol| can_end(symbol, &alive, &finishes));
                if !finishes[rule] && alternatives.iter().any(ends) {
                    finishes[rule] = true;
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        if !finishes[start] {
            return Ok(None);
        }
        for alternatives in &mut self.rules {
            alternatives.retain(|symbols| symbols.iter().all(|symbol| can_end(symbol, &alive, &finishes)));
            alternatives.iter_mut().flatten().for_each(|symbol| drop_dead(symbol, &alive, &finishes));
        }
        self.text(start, &finishes).map(Some)
    }

    fn text(&self, start: usize, finishes: &[bool]) -> Result<String, GrammarError> {
        let mut out = format!("start: r{start}\n");
        let (mut used, mut chosen) = (vec![false; self.terminals.len()], vec![false; self.choices.len()]);
        for rule in self.reachable(start).into_iter().filter(|&rule| finishes[rule]) {
            let mut alternatives: Vec<String> = Vec::new();
            for symbols in &self.rules[rule] {
                symbols.iter().for_each(|symbol| mark(symbol, &mut used, &mut chosen));
                let text = sequence(symbols);
                if !alternatives.contains(&text) {
                    alternatives.push(text);
                }
            }
            let _ = writeln!(out, "r{rule}: {}", alternatives.join("\n | "));
            if out.len() > MAX_TEXT {
                return Err(too_large(self.symbols));
            }
        }
        for (number, terminal) in self.terminals.iter().enumerate().filter(|(number, _)| used[*number]) {
            let parts = terminal.iter().map(|(is, regex)| {
                let not = if *is { "" } else { "~" };
                format!("{not}/{}/", llguidance::regex_to_lark(regex, ""))
            });
            let _ = writeln!(out, "T{number}: {}", parts.collect::<Vec<_>>().join(" & "));
        }
        for (number, texts) in self.choices.iter().enumerate().filter(|(number, _)| chosen[*number]) {
            let _ = writeln!(out, "C{number}: {texts}");
        }
        match out.len() > MAX_TEXT {
            true => Err(too_large(self.symbols)),
            false => Ok(out),
        }
    }

    fn reachable(&self, start: usize) -> Vec<usize> {
        let (mut seen, mut order, mut pending) = (vec![false; self.rules.len()], Vec::new(), vec![start]);
        while let Some(rule) = pending.pop() {
            if std::mem::replace(&mut seen[rule], true) {
                continue;
            }
            order.push(rule);
            self.rules[rule].iter().flatten().for_each(|symbol| rules_in(symbol, &mut pending));
        }
        order
    }
}

fn too_large(symbols: usize) -> GrammarError {
    GrammarError::TooLarge { what: format!("a schema whose grammar has {symbols} symbols"), limit: MAX_SYMBOLS }
}

fn can_end(symbol: &Symbol, alive: &[bool], finishes: &[bool]) -> bool {
    match symbol {
        Symbol::Text(_) | Symbol::Json(_) | Symbol::Choice(_) => true,
        Symbol::Terminal(number) => alive[*number],
        Symbol::Rule(number) => finishes[*number],
        Symbol::Repeat(symbols, least, _) => *least == 0 || symbols.iter().all(|s| can_end(s, alive, finishes)),
    }
}

/// Empties repetitions whose symbols can never be finished: they can only be repeated zero times.
fn drop_dead(symbol: &mut Symbol, alive: &[bool], finishes: &[bool]) {
    if let Symbol::Repeat(symbols, _, _) = symbol {
        match symbols.iter().all(|s| can_end(s, alive, finishes)) {
            true => symbols.iter_mut().for_each(|symbol| drop_dead(symbol, alive, finishes)),
            false => *symbol = Symbol::Text(String::new()),
        }
    }
}

fn mark(symbol: &Symbol, used: &mut [bool], chosen: &mut [bool]) {
    match symbol {
        Symbol::Terminal(number) => used[*number] = true,
        Symbol::Choice(number) => chosen[*number] = true,
        Symbol::Repeat(symbols, _, _) => symbols.iter().for_each(|symbol| mark(symbol, used, chosen)),
        _ => {}
    }
}

fn rules_in(symbol: &Symbol, rules: &mut Vec<usize>) {
    match symbol {
        Symbol::Rule(number) => rules.push(*number),
        Symbol::Repeat(symbols, _, _) => symbols.iter().for_each(|symbol| rules_in(symbol, rules)),
        _ => {}
    }
}

fn sequence(symbols: &[Symbol]) -> String {
    let parts: Vec<String> =
        symbols.iter().filter(|symbol| !matches!(symbol, Symbol::Text(text) if text.is_empty())).map(print).collect();
    match parts.is_empty() {
        true => "\"\"".to_owned(),
        false => parts.join(" "),
    }
}

fn print(symbol: &Symbol) -> String {
    match symbol {
        Symbol::Text(text) => literal(text),
        Symbol::Terminal(number) => format!("T{number}"),
        Symbol::Choice(number) => format!("C{number}"),
        Symbol::Rule(number) => format!("r{number}"),
        Symbol::Json(schema) => format!("%json {schema}"),
        Symbol::Repeat(symbols, least, most) => {
            let inner = sequence(symbols);
            match (least, most) {
                (_, Some(0)) => "\"\"".to_owned(),
                (0, None) => format!("({inner})*"),
                (1, None) => format!("({inner})+"),
                (0, Some(1)) => format!("({inner})?"),
                (least, None) => format!("({inner}){{{least},}}"),
                (least, Some(most)) => format!("({inner}){{{least},{most}}}"),
            }
        }
    }
}

/// Whether there is a text that a terminal matches.
fn matches_something(terminal: &Terminal) -> Result<bool, GrammarError> {
    if let [(true, _)] = terminal.as_slice() {
        return Ok(true);
    }
    let unclear = |reason: String| GrammarError::Invalid { what: "schema", reason };
    let parts = terminal.iter().map(|(is, regex)| {
        let ast = RegexAst::Regex(regex.clone());
        if *is { ast } else { RegexAst::Not(Box::new(ast)) }
    });
    let mut builder = RegexBuilder::new();
    let both = builder.mk(&RegexAst::And(parts.collect())).map_err(|e| unclear(crate::error::clip(&e.to_string())))?;
    let regex = builder.to_regex_limited(both, FUEL);
    let mut regex =
        regex.map_err(|_| unclear("its patterns and lengths together are too complex; make them simpler".into()))?;
    Ok(!regex.always_empty())
}

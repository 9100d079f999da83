//! Numbers and strings.

use serde_json::{Number, Value, json};

use super::{Case, Emitter, Facet, Goal, Symbol};
use crate::GrammarError;
use crate::schema::document::unsupported;
use crate::schema::numbers::{self, HIGHEST, ONE, decimals, integers, scaled};
use crate::schema::rules::Terminal;
use crate::schema::strings::{self, matching, of_length, quote};

/// Longest string that a schema can demand, in characters.
const MAX_LENGTH: u64 = 1_000_000;

/// Largest number whose multiples an automaton recognises.
const MAX_REMAINDERS: i128 = 1000;

/// Larger than every number whose multiples are supported.
const MAX_MULTIPLE: i128 = 1_000_000_000_000 * ONE;

/// A bound, and whether it is exclusive.
type Bound = Option<(i128, bool)>;

impl Emitter<'_, '_> {
    pub(super) fn refuse(&self, keyword: &str, goal: &Goal, reason: &str) -> GrammarError {
        let place = goal.first().map_or_else(|| "#".to_owned(), |&(node, _)| self.schema.place(node));
        unsupported(keyword, &place, reason.to_owned())
    }

    pub(super) fn number(&mut self, goal: &Goal, case: &Case) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let (mut low, mut high): (Bound, Bound) = (None, None);
        let (mut whole, mut broken, mut multiple) = (false, false, None);
        let mut none_of = Vec::new();
        for facet in &case.facets {
            match facet {
                Facet::Integer(is) => {
                    whole |= is;
                    broken |= !is;
                }
                Facet::Minimum(bound, exclusive) => {
                    let bound = self.lower(goal, "minimum", bound, *exclusive)?;
                    low = low.max(bound);
                }
                Facet::Maximum(bound, exclusive) => {
                    // Reversed, so that of two equal bounds the exclusive one counts.
                    let bound = self.lower(goal, "maximum", &negative(bound), *exclusive)?.map(|(b, e)| (-b, e));
                    high = match (high, bound) {
                        (Some((a, x)), Some((b, y))) => Some(if (a, !x) <= (b, !y) { (a, x) } else { (b, y) }),
                        (old, new) => old.or(new),
                    };
                }
                Facet::Multiple(of) => multiple = Some(self.multiple(goal, multiple, of)?),
                Facet::NoneOf(values) => none_of.extend(values.iter().filter_map(Value::as_f64)),
                _ => {}
            }
        }
        if multiple.is_some_and(|of| of % ONE == 0) {
            whole = true;
        }
        if whole && broken {
            return Ok(Vec::new());
        }
        // Bounds above all numbers that are written without an exponent are left out, so exponents must be left out
        // too.
        let bounded = case.facets.iter().any(|facet| matches!(facet, Facet::Minimum(..) | Facet::Maximum(..)));
        let plain = bounded || !none_of.is_empty();
        let Some(mut terminal) = base(low, high, whole, broken, plain) else { return Ok(Vec::new()) };
        for value in none_of {
            let sign = if value == 0.0 { "-?" } else { "" };
            let zeros = if value.fract() == 0.0 { r"(?:\.0+)?" } else { "0*" };
            terminal.push((false, format!("{sign}{}{zeros}", regex_syntax::escape(&value.to_string()))));
        }
        match multiple.filter(|&of| of != ONE) {
            Some(of) => self.multiples(goal, of, low, high, terminal),
            None => Ok(vec![vec![self.rules.terminal(terminal)]]),
        }
    }

    /// A lower bound in countable units. `None` if the bound is below all numbers that can be written.
    fn lower(&self, goal: &Goal, keyword: &str, bound: &Number, exclusive: bool) -> Result<Bound, GrammarError> {
        let float = bound.as_f64().unwrap_or(f64::NAN);
        match scaled(bound) {
            Some(bound) if bound < -HIGHEST * ONE => Ok(None),
            Some(bound) if bound <= HIGHEST * ONE => Ok(Some((bound, exclusive))),
            None if float < -1e18 => Ok(None),
            // If it has more decimal places than are counted, take the next countable number above it.
            None if float.abs() < 1e6 => Ok(Some(((float * 1e9).floor() as i128 + 1, false))),
            _ => Err(self.refuse(
                keyword,
                goal,
                "the bound is larger than the numbers that are written, which have 18 digits",
            )),
        }
    }

    fn multiple(&self, goal: &Goal, old: Option<i128>, of: &Number) -> Result<i128, GrammarError> {
        let fail = || self.refuse("multipleOf", goal, "it has more than nine decimal places, or too many digits");
        let new = scaled(of).filter(|&of| of > 0 && of < MAX_MULTIPLE).ok_or_else(fail)?;
        let Some(old) = old else { return Ok(new) };
        Some(common_multiple(old, new)).filter(|&both| both < MAX_MULTIPLE).ok_or_else(fail)
    }

    /// Multiples of a number other than 1, in units of 10⁻⁹.
    fn multiples(
        &mut self,
        goal: &Goal,
        of: i128,
        low: Bound,
        high: Bound,
        mut terminal: Terminal,
    ) -> Result<Vec<Vec<Symbol>>, GrammarError> {
        let places = numeral(of).split_once('.').map_or(0, |(_, places)| places.len());
        if ONE % of == 0 && numeral(ONE / of * ONE).trim_end_matches('0') == "1" {
            terminal.push((true, format!(r"{}(?:\.[0-9]{{1,{places}}}0{{0,2}})?", numbers::INTEGER)));
            return Ok(vec![vec![self.rules.terminal(terminal)]]);
        }
        if ONE % of == 0 && ONE / of <= 1000 {
            // The fractions that occur, with and without trailing zeros.
            let fractions = (1..ONE / of).map(|count| format!("{:09}", count * of).trim_end_matches('0').to_owned());
            let fractions: Vec<String> = std::iter::once("0".to_owned()).chain(fractions).collect();
            terminal.push((true, format!(r"{}(?:\.(?:{})0{{0,2}})?", numbers::INTEGER, fractions.join("|"))));
            return Ok(vec![vec![self.rules.terminal(terminal)]]);
        }
        // With other fractions, only the multiples that are whole numbers.
        let of = if of % ONE == 0 { of } else { common_multiple(of, ONE) };
        let bound = |bound: Bound, sign: i128| match bound {
            Some((bound, exclusive)) => sign * bound - i128::from(exclusive),
            None => 1_000_000_000_000 * ONE,
        };
        // Counts of multiples.
        let (first, last) = (-bound(low, -1).div_euclid(of), bound(high, 1).div_euclid(of));
        // The library's automaton has a state for each remainder. With larger numbers, only the multiples next to 0
        // are possible.
        let (first, last) = match of / ONE > MAX_REMAINDERS && last - first > 500 {
            true if first > 0 => (first, first + 500),
            true if last < 0 => (last - 500, last),
            true => (first.max(-250), last.min(250)),
            false => (first, last),
        };
        match last - first {
            count if count < 0 => Ok(Vec::new()),
            0..=500 => {
                let text = |count: i128| numeral(count * of);
                let values: Vec<String> = (first..=last).map(text).map(|text| regex_syntax::escape(&text)).collect();
                terminal.push((true, values.join("|")));
                Ok(vec![vec![self.rules.terminal(terminal)]])
            }
            _ if terminal.len() == 1 => {
                let integer = |value: i128| i64::try_from(value.div_euclid(ONE)).unwrap_or_default();
                let (low, high) = (integer(first * of), integer(last * of));
                let schema = json!({
                    "x-guidance": {"whitespace_flexible": false},
                    "type": "integer", "multipleOf": integer(of), "minimum": low, "maximum": high,
                });
                Ok(vec![vec![Symbol::Json(schema.to_string())]])
            }
            _ => Err(self.refuse(
                "multipleOf",
                goal,
                "it is not supported together with other demands on the same number",
            )),
        }
    }

    /// Strings, as terminals of which one matches.
    pub(super) fn strings(&mut self, goal: &Goal, case: &Case) -> Result<Vec<Terminal>, GrammarError> {
        if let Some(values) = &case.values {
            let mut texts = Vec::new();
            for value in values {
                if let Value::String(text) = value
                    && self.is_in(goal, value)?
                {
                    texts.push(regex_syntax::escape(&quote(text)));
                }
            }
            return Ok(if texts.is_empty() { Vec::new() } else { vec![vec![(true, texts.join("|"))]] });
        }
        let (mut least, mut most) = (0, None);
        let mut terminal = Terminal::new();
        for facet in &case.facets {
            match facet {
                Facet::MinLength(length) => least = least.max(*length),
                Facet::MaxLength(length) => most = Some(most.unwrap_or(MAX_LENGTH).min(*length)),
                Facet::Pattern(pattern, is) => {
                    let regex = matching(pattern).map_err(|reason| self.refuse("pattern", goal, &reason))?;
                    terminal.push((*is, regex));
                }
                Facet::Format(name) => terminal.extend(strings::format(name).map(|regex| (true, regex))),
                Facet::NoneOf(values) => {
                    let texts = values.iter().filter_map(Value::as_str).map(|text| regex_syntax::escape(&quote(text)));
                    terminal.push((false, texts.collect::<Vec<_>>().join("|")));
                }
                _ => {}
            }
        }
        if least > MAX_LENGTH {
            return Err(self.refuse(
                "minLength",
                goal,
                &format!("more than {MAX_LENGTH} characters are not supported"),
            ));
        }
        if most.is_some_and(|most| most < least) {
            return Ok(Vec::new());
        }
        let bounded = least > 0 || most.is_some();
        if bounded || !terminal.iter().any(|(is, _)| *is) {
            terminal.insert(0, (true, of_length(least, most)));
        }
        Ok(vec![terminal])
    }
}

/// Numbers between bounds; if some values must be excluded, only numbers without exponents.
fn base(low: Bound, high: Bound, whole: bool, broken: bool, plain: bool) -> Option<Terminal> {
    if whole {
        let low = low.map_or(-HIGHEST, |(bound, exclusive)| (bound + i128::from(exclusive) + ONE - 1).div_euclid(ONE));
        let high = high.map_or(HIGHEST, |(bound, exclusive)| (bound - i128::from(exclusive)).div_euclid(ONE));
        return Some(vec![(true, integers(low, high)?)]);
    }
    let mut terminal = match (low, high) {
        (None, None) if plain || broken => vec![(true, numbers::PLAIN.to_owned())],
        (None, None) => vec![(true, numbers::NUMBER.to_owned())],
        (low, high) => vec![(true, decimals(low, high)?)],
    };
    if broken {
        terminal.push((true, numbers::FRACTION.to_owned()));
    }
    Some(terminal)
}

/// The least common multiple of two numbers above 0.
fn common_multiple(one: i128, other: i128) -> i128 {
    let (mut a, mut b) = (one, other);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    one / a * other
}

fn negative(number: &Number) -> Number {
    let negated = match number.as_i64().and_then(i64::checked_neg) {
        Some(negated) => Some(Number::from(negated)),
        None => number.as_f64().and_then(|float| Number::from_f64(-float)),
    };
    negated.unwrap_or_else(|| number.clone())
}

/// Writes a number that is given in units of 10⁻⁹.
fn numeral(value: i128) -> String {
    let sign = if value < 0 { "-" } else { "" };
    let (whole, part) = (value.abs() / ONE, value.abs() % ONE);
    let part = format!("{part:09}");
    match part.trim_end_matches('0') {
        "" => format!("{sign}{whole}"),
        part => format!("{sign}{whole}.{part}"),
    }
}

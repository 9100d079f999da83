//! Types by pattern: which weights become what, where two types for all are too few.
//!
//! `docs/QUANTISATION.md` describes the file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sluice_format::{ExtentKind, NO_LAYER};

use crate::error::ConvertError;
use crate::options::TypeChoice;

/// Longest recipe that is read.
const MAX_LEN: u64 = 1 << 20;

/// Patterns and types; the first pattern that matches a tensor decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe {
    path: PathBuf,
    rules: Vec<Rule>,
}

/// A line of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    line: usize,
    text: String,
    pattern: Vec<Piece>,
    choice: TypeChoice,
}

/// A part of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// Any text, dots included.
    Any,
    /// A number from the first to the last.
    Range(usize, usize),
}

impl Recipe {
    /// Reads the recipe in the file at `path`.
    ///
    /// # Errors
    /// [`ConvertError::Io`] and [`ConvertError::Recipe`].
    pub fn load(path: &Path) -> Result<Self, ConvertError> {
        let io = |action| ConvertError::io(path, action);
        let mut text = Vec::new();
        let file = File::open(path).map_err(io("open it"))?;
        file.take(MAX_LEN + 1).read_to_end(&mut text).map_err(io("read it"))?;
        let whole =
            |problem: &str| ConvertError::Recipe { path: path.to_owned(), line: 1, problem: problem.to_owned() };
        if text.len() as u64 > MAX_LEN {
            return Err(whole("it has more than a mebibyte, so it is no recipe"));
        }
        let text = String::from_utf8(text).map_err(|_| whole("it is not text"))?;
        Self::parse(path, &text)
    }

    /// Parses the text of a recipe; `path` is for messages.
    ///
    /// # Errors
    /// [`ConvertError::Recipe`], which names the line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConvertError> {
        let mut rules = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let rule = line.split('#').next().unwrap_or_default().trim();
            if !rule.is_empty() {
                let line = i + 1;
                let refuse = |problem| ConvertError::Recipe { path: path.to_owned(), line, problem };
                rules.push(Rule::parse(line, rule).map_err(refuse)?);
            }
        }
        Ok(Recipe { path: path.to_owned(), rules })
    }

    /// The type of a tensor, if a pattern matches it, and the number of that rule.
    pub(crate) fn choice(&self, name: &str) -> Option<(usize, TypeChoice)> {
        let found = self.rules.iter().enumerate().find(|(_, rule)| matches(&rule.pattern, name));
        found.map(|(number, rule)| (number, rule.choice))
    }

    /// Its rules as they were written, without comments and empty lines.
    pub(crate) fn lines(&self) -> Vec<&str> {
        self.rules.iter().map(|rule| rule.text.as_str()).collect()
    }

    /// A remark on rules that have decided nothing.
    pub(crate) fn unused(&self, used: &[usize]) -> Option<String> {
        let idle = self.rules.iter().enumerate().filter(|(number, _)| !used.contains(number));
        let idle: Vec<String> = idle.map(|(_, rule)| format!("line {}: `{}`", rule.line, rule.text)).collect();
        (!idle.is_empty()).then(|| {
            let path = self.path.display();
            format!("{path}: no tensor is left for these patterns: {}", idle.join(", "))
        })
    }
}

impl Rule {
    fn parse(line: usize, rule: &str) -> Result<Self, String> {
        let mut words = rule.split_whitespace();
        let (Some(pattern), Some(ty), None) = (words.next(), words.next(), words.next()) else {
            return Err(format!("`{rule}` is not a pattern and a type"));
        };
        let text = format!("{pattern} {ty}");
        Ok(Rule { line, text, pattern: pieces(pattern)?, choice: ty.parse()? })
    }
}

fn pieces(pattern: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = pattern;
    while let Some(at) = rest.find(['*', '{']) {
        let (text, special) = rest.split_at(at);
        if !text.is_empty() {
            pieces.push(Piece::Text(text.to_owned()));
        }
        if let Some(behind) = special.strip_prefix('*') {
            pieces.push(Piece::Any);
            rest = behind;
            continue;
        }
        let wrong = || format!("`{pattern}` has a brace that is no range of numbers such as {{0-3}}");
        let (range, behind) = special[1..].split_once('}').ok_or_else(wrong)?;
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => pieces.push(Piece::Range(first, last)),
            _ => return Err(wrong()),
        }
        rest = behind;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    Ok(pieces)
}

/// Whether a pattern matches all of a name.
fn matches(pattern: &[Piece], name: &str) -> bool {
    let Some((piece, others)) = pattern.split_first() else { return name.is_empty() };
    match piece {
        Piece::Text(text) => name.strip_prefix(text.as_str()).is_some_and(|rest| matches(others, rest)),
        Piece::Any => {
            // Two in a row are one, so that the work is bounded by the pattern's texts.
            let others = &others[others.iter().take_while(|p| **p == Piece::Any).count()..];
            name.char_indices().map(|(i, _)| i).chain([name.len()]).any(|i| matches(others, &name[i..]))
        }
        Piece::Range(first, last) => {
            let digits = name.bytes().take_while(u8::is_ascii_digit).count();
            let (number, rest) = name.split_at(digits);
            number.parse().is_ok_and(|n: usize| (*first..=*last).contains(&n)) && matches(others, rest)
        }
    }
}

/// What patterns are matched with: `layers.3.expert.down`, `head`, `embedding`.
pub(crate) fn name(kind: ExtentKind, layer: u32, tensor: &str) -> String {
    match layer {
        NO_LAYER => kind.to_string(),
        layer => format!("layers.{layer}.{kind}.{tensor}"),
    }
}

#[cfg(test)]
mod tests {
    use sluice_format::WeightType;

    use super::*;

    fn recipe(text: &str) -> Recipe {
        Recipe::parse(Path::new("r"), text).unwrap()
    }

    #[test]
    fn the_first_match_wins() {
        let recipe = recipe(
            "# the first layers matter\nlayers.{0-2}.expert.*  q8 # all of them\n\n*.expert.down q4\n*expert* q3\nhead keep\n",
        );
        let choice = |name: &str| recipe.choice(name);
        let ty = |ty| TypeChoice::Type(ty);
        assert_eq!(choice("layers.2.expert.down"), Some((0, ty(WeightType::Q8))));
        assert_eq!(choice("layers.12.expert.down"), Some((1, ty(WeightType::Q4))));
        assert_eq!(choice("layers.3.expert.gate_up"), Some((2, ty(WeightType::Q3))));
        assert_eq!(choice("head"), Some((3, TypeChoice::Keep)));
        assert_eq!(choice("layers.0.attention.o"), None);
        let unused = recipe.unused(&[0, 3]).unwrap();
        assert!(unused.contains("line 4: `*.expert.down q4`, line 5: `*expert* q3`"), "{unused}");
        assert_eq!(recipe.lines().len(), 4);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, word) in [
            ("head", "not a pattern and a type"),
            ("\nhead q8 q4", "line 2"),
            ("head int4", "int4"),
            ("layers.{3-1}.* q8", "{3-1}"),
            ("layers.{a}.* q8", "range of numbers"),
            ("layers.{1 q8", "range of numbers"),
        ] {
            let error = Recipe::parse(Path::new("r"), text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(recipe("layers.{7}.*.o q8").choice("layers.7.attention.o").is_some());
        assert!(recipe("**a**** q8").choice("bab").is_some());
        assert!(recipe("*a*a*a*a*a*a*b q8").choice(&"a".repeat(60)).is_none());
    }
}

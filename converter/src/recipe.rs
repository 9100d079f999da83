//! Types by pattern: a type for each group of weights, if two types for all are not enough.
//!
//! `docs/QUANTISATION.md` describes the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sluice_format::{ExtentKind, NO_LAYER};

use crate::error::ConvertError;
use crate::options::TypeChoice;
use crate::pattern::Pattern;
use crate::source::read_side_file;

/// Length limit of a recipe.
const MAX_LEN: usize = 1 << 20;

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
    pattern: Pattern,
    choice: TypeChoice,
}

impl Recipe {
    /// Reads the recipe in the file at `path`.
    ///
    /// # Errors
    /// [`ConvertError::Io`], also if it is not a regular file, and [`ConvertError::Recipe`].
    pub fn load(path: &Path) -> Result<Self, ConvertError> {
        let text = read_side_file(path)?;
        let whole =
            |problem: &str| ConvertError::Recipe { path: path.to_owned(), line: 1, problem: problem.to_owned() };
        if text.len() > MAX_LEN {
            return Err(whole("it has more than a mebibyte, so it is not a recipe"));
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

    /// The rules that match a tensor, by index, and their types; the first decides.
    pub(crate) fn matching(&self, name: &str) -> impl Iterator<Item = (usize, TypeChoice)> {
        let matching = self.rules.iter().enumerate().filter(move |(_, rule)| rule.pattern.matches(name));
        matching.map(|(number, rule)| (number, rule.choice))
    }

    /// Its rules as written, without comments and empty lines.
    pub(crate) fn lines(&self) -> Vec<&str> {
        self.rules.iter().map(|rule| rule.text.as_str()).collect()
    }

    /// Notes about rules without effect. `effects`: for each rule that matches any tensor, by index, its strongest effect.
    pub(crate) fn idle(&self, effects: &BTreeMap<usize, Effect>) -> Vec<String> {
        let of = |effect: Option<Effect>, why: &str| {
            let rules = self.rules.iter().enumerate().filter(|(number, _)| effects.get(number).copied() == effect);
            let lines: Vec<String> = rules.map(|(_, rule)| format!("line {}: `{}`", rule.line, rule.text)).collect();
            (!lines.is_empty()).then(|| format!("{}: {why}: {}", self.path.display(), lines.join(", ")))
        };
        let idle = [
            of(None, "these patterns match no tensor"),
            of(Some(Effect::Overridden), "lines above these decide all tensors that they match"),
            of(
                Some(Effect::Nothing),
                "these change nothing, since what they decide has that type without them too, or never changes, as norms, biases \
                 and routers do, and the embedding unless it becomes bf16 or f32",
            ),
        ];
        idle.into_iter().flatten().collect()
    }
}

/// The effect of a rule on a tensor that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Effect {
    /// An earlier rule decides.
    Overridden,
    /// It decides, but the type would be the same without it.
    Nothing,
    /// It changes the type.
    Changes,
}

impl Rule {
    fn parse(line: usize, rule: &str) -> Result<Self, String> {
        let mut words = rule.split_whitespace();
        let (Some(pattern), Some(ty), None) = (words.next(), words.next(), words.next()) else {
            return Err(format!("`{rule}` is not a pattern and a type"));
        };
        let text = format!("{pattern} {ty}");
        Ok(Rule { line, text, pattern: Pattern::of_tensors(pattern)?, choice: ty.parse()? })
    }
}

/// The names that patterns match: `layers.3.expert.down`, `head`, `embedding`.
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
        let choice = |name: &str| recipe.matching(name).next();
        let ty = |ty| TypeChoice::Type(ty);
        assert_eq!(choice("layers.2.expert.down"), Some((0, ty(WeightType::Q8))));
        assert_eq!(choice("layers.12.expert.down"), Some((1, ty(WeightType::Q4))));
        assert_eq!(choice("layers.3.expert.gate_up"), Some((2, ty(WeightType::Q3))));
        assert_eq!(choice("head"), Some((3, TypeChoice::Keep)));
        assert_eq!(choice("layers.0.attention.o"), None);
        let matching: Vec<usize> = recipe.matching("layers.1.expert.down").map(|(rule, _)| rule).collect();
        assert_eq!(matching, [0, 1, 2]);
        let effects = BTreeMap::from([(0, Effect::Changes), (1, Effect::Nothing), (2, Effect::Overridden)]);
        let idle = recipe.idle(&effects);
        assert_eq!(idle.len(), 3);
        assert!(idle[0].contains("match no tensor: line 6: `head keep`"), "{idle:?}");
        assert!(idle[1].contains("lines above") && idle[1].ends_with("line 5: `*expert* q3`"), "{idle:?}");
        assert!(idle[2].contains("change nothing") && idle[2].ends_with("line 4: `*.expert.down q4`"), "{idle:?}");
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
        assert!(recipe("layers.{7}.*.o q8").matching("layers.7.attention.o").next().is_some());
        assert!(recipe("**a**** q8").matching("bab").next().is_some());
        assert!(recipe("*a*a*a*a*a*a*a*a*a*a*b q8").matching(&"a".repeat(600)).next().is_none());
    }
}

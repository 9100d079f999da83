//! How much is measured.

use std::fmt;
use std::str::FromStr;

use sluice_format::ModelSpec;

/// How much time measuring may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Effort {
    /// The least that keeps most of the gain.
    Fast,
    /// As much as is worth its time.
    #[default]
    Default,
    /// The whole text, however long it takes.
    Best,
}

impl Effort {
    /// All of them.
    pub const ALL: [Effort; 3] = [Effort::Fast, Effort::Default, Effort::Best];

    /// `fast`, `default` or `best`.
    pub fn name(self) -> &'static str {
        match self {
            Effort::Fast => "fast",
            Effort::Default => "default",
            Effort::Best => "best",
        }
    }

    /// Most tokens of the text that run through a model. In a model with experts, each token meets a small part of the weights, so
    /// more tokens are used, so that the arithmetic for each weight is the same as without experts.
    pub(crate) fn tokens(self, spec: &ModelSpec) -> usize {
        let moe = spec.layers.iter().filter_map(|layer| layer.ffn.moe.as_ref());
        let rarity = moe.map(|moe| moe.experts / moe.top_k.max(1)).max().unwrap_or(1).max(1);
        match self {
            Effort::Fast => 1024usize.saturating_mul(rarity),
            Effort::Default => 2048usize.saturating_mul(rarity),
            Effort::Best => usize::MAX,
        }
    }

    /// Tokens of a window, which attend to each other. With short windows, the tokens come from more places in the text.
    pub(crate) fn window(self) -> usize {
        if self == Effort::Best { 512 } else { 256 }
    }

    /// Columns that can compensate for each other's errors. This bounds memory and time of the moments of wider matrices, and most
    /// of the gain remains (`docs/QUANTISATION.md`).
    pub(crate) fn panel(self) -> usize {
        if self == Effort::Fast { 512 } else { 2048 }
    }
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Effort {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Effort::ALL.into_iter().find(|effort| effort.name() == s);
        found.ok_or_else(|| format!("unknown effort `{s}`: use fast, default or best"))
    }
}

/// The tokens of a text, at most `most`, in windows that are spread evenly over it.
pub(crate) fn spread(tokens: &[u32], window: usize, most: usize) -> Vec<u32> {
    if most >= tokens.len() || window >= tokens.len() {
        return tokens.to_vec();
    }
    let count = (most / window).max(1);
    let starts = (0..count).map(|i| i * (tokens.len() - window) / (count - 1).max(1));
    starts.flat_map(|start| &tokens[start..start + window]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_over_the_text() {
        let text: Vec<u32> = (0..1000).collect();
        assert_eq!(spread(&text, 100, 1000), text);
        assert_eq!(spread(&text, 2000, 10), text, "a short text is one window");
        assert_eq!(spread(&text, 100, 50), text[..100]);
        assert_eq!(spread(&text, 100, 250), [&text[..100], &text[900..]].concat());
        let all = spread(&text, 100, 999);
        assert!(all.len() == 900 && all.windows(2).all(|w| w[0] < w[1]), "nothing comes twice");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        assert!(Effort::ALL.into_iter().all(|effort| effort.to_string().parse() == Ok(effort)));
        assert!("better".parse::<Effort>().is_err());
    }
}

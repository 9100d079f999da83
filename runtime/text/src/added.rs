//! Added tokens, which are found in a text before the model sees it.
//!
//! The `tokenizers` crate has them too, but it normalises them without limits as soon as it has read a file, and it cannot
//! skip places of a text. The rules are the crate's, including which of two descriptions of the same token counts; property
//! tests compare with the crate.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;
use tokenizers::{AddedToken, Model, NormalizedString};

use super::TextError;
use super::limits::{Limits, explain};
use super::pipeline::Normalization;

/// Most bytes in the spellings of all added tokens together. The largest published lists have a tenth of it.
const MAX_ADDED_BYTES: usize = 4 << 20;

/// One token for which the search looks.
#[derive(Debug, Clone)]
struct Added {
    id: u32,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Whether a stranger's text may contain it.
    is_space: bool,
}

/// Tokens by the pattern for which the search looks.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns {
    /// Lengths in bytes of the patterns that begin with a character, the longest first.
    lengths: HashMap<char, Vec<usize>>,
    tokens: HashMap<String, Added>,
}

/// A tokenizer's added tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct AddedTokens {
    /// Tokens that are searched for in the text as it is.
    pub(super) literal: Patterns,
    /// Tokens that are searched for in normalised text.
    pub(super) normalized: Patterns,
    ids: HashMap<String, u32>,
    by_id: HashMap<u32, AddedToken>,
    /// Special tokens and others, in the order in which they were first added. The search goes by whether a token was to be
    /// normalised *then*; all other flags are those of its last description.
    listed: [Vec<(String, bool)>; 2],
    special: HashSet<String>,
    /// Spellings of all but white space, by id.
    control_ids: HashMap<u32, String>,
    controls: Vec<String>,
}

impl AddedTokens {
    /// Adds tokens. A token that the vocabulary has keeps its id; others get the ids after the vocabulary.
    pub(super) fn add(&mut self, tokens: &[AddedToken], model: &impl Model) {
        for token in tokens.iter().filter(|t| t.special && !t.content.is_empty()) {
            if self.special.insert(token.content.clone()) {
                self.listed[0].push((token.content.clone(), token.normalized));
            }
        }
        let mut existing: HashSet<AddedToken> = self.by_id.values().cloned().collect();
        let size = u32::try_from(model.get_vocab_size()).unwrap_or(u32::MAX);
        let above = self.by_id.keys().max().map_or(0, |max| max.saturating_add(1));
        let mut next_id = size.max(above);
        for token in tokens {
            if token.content.is_empty() || existing.contains(token) {
                continue;
            }
            let id = self.id(&token.content, model).unwrap_or_else(|| {
                let id = next_id;
                next_id = next_id.saturating_add(1);
                id
            });
            self.ids.insert(token.content.clone(), id);
            self.by_id.insert(id, token.clone());
            if !self.special.contains(&token.content) {
                self.listed[1].push((token.content.clone(), token.normalized));
            }
            existing.insert(token.clone());
        }
    }

    /// Prepares the search, once all tokens have been added.
    ///
    /// # Errors
    /// When there are too many, or normalising them takes too much.
    pub(super) fn prepare(&mut self, normalization: &Normalization) -> Result<(), TextError> {
        let bytes: usize = self.ids.keys().map(String::len).sum();
        if bytes > MAX_ADDED_BYTES {
            let what = format!("added tokens of {bytes} bytes in all, more than {MAX_ADDED_BYTES}");
            return Err(TextError::UnsupportedTokenizer { what });
        }
        let limits = Limits::of(bytes);
        let mut total = 0;
        for (spelling, normalized) in self.listed.iter().flatten() {
            let (Some(&id), mut pattern) = (self.ids.get(spelling), spelling.clone()) else { continue };
            if *normalized && !normalization.is_empty() {
                let mut text = NormalizedString::from(spelling.as_str());
                let bad = |reason| TextError::BadTokenizer { reason };
                normalization.run(&mut text, &limits).map_err(|e| explain(&e, bad))?;
                pattern = text.get().to_owned();
                total += pattern.len();
                limits.check_size(total).map_err(|e| explain(&e.into(), bad))?;
            }
            let (Some(first), Some(token)) = (pattern.chars().next(), self.by_id.get(&id)) else { continue };
            let is_space = spelling.chars().all(char::is_whitespace);
            if !is_space && self.control_ids.insert(id, spelling.clone()).is_none() {
                self.controls.push(spelling.clone());
            }
            let patterns = if *normalized { &mut self.normalized } else { &mut self.literal };
            let lengths = patterns.lengths.entry(first).or_default();
            if let Err(at) = lengths.binary_search_by(|length| pattern.len().cmp(length)) {
                lengths.insert(at, pattern.len());
            }
            let (single_word, lstrip, rstrip) = (token.single_word, token.lstrip, token.rstrip);
            let added = Added { id, single_word, lstrip, rstrip, is_space };
            // If two tokens are the same once they are normalised, the search finds the first.
            patterns.tokens.entry(pattern).or_insert(added);
        }
        Ok(())
    }

    /// The id of a token, added or the model's.
    pub(super) fn id(&self, spelling: &str, model: &impl Model) -> Option<u32> {
        self.ids.get(spelling).copied().or_else(|| model.token_to_id(spelling))
    }

    /// The spelling of an added token.
    pub(super) fn spelling(&self, id: u32) -> Option<&str> {
        self.by_id.get(&id).map(|token| token.content.as_str())
    }

    /// All ids.
    pub(super) fn all_ids(&self) -> impl Iterator<Item = u32> {
        self.ids.values().copied()
    }

    /// Whether this is an added token.
    pub(super) fn has(&self, spelling: &str) -> bool {
        self.ids.contains_key(spelling)
    }

    /// Whether a token of this spelling is special, so that it is no part of the text that a reader sees.
    pub(super) fn is_special(&self, spelling: &str) -> bool {
        self.special.contains(spelling)
    }

    /// Spellings of the tokens that mean something to the model beyond text: all but those of white space.
    pub(super) fn controls(&self) -> &[String] {
        &self.controls
    }

    /// Whether this is the id of one of the [`controls`](Self::controls).
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.control_ids.contains_key(&id)
    }
}

/// A part of a text: a token with this id, or text.
pub(super) type Part = (Option<u32>, Range<usize>);

/// Finds added tokens, leftmost first and then longest, as the crate does, except for those that `is_untrusted`.
pub(super) fn search(patterns: &Patterns, text: &str, is_untrusted: impl Fn(Range<usize>) -> bool) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    // Where the search continues, and where the last token's white space ended.
    let (mut next, mut done) = (0, 0);
    for (at, first) in text.char_indices() {
        let Some(lengths) = patterns.lengths.get(&first).filter(|_| at >= next) else {
            continue;
        };
        let found = lengths.iter().find_map(|length| {
            let range = at..at + length;
            let token = patterns.tokens.get(text.get(range.clone())?)?;
            (token.is_space || !is_untrusted(range.clone())).then_some((token, range))
        });
        let Some((token, range)) = found else {
            continue;
        };
        next = range.end;
        let (mut start, mut stop) = (range.start, range.end);
        if token.single_word && !stands_alone(text, start, stop) {
            continue;
        }
        if token.lstrip {
            start = text[..start].trim_end().len().max(done);
        }
        if token.rstrip {
            stop = text.len() - text[stop..].trim_start().len();
        }
        if done < start {
            parts.push((None, done..start));
        }
        parts.push((Some(token.id), start..stop));
        done = stop;
    }
    if done != text.len() || text.is_empty() {
        parts.push((None, done..text.len()));
    }
    parts
}

/// Whether a token is no part of a longer word.
fn stands_alone(text: &str, start: usize, stop: usize) -> bool {
    // The `tokenizers` crate decides what a word is; the standard library decides otherwise for some digits.
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\w").expect("a fixed pattern"));
    let is_word = |c: Option<char>| c.is_some_and(|c| WORD.is_match(c.encode_utf8(&mut [0; 4])));
    !is_word(text[..start].chars().next_back()) && !is_word(text[stop..].chars().next())
}

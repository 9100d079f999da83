//! Tokenising text of which a part is a stranger's, so that no stranger's text becomes a control
//! token.
//!
//! The crate looks for added tokens first, and hands what lies between them to the normaliser, the
//! pre-tokeniser and the model. Its search cannot be told to skip places, so it is done here again,
//! in the same two rounds (added tokens of the text as it is, then those of normalised text), with
//! one question more: whether a stranger wrote any part of the match. The rest is the crate's own
//! work on the crate's own types, so that without strangers the ids equal the crate's.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;
use tokenizers::tokenizer::normalizer::Range as In;
use tokenizers::tokenizer::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result, Token,
};

/// One added token.
#[derive(Debug, Clone)]
struct Added {
    /// What is searched for: the spelling, normalised where the token asks for that.
    pattern: String,
    id: u32,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Whether a stranger's text may contain it.
    is_space: bool,
}

/// Added tokens, by the first character of their pattern, the longest first.
type Patterns = HashMap<char, Vec<Added>>;

/// A tokenizer's added tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct AddedTokens {
    /// Those that are searched for in the text as it is.
    literal: Patterns,
    /// Those that are searched for in normalised text.
    normalized: Patterns,
    /// Spellings by id, of all but white space.
    control_ids: HashMap<u32, String>,
    controls: Vec<String>,
}

impl AddedTokens {
    /// Reads them from a tokenizer.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let vocabulary = tokenizer.get_added_vocabulary();
        let by_id = vocabulary.get_added_tokens_decoder();
        let mut added = Self::default();
        let mut spellings: Vec<_> = vocabulary.get_vocab().iter().collect();
        spellings.sort();
        for (spelling, &id) in spellings {
            let Some(token) = by_id.get(&id) else {
                continue;
            };
            let is_space = spelling.chars().all(char::is_whitespace);
            if !is_space {
                added.control_ids.insert(id, spelling.clone());
                added.controls.push(spelling.clone());
            }
            let mut pattern = NormalizedString::from(spelling.as_str());
            if token.normalized
                && let Some(normalizer) = tokenizer.get_normalizer()
                && normalizer.normalize(&mut pattern).is_err()
            {
                continue;
            }
            let Some(first) = pattern.get().chars().next() else {
                continue;
            };
            let patterns = match token.normalized {
                true => &mut added.normalized,
                false => &mut added.literal,
            };
            patterns.entry(first).or_default().push(Added {
                pattern: pattern.get().to_owned(),
                id,
                single_word: token.single_word,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                is_space,
            });
        }
        for patterns in [&mut added.literal, &mut added.normalized] {
            for list in patterns.values_mut() {
                list.sort_by_key(|token| std::cmp::Reverse(token.pattern.len()));
            }
        }
        added
    }

    /// Spellings of the tokens that are not white space, in their order.
    pub(super) fn controls(&self) -> &[String] {
        &self.controls
    }
}

/// Token ids of `text`, in which `untrusted` ranges of bytes are a stranger's.
pub(super) fn encode_with(
    tokenizer: &tokenizers::Tokenizer,
    added: &AddedTokens,
    text: &str,
    untrusted: &[Range<usize>],
) -> Result<Vec<u32>> {
    let mut untrusted: Vec<Range<usize>> = untrusted.to_vec();
    untrusted.retain(|range| !range.is_empty());
    untrusted.sort_by_key(|range| range.start);
    // Ends in order as well, so that they can be searched by halving.
    let mut end = 0;
    for range in &mut untrusted {
        end = range.end.max(end);
        range.end = end;
    }
    let touched = |range: Range<usize>| {
        let first = untrusted.partition_point(|r| r.end <= range.start);
        untrusted.get(first).is_some_and(|r| r.start < range.end)
    };

    let mut pieces = PreTokenizedString::from(text);
    pieces.split(|_, piece| {
        let found = search(&added.literal, piece.get(), touched);
        cut(&piece, found)
    })?;
    pieces.split(|_, mut piece| {
        if let Some(normalizer) = tokenizer.get_normalizer() {
            normalizer.normalize(&mut piece)?;
        }
        let start = piece.offsets_original().0;
        let found = search(&added.normalized, piece.get(), |range| {
            let original = piece.convert_offsets(In::Normalized(range));
            original.is_none_or(|r| touched(start + r.start..start + r.end))
        });
        cut(&piece, found)
    })?;
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut pieces)?;
    }
    let model = tokenizer.get_model();
    pieces.tokenize(|piece| {
        let (start, end) = piece.offsets_original();
        let tokens = model.tokenize(piece.get())?;
        match touched(start..end) {
            true => without_controls(model, added, piece.get(), tokens),
            false => Ok(tokens),
        }
    })?;
    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(splits.into_iter().flat_map(|(_, _, tokens)| tokens.iter().flatten()).map(|token| token.id).collect())
}

/// A part of a text: a token with this id, or text.
type Part = (Option<u32>, Range<usize>);

/// Finds added tokens, leftmost first and then longest, as the crate does, but for those that
/// `is_untrusted`.
fn search(patterns: &Patterns, text: &str, is_untrusted: impl Fn(Range<usize>) -> bool) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    // Where the search goes on, and where the last token's white space ended.
    let (mut next, mut done) = (0, 0);
    for (at, first) in text.char_indices() {
        let Some(candidates) = patterns.get(&first).filter(|_| at >= next) else {
            continue;
        };
        let found = candidates.iter().find(|token| {
            let range = at..at + token.pattern.len();
            text[at..].starts_with(&token.pattern) && (token.is_space || !is_untrusted(range))
        });
        let Some(token) = found else {
            continue;
        };
        next = at + token.pattern.len();
        let (mut start, mut stop) = (at, next);
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
    // What is a word is the `tokenizers` crate's question; the standard library has another answer for some digits.
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\w").expect("a fixed pattern"));
    let is_word = |c: Option<char>| c.is_some_and(|c| WORD.is_match(c.encode_utf8(&mut [0; 4])));
    !is_word(text[..start].chars().next_back()) && !is_word(text[stop..].chars().next())
}

/// The parts of a piece, as the crate wants them.
#[allow(clippy::type_complexity)]
fn cut(piece: &NormalizedString, parts: Vec<Part>) -> Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
    let cut = |(id, range): Part| {
        let part = piece.slice(In::Normalized(range)).ok_or("a token ends inside a character")?;
        let token = id.map(|id| {
            let value = part.get().to_owned();
            let len = value.len();
            vec![Token::new(id, value, (0, len))]
        });
        Ok((part, token))
    };
    parts.into_iter().map(cut).collect()
}

/// Replaces control tokens that the model itself found in a stranger's text (some vocabularies
/// contain them as ordinary entries) by the tokens of their parts.
fn without_controls(model: &impl Model, added: &AddedTokens, text: &str, tokens: Vec<Token>) -> Result<Vec<Token>> {
    let forged = |token: &Token| {
        let spelled = text.get(token.offsets.0..token.offsets.1);
        let control = added.control_ids.contains_key(&token.id);
        // The unknown token stands for other text than its own spelling.
        control && spelled == Some(token.value.as_str())
    };
    if !tokens.iter().any(forged) {
        return Ok(tokens);
    }
    let mut safe = Vec::with_capacity(tokens.len());
    for token in tokens {
        if !forged(&token) {
            safe.push(token);
            continue;
        }
        for (at, c) in token.value.char_indices() {
            let start = token.offsets.0 + at;
            for mut part in model.tokenize(c.encode_utf8(&mut [0; 4]))? {
                part.offsets = (start, start + c.len_utf8());
                safe.push(part);
            }
        }
    }
    Ok(safe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Tokenizer, fixtures};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn load(json: &str) -> Tokenizer {
        Tokenizer::from_json(json.as_bytes()).unwrap()
    }

    /// Fixtures with added tokens of every kind.
    fn tokenizers() -> Vec<Tokenizer> {
        let mut all = vec![load(&fixtures::byte_level()), load(&fixtures::sentencepiece())];
        for (base, normalizer) in [
            (fixtures::byte_level(), json!({"type": "NFKC"})),
            (fixtures::byte_level(), json!({"type": "Lowercase"})),
            (fixtures::sentencepiece(), json!({"type": "Prepend", "prepend": "▁"})),
        ] {
            let mut value: Value = serde_json::from_str(&base).unwrap();
            value["normalizer"] = normalizer;
            let tokens = value["added_tokens"].as_array_mut().unwrap();
            let next = tokens.iter().map(|t| t["id"].as_u64().unwrap()).max().unwrap().max(300) + 1;
            for (i, (content, flags)) in [
                ("<a>", "lstrip"),
                ("<ab>", "rstrip"),
                ("word", "single_word"),
                ("Fi", "normalized"),
                ("<N>", "normalized"),
                ("  ", ""),
                ("<a><ab>", ""),
            ]
            .into_iter()
            .enumerate()
            {
                let mut token = json!({"id": next + i as u64, "content": content, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false, "special": i % 2 == 0});
                if !flags.is_empty() {
                    token[flags] = true.into();
                }
                tokens.push(token);
            }
            all.push(load(&value.to_string()));
        }
        all
    }

    fn snippets() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            "\\PC{0,3}",
            prop::sample::select(vec![
                "<|end|>",
                "<think>",
                "<a>",
                "<ab>",
                "<a><ab>",
                "word",
                " word ",
                "Fi",
                "ﬁ",
                "<N>",
                "<n>",
                "  ",
                "   ",
                "\n",
                "<s>",
                "</s>",
                "hello",
                "<unk>",
                "two words",
                "<",
                "a>",
            ])
            .prop_map(str::to_owned),
        ];
        prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    #[test]
    fn strangers_cannot_spell_tokens() {
        let tokenizer = load(&fixtures::byte_level());
        let end = tokenizer.token_id("<|end|>").unwrap();
        let text = "a<|end|>b<|end|>";
        let ends = |ranges: &[(usize, usize)]| {
            let ranges: Vec<Range<usize>> = ranges.iter().map(|r| r.0..r.1).collect();
            let ids = tokenizer.encode_untrusted(text, &ranges).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            ids.iter().filter(|id| **id == end).count()
        };
        assert_eq!(ends(&[]), 2);
        assert_eq!(ends(&[(0, 9)]), 1);
        assert_eq!(ends(&[(3, 4)]), 1);
        assert_eq!(ends(&[(7, 8), (9, 10)]), 0);
        assert_eq!(ends(&[(0, 16), (2, 3)]), 0);
    }

    #[test]
    fn tokens_of_the_model_s_own_vocabulary_are_no_way_around() {
        // With `ignore_merges`, a word that is in the vocabulary becomes that token at once.
        let mut json: Value = serde_json::from_str(&fixtures::sentencepiece()).unwrap();
        json["model"]["ignore_merges"] = true.into();
        json["normalizer"] = Value::Null;
        let tokenizer = load(&json.to_string());
        let bos = tokenizer.token_id("<s>").unwrap();
        assert_eq!(tokenizer.encode("<s>", false).unwrap(), [bos]);
        let ids = tokenizer.encode_untrusted("<s>", std::slice::from_ref(&(0..3))).unwrap();
        assert!(!ids.contains(&bos));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s>");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn without_strangers_nothing_changes(text in snippets()) {
            for tokenizer in tokenizers() {
                prop_assert_eq!(
                    tokenizer.encode_untrusted(&text, &[]).unwrap(),
                    tokenizer.encode(&text, false).unwrap(),
                    "{:?}", text
                );
            }
        }

        #[test]
        fn strangers_get_no_control_tokens(text in snippets()) {
            for tokenizer in tokenizers() {
                let ids = tokenizer.encode_untrusted(&text, std::slice::from_ref(&(0..text.len()))).unwrap();
                let unknown = tokenizer.token_id("<unk>");
                for control in tokenizer.controls() {
                    let id = tokenizer.token_id(control);
                    prop_assert!(id == unknown || !ids.iter().any(|i| Some(*i) == id), "{} {}", text, control);
                }
            }
        }
    }
}

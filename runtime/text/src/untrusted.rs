//! Turns text into tokens so that no part of it that a stranger wrote becomes a control token.
//!
//! First it looks for added tokens in the text as it is. Then it normalises the rest and looks for the other added tokens in the
//! result. It splits what lies between them into words, and the model turns those into tokens. The `tokenizers` crate does the
//! same, but its search cannot skip places, and its steps cannot be stopped. So this module repeats the procedure with one more
//! check (whether a stranger wrote any part of an added token) and with limits. The steps are the crate's own, on the crate's own
//! types, so without strangers the ids equal the crate's.

use std::ops::Range;

use tokenizers::tokenizer::normalizer::Range as In;
use tokenizers::tokenizer::{
    Model, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, Result, Token,
};

use super::added::{AddedTokens, Part, search};
use super::limits::Limits;
use super::tokenizer::Inner;

/// Token ids of `text`, in which `untrusted` ranges of bytes are a stranger's.
pub(super) fn encode_with(
    tokenizer: &Inner,
    text: &str,
    untrusted: &[Range<usize>],
    limits: &Limits,
) -> Result<Vec<u32>> {
    let Inner { added, model, .. } = tokenizer;
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
    let mut total = 0;
    pieces.split(|_, mut piece| {
        tokenizer.normalization.run(&mut piece, limits)?;
        total += piece.get().len();
        limits.check_size(total)?;
        let start = piece.offsets_original().0;
        let found = search(&added.normalized, piece.get(), |range| {
            let original = piece.convert_offsets(In::Normalized(range));
            original.is_none_or(|r| touched(start + r.start..start + r.end))
        });
        cut(&piece, found)
    })?;
    tokenizer.splitting.run(&mut pieces, limits)?;
    pieces.tokenize(|piece| {
        limits.check_time()?;
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

/// The parts of a piece, in the form that the crate expects.
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

/// Replaces control tokens that the model itself found in a stranger's text (some vocabularies contain them as
/// ordinary entries) with the tokens of their parts.
fn without_controls(model: &impl Model, added: &AddedTokens, text: &str, tokens: Vec<Token>) -> Result<Vec<Token>> {
    let forged = |token: &Token| {
        let spelled = text.get(token.offsets.0..token.offsets.1);
        let control = added.is_control(token.id);
        // The unknown token stands for text other than its own spelling.
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
    use crate::{Tokenizer, fixtures};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn load(json: &str) -> Tokenizer {
        Tokenizer::from_json(json.as_bytes()).unwrap()
    }

    /// Fixtures with added tokens of every kind, as they are read here and by the crate.
    fn tokenizers() -> Vec<(Tokenizer, tokenizers::Tokenizer)> {
        let both = |json: &str| (load(json), json.parse().unwrap());
        let mut all = vec![both(&fixtures::byte_level()), both(&fixtures::sentencepiece())];
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
            all.push(both(&value.to_string()));
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
        fn without_strangers_ids_and_text_are_the_crate_s(text in snippets()) {
            for (ours, theirs) in tokenizers() {
                for around in [false, true] {
                    let want = theirs.encode_fast(text.as_str(), around).unwrap();
                    prop_assert_eq!(ours.encode(&text, around).unwrap(), want.get_ids(), "{:?}", text);
                    for skip in [false, true] {
                        let shown = theirs.decode(want.get_ids(), skip).unwrap();
                        prop_assert_eq!(ours.decode(want.get_ids(), skip).unwrap(), shown, "{:?}", text);
                    }
                }
            }
        }

        #[test]
        fn strangers_get_no_control_tokens(text in snippets()) {
            for (tokenizer, _) in tokenizers() {
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

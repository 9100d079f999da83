//! Vocabularies in tiktoken's form (Kimi's `tiktoken.model`), converted to a tokenizer.json.
//!
//! The file has a line per token: its bytes in base 64, and its rank, which is its id. tiktoken splits text by a
//! pattern, takes a piece that is a token whole, and otherwise joins neighbours whose union has the lowest rank. The
//! `tokenizers` crate does the same with a byte-level BPE whose merges are all ways to put a token together from two
//! others, in the order of the result's rank, and with `ignore_merges`. (The two could differ only where overlapping
//! pairs make the same token, as in `aa|a|aa`: there tiktoken takes the left pair, and the crate the pair that comes
//! first in the list.)

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::TextError;
use super::limits::clip;

/// Kimi's pattern. Hugging Face's generic converter uses another one, without the rules for Han,
/// and splits Chinese text wrongly.
const PATTERN: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How many special tokens follow the ranks.
const SPECIALS: usize = 256;

/// Largest file accepted; Kimi's has 3 MB.
const MAX_BYTES: usize = 32 << 20;

/// Longest token accepted; Kimi's longest has 128 bytes.
const MAX_TOKEN_BYTES: usize = 256;

/// The tokenizer.json that corresponds to a `tiktoken.model` and its tokenizer_config.json.
pub(super) fn to_tokenizer_json(model: &[u8], config: Option<&[u8]>) -> Result<String, TextError> {
    let tokens = ranks(model)?;
    let spell = |token: &[u8]| token.iter().map(|&b| alphabet_char(b)).collect::<String>();
    let vocab: Map<String, Value> = (0..).zip(&tokens).map(|(rank, t)| (spell(t), Value::from(rank))).collect();
    let merges: Vec<Value> = merges(&tokens).map(|(left, right)| json!([spell(left), spell(right)])).collect();
    let specials = specials(tokens.len(), config)?;
    for special in &specials {
        let content = special["content"].as_str().unwrap_or("");
        if vocab.contains_key(content) {
            return Err(bad(format!("the special token {content:?} is in the vocabulary as well")));
        }
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
        "invert": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": merges},
    });
    Ok(tokenizer.to_string())
}

fn bad(reason: impl Into<String>) -> TextError {
    TextError::BadTiktoken { reason: reason.into() }
}

/// The tokens in the order of their ranks.
fn ranks(model: &[u8]) -> Result<Vec<Vec<u8>>, TextError> {
    if model.len() > MAX_BYTES {
        return Err(bad(format!("it has {} bytes, more than the {MAX_BYTES} accepted", model.len())));
    }
    let text = std::str::from_utf8(model).map_err(|e| bad(e.to_string()))?;
    let mut by_rank: Vec<Option<Vec<u8>>> = Vec::new();
    let mut seen = HashSet::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    by_rank.resize(lines.len(), None);
    for (number, line) in (1..).zip(lines.iter().copied()) {
        let entry =
            line.split_once(' ').and_then(|(token, rank)| Some((base64(token)?, rank.trim().parse::<usize>().ok()?)));
        let Some((token, rank)) = entry.filter(|(t, _)| (1..=MAX_TOKEN_BYTES).contains(&t.len())) else {
            return Err(bad(format!("line {number} is not a token in base 64 and its rank")));
        };
        if !seen.insert(token.clone()) {
            return Err(bad(format!("the token of line {number} occurs twice")));
        }
        match by_rank.get_mut(rank) {
            Some(free @ None) => *free = Some(token),
            _ => {
                let last = lines.len() - 1;
                return Err(bad(format!("rank {rank} of line {number} occurs twice, or is above {last}")));
            }
        }
    }
    if let Some(byte) = (0..=255u8).find(|b| !seen.contains(&[*b][..])) {
        return Err(bad(format!("there is no token for the single byte {byte}")));
    }
    // There are as many distinct ranks as lines, and all are below that number, so none is missing.
    Ok(by_rank.into_iter().flatten().collect())
}

/// All ways to make a token from two others, ordered by the rank of the result, then of the left and the right part.
fn merges(tokens: &[Vec<u8>]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let ranks: HashMap<&[u8], usize> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
    tokens.iter().flat_map(move |token| {
        let mut pairs: Vec<_> = (1..token.len())
            .filter_map(|at| {
                let (left, right) = token.split_at(at);
                Some((*ranks.get(left)?, *ranks.get(right)?, left, right))
            })
            .collect();
        pairs.sort_unstable();
        pairs.into_iter().map(|(_, _, left, right)| (left, right))
    })
}

/// The special tokens after the ranks, in their order.
fn specials(first: usize, config: Option<&[u8]>) -> Result<Vec<Value>, TextError> {
    let file = "tokenizer_config.json";
    let config: Map<String, Value> = match config {
        Some(bytes) => sluice_format::json::from_slice(bytes)
            .map_err(|e| TextError::BadConfig { file, reason: clip(&e.to_string()) })?,
        None => Map::new(),
    };
    let named = config.get("added_tokens_decoder").and_then(Value::as_object);
    let mut contents = HashSet::new();
    (first..first + SPECIALS)
        .map(|id| {
            let token = named.and_then(|named| named.get(&id.to_string()));
            let content = token.and_then(|t| t["content"].as_str()).filter(|c| !c.is_empty());
            let content = content.map_or_else(|| format!("<|reserved_token_{id}|>"), str::to_owned);
            if !contents.insert(content.clone()) {
                return Err(bad(format!("tokenizer_config.json names two tokens {content:?}")));
            }
            let flag = |name: &str, otherwise: bool| token.and_then(|t| t[name].as_bool()).unwrap_or(otherwise);
            Ok(json!({"id": id, "content": content, "single_word": flag("single_word", false),
                "lstrip": flag("lstrip", false), "rstrip": flag("rstrip", false),
                "normalized": flag("normalized", false), "special": flag("special", true)}))
        })
        .collect()
}

/// The character of the byte-level (GPT-2) alphabet that stands for a byte.
fn alphabet_char(byte: u8) -> char {
    match byte {
        0..=32 => char::from_u32(256 + u32::from(byte)),
        127..=160 => char::from_u32(289 + u32::from(byte) - 127),
        173 => char::from_u32(323),
        _ => None,
    }
    .unwrap_or(char::from(byte))
}

/// The bytes of a text in base 64, with or without its padding.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0u32, 0u32);
    for c in text.bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    (held < 6 && bits == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;
    use proptest::prelude::*;

    fn encode64(bytes: &[u8]) -> String {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let mut word = [0u8; 3];
            word[..three.len()].copy_from_slice(three);
            let word = u32::from_be_bytes([0, word[0], word[1], word[2]]);
            for i in 0..4 {
                match i <= three.len() {
                    true => text.push(char::from(alphabet[(word >> (18 - 6 * i) & 63) as usize])),
                    false => text.push('='),
                }
            }
        }
        text
    }

    /// All bytes in a scrambled order, and some longer tokens. Each longer token is made of two
    /// before it in one way only, as training makes them.
    fn tokens() -> Vec<Vec<u8>> {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b.wrapping_mul(91).wrapping_add(7)]).collect();
        for token in [
            "th", "in", " t", "the", "ing", " th", "er", " the", "an", "'s", "你", "你好", "12", "123", "\n\n", "  ",
            "thing", "世", "界", "世界", "!!", "hello", "He", "llo", "ll", "\u{e9}",
        ] {
            tokens.push(token.as_bytes().to_vec());
        }
        tokens.push(vec![0xe4, 0xbd]);
        tokens.push(vec![0xe4, 0xb8]);
        tokens
    }

    fn file(tokens: &[Vec<u8>]) -> String {
        let lines = tokens.iter().enumerate();
        lines.map(|(rank, token)| format!("{} {rank}\n", encode64(token))).collect()
    }

    /// tiktoken's algorithm, from its description: start with bytes, and join the leftmost pair
    /// whose union has the lowest rank until there is none.
    fn naive(tokens: &[Vec<u8>], piece: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| tokens.iter().position(|t| t == bytes);
        if let Some(rank) = rank(piece) {
            return vec![rank as u32];
        }
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|b| vec![*b]).collect();
        loop {
            let best =
                (1..parts.len()).filter_map(|i| Some((rank(&[&parts[i - 1][..], &parts[i][..]].concat())?, i))).min();
            let Some((_, at)) = best else { break };
            let right = parts.remove(at);
            parts[at - 1].extend(right);
        }
        parts.iter().map(|part| rank(part).unwrap() as u32).collect()
    }

    fn tokenizer(config: Option<&str>) -> Tokenizer {
        Tokenizer::from_tiktoken(file(&tokens()).as_bytes(), config.map(str::as_bytes)).unwrap()
    }

    /// The pieces into which the pattern splits a text, taken from the crate's pre-tokenizer, because a tokenizer of
    /// single bytes without merges does not show them.
    fn pieces(text: &str) -> Vec<String> {
        use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let json = to_tokenizer_json(file(&tokens()).as_bytes(), None).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let mut split = PreTokenizedString::from(text);
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_owned())
            .collect()
    }

    #[test]
    fn the_pattern_splits_as_kimi_s() {
        let split = |text: &str, want: &[&str]| assert_eq!(pieces(text), want, "{text:?}");
        split("Hello, world! 你好，世界！", &["Hello", ",", " world", "!", " ", "你好", "，", "世界", "！"]);
        split("abc你好def", &["abc", "你好", "def"]);
        split("他说hi了", &["他说", "hi", "了"]);
        split("you're THEY'LL it's I'd", &["you're", " THEY'LL", " it's", " I'd"]);
        split("12345678 v2.50", &["123", "456", "78", " v", "2", ".", "50"]);
        split("CamelCase HTMLParser x", &["Camel", "Case", " HTMLParser", " x"]);
        split("a\n\n  b\t\tc  ", &["a", "\n\n", " ", " b", "\t", "\tc", "  "]);
        split("x!!\n\ny", &["x", "!!\n\n", "y"]);
        split("ひらがな漢字カタカナ", &["ひらがな", "漢字", "カタカナ"]);
        split("(foo)  bar", &["(foo", ")", " ", " bar"]);
        split("naïve cafe\u{301} Ünï", &["naïve", " cafe\u{301}", " Ünï"]);
        split("👩‍💻 ok", &["👩‍💻", " ok"]);
    }

    #[test]
    fn special_tokens_have_their_names_and_places() {
        let first = tokens().len();
        let config = json!({"added_tokens_decoder": {
            (first.to_string()): {"content": "[BOS]", "special": true},
            ((first + 6).to_string()): {"content": "<think>", "special": false},
            "5": {"content": "not one", "special": true},
        }});
        let tokenizer = tokenizer(Some(&config.to_string()));
        assert_eq!(tokenizer.vocab_size(), first + 256);
        assert_eq!(tokenizer.token_id("[BOS]"), Some(first as u32));
        let reserved = format!("<|reserved_token_{}|>", first + 255);
        assert_eq!(tokenizer.token_id(&reserved), Some(first as u32 + 255));
        let text = format!("[BOS]the<think>{reserved}");
        let ids = tokenizer.encode(&text, false).unwrap();
        let the = naive(&tokens(), b"the")[0];
        assert_eq!(ids, [first as u32, the, first as u32 + 6, first as u32 + 255]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the<think>");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }

    #[test]
    fn damaged_files_are_refused() {
        let good = file(&tokens());
        let refused = |model: String| {
            let error = Tokenizer::from_tiktoken(model.as_bytes(), None).unwrap_err();
            assert!(matches!(error, TextError::BadTiktoken { .. }), "{error}");
        };
        refused(String::new());
        refused("YQ== 0\n".into());
        refused(good.replace(" 17\n", " 18\n"));
        refused(good.replace(" 17\n", " 1000000\n"));
        refused(good.replacen("==", "=!", 1));
        refused(good.clone() + "YQ== 999\n");
        refused(good.clone() + "nonsense\n");
        let twice = json!({"added_tokens_decoder": {
            (tokens().len().to_string()): {"content": "<a>"},
            ((tokens().len() + 1).to_string()): {"content": "<a>"}}});
        assert!(Tokenizer::from_tiktoken(good.as_bytes(), Some(twice.to_string().as_bytes())).is_err());
        let known = json!({"added_tokens_decoder": {(tokens().len().to_string()): {"content": "the"}}});
        assert!(Tokenizer::from_tiktoken(good.as_bytes(), Some(known.to_string().as_bytes())).is_err());
        assert!(Tokenizer::from_tiktoken(good.as_bytes(), Some(b"[]")).is_err());
    }

    #[test]
    fn base64_is_read_as_it_is_written() {
        for bytes in [&b""[..], b"a", b"ab", b"abc", b"abcd", &[0, 255, 254, 1]] {
            assert_eq!(base64(&encode64(bytes)).unwrap(), bytes);
        }
        for text in ["a", "ab!", "YR==", "é"] {
            assert_eq!(base64(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn ids_are_tiktoken_s(text in prop_oneof![
            "\\PC{0,30}",
            "[the ing1-9é你好世界!\n']{0,40}",
        ]) {
            let tokenizer = tokenizer(None);
            let want: Vec<u32> = pieces(&text).iter().flat_map(|p| naive(&tokens(), p.as_bytes())).collect();
            prop_assert_eq!(tokenizer.encode(&text, false).unwrap(), want);
        }
    }
}

//! SentencePiece's byte-pair encoding (`llama`), whose merges are derived from the scores of its tokens.

use serde_json::{Value, json};

use super::super::metadata::{Metadata, Problem};
use super::json::{Model, Tokenizer};
use super::vocabulary::{Kind, TOKENS, Vocabulary};

const SCORES: &str = "tokenizer.ggml.scores";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// Most work for finding merges, and most bytes in them: the sum of the squares of the tokens' lengths in bytes. The largest
/// published vocabulary, with 262 144 tokens, takes a tenth of that.
const MOST_WORK: u64 = 1 << 28;

/// tokenizer.json in the form of transformers' `LlamaConverter`: a space becomes `▁`, one is put before the text, pairs are merged
/// by the score of the result, and characters without a token become byte tokens.
pub(super) fn tokenizer_json(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Vec<u8>, Problem> {
    let prefix = metadata.bool(SPACE_PREFIX)?.unwrap_or(true);
    let merges = merges(metadata, vocabulary)?;
    let least = vocabulary.iter().rfind(|(_, token)| makes_text(token.kind)).map_or(0, |(id, _)| id + 1);
    let model = Model {
        unk_token: unknown(vocabulary),
        fuse_unk: true,
        byte_fallback: has_bytes(vocabulary),
        ..Model::new(vocabulary, vocabulary.model_tokens(least), merges)
    };
    let tokenizer =
        Tokenizer { normalizer: normalizer(prefix), decoder: decoder(prefix), ..Tokenizer::new(vocabulary, model) };
    Ok(tokenizer.to_bytes())
}

/// Whether tokens of this kind are results of merging.
fn makes_text(kind: Kind) -> bool {
    matches!(kind, Kind::Normal | Kind::UserDefined | Kind::Unused)
}

/// The token for characters that have none.
pub(super) fn unknown(vocabulary: &Vocabulary) -> Option<&str> {
    vocabulary.unknown.map(|id| vocabulary.token(id).text.as_str())
}

/// Whether there is a token for every byte.
pub(super) fn has_bytes(vocabulary: &Vocabulary) -> bool {
    (0..=255u8).all(|byte| vocabulary.id(&format!("<0x{byte:02X}>")).is_some())
}

/// Spaces are `▁`, and `prefix` puts one before the text.
pub(super) fn normalizer(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, replace]}),
        false => replace,
    }
}

/// The opposite of the normalizer.
pub(super) fn decoder(prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// A merge, ordered by priority.
struct Merge<'v> {
    /// Score of the result; the highest comes first.
    score: f64,
    /// The result.
    id: u32,
    left: (u32, &'v str),
    right: (u32, &'v str),
}

/// All ways to combine a token from two others, by the score of the result. If scores are equal, as in files whose converter did
/// not know them, the lower id comes first, because SentencePiece numbers tokens by score.
fn merges<'v>(metadata: &Metadata, vocabulary: &'v Vocabulary) -> Result<Vec<(&'v str, &'v str)>, Problem> {
    let count = vocabulary.tokens.len();
    let scores = metadata.floats(SCORES)?.unwrap_or_default();
    if !scores.is_empty() && scores.len() < count {
        return Err(Problem::new(SCORES, format!("has {} entries for {count} tokens", scores.len())));
    }
    let made = || vocabulary.iter().filter(|(_, token)| makes_text(token.kind));
    let work: u64 = made().map(|(_, token)| (token.text.len() as u64).pow(2)).sum();
    if work > MOST_WORK {
        return Err(Problem::new(TOKENS, "has more and longer tokens than merges can be found for"));
    }
    let mut merges = Vec::new();
    for (id, token) in made() {
        let score = match token.kind {
            // SentencePiece searches for these before it merges anything, and the converter writes arbitrary scores for them.
            Kind::UserDefined => f64::INFINITY,
            _ => scores.get(id as usize).copied().filter(|score| !score.is_nan()).unwrap_or(0.0),
        };
        let cuts = token.text.char_indices().skip(1);
        let halves = cuts.map(|(at, _)| token.text.split_at(at));
        merges.extend(halves.filter_map(|(left, right)| {
            let part = |text: &'v str| {
                let id = vocabulary.id(text)?;
                makes_text(vocabulary.token(id).kind).then_some((id, text))
            };
            Some(Merge { score, id, left: part(left)?, right: part(right)? })
        }));
    }
    merges.sort_by(|a, b| {
        let ids = |m: &Merge<'_>| (m.id, m.left.0, m.right.0);
        b.score.total_cmp(&a.score).then_with(|| ids(a).cmp(&ids(b)))
    });
    Ok(merges.into_iter().map(|merge| (merge.left.1, merge.right.1)).collect())
}

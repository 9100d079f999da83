//! Byte-pair encoding with merges in the file: GPT-2's with characters for bytes (`gpt2`), and Gemma 4's on plain text.

use super::super::metadata::{Metadata, Problem};
use super::json::{Model, Tokenizer};
use super::pre::{self, Pre};
use super::vocabulary::{Vocabulary, shortened};
use super::{sentencepiece, tiktoken};

const MERGES: &str = "tokenizer.ggml.merges";

/// The tokenizer's file and its name.
pub(super) fn file(
    metadata: &Metadata,
    model: &str,
    vocabulary: &Vocabulary,
) -> Result<(&'static str, Vec<u8>), Problem> {
    if model == "gpt2" && metadata.text(pre::PRE)? == Some(tiktoken::NAME) {
        return Ok(("tiktoken.model", tiktoken::model(vocabulary)?));
    }
    let (merges, least) = merges(metadata, vocabulary)?;
    let model_of = |merges| Model::new(vocabulary, vocabulary.model_tokens(least), merges);
    let tokenizer = if model == "gemma4" {
        let model = Model {
            unk_token: sentencepiece::unknown(vocabulary),
            fuse_unk: true,
            byte_fallback: sentencepiece::has_bytes(vocabulary),
            ..model_of(merges)
        };
        Tokenizer {
            normalizer: sentencepiece::normalizer(false),
            decoder: sentencepiece::decoder(false),
            ..Tokenizer::new(vocabulary, model)
        }
    } else {
        let pre = Pre::read(metadata)?;
        let model = Model { ignore_merges: pre.ignore_merges, ..model_of(merges) };
        Tokenizer {
            normalizer: pre.normalizer(),
            pre_tokenizer: pre.pre_tokenizer(),
            decoder: pre::byte_level(true),
            ..Tokenizer::new(vocabulary, model)
        }
    };
    Ok(("tokenizer.json", tokenizer.to_bytes()))
}

/// Pairs of tokens, and one more than the highest id that they need.
type Pairs<'m> = (Vec<(&'m str, &'m str)>, u32);

/// The merges of the file: two tokens, separated by a space, that make a third.
fn merges<'m>(metadata: &'m Metadata, vocabulary: &Vocabulary) -> Result<Pairs<'m>, Problem> {
    let Some(lines) = metadata.strings(MERGES)? else {
        return Err(Problem::new(MERGES, "is missing: without it the file does not say how words become tokens"));
    };
    let (mut pairs, mut least) = (Vec::with_capacity(lines.len()), 0);
    for (number, line) in lines.iter().enumerate() {
        let bad = |problem: &str| {
            let line = String::from_utf8_lossy(line);
            Problem::new(MERGES, format!("has an entry {number}, {}, {problem}", shortened(&line)))
        };
        // The first token may itself begin with a space.
        let line = std::str::from_utf8(line).map_err(|_| bad("that is not UTF-8"))?;
        let space = line.char_indices().skip(1).find(|(_, c)| *c == ' ');
        let (left, right) = space.map(|(at, _)| (&line[..at], &line[at + 1..])).unwrap_or((line, ""));
        if right.is_empty() {
            return Err(bad("that is not two tokens with a space between"));
        }
        for token in [left, right, &[left, right].concat()] {
            let id = vocabulary.id(token).ok_or_else(|| bad(&format!("and {} is not a token", shortened(token))))?;
            least = least.max(id + 1);
        }
        pairs.push((left, right));
    }
    Ok((pairs, least))
}

//! Kimi's tokenizer, whose checkpoints have `tiktoken.model`: the tokens by their ranks.
//!
//! llama.cpp's converter invents one merge for each of its tokens. tiktoken has no merges, and neither has the runtime for this
//! file: it joins the pair whose result has the lowest rank. So the file is made from the tokens.

use std::fmt::Write;

use super::super::metadata::Problem;
use super::vocabulary::{Kind, TOKENS, Vocabulary, shortened};

/// The name of its pre-tokenizer, which identifies it.
pub(super) const NAME: &str = "kimi-k2";

/// How many special tokens follow those with ranks.
const SPECIALS: usize = 256;

/// `tiktoken.model`: a line for each token that is text, with its bytes in base 64 and its rank, which is its id.
pub(super) fn model(vocabulary: &Vocabulary) -> Result<Vec<u8>, Problem> {
    let count = vocabulary.tokens.len();
    let ranks = vocabulary.tokens.iter().take_while(|token| token.kind == Kind::Normal).count();
    if ranks + SPECIALS != count {
        let problem = format!(
            "has {ranks} tokens of text and {} others, expected {SPECIALS} others for the pre-tokenizer `{NAME}`",
            count - ranks
        );
        return Err(Problem::new(TOKENS, problem));
    }
    let mut lines = String::new();
    for (id, token) in vocabulary.iter().take(ranks) {
        let bytes: Option<Vec<u8>> = token.text.chars().map(byte).collect();
        let bytes = bytes.ok_or_else(|| {
            Problem::new(TOKENS, format!("has {} as token {id}, which represents no bytes", shortened(&token.text)))
        })?;
        writeln!(lines, "{} {id}", base64(&bytes)).expect("a text can be written to");
    }
    Ok(lines.into_bytes())
}

/// The byte that a character of GPT-2's alphabet represents: printable Latin characters represent themselves, those from U+0100 on
/// the others.
fn byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=three.len()].copy_from_slice(three);
        let word = u32::from_be_bytes(word);
        for i in 0..4 {
            let six = ALPHABET[(word >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= three.len() { char::from(six) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = (0..=0x200).filter_map(char::from_u32).filter_map(byte).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        assert!((0..=255).eq(bytes));
        assert_eq!((byte('Ġ'), byte('Ċ'), byte('¡')), (Some(b' '), Some(b'\n'), Some(0xa1)));
    }

    #[test]
    fn base64_is_the_usual_one() {
        // RFC 4648, section 10.
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}

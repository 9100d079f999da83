//! Streaming detokenisation: text that grows token by token.
//!
//! Decoding is not a map from token to text: a character's bytes may be spread over tokens, the first token's leading
//! space may be dropped, and a run of byte-fallback tokens is decoded as a whole. Decoding everything again for each
//! token would be right but quadratic. The usual remedy (text-generation-inference, `DecodeStream` of the tokenizers
//! crate) decodes a sliding window twice and subtracts; it loses or refuses text when late bytes change the meaning
//! of earlier ones. Here the decoder's own structure says where text can be cut:
//!
//! * **bytes**: byte-level decoders concatenate bytes and replace those that are not UTF-8. We keep only the bytes of
//!   an unfinished character, at most three.
//! * **segments**: SentencePiece-like decoders treat tokens one by one, except for the start of
//!   the text and for runs of byte tokens. A segment ends after each token that is not a byte
//!   token, and is decoded behind an *anchor*: a fixed token that takes the start's special
//!   treatment upon itself, and whose text is then cut off.
//! * **whole**: any decoder that this module does not understand. Its text comes at the end, all at once: late, but
//!   never wrong.
//!
//! In all three cases, the pieces together are exactly the text that [`Tokenizer::decode`] gives for all ids.

use serde_json::Value;

use super::TextError;
use super::tokenizer::Tokenizer;

/// How a tokenizer's text can be produced piece by piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cuts {
    /// Byte-level.
    Bytes,
    /// Token by token, except for the start and for runs of byte-fallback tokens.
    Segments {
        /// A token that is decoded in front of each segment but the first.
        anchor: u32,
        /// Length of the anchor's own text.
        anchor_len: usize,
        /// Whether `<0xNN>` tokens are bytes.
        byte_fallback: bool,
    },
    /// The decoder is not understood.
    Whole,
}

impl Cuts {
    /// Finds the cuts for a tokenizer with this `decoder`, whose vocabulary has exactly `ids`.
    pub(super) fn of(
        decoder: &Value,
        ids: &[u32],
        spelling: impl Fn(u32) -> Option<String>,
        decode: impl Fn(&[u32]) -> Result<String, TextError>,
    ) -> Result<Self, TextError> {
        let mut parts = Vec::new();
        flatten(decoder, &mut parts);
        // The crate computes `length - stop - 1` unchecked, which crashes for short texts.
        if parts.iter().any(|p| kind(p) == "Strip" && p["stop"] != 0) {
            return Err(TextError::UnsupportedTokenizer { what: "a `Strip` decoder with `stop` above 0".into() });
        }
        if let [first, rest @ ..] = parts.as_slice()
            && kind(first) == "ByteLevel"
            && rest.iter().all(|p| kind(p) == "Fuse")
        {
            return Ok(Self::Bytes);
        }
        if !is_segmentable(&parts) {
            return Ok(Self::Whole);
        }
        let byte_fallback = parts.iter().any(|p| kind(p) == "ByteFallback");
        for &id in ids {
            if spelling(id).is_none_or(|t| byte_fallback && is_byte_token(&t)) {
                continue;
            }
            // After an anchor without text, the next token might still be treated as the start.
            let text = decode(&[id])?;
            if !text.is_empty() {
                return Ok(Self::Segments { anchor: id, anchor_len: text.len(), byte_fallback });
            }
        }
        Ok(Self::Whole)
    }
}

fn kind(decoder: &Value) -> &str {
    decoder["type"].as_str().unwrap_or("")
}

/// Lists a decoder's parts in order; empty if there is no decoder.
fn flatten<'v>(decoder: &'v Value, parts: &mut Vec<&'v Value>) {
    match decoder["decoders"].as_array() {
        Some(inner) if kind(decoder) == "Sequence" => inner.iter().for_each(|d| flatten(d, parts)),
        _ if decoder.is_null() => {}
        _ => parts.push(decoder),
    }
}

/// Whether cutting after tokens that are not byte tokens, and decoding behind an anchor, gives the same text. There
/// are three stages, and each admits only parts that are known to be safe there.
fn is_segmentable(parts: &[&Value]) -> bool {
    let (before, after) = match parts.iter().position(|p| kind(p) == "ByteFallback") {
        Some(at) => (&parts[..at], &parts[at + 1..]),
        None => (&parts[..0], parts),
    };
    // Before byte fallback, nothing may turn another token into a byte token. A replacement that
    // leaves a space or `▁` behind cannot.
    let harmless = |p: &&Value| kind(p) == "Replace" && p["content"].as_str().is_some_and(|c| c.contains([' ', '▁']));
    // Before fusing, each of these looks at one token, and at whether it is the first.
    let fuse = after.iter().position(|p| kind(p) == "Fuse");
    let (single, fused) = after.split_at(fuse.unwrap_or(after.len()));
    let local = |p: &&Value| matches!(kind(p), "Replace" | "Strip" | "Metaspace" | "WordPiece");
    // Once fused, only the very start may still be changed.
    let start = |p: &&Value| matches!(kind(p), "Fuse" | "Strip");
    before.iter().all(harmless) && single.iter().all(local) && fused.iter().all(start)
}

/// The byte that a byte-fallback token stands for. The same test as the crate's decoder, down to
/// its acceptance of `<0x+A>`.
fn is_byte_token(token: &str) -> bool {
    token.len() == 6
        && token.ends_with('>')
        && token
            .strip_prefix("<0x")
            .and_then(|rest| rest.get(..2))
            .is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok())
}

/// The byte that a character of the byte-level (GPT-2) alphabet stands for: printable Latin-1
/// stands for itself, and the other 68 bytes, in order, for U+0100 and onwards.
fn alphabet_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (33..=126 | 161..=172 | 174..=255) => u8::try_from(code).ok(),
        code @ 256..=288 => u8::try_from(code - 256).ok(),
        code @ 289..=322 => u8::try_from(code - 289 + 127).ok(),
        323 => Some(173),
        _ => None,
    }
}

/// A byte-level token's bytes: those that its characters stand for, or, if any of them stands for none (added tokens with spaces,
/// for example), its text as it is.
fn alphabet_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(alphabet_byte).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

impl Tokenizer {
    /// The bytes that a token adds to a text in which other tokens stand before it. The bytes of several tokens together are the
    /// text that [`decode`](Self::decode) gives for them, with two exceptions: `decode` writes U+FFFD for bytes that are not
    /// UTF-8, and some tokenizers drop a space at the beginning of a text. Special tokens have the bytes of their names.
    ///
    /// `None` for an id outside the vocabulary, and for all ids if the text of a token depends on its neighbours, as with
    /// decoders that are not understood.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken.
    pub fn token_bytes(&self, id: u32) -> Result<Option<Vec<u8>>, TextError> {
        let Some(token) = self.token_text(id) else { return Ok(None) };
        match *self.cuts() {
            Cuts::Bytes => Ok(Some(alphabet_bytes(&token))),
            Cuts::Segments { byte_fallback, .. } if byte_fallback && is_byte_token(&token) => {
                Ok(u8::from_str_radix(&token[3..5], 16).ok().map(|byte| vec![byte]))
            }
            Cuts::Segments { anchor, anchor_len, .. } => {
                let text = self.decode(&[anchor, id], false)?;
                match text.get(anchor_len..) {
                    Some(text) => Ok(Some(text.as_bytes().to_vec())),
                    None => Err(changed()),
                }
            }
            Cuts::Whole => Ok(None),
        }
    }
}

/// The error for a decoder whose pieces do not add up.
fn changed() -> TextError {
    TextError::Decode { reason: "the decoder changes text that it has already produced".into() }
}

/// How special tokens appear in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// All are left out, as by Hugging Face's `skip_special_tokens`.
    Hidden,
    /// All are left out except those that a reader needs to tell a model's answer from the rest
    /// ([`Tokenizer::is_markup`]).
    Markup,
    /// All are shown.
    Shown,
}

/// Turns one stream of token ids into text, piece by piece.
///
/// The pieces returned by [`push`](Self::push) and [`finish`](Self::finish), put together, equal
/// [`Tokenizer::decode`] of all ids that are not hidden. No piece ends inside a character. Memory and time per token
/// do not grow with the length of the stream (for decoders that are not understood, text comes at
/// the end, and memory does grow).
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    special: Special,
    /// [`Cuts::Bytes`]: the unfinished character.
    bytes: Vec<u8>,
    /// Otherwise: tokens that have not become text yet.
    pending: Vec<u32>,
    /// [`Cuts::Segments`]: whether the start of the text has been decoded.
    started: bool,
}

impl Detokenizer {
    /// A stream as a reader wants it: [`Special::Markup`].
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self::with_special(tokenizer, Special::Markup)
    }

    /// A stream with, or without, special tokens.
    pub fn with_special(tokenizer: &Tokenizer, special: Special) -> Self {
        Self { tokenizer: tokenizer.clone(), special, bytes: Vec::new(), pending: Vec::new(), started: false }
    }

    /// Whether this token is left out.
    pub fn hides(&self, id: u32) -> bool {
        match self.special {
            Special::Shown => false,
            Special::Markup => self.tokenizer.is_special(id) && !self.tokenizer.is_markup(id),
            Special::Hidden => self.tokenizer.is_special(id),
        }
    }

    /// Adds a token and returns the text that it makes certain, which is often empty. Ids outside the vocabulary add
    /// nothing.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        // The crate drops these before decoding, so they cannot even interrupt a run of bytes.
        let Some(token) = self.tokenizer.token_text(id) else {
            return Ok(String::new());
        };
        if self.hides(id) {
            return Ok(String::new());
        }
        match *self.tokenizer.cuts() {
            Cuts::Bytes => {
                self.bytes.extend(alphabet_bytes(&token));
                Ok(self.complete_characters())
            }
            Cuts::Segments { byte_fallback, .. } => {
                self.pending.push(id);
                if byte_fallback && is_byte_token(&token) {
                    // One bad byte turns its whole run into replacement characters, so no part of a run is certain
                    // before its end.
                    return Ok(String::new());
                }
                self.decode_segment()
            }
            Cuts::Whole => {
                self.pending.push(id);
                Ok(String::new())
            }
        }
    }

    /// Ends the stream and returns what was held back; an unfinished character becomes U+FFFD.
    /// The stream is then as new.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let text = match self.tokenizer.cuts() {
            Cuts::Bytes => Ok(String::from_utf8_lossy(&self.bytes).into_owned()),
            Cuts::Segments { .. } => self.decode_segment(),
            Cuts::Whole => self.tokenizer.decode(&self.pending, false),
        };
        self.bytes.clear();
        self.pending.clear();
        self.started = false;
        text
    }

    /// Takes all finished characters out of `bytes`, and leaves a sequence that may still become
    /// one. Invalid sequences are replaced just as `String::from_utf8_lossy` does.
    fn complete_characters(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        for part in self.bytes.utf8_chunks() {
            text.push_str(part.valid());
            done += part.valid().len();
            let at_end = done + part.invalid().len() == self.bytes.len();
            if at_end && is_unfinished(part.invalid()) {
                break;
            }
            if !part.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                done += part.invalid().len();
            }
        }
        self.bytes.drain(..done);
        text
    }

    /// Decodes the pending tokens, which end where text may be cut.
    fn decode_segment(&mut self) -> Result<String, TextError> {
        let Cuts::Segments { anchor, anchor_len, .. } = *self.tokenizer.cuts() else {
            return Ok(String::new());
        };
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        if !self.started {
            let text = self.tokenizer.decode(&self.pending, false)?;
            // As long as there is no text, the special treatment of the start (a space to strip) may not have
            // happened yet, so the tokens must stay and be decoded together with the next ones.
            if !text.is_empty() {
                self.started = true;
                self.pending.clear();
            }
            return Ok(text);
        }
        self.pending.insert(0, anchor);
        let text = self.tokenizer.decode(&self.pending, false);
        self.pending.clear();
        let mut text = text?;
        // The anchor's text always comes first; if it ever does not, this reports it.
        match text.is_char_boundary(anchor_len) {
            true => Ok(text.split_off(anchor_len)),
            false => Err(changed()),
        }
    }
}

/// Whether these bytes, invalid at the end of the input, could be the beginning of a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
    use proptest::prelude::*;
    use serde_json::json;

    fn load(json: &str) -> Tokenizer {
        Tokenizer::from_json(json.as_bytes()).unwrap()
    }

    /// Streams ids; checks against batch decoding and returns the pieces.
    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
        let special = if skip { Special::Hidden } else { Special::Shown };
        let mut detokenizer = Detokenizer::with_special(tokenizer, special);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        pieces.push(detokenizer.finish().unwrap());
        assert_eq!(pieces.concat(), tokenizer.decode(ids, skip).unwrap(), "{ids:?}");
        pieces
    }

    fn sentencepiece_variants() -> Vec<(Tokenizer, bool)> {
        let base = fixtures::sentencepiece();
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁",
            "prepend_scheme": "always", "split": true});
        let fallback = json!({"type": "ByteFallback"});
        let fuse = json!({"type": "Fuse"});
        let sequence = |parts: &[&Value]| json!({"type": "Sequence", "decoders": parts});
        let wordpiece = json!({"type": "WordPiece", "prefix": "▁", "cleanup": true});
        let ctc = json!({"type": "CTC", "pad_token": "<unk>",
            "word_delimiter_token": "▁", "cleanup": true});
        let bpe = json!({"type": "BPEDecoder", "suffix": "▁"});
        let late = json!({"type": "Replace", "pattern": {"String": "hell"}, "content": "h"});
        let forge = json!({"type": "Replace", "pattern": {"String": "h"}, "content": "<0x41>"});
        [
            (Value::Null, true),
            (metaspace.clone(), true),
            (wordpiece, true),
            (sequence(&[&fallback, &metaspace]), true),
            (sequence(&[&replace, &fallback, &fuse, &strip]), true),
            (sequence(&[&replace, &fallback, &strip]), true),
            (sequence(&[&sequence(&[&replace]), &fallback, &fuse]), true),
            (ctc, false),
            (bpe, false),
            (sequence(&[&fallback, &fuse, &late]), false),
            (sequence(&[&forge, &fallback]), false),
            (sequence(&[&metaspace, &fallback]), false),
        ]
        .into_iter()
        .map(|(decoder, live)| (load(&fixtures::with_decoder(&base, decoder)), live))
        .collect()
    }

    #[test]
    fn a_character_split_over_tokens_comes_when_complete() {
        let tokenizer = load(&fixtures::byte_level());
        let half = tokenizer.token_id("ä¸").unwrap();
        let rest_and_more = tokenizer.token_id("\u{143}!").unwrap();
        let crab = tokenizer.encode("🦀", false).unwrap();
        let pieces = stream(&tokenizer, &[&[half, rest_and_more], &crab[..]].concat(), true);
        assert_eq!(pieces, ["", "中!", "", "", "", "🦀", ""]);
    }

    #[test]
    fn impossible_bytes_are_not_held_back() {
        let tokenizer = load(&fixtures::byte_level());
        // In this fixture, ids below 256 are bytes.
        assert_eq!(stream(&tokenizer, &[0xff, 0x80, b'a'.into()], true)[0], "\u{fffd}");
        assert_eq!(stream(&tokenizer, &[0xe4, b'a'.into()], true)[1], "\u{fffd}a");
        assert_eq!(stream(&tokenizer, &[0xe4, 0xb8], true)[2], "\u{fffd}");
    }

    #[test]
    fn the_first_space_is_stripped_and_no_other() {
        let tokenizer = load(&fixtures::sentencepiece());
        let hello = tokenizer.token_id("▁hello").unwrap();
        let space = tokenizer.token_id("▁").unwrap();
        let end = tokenizer.token_id("</s>").unwrap();
        let pieces = stream(&tokenizer, &[hello, end, hello, space, hello], true);
        assert_eq!(pieces, ["hello", "", " hello", " ", " hello", ""]);
        let pieces = stream(&tokenizer, &[space, hello], true);
        assert_eq!(pieces, ["", " hello", ""]);
    }

    #[test]
    fn byte_runs_are_judged_as_a_whole() {
        let tokenizer = load(&fixtures::sentencepiece());
        let byte = |b: u8| tokenizer.token_id(&format!("<0x{b:02X}>")).unwrap();
        let a = tokenizer.token_id("a").unwrap();
        let good = stream(&tokenizer, &[a, byte(0xe4), byte(0xb8), byte(0xad), a], true);
        assert_eq!(good, ["a", "", "", "", "中a", ""]);
        let run = [a, byte(0xe4), byte(0xb8), byte(0xad), byte(0xff)];
        let bad = stream(&tokenizer, &run, true);
        assert_eq!(bad[5], "\u{fffd}\u{fffd}\u{fffd}\u{fffd}");
    }

    #[test]
    fn cuts_are_as_expected() {
        let byte_level = load(&fixtures::byte_level());
        assert_eq!(byte_level.cuts(), &Cuts::Bytes);
        let spm = load(&fixtures::sentencepiece());
        assert!(matches!(spm.cuts(), Cuts::Segments { byte_fallback: true, .. }));
        for (tokenizer, live) in sentencepiece_variants() {
            assert_eq!(matches!(tokenizer.cuts(), Cuts::Segments { .. }), live);
        }
    }

    #[test]
    fn the_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for c in (0..=0x400).filter_map(char::from_u32) {
            if let Some(byte) = alphabet_byte(c) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true));
            }
        }
        assert!(seen.iter().all(|&s| s));
    }

    #[test]
    fn markers_of_the_harmony_format_are_shown() {
        let mut json: Value = serde_json::from_str(&fixtures::byte_level()).unwrap();
        let tokens = json["added_tokens"].as_array_mut().unwrap();
        let markers = ["<|start|>", "<|channel|>", "<|message|>"];
        for (id, content) in (tokens[0]["id"].as_u64().unwrap() + 4..).zip(markers) {
            tokens.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}));
        }
        let harmony = load(&json.to_string());
        let text = "<|channel|>analysis<|message|>We need…<|end|><|start|>assistant<|channel|>final<|message|>Hello";
        let ids = harmony.encode(text, false).unwrap();
        let show = |special: Special| -> String {
            let mut detokenizer = Detokenizer::with_special(&harmony, special);
            let text: String = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
            text + &detokenizer.finish().unwrap()
        };
        assert_eq!(show(Special::Markup), text);
        assert_eq!(show(Special::Shown), text);
        assert_eq!(show(Special::Hidden), "analysisWe need…assistantfinalHello");

        // Elsewhere, `<|end|>` is an end token like any other.
        let plain = load(&fixtures::byte_level());
        let end = plain.token_id("<|end|>").unwrap();
        assert!(Detokenizer::new(&plain).hides(end) && !Detokenizer::new(&harmony).hides(end));
    }

    #[test]
    fn memory_does_not_grow_with_the_stream() {
        for json in [fixtures::byte_level(), fixtures::sentencepiece()] {
            let tokenizer = load(&json);
            let ids = tokenizer.encode("hello 中 🦀 world", false).unwrap();
            let mut detokenizer = Detokenizer::new(&tokenizer);
            for &id in ids.iter().cycle().take(20_000) {
                detokenizer.push(id).unwrap();
                assert!(detokenizer.pending.len() <= 8 && detokenizer.bytes.len() <= 3);
            }
        }
    }

    #[test]
    fn finish_starts_over() {
        let tokenizer = load(&fixtures::sentencepiece());
        let ids = tokenizer.encode("hello hello", false).unwrap();
        let mut detokenizer = Detokenizer::new(&tokenizer);
        for _ in 0..2 {
            let text: String = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
            assert_eq!(text + &detokenizer.finish().unwrap(), "hello hello");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn byte_level_streams_as_it_decodes(
            ids in prop::collection::vec(prop_oneof![0u32..280, 0xc0u32..0x100, 0x80u32..0xc0], 0..40),
            skip in any::<bool>(),
        ) {
            let tokenizer = load(&fixtures::byte_level());
            stream(&tokenizer, &ids, skip);
        }

        #[test]
        fn sentencepiece_streams_as_it_decodes(
            ids in prop::collection::vec(prop_oneof![0u32..4, 131u32..259, 259u32..280], 0..40),
            skip in any::<bool>(),
        ) {
            let tokenizer = load(&fixtures::sentencepiece());
            stream(&tokenizer, &ids, skip);
        }

        #[test]
        fn text_survives_the_round_trip(text in "\\PC{0,40}") {
            for json in [fixtures::byte_level(), fixtures::sentencepiece()] {
                let tokenizer = load(&json);
                let ids = tokenizer.encode(&text, false).unwrap();
                stream(&tokenizer, &ids, true);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn odd_decoders_stream_as_they_decode(
            ids in prop::collection::vec(prop_oneof![0u32..3, 131u32..259, 259u32..280], 0..24),
        ) {
            for (tokenizer, _) in sentencepiece_variants() {
                stream(&tokenizer, &ids, false);
            }
        }
    }
}

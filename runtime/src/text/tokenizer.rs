//! The model's tokenizer: text to token ids and back.
//!
//! A thin shell around the `tokenizers` crate, so that results equal Hugging Face's by
//! construction. The shell is there because tokenizer.json comes from strangers: it bounds sizes,
//! refuses what is known to crash the crate, switches off what would make prompts differ from run
//! to run, and turns a panic of the crate into a typed error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokenizers::models::ModelWrapper;

use super::TextError;
use super::stream::Cuts;
use super::tiktoken;
use super::untrusted::{AddedTokens, encode_with};

/// Largest tokenizer.json accepted. The largest published ones have about 35 MB.
pub const MAX_TOKENIZER_BYTES: usize = 256 << 20;

/// Largest token id accepted. Real vocabularies end below 300 000; the bound lets callers size
/// tables by [`Tokenizer::vocab_size`] without trusting the file.
pub const MAX_TOKEN_ID: u32 = (1 << 24) - 1;

/// A model's tokenizer. Immutable, cheap to clone, usable from many threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    vocab_size: usize,
    /// How to decode piece by piece; found once, because finding it reads the whole decoder.
    cuts: Cuts,
    /// The tokens that are found before the model sees the text.
    added: AddedTokens,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.inner.vocab_size).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// Truncation and padding settings in the file are ignored (a prompt must never be shortened
    /// silently), and so is BPE dropout, a training device that makes encoding random.
    ///
    /// # Errors
    /// When the file is not a usable tokenizer, whatever its bytes are.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TextError> {
        if bytes.len() > MAX_TOKENIZER_BYTES {
            return Err(TextError::TokenizerTooLarge { bytes: bytes.len(), limit: MAX_TOKENIZER_BYTES });
        }
        guard("reading tokenizer.json", || Self::load(bytes))?
    }

    /// The tokenizer of a checkpoint, by the files that it has: `tokenizer.json`, else `tiktoken.model` with
    /// `tokenizer_config.json`. `file` gives the bytes of a file by its name. `None` if it has neither.
    ///
    /// # Errors
    /// When the files are damaged.
    pub fn find<'f>(file: impl Fn(&str) -> Option<&'f [u8]>) -> Result<Option<Self>, TextError> {
        if let Some(json) = file("tokenizer.json") {
            return Self::from_json(json).map(Some);
        }
        let Some(ranks) = file("tiktoken.model") else { return Ok(None) };
        Self::from_tiktoken(ranks, file("tokenizer_config.json")).map(Some)
    }

    /// Converts the vocabulary of models that ship `tiktoken.model` (Kimi): lines of a token in
    /// base 64 and its rank, byte-level BPE. The names of the 256 special tokens behind the ranks
    /// come from tokenizer_config.json's `added_tokens_decoder`; the others are called
    /// `<|reserved_token_{id}|>`.
    ///
    /// # Errors
    /// When a file is damaged.
    pub fn from_tiktoken(model: &[u8], config: Option<&[u8]>) -> Result<Self, TextError> {
        Self::from_json(tiktoken::to_tokenizer_json(model, config)?.as_bytes())
    }

    fn load(bytes: &[u8]) -> Result<Self, TextError> {
        let bad = |e: tokenizers::Error| TextError::BadTokenizer { reason: e.to_string() };
        // Checked first because the crate reports some malformed JSON on standard output, which
        // belongs to the generated text.
        let json = std::str::from_utf8(bytes).map_err(|e| bad(e.into()))?;
        serde_json::from_str::<serde::de::IgnoredAny>(json).map_err(|e| bad(e.into()))?;
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(bad)?;
        tokenizer.with_truncation(None).map_err(bad)?;
        tokenizer.with_padding(None);
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            tokenizer.with_model(ModelWrapper::BPE(bpe));
        }

        let mut ids: Vec<u32> = tokenizer.get_vocab(true).into_values().collect();
        ids.sort_unstable();
        let Some(&highest) = ids.last() else {
            return Err(TextError::BadTokenizer { reason: "its vocabulary is empty".into() });
        };
        if highest > MAX_TOKEN_ID {
            return Err(TextError::BadTokenizer { reason: format!("token id {highest} is above {MAX_TOKEN_ID}") });
        }
        let cuts = Cuts::of(&tokenizer, &ids)?;
        let added = AddedTokens::of(&tokenizer);
        Ok(Self { inner: Arc::new(Inner { tokenizer, vocab_size: highest as usize + 1, cuts, added }) })
    }

    /// Token ids of `text`. Added tokens such as `<|im_end|>` are recognised wherever they stand in
    /// the text; `add_special` also adds what the tokenizer puts around every text (often a
    /// begin-of-sequence token). Text from a chat template usually has that already.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text, or the tokenizer is broken.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        guard("tokenising", || {
            self.inner
                .tokenizer
                .encode_fast(text, add_special)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|e| TextError::Encode { reason: e.to_string() })
        })?
    }

    /// Token ids of a text with parts (ranges of its bytes) that strangers wrote. As
    /// [`encode`](Self::encode) without the tokens around the text, except that added tokens are
    /// recognised only where none of their characters is a stranger's. Those that are nothing but
    /// white space are text, and recognised everywhere.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_untrusted(&self, text: &str, untrusted: &[std::ops::Range<usize>]) -> Result<Vec<u32>, TextError> {
        guard("tokenising", || {
            encode_with(&self.inner.tokenizer, &self.inner.added, text, untrusted)
                .map_err(|e| TextError::Encode { reason: e.to_string() })
        })?
    }

    /// Spellings of the tokens that mean something to the model beyond text: all added tokens but
    /// those of white space.
    pub(super) fn controls(&self) -> &[String] {
        self.inner.added.controls()
    }

    /// Text of `ids`, exactly as Hugging Face's `decode` gives it (without its optional clean-up of
    /// spaces). Ids outside the vocabulary are text of no length; bytes that are no UTF-8 become
    /// U+FFFD. With `skip_special`, tokens marked special are left out.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let counts = |&id: &u32| self.token_text(id).is_some_and(|token| !(skip_special && self.is_special(&token)));
        // Some of the crate's decoders compute "number of tokens - 1" without looking.
        if !ids.iter().any(counts) {
            return Ok(String::new());
        }
        decode_with(&self.inner.tokenizer, ids, skip_special)
    }

    /// The vocabulary's own spelling of a token (`Ġhello`, `<0x0A>`), or `None` for an id outside
    /// the vocabulary. For text to show, use [`Tokenizer::decode`].
    pub fn token_text(&self, id: u32) -> Option<String> {
        guard("looking up a token", || self.inner.tokenizer.id_to_token(id)).ok().flatten()
    }

    /// The id of a token by its spelling in the vocabulary, added tokens included.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        guard("looking up a token", || self.inner.tokenizer.token_to_id(text)).ok().flatten()
    }

    /// One more than the highest token id; at most [`MAX_TOKEN_ID`] + 1. A model may have more
    /// rows in its output head than this (padding), and the vocabulary may have gaps.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// Whether the token with this spelling is left out by `skip_special`.
    pub(super) fn is_special(&self, spelling: &str) -> bool {
        self.inner.tokenizer.get_added_vocabulary().is_special_token(spelling)
    }

    pub(super) fn cuts(&self) -> &Cuts {
        &self.inner.cuts
    }
}

/// Decodes with the bare crate; shared with the search for [`Cuts`], which runs before a
/// [`Tokenizer`] exists.
pub(super) fn decode_with(
    tokenizer: &tokenizers::Tokenizer,
    ids: &[u32],
    skip_special: bool,
) -> Result<String, TextError> {
    guard("decoding", || tokenizer.decode(ids, skip_special).map_err(|e| TextError::Decode { reason: e.to_string() }))?
}

/// Runs foreign code and turns its panic into an error. The crate indexes and unwraps on values
/// from the file in places we cannot all know. Sound without `unsafe`: the crate's state is read
/// only here, apart from a cache that it guards with locks.
fn guard<T>(during: &'static str, work: impl FnOnce() -> T) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let reason = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        TextError::Crashed { during, reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures;
    use proptest::prelude::*;

    #[test]
    fn round_trips_text() {
        for json in [fixtures::byte_level(), fixtures::sentencepiece()] {
            let tokenizer = Tokenizer::from_json(json.as_bytes()).unwrap();
            for text in ["hello world", "中文 and 🦀", "tabs\tand\nnewlines", ""] {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            }
        }
    }

    #[test]
    fn special_tokens_are_found_and_skipped() {
        let tokenizer = Tokenizer::from_json(fixtures::byte_level().as_bytes()).unwrap();
        let end = tokenizer.token_id("<|end|>").unwrap();
        let ids = tokenizer.encode("hi<|end|>", false).unwrap();
        assert_eq!(ids.last(), Some(&end));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hi");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "hi<|end|>");
        assert_eq!(tokenizer.token_text(end).as_deref(), Some("<|end|>"));
    }

    #[test]
    fn add_special_adds_what_the_post_processor_says() {
        let tokenizer = Tokenizer::from_json(fixtures::sentencepiece().as_bytes()).unwrap();
        let bos = tokenizer.token_id("<s>").unwrap();
        assert_eq!(tokenizer.encode("a", true).unwrap()[0], bos);
        assert_ne!(tokenizer.encode("a", false).unwrap()[0], bos);
    }

    #[test]
    fn ids_outside_the_vocabulary_are_nothing() {
        let tokenizer = Tokenizer::from_json(fixtures::byte_level().as_bytes()).unwrap();
        let outside = tokenizer.vocab_size() as u32;
        assert_eq!(tokenizer.decode(&[outside, u32::MAX], false).unwrap(), "");
        assert_eq!(tokenizer.token_text(outside), None);
        assert!(tokenizer.token_text(outside - 1).is_some());
        assert_eq!(tokenizer.token_id("no such token"), None);
    }

    #[test]
    fn dropout_truncation_and_padding_are_ignored() {
        let mut json: serde_json::Value = serde_json::from_str(&fixtures::byte_level()).unwrap();
        json["model"]["dropout"] = 0.9.into();
        json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 2,
            "strategy": "LongestFirst", "stride": 0});
        let plain = Tokenizer::from_json(fixtures::byte_level().as_bytes()).unwrap();
        let odd = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let text = "hello hello hello hello hello";
        let want = plain.encode(text, false).unwrap();
        for _ in 0..8 {
            assert_eq!(odd.encode(text, false).unwrap(), want);
        }
    }

    #[test]
    fn hopeless_files_are_refused() {
        let refused = |json: &str| Tokenizer::from_json(json.as_bytes()).unwrap_err();
        for json in ["", "null", "{}", "[]", "{\"model\": {}}", "\u{feff}{}"] {
            assert!(matches!(refused(json), TextError::BadTokenizer { .. }), "{json}");
        }
        let empty = r#"{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}"#;
        assert!(matches!(refused(empty), TextError::BadTokenizer { .. }));
        let far = r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}"#;
        assert!(matches!(refused(far), TextError::BadTokenizer { .. }));
        let mut strip: serde_json::Value = serde_json::from_str(&fixtures::byte_level()).unwrap();
        strip["decoder"] = serde_json::json!({"type": "Strip", "content": "a", "start": 0, "stop": 9});
        assert!(matches!(refused(&strip.to_string()), TextError::UnsupportedTokenizer { .. }));
    }

    #[test]
    fn a_panic_of_the_library_becomes_an_error() {
        let error = guard("testing", || -> u32 { panic!("on {}", "purpose") }).unwrap_err();
        let want = TextError::Crashed { during: "testing", reason: "on purpose".into() };
        assert_eq!(error, want);
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            spm in any::<bool>(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let json = if spm { fixtures::sentencepiece() } else { fixtures::byte_level() };
            let mut bytes = json.into_bytes();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(tokenizer) = Tokenizer::from_json(&bytes) {
                let _ = tokenizer.encode("hello 中 <|end|></s>", true);
                let ids: Vec<u32> = (0..tokenizer.vocab_size().min(400) as u32).collect();
                let _ = tokenizer.decode(&ids, true);
            }
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Tokenizer::from_json(&bytes).is_err());
        }
    }
}

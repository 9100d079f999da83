//! The model's tokenizer: text to token ids and back.
//!
//! This is a shell around the parts of the `tokenizers` crate, so results equal Hugging Face's by construction. The shell is
//! necessary because there are several files and they come from strangers. It combines what they say ([`super::effective`]),
//! bounds what the file's own program may take ([`super::limits`], [`super::pipeline`]), refuses features that are known to
//! crash the crate, switches off those that would make prompts differ from run to run, and turns a panic of the crate into a
//! typed error.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};
use sluice_format::Metadata;
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Model};

use super::TextError;
use super::added::AddedTokens;
use super::around::Around;
use super::chat::SpecialTokens;
use super::effective::{Effective, TOKENIZER_CONFIG};
use super::guard::guard;
use super::limits::{BASE_TIME, Limits, MAX_TEXT_BYTES, clip, explain};
use super::pipeline::{Decoding, Normalization, Splitting};
use super::stream::Cuts;
use super::tiktoken;
use super::untrusted::encode_with;

/// Largest tokenizer.json accepted. The largest published ones have about 35 MB.
pub const MAX_TOKENIZER_BYTES: usize = 256 << 20;

/// Largest token id accepted. Real vocabularies end below 300 000; the bound lets callers size
/// tables by [`Tokenizer::vocab_size`] without trusting the file.
pub const MAX_TOKEN_ID: u32 = (1 << 24) - 1;

/// Longest spelling of a token accepted, in bytes. The longest of published ones have a few hundred.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Most characters that a WordPiece model may treat as one word: its time grows with their square. Real ones say 100.
const MAX_WORDPIECE_CHARS: usize = 1000;

/// Longest affix that a model may put on every character or word, in bytes. Real ones have two or four.
const MAX_AFFIX_BYTES: usize = 64;

/// A model's tokenizer. Immutable, cheap to clone, usable from many threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

/// The parts, in the order in which a text meets them.
pub(super) struct Inner {
    /// The added tokens, which are found before the model sees the text.
    pub(super) added: AddedTokens,
    pub(super) normalization: Normalization,
    pub(super) splitting: Splitting,
    pub(super) model: ModelWrapper,
    around: Around,
    decoding: Decoding,
    vocab_size: usize,
    /// How to decode piece by piece. This is found once, because finding it reads the whole decoder.
    cuts: Cuts,
    names: SpecialTokens,
    /// Whether the special tokens are those of OpenAI's harmony format.
    harmony: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.inner.vocab_size).finish_non_exhaustive()
    }
}

/// The parts of tokenizer.json that are used. Truncation and padding are not.
#[derive(Deserialize)]
struct File {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<FileToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: ModelWrapper,
}

#[derive(Deserialize)]
struct FileToken {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

impl Tokenizer {
    /// Reads a tokenizer.json that stands alone.
    ///
    /// Truncation and padding settings in the file are ignored (a prompt must never be shortened
    /// silently), and so is BPE dropout, a training device that makes encoding random.
    ///
    /// # Errors
    /// When the file is not a usable tokenizer, whatever its bytes are.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TextError> {
        Self::build(bytes, &|_| None, true)
    }

    /// The tokenizer of a checkpoint, from its files: `tokenizer.json`, otherwise `tiktoken.model`, with what
    /// `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `config.json` say about it. `file` gives the
    /// bytes of a file by its name. `None` if the checkpoint has neither of the first two.
    ///
    /// The result is the tokenizer that Hugging Face's transformers builds from these files. Where its versions 4 and 5
    /// differ, it is the one with which models were trained; `docs/USAGE.md` lists these cases.
    ///
    /// # Errors
    /// When the files are damaged, contradict each other, or ask for too much.
    pub fn find<'f>(file: impl Fn(&str) -> Option<&'f [u8]>) -> Result<Option<Self>, TextError> {
        if let Some(json) = file("tokenizer.json") {
            return Self::build(json, &file, true).map(Some);
        }
        let Some(ranks) = file("tiktoken.model") else { return Ok(None) };
        let json = tiktoken::to_tokenizer_json(ranks, file(TOKENIZER_CONFIG))?;
        Self::build(json.as_bytes(), &file, false).map(Some)
    }

    /// [`Tokenizer::find`] among the blobs that a model file keeps of its checkpoint.
    ///
    /// # Errors
    /// As there.
    pub fn of(metadata: &Metadata) -> Result<Option<Self>, TextError> {
        Self::find(|name| metadata.get(name))
    }

    /// Converts the vocabulary of models that ship `tiktoken.model` (Kimi): byte-level BPE, in lines with a token in
    /// base 64 and its rank. The names of the 256 special tokens after the ranks come from tokenizer_config.json's
    /// `added_tokens_decoder`; the others are called `<|reserved_token_{id}|>`.
    ///
    /// # Errors
    /// When a file is damaged.
    pub fn from_tiktoken(model: &[u8], config: Option<&[u8]>) -> Result<Self, TextError> {
        Self::from_json(tiktoken::to_tokenizer_json(model, config)?.as_bytes())
    }

    /// Reads tokenizer.json, and applies the other files. These add tokens only if `adds_tokens`.
    fn build<'f>(bytes: &[u8], file: &impl Fn(&str) -> Option<&'f [u8]>, adds_tokens: bool) -> Result<Self, TextError> {
        if bytes.len() > MAX_TOKENIZER_BYTES {
            return Err(TextError::TokenizerTooLarge { bytes: bytes.len(), limit: MAX_TOKENIZER_BYTES });
        }
        guard("reading tokenizer.json", || {
            let parsed = read(bytes)?;
            let own: Vec<_> = parsed.added_tokens.iter().map(|t| (t.id, t.token.clone())).collect();
            let effective = Effective::read(file, adds_tokens.then_some(&own))?;
            Self::put_together(parsed, effective)
        })?
    }

    fn put_together(mut file: File, effective: Effective) -> Result<Self, TextError> {
        check_model(&mut file.model)?;
        apply_prefix_space(&mut file, &effective);
        let model = file.model;
        let normalization = Normalization::read(&file.normalizer)?;
        let splitting = Splitting::read(&file.pre_tokenizer)?;
        let decoding = Decoding::read(&file.decoder)?;

        let mut added = AddedTokens::default();
        let own: Vec<AddedToken> = file.added_tokens.into_iter().map(|t| t.token).collect();
        added.add(&own, &model);
        added.add(&effective.add, &model);
        let missing: Vec<AddedToken> =
            effective.add_missing.iter().filter(|token| !added.has(&token.content)).cloned().collect();
        added.add(&missing, &model);
        for listed in effective.listed.iter().filter(|l| !l.content.is_empty()) {
            let id = added.id(&listed.content, &model);
            if id != Some(listed.id) {
                return Err(TextError::TokenContradiction {
                    file: listed.file,
                    token: clip(&listed.content),
                    id: listed.id,
                    reason: format!("but with tokenizer.json its id is {}", id.unwrap_or_default()),
                });
            }
        }
        added.prepare(&normalization)?;

        let mut names = effective.names;
        for (name, token) in effective.default_names {
            if added.id(token, &model).is_some() {
                names.set(name, token);
            }
        }
        let mut around = Around::read(&file.post_processor)?;
        if let Some((bos, eos)) = effective.around {
            let id = |token: &Option<String>| token.as_deref().and_then(|token| added.id(token, &model));
            around = Around {
                before: id(&names.bos).filter(|_| bos).into_iter().collect(),
                after: id(&names.eos).filter(|_| eos).into_iter().collect(),
            };
            if effective.bos_is_asked_for && around.before.is_empty() {
                return Err(TextError::BadConfigField {
                    file: TOKENIZER_CONFIG,
                    field: "bos_token",
                    expected: "a token of the vocabulary, as `add_bos_token` asks for it",
                    found: names.bos.map_or("missing".into(), |token| clip(&format!("{token:?}"))),
                });
            }
        }
        let ids = all_ids(&model, &added)?;
        let vocab_size = ids.last().map_or(0, |&highest| highest as usize + 1);
        let harmony = HARMONY.iter().all(|token| added.is_special(token));
        let cuts = Cuts::Whole;
        let mut inner =
            Inner { added, normalization, splitting, model, around, decoding, vocab_size, cuts, names, harmony };
        inner.cuts = Cuts::of(&file.decoder, &ids, |id| inner.spelling(id), |ids| inner.decode(ids))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Token ids of `text`. Added tokens such as `<|im_end|>` are recognised wherever they stand in
    /// the text; `add_special` also adds what the tokenizer puts around every text (often a
    /// begin-of-sequence token). Text from a chat template usually has that already.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text, or the tokenizer is broken or takes too much.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let ids = self.encode_untrusted(text, &[])?;
        let Around { before, after } = &self.inner.around;
        Ok(match add_special {
            true => [before.as_slice(), &ids, after].concat(),
            false => ids,
        })
    }

    /// Token ids of a text with parts (ranges of its bytes) that strangers wrote. This works as
    /// [`encode`](Self::encode) without the tokens around the text, except that an added token is recognised only if
    /// none of its characters is a stranger's. Added tokens that are only white space count as text, and are
    /// recognised everywhere.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_untrusted(&self, text: &str, untrusted: &[Range<usize>]) -> Result<Vec<u32>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TextTooLong { bytes: text.len(), limit: MAX_TEXT_BYTES });
        }
        guard("tokenising", || {
            let limits = Limits::of(text.len());
            encode_with(&self.inner, text, untrusted, &limits)
                .map_err(|e| explain(&e, |reason| TextError::Encode { reason }))
        })?
    }

    /// Spellings of the tokens that mean more than text to the model: all added tokens but those of white space.
    pub(super) fn controls(&self) -> &[String] {
        self.inner.added.controls()
    }

    /// Text of `ids`, exactly as Hugging Face's `decode` gives it (without its optional clean-up of spaces). Ids
    /// outside the vocabulary give no text; bytes that are not UTF-8 become U+FFFD. With `skip_special`, tokens
    /// marked special are left out.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken or takes too much.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let shown: Vec<u32> = ids.iter().copied().filter(|&id| !(skip_special && self.is_special(id))).collect();
        self.inner.decode(&shown)
    }

    /// The vocabulary's own spelling of a token (`Ġhello`, `<0x0A>`), or `None` for an id outside
    /// the vocabulary. For text to show, use [`Tokenizer::decode`].
    pub fn token_text(&self, id: u32) -> Option<String> {
        guard("looking up a token", || self.inner.spelling(id)).ok().flatten()
    }

    /// The id of a token by its spelling in the vocabulary, added tokens included.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        guard("looking up a token", || self.inner.added.id(text, &self.inner.model)).ok().flatten()
    }

    /// One more than the highest token id; at most [`MAX_TOKEN_ID`] + 1. A model may have more
    /// rows in its output head than this (padding), and the vocabulary may have gaps.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// Names of tokens, as the files give them: `bos_token`, `eos_token` and so on.
    pub fn names(&self) -> &SpecialTokens {
        &self.inner.names
    }

    /// The end token that the tokenizer's files name, besides those in generation_config.json and config.json: fine-tuned
    /// models often have a new one that only these files name.
    pub fn end_token(&self) -> Option<u32> {
        self.token_id(self.inner.names.eos.as_deref()?)
    }

    /// Whether a token means something to the model beyond text: an added token, but not one of white space. Text on both sides of
    /// it is tokenised on its own.
    pub fn is_control(&self, id: u32) -> bool {
        self.inner.added.is_control(id)
    }

    /// Whether a token is special: left out of text by `skip_special`.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.added.spelling(id).is_some_and(|spelling| self.inner.added.is_special(spelling))
    }

    /// Whether a reader needs this token, although it is special: the markers of OpenAI's harmony format (gpt-oss), without which
    /// a chain of thought and the answer behind it are one text, and the markers of thinking and tool calls of other families.
    pub fn is_markup(&self, id: u32) -> bool {
        self.inner.added.spelling(id).is_some_and(|token| {
            let is_one_of = |list: &[&str]| list.contains(&token);
            is_one_of(&MARKUP) || self.inner.harmony && (is_one_of(&HARMONY) || is_one_of(&HARMONY_MORE))
        })
    }

    /// Tries the tokenizer: text must become tokens, and tokens text, within the limits. Call it before hours are spent on a
    /// model's weights.
    ///
    /// # Errors
    /// What [`encode`](Self::encode) or [`decode`](Self::decode) would say.
    pub fn check(&self) -> Result<(), TextError> {
        let started = Instant::now();
        let long_word = "a".repeat(4096);
        let all_ascii: String = (' '..='~').chain(['\n', '\t']).collect();
        for text in [
            "",
            "a",
            "Hello, world! 123\n",
            "\u{4f60}\u{597d}\u{ff0c}e\u{301}\u{1f980} \u{fdfa}",
            &long_word,
            &all_ascii,
        ] {
            match self.encode(text, true) {
                // Some vocabularies lack characters, and report that when one occurs.
                Err(TextError::Encode { .. }) if !text.is_ascii() => {}
                Err(e) => return Err(e),
                Ok(ids) => {
                    self.decode(&ids, false)?;
                }
            }
            if started.elapsed() > BASE_TIME {
                return Err(TextError::Stopped { what: "it takes seconds for a few words".into() });
            }
        }
        let last = u32::try_from(self.inner.vocab_size).unwrap_or(u32::MAX);
        let step = (last / 1024).max(1) as usize;
        let sample: Vec<u32> = (0..last).step_by(step).collect();
        self.decode(&sample, true).map(|_| ())
    }

    pub(super) fn cuts(&self) -> &Cuts {
        &self.inner.cuts
    }
}

/// Markers of OpenAI's harmony format: those that identify it, and its other markers.
const HARMONY: [&str; 3] = ["<|channel|>", "<|message|>", "<|start|>"];
const HARMONY_MORE: [&str; 4] = ["<|end|>", "<|constrain|>", "<|call|>", "<|return|>"];

/// Other special tokens that structure what a model writes: around thinking and in tool calls. In most models such tokens
/// are ordinary ones. Tokens that end a turn are not in this list.
const MARKUP: [&str; 32] = [
    // Mistral
    "[THINK]",
    "[/THINK]",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    // Qwen, GLM, and most others
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    // DeepSeek
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "｜DSML｜",
    // Kimi
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    // MiniMax
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "]<]minimax[>[",
    "<mm:think>",
    "</mm:think>",
    // Llama
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
];

impl Inner {
    /// The spelling of a token.
    fn spelling(&self, id: u32) -> Option<String> {
        self.added.spelling(id).map(str::to_owned).or_else(|| self.model.id_to_token(id))
    }

    fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        guard("decoding", || {
            let tokens: Vec<String> = ids.iter().filter_map(|&id| self.spelling(id)).collect();
            // Some of the crate's decoders compute "number of tokens - 1" unchecked.
            if tokens.is_empty() {
                return Ok(String::new());
            }
            self.decoding.run(tokens).map_err(|e| explain(&e, |reason| TextError::Decode { reason }))
        })?
    }
}

fn bad(reason: &str) -> TextError {
    TextError::BadTokenizer { reason: clip(reason) }
}

/// Reads tokenizer.json.
fn read(bytes: &[u8]) -> Result<File, TextError> {
    // Checked first because the crate reports some malformed JSON on standard output, which
    // belongs to the generated text.
    let json = std::str::from_utf8(bytes).map_err(|e| bad(&e.to_string()))?;
    serde_json::from_str::<serde::de::IgnoredAny>(json).map_err(|e| bad(&e.to_string()))?;
    let file: File = serde_json::from_str(json).map_err(|e| bad(&e.to_string()))?;
    match file.version.as_deref() {
        None | Some("1.0") => Ok(file),
        Some(version) => Err(bad(&format!("its version is {version:?}, which is unknown"))),
    }
}

/// Bounds the time and memory that the model may take, and makes it deterministic.
fn check_model(model: &mut ModelWrapper) -> Result<(), TextError> {
    let affixes = match model {
        ModelWrapper::BPE(bpe) => {
            bpe.dropout = None;
            [bpe.continuing_subword_prefix.as_deref(), bpe.end_of_word_suffix.as_deref()]
        }
        ModelWrapper::WordPiece(wordpiece) => {
            let most = wordpiece.max_input_chars_per_word;
            if most > MAX_WORDPIECE_CHARS {
                let what = format!("words of {most} characters, more than {MAX_WORDPIECE_CHARS}");
                return Err(TextError::UnsupportedTokenizer { what });
            }
            [Some(wordpiece.continuing_subword_prefix.as_str()), None]
        }
        _ => [None, None],
    };
    match affixes.iter().flatten().any(|affix| affix.len() > MAX_AFFIX_BYTES) {
        true => {
            Err(TextError::UnsupportedTokenizer { what: format!("a prefix or suffix above {MAX_AFFIX_BYTES} bytes") })
        }
        false => Ok(()),
    }
}

/// All token ids in their order.
fn all_ids(model: &ModelWrapper, added: &AddedTokens) -> Result<Vec<u32>, TextError> {
    let vocab = model.get_vocab();
    if let Some(longest) = vocab.keys().map(String::len).max().filter(|&len| len > MAX_TOKEN_BYTES) {
        return Err(bad(&format!("a token has {longest} bytes, more than {MAX_TOKEN_BYTES}")));
    }
    let mut ids: Vec<u32> = vocab.into_values().chain(added.all_ids()).collect();
    ids.sort_unstable();
    ids.dedup();
    match ids.last() {
        None => Err(bad("its vocabulary is empty")),
        Some(&highest) if highest > MAX_TOKEN_ID => Err(bad(&format!("token id {highest} is above {MAX_TOKEN_ID}"))),
        Some(_) => Ok(ids),
    }
}

/// Applies `add_prefix_space`, if a file has it.
fn apply_prefix_space(file: &mut File, effective: &Effective) {
    let Some(prefix) = effective.prefix_space else { return };
    let is_sentencepiece = matches!(&file.model, ModelWrapper::BPE(bpe) if bpe.byte_fallback);
    match effective.sentencepiece {
        // What transformers' `LlamaConverter` writes.
        Some(legacy) if is_sentencepiece => {
            let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
            let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
            let back = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
            let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
            let scheme = if prefix { "first" } else { "never" };
            let metaspace =
                json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false});
            let normalizers = if prefix { json!([prepend, replace]) } else { json!([replace]) };
            (file.normalizer, file.pre_tokenizer) = match legacy {
                true => (json!({"type": "Sequence", "normalizers": normalizers}), Value::Null),
                false => (Value::Null, metaspace),
            };
            let mut decoders = vec![back, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
            if prefix {
                decoders.push(strip);
            }
            file.decoder = json!({"type": "Sequence", "decoders": decoders});
        }
        _ => {
            if let Some(own) = file.pre_tokenizer.get_mut("add_prefix_space") {
                *own = prefix.into();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
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
    fn markers_are_markup_and_ends_of_turns_are_not() {
        let mut json: Value = serde_json::from_str(&fixtures::byte_level()).unwrap();
        let ends =
            ["<|im_end|>", "<｜end▁of▁sentence｜>", "[e~[", "<|eot_id|>", "<|eom_id|>", "<|user|>", "</s>", "<|call|>"];
        let tokens = json["added_tokens"].as_array_mut().unwrap();
        let first = tokens[0]["id"].as_u64().unwrap() + 4;
        for (id, content) in (first..).zip(MARKUP.iter().chain(&ends).filter(|token| **token != "<think>")) {
            tokens.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}));
        }
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let is_markup = |token: &str| tokenizer.is_markup(tokenizer.token_id(token).unwrap());
        assert!(MARKUP.iter().all(|token| is_markup(token)));
        assert!(!ends.iter().any(|token| is_markup(token)));
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

    /// The byte-level fixture with one part exchanged.
    fn with(part: &str, value: Value) -> Result<Tokenizer, TextError> {
        let mut json: Value = serde_json::from_str(&fixtures::byte_level()).unwrap();
        json[part] = value;
        Tokenizer::from_json(json.to_string().as_bytes())
    }

    #[test]
    fn tokenizers_that_grow_text_or_never_end_are_stopped() {
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let text = |pattern: &str| json!({"String": pattern});
        let regex = |pattern: &str| json!({"Regex": pattern});
        let normalizers = |steps: Vec<Value>| json!({"type": "Sequence", "normalizers": steps});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        for (part, value) in [
            ("normalizer", normalizers(vec![replace(text("a"), "aa"); 24])),
            ("normalizer", replace(text("a"), &"b".repeat(1_000_000))),
            ("normalizer", replace(regex(""), &"b".repeat(1_000_000))),
            ("normalizer", normalizers(vec![json!({"type": "Prepend", "prepend": "x".repeat(60_000)}); 9])),
            ("normalizer", replace(regex("(a+)+$"), "x")),
            ("pre_tokenizer", split("(?:a*a*a*a*b)|a")),
            ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": vec![bytes; 40]})),
            ("decoder", json!({"type": "Sequence", "decoders": vec![replace(text("a"), "aa"); 24]})),
        ] {
            let outcome = with(part, value).and_then(|tokenizer| {
                tokenizer.check()?;
                tokenizer.encode(&("a".repeat(3000) + "!"), true)
            });
            let error = outcome.expect_err(part);
            assert!(matches!(error, TextError::Stopped { .. }), "{part}: {error}");
        }
    }

    #[test]
    fn tokenizers_larger_than_any_real_one_are_refused() {
        let template = |single: Vec<Value>| {
            json!({"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"X": {"id": "X", "ids": vec![1; 40], "tokens": vec!["x"; 40]}}})
        };
        let (token, body) =
            (json!({"SpecialToken": {"id": "X", "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}}));
        let nested = |leaf: Value| (0..20).fold(leaf, |inner, _| json!({"type": "Sequence", "normalizers": [inner]}));
        let added = json!({"id": 263, "content": "x".repeat(5 << 20), "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": true, "special": false});
        for (part, value) in [
            ("post_processor", template(vec![token.clone(), body.clone(), token.clone()])),
            ("post_processor", template(vec![body.clone(), body.clone()])),
            ("post_processor", template(vec![token])),
            ("post_processor", json!({"type": "Sequence", "processors": vec![template(vec![body]); 100]})),
            ("normalizer", nested(json!({"type": "NFC"}))),
            ("normalizer", json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 100]})),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            ("added_tokens", json!([added])),
        ] {
            let outcome = with(part, value);
            assert!(matches!(outcome, Err(TextError::UnsupportedTokenizer { .. })), "{part}: {outcome:?}");
        }
        let wide = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 1_000_000, "vocab": {"a": 0}});
        assert!(matches!(with("model", wide), Err(TextError::UnsupportedTokenizer { .. })));
    }

    #[test]
    fn messages_do_not_repeat_the_file() {
        for json in [
            json!({"version": "9".repeat(1_000_000), "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
            json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x".repeat(1_000_000), "y"]]}}),
            json!({"version": "1.0", "normalizer": {"type": "x".repeat(1_000_000)}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
        ] {
            let message = Tokenizer::from_json(json.to_string().as_bytes()).unwrap_err().to_string();
            assert!(message.len() < 1000, "{}", message.len());
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

//! The steps of a tokenizer between a text and its words, and between tokens and their text.
//!
//! All steps are the `tokenizers` crate's own. They are taken out of its sequences and run one by one, so that limits can
//! be checked between them. Steps that search for patterns of the file's author, which could run for ever, use a search
//! that can be stopped ([`super::limits`]).

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::tokenizer::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result,
};
use tokenizers::{Decoder, DecoderWrapper, SplitDelimiterBehavior};

use super::TextError;
use super::limits::{Cutting, Limits, Search, clip};

/// Deepest nesting of a step's description. Real ones are sequences of flat steps.
const MAX_NESTING: usize = 12;

/// Most steps of one part. Real ones have up to ten.
const MAX_STEPS: usize = 64;

/// Longest pattern, and most patterns, of one part. The longest in use has about 500 bytes, and no part has ten.
const MAX_PATTERN_BYTES: usize = 16 << 10;
const MAX_PATTERNS: usize = 32;

/// Longest replacement in the table of a precompiled normalizer. SentencePiece's own tables stay below.
const MAX_TABLE_ENTRY: usize = 64;

/// Reads a part of tokenizer.json.
pub(super) fn part<T: DeserializeOwned>(name: &str, value: &Value) -> std::result::Result<T, TextError> {
    if nesting(value) > MAX_NESTING {
        return Err(TextError::UnsupportedTokenizer { what: format!("a {name} nested more than {MAX_NESTING} deep") });
    }
    let (mut patterns, mut steps) = (0, 0);
    count(value, &mut patterns, &mut steps);
    if patterns > MAX_PATTERNS {
        let what = format!("a {name} with more than {MAX_PATTERNS} patterns, or one above {MAX_PATTERN_BYTES} bytes");
        return Err(TextError::UnsupportedTokenizer { what });
    }
    if steps > MAX_STEPS {
        return Err(TextError::UnsupportedTokenizer { what: format!("a {name} of more than {MAX_STEPS} steps") });
    }
    serde_json::from_value(value.clone()).map_err(|e| TextError::BadTokenizer { reason: clip(&format!("{name}: {e}")) })
}

fn nesting(value: &Value) -> usize {
    let deepest = match value {
        Value::Array(list) => list.iter().map(nesting).max(),
        Value::Object(map) => map.values().map(nesting).max(),
        _ => return 0,
    };
    1 + deepest.unwrap_or(0)
}

/// Counts patterns and steps. Compiling a pattern takes some hundred times its length, so a pattern that is too long counts as
/// too many.
fn count(value: &Value, patterns: &mut usize, steps: &mut usize) {
    match value {
        Value::Array(list) => list.iter().for_each(|inner| count(inner, patterns, steps)),
        Value::Object(map) => {
            let pattern = map.get("Regex").or(map.get("String")).and_then(Value::as_str);
            *patterns += pattern.map_or(0, |p| if p.len() > MAX_PATTERN_BYTES { MAX_PATTERNS + 1 } else { 1 });
            for (key, inner) in map {
                let list = inner.as_array().filter(|_| STEP_LISTS.contains(&key.as_str()));
                *steps += list.map_or(0, Vec::len);
                count(inner, patterns, steps);
            }
        }
        _ => {}
    }
}

/// The fields that hold the steps of a sequence.
const STEP_LISTS: [&str; 4] = ["normalizers", "pretokenizers", "decoders", "processors"];

/// A pattern and what replaces it.
#[derive(Debug)]
struct Replacing {
    search: Search,
    content: String,
}

impl Replacing {
    /// From the description of a `Replace`, whose fields the crate keeps to itself.
    fn of(step: &impl Serialize) -> std::result::Result<Self, TextError> {
        let bad = |reason: String| TextError::BadTokenizer { reason: clip(&reason) };
        let value = serde_json::to_value(step).map_err(|e| bad(e.to_string()))?;
        let pattern = &value["pattern"];
        let search = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
            (Some(text), _) => Search::new(text, true)?,
            (_, Some(regex)) => Search::new(regex, false)?,
            _ => return Err(bad("a `Replace` without a pattern".into())),
        };
        Ok(Self { search, content: value["content"].as_str().unwrap_or_default().to_owned() })
    }
}

/// What happens to a text before it is split.
#[derive(Debug, Default)]
pub(super) struct Normalization(Vec<NormalizationStep>);

#[derive(Debug)]
enum NormalizationStep {
    Replace(Replacing),
    Other(NormalizerWrapper),
}

impl Normalization {
    /// Reads the `normalizer` of a tokenizer.json.
    pub(super) fn read(value: &Value) -> std::result::Result<Self, TextError> {
        let mut steps = Vec::new();
        if !value.is_null() {
            check_tables(value)?;
            flatten_normalizer(part("normalizer", value)?, &mut steps)?;
        }
        Ok(Self(steps))
    }

    /// Whether it does anything.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Normalises a piece of text.
    pub(super) fn run(&self, text: &mut NormalizedString, limits: &Limits) -> Result<()> {
        for step in &self.0 {
            limits.check_time()?;
            match step {
                NormalizationStep::Replace(Replacing { search, content }) => {
                    let pattern = Cutting { search, limits, replacement: content.len(), invert: false };
                    text.replace(pattern, content)?;
                }
                NormalizationStep::Other(NormalizerWrapper::Prepend(step)) => {
                    limits.check_size(text.get().len().saturating_add(step.prepend.len()))?;
                    step.normalize(text)?;
                }
                NormalizationStep::Other(step) => step.normalize(text)?,
            }
            limits.check_size(text.get().len())?;
        }
        Ok(())
    }
}

fn flatten_normalizer(
    step: NormalizerWrapper,
    steps: &mut Vec<NormalizationStep>,
) -> std::result::Result<(), TextError> {
    match step {
        NormalizerWrapper::Sequence(inner) => inner.into_iter().try_for_each(|step| flatten_normalizer(step, steps))?,
        NormalizerWrapper::Replace(step) => steps.push(NormalizationStep::Replace(Replacing::of(&step)?)),
        step => steps.push(NormalizationStep::Other(step)),
    }
    Ok(())
}

/// Refuses precompiled tables of replacements that are longer than any real one, because the crate copies them
/// unchecked.
fn check_tables(value: &Value) -> std::result::Result<(), TextError> {
    if let Some(table) = value["precompiled_charsmap"].as_str() {
        let bytes = super::tiktoken::base64(table)
            .ok_or_else(|| TextError::BadTokenizer { reason: "a precompiled_charsmap is not in base 64".into() })?;
        // A length, a search tree of that length, and texts that end with zeros.
        let tree = bytes.first_chunk().map_or(0, |len| u32::from_le_bytes(*len) as usize);
        let texts = bytes.get(tree.saturating_add(4)..).unwrap_or_default();
        if texts.split(|&b| b == 0).any(|text| text.len() > MAX_TABLE_ENTRY) {
            let what = format!("a precompiled_charsmap with replacements above {MAX_TABLE_ENTRY} bytes");
            return Err(TextError::UnsupportedTokenizer { what });
        }
    }
    match value["normalizers"].as_array() {
        Some(inner) => inner.iter().try_for_each(check_tables),
        None => Ok(()),
    }
}

/// How a text is split into words.
#[derive(Debug, Default)]
pub(super) struct Splitting(Vec<SplittingStep>);

#[derive(Debug)]
enum SplittingStep {
    Split { search: Search, behavior: SplitDelimiterBehavior, invert: bool },
    Other(PreTokenizerWrapper),
}

impl Splitting {
    /// Reads the `pre_tokenizer` of a tokenizer.json.
    pub(super) fn read(value: &Value) -> std::result::Result<Self, TextError> {
        let mut steps = Vec::new();
        if !value.is_null() {
            flatten_pre_tokenizer(&part("pre_tokenizer", value)?, &mut steps)?;
        }
        Ok(Self(steps))
    }

    /// Splits all pieces that are not tokens yet.
    pub(super) fn run(&self, pieces: &mut PreTokenizedString, limits: &Limits) -> Result<()> {
        for step in &self.0 {
            limits.check_time()?;
            match step {
                SplittingStep::Split { search, behavior, invert } => pieces.split(|_, piece| {
                    piece.split(Cutting { search, limits, replacement: 0, invert: *invert }, *behavior)
                })?,
                SplittingStep::Other(step) => {
                    step.pre_tokenize(pieces)?;
                    // Some of these turn every byte into a longer character.
                    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
                    limits.check_size(splits.iter().map(|(text, _, _)| text.len()).sum())?;
                }
            }
        }
        Ok(())
    }
}

fn flatten_pre_tokenizer(
    step: &PreTokenizerWrapper,
    steps: &mut Vec<SplittingStep>,
) -> std::result::Result<(), TextError> {
    use tokenizers::pre_tokenizers::split::SplitPattern;
    match step {
        PreTokenizerWrapper::Sequence(inner) => {
            inner.as_ref().iter().try_for_each(|step| flatten_pre_tokenizer(step, steps))?;
        }
        PreTokenizerWrapper::Split(split) => {
            let search = match &split.pattern {
                SplitPattern::String(text) => Search::new(text, true)?,
                SplitPattern::Regex(regex) => Search::new(regex, false)?,
            };
            steps.push(SplittingStep::Split { search, behavior: split.behavior, invert: split.invert });
        }
        PreTokenizerWrapper::FixedLength(fixed) if fixed.length == 0 => {
            return Err(TextError::UnsupportedTokenizer { what: "words of fixed length 0".into() });
        }
        step => steps.push(SplittingStep::Other(step.clone())),
    }
    Ok(())
}

/// How tokens become text.
#[derive(Debug, Default)]
pub(super) struct Decoding {
    /// `None`: there is no decoder, and tokens are joined by spaces.
    steps: Option<Vec<DecodingStep>>,
}

#[derive(Debug)]
enum DecodingStep {
    Replace(Replacing),
    Other(DecoderWrapper),
}

impl Decoding {
    /// Reads the `decoder` of a tokenizer.json.
    pub(super) fn read(value: &Value) -> std::result::Result<Self, TextError> {
        if value.is_null() {
            return Ok(Self { steps: None });
        }
        let mut steps = Vec::new();
        flatten_decoder(&part("decoder", value)?, &mut steps)?;
        Ok(Self { steps: Some(steps) })
    }

    /// The text of tokens.
    pub(super) fn run(&self, mut tokens: Vec<String>) -> Result<String> {
        let bytes = |tokens: &[String]| tokens.iter().map(String::len).sum();
        let limits = Limits::of_tokens(bytes(&tokens));
        let Some(steps) = &self.steps else { return Ok(tokens.join(" ")) };
        for step in steps {
            limits.check_time()?;
            match step {
                DecodingStep::Replace(Replacing { search, content }) => {
                    let mut total = 0;
                    for token in &mut tokens {
                        let (mut text, mut done) = (String::new(), 0);
                        search.each(token, &limits, &mut |start, end| {
                            text.push_str(&token[done..start]);
                            text.push_str(content);
                            done = end;
                            limits.check_size(text.len())
                        })?;
                        text.push_str(&token[done..]);
                        total += text.len();
                        limits.check_size(total)?;
                        *token = text;
                    }
                }
                DecodingStep::Other(step) => tokens = step.decode_chain(tokens)?,
            }
            limits.check_size(bytes(&tokens))?;
        }
        Ok(tokens.concat())
    }
}

fn flatten_decoder(step: &DecoderWrapper, steps: &mut Vec<DecodingStep>) -> std::result::Result<(), TextError> {
    match step {
        DecoderWrapper::Sequence(inner) => {
            inner.get_decoders().iter().try_for_each(|step| flatten_decoder(step, steps))?;
        }
        DecoderWrapper::Replace(step) => steps.push(DecodingStep::Replace(Replacing::of(step)?)),
        step => steps.push(DecodingStep::Other(step.clone())),
    }
    Ok(())
}

//! Combines what the files beside tokenizer.json say about the tokenizer, as Hugging Face's transformers does.
//!
//! `AutoTokenizer.from_pretrained` builds one tokenizer from up to five files. These are the rules, in the order in which
//! they are applied here (`tokenization_utils_base.py` and `tokenization_utils_fast.py` of transformers 4.57, which agree
//! with 5.x except as said below):
//!
//! 1. `tokenizer_config.json` names tokens: `bos_token`, `eos_token` and so on, as text or as objects with `content`.
//! 2. If it lists `added_tokens_decoder`, those tokens are added. If it does not, `special_tokens_map.json` overrides the
//!    names, and the tokens of `added_tokens.json` are added.
//! 3. Tokens that have a name are special, and are added if no other rule has added them.
//! 4. `add_prefix_space` applies if the tokenizer's class supports it.
//! 5. Some classes write begin- and end-of-sequence tokens around every text by `add_bos_token` and `add_eos_token`, whatever
//!    the `post_processor` of tokenizer.json says.
//!
//! Version 5 has given up the fifth rule. But models were trained with it: DeepSeek-V3 and R1 say `LlamaTokenizerFast` and
//! `add_bos_token`, and have a `post_processor` that adds nothing. So this module keeps the rule, except for files that
//! version 5 has written (they have a `backend`). A class that is not named, but only follows from the model's type, counts
//! if the flag is present.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::TextError;
use super::chat::SpecialTokens;
use super::limits::clip;

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";
const CONFIG: &str = "config.json";

/// The fields that every tokenizer's class knows, in the order in which tokens are added.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What a class of transformers does in addition to what its files say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Class {
    /// Whether begin- and end-of-sequence tokens follow the flags, and whether there is a begin-of-sequence token unless the
    /// flag says otherwise.
    bos_by_default: Option<bool>,
    /// Names of tokens that apply unless the files give others.
    names: &'static [(&'static str, &'static str)],
    /// Whether white space follows SentencePiece, so that `add_prefix_space` replaces its rules.
    sentencepiece: bool,
}

impl Class {
    /// A class by its name, slow or fast.
    fn named(name: &str) -> Self {
        let plain = Class { bos_by_default: None, names: &[], sentencepiece: false };
        const LLAMA: &[(&str, &str)] = &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
        const GPT2: &[(&str, &str)] =
            &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")];
        const QWEN2: &[(&str, &str)] =
            &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")];
        const GEMMA: &[(&str, &str)] =
            &[("bos_token", "<bos>"), ("eos_token", "<eos>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];
        const COHERE: &[(&str, &str)] =
            &[("bos_token", "<BOS_TOKEN>"), ("eos_token", "<|END_OF_TURN_TOKEN|>"), ("unk_token", "<UNK>")];
        match name.strip_suffix("Fast").unwrap_or(name) {
            "LlamaTokenizer" | "CodeLlamaTokenizer" => {
                Class { bos_by_default: Some(true), names: LLAMA, sentencepiece: true }
            }
            "GemmaTokenizer" => Class { bos_by_default: Some(true), names: GEMMA, ..plain },
            "CohereTokenizer" => Class { bos_by_default: Some(true), names: COHERE, ..plain },
            "GPTNeoXTokenizer" => Class { bos_by_default: Some(false), names: GPT2, ..plain },
            "GPT2Tokenizer" => Class { names: GPT2, ..plain },
            "Qwen2Tokenizer" | "Qwen3_5Tokenizer" => Class { names: QWEN2, ..plain },
            _ => plain,
        }
    }

    /// The class that transformers 4 chooses for a type of model whose files name none.
    fn of_model(model_type: &str) -> &'static str {
        match model_type {
            "deepseek_v2" | "deepseek_v3" | "mixtral" | "phimoe" | "jamba" | "jetmoe" | "ernie4_5_moe" | "llama" => {
                "LlamaTokenizerFast"
            }
            "qwen2_moe" | "qwen3_moe" | "qwen3_next" | "qwen2" | "qwen3" => "Qwen2TokenizerFast",
            "gemma3" | "gemma3_text" => "GemmaTokenizerFast",
            "olmoe" => "GPTNeoXTokenizerFast",
            "minimax" | "dbrx" => "GPT2TokenizerFast",
            _ => "PreTrainedTokenizerFast",
        }
    }
}

/// A token that a file adds, and the id that the file gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) id: u32,
    pub(super) content: String,
    pub(super) file: &'static str,
}

/// The combined content of the files beside tokenizer.json.
#[derive(Debug, Default)]
pub(super) struct Effective {
    /// Tokens to add, in their order.
    pub(super) add: Vec<AddedToken>,
    /// Tokens to add if no other rule has added them.
    pub(super) add_missing: Vec<AddedToken>,
    /// The ids that files give to tokens.
    pub(super) listed: Vec<Listed>,
    /// The names.
    pub(super) names: SpecialTokens,
    /// Names to use if the vocabulary has the token.
    pub(super) default_names: Vec<(&'static str, &'static str)>,
    /// Whether a begin- and an end-of-sequence token are put around texts; `None`: as tokenizer.json says.
    pub(super) around: Option<(bool, bool)>,
    /// Whether the files ask explicitly for a begin-of-sequence token.
    pub(super) bos_is_asked_for: bool,
    /// Whether a space is put before texts, if a file says so.
    pub(super) prefix_space: Option<bool>,
    /// Whether that replaces the rules of white space: `Some(legacy)`.
    pub(super) sentencepiece: Option<bool>,
}

impl Effective {
    /// Reads the files. `own` are the added tokens of tokenizer.json, by their ids there; `None` if the tokenizer is made
    /// from other files, which name all tokens themselves.
    pub(super) fn read<'f>(
        file: &impl Fn(&str) -> Option<&'f [u8]>,
        own: Option<&[(u32, AddedToken)]>,
    ) -> Result<Self, TextError> {
        let config = named_fields(file)?;
        let mut effective = Self { names: SpecialTokens::of(&config), ..Self::default() };
        let special = named_tokens(&config)?;
        if let Some(own) = own {
            let named: HashSet<&str> = special.iter().map(|token| token.content.as_str()).collect();
            let decoder = listed_tokens(file, &config, own, &named)?;
            for (id, (mut token, file)) in decoder {
                token.special |= named.contains(token.content.as_str());
                if file != TOKENIZER {
                    effective.listed.push(Listed { id, content: token.content.clone(), file });
                }
                effective.add.push(token);
            }
            effective.add_missing = special;
        }
        effective.read_class(file, &config)?;
        Ok(effective)
    }

    fn read_class<'f>(
        &mut self,
        file: &impl Fn(&str) -> Option<&'f [u8]>,
        config: &Map<String, Value>,
    ) -> Result<(), TextError> {
        let model = object(file, CONFIG)?.unwrap_or_default();
        let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
        let stated = text(config, "tokenizer_class").or_else(|| text(&model, "tokenizer_class"));
        let of_model = || Class::of_model(model.get("model_type").and_then(Value::as_str).unwrap_or_default());
        let class = Class::named(stated.as_deref().unwrap_or_else(of_model));
        let flag = |key: &'static str| flag(config, key);
        let (bos, eos) = (flag("add_bos_token")?, flag("add_eos_token")?);
        let written_by_5 = config.contains_key("backend");
        if let Some(default) = class.bos_by_default
            && !written_by_5
            && (stated.is_some() || bos.is_some() || eos.is_some())
        {
            self.around = Some((bos.unwrap_or(default), eos.unwrap_or(false)));
            self.bos_is_asked_for = bos == Some(true);
        }
        self.default_names = class.names.iter().filter(|(name, _)| !config.contains_key(*name)).copied().collect();
        self.prefix_space = flag("add_prefix_space")?;
        if class.sentencepiece {
            self.sentencepiece = Some(flag("legacy")?.unwrap_or(true));
        }
        Ok(())
    }
}

/// The names that the files give to tokens, as text by `bos_token` and the like.
pub(super) fn names<'f>(file: &impl Fn(&str) -> Option<&'f [u8]>) -> Result<SpecialTokens, TextError> {
    Ok(SpecialTokens::of(&named_fields(file)?))
}

/// tokenizer_config.json, with the fields of special_tokens_map.json if those count.
fn named_fields<'f>(file: &impl Fn(&str) -> Option<&'f [u8]>) -> Result<Map<String, Value>, TextError> {
    let mut config = object(file, TOKENIZER_CONFIG)?.unwrap_or_default();
    if has_decoder(&config) {
        return Ok(config);
    }
    for (key, value) in object(file, SPECIAL_TOKENS_MAP)?.unwrap_or_default() {
        let old = config.get_mut(&key).and_then(Value::as_array_mut);
        match (old, value) {
            // Lists are merged, everything else is replaced.
            (Some(old), Value::Array(new)) => {
                // A token that is named twice counts once.
                old.extend(new);
            }
            (_, value) => {
                config.insert(key, value);
            }
        }
    }
    Ok(config)
}

fn has_decoder(config: &Map<String, Value>) -> bool {
    config.get("added_tokens_decoder").is_some_and(|listed| !listed.is_null())
}

/// Tokens that have names: they are special, and are added if no other rule adds them.
fn named_tokens(config: &Map<String, Value>) -> Result<Vec<AddedToken>, TextError> {
    let (mut tokens, mut seen) = (Vec::new(), HashSet::new());
    let mut push = |field: &'static str, value: &Value| {
        let Some(mut token) = token(value) else {
            return match value {
                Value::Null => Ok(()),
                other => Err(bad_field(TOKENIZER_CONFIG, field, "the text of a token", other)),
            };
        };
        token.special = true;
        if !token.content.is_empty() && seen.insert(token.content.clone()) {
            tokens.push(token);
        }
        Ok(())
    };
    for name in NAMES {
        push(name, config.get(name).unwrap_or(&Value::Null))?;
    }
    for field in ["additional_special_tokens", "extra_special_tokens"] {
        match config.get(field) {
            Some(Value::Array(list)) => list.iter().try_for_each(|value| push(field, value))?,
            Some(Value::Object(map)) => map.values().try_for_each(|value| push(field, value))?,
            _ => {}
        }
    }
    Ok(tokens)
}

/// Tokens by their ids, with the file that lists each.
fn listed_tokens<'f>(
    file: &impl Fn(&str) -> Option<&'f [u8]>,
    config: &Map<String, Value>,
    own: &[(u32, AddedToken)],
    special: &HashSet<&str>,
) -> Result<BTreeMap<u32, (AddedToken, &'static str)>, TextError> {
    let mut tokens = BTreeMap::new();
    if has_decoder(config) {
        let field = "added_tokens_decoder";
        let listed = config.get(field).and_then(Value::as_object);
        let bad = |found: &Value| bad_field(TOKENIZER_CONFIG, field, "an object of tokens by their ids", found);
        for (id, value) in listed.ok_or_else(|| bad(&config[field]))? {
            let id: u32 = id.parse().map_err(|_| bad(&Value::from(id.as_str())))?;
            let token = token(value).filter(|_| value.is_object()).ok_or_else(|| bad(value))?;
            tokens.insert(id, (token, TOKENIZER_CONFIG));
        }
        return Ok(tokens);
    }
    for (content, id) in object(file, ADDED_TOKENS)?.unwrap_or_default() {
        let bad = || bad_field(ADDED_TOKENS, "an entry", "a token and its id", &id);
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(bad)?;
        let is_special = special.contains(content.as_str());
        let token = AddedToken::from(content, is_special);
        if let Some((other, _)) = tokens.insert(id, (token, ADDED_TOKENS)) {
            return Err(contradiction(ADDED_TOKENS, &other.content, id, ADDED_TOKENS));
        }
    }
    for (id, token) in own {
        if let Some((other, file)) = tokens.insert(*id, (token.clone(), TOKENIZER))
            && other.content != token.content
        {
            return Err(contradiction(file, &other.content, *id, TOKENIZER));
        }
    }
    Ok(tokens)
}

/// The error for two tokens of one id.
fn contradiction(file: &'static str, token: &str, id: u32, other: &'static str) -> TextError {
    TextError::TokenContradiction {
        file,
        token: clip(token),
        id,
        reason: format!("which {other} gives to another token"),
    }
}

/// A token as files write it: its text, or an object with flags. The flags' defaults are those of Python's
/// `AddedToken`.
fn token(value: &Value) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, true));
    }
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    Some(AddedToken {
        content: value.get("content")?.as_str()?.to_owned(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}

fn flag(config: &Map<String, Value>, key: &'static str) -> Result<Option<bool>, TextError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(bad_field(TOKENIZER_CONFIG, key, "true or false", other)),
    }
}

/// A file of the checkpoint that is a JSON object.
pub(super) fn object<'f>(
    file: &impl Fn(&str) -> Option<&'f [u8]>,
    name: &'static str,
) -> Result<Option<Map<String, Value>>, TextError> {
    let Some(bytes) = file(name) else { return Ok(None) };
    let object = sluice_format::json::from_slice(bytes);
    object.map(Some).map_err(|e| TextError::BadConfig { file: name, reason: clip(&e.to_string()) })
}

fn bad_field(file: &'static str, field: &'static str, expected: &'static str, found: &Value) -> TextError {
    let mut text = found.to_string();
    if let Some((at, _)) = text.char_indices().nth(60) {
        text.truncate(at);
        text.push('…');
    }
    TextError::BadConfigField { file, field, expected, found: text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tokenizer, fixtures};
    use serde_json::json;

    /// The tokenizer of the byte-level fixture, whose last added token has the id 266, and of these files.
    fn find(files: &[(&str, Value)]) -> Result<Tokenizer, TextError> {
        let tokenizer = fixtures::byte_level().into_bytes();
        let mut all = vec![(TOKENIZER, tokenizer)];
        all.extend(files.iter().map(|(name, value)| (*name, value.to_string().into_bytes())));
        let file = |name: &str| all.iter().rev().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.as_slice());
        Tokenizer::find(file).map(|found| found.expect("a tokenizer"))
    }

    #[test]
    fn contradictions_name_the_files() {
        let refused = |files: &[(&str, Value)], words: &[&str]| {
            let error = find(files).unwrap_err();
            assert!(matches!(error, TextError::TokenContradiction { .. }), "{error}");
            let message = error.to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        let decoder = |id: &str, content: &str| json!({"added_tokens_decoder": {(id): {"content": content}}});
        refused(&[(TOKENIZER_CONFIG, decoder("5", "<|end|>"))], &[TOKENIZER_CONFIG, "<|end|>", "id 5", TOKENIZER]);
        refused(&[(TOKENIZER_CONFIG, decoder("300", "<new>"))], &[TOKENIZER_CONFIG, "<new>", "300", "267"]);
        refused(&[(ADDED_TOKENS, json!({"<new>": 263}))], &[ADDED_TOKENS, "<new>", "263", TOKENIZER]);
        refused(&[(ADDED_TOKENS, json!({"<new>": 270, "<other>": 270}))], &[ADDED_TOKENS, "270"]);
        // The next free id is no contradiction.
        let tokenizer = find(&[(TOKENIZER_CONFIG, decoder("267", "<new>"))]).unwrap();
        assert_eq!(tokenizer.encode("<new>", false).unwrap(), [267]);
    }

    #[test]
    fn flags_around_texts_follow_the_class() {
        let before = |config: Value, model: Value| {
            let files = [(TOKENIZER_CONFIG, config), (CONFIG, model)];
            find(&files).map(|tokenizer| tokenizer.encode("h", true).unwrap().len() - 1)
        };
        let bos = |more: Value| {
            let mut config = json!({"bos_token": "<|end|>", "eos_token": "<|end|>"});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        let deepseek = || json!({"model_type": "deepseek_v3"});
        let llama = "LlamaTokenizerFast";
        assert_eq!(before(bos(json!({"tokenizer_class": llama})), json!({})).unwrap(), 1);
        assert_eq!(before(bos(json!({})), json!({"tokenizer_class": llama})).unwrap(), 1);
        assert_eq!(before(bos(json!({"tokenizer_class": llama, "add_bos_token": false})), json!({})).unwrap(), 0);
        assert_eq!(before(bos(json!({"tokenizer_class": llama, "add_eos_token": true})), json!({})).unwrap(), 2);
        // A class that follows from the model's type counts where a flag does.
        assert_eq!(before(bos(json!({})), deepseek()).unwrap(), 0);
        assert_eq!(before(bos(json!({"add_bos_token": true})), deepseek()).unwrap(), 1);
        // Other classes, and files by version 5, keep to tokenizer.json.
        let other = json!({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": true});
        assert_eq!(before(bos(other), deepseek()).unwrap(), 0);
        let by_5 = json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "backend": "tokenizers"});
        assert_eq!(before(bos(by_5), deepseek()).unwrap(), 0);
        // Asked for explicitly, but there is none.
        let missing = json!({"tokenizer_class": llama, "add_bos_token": true});
        let error = before(missing, json!({})).unwrap_err();
        assert!(matches!(error, TextError::BadConfigField { field: "bos_token", .. }), "{error}");
    }

    #[test]
    fn python_s_infinity_does_no_harm() {
        let json = fixtures::byte_level();
        let config: &[u8] = br#"{"model_max_length": Infinity, "eos_token": "<|end|>"}"#;
        let file = |name: &str| match name {
            TOKENIZER => Some(json.as_bytes()),
            TOKENIZER_CONFIG => Some(config),
            _ => None,
        };
        let tokenizer = Tokenizer::find(file).unwrap().unwrap();
        assert_eq!(tokenizer.end_token(), tokenizer.token_id("<|end|>"));
    }

    #[test]
    fn nonsense_is_named_and_short() {
        for (name, value) in [
            (TOKENIZER_CONFIG, json!(["x".repeat(100_000)])),
            (TOKENIZER_CONFIG, json!({"bos_token": ["x".repeat(100_000)]})),
            (TOKENIZER_CONFIG, json!({"added_tokens_decoder": {("x".repeat(100_000)): {"content": "a"}}})),
            (TOKENIZER_CONFIG, json!({"added_tokens_decoder": {"1": "a"}})),
            (TOKENIZER_CONFIG, json!({"added_tokens_decoder": 5})),
            (TOKENIZER_CONFIG, json!({"add_prefix_space": "yes"})),
            (ADDED_TOKENS, json!({"a": -1})),
            (SPECIAL_TOKENS_MAP, json!({"eos_token": 5})),
        ] {
            let message = find(&[(name, value)]).unwrap_err().to_string();
            assert!(message.len() < 1000, "{}", message.len());
        }
    }
}

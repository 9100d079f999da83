//! Tokenizer files: `tokenizer.json` and what lies beside it. Texts are encoded, decoded, streamed, and a conversation is
//! rendered with the template that the files have.
//!
//! An input is a JSON object of files by name, `{"tokenizer.json": {…}, "tokenizer_config.json": {…}}`; one that is a string
//! is the file's text. Anything else is `tokenizer.json` itself.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use sluice_text::{ChatTemplate, Detokenizer, GenerationDefaults, Special, Tokenizer};

use super::{Seeds, fixture, template};

#[path = "../../../runtime/text/src/fixtures.rs"]
#[allow(dead_code, reason = "not every fixture is a seed")]
mod fixtures;

const TEXTS: [&str; 6] = [
    "",
    "hello world",
    "  Two  spaces,\ttabs\r\nand lines\n\n  <s></s><|end|><think> two words ",
    "中文 and 🦀, Ünïcödé ﬁ \u{1112}\u{1161}\u{11ab} e\u{301}",
    "12345678901234567890 don't we'LL __init__ ((((((((( ]]]]",
    "\u{0}\u{feff}\u{fffd}\u{200d}\u{10ffff}",
];

fn files(input: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let bundle = serde_json::from_slice::<Map<String, Value>>(input).ok();
    match bundle.filter(|files| files.keys().any(|name| name.contains(".json") || name.contains(".model"))) {
        Some(files) => {
            let bytes = |file: Value| match file {
                Value::String(text) => text.into_bytes(),
                json => json.to_string().into_bytes(),
            };
            files.into_iter().map(|(name, file)| (name, bytes(file))).collect()
        }
        None => BTreeMap::from([("tokenizer.json".to_owned(), input.to_vec())]),
    }
}

pub(crate) fn run(input: &[u8], _folder: &Path) {
    let files = files(input);
    let file = |name: &str| files.get(name).map(Vec::as_slice);
    if let Err(error) = GenerationDefaults::parse(file("generation_config.json"), file("config.json")) {
        drop(error.to_string());
    }
    let template = match ChatTemplate::find(file) {
        Ok(template) => template,
        Err(error) => return drop(error.to_string()),
    };
    let tokenizer = match Tokenizer::find(file) {
        Ok(Some(tokenizer)) => tokenizer,
        Ok(None) => return,
        Err(error) => return drop(error.to_string()),
    };
    for text in TEXTS {
        for add_special in [false, true] {
            match tokenizer.encode(text, add_special) {
                Ok(ids) => decode(&tokenizer, &ids),
                Err(error) => drop(error.to_string()),
            }
        }
        let middle = text.len() / 3..text.len() / 2;
        if let Err(error) = tokenizer.encode_untrusted(text, &[middle]) {
            drop(error.to_string());
        }
    }
    let some: Vec<u32> = (0..tokenizer.vocab_size() as u32).step_by(1 + tokenizer.vocab_size() / 100).collect();
    decode(&tokenizer, &some);
    if let Some(template) = template {
        template::render(&template, &tokenizer);
    }
}

/// All at once, and token by token as `run` prints them.
fn decode(tokenizer: &Tokenizer, ids: &[u32]) {
    for special in [Special::Shown, Special::Markup, Special::Hidden] {
        match tokenizer.decode(ids, special == Special::Hidden) {
            Ok(text) => drop(text),
            Err(error) => drop(error.to_string()),
        }
        let mut stream = Detokenizer::with_special(tokenizer, special);
        for &id in ids.iter().take(200) {
            drop((tokenizer.token_text(id), stream.push(id).map_err(|error| error.to_string())));
        }
        drop(stream.finish().map_err(|error| error.to_string()));
    }
}

/// Parts of tokenizers that the seeds do not have, for mutations to put in.
#[allow(dead_code, reason = "the test that replays inputs mutates none")]
pub(crate) fn parts() -> Vec<Value> {
    let parts = json!([
        {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        {"type": "Strip", "strip_left": true, "strip_right": true}, {"type": "StripAccents"}, {"type": "NFC"},
        {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "Nmt"}, {"type": "ByteLevel"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}, {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"Regex": "\\s+|(a*)*b"}, "content": "aa"},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        {"type": "BertPreTokenizer"}, {"type": "Whitespace"}, {"type": "WhitespaceSplit"},
        {"type": "CharDelimiterSplit", "delimiter": "x"}, {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Digits", "individual_digits": true}, {"type": "UnicodeScripts"},
        {"type": "FixedLength", "length": 3},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}{1,3}"}, "behavior": "MergedWithPrevious", "invert": true},
        {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": true,
            "trim_offsets": true, "use_regex": false}]},
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true, "add_prefix_space": true},
        {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false,
            "use_regex": true}]},
        {"type": "WordPiece", "prefix": "##", "cleanup": true}, {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}, {"type": "Fuse"},
        {"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 1},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "a": 1, "##b": 2, "hello": 3}},
        {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "hello": 1, "world": 2}},
        {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["a", -1.5], ["▁", -2.0],
            ["hello", -3.0]]},
        {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<pad>"},
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    ]);
    parts.as_array().cloned().unwrap_or_default()
}

/// A vocabulary in tiktoken's form: the single bytes, and a few words.
fn ranks() -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |n: u8| char::from(DIGITS[usize::from(n & 63)]);
    let line = |byte: u8| format!("{}{}== {byte}\n", digit(byte >> 2), digit(byte << 4));
    let bytes: String = (0..=255).map(line).collect();
    bytes + "aGU= 256\nbGw= 257\naGVsbA== 258\naGVsbG8= 259\n"
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    let parse = |json: &str| serde_json::from_str::<Value>(json).expect("the fixture is JSON");
    let added = json!({"<|end|>": 263, "<extra>": 400});
    let map = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "unk_token": "<unk>"});
    let config = json!({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "add_eos_token": false, "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false}, "clean_up_tokenization_spaces": false, "model_max_length": 4096, "legacy": true,
        "added_tokens_decoder": {"1": {"content": "<s>", "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false, "special": true}, "300": {"content": "<|tool|>", "lstrip": true, "normalized": true,
            "rstrip": true, "single_word": true, "special": false}},
        "chat_template": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    });
    let generation =
        json!({"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_k": 20});
    let bundles = [
        (
            "byte-level",
            json!({"tokenizer.json": parse(&fixtures::byte_level()), "added_tokens.json": added,
            "special_tokens_map.json": map, "generation_config.json": generation}),
        ),
        (
            "sentencepiece",
            json!({"tokenizer.json": parse(&fixtures::sentencepiece()), "tokenizer_config.json": config,
            "generation_config.json": generation, "config.json": {"eos_token_id": 2}}),
        ),
        (
            "tiktoken",
            json!({"tiktoken.model": ranks(), "tokenizer_config.json": {"added_tokens_decoder":
            {"260": {"content": "[BOS]", "special": true}}, "bos_token": "[BOS]"}}),
        ),
    ];
    let mut seeds: Seeds = bundles.iter().map(|(name, b)| ((*name).to_owned(), b.to_string().into_bytes())).collect();
    seeds.push(("demo".to_owned(), fixture!("demo-model/tokenizer.json").to_vec()));
    // Every other kind of model, pre-tokenizer, normalizer and decoder, each in a small tokenizer of its own.
    let word = json!({"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "hello": 1, "world": 2}});
    for (i, part) in parts().into_iter().enumerate() {
        for place in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"] {
            let mut json = json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
                "post_processor": null, "decoder": null, "model": word});
            json[place] = part.clone();
            let file = json.to_string().into_bytes();
            if Tokenizer::from_json(&file).is_ok() {
                seeds.push((format!("{place}-{i}"), file));
            }
        }
    }
    seeds
}

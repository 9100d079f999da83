//! Tiny tokenizers for tests, built in code so that every byte of them is explained here.

use serde_json::{Map, Value, json};

/// The GPT-2 alphabet: the printable character that stands for each byte. Written out here from
/// its definition, independently of the code under test.
fn gpt2_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": special})
}

/// A byte-level BPE tokenizer: all 256 bytes, a few merges (one of them ends inside a UTF-8
/// sequence), special and ordinary added tokens, one of which the byte alphabet cannot spell.
pub(crate) fn byte_level() -> String {
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        vocab.insert(gpt2_char(byte).to_string(), Value::from(vocab.len()));
    }
    let bytes = |b: &[u8]| b.iter().map(|&b| gpt2_char(b)).collect::<String>();
    let mut merges = Vec::new();
    for (left, right) in [
        (&b"h"[..], &b"e"[..]),
        (b"l", b"l"),
        (b"he", b"ll"),
        (b"hell", b"o"),
        (b" ", b"w"),
        (&[0xe4], &[0xb8]),
        (&[0xad], b"!"),
    ] {
        let (left, right) = (bytes(left), bytes(right));
        vocab.insert(format!("{left}{right}"), Value::from(vocab.len()));
        merges.push(json!([left, right]));
    }
    let next = vocab.len();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            added(next, "<|end|>", true),
            added(next + 1, "<think>", false),
            added(next + 2, "two words", false),
            added(next + 3, "\u{fffd}", false),
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true,
            "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
    .to_string()
}

/// A tokenizer in the manner of Llama-2 and Mixtral: SentencePiece's `▁` for spaces, byte
/// fallback, and a decoder that strips the first space.
pub(crate) fn sentencepiece() -> String {
    let mut vocab = Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.into(), Value::from(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), Value::from(vocab.len()));
    }
    for token in [
        "▁", "h", "e", "l", "o", "w", "r", "d", "a", "中", "he", "ll", "hell", "hello", "▁hello", "▁w", "▁▁",
        "\u{fffd}",
    ] {
        vocab.insert(token.into(), Value::from(vocab.len()));
    }
    let merges = json!([["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["▁", "hello"], ["▁", "w"], ["▁", "▁"]]);
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
    .to_string()
}

/// `json` with another decoder.
pub(crate) fn with_decoder(json: &str, decoder: Value) -> String {
    let mut value: Value = serde_json::from_str(json).unwrap();
    value["decoder"] = decoder;
    value.to_string()
}

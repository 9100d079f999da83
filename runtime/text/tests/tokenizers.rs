//! Token ids of published kinds of tokenizer, compared with Hugging Face's transformers.
//!
//! `tests/fixtures/tokenizers` has the files, the ids and the script that made them. Where versions 4 and 5 of transformers
//! differ, version 4's are expected: `docs/USAGE.md` says why.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use sluice_text::Tokenizer;

/// Ids of one text after the other.
type Ids = Vec<Vec<u32>>;

#[derive(Deserialize)]
struct Goldens {
    texts: Vec<String>,
    variant_texts: Vec<String>,
    kinds: BTreeMap<String, Kind>,
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "4")]
    ids: Ids,
    decoded: Option<Vec<String>>,
}

/// The files of a kind, some of them others.
#[derive(Deserialize)]
struct Variant {
    name: String,
    base: String,
    files: BTreeMap<String, Value>,
    #[serde(rename = "4")]
    by_4: Option<Ids>,
    #[serde(rename = "5")]
    by_5: Option<Ids>,
    #[serde(rename = "shown4")]
    shown_by_4: Option<Vec<String>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers")
}

fn goldens() -> Goldens {
    serde_json::from_slice(&fs::read(fixtures().join("goldens.json")).unwrap()).unwrap()
}

/// The files of a folder, by their names.
fn files(kind: &str) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(fixtures().join(kind)).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn tokenizer(files: &BTreeMap<String, Vec<u8>>) -> Tokenizer {
    Tokenizer::find(|name| files.get(name).map(Vec::as_slice)).unwrap().expect("a tokenizer")
}

#[test]
fn ids_and_text_of_published_kinds_are_transformers() {
    let goldens = goldens();
    assert!(goldens.texts.len() >= 200);
    assert_eq!(goldens.kinds.len(), 7);
    for (name, kind) in &goldens.kinds {
        let tokenizer = tokenizer(&files(name));
        tokenizer.check().unwrap();
        assert_eq!(kind.ids.len(), goldens.texts.len());
        for (i, (text, want)) in goldens.texts.iter().zip(&kind.ids).enumerate() {
            assert_eq!(&tokenizer.encode(text, true).unwrap(), want, "{name}: {text:?}");
            if let Some(decoded) = &kind.decoded {
                assert_eq!(tokenizer.decode(want, true).unwrap(), decoded[i], "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn files_beside_tokenizer_json_count_as_for_transformers() {
    let goldens = goldens();
    for variant in &goldens.variants {
        let mut files = files(&variant.base);
        for (name, value) in &variant.files {
            let mut value = value.clone();
            if name == "tokenizer.json" {
                // Only the parts that differ are stored.
                let mut whole: Value = serde_json::from_slice(&files[name]).unwrap();
                whole.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
                value = whole;
            }
            files.insert(name.clone(), serde_json::to_vec(&value).unwrap());
        }
        let tokenizer = tokenizer(&files);
        let name = &variant.name;
        // Version 4 builds some of these only with SentencePiece at hand.
        let want = variant.by_4.as_ref().or(variant.by_5.as_ref()).expect("ids");
        for (i, (text, want)) in goldens.variant_texts.iter().zip(want).enumerate() {
            assert_eq!(&tokenizer.encode(text, true).unwrap(), want, "{name}: {text:?}");
            if let Some(shown) = &variant.shown_by_4 {
                assert_eq!(tokenizer.decode(want, true).unwrap(), shown[i], "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn the_bytes_of_tokens_put_together_are_their_text() {
    let goldens = goldens();
    for (name, kind) in &goldens.kinds {
        let tokenizer = tokenizer(&files(name));
        let bytes = |ids: &[u32]| -> Vec<u8> {
            ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap().expect("a token")).collect()
        };
        // Some tokenizers drop a space at the beginning of a text.
        let before = tokenizer.encode("x", false).unwrap();
        let start = tokenizer.decode(&before, false).unwrap().len();
        for ids in &kind.ids {
            let all = [before.as_slice(), ids].concat();
            let text = tokenizer.decode(&all, false).unwrap();
            assert_eq!(String::from_utf8_lossy(&bytes(ids)), text[start..], "{name}: {ids:?}");
        }
        let known = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.token_text(id).is_some());
        for id in known {
            let text = tokenizer.decode(&[before.as_slice(), &[id]].concat(), false).unwrap();
            assert_eq!(String::from_utf8_lossy(&bytes(&[id])), text[start..], "{name}: token {id}");
        }
        assert_eq!(tokenizer.token_bytes(u32::MAX), Ok(None));
    }
}

#[test]
fn end_tokens_are_those_of_the_files() {
    for (kind, end) in [
        ("qwen2", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("deepseek", "<｜end▁of▁sentence｜>"),
        ("mixtral", "</s>"),
        ("gpt_oss", "<|return|>"),
        ("kimi", "[EOS]"),
    ] {
        let tokenizer = tokenizer(&files(kind));
        assert_eq!(tokenizer.end_token(), tokenizer.token_id(end), "{kind}");
        assert!(tokenizer.end_token().is_some());
    }
}

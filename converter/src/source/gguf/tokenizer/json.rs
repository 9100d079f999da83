//! The structure of tokenizer.json.

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::vocabulary::{Kind, Vocabulary};

/// The whole file.
#[derive(Serialize)]
pub(super) struct Tokenizer<'v> {
    pub(super) version: &'static str,
    pub(super) truncation: Value,
    pub(super) padding: Value,
    pub(super) added_tokens: Vec<Value>,
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) post_processor: Value,
    pub(super) decoder: Value,
    pub(super) model: Model<'v>,
}

/// Byte-pair encoding.
#[derive(Serialize)]
pub(super) struct Model<'v> {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) dropout: Value,
    pub(super) unk_token: Option<&'v str>,
    pub(super) continuing_subword_prefix: Value,
    pub(super) end_of_word_suffix: Value,
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
    pub(super) vocab: Vocab<'v>,
    pub(super) merges: Merges<'v>,
}

impl<'v> Model<'v> {
    /// A model without an unknown token, with the first tokens of a vocabulary.
    pub(super) fn new(vocabulary: &'v Vocabulary, count: u32, merges: Vec<(&'v str, &'v str)>) -> Self {
        Model {
            kind: "BPE",
            dropout: Value::Null,
            unk_token: None,
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: Vocab { vocabulary, count },
            merges: Merges(merges),
        }
    }
}

/// The first tokens of a vocabulary, with their ids.
pub(super) struct Vocab<'v> {
    vocabulary: &'v Vocabulary,
    count: u32,
}

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.count as usize))?;
        for (id, token) in self.vocabulary.iter().take(self.count as usize) {
            map.serialize_entry(&token.text, &id)?;
        }
        map.end()
    }
}

/// Pairs of tokens that become one, in order of priority.
pub(super) struct Merges<'v>(Vec<(&'v str, &'v str)>);

impl Serialize for Merges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for pair in &self.0 {
            list.serialize_element(pair)?;
        }
        list.end()
    }
}

impl<'v> Tokenizer<'v> {
    /// A tokenizer with the vocabulary's added tokens and the tokens that it puts around texts.
    pub(super) fn new(vocabulary: &Vocabulary, model: Model<'v>) -> Self {
        Tokenizer {
            version: "1.0",
            truncation: Value::Null,
            padding: Value::Null,
            added_tokens: added_tokens(vocabulary),
            normalizer: Value::Null,
            pre_tokenizer: Value::Null,
            post_processor: post_processor(vocabulary),
            decoder: Value::Null,
            model,
        }
    }

    /// The bytes of the file.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts, numbers and lists can be written")
    }
}

/// An added token without its id; its only property is whether it is special.
pub(super) fn added_token(content: &str, special: bool) -> Value {
    json!({"content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special})
}

fn added_tokens(vocabulary: &Vocabulary) -> Vec<Value> {
    let added = vocabulary.iter().filter(|(id, token)| token.kind.is_added() && !vocabulary.is_padding(*id));
    let entry = |id: u32, content: &str, special: bool| {
        let mut entry = added_token(content, special);
        entry["id"] = id.into();
        entry
    };
    added.map(|(id, token)| entry(id, &token.text, token.kind != Kind::UserDefined)).collect()
}

fn post_processor(vocabulary: &Vocabulary) -> Value {
    let bos = vocabulary.bos.filter(|_| vocabulary.add_bos);
    let eos = vocabulary.eos.filter(|_| vocabulary.add_eos);
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let text = |id: u32| vocabulary.token(id).text.as_str();
    let special = |id: u32| json!({"SpecialToken": {"id": text(id), "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let around =
        |inner: Value| -> Vec<Value> { bos.map(special).into_iter().chain([inner]).chain(eos.map(special)).collect() };
    let single = around(sequence("A"));
    let pair = [single.clone(), around(sequence("B"))].concat();
    let tokens: serde_json::Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|id| (text(id).to_owned(), json!({"id": text(id), "ids": [id], "tokens": [text(id)]})))
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

//! The tokenizer's other files: names of tokens, chat templates, and what ends a generation.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::super::metadata::{self, Metadata, Problem};
use super::json::added_token;
use super::pre::PRE;
use super::tiktoken;
use super::vocabulary::{Kind, Vocabulary};

const TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATES: &str = "tokenizer.chat_templates";

/// tokenizer_config.json.
pub(super) fn tokenizer_config(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Vec<u8>, Problem> {
    let mut config = Map::new();
    let text = |id: u32| Value::from(vocabulary.token(id).text.as_str());
    // Not the class of the checkpoint, which would add rules of its own to the explicit ones.
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("add_bos_token".into(), vocabulary.add_bos.into());
    config.insert("add_eos_token".into(), vocabulary.add_eos.into());
    for (name, id) in [("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos)] {
        if let Some(id) = id {
            config.insert(name.into(), text(id));
        }
    }
    let added = |id: u32| Some(id).filter(|&id| vocabulary.token(id).kind.is_added());
    if let Some(id) = vocabulary.unknown.and_then(added) {
        config.insert("unk_token".into(), text(id));
    }
    for (name, key) in [
        ("pad_token", "tokenizer.ggml.padding_token_id"),
        ("sep_token", "tokenizer.ggml.seperator_token_id"),
        ("cls_token", "tokenizer.ggml.cls_token_id"),
        ("mask_token", "tokenizer.ggml.mask_token_id"),
    ] {
        // A name makes a token special. Some files name an ordinary word here, and nothing needs these names.
        let Some(metadata::Value::Integer(id)) = metadata.get(key) else { continue };
        let id = u32::try_from(*id).ok().filter(|&id| (id as usize) < vocabulary.tokens.len());
        if let Some(id) = id.and_then(added) {
            config.insert(name.into(), text(id));
        }
    }
    if metadata.text(PRE)? == Some(tiktoken::NAME) {
        config.insert("added_tokens_decoder".into(), listed(vocabulary));
    }
    if let Some(template) = templates(metadata)? {
        config.insert("chat_template".into(), template);
    }
    Ok(Value::Object(config).to_string().into_bytes())
}

/// The added tokens by their ids, if no tokenizer.json beside the file lists them.
fn listed(vocabulary: &Vocabulary) -> Value {
    let added = vocabulary.iter().filter(|(id, token)| token.kind.is_added() && !vocabulary.is_padding(*id));
    let entry = |kind: Kind, text: &str| added_token(text, kind != Kind::UserDefined);
    added.map(|(id, token)| (id.to_string(), entry(token.kind, &token.text))).collect::<Map<_, _>>().into()
}

/// The chat template, or a list of named ones if there are several.
fn templates(metadata: &Metadata) -> Result<Option<Value>, Problem> {
    let default = metadata.text(TEMPLATE)?;
    let mut list: Vec<Value> =
        default.iter().map(|template| json!({"name": "default", "template": template})).collect();
    let names = metadata.strings(TEMPLATES)?;
    for name in names.iter().flat_map(|names| names.iter()) {
        let name = std::str::from_utf8(name).map_err(|_| Problem::new(TEMPLATES, "has a name that is not UTF-8"))?;
        let key = format!("{TEMPLATE}.{name}");
        let missing = || Problem::new(&key, format!("is missing, and `{TEMPLATES}` names it"));
        list.push(json!({"name": name, "template": metadata.text(&key)?.ok_or_else(missing)?}));
    }
    Ok(match default {
        Some(template) if list.len() == 1 => Some(template.into()),
        _ => Some(list).filter(|list| !list.is_empty()).map(Value::from),
    })
}

/// Spellings of tokens that end a turn, if a file does not say which do. This is llama.cpp's list without tokens that this
/// program's models never write.
const ENDS: [&str; 16] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// generation_config.json: the tokens that end a generation, and the authors' recommended sampling.
pub(super) fn generation_config(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Vec<u8>, Problem> {
    let mut config = Map::new();
    if let Some(bos) = vocabulary.bos {
        config.insert("bos_token_id".into(), bos.into());
    }
    let ends = ends(metadata, vocabulary)?;
    if !ends.is_empty() {
        config.insert("eos_token_id".into(), ends.into_iter().collect());
    }
    for (name, key) in [
        ("temperature", "general.sampling.temp"),
        ("top_p", "general.sampling.top_p"),
        ("min_p", "general.sampling.min_p"),
        ("repetition_penalty", "general.sampling.penalty_repeat"),
    ] {
        if let Some(value) = metadata.float(key)? {
            // The file has an f32; its shortest spelling is what the authors wrote.
            let value: Option<f64> = (value as f32).to_string().parse().ok();
            config.insert(name.into(), value.into());
        }
    }
    if let Some(top_k) = metadata.float("general.sampling.top_k")? {
        config.insert("top_k".into(), (top_k as i64).into());
    }
    Ok(Value::Object(config).to_string().into_bytes())
}

fn ends(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<BTreeSet<u32>, Problem> {
    let mut ends: BTreeSet<u32> = vocabulary.eos.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(vocabulary.id_under(metadata, key)?);
    }
    let control = |text: &&str| vocabulary.id(text).filter(|&id| vocabulary.token(id).kind == Kind::Control);
    ends.extend(ENDS.iter().filter_map(control));
    // In OpenAI's harmony format, and in others with special calls, `<|end|>` ends one of several messages.
    let has = |text: &str| control(&text).is_some();
    let among_several = (has("<|return|>") && has("<|call|>")) || (has("<|flush|>") && has("<|calls|>"));
    if among_several && let Some(end) = vocabulary.id("<|end|>").filter(|&id| Some(id) != vocabulary.eos) {
        ends.remove(&end);
    }
    Ok(ends)
}

//! Checks the files of a model that produce text, as `run` will read them, before hours are spent on its weights.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use sluice_format::{ModelSpec, SOURCE_CONFIG_BLOB};
use sluice_text::{ChatTemplate, GenerationDefaults, Message, RenderOptions, TextError, Tokenizer};

use crate::error::CliError;
use crate::input;

/// Sampling defaults and further end tokens.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
/// The chat template, if it is a file of its own; it takes precedence over that in `tokenizer_config.json`.
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Tokenizers that cannot be read, by their files.
const OTHER_TOKENIZERS: [&[&str]; 4] =
    [&["vocab.json", "merges.txt"], &["tokenizer.model"], &["tekken.json"], &["spiece.model"]];

/// What `run` will find.
#[derive(Debug)]
pub(crate) struct Findings {
    /// What will not work, or not as the files say, and what to do.
    pub(crate) notes: Vec<String>,
    /// Why `run --chat` will not work, if the model has a template.
    pub(crate) broken_template: Option<TextError>,
}

/// Reads the files of a model with this shape. `file` gives their bytes by name; `set` is the command that adds others to the model
/// file.
///
/// # Errors
/// If a file or the end tokens are damaged: without end tokens, a model never stops.
pub(crate) fn examine<'f>(
    file: impl Fn(&str) -> Option<&'f [u8]>,
    spec: &ModelSpec,
    set: &str,
) -> Result<Findings, TextError> {
    let mut notes = Vec::new();
    let defaults = GenerationDefaults::parse(file(GENERATION_CONFIG), file(SOURCE_CONFIG_BLOB))?;
    if let Some(remark) = defaults.remarks.iter().find(|remark| remark.field == "eos_token_id") {
        return Err(TextError::BadConfigField {
            file: remark.file,
            field: remark.field,
            expected: remark.expected,
            found: remark.found.clone(),
        });
    }
    notes.extend(defaults.remarks.iter().map(|r| format!("{r} (another file: {set} --generation-config FILE)")));
    if let Some(id) = defaults.eos.iter().find(|&&id| id as usize >= spec.vocab_size) {
        notes.push(format!(
            "the end token {id} is not one of the model's, which go up to {}: check `eos_token_id` in {GENERATION_CONFIG} and \
             config.json",
            spec.vocab_size.saturating_sub(1)
        ));
    }
    let Some(tokenizer) = Tokenizer::find(&file)? else {
        notes.push(format!(
            "there is no tokenizer, so the model file works with token ids only. It can be added later, without \
             converting again: {set} --tokenizer FILE"
        ));
        return Ok(Findings { notes, broken_template: None });
    };
    tokenizer.check()?;
    let (ids, vocabulary) = (tokenizer.vocab_size(), spec.vocab_size);
    if ids > vocabulary {
        notes.push(format!(
            "the tokenizer has ids up to {}, the model only up to {}: is it another model's? A text with one of the others \
             will be refused",
            ids - 1,
            vocabulary.saturating_sub(1)
        ));
    }
    let mend = format!("give one with `run --chat-template FILE`, or for good: {set} --chat-template FILE");
    let broken_template = match try_template(&file) {
        Ok(true) => None,
        Ok(false) => {
            notes.push(format!("there is no chat template, so `run --chat` will not work; {mend}"));
            None
        }
        Err(problem) => {
            notes.push(format!("`run --chat` will not work: {problem}; {mend}"));
            Some(problem)
        }
    };
    Ok(Findings { notes, broken_template })
}

/// Whether there is a chat template; an error if it cannot render a greeting.
fn try_template<'f>(file: impl Fn(&str) -> Option<&'f [u8]>) -> Result<bool, TextError> {
    let Some(template) = ChatTemplate::find(file)? else { return Ok(false) };
    try_out(&template).map(|()| true)
}

/// Checks that a template passes on the user's text: without it, the model would answer another prompt.
pub(crate) fn try_out(template: &ChatTemplate) -> Result<(), TextError> {
    const WORD: &str = "Hello";
    let rendered = template.render(&[Message::new("user", WORD)], &chat_options())?;
    if rendered.contains(WORD) {
        return Ok(());
    }
    let empty = rendered.trim().is_empty();
    let reason = if empty { "it renders nothing" } else { "the user's message is not in what it renders" };
    Err(TextError::ChatTemplate { line: None, reason: reason.into() })
}

/// How a user's message is rendered with a template.
pub(crate) fn chat_options() -> RenderOptions {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    RenderOptions { add_generation_prompt: true, now, ..RenderOptions::default() }
}

/// The tokenizers in a folder that cannot be read, and how to convert them.
pub(crate) fn other_tokenizers(folder: &Path) -> Option<String> {
    let there = |names: &&&[&str]| names.iter().all(|name| folder.join(name).is_file());
    let found: Vec<_> = OTHER_TOKENIZERS.iter().filter(there).map(|names| names.join(" + ")).collect();
    if found.is_empty() {
        return None;
    }
    Some(format!(
        "{} cannot be read, only tokenizer.json and tiktoken.model. Where transformers reads it, this makes a \
         tokenizer.json of it: python3 -c \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('FOLDER').save_pretrained('NEW')\"",
        found.join(" and ")
    ))
}

/// A chat template from a file: the template itself, or JSON that has it as `chat_template`, like tokenizer_config.json and
/// chat_template.json.
pub(crate) fn read_template(path: &Path) -> Result<Vec<u8>, CliError> {
    let bytes = input::read_side_file(path)?;
    let json: Option<serde_json::Map<String, serde_json::Value>> = sluice_format::json::from_slice(&bytes).ok();
    match json.as_ref().map(|fields| fields.get("chat_template").and_then(|t| t.as_str())) {
        None => Ok(bytes),
        Some(Some(template)) => Ok(template.as_bytes().to_vec()),
        Some(None) => {
            let path = path.display();
            Err(CliError::Failure(format!("{path} is JSON without a `chat_template`: give the template itself")))
        }
    }
}

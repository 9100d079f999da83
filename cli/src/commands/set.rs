//! `sluice set`: changes the tokenizer, chat template or sampling defaults of a model file, without converting again.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sluice_format::{
    FormatError, Metadata, ModelFile, Recovery, TOKENIZER_BLOB, TOKENIZER_BLOBS, recover, rewrite_metadata,
};
use sluice_text::TextError;

use crate::error::CliError;
use crate::input::read_side_file;
use crate::terminal::{note, print, print_json};
use crate::text_files::{CHAT_TEMPLATE, GENERATION_CONFIG, examine, other_tokenizers, read_template};

const EXAMPLES: &str = "\
The weights are neither moved nor read: it takes no longer than writing a tokenizer, whatever the size of the model. \
The new files are checked as `convert` checks them before anything is written. Interrupted? Run `sluice set FILE` \
again: the model file is then as it was, or as it should be.

Examples:
  sluice set r1.sluice --chat-template chat_template.jinja
  sluice set r1.sluice --tokenizer DeepSeek-R1/
  sluice set r1.sluice --tokenizer tokenizer.json --generation-config generation_config.json";

/// The ranks of tokenizers without a tokenizer.json.
const TIKTOKEN: &str = "tiktoken.model";

/// Give a model file another tokenizer, chat template or sampling defaults; its weights do not change
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, which is changed, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// A tokenizer.json or tiktoken.model, or a folder with all files of a tokenizer, which replace all existing ones
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// A chat template in Jinja, or JSON with one as `chat_template`
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    /// Sampling defaults and end tokens: a generation_config.json
    #[arg(long, value_name = "FILE")]
    generation_config: Option<PathBuf>,

    /// Print JSON: file, model_id, state_id, replaced
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let recovery = recover(&args.file)?;
    match recovery {
        Some(Recovery::Finished) => note(&"note: a `set` that was interrupted is finished now"),
        Some(Recovery::Undone) => note(&"note: a `set` that was interrupted had not changed anything, and is undone"),
        None => {}
    }
    let model = ModelFile::open(&args.file)?;
    let mut metadata = model.metadata().clone();
    let replaced = replace(args, &mut metadata)?;
    if replaced.is_empty() && recovery.is_none() {
        let message = "nothing is to be set: give --tokenizer, --chat-template or --generation-config";
        return Err(CliError::Usage(message.into()));
    }
    if !replaced.is_empty() {
        check(args, &model, &metadata)?;
    }
    let model = rewrite_metadata(&model, &metadata).map_err(explain)?;
    let (model_id, state_id) = (model.superblock().model_id.to_string(), model.state_id().to_string());
    if args.json {
        let file = args.file.display().to_string();
        return print_json(&json!({ "file": file, "model_id": model_id, "state_id": state_id, "replaced": replaced }));
    }
    if replaced.is_empty() {
        return Ok(());
    }
    print(&format!("{}: {} set; the weights are as they were\n", args.file.display(), replaced.join(", ")))
}

/// Reads the new files into the metadata; returns their names.
fn replace(args: &Args, metadata: &mut Metadata) -> Result<Vec<&'static str>, CliError> {
    let mut replaced = Vec::new();
    if let Some(path) = &args.tokenizer {
        if path.is_dir() {
            replaced.extend(replace_tokenizer(path, metadata)?);
        } else {
            let bytes = read_side_file(path)?;
            let is_json = bytes.trim_ascii_start().first() == Some(&b'{');
            let (name, other) = if is_json { (TOKENIZER_BLOB, TIKTOKEN) } else { (TIKTOKEN, TOKENIZER_BLOB) };
            metadata.remove(other);
            metadata.insert(name, bytes);
            replaced.push(name);
        }
    }
    if let Some(path) = &args.chat_template {
        metadata.insert(CHAT_TEMPLATE, read_template(path)?);
        // The old template's companion for conversations with tools, which would take precedence over the new one there.
        metadata.remove("additional_chat_templates/tool_use.jinja");
        replaced.push(CHAT_TEMPLATE);
    }
    if let Some(path) = &args.generation_config {
        metadata.insert(GENERATION_CONFIG, read_defaults(path)?);
        replaced.push(GENERATION_CONFIG);
    }
    Ok(replaced)
}

/// Replaces all files of the tokenizer by those in a folder, because files of two tokenizers do not fit together.
fn replace_tokenizer(folder: &Path, metadata: &mut Metadata) -> Result<Vec<&'static str>, CliError> {
    let there = |name: &&str| fs::exists(folder.join(name)).unwrap_or(false);
    let names: Vec<_> = TOKENIZER_BLOBS.into_iter().filter(there).collect();
    if !names.contains(&TOKENIZER_BLOB) && !names.contains(&TIKTOKEN) {
        let other = other_tokenizers(folder).map(|what| format!(": {what}")).unwrap_or_default();
        return Err(CliError::Failure(format!(
            "{} has no tokenizer.json and no tiktoken.model{other}",
            folder.display()
        )));
    }
    TOKENIZER_BLOBS.into_iter().for_each(|name| metadata.remove(name));
    for &name in &names {
        metadata.insert(name, read_side_file(&folder.join(name))?);
    }
    Ok(names)
}

/// Checks what will be written, as `convert` does, except that a template that is given must work.
fn check(args: &Args, model: &ModelFile, metadata: &Metadata) -> Result<(), CliError> {
    let file = args.file.display();
    let set = format!("sluice set {file}");
    let unchanged = |problem: TextError| {
        let given = given(args, &problem).map(|path| format!("{}: ", path.display())).unwrap_or_default();
        CliError::Failure(format!("{file} is as it was: {given}{problem}"))
    };
    let findings = examine(|name| metadata.get(name), model.spec(), &set).map_err(unchanged)?;
    if let Some(problem) = findings.broken_template.filter(|_| args.chat_template.is_some()) {
        return Err(unchanged(problem));
    }
    findings.notes.iter().for_each(|text| note(&format_args!("note: {text}")));
    Ok(())
}

/// The file or folder from the command line to which this problem belongs.
fn given<'a>(args: &'a Args, problem: &TextError) -> Option<&'a Path> {
    let option = match problem {
        TextError::ChatTemplate { .. } | TextError::ChatRefused { .. } => &args.chat_template,
        TextError::BadConfig { file, .. } | TextError::BadConfigField { file, .. } if *file == GENERATION_CONFIG => {
            &args.generation_config
        }
        _ => &args.tokenizer,
    };
    option.as_deref()
}

/// Reads sampling defaults. A model's configuration, which has a similar name, would contain none.
fn read_defaults(path: &Path) -> Result<Vec<u8>, CliError> {
    const DEFAULTS: [&str; 7] =
        ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"];
    let bytes = read_side_file(path)?;
    let fields: Map<String, Value> = sluice_format::json::from_slice(&bytes).unwrap_or_default();
    let is_model = ["architectures", "model_type"].iter().any(|key| fields.contains_key(*key));
    if is_model && !DEFAULTS.iter().any(|key| fields.contains_key(*key)) {
        return Err(CliError::Failure(format!(
            "{} describes a model, and has no sampling defaults: give its {GENERATION_CONFIG}",
            path.display()
        )));
    }
    Ok(bytes)
}

/// The same error, in terms of the command line.
fn explain(error: FormatError) -> CliError {
    match error {
        FormatError::Layout(problem) => CliError::Failure(problem),
        other => other.into(),
    }
}

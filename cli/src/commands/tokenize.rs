//! `sluice tokenize`: turns a text into token ids with a model's tokenizer, or token ids into text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use serde_json::json;
use sluice_format::{ModelFile, SOURCE_CONFIG_BLOB, TEXT_FILES};
use sluice_text::{
    ChatTemplate, Detokenizer, MAX_TEXT_BYTES, MAX_TOKENIZER_BYTES, Message, Special, Tokenizer, encode_chat,
};

use crate::error::CliError;
use crate::ids::TokenIds;
use crate::terminal::{note, print, print_json, print_text, printable};
use crate::text_files::chat_options;

const EXAMPLES: &str = "\
The ids are those that `run --prompt` gives to the model, with what the tokenizer puts around every text. They are listed \
one per line, each with its spelling in the vocabulary; with --ids, the text of ids is printed.

Examples:
  sluice tokenize model.sluice --text 'The capital of France is'
  sluice tokenize model.sluice --text 'Hello' --chat
  sluice tokenize DeepSeek-R1/ --text-file letter.txt --json
  sluice tokenize model.sluice --ids 0,671,6102 --special";

/// Show the token ids of a text, or the text of token ids
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, hf:NAME, or a folder with the tokenizer's files
    pub(crate) file: PathBuf,

    /// The text [default: standard input]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,

    /// File with the text, UTF-8, taken byte for byte
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    text_file: Option<PathBuf>,

    /// Token ids, such as 1,2,3, to turn into text
    #[arg(long, value_name = "IDS", conflicts_with_all = ["text", "text_file", "chat", "no_special"])]
    ids: Option<TokenIds>,

    /// Give the text as a user's message, in the chat template that came with the checkpoint
    #[arg(long)]
    chat: bool,

    /// System message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,

    /// Leave out the tokens that the tokenizer puts around every text, such as a begin-of-sequence token
    #[arg(long, conflicts_with = "chat")]
    no_special: bool,

    /// With --ids: show special tokens in the text
    #[arg(long, requires = "ids")]
    special: bool,

    /// Print JSON: ids, tokens (their spellings in the vocabulary), text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let files = TextFiles::open(&args.file)?;
    let tokenizer = Tokenizer::find(|name| files.get(name))?.ok_or_else(|| no_tokenizer(&args.file))?;
    if let Some(TokenIds(ids)) = &args.ids {
        if let Some(id) = ids.iter().find(|&&id| tokenizer.token_text(id).is_none()) {
            note(&format_args!("note: {id} is not in the vocabulary: it has no text"));
        }
        let text = decode(&tokenizer, ids, args.special)?;
        return match args.json {
            true => report(&tokenizer, ids, &text),
            false => print_text(&(text + "\n")),
        };
    }
    let text = text(args)?;
    let (ids, text) = match args.chat {
        true => chat(args, &tokenizer, &files, &text)?,
        false => (tokenizer.encode(&text, !args.no_special)?, text),
    };
    if args.json {
        return report(&tokenizer, &ids, &text);
    }
    let mut lines = String::new();
    for &id in &ids {
        let _ = writeln!(lines, "{id:>7}  {}", printable(&spelling(&tokenizer, id)).replace('\n', "\\n"));
    }
    print(&lines)
}

fn no_tokenizer(path: &Path) -> CliError {
    let name = path.display();
    CliError::Failure(if path.is_dir() {
        format!("{name} has no tokenizer.json and no tiktoken.model: fetch one from the model's repository")
    } else {
        format!("{name} has no tokenizer: add one with `sluice set {name} --tokenizer PATH`")
    })
}

fn report(tokenizer: &Tokenizer, ids: &[u32], text: &str) -> Result<(), CliError> {
    let tokens: Vec<Option<String>> = ids.iter().map(|&id| tokenizer.token_text(id)).collect();
    print_json(&json!({ "ids": ids, "tokens": tokens, "text": text }))
}

fn spelling(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.token_text(id).unwrap_or_else(|| "(not in the vocabulary)".into())
}

/// The text of ids, as `run` shows it.
fn decode(tokenizer: &Tokenizer, ids: &[u32], special: bool) -> Result<String, CliError> {
    let special = if special { Special::Shown } else { Special::Markup };
    let mut detokenizer = Detokenizer::with_special(tokenizer, special);
    let mut text = String::new();
    for &id in ids {
        text += &detokenizer.push(id)?;
    }
    Ok(text + &detokenizer.finish()?)
}

/// The ids of the text as a user's message, and the conversation that they represent.
fn chat(args: &Args, tokenizer: &Tokenizer, files: &TextFiles, text: &str) -> Result<(Vec<u32>, String), CliError> {
    let template = ChatTemplate::find(|name| files.get(name))?
        .ok_or_else(|| CliError::Usage(format!("{} has no chat template: leave --chat away", args.file.display())))?;
    let system = args.system.as_deref().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.into_iter().chain([Message::new("user", text.trim_end_matches('\n'))]).collect();
    let options = chat_options();
    let ids = encode_chat(tokenizer, &template, &messages, &options)?;
    Ok((ids, template.render(&messages, &options)?))
}

fn text(args: &Args) -> Result<String, CliError> {
    if let Some(text) = &args.text {
        return Ok(text.clone());
    }
    if let Some(path) = &args.text_file {
        let file = File::open(path).map_err(CliError::file(path, "open the text"))?;
        return read_text(file).map_err(CliError::file(path, "read the text"));
    }
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        let message = "there is no text: give --text TEXT, --text-file FILE or --ids IDS, or pipe text in";
        return Err(CliError::Usage(message.into()));
    }
    read_text(stdin).map_err(|e| CliError::Failure(format!("cannot read the text from standard input: {e}")))
}

/// Reads a text with at most one byte more than the tokenizer takes, so that the tokenizer reports it, and endless files end.
fn read_text(input: impl Read) -> io::Result<String> {
    let mut text = String::new();
    input.take(MAX_TEXT_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// The files that turn text into tokens: those in a model file, or those in a folder.
struct TextFiles(BTreeMap<String, Vec<u8>>);

impl TextFiles {
    fn open(path: &Path) -> Result<Self, CliError> {
        let mut files = BTreeMap::new();
        let model = (!path.is_dir()).then(|| ModelFile::open(path)).transpose()?;
        for name in TEXT_FILES.into_iter().chain([SOURCE_CONFIG_BLOB]) {
            let bytes = match &model {
                Some(model) => model.metadata().get(name).map(<[u8]>::to_vec),
                None => read_file(&path.join(name))?,
            };
            files.extend(bytes.map(|bytes| (name.to_owned(), bytes)));
        }
        Ok(TextFiles(files))
    }

    fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

/// The bytes of a file, if there is one. If it is too long, only as many as the tokenizer needs to report that.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>, CliError> {
    if !fs::metadata(path).is_ok_and(|m| m.is_file()) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_TOKENIZER_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(CliError::file(path, "read it"))?;
    Ok(Some(bytes))
}

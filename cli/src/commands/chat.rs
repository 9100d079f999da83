//! `sluice chat`: a conversation in the terminal.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_format::ModelFile;
use sluice_generate::SchedulerOptions;
use sluice_model::EngineOptions;
use sluice_server::served::Served;
use sluice_server::texts::Texts;
use sluice_sessions::{Store, StoreError, StoreOptions};
use sluice_text::{ChatTemplate, TextError, TextFiles};

use crate::chat::Session;
use crate::chat::conversation::{Conversation, Folder, Kept};
use crate::chat::history::History;
use crate::chat::input::Input;
use crate::chat::screen::{Kind, Screen};
use crate::chat::settings::Choices;
use crate::chat::talk::Talk;
use crate::drafts::DraftArgs;
use crate::engine_args::{EngineArgs, tokenizer};
use crate::error::CliError;
use crate::sampling::SamplingArgs;
use crate::size::{parse_count, parse_size};
use crate::terminal::note;
use crate::text_files::{CHAT_TEMPLATE, read_template, try_out};

const EXAMPLES: &str = "\
The conversation is kept in files, and so is what the model remembers of it: --resume goes on where it ended, even if the program \
was killed, and reads only what is new. Ctrl-C stops an answer, /help lists the commands. From a pipe, each line is a message, and \
standard output gets the answers alone.

Examples:
  sluice chat r1.sluice
  sluice chat r1.sluice --system 'You answer in verse.' --temperature 0.7
  sluice chat r1.sluice --resume
  sluice chat r1.sluice --resume verse --budget 24GiB
  echo 'Why is the sky blue?' | sluice chat r1.sluice --private";

/// Talk with a model: it remembers the conversation, and can continue it later
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME for the file made from a model on the hub
    pub(crate) file: PathBuf,

    /// Make the model file of hf:NAME if it does not exist, without asking
    #[arg(long)]
    pub(crate) yes: bool,

    /// Continue the conversation with this name; without a name, the latest one
    #[arg(long, value_name = "NAME", help_heading = "Conversation")]
    resume: Option<Option<String>>,

    /// System message; with --resume, it replaces that of the conversation
    #[arg(long, value_name = "TEXT", help_heading = "Conversation")]
    system: Option<String>,

    /// Chat template to use instead of the model's, in Jinja, or JSON with one as `chat_template`
    #[arg(long, value_name = "FILE", help_heading = "Conversation")]
    chat_template: Option<PathBuf>,

    /// Folder for conversations and for what models remember of them [default: sluice/sessions in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "DIR", help_heading = "Conversation")]
    sessions: Option<PathBuf>,

    /// Most bytes of what models remember in that folder; the least useful go first
    #[arg(long, value_name = "SIZE", default_value = "20GB", value_parser = parse_size, help_heading = "Conversation")]
    sessions_max: u64,

    /// Keep nothing of this conversation on the drive
    #[arg(long, conflicts_with_all = ["resume", "sessions"], help_heading = "Conversation")]
    private: bool,

    /// Most tokens of an answer [default: as many as the context has room for]
    #[arg(short = 'n', long, value_name = "N", value_parser = parse_count)]
    max_tokens: Option<NonZeroUsize>,

    /// End an answer before this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Most tokens of a conversation, messages and answers together [default: 8192, or the model's limit if that is less]
    #[arg(long, value_name = "N", value_parser = parse_count, help_heading = "Engine")]
    context: Option<NonZeroUsize>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    drafts: DraftArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Most tokens of a conversation, by default.
const CONTEXT: usize = 8192;
/// Marks of its sequence, at the ends of the latest messages.
const MARKS: usize = 4;
/// Number of new tokens after which the sequence is saved in the middle of an answer.
const SAVE_EVERY: usize = 512;
/// Conversations, in the folder of the sessions.
const CONVERSATIONS: &str = "chats";
/// Earlier messages, in the folder of the conversations.
const HISTORY: &str = "history.jsonl";

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let screen = Screen::new(Kind::of_stdout());
    let (model, template) = prepare(args)?;
    let sessions = if args.private { None } else { Some(sessions_folder(args)?) };
    let folder = sessions.as_ref().map(|sessions| Folder::open(&sessions.join(CONVERSATIONS))).transpose()?;
    let (mut conversation, kept) = match resumed(args, folder.as_ref())? {
        Some((conversation, kept)) => (conversation, Some(kept)),
        None => (Conversation::new(String::new(), None, Choices::default()), None),
    };
    settle(args, &mut conversation)?;
    let history = History::new(sessions.as_ref().map(|sessions| sessions.join(CONVERSATIONS).join(HISTORY)));
    let input = Input::new(screen.kind(), history)?;
    let store = sessions.map(|sessions| open_store(args, sessions)).transpose()?.flatten();
    let served = open_model(args, model, template, store.clone())?;
    let model = served.model().state_id();
    let file = args.file.display().to_string();
    let talk = Talk::new(served)?;
    let mut session = Session { file, talk, screen, input, conversation, folder, kept, store, took: None };
    session.take_over(model)?;
    session.run()
}

/// Opens the model's file, checks everything else that can be wrong before weights are read, and finds the chat template that was given.
fn prepare(args: &Args) -> Result<(ModelFile, Option<ChatTemplate>), CliError> {
    let file = ModelFile::open(&args.file)?;
    let Some(path) = &args.chat_template else { return Ok((file, None)) };
    let given = read_template(path)?;
    let wrong = |error: TextError| CliError::Failure(format!("{}: {error}", path.display()));
    let template = ChatTemplate::find(|name| match name {
        CHAT_TEMPLATE => Some(given.as_slice()),
        _ => file.metadata().get(name),
    });
    let template = template.map_err(wrong)?;
    template.iter().try_for_each(try_out).map_err(wrong)?;
    Ok((file, template))
}

/// The folder of the sessions.
fn sessions_folder(args: &Args) -> Result<PathBuf, CliError> {
    if let Some(folder) = &args.sessions {
        return Ok(folder.clone());
    }
    // Relative paths are invalid by the XDG specification.
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let own = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/state" };
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(own)));
    let none = || {
        let message = "there is no folder for conversations: neither XDG_STATE_HOME nor HOME names one. Give one with --sessions DIR, or \
                       keep nothing with --private";
        CliError::Usage(message.into())
    };
    Ok(state.ok_or_else(none)?.join("sluice").join("sessions"))
}

/// The conversation to continue.
fn resumed(args: &Args, folder: Option<&Folder>) -> Result<Option<(Conversation, Kept)>, CliError> {
    let (Some(resume), Some(folder)) = (&args.resume, folder) else { return Ok(None) };
    let latest = || folder.list().map(|list| list.into_iter().next().map(|listed| listed.name));
    let name = match resume {
        Some(name) => Some(name.clone()),
        None => latest()?,
    };
    let none = || CliError::Failure("there is no conversation to continue yet".into());
    folder.load(&name.ok_or_else(none)?).map(Some)
}

/// Options of the command line take precedence over the conversation's settings.
fn settle(args: &Args, conversation: &mut Conversation) -> Result<(), CliError> {
    let most = args.max_tokens.map(NonZeroUsize::get);
    conversation.settings.take(&args.sampling, most, &args.stop).map_err(CliError::Usage)?;
    if let Some(system) = &args.system {
        conversation.system = Some(system.clone()).filter(|text| !text.is_empty());
    }
    Ok(())
}

/// Opens the store of sequences. If another program uses the folder, the chat continues without.
fn open_store(args: &Args, folder: PathBuf) -> Result<Option<Arc<Store>>, CliError> {
    let options = StoreOptions { folder, max_bytes: args.sessions_max, expire_after: None };
    match Store::open(options) {
        Ok(store) => Ok(Some(Arc::new(store))),
        Err(StoreError::Busy { folder }) => {
            note(&format_args!(
                "note: another program keeps its sessions in {}, so that what the model remembers of this conversation is in memory only. \
                 The conversation itself is kept",
                folder.display()
            ));
            Ok(None)
        }
        Err(error) => {
            Err(CliError::Failure(format!("{error}. Give another one with --sessions, or keep nothing with --private")))
        }
    }
}

fn open_model(
    args: &Args,
    file: ModelFile,
    template: Option<ChatTemplate>,
    store: Option<Arc<Store>>,
) -> Result<Served, CliError> {
    let context = args.context.map_or(CONTEXT, NonZeroUsize::get);
    let options = EngineOptions { sequences: Some(1), marks: MARKS, ..args.engine.options(context) };
    let drafting = args.drafts.or(args.engine.usual_drafts())?;
    let prediction = drafting.predicts(&file, &options);
    let engine = args.engine.open_file(file, &EngineOptions { prediction, ..options })?;
    // The drive reads dense weights meanwhile.
    let Some(tokenizer) = tokenizer(engine.file())? else {
        let name = args.file.display();
        return Err(CliError::Usage(format!(
            "{name} has no tokenizer, so it cannot chat: add one with `sluice set {name} --tokenizer FILE`"
        )));
    };
    let files = TextFiles::with_tokenizer(Some(tokenizer), engine.file().metadata())?;
    let texts = Texts::with_files(engine.file(), files, engine.memory().context, template)?;
    let scheduling = SchedulerOptions { store, save_every: SAVE_EVERY, ..drafting.options() };
    let id = name_of(&args.file);
    let served = Served::of(id, engine, scheduling, !args.engine.forget, Arc::new(texts))?;
    if served.template().is_none() {
        let name = args.file.display();
        return Err(CliError::Usage(format!(
            "{name} has no chat template: give one with --chat-template FILE, or for good with `sluice set {name} --chat-template \
             FILE`; `sluice run` continues a text without one"
        )));
    }
    Ok(served)
}

/// The name of a model: its file without folder and extension.
fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned())
}

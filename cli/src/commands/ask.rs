//! `sluice ask`: one question, whose answer may take a night.
//!
//! It is a batch of one request. With `--overnight`, the batch is in a folder beside the answer until the answer is there.

use std::fs::{self, DirBuilder};
use std::io::{self, IsTerminal as _};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use sluice_batch::{Batch, BatchError, Options, Progress, Sync, SystemFiles};
use sluice_format::{ModelFile, replace_file};
use sluice_generate::Status;
use sluice_lab::batch::Load;
use sluice_model::{EngineOptions, RuntimeError};
use sluice_server::Piece;
use sluice_server::batch::{BatchRun, Pieces, RunError, identity};
use sluice_server::models::name_of;
use sluice_server::texts::template_of;

use super::batch::now;
use crate::batch_load::{Length, Rest, Scale};
use crate::batch_plan;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::input::{MAX_TEXT, text_of};
use crate::progress::message_line;
use crate::saved::{SaveChoice, Saved};
use crate::size::parse_count;
use crate::terminal::{counted, note, print_text, seconds};

const EXAMPLES: &str = "\
The question is a user's message in the model's chat template. With --overnight the answer so far is in a file that can be \
read at any time, and nothing is lost if the run is interrupted: the same command goes on where it stopped, and so does one with \
--resume instead of the question.

Exit codes: 0 answered; 1 the run had to stop; 2 wrong usage; 3 the request failed; 130 interrupted. After 1 and 130, the same command \
goes on.

Examples:
  sluice ask r1.sluice 'Why is the sky blue?'
  sluice ask r1.sluice 'Prove that there are infinitely many primes.' --overnight --out primes.md
  sluice ask r1.sluice --resume --out primes.md
  sluice ask r1.sluice --overnight --out review.md < long-question.txt";

/// Put one question to a model; with --overnight, nothing of a long answer is lost if the run is interrupted
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group = clap::ArgGroup::new("kept").args(["overnight", "resume"]).multiple(true))]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME for the file made from a model on the hub
    pub(crate) file: PathBuf,

    /// The question [default: standard input]
    #[arg(value_name = "QUESTION", conflicts_with = "resume")]
    question: Option<String>,

    /// Make the model file of hf:NAME if it is not there, without asking
    #[arg(long)]
    pub(crate) yes: bool,

    /// Keep what is done, and the answer so far in a file
    #[arg(long)]
    overnight: bool,

    /// With --overnight: the file with the answer; what is kept of the run is in the folder FILE.run until the answer is whole
    #[arg(long, value_name = "FILE", default_value = "answer.md", requires = "kept")]
    out: PathBuf,

    /// Go on with the question whose answer is in --out, without giving it again
    #[arg(long)]
    resume: bool,

    /// System message before the question
    #[arg(long, value_name = "TEXT", conflicts_with = "resume")]
    system: Option<String>,

    /// Most tokens of the answer, thinking included [default: as many as the context has room for]
    #[arg(short = 'n', long, value_name = "N", value_parser = parse_count, conflicts_with = "resume")]
    max_tokens: Option<NonZeroUsize>,

    /// 0 takes the likeliest token; below 1 sharpens, above 1 flattens [default: the model's own, else 0]
    #[arg(long, value_name = "T", conflicts_with = "resume")]
    temperature: Option<f32>,

    /// Where the random numbers start: the same seed gives the same answer
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "resume")]
    seed: u32,

    /// With --overnight: whether the sequence is saved in FILE.run, so that a run that goes on need not read the question again
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    save_sequences: SaveChoice,

    /// How hard to think, for models that know it: none, low, medium, high
    #[arg(long, value_name = "EFFORT", conflicts_with = "resume")]
    reasoning: Option<String>,

    /// Most tokens of question and answer together [default: 8192, or the model's limit if that is less]
    #[arg(long, value_name = "N", default_value = "8192", value_parser = parse_count)]
    context: NonZeroUsize,

    #[command(flatten)]
    engine: EngineArgs,
}

/// How often the answer so far is written.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// How often somebody without a terminal is told.
const LINES: Duration = Duration::from_secs(300);

/// An answer as far as it has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    thinking: String,
    text: String,
}

impl Answer {
    fn take(&mut self, piece: &Piece) {
        match piece {
            Piece::Thinking(more) => self.thinking += more,
            Piece::Text(more) => self.text += more,
            // No tools were offered.
            Piece::Call { .. } | Piece::Arguments { .. } => {}
        }
    }

    /// What the file holds: thinking between its marks, then the answer.
    fn whole(&self) -> String {
        let text = self.text.trim();
        match (self.thinking.trim(), text) {
            ("", text) => format!("{text}\n"),
            (thinking, "") => format!("<think>\n{thinking}\n"),
            (thinking, text) => format!("<think>\n{thinking}\n</think>\n\n{text}\n"),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    check_model(args)?;
    let asked = if args.resume { None } else { Some(question(args)?) };
    let overnight = args.overnight || args.resume;
    let scratch;
    let folder = match overnight {
        true => state_folder(&args.out),
        false => {
            scratch = tempfile::tempdir().map_err(CliError::file(&std::env::temp_dir(), "make a folder there"))?;
            scratch.path().to_owned()
        }
    };
    if overnight {
        CliError::refuse_output(&args.out, &[&args.file])?;
        if !prepare(args, &folder)? {
            return Ok(());
        }
    }
    let request = folder.join("request.jsonl");
    let has_request = request.metadata().is_ok_and(|metadata| metadata.len() > 0);
    match asked {
        None if !has_request => {
            return Err(CliError::Usage(format!(
                "there is nothing to go on with: {} has no question, because the run ended before it was kept. Give the question with \
                 --overnight --out {}",
                folder.display(),
                args.out.display()
            )));
        }
        Some(line) if !has_request => {
            replace_file(&request, line.as_bytes()).map_err(CliError::file(&request, "write the question"))?;
        }
        Some(line) if line.as_bytes() != fs::read(&request).unwrap_or_default() => {
            return Err(CliError::Usage(format!(
                "{} belongs to another question, or to other settings: give those to go on, or --resume instead of a question, or choose \
                 another --out",
                folder.display()
            )));
        }
        _ => {}
    }
    let options = Options { input: request, output: folder.join("result.jsonl"), ..Options::default() };
    let answered = answer(args, options, overnight);
    if overnight && matches!(answered, Err(CliError::SomeFailed(_))) {
        // There is nothing to go on with.
        fs::remove_dir_all(&folder).map_err(CliError::file(&folder, "remove it"))?;
    }
    answered?;
    if overnight {
        fs::remove_dir_all(&folder).map_err(CliError::file(&folder, "remove it, though the answer is whole"))?;
        note(&format_args!("the answer is in {}", args.out.display()));
    }
    Ok(())
}

/// How the model is opened.
fn engine(args: &Args, context: usize) -> EngineOptions {
    EngineOptions { sequences: Some(1), ..args.engine.options(context) }
}

/// Refuses a model that takes no questions, or that memory does not suffice for, before anything is made.
fn check_model(args: &Args) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file)?;
    if template_of(&file)?.is_some() {
        engine(args, args.context.get()).check_memory(&file).map_err(RuntimeError::from)?;
        return Ok(());
    }
    let name = args.file.display();
    Err(CliError::Usage(format!(
        "{name} has no chat template, so it takes no questions: `sluice run` continues a text without one, and `sluice set {name} \
         --chat-template FILE` gives the model a template"
    )))
}

/// Where the run of an answer is kept.
fn state_folder(out: &Path) -> PathBuf {
    let mut name = out.to_owned().into_os_string();
    name.push(".run");
    name.into()
}

/// Makes the folder of a run that begins; of one that goes on, it is there. False if the run has ended with its answer.
fn prepare(args: &Args, folder: &Path) -> Result<bool, CliError> {
    if folder.is_dir() {
        return Ok(true);
    }
    let out = args.out.display();
    if args.resume && args.out.exists() {
        note(&format_args!("nothing is left to do: {out} is there, and no unfinished run beside it"));
        return Ok(false);
    }
    if args.resume {
        return Err(CliError::Usage(format!(
            "there is nothing to go on with: {} is not there. Give the question with --overnight --out {out}",
            folder.display()
        )));
    }
    if args.out.exists() {
        return Err(CliError::Usage(format!("{out} is there already: choose another --out")));
    }
    DirBuilder::new().mode(0o700).create(folder).map_err(CliError::file(folder, "make the folder"))?;
    Ok(true)
}

/// The request, as a line of a batch.
fn question(args: &Args) -> Result<String, CliError> {
    let text = match &args.question {
        Some(text) => text.clone(),
        None if io::stdin().is_terminal() => {
            return Err(CliError::Usage("there is no question: give it as an argument, or pipe it in".into()));
        }
        None => {
            let failed = |e| CliError::Failure(format!("cannot read the question from standard input: {e}"));
            text_of(io::stdin().lock(), MAX_TEXT).map_err(failed)?
        }
    };
    if text.trim().is_empty() {
        return Err(CliError::Usage("the question is empty: give one as an argument, or pipe it in".into()));
    }
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let mut messages: Vec<Value> = args.system.iter().map(|text| message("system", text)).collect();
    messages.push(message("user", text.trim_end_matches('\n')));
    let mut body = Map::new();
    body.insert("messages".into(), messages.into());
    body.insert("seed".into(), args.seed.into());
    let optional = [
        ("max_completion_tokens", args.max_tokens.map(|most| json!(most.get()))),
        ("temperature", args.temperature.map(|temperature| json!(crate::terminal::json_number(temperature)))),
        ("reasoning_effort", args.reasoning.as_ref().map(|effort| json!(effort))),
    ];
    body.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    let request = json!({"custom_id": "question", "method": "POST", "url": "/v1/chat/completions", "body": body});
    Ok(format!("{request}\n"))
}

/// Has the batch of one run, and shows the answer while it comes.
fn answer(args: &Args, options: Options, overnight: bool) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file)?;
    let index = options.index(&SystemFiles)?;
    let scale = Scale::of(&file, &options.input, &index)?;
    let context = scale.context(&file, &index, Some(args.context.get()));
    let rest = Rest::estimate(&scale, &index, context, None);
    let load = rest.load(Length::Allowed);
    if overnight {
        args.engine.refuse_preference("ask --overnight")?;
    }
    let identity = identity(&file, &args.engine.options(load.context), load.context);
    let output = options.output.clone();
    let sync = if overnight { Sync::Seconds } else { Sync::Never };
    let longest_answer = longest_answer(&load);
    let mut batch = Batch::open(
        &SystemFiles,
        Options { identity, sync, now: now(), longest_answer: Some(longest_answer), ..options },
    )?;
    if batch.is_finished() {
        return Shown::file(&args.out).end(&whole(&output)?);
    }
    let saved = match overnight {
        true => {
            let worth = batch_plan::worth_saving(&args.engine, &file, &load, 1);
            Saved::open(&output, args.save_sequences, worth, (&file, args.engine.kv_type), (1, load.context))
        }
        false => None,
    };
    drop(file);
    args.engine.say_what_is_lossy();
    let so_far = Arc::new(Mutex::new(Answer::default()));
    let run = BatchRun {
        file: args.file.clone(),
        name: name_of(&args.file),
        engine: engine(args, load.context),
        at_a_time: 1,
        pieces: Some(pieces(&so_far)),
        saving: saved.as_ref().map(Saved::saving),
        drafts: args.engine.usual_drafts(),
    };
    let shown = if overnight { Shown::file(&args.out) } else { Shown::terminal() };
    let mut show = Show { shown, so_far, failed: None, bar: message_line(), told: None };
    let outcome = run.until_told(&mut batch, &mut |progress, status, _| show.show(progress, status));
    show.bar.finish_and_clear();
    if let Some(saved) = saved {
        saved.end(batch.is_finished());
    }
    let summary = outcome.map_err(|error| match error {
        // There is only one request.
        RunError::Batch(BatchError::Broken { message, .. }) => BatchError::Broken { request: None, message }.into(),
        other => other,
    })?;
    if let Some(error) = show.failed {
        return Err(error);
    }
    if summary.interrupted {
        return Err(CliError::Interrupted(match overnight {
            true => {
                format!("interrupted: what was answered is in {}, and the same command goes on", args.out.display())
            }
            false => "interrupted: the answer is lost, since --overnight was not given".into(),
        }));
    }
    show.shown.end(&whole(&output)?)
}

/// Most tokens of an answer that nothing but the context limits.
fn longest_answer(load: &Load) -> u32 {
    u32::try_from(load.context.saturating_sub(load.prompt_tokens as usize)).unwrap_or(u32::MAX)
}

fn pieces(so_far: &Arc<Mutex<Answer>>) -> Pieces {
    let so_far = Arc::clone(so_far);
    Arc::new(move |_, piece| so_far.lock().unwrap_or_else(PoisonError::into_inner).take(piece))
}

/// The answer in the result.
fn whole(output: &Path) -> Result<Answer, CliError> {
    let text = fs::read(output).map_err(CliError::file(output, "read the result"))?;
    let result: Value =
        serde_json::from_slice(&text).map_err(|error| CliError::Failure(format!("{}: {error}", output.display())))?;
    if let Some(message) = result["error"]["message"].as_str() {
        return Err(CliError::SomeFailed(message.to_owned()));
    }
    let message = &result["response"]["body"]["choices"][0]["message"];
    let text = |field: &str| message[field].as_str().unwrap_or_default().to_owned();
    Ok(Answer { thinking: text("reasoning_content"), text: text("content") })
}

/// Where the answer so far is shown.
enum Shown {
    /// On standard output, as it comes: what has been shown of it.
    Terminal(Answer),
    /// In a file: what was written there, and when.
    File(PathBuf, Answer, Option<Instant>),
}

impl Shown {
    fn terminal() -> Self {
        Shown::Terminal(Answer::default())
    }

    fn file(path: &Path) -> Self {
        Shown::File(path.to_owned(), Answer::default(), None)
    }

    /// Shows what is new.
    fn show(&mut self, answer: &Answer) -> Result<(), CliError> {
        match self {
            Shown::Terminal(shown) => {
                let new = &answer.text[shown.text.len().min(answer.text.len())..];
                if !new.is_empty() {
                    print_text(new)?;
                }
                *shown = answer.clone();
            }
            Shown::File(path, written, at) => {
                if *answer != *written && at.is_none_or(|at| at.elapsed() >= WRITE_EVERY) {
                    replace_file(path, answer.whole().as_bytes()).map_err(CliError::file(path, "write the answer"))?;
                    (*written, *at) = (answer.clone(), Some(Instant::now()));
                }
            }
        }
        Ok(())
    }

    /// Shows the whole answer.
    fn end(mut self, answer: &Answer) -> Result<(), CliError> {
        if let Shown::File(_, written, at) = &mut self {
            (*written, *at) = (Answer::default(), None);
            // Also an answer without a word is a file.
            if *answer == Answer::default() {
                written.text.push('\n');
            }
        }
        self.show(answer)?;
        if matches!(self, Shown::Terminal(_)) { print_text("\n") } else { Ok(()) }
    }
}

/// Shows the answer and how far it is.
struct Show {
    shown: Shown,
    so_far: Arc<Mutex<Answer>>,
    failed: Option<CliError>,
    bar: indicatif::ProgressBar,
    told: Option<Instant>,
}

impl Show {
    fn show(&mut self, progress: &Progress, status: &Status) -> ControlFlow<()> {
        let answer = self.so_far.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !answer.text.is_empty() && matches!(self.shown, Shown::Terminal(_)) {
            self.bar.finish_and_clear();
        }
        if let Err(error) = self.shown.show(&answer) {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        let line = self.describe(progress, status);
        self.bar.set_message(line.clone());
        let quiet = matches!(self.shown, Shown::Terminal(_)) || !self.bar.is_hidden();
        if !quiet && self.told.is_none_or(|told| told.elapsed() >= LINES) {
            self.told = Some(Instant::now());
            note(&line);
        }
        ControlFlow::Continue(())
    }

    fn describe(&self, progress: &Progress, status: &Status) -> String {
        if status.reading > 0 || progress.generated == 0 {
            return format!("reading the question, {:.1} tokens/s", status.prompt_tokens_per_second);
        }
        let (now, mean) = (progress.tokens_per_second, progress.mean_tokens_per_second);
        let left = progress.seconds_left_at_most;
        let left = left.map_or_else(String::new, |left| format!(", whole in {} at the latest", seconds(left)));
        format!("{} in this run, {now:.2} tokens/s (mean {mean:.2}){left}", counted(progress.generated, "token"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_readable_whenever_it_is_looked_at() {
        let mut answer = Answer::default();
        assert_eq!(answer.whole(), "\n");
        answer.take(&Piece::Thinking("Hm".into()));
        assert_eq!(answer.whole(), "<think>\nHm\n");
        answer.take(&Piece::Text("\n\nYes".into()));
        assert_eq!(answer.whole(), "<think>\nHm\n</think>\n\nYes\n");
        assert_eq!(Answer { thinking: String::new(), text: "Yes".into() }.whole(), "Yes\n");
    }
}

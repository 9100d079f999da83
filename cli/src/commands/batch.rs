//! `sluice batch`: a file of requests becomes a file of results.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::{Value, json};
use sluice_batch::{Access, Batch, Earlier, Files as _, Index, Named, Options, Summary, Sync, SystemFiles};
use sluice_format::ModelFile;
use sluice_generate::Drafts;
use sluice_kernels::ThreadPool;
use sluice_model::{EngineOptions, RuntimeError};
use sluice_server::api::openai::line::known_fields;
use sluice_server::batch::{BatchRun, identity};
use sluice_server::models::name_of;

use crate::batch_load::{Rest, Scale};
use crate::batch_plan::{Plan, threads};
use crate::batch_progress::Reporter;
use crate::chat::nearest;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::saved::{SaveChoice, Saved};
use crate::size::parse_count;
use crate::terminal::{counted, note, print, print_json_line};

const EXAMPLES: &str = "\
Each line of IN is a request of OpenAI's batches (chat/completions, completions, responses), or the body of one alone, such \
as {\"prompt\": \"…\"}. OUT gets one line for each as soon as it is answered, with its `custom_id`. What has been done is kept in \
OUT.journal: if anything ends the run, the same command goes on, with the same results. docs/USAGE.md says more.

Exit codes: 0 all answered; 1 the run had to stop; 2 wrong usage; 3 all done, but some requests failed; 130 interrupted. After 1 and 130, \
the same command goes on. --dry-run gives 3 if some requests cannot be answered.

Examples:
  sluice batch r1.sluice questions.jsonl answers.jsonl
  sluice batch r1.sluice questions.jsonl answers.jsonl --dry-run
  sluice batch r1.sluice questions.jsonl answers.jsonl --budget 48GiB --json | tee progress.jsonl";

/// Answer a file of requests, many at a time; nothing is lost if it is interrupted
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME for the file made from a model on the hub
    pub(crate) file: PathBuf,

    /// The requests, one JSON object a line
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// The results, one JSON object a line
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Make the model file of hf:NAME if it is not there, without asking
    #[arg(long)]
    pub(crate) yes: bool,

    /// Check the requests, say how long what is left of them will take on this machine, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// Answers that are made at a time [default: what pays on this machine, given the speed of its drive, memory and processor]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    sequences: Option<NonZeroUsize>,

    /// Most tokens of a request and its answer together [default: what the longest request needs, or the model's limit]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    context: Option<NonZeroUsize>,

    /// When results and journal are made safe from a crash of the system; a killed process loses nothing in any case
    #[arg(long, value_name = "WHEN", default_value = "seconds")]
    sync: SyncChoice,

    /// Whether the sequences of unfinished requests are saved beside OUT, in OUT.sessions until all is done: a run that goes on then
    /// need not read their prompts again
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    save_sequences: SaveChoice,

    /// Print progress as JSON, one object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Fields of a line of OpenAI's batches.
const LINE_FIELDS: [&str; 4] = ["custom_id", "method", "url", "body"];
/// Most fields that a remark is made on.
const MOST_IGNORED: usize = 8;
/// Most failed requests that are named.
const MOST_NAMED: usize = 8;

/// When files are made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SyncChoice {
    /// After every write
    Always,
    /// Every five seconds, and at the end
    Seconds,
    /// Whenever the system likes
    Never,
}

impl SyncChoice {
    fn policy(self) -> Sync {
        match self {
            SyncChoice::Always => Sync::Always,
            SyncChoice::Seconds => Sync::Seconds,
            SyncChoice::Never => Sync::Never,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let options = Options { input: args.input.clone(), output: args.output.clone(), ..Options::default() };
    for written in [args.output.clone(), options.journal()] {
        CliError::refuse_output(&written, &[&args.file, &args.input])?;
    }
    refuse_folder(&args.output)?;
    args.engine.refuse_preference("batch")?;
    let file = ModelFile::open(&args.file)?;
    let index = options.index(&SystemFiles)?;
    let scale = Scale::of(&file, &args.input, &index)?;
    let context = scale.context(&file, &index, args.context.map(NonZeroUsize::get));
    let identity = identity(&file, &args.engine.options(context), context);
    let longest_answer = u32::try_from(context).ok();
    let options = Options { sync: args.sync.policy(), identity, now: now(), longest_answer, ..options };
    let earlier = Earlier::look(&SystemFiles, &options, &index)?;
    let rest = Rest::estimate(&scale, &index, context, earlier);
    if rest.is_finished() && !args.dry_run {
        let batch = Batch::open(&SystemFiles, options)?;
        Saved::remove(&args.output);
        return settle(&batch, &args.output, args.json);
    }
    let rest = rest.checked(&file, (&args.input, &index), &ThreadPool::new(threads(&args.engine)))?;
    let plan = Plan::choose(&args.engine, &file, &rest, (args.sequences, args.dry_run))?;
    let engine = EngineOptions { sequences: Some(plan.planned), ..args.engine.options(context) };
    // What is refused here leaves nothing behind that would bind the next run to its settings.
    engine.check_memory(&file).map_err(RuntimeError::from)?;
    say_what_is_ignored(&args.input, &index)?;
    if args.dry_run {
        return end_dry_run(args, &plan, &rest);
    }
    args.engine.say_what_is_lossy();
    match args.json {
        true => {
            print_json_line(&json!({"event": "begin", "plan": plan.to_json(&rest), "state": state(&rest, &index)}))?
        }
        false => note(&plan.describe(&rest).trim_end()),
    }
    // The run has an index of its own.
    drop((index, rest));
    let batch = Batch::open(&SystemFiles, options)?;
    answer(args, &file, (&plan, engine), batch)
}

/// Refuses results for which there is no folder, before anything is measured for them.
fn refuse_folder(output: &Path) -> Result<(), CliError> {
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder.metadata() {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(CliError::Failure(format!(
            "{}: {} is no folder: choose another place for the results",
            output.display(),
            folder.display()
        ))),
        Err(source) => Err(CliError::Failure(format!(
            "{}: cannot look at the folder {}: {source}. Make it, or choose another place for the results",
            output.display(),
            folder.display()
        ))),
    }
}

/// Says what a run would do, and how long it would take; and ends as the run would, as far as that is known.
fn end_dry_run(args: &Args, plan: &Plan, rest: &Rest) -> Result<(), CliError> {
    if args.json {
        print_json_line(&plan.to_json(rest))?
    } else {
        print(&plan.describe(rest))?
    }
    match rest.failures() {
        0 => Ok(()),
        failed => Err(CliError::SomeFailed(format!(
            "a run would end with exit code 3: {} cannot be answered, or failed before",
            counted(failed, "request")
        ))),
    }
}

/// Answers the requests.
fn answer(
    args: &Args,
    file: &ModelFile,
    (plan, engine): (&Plan, EngineOptions),
    mut batch: Batch,
) -> Result<(), CliError> {
    let worth = plan.worth_saving(&args.engine, file);
    let sizes = (plan.sequences, plan.context);
    let saved = Saved::open(&args.output, args.save_sequences, worth, (file, args.engine.kv_type), sizes);
    let run = BatchRun {
        file: args.file.clone(),
        name: name_of(&args.file),
        engine,
        at_a_time: plan.sequences,
        pieces: None,
        saving: saved.as_ref().map(Saved::saving),
        drafts: Drafts::Off,
    };
    let mut reporter = Reporter::new(args.json);
    let mut failed = None;
    let outcome =
        run.until_told(&mut batch, &mut |progress, status, report| match reporter.report(progress, status, report) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        });
    reporter.finish();
    match saved {
        Some(saved) => saved.end(batch.is_finished()),
        // Those of an earlier run.
        None if batch.is_finished() => Saved::remove(&args.output),
        None => {}
    }
    let ended = match (outcome, failed) {
        (Err(error), _) => Err(error.into()),
        (Ok(_), Some(error)) => Err(error),
        (Ok(_), None) => settle(&batch, &args.output, args.json),
    };
    if !batch.is_finished() {
        batch.give_up(&SystemFiles);
    }
    ended
}

/// How far a batch is when a run begins. Whether it is interrupted shows in the end.
fn state(rest: &Rest, index: &Index) -> Value {
    let (finished, failed) = rest.earlier.as_ref().map_or((0, 0), |earlier| (earlier.finished, earlier.failed));
    json!({"requests": index.entries.len(), "finished": finished, "failed": failed})
}

/// A remark for each field that requests have and that means nothing: it may be a slip of the pen.
fn say_what_is_ignored(input: &Path, index: &Index) -> Result<(), CliError> {
    let ignored = index.fields.iter().filter_map(|((url, field), line)| {
        let known = match url.as_str() {
            "" => LINE_FIELDS.map(str::to_owned).to_vec(),
            // What is wrong with the path is said in the result.
            url => known_fields(url)?,
        };
        // A body alone may have them.
        let is_known = known.contains(field) || LINE_FIELDS.contains(&field.as_str());
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        (!is_known).then(|| (*line, field, nearest(field, &names).map(str::to_owned)))
    });
    let mut ignored: Vec<_> = ignored.collect();
    ignored.sort_unstable();
    let more = ignored.len().saturating_sub(MOST_IGNORED);
    for (line, field, near) in ignored.into_iter().take(MOST_IGNORED) {
        let near = near.map_or_else(String::new, |near| format!(" Did you mean {near:?}?"));
        let first = named(input, index, line)?;
        note(&format_args!(
            "note: the field {field:?} is not known and is ignored. {first} is the first that has it.{near}"
        ));
    }
    if more > 0 {
        note(&format_args!("note: {} more are not known", counted(more, "field")));
    }
    Ok(())
}

/// The request on a line of the input.
fn named(input: &Path, index: &Index, line: u32) -> Result<String, CliError> {
    let Ok(at) = index.entries.binary_search_by_key(&line, |entry| entry.line) else {
        return Ok(format!("line {line}"));
    };
    let file = SystemFiles.open(input, Access::Read).map_err(CliError::file(input, "read the requests"))?;
    let custom_id = match Index::line(input, &*file, &index.entries[at])? {
        Ok(line) => line.custom_id,
        Err(error) => error.custom_id,
    };
    Ok(Named { line, custom_id }.to_string())
}

/// Says how a run has ended.
fn settle(batch: &Batch, output: &Path, json: bool) -> Result<(), CliError> {
    let (summary, failures) = (batch.summary(), batch.failures());
    if json {
        print_json_line(&json!({"event": "end", "state": summary, "failures": failures}))?;
    }
    for failure in failures.iter().take(MOST_NAMED) {
        note(&format_args!("failed: {failure}"));
    }
    let Summary { requests, finished, failed, interrupted } = summary;
    if failures.len() > MOST_NAMED {
        note(&"failed: and others");
    }
    let output = output.display();
    match (interrupted, failed) {
        (true, _) if batch.is_untouched() => Err(CliError::Interrupted(
            "interrupted before anything was generated, so nothing is kept. The same command goes on from the beginning".to_owned(),
        )),
        (true, _) => Err(CliError::Interrupted(format!(
            "interrupted: {finished} of {} have a result in {output}, and what was generated for others is kept. The same command goes \
             on where it was",
            counted(requests, "request")
        ))),
        (false, 0) => {
            if !json {
                note(&match requests {
                    1 => format!("the request is answered: {output}"),
                    _ => format!("all {requests} requests are answered: {output}"),
                });
            }
            Ok(())
        }
        (false, failed) => Err(CliError::SomeFailed(format!(
            "{failed} of {} failed: each has its error object in {output}",
            counted(requests, "request")
        ))),
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    sluice_server::clock::now().as_secs()
}

//! Works on batches, one after another, until the server is to end.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::Value;
use sluice_batch::{Batch, BatchError, Index, Line, Options, Sync, SystemFiles};
use sluice_format::ModelFile;
use tokio::runtime::Handle;

use super::object::{BatchObject, Counts, Problem, Status};
use super::store::Batches;
use crate::api::openai::now;
use crate::app::App;
use crate::batch::{BatchAnswerer, identity};
use crate::error::ApiError;

/// After how long a batch that could not go on is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Answers of a batch that wait for room, for each sequence that memory is planned for.
const WAITING: usize = 4;

/// Why a batch does not go on.
enum Halt {
    /// It never will.
    Failed(Problem),
    /// It may, later.
    Later(String),
}

impl From<ApiError> for Halt {
    fn from(error: ApiError) -> Self {
        if error.kind.status().is_server_error() {
            return Halt::Later(error.message);
        }
        let code = error.code.unwrap_or("invalid_request").to_owned();
        Halt::Failed(Problem { code, message: error.message, line: None, param: error.param })
    }
}

impl From<io::Error> for Halt {
    fn from(error: io::Error) -> Self {
        Halt::of_file(&error, error.to_string())
    }
}

impl Halt {
    /// It never goes on. The message is for clients, who need not know where the server keeps what.
    fn failed(code: &str, message: impl Into<String>, line: Option<usize>) -> Halt {
        Halt::Failed(Problem { code: code.to_owned(), message: message.into(), line, param: None })
    }

    /// A file that is gone or damaged stays so, and other batches must not wait for it.
    fn of_file(error: &io::Error, message: String) -> Halt {
        use io::ErrorKind::{InvalidData, InvalidInput, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
        let kinds = [InvalidData, InvalidInput, IsADirectory, NotADirectory, NotFound, UnexpectedEof];
        if !kinds.contains(&error.kind()) {
            return Halt::Later(message);
        }
        tracing::error!(message, "a file of a batch is lost or damaged");
        Halt::failed("file_lost", "a file of this batch is lost or damaged; the log of the server says which", None)
    }
}

impl From<BatchError> for Halt {
    fn from(error: BatchError) -> Self {
        match &error {
            BatchError::File { source, .. } | BatchError::Start { source, .. } => {
                Halt::of_file(source, error.to_string())
            }
            BatchError::Broken { .. } | BatchError::Busy { .. } => Halt::Later(error.to_string()),
            BatchError::Duplicate { first, second, id, .. } => {
                let message = format!("lines {first} and {second} have the same custom_id {id:?}: give each its own");
                Halt::failed("duplicate_custom_id", message, Some(*second))
            }
            BatchError::TooMany { most, .. } => {
                Halt::failed("invalid_batch", format!("the file has more than {most} lines: split it"), None)
            }
            BatchError::OtherModel { .. } | BatchError::OtherSettings { .. } => {
                let message = "the model or its settings are others than when the batch began: make another batch";
                Halt::failed("model_changed", message, None)
            }
            BatchError::InputChanged { .. }
            | BatchError::OutputExists { .. }
            | BatchError::OutputChanged { .. }
            | BatchError::JournalLost { .. }
            | BatchError::JournalDamaged { .. }
            | BatchError::NotAJournal { .. }
            | BatchError::NotRegular { .. } => {
                tracing::error!(message = %error, "a batch cannot go on");
                let message = "a file of this batch is damaged; the log of the server says which. Make another batch";
                Halt::failed("file_lost", message, None)
            }
        }
    }
}

/// Works until the server is to end. Blocks; `runtime` is where answers are made.
pub fn work(app: &Arc<App>, batches: &Batches, runtime: &Handle) {
    while let Some((batch, stop)) = batches.next() {
        let id = batch.id.clone();
        match (Work { app, batches, runtime, batch, stop }).run() {
            Ok(()) => {}
            Err(Halt::Failed(problem)) => {
                tracing::warn!(id, message = problem.message, "a batch has failed");
                let failed = batches.change(&id, |batch| {
                    batch.problems.push(problem);
                    batch.set(Status::Failed);
                });
                if let Err(error) = failed {
                    tracing::error!(id, %error, "a batch cannot be described");
                    batches.pause(RETRY);
                }
            }
            Err(Halt::Later(message)) => {
                tracing::error!(id, message, "a batch waits, and is tried again");
                batches.pause(RETRY);
            }
        }
    }
}

/// Work on one batch.
struct Work<'a> {
    app: &'a Arc<App>,
    batches: &'a Batches,
    runtime: &'a Handle,
    batch: BatchObject,
    stop: Arc<AtomicBool>,
}

impl Work<'_> {
    fn run(&self) -> Result<(), Halt> {
        let Work { batches, batch, .. } = self;
        let (input, output) = (batches.content(&batch.input_file_id), batches.results(&batch.id));
        let options = Options { input, output, sync: Sync::Seconds, now: now(), ..Options::default() };
        if batch.status == Status::Cancelling && !options.journal().exists() {
            batches.change(&batch.id, |batch| batch.set(Status::Cancelled))?;
            return Ok(());
        }
        if batch.status != Status::Finalizing {
            let finished = self.answer(&options)?;
            let cancelled = batches.batch(&batch.id)?.status == Status::Cancelling;
            match (finished, cancelled) {
                // The server ends; the next one goes on.
                (false, false) => return Ok(()),
                (true, false) => _ = batches.change(&batch.id, |batch| batch.advance(Status::Finalizing))?,
                (_, true) => {}
            }
        }
        settle(batches, &batch.id, &options)
    }

    /// Answers the requests; whether all have a result now.
    fn answer(&self, options: &Options) -> Result<bool, Halt> {
        let Work { app, batches, runtime, batch, stop } = self;
        let index = options.index(&SystemFiles)?;
        let served = runtime.block_on(app.models.get(&model(&options.input, &index)?))?;
        let engine = &app.options.engine;
        let file = ModelFile::open(app.models.find(&served.id)?.path());
        let file = file.map_err(|error| Halt::Later(error.to_string()))?;
        let identity = identity(&file, engine, served.context());
        let mut run = open(Options { identity, ..options.clone() })?;
        if batch.status == Status::Validating {
            batches.change(&batch.id, |batch| batch.advance(Status::InProgress))?;
        }
        let answerer = BatchAnswerer::new(served, (*runtime).clone());
        let answerer = answerer.in_background(batch.endpoint.clone(), Arc::clone(&app.models));
        let at_a_time = WAITING * engine.sequences.unwrap_or(1).max(1);
        let summary = run.run(&answerer, at_a_time, stop, &mut |progress| {
            let (finished, failed) = (progress.finished, progress.failed);
            batches.count(&batch.id, Counts { total: progress.requests, completed: finished - failed, failed });
            if batches.is_closing() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(!summary.interrupted)
    }
}

/// Begins a batch or goes on with it. Where its journal is lost or damaged, it begins again: nobody has seen its results yet, and the same
/// come again.
fn open(options: Options) -> Result<Batch, Halt> {
    let error = match Batch::open(&SystemFiles, options.clone()) {
        Err(error @ (BatchError::JournalLost { .. } | BatchError::JournalDamaged { .. })) => error,
        other => return Ok(other?),
    };
    tracing::error!(message = %error, "a batch begins again; its files are kept under names that end in .damaged");
    for path in [options.journal(), options.output.clone()] {
        let mut aside = path.clone().into_os_string();
        aside.push(".damaged");
        match fs::rename(&path, &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Halt::Later(error.to_string())),
            _ => {}
        }
    }
    Ok(Batch::open(&SystemFiles, options)?)
}

/// The model that the requests name: that of the first line that is one.
fn model(input: &Path, index: &Index) -> Result<String, Halt> {
    let file = File::open(input)?;
    for entry in &index.entries {
        let mut line = vec![0; entry.bytes.unwrap_or(0) as usize];
        file.read_exact_at(&mut line, entry.offset)?;
        if let Ok(line) = Line::parse(&line, entry.line as usize) {
            return Ok(line.body.get("model").and_then(Value::as_str).unwrap_or_default().to_owned());
        }
    }
    let message =
        "no line of the file is a request: each is a JSON object with `custom_id`, `method`, `url` and `body`".into();
    Err(Halt::Failed(Problem { code: "empty_batch".into(), message, line: None, param: Some("input_file_id".into()) }))
}

/// What keeps results from their files passes: when somebody has made room, for instance.
fn later(error: ApiError) -> Halt {
    Halt::Later(error.message)
}

/// Puts the results into files of their own, those of requests that failed apart. Done again after a crash, it only leaves files behind that
/// nobody knows.
fn settle(batches: &Batches, id: &str, options: &Options) -> Result<(), Halt> {
    let (mut output, mut errors) = (batches.upload().map_err(later)?, batches.upload().map_err(later)?);
    let mut counts = Counts { total: options.index(&SystemFiles)?.entries.len(), ..Counts::default() };
    for line in BufReader::new(File::open(&options.output)?).split(b'\n') {
        let mut line = line?;
        let value: Value = serde_json::from_slice(&line).map_err(io::Error::from)?;
        line.push(b'\n');
        if value["error"].is_null() {
            counts.completed += 1;
            output.write(&line).map_err(later)?;
        } else {
            counts.failed += 1;
            errors.write(&line).map_err(later)?;
        }
    }
    let keep = |upload: super::Upload<'_>, count: usize, name: &str| match count {
        0 => Ok(None),
        _ => upload.keep(format!("{id}_{name}.jsonl"), "batch_output").map(|file| Some(file.id)).map_err(later),
    };
    let (output, errors) = (keep(output, counts.completed, "output")?, keep(errors, counts.failed, "error")?);
    batches.change(id, |batch| {
        (batch.output_file_id, batch.error_file_id, batch.counts) = (output, errors, counts);
        batch.set(if batch.status == Status::Cancelling { Status::Cancelled } else { Status::Completed });
    })?;
    for path in [options.journal(), options.output.clone()] {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a file that nobody needs any more cannot be removed");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_with_a_damaged_journal_begins_again_and_clients_see_no_paths() {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
        fs::write(&input, "{\"prompt\": \"x\"}\n").unwrap();
        let options = Options { input, output, ..Options::default() };
        drop(open(options.clone()).map_err(|_| ()).unwrap());
        // As after a crash that has left the results and not the journal.
        fs::write(options.journal(), "").unwrap();
        fs::write(&options.output, "{}\n").unwrap();
        let batch = open(options.clone()).map_err(|_| ()).unwrap();
        assert!(!batch.is_finished());
        assert_eq!(fs::read(folder.path().join("out.jsonl.damaged")).unwrap(), b"{}\n");
        drop(batch);
        fs::write(options.journal(), "something else").unwrap();
        let Err(Halt::Failed(problem)) = open(options.clone()) else { panic!("it is no journal") };
        assert!(problem.code == "file_lost" && !problem.message.contains("out.jsonl"), "{}", problem.message);
        fs::remove_file(&options.input).unwrap();
        let Err(Halt::Failed(problem)) = open(options) else { panic!("there is no input") };
        assert!(problem.code == "file_lost" && !problem.message.contains("in.jsonl"), "{}", problem.message);
    }
}

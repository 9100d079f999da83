//! The files of a batch: who has them, and whether they belong together.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::BatchError;
use crate::files::{Access, Files, OpenFile};
use crate::index::Index;
use crate::journal::{Header, Journal};
use crate::output::Output;
use crate::run::{Identity, Options};

/// The file at `path`, if there is one.
pub(crate) fn open_there(files: &dyn Files, path: &Path) -> Result<Option<Box<dyn OpenFile>>, BatchError> {
    match files.open(path, Access::Read) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(BatchError::file(path, "look at it")(error)),
    }
}

/// The files of a run, and what its journal begins with, if it has begun.
pub(crate) struct Claimed {
    pub(crate) journal: Journal,
    pub(crate) output: Box<dyn OpenFile>,
    pub(crate) begun: Option<Header>,
    /// If the run has not begun: those of the files in which there was nothing before, but not an output that somebody else has made.
    pub(crate) made: Vec<PathBuf>,
}

/// Opens journal and output, which are made if they are not there; with the journal's header, if the run has begun already.
pub(crate) fn claim(files: &dyn Files, options: &Options) -> Result<Claimed, BatchError> {
    let path = options.journal();
    let is_new = open_there(files, &path)?.is_none();
    let mut made = vec![path.clone()];
    match open_there(files, &options.output)? {
        // Nothing is made where a run would not begin.
        Some(output) if is_new => _ = Output::begin(&options.output, output, &path)?,
        Some(_) => {}
        None if options.output.is_symlink() => {}
        None => made.push(options.output.clone()),
    }
    let open = |path: &Path| files.open(path, Access::Write).map_err(BatchError::file(path, "open it"));
    let opened = open(&path).and_then(|file| {
        let (journal, begun) = Journal::claim(&path, file)?;
        match open(&options.output) {
            Ok(output) => {
                let made = if begun.is_none() { made } else { Vec::new() };
                Ok(Claimed { journal, output, begun, made })
            }
            Err(error) => {
                if is_new {
                    // An empty journal says nothing, and is no obstacle for the next run.
                    let _ = files.remove(&path);
                }
                Err(error)
            }
        }
    });
    if is_new { opened.map_err(BatchError::at_start) } else { opened }
}

/// Begins a run: its results are empty, and its journal names what it belongs to.
pub(crate) fn begin(
    files: &dyn Files,
    options: &Options,
    index: &Index,
    mut journal: Journal,
    output: Box<dyn OpenFile>,
) -> Result<(Journal, Output), BatchError> {
    let path = options.journal();
    let output = Output::begin(&options.output, output, &path).map_err(|error| match error {
        // There is a journal: it was opened, and has no header.
        BatchError::OutputExists { path: output, journal } => BatchError::JournalLost { path: journal, output },
        other => other.at_start(),
    })?;
    let Identity { model, settings, .. } = options.identity.clone();
    let header = Header { digest: index.digest, length: index.length, started: options.now, model, settings };
    journal.begin(&header).map_err(BatchError::at_start)?;
    let named = files.sync_folder_of(&options.output);
    named.map_err(BatchError::file(&options.output, "sync the folder of the results")).map_err(BatchError::at_start)?;
    Ok((journal, output))
}

/// Refuses to go on with anything else than the run began with.
pub(crate) fn check(header: &Header, index: &Index, options: &Options, journal: &Path) -> Result<(), BatchError> {
    let (journal, now) = (journal.to_owned(), &options.identity);
    if (header.digest, header.length) != (index.digest, index.length) {
        return Err(BatchError::InputChanged { path: options.input.clone() });
    }
    if header.model != now.model {
        return Err(BatchError::OtherModel { journal, before: header.model.clone(), now: now.model.clone() });
    }
    if header.settings != now.settings {
        let (before, now) = (header.settings.clone(), now.settings.clone());
        return Err(BatchError::OtherSettings { journal, before, now });
    }
    Ok(())
}

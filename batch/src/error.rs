//! Why a batch does not go on.

use std::io;
use std::path::{Path, PathBuf};

use crate::line::Named;

/// Why a batch does not begin or go on. Nothing that was written is lost by any of these; where the cause can be removed, the same command
/// goes on afterwards.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The filesystem, before anything is done in this run.
    #[error("{path}: cannot {action}: {source}")]
    Start {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The filesystem.
    #[error(
        "{path}: cannot {action}: {source}. Nothing is lost: once that is mended, the same command goes on where it was"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// Another process works on the same output.
    #[error("{path}: another process is working on this batch: wait for it, or end it")]
    Busy {
        /// The journal.
        path: PathBuf,
    },
    /// Two requests with one name.
    #[error(
        "{path}: lines {first} and {second} have the same custom_id {id:?}: results could not be told apart. Give each its own"
    )]
    Duplicate {
        /// The input.
        path: PathBuf,
        /// The line that has it first, from 1.
        first: usize,
        /// The other.
        second: usize,
        /// The name, shortened.
        id: String,
    },
    /// More requests than can be counted.
    #[error("{path}: more than {most} lines: split it")]
    TooMany {
        /// The input.
        path: PathBuf,
        /// The most.
        most: usize,
    },
    /// The input is another one than when the run began.
    #[error(
        "{path}: the requests are others than when this run began. Put the earlier file back to go on, or begin another run with another \
         output file"
    )]
    InputChanged {
        /// The input.
        path: PathBuf,
    },
    /// The model is another one than when the run began.
    #[error(
        "{journal}: this run began with another model ({before}, now {now}). Give that one to go on, or begin another run with another \
         output file"
    )]
    OtherModel {
        /// The journal.
        journal: PathBuf,
        /// What the journal says.
        before: String,
        /// What was given.
        now: String,
    },
    /// The settings that answers depend on are others than when the run began.
    #[error(
        "{journal}: this run began with other settings ({before}, now {now}). Give the same to go on, or begin another run with another \
         output file"
    )]
    OtherSettings {
        /// The journal.
        journal: PathBuf,
        /// What the journal says.
        before: String,
        /// What was given.
        now: String,
    },
    /// There is a file in the place of the output that no run has written.
    #[error(
        "{path}: there is a file already, and {journal} is not there, so it is not the result of a run: choose another name"
    )]
    OutputExists {
        /// The output.
        path: PathBuf,
        /// The journal that would belong to it.
        journal: PathBuf,
    },
    /// There is a journal without a header, and an output with results.
    #[error(
        "{path}: the beginning of the journal is missing, so it does not say which requests have a result in {output}. Nothing was \
         changed, and the results there are still good. Put a copy of the journal back to go on; without one, move both files away, and the same \
         command begins again"
    )]
    JournalLost {
        /// The journal.
        path: PathBuf,
        /// The output.
        output: PathBuf,
    },
    /// Something has changed the journal.
    #[error(
        "{path}: the journal is damaged at byte {offset}, and no interruption of a run leaves such damage. Nothing was changed, and the \
         results in the output are still good; the journal lists {results} of them in front of the damage. Put a copy of the journal back \
         to go on; without one, move both files away, and the same command begins again"
    )]
    JournalDamaged {
        /// The journal.
        path: PathBuf,
        /// Where the damaged record begins, in bytes.
        offset: u64,
        /// Results that the records in front of it list.
        results: usize,
    },
    /// The output does not hold what the journal says.
    #[error(
        "{path}: line {line} is not the result that this run has written. Put the file back as it was to go on, or begin another run with \
         another output file"
    )]
    OutputChanged {
        /// The output.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// There is a file in the place of the journal that is none.
    #[error("{path}: this is not a journal of this version of the program: choose another name for the output")]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be written to at any place.
    #[error("{path}: this is no regular file: results are written to a file, which the next run has to read")]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// The answerer cannot go on.
    #[error(
        "{}{message}. Nothing is lost: once that is mended, the same command goes on where it was",
        request.as_ref().map_or_else(String::new, |request| format!("{request}: "))
    )]
    Broken {
        /// The request that was being answered, if it was one.
        request: Option<Named>,
        /// What it says.
        message: String,
    },
}

impl BatchError {
    /// An adapter for `map_err`.
    pub(crate) fn file(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> BatchError {
        move |source| BatchError::File { path: path.to_owned(), action, source }
    }

    /// The same error, where it comes before anything is done.
    pub(crate) fn at_start(self) -> BatchError {
        match self {
            BatchError::File { path, action, source } => BatchError::Start { path, action, source },
            other => other,
        }
    }
}

//! Errors of commands, and their exit codes.

use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sluice_batch::BatchError;
use sluice_converter::ConvertError;
use sluice_format::{FormatError, ImportanceError, MAGIC, open_regular};
use sluice_generate::GenerationError;
use sluice_generate::sampler::SamplerError;
use sluice_lab::trace::{ReplayError, TraceError};
use sluice_model::RuntimeError;
use sluice_server::batch::RunError;
use sluice_storage::io::bench::BenchError;
use sluice_text::TextError;

/// Why a command failed. The message is one paragraph that says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line is invalid.
    #[error("{0}")]
    Usage(String),
    /// The command cannot be carried out.
    #[error("{0}")]
    Failure(String),
    /// A file that the command line names, other than a model, cannot be used.
    #[error("{path}: cannot {action}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The action that failed.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
    /// Standard input cannot be read.
    #[error("cannot read standard input: {0}")]
    Input(io::Error),
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Importance(#[from] ImportanceError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A trace that has been read has nothing to replay.
    #[error("{path}: {source}")]
    Replay {
        /// The trace.
        path: PathBuf,
        /// The reason.
        source: ReplayError,
    },
    /// A batch cannot begin or continue.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A batch is finished, but some requests were not answered.
    #[error("{0}")]
    SomeFailed(String),
    /// The user has interrupted it, and it can be continued.
    #[error("{0}")]
    Interrupted(String),
    /// The model's output has infinities or NaN.
    #[error("{file}: the model's output is not a number; check the file with `sluice verify`")]
    NotANumber {
        /// The model file.
        file: PathBuf,
    },
}

impl From<GenerationError> for CliError {
    fn from(error: GenerationError) -> Self {
        match error {
            GenerationError::Sampler(error) => CliError::Sampler(error),
            GenerationError::Text(error) => CliError::Text(error),
            GenerationError::Engine(error) => CliError::Runtime(error),
            other => CliError::Failure(other.to_string()),
        }
    }
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Batch(error) => CliError::Batch(error),
            RunError::Model(error) => error.into(),
            other => CliError::Failure(other.to_string()),
        }
    }
}

impl CliError {
    /// An adapter for `map_err`.
    pub(crate) fn file(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> CliError {
        move |source| CliError::File { path: path.to_owned(), action, source }
    }

    /// An adapter for `map_err`.
    pub(crate) fn replay(path: &Path) -> impl FnOnce(ReplayError) -> CliError {
        move |source| CliError::Replay { path: path.to_owned(), source }
    }

    /// Refuses to write to `out` if it is one of the input files, under whatever name.
    pub(crate) fn refuse_inputs(out: &Path, inputs: &[&Path]) -> Result<(), CliError> {
        let identity = |path: &Path| path.metadata().ok().map(|m| (m.dev(), m.ino()));
        let Some(target) = identity(out) else { return Ok(()) };
        match inputs.iter().find(|input| identity(input) == Some(target)) {
            None => Ok(()),
            Some(input) => Err(CliError::Usage(format!(
                "{} is a file that is read{}: choose another name to write to",
                out.display(),
                if out == *input { String::new() } else { format!(", as {}", input.display()) }
            ))),
        }
    }

    /// Like [`Self::refuse_inputs`], for a result that is not a model file: it must not replace a model file either, which may have
    /// taken hours.
    pub(crate) fn refuse_output(out: &Path, inputs: &[&Path]) -> Result<(), CliError> {
        Self::refuse_inputs(out, inputs)?;
        let mut head = [0; MAGIC.len()];
        let is_model = open_regular(out).and_then(|mut file| file.read_exact(&mut head)).is_ok() && head == MAGIC;
        match is_model {
            true => Err(CliError::Usage(format!("{} is a model file: choose another name to write to", out.display()))),
            false => Ok(()),
        }
    }

    /// 2 if the command line must change, which includes what is in the place of a file that would be written; 3 and 130 for batches;
    /// otherwise 1.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            CliError::Usage(_)
            | CliError::Convert(
                ConvertError::Options(_)
                | ConvertError::Exists { .. }
                | ConvertError::Namesake { .. }
                | ConvertError::IsVolume { .. }
                | ConvertError::NotReplaced { .. }
                | ConvertError::OtherModel { .. }
                | ConvertError::InTheWay { .. },
            )
            | CliError::Bench(BenchError::ScratchSize { .. })
            | CliError::Sampler(SamplerError::Config { .. })
            | CliError::Batch(
                BatchError::Duplicate { .. }
                | BatchError::TooMany { .. }
                | BatchError::InputChanged { .. }
                | BatchError::OtherModel { .. }
                | BatchError::OtherSettings { .. }
                | BatchError::OutputExists { .. }
                | BatchError::NotAJournal { .. }
                | BatchError::NotRegular { .. },
            )
            | CliError::Text(TextError::EmptyStopString { .. } | TextError::StopStringTooLong { .. }) => 2,
            CliError::SomeFailed(_) => 3,
            // The code that shells use for a program that SIGINT has ended.
            CliError::Interrupted(_) => 130,
            _ => 1,
        }
    }

    /// Whether the reader of our output has gone, which is not an error.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_hub::HubError;

    #[test]
    fn exit_codes() {
        assert_eq!(CliError::Usage(String::new()).exit_code(), 2);
        assert_eq!(CliError::Text(TextError::EmptyStopString { index: 0 }).exit_code(), 2);
        assert_eq!(CliError::Failure(String::new()).exit_code(), 1);
        // Whatever command finds something where it would write.
        let path = PathBuf::from("m.sluice");
        for there in [
            ConvertError::Exists { path: path.clone() },
            ConvertError::Namesake { path: path.clone(), volume: path.clone() },
            ConvertError::IsVolume { path: path.clone(), problem: String::new() },
            ConvertError::NotReplaced { path: path.clone(), problem: "it is a folder" },
            ConvertError::OtherModel { path: path.clone(), first: path.clone() },
            ConvertError::InTheWay { path: path.clone(), problem: "it is a folder" },
        ] {
            assert_eq!(CliError::from(there).exit_code(), 2);
        }
        let there = BatchError::OutputExists { path: path.clone(), journal: path.clone() };
        assert_eq!(CliError::from(there).exit_code(), 2);
        assert_eq!(CliError::from(HubError::InTheWay { path, problem: String::new() }).exit_code(), 2);
        let pipe = CliError::Output(io::ErrorKind::BrokenPipe.into());
        assert!(pipe.is_broken_pipe() && pipe.exit_code() == 1);
    }
}

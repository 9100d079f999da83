//! What earlier runs of a batch have done, for a plan of the rest.

use std::collections::HashMap;
use std::path::Path;

use crate::claim::{check, open_there};
use crate::error::BatchError;
use crate::files::Files;
use crate::index::Index;
use crate::journal::Journal;
use crate::output::Output;
use crate::run::Options;

/// What earlier runs of a batch have done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// Whether each request has a result.
    pub done: Vec<bool>,
    /// Those that have one.
    pub finished: usize,
    /// Of these, those that failed.
    pub failed: usize,
    /// Answers of the others, and the tokens that were generated for them.
    pub answers: u64,
    /// See `answers`.
    pub generated: u64,
    /// Tokens that were sampled for requests without a result.
    pub sampled: HashMap<u32, u64>,
}

impl Earlier {
    /// Looks at the journal and the output of a batch, without changing anything or waiting for a run that goes on; `None`: no run has begun.
    ///
    /// # Errors
    /// What would keep a run from going on, except that another process is working on it.
    pub fn look(files: &dyn Files, options: &Options, index: &Index) -> Result<Option<Earlier>, BatchError> {
        Self::read(files, options, index, &options.journal()).map_err(BatchError::at_start)
    }

    fn read(files: &dyn Files, options: &Options, index: &Index, path: &Path) -> Result<Option<Earlier>, BatchError> {
        let (journal, output) = (open_there(files, path)?, open_there(files, &options.output)?);
        let found = journal.map(|journal| Journal::look(path, journal)).transpose()?;
        let is_there = found.is_some();
        let Some((journal, header)) = found.and_then(|(journal, header)| Some((journal, header?))) else {
            return match output.map(|output| Output::begin(&options.output, output, path)).transpose() {
                Ok(_) => Ok(None),
                Err(BatchError::OutputExists { path: output, journal }) if is_there => {
                    Err(BatchError::JournalLost { path: journal, output })
                }
                Err(error) => Err(error),
            };
        };
        check(&header, index, options, path)?;
        let (mut content, ..) = journal.scan(index.entries.len())?;
        let kept = match output {
            Some(output) => Output::count(&options.output, output, &content.results)?,
            None => 0,
        };
        content.results.truncate(kept);
        let mut earlier = Earlier { done: vec![false; index.entries.len()], finished: kept, ..Earlier::default() };
        for written in &content.results {
            earlier.done[written.request as usize] = true;
            if written.failed {
                earlier.failed += 1;
                continue;
            }
            earlier.answers += u64::from(index.entries[written.request as usize].wanted.answers);
            earlier.generated += u64::from(written.generated);
        }
        let count = |answers: Vec<Vec<_>>| answers.iter().map(|tokens| tokens.len() as u64).sum();
        earlier.sampled = content.sampled.into_iter().map(|(request, answers)| (request, count(answers))).collect();
        Ok(Some(earlier))
    }
}

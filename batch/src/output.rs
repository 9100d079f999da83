//! The output: results, one a line, appended as they come, each once.

use std::path::{Path, PathBuf};

use sluice_checksum::Xxh3;

use crate::error::BatchError;
use crate::files::{OpenFile, Scan, write_all};
use crate::journal::Written;

/// The open output.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    file: Box<dyn OpenFile>,
    end: u64,
}

impl Output {
    /// The output of a run that begins: it must be empty.
    pub(crate) fn begin(path: &Path, file: Box<dyn OpenFile>, journal: &Path) -> Result<Self, BatchError> {
        let output = Self::new(path, file)?;
        let length = output.file.len().map_err(BatchError::file(path, "look at the results"))?;
        match length {
            0 => Ok(output),
            _ => Err(BatchError::OutputExists { path: path.to_owned(), journal: journal.to_owned() }),
        }
    }

    /// The output of a run that goes on, and how many of its results are there. What follows them is cut off: results that
    /// are not in the journal, or half of one.
    ///
    /// # Errors
    /// The filesystem's, or that a result is another one than was written. That a crash of the system left nothing or zeros in the
    /// place of the last ones is no error.
    pub(crate) fn resume(
        path: &Path,
        file: Box<dyn OpenFile>,
        results: &[Written],
    ) -> Result<(Self, usize), BatchError> {
        let mut output = Self::new(path, file)?;
        let io = |action| BatchError::file(path, action);
        let length = output.file.len().map_err(io("read the results"))?;
        let (kept, end) = output.kept(results)?;
        if end < length {
            output.file.cut(end).map_err(io("cut the results"))?;
            // What was cut must not come back behind results that follow.
            output.sync()?;
        }
        output.end = end;
        Ok((output, kept))
    }

    /// How many of these results an output has. Changes nothing.
    ///
    /// # Errors
    /// Like [`Output::resume`].
    pub(crate) fn count(path: &Path, file: Box<dyn OpenFile>, results: &[Written]) -> Result<usize, BatchError> {
        Ok(Self::new(path, file)?.kept(results)?.0)
    }

    /// How many of these results are there, and where the last of them ends.
    fn kept(&self, results: &[Written]) -> Result<(usize, u64), BatchError> {
        let path = &self.path;
        let (mut kept, mut end) = (0, 0);
        let mut scan = Scan::new(&*self.file, 0);
        for written in results {
            match same(&mut scan, written).map_err(BatchError::file(path, "read the results"))? {
                Found::Same => {}
                Found::Lost => break,
                Found::Other => return Err(BatchError::OutputChanged { path: path.clone(), line: kept + 1 }),
            }
            end += u64::from(written.bytes);
            kept += 1;
        }
        Ok((kept, end))
    }

    fn new(path: &Path, file: Box<dyn OpenFile>) -> Result<Self, BatchError> {
        match file.is_regular().map_err(BatchError::file(path, "look at the results"))? {
            true => Ok(Output { path: path.to_owned(), file, end: 0 }),
            false => Err(BatchError::NotRegular { path: path.to_owned() }),
        }
    }

    /// Appends a line, with its end.
    pub(crate) fn append(&mut self, line: &[u8]) -> Result<(), BatchError> {
        write_all(&*self.file, line, self.end).map_err(BatchError::file(&self.path, "write a result"))?;
        self.end += line.len() as u64;
        Ok(())
    }

    /// Makes everything durable.
    pub(crate) fn sync(&self) -> Result<(), BatchError> {
        self.file.sync().map_err(BatchError::file(&self.path, "sync the results"))
    }
}

/// What is in the place of a result.
enum Found {
    /// The result.
    Same,
    /// Nothing, or something with zeros, which no result has: a crash of the system has lost it.
    Lost,
    /// Something else.
    Other,
}

fn same(scan: &mut Scan<'_>, written: &Written) -> std::io::Result<Found> {
    let mut left = written.bytes as usize;
    let (mut digest, mut zeros) = (Xxh3::new(), false);
    while left > 0 {
        let bytes = scan.next(left)?;
        if bytes.is_empty() {
            return Ok(Found::Lost);
        }
        digest.update(bytes);
        zeros |= bytes.contains(&0);
        left -= bytes.len();
    }
    Ok(match digest.digest() == written.checksum {
        true => Found::Same,
        false if zeros => Found::Lost,
        false => Found::Other,
    })
}

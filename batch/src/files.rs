//! The files of a batch, behind a trait: so that tests can have any operation fail, as a full or a broken drive does.

use std::fmt;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use sluice_format::{Syncer, open_regular};

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be read.
    Read,
    /// To be read and written; it is made if it is not there.
    Write,
}

/// Opens files.
pub trait Files: Send + Sync + fmt::Debug {
    /// Opens a file.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn OpenFile>>;

    /// Makes the names in the folder of this file durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_folder_of(&self, path: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// An open file.
pub trait OpenFile: Send + fmt::Debug {
    /// Its length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// What the system says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Whether it is a regular file.
    ///
    /// # Errors
    /// What the system says.
    fn is_regular(&self) -> io::Result<bool>;

    /// Reads some bytes at an offset; 0 at the end.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes some of the bytes at an offset, and says how many.
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Cuts it to a length.
    ///
    /// # Errors
    /// What the system says.
    fn cut(&self, length: u64) -> io::Result<()>;

    /// Makes its content durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&self) -> io::Result<()>;

    /// Locks it for this process until it is dropped; false if another one has it.
    ///
    /// # Errors
    /// What the system says.
    fn lock(&self) -> io::Result<bool>;
}

/// The files of the system. Where a filesystem cannot sync or lock, that is no error: it is as safe as it can be there.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemFiles;

impl Files for SystemFiles {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn OpenFile>> {
        let file = match access {
            Access::Read => open_regular(path)?,
            // What people ask is nobody else's business.
            Access::Write => {
                File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?
            }
        };
        Ok(Box::new(SystemFile { file, syncer: Syncer::default() }))
    }

    fn sync_folder_of(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Syncer::default().folder(folder)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}

#[derive(Debug)]
struct SystemFile {
    file: File,
    syncer: Syncer,
}

impl OpenFile for SystemFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn is_regular(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.is_file())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset)
    }

    fn cut(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncer.data(&self.file)
    }

    fn lock(&self) -> io::Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Reads bytes at an offset until there are enough or the file ends; how many there were.
pub(crate) fn read_full(file: &dyn OpenFile, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes all bytes at an offset.
pub(crate) fn write_all(file: &dyn OpenFile, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.write_at(&bytes[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A file that is read from its beginning, in pieces.
pub(crate) struct Scan<'a> {
    file: &'a dyn OpenFile,
    offset: u64,
    buffer: Vec<u8>,
    /// What of the buffer has not been taken.
    start: usize,
    filled: usize,
}

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

impl<'a> Scan<'a> {
    pub(crate) fn new(file: &'a dyn OpenFile, offset: u64) -> Self {
        Scan { file, offset, buffer: vec![0; PIECE], start: 0, filled: 0 }
    }

    /// The next bytes, `most` at most and as many as are there; none at the end.
    pub(crate) fn next(&mut self, most: usize) -> io::Result<&[u8]> {
        if self.start == self.filled {
            self.filled = read_full(self.file, &mut self.buffer, self.offset)?;
            self.offset += self.filled as u64;
            self.start = 0;
        }
        let end = self.filled.min(self.start.saturating_add(most));
        let taken = &self.buffer[self.start..end];
        self.start = end;
        Ok(taken)
    }

    /// Fills `bytes`; false if the file ends before.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        let mut done = 0;
        while done < bytes.len() {
            let next = self.next(bytes.len() - done)?;
            if next.is_empty() {
                return Ok(false);
            }
            bytes[done..done + next.len()].copy_from_slice(next);
            done += next.len();
        }
        Ok(true)
    }
}

//! What can go wrong between a file and a slot, and what the user can do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Names an extent in messages; plain data, so that passing it costs nothing.
///
/// ```
/// use sluice_storage::io::ExtentName;
/// assert_eq!(ExtentName::expert(3, 17).to_string(), "layer 3 expert 17");
/// assert_eq!(ExtentName::dense("attention", Some(3)).to_string(), "layer 3 attention");
/// assert_eq!(ExtentName::dense("token embedding", None).to_string(), "token embedding");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExtentName {
    /// What the extent holds, in words.
    pub kind: &'static str,
    /// Its layer, if it belongs to one.
    pub layer: Option<u32>,
    /// Its number within the layer (experts), or within its kind.
    pub index: Option<u32>,
}

impl ExtentName {
    /// Names one routed expert.
    #[must_use]
    pub fn expert(layer: u32, expert: u32) -> Self {
        Self { kind: "expert", layer: Some(layer), index: Some(expert) }
    }

    /// Names a dense part, by layer if it belongs to one.
    #[must_use]
    pub fn dense(kind: &'static str, layer: Option<u32>) -> Self {
        Self { kind, layer, index: None }
    }
}

impl fmt::Display for ExtentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer} ")?;
        }
        f.write_str(self.kind)?;
        match (self.layer, self.index) {
            (_, None) => Ok(()),
            (Some(_), Some(index)) => write!(f, " {index}"),
            (None, Some(index)) => write!(f, " part {index}"),
        }
    }
}

/// Why the storage engine could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The file could not be opened, or not be read at all.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused the memory for slots.
    #[error(
        "cannot map {bytes} bytes of memory for {what}: {source}; \
         give a smaller budget or free memory"
    )]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The purpose of the memory.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The read engine that the caller named cannot run here.
    #[error("the {engine} read engine cannot run here: {reason}; use the automatic choice")]
    EngineUnavailable {
        /// The engine's name.
        engine: &'static str,
        /// Why.
        reason: String,
    },
    /// A number in the configuration is outside what the engine can do.
    #[error("{name} = {value} is not possible: {rule}")]
    Config {
        /// The setting.
        name: &'static str,
        /// What it was set to.
        value: usize,
        /// What it has to be.
        rule: &'static str,
    },
    /// The I/O thread could not be started.
    #[error("cannot start the I/O thread: {0}")]
    Thread(#[source] io::Error),
}

/// Why one extent could not be brought into memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The drive (or filesystem) reported an error, twice.
    #[error(
        "{extent}: reading {len} bytes at offset {offset} of {path} failed twice: {source}; \
         check the drive's health and cabling, then copy or convert the model again"
    )]
    Device {
        /// The extent that was being read.
        extent: ExtentName,
        /// The file.
        path: PathBuf,
        /// Byte offset of the failed chunk in the file.
        offset: u64,
        /// Bytes of the failed chunk.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The system did not give the memory to read into.
    #[error(
        "{extent}: the system gives no memory for {len} bytes that are to be read: {source}; \
         free memory, or give a smaller budget"
    )]
    Memory {
        /// The extent that was being read.
        extent: ExtentName,
        /// Bytes of the chunk that was to be read.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The bytes read were twice not the bytes that were written.
    #[error(
        "{extent}: the {len} bytes at offset {offset} of {path} are damaged: checksum \
         {got:016x}, expected {expected:016x}, also after reading again; \
         restore or convert the file again"
    )]
    Checksum {
        /// The damaged extent.
        extent: ExtentName,
        /// The file.
        path: PathBuf,
        /// Byte offset of the extent in the file.
        offset: u64,
        /// Bytes of the extent.
        len: usize,
        /// xxh3-64 that the file's table promises.
        expected: u64,
        /// xxh3-64 of the bytes that arrived.
        got: u64,
    },
    /// The stored bytes have the checksum in the file's table, but the decompressed bytes do not.
    #[error(
        "{extent}: the {len} bytes at offset {offset} of {path} cannot be decompressed: {problem}; \
         get or convert the file again"
    )]
    Code {
        /// The extent.
        extent: ExtentName,
        /// The file.
        path: PathBuf,
        /// Byte offset of the extent in the file.
        offset: u64,
        /// Its stored bytes.
        len: usize,
        /// What is wrong.
        problem: String,
    },
    /// The file ended, or reads stopped making progress, inside the extent.
    #[error(
        "{extent}: {path} yields no bytes at offset {offset}, although the extent goes on; \
         the file was cut off: copy or convert it again"
    )]
    Truncated {
        /// The extent that was being read.
        extent: ExtentName,
        /// The file.
        path: PathBuf,
        /// Byte offset at which the drive returned nothing.
        offset: u64,
    },
    /// The request names bytes outside the file, or unaligned ones.
    #[error(
        "{extent}: {len} bytes at offset {offset} of file {file} cannot be read: {rule}; \
         the model file is not valid: convert it again"
    )]
    Request {
        /// The extent that was asked for.
        extent: ExtentName,
        /// Index of the file.
        file: u16,
        /// Byte offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// The rule that the request breaks.
        rule: &'static str,
    },
    /// The read was cancelled before it was complete. Not a fault.
    #[error("{extent}: the read was cancelled")]
    Cancelled {
        /// The extent that was being read.
        extent: ExtentName,
    },
    /// The I/O thread has ended, by an error of the engine itself.
    #[error("the I/O thread has stopped: {reason}")]
    Stopped {
        /// The path or engine that caused it, in words.
        reason: String,
    },
}

impl ReadError {
    /// True for a read that ended because it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, ReadError::Cancelled { .. })
    }
}

/// Where a file's bytes are, for messages and range checks.
#[derive(Clone, Debug)]
pub struct FileInfo {
    /// The path as it was given.
    pub path: PathBuf,
    /// Length in bytes.
    pub len: u64,
}

impl FileInfo {
    /// Describes a file.
    #[must_use]
    pub fn new(path: &Path, len: u64) -> Self {
        Self { path: path.to_owned(), len }
    }
}

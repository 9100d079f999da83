//! Reading from drives: files, slots, and for each drive one thread that keeps it busy.
//!
//! ```text
//! pool ── submit(slot, extent) ──▶ Scheduler ── chunks ──▶ ReadEngine ──▶ drive
//!      ◀─ PendingRead: prefix, ──  I/O thread ◀─ completions ──  uring | pread | sim
//!         then slot
//! ```
//!
//! - [`arena`]: the memory. A [`Slot`] owns its bytes; while a read is in flight, the read does.
//! - [`fill`]: the two ends of a read into a slot: the engine's, which writes, and the caller's, which sees the prefix that has come.
//! - [`mod@file`]: opening for direct I/O, and the proof that it is engaged.
//! - [`ReadEngine`]: moves chunks. Knows no extents, no checksums, no priorities.
//! - [`queue`]: the order of chunks. Pure.
//! - [`mod@bench`] and [`calibration`]: how fast a drive is with these engines, and how it is best read.
//! - [`lane`]: one for each drive with files, with its own thread, engine, queue, chunk size and depth; lanes share only the
//!   waiting of callers. The stripes of an extent can lie in several lanes, which read them into one slot at the same time.
//! - [`scheduler`] and `worker`: the handle and the thread: chunks in flight, short reads,
//!   retries, checksums, cancellation, counters.
//! - `sim`, with the feature of that name: simulated drives, for tests and measurements.
//!
//! This module knows neither the pool nor the model file's format: it is given plain offsets,
//! lengths and checksums.

pub mod arena;
pub mod bench;
pub mod calibration;
mod depth;
pub mod error;
pub mod file;
pub mod fill;
pub mod lane;
pub mod pread;
pub mod queue;
pub mod scheduler;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod sys;
#[cfg(target_os = "linux")]
pub mod uring;
mod worker;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use arena::{Arena, PAGE_BYTES, Region, Slot};
pub use calibration::{Calibration, CalibrationStore, Tuning, TuningSource};
pub use error::{ExtentName, FileInfo, IoError, ReadError};
pub use file::{DataFile, DirectIo, DirectMode};
pub use fill::{ChunkMem, ReadPhase};
pub use lane::{IoStats, Lane, LaneInfo, open_lanes};
pub use scheduler::{Check, Class, ExtentRead, IoConfig, PendingRead, ReadFailure, Scheduler, StripeRead};
#[cfg(target_os = "macos")]
pub use sys::physical_pages;
pub use sys::{memory_pressure_level, survive_file_size_limit, trim_heap};

/// Most chunks in flight at once. More would not help on any drive: 128 × 1 MiB is a second of work for a slow one.
pub const DEPTH_MAX: usize = 128;

/// One read of one chunk. The engine owns the memory until it returns the completion.
#[derive(Debug)]
pub struct ChunkRead {
    /// Chosen by the caller, below the engine's depth, unique among the reads it has accepted.
    pub tag: u32,
    /// Index of the file.
    pub file: u16,
    /// Byte offset in the file, a multiple of [`PAGE_BYTES`].
    pub offset: u64,
    /// Where the bytes go. Its length is the number of bytes to read, a multiple of [`PAGE_BYTES`].
    pub mem: ChunkMem,
}

/// The end of one [`ChunkRead`].
#[derive(Debug)]
pub struct Completion {
    /// The tag of the read.
    pub tag: u32,
    /// The memory, back from the engine.
    pub mem: ChunkMem,
    /// Bytes read, from the start of the memory. Fewer than asked for is a short read, 0 is the
    /// end of the file. Errors are the system's, unchanged.
    pub result: io::Result<usize>,
}

/// How long [`ReadEngine::complete`] may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    Poll,
    /// Until a completion, a wake-up, or this much time.
    Timeout(Duration),
    /// Until a completion or a wake-up.
    Forever,
}

/// Ends a blocking [`ReadEngine::complete`] from another thread.
pub trait Wake: Send + Sync {
    /// Makes the current blocking `complete`, or else the next one, return soon.
    fn wake(&self);
}

/// What an engine is, for messages, range checks and reports.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Short name: `uring`, `pread`, `sim`.
    pub name: &'static str,
    /// One line on how it works here, and why not better.
    pub note: String,
    /// Reads that it can have accepted at once.
    pub depth: usize,
    /// The files, in the order of their indices.
    pub files: Vec<FileInfo>,
}

/// Moves chunks from files to memory. One thread at a time uses it.
///
/// Every accepted read ends exactly once: by a completion, or by a successful cancel. Dropping
/// an engine first waits for whatever still writes to memory.
pub trait ReadEngine: Send {
    /// What this engine is.
    fn info(&self) -> &EngineInfo;

    /// Accepts a read. It is issued at the next `complete` at the latest.
    ///
    /// # Panics
    /// If `depth` reads have been accepted and have not ended, or the file index is unknown.
    fn submit(&mut self, read: ChunkRead);

    /// Takes back a read that has not been issued to the system; `None` if it is too late. The read then completes as
    /// usual.
    fn cancel(&mut self, tag: u32) -> Option<ChunkRead>;

    /// Issues the accepted reads, waits as told, and appends the reads that have ended.
    ///
    /// # Errors
    /// Only errors that make the whole engine useless; errors of reads are in the completions.
    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()>;

    /// A handle by which other threads end a blocking `complete`.
    fn waker(&self) -> Arc<dyn Wake>;

    /// The engine's short name.
    fn name(&self) -> &'static str {
        self.info().name
    }

    /// Reads that it can have accepted at once.
    fn depth(&self) -> usize {
        self.info().depth
    }
}

/// Which read engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// `uring` if the system has it and the files are read directly, otherwise `pread`.
    #[default]
    Auto,
    /// io_uring, or an error saying why not.
    Uring,
    /// A pool of threads that read.
    Pread,
}

/// Why io_uring cannot be used here, if it cannot.
///
/// # Errors
/// The reason, in words.
pub fn try_uring() -> Result<(), String> {
    #[cfg(target_os = "linux")]
    return uring::UringEngine::plain(&[], 1).map(drop);
    #[cfg(not(target_os = "linux"))]
    open_uring(&[], &[], 1).map(drop)
}

/// Starts a read engine on `files`. `regions` is the memory that reads will go to: engines that
/// can register it with the kernel do so.
///
/// # Errors
/// [`IoError::EngineUnavailable`] if the engine named in `kind` cannot run here,
/// [`IoError::Config`] if the depth is not possible, [`IoError::Thread`].
pub fn open_engine(
    kind: EngineKind,
    files: Vec<DataFile>,
    regions: &[Region],
    config: &IoConfig,
) -> Result<Box<dyn ReadEngine>, IoError> {
    config.validate()?;
    let why = match kind {
        EngineKind::Pread => "chosen by setting or calibration".to_owned(),
        EngineKind::Auto if files.iter().any(|file| !file.direct().is_engaged()) => {
            "buffered reads are faster with threads than with io_uring".to_owned()
        }
        EngineKind::Auto | EngineKind::Uring => {
            let error = match open_uring(&files, regions, config.depth) {
                Ok(engine) => return Ok(engine),
                Err(error) => error,
            };
            if kind == EngineKind::Uring {
                return Err(IoError::EngineUnavailable { engine: "uring", reason: error });
            }
            error
        }
    };
    Ok(Box::new(pread::PreadEngine::new(files, config.depth, &why)?))
}

/// An io_uring that registers nothing with the kernel: only to measure what registering gains.
pub(crate) fn open_plain_uring(files: &[DataFile], config: &IoConfig) -> Result<Box<dyn ReadEngine>, IoError> {
    config.validate()?;
    #[cfg(target_os = "linux")]
    let engine = uring::UringEngine::plain(files, config.depth).map(|engine| Box::new(engine) as Box<dyn ReadEngine>);
    #[cfg(not(target_os = "linux"))]
    let engine = open_uring(files, &[], config.depth);
    engine.map_err(|reason| IoError::EngineUnavailable { engine: "uring", reason })
}

#[cfg(target_os = "linux")]
fn open_uring(files: &[DataFile], regions: &[Region], depth: usize) -> Result<Box<dyn ReadEngine>, String> {
    let engine = uring::UringEngine::new(files, regions, depth)?;
    Ok(Box::new(engine))
}

#[cfg(not(target_os = "linux"))]
fn open_uring(_: &[DataFile], _: &[Region], _: usize) -> Result<Box<dyn ReadEngine>, String> {
    Err("io_uring is a Linux interface".to_owned())
}

#[cfg(test)]
mod tests;

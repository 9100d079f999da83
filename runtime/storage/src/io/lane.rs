//! A lane: a drive with all files that lie on it, read by one I/O thread with its own engine, queue, chunk size and depth.
//!
//! Lanes do not wait for each other. They share only the waiting of callers, because a caller may wait for any of several reads,
//! whichever drives they come from.

use std::collections::VecDeque;
use std::fmt;
use std::iter::Sum;
use std::ops::Add;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::arena::Region;
use super::calibration::{DeviceId, Tuning, TuningSource};
use super::depth::Depth;
use super::error::{FileInfo, IoError, ReadError};
use super::file::DataFile;
use super::fill::Filling;
use super::scheduler::{ExtentRead, IoConfig};
use super::{EngineInfo, ReadEngine, Wake, open_engine};

/// A waiter looks at the state this many times before it goes to sleep.
const SPINS: usize = 200;

/// How many messages the inbox of an I/O thread has room for from the start, so that it need not grow later.
const INBOX_COMMANDS: usize = 1024;

/// A drive to be read.
pub struct Lane {
    /// What reads it.
    pub engine: Box<dyn ReadEngine>,
    /// Index of each of the engine's files among the files of all lanes.
    pub files: Vec<u16>,
    /// Chunks and depths.
    pub config: IoConfig,
    /// Whether the I/O thread finds out how many chunks should be in flight, whatever the depths in `config`, if the engine takes 16.
    pub adapts: bool,
}

/// A drive that is being read.
#[derive(Clone, Debug)]
pub struct LaneInfo {
    /// What reads it.
    pub engine: EngineInfo,
    /// Index of each of the engine's files among the files of all lanes.
    pub files: Vec<u16>,
    /// Chunks and depths.
    pub config: IoConfig,
}

/// Makes a lane for each drive that has files, in the order of their first files. `tuning` says how each file is best read; the
/// first file on a drive decides for the drive. `regions` is as for [`open_engine`].
///
/// # Errors
/// [`IoError::Open`] if the system does not say which drive a file is on; otherwise as [`open_engine`].
///
/// # Panics
/// Unless there is a tuning for each file.
pub fn open_lanes(files: Vec<DataFile>, tuning: &[Tuning], regions: &[Region]) -> Result<Vec<Lane>, IoError> {
    assert_eq!(files.len(), tuning.len(), "a tuning for each file");
    let mut drives: Vec<(DeviceId, &Tuning, Vec<u16>, Vec<DataFile>)> = Vec::new();
    for (number, (file, tuning)) in (0..).zip(files.into_iter().zip(tuning)) {
        let failed = |source| IoError::Open { path: file.path().to_owned(), source };
        let device = DeviceId::of(&file).map_err(failed)?;
        match drives.iter_mut().find(|drive| drive.0.is_same(&device)) {
            Some((.., numbers, files)) => {
                numbers.push(number);
                files.push(file);
            }
            None => drives.push((device, tuning, vec![number], vec![file])),
        }
    }
    let lane = |(_, tuning, numbers, files): (DeviceId, &Tuning, Vec<u16>, Vec<DataFile>)| {
        let (adapts, config) = (matches!(tuning.source, TuningSource::Default(_)), tuning.config.clone());
        let most = if adapts { Depth::MOST } else { config.depth };
        let engine = open_engine(tuning.engine, files, regions, &IoConfig { depth: most, ..config.clone() })?;
        Ok(Lane { engine, files: numbers, config, adapts })
    };
    drives.into_iter().map(lane).collect()
}

/// Message to the I/O thread.
#[derive(Debug)]
pub(crate) enum Command {
    Read { id: u64, filling: Filling, read: ExtentRead },
    Cancel(u64),
    Promote(u64),
}

#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) commands: VecDeque<Command>,
    pub(crate) closing: bool,
    /// Why the I/O thread has ended, once it has.
    pub(crate) stopped: Option<String>,
}

/// The state that an I/O thread shares with its callers.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// The I/O thread is, or is about to be, blocked in the engine.
    pub(crate) asleep: AtomicBool,
    waker: Arc<dyn Wake>,
    next_id: AtomicU64,
    /// Whether any chunk of this lane is in flight.
    reading: AtomicBool,
    pub(crate) counters: Counters,
    /// Chunks that may be in flight.
    pub(crate) depth: AtomicUsize,
    /// The lane's own files.
    pub(crate) files: Vec<FileInfo>,
    pub(crate) waiters: Arc<Waiters>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(engine: &dyn ReadEngine, waiters: &Arc<Waiters>) -> Shared {
        Shared {
            inbox: Mutex::new(Inbox { commands: VecDeque::with_capacity(INBOX_COMMANDS), ..Inbox::default() }),
            asleep: AtomicBool::new(false),
            waker: engine.waker(),
            next_id: AtomicU64::new(0),
            reading: AtomicBool::new(false),
            counters: Counters::default(),
            depth: AtomicUsize::new(0),
            files: engine.info().files.clone(),
            waiters: Arc::clone(waiters),
        }
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Relaxed)
    }

    /// Notes whether chunks of this lane are in flight.
    pub(crate) fn set_reading(&self, reading: bool) {
        if self.reading.swap(reading, Relaxed) != reading {
            self.waiters.lane_reads(reading);
        }
    }

    pub(crate) fn stats(&self) -> IoStats {
        self.counters.snapshot()
    }

    pub(crate) fn lock_inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wake_thread(&self) {
        if self.asleep.swap(false, SeqCst) {
            self.waker.wake();
        }
    }

    pub(crate) fn send(&self, command: Command) {
        let mut inbox = self.lock_inbox();
        if inbox.stopped.is_none() {
            inbox.commands.push_back(command);
        }
        drop(inbox);
        self.wake_thread();
    }

    pub(crate) fn stopped_error(&self) -> ReadError {
        let reason = self.lock_inbox().stopped.clone();
        ReadError::Stopped { reason: reason.unwrap_or_else(|| "it has panicked".to_owned()) }
    }
}

/// The callers that wait for reads, in any lane.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    /// Counts events that waiters may be waiting for.
    events: AtomicU64,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    event: Condvar,
    /// Reads that have ended, in all lanes.
    ended: AtomicU64,
    /// Lanes with chunks in flight.
    lanes_reading: Mutex<usize>,
    /// Whether any lane has chunks in flight.
    pub(crate) reading: Arc<AtomicBool>,
    pub(crate) wait_ns: AtomicU64,
}

impl Waiters {
    /// The next place in the order in which reads end.
    pub(crate) fn next_end(&self) -> u64 {
        self.ended.fetch_add(1, SeqCst) + 1
    }

    fn lane_reads(&self, reading: bool) {
        let mut lanes = self.lanes_reading.lock().unwrap_or_else(PoisonError::into_inner);
        *lanes = if reading { *lanes + 1 } else { *lanes - 1 };
        self.reading.store(*lanes > 0, Relaxed);
    }

    /// Tells waiters that some read's state has changed.
    pub(crate) fn announce(&self) {
        self.events.fetch_add(1, SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.event.notify_all();
        }
    }

    /// Blocks until `ready` returns a value, and counts the time as waiting.
    pub(crate) fn wait<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = ready() {
            return value;
        }
        let start = Instant::now();
        let value = self.wait_slowly(&mut ready);
        let waited_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.wait_ns.fetch_add(waited_ns, Relaxed);
        value
    }

    fn wait_slowly<T>(&self, ready: &mut impl FnMut() -> Option<T>) -> T {
        for _ in 0..SPINS {
            std::hint::spin_loop();
            if let Some(value) = ready() {
                return value;
            }
        }
        loop {
            self.sleepers.fetch_add(1, SeqCst);
            let seen = self.events.load(SeqCst);
            let value = ready();
            if value.is_none() {
                let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
                while self.events.load(SeqCst) == seen {
                    guard = self.event.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
            }
            self.sleepers.fetch_sub(1, SeqCst);
            if let Some(value) = value {
                return value;
            }
        }
    }
}

/// Totals of a lane since the start, written by its I/O thread.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) demand_bytes: AtomicU64,
    pub(crate) prefetch_bytes: AtomicU64,
    pub(crate) extents: AtomicU64,
    pub(crate) chunks: AtomicU64,
    pub(crate) short_reads: AtomicU64,
    pub(crate) device_retries: AtomicU64,
    pub(crate) checksum_retries: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) busy_ns: AtomicU64,
}

impl Counters {
    fn snapshot(&self) -> IoStats {
        IoStats {
            demand_bytes: self.demand_bytes.load(Relaxed),
            prefetch_bytes: self.prefetch_bytes.load(Relaxed),
            extents: self.extents.load(Relaxed),
            chunks: self.chunks.load(Relaxed),
            short_reads: self.short_reads.load(Relaxed),
            device_retries: self.device_retries.load(Relaxed),
            checksum_retries: self.checksum_retries.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            busy_ns: self.busy_ns.load(Relaxed),
            wait_ns: 0,
        }
    }
}

/// Totals of one lane or of all since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Bytes of demand reads.
    pub demand_bytes: u64,
    /// Bytes prefetched.
    pub prefetch_bytes: u64,
    /// Extents that became ready.
    pub extents: u64,
    /// Chunks read completely.
    pub chunks: u64,
    /// Reads that returned fewer bytes than asked for, and were continued.
    pub short_reads: u64,
    /// Chunks read again after an error of the drive.
    pub device_retries: u64,
    /// Extents read again after a checksum mismatch.
    pub checksum_retries: u64,
    /// Reads that were cancelled before they were complete.
    pub cancelled: u64,
    /// Nanoseconds in which at least one chunk was in flight, summed over lanes.
    pub busy_ns: u64,
    /// Nanoseconds in which callers were blocked, summed over callers. 0 in the totals of one lane, because callers wait for
    /// any lane.
    pub wait_ns: u64,
}

impl IoStats {
    /// The difference to an earlier snapshot.
    #[must_use]
    pub fn since(&self, earlier: &IoStats) -> IoStats {
        IoStats {
            demand_bytes: self.demand_bytes - earlier.demand_bytes,
            prefetch_bytes: self.prefetch_bytes - earlier.prefetch_bytes,
            extents: self.extents - earlier.extents,
            chunks: self.chunks - earlier.chunks,
            short_reads: self.short_reads - earlier.short_reads,
            device_retries: self.device_retries - earlier.device_retries,
            checksum_retries: self.checksum_retries - earlier.checksum_retries,
            cancelled: self.cancelled - earlier.cancelled,
            busy_ns: self.busy_ns - earlier.busy_ns,
            wait_ns: self.wait_ns - earlier.wait_ns,
        }
    }
}

impl Add for IoStats {
    type Output = IoStats;

    fn add(self, other: IoStats) -> IoStats {
        IoStats {
            demand_bytes: self.demand_bytes + other.demand_bytes,
            prefetch_bytes: self.prefetch_bytes + other.prefetch_bytes,
            extents: self.extents + other.extents,
            chunks: self.chunks + other.chunks,
            short_reads: self.short_reads + other.short_reads,
            device_retries: self.device_retries + other.device_retries,
            checksum_retries: self.checksum_retries + other.checksum_retries,
            cancelled: self.cancelled + other.cancelled,
            busy_ns: self.busy_ns + other.busy_ns,
            wait_ns: self.wait_ns + other.wait_ns,
        }
    }
}

impl Sum for IoStats {
    fn sum<I: Iterator<Item = IoStats>>(stats: I) -> IoStats {
        stats.fold(IoStats::default(), Add::add)
    }
}

#[cfg(test)]
mod tests;

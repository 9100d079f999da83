//! The handle on the I/O thread: extents go in with the slots they are to fill, slots come out.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::arena::{PAGE_BYTES, Slot};
use super::error::{ExtentName, FileInfo, IoError, ReadError};
use super::fill::{Arriving, Filling, ReadPhase};
use super::{DEPTH_MAX, EngineInfo, ReadEngine, Wake, worker};

/// Largest chunk: one registered buffer overlaps the next by this much.
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// Looks at the state this many times before a waiter goes to sleep.
const SPINS: usize = 200;

/// Room made at start for messages to the I/O thread, so that it does not grow later.
const INBOX_COMMANDS: usize = 1024;

/// Who wants an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The router asked for it: someone is waiting.
    Demand,
    /// We guess that it will be asked for.
    Prefetch,
}

/// Who compares an extent's bytes with its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The I/O thread, before the read ends. Damaged bytes are read once more.
    Here,
    /// The I/O thread, and it is the second reading already: the first one's bytes were damaged.
    Again,
    /// Whoever receives the bytes. They can be looked at while the read goes on.
    ByReceiver,
}

/// How extents are read. Sizes come from a calibration of the drive where there is one.
#[derive(Clone, Debug)]
pub struct IoConfig {
    /// Bytes of one chunk, a multiple of [`PAGE_BYTES`].
    pub chunk_bytes: usize,
    /// Chunks in flight.
    pub depth: usize,
    /// Of these, at most this many for prefetch reads.
    pub prefetch_depth: usize,
    /// Verify every extent by its checksum. Off only to measure what it costs.
    pub verify: bool,
}

impl Default for IoConfig {
    fn default() -> Self {
        Self { chunk_bytes: 1 << 20, depth: 4, prefetch_depth: 4, verify: true }
    }
}

impl IoConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`IoError::Config`] names the first that is not possible.
    pub fn validate(&self) -> Result<(), IoError> {
        let refuse = |name, value, rule| Err(IoError::Config { name, value, rule });
        let chunk = self.chunk_bytes;
        if chunk == 0 || chunk > CHUNK_BYTES_MAX || !chunk.is_multiple_of(PAGE_BYTES) {
            return refuse("chunk_bytes", chunk, "a multiple of 4096 bytes, at most 16MiB");
        }
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return refuse("depth", self.depth, "1 to 128");
        }
        if self.prefetch_depth == 0 || self.prefetch_depth > self.depth {
            return refuse("prefetch_depth", self.prefetch_depth, "1 to depth");
        }
        Ok(())
    }
}

/// One extent to be read.
#[derive(Clone, Copy, Debug)]
pub struct ExtentRead {
    /// Index of the file.
    pub file: u16,
    /// Byte offset in the file, a multiple of [`PAGE_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`PAGE_BYTES`].
    pub len: usize,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
    /// Who wants it.
    pub class: Class,
    /// Who verifies it; nobody if [`IoConfig::verify`] is off.
    pub check: Check,
    /// What it is, for messages.
    pub name: ExtentName,
}

/// A read that ended without its extent.
#[derive(Debug)]
pub struct ReadFailure {
    /// Why.
    pub error: Box<ReadError>,
    /// The slot, to be used again; gone if the I/O thread died while a drive could write to it.
    pub slot: Option<Slot>,
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

/// What the I/O thread shares with everyone who waits for it.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// The I/O thread is, or is about to be, blocked in the engine.
    pub(crate) asleep: AtomicBool,
    waker: Arc<dyn Wake>,
    /// Counts events that waiters may be waiting for.
    events: AtomicU64,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    event: Condvar,
    next_id: AtomicU64,
    /// Whether any chunk is in flight.
    pub(crate) reading: Arc<AtomicBool>,
    pub(crate) counters: Counters,
    pub(crate) files: Vec<FileInfo>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn lock_inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_thread(&self) {
        if self.asleep.swap(false, SeqCst) {
            self.waker.wake();
        }
    }

    fn send(&self, command: Command) {
        let mut inbox = self.lock_inbox();
        if inbox.stopped.is_none() {
            inbox.commands.push_back(command);
        }
        drop(inbox);
        self.wake_thread();
    }

    /// Tells waiters that some read's state has changed.
    pub(crate) fn announce(&self) {
        self.events.fetch_add(1, SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.event.notify_all();
        }
    }

    /// Blocks until `ready` gives something. Counts the time as waiting.
    fn wait<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = ready() {
            return value;
        }
        let start = Instant::now();
        let value = self.wait_slowly(&mut ready);
        let waited_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.wait_ns.fetch_add(waited_ns, Relaxed);
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

    fn stopped_error(&self) -> ReadError {
        let reason = self.lock_inbox().stopped.clone();
        ReadError::Stopped { reason: reason.unwrap_or_else(|| "it has panicked".to_owned()) }
    }
}

/// Totals since the start, written by the I/O thread and by waiters.
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
    pub(crate) wait_ns: AtomicU64,
}

/// Totals of the I/O thread since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Bytes read because someone waited for them.
    pub demand_bytes: u64,
    /// Bytes read on a guess.
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
    /// Nanoseconds in which at least one chunk was in flight.
    pub busy_ns: u64,
    /// Nanoseconds in which a caller was blocked, summed over callers.
    pub wait_ns: u64,
}

impl IoStats {
    /// What was added since an earlier snapshot.
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

/// The I/O thread. Dropping it cancels what is queued, awaits what is in flight, and ends it.
#[derive(Debug)]
pub struct Scheduler {
    shared: Arc<Shared>,
    info: EngineInfo,
    config: IoConfig,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the I/O thread, which owns the engine from now on.
    ///
    /// # Errors
    /// [`IoError::Config`] or [`IoError::Thread`].
    pub fn start(engine: Box<dyn ReadEngine>, config: IoConfig) -> Result<Scheduler, IoError> {
        config.validate()?;
        let info = engine.info().clone();
        let inbox = Inbox { commands: VecDeque::with_capacity(INBOX_COMMANDS), ..Inbox::default() };
        let shared = Arc::new(Shared {
            inbox: Mutex::new(inbox),
            asleep: AtomicBool::new(false),
            waker: engine.waker(),
            events: AtomicU64::new(0),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            event: Condvar::new(),
            next_id: AtomicU64::new(0),
            reading: Arc::new(AtomicBool::new(false)),
            counters: Counters::default(),
            files: info.files.clone(),
        });
        let (for_thread, thread_config) = (Arc::clone(&shared), config.clone());
        let thread = std::thread::Builder::new()
            .name("sluice-io".to_owned())
            .spawn(move || worker::run(engine, for_thread, &thread_config))
            .map_err(IoError::Thread)?;
        Ok(Scheduler { shared, info, config, thread: Some(thread) })
    }

    /// What the engine is.
    #[must_use]
    pub fn engine(&self) -> &EngineInfo {
        &self.info
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &IoConfig {
        &self.config
    }

    /// Says at any time whether reads are in flight.
    #[must_use]
    pub fn reading(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.shared.reading)
    }

    /// Queues the read of an extent into a slot. Returns at once.
    ///
    /// # Errors
    /// [`ReadError::Request`] if file, offset or length are not possible or the slot is too
    /// small, [`ReadError::Stopped`] if the I/O thread has ended.
    pub fn submit(&self, slot: Slot, read: ExtentRead) -> Result<PendingRead, ReadFailure> {
        if let Err(error) = self.check(&slot, &read).map_err(Box::new) {
            return Err(ReadFailure { error, slot: Some(slot) });
        }
        let mut inbox = self.shared.lock_inbox();
        if let Some(reason) = inbox.stopped.clone() {
            let error = Box::new(ReadError::Stopped { reason });
            return Err(ReadFailure { error, slot: Some(slot) });
        }
        let id = self.shared.next_id.fetch_add(1, Relaxed);
        let open = read.check == Check::ByReceiver;
        let (filling, arriving) = Filling::begin(slot, read.len, self.config.chunk_bytes, open);
        inbox.commands.push_back(Command::Read { id, filling, read });
        drop(inbox);
        self.shared.wake_thread();
        let shared = Arc::clone(&self.shared);
        Ok(PendingRead { arriving: Some(arriving), shared, id, name: read.name })
    }

    fn check(&self, slot: &Slot, read: &ExtentRead) -> Result<(), ReadError> {
        let &ExtentRead { file, offset, len, name: extent, .. } = read;
        let refuse = |rule| Err(ReadError::Request { extent, file, offset, len, rule });
        let Some(info) = self.shared.files.get(usize::from(file)) else {
            return refuse("there is no such file");
        };
        let page = PAGE_BYTES as u64;
        if len == 0 || !len.is_multiple_of(PAGE_BYTES) || !offset.is_multiple_of(page) {
            return refuse("offset and length have to be multiples of 4096");
        }
        if offset.checked_add(len as u64).is_none_or(|end| end > info.len) {
            return refuse("the file ends before the extent does");
        }
        if len > slot.capacity() {
            return refuse("it is larger than the slot");
        }
        Ok(())
    }

    /// Makes the I/O thread look at what has changed: memory that was given back or taken again.
    pub fn wake(&self) {
        self.shared.wake_thread();
    }

    /// Blocks until `ready` gives something; it is asked whenever a read's state has changed.
    /// The time is counted in [`IoStats::wait_ns`].
    pub fn wait<T>(&self, ready: impl FnMut() -> Option<T>) -> T {
        self.shared.wait(ready)
    }

    /// Totals since the start.
    #[must_use]
    pub fn stats(&self) -> IoStats {
        let counters = &self.shared.counters;
        IoStats {
            demand_bytes: counters.demand_bytes.load(Relaxed),
            prefetch_bytes: counters.prefetch_bytes.load(Relaxed),
            extents: counters.extents.load(Relaxed),
            chunks: counters.chunks.load(Relaxed),
            short_reads: counters.short_reads.load(Relaxed),
            device_retries: counters.device_retries.load(Relaxed),
            checksum_retries: counters.checksum_retries.load(Relaxed),
            cancelled: counters.cancelled.load(Relaxed),
            busy_ns: counters.busy_ns.load(Relaxed),
            wait_ns: counters.wait_ns.load(Relaxed),
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.shared.lock_inbox().closing = true;
        self.shared.wake_thread();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by then, and its reads are lost.
            let _ = thread.join();
        }
    }
}

/// A read in progress. It holds the slot until the read has ended.
///
/// Dropping it cancels the read and gives up the slot; the memory stays valid until nothing is
/// in flight.
#[derive(Debug)]
pub struct PendingRead {
    /// Taken only by `finish`, which consumes the read.
    arriving: Option<Arriving>,
    shared: Arc<Shared>,
    id: u64,
    name: ExtentName,
}

impl PendingRead {
    fn arriving(&self) -> &Arriving {
        match &self.arriving {
            Some(arriving) => arriving,
            None => unreachable!("only `finish` takes it, and ends the life of the read"),
        }
    }

    /// Where the read is.
    #[must_use]
    pub fn phase(&self) -> ReadPhase {
        self.arriving().phase()
    }

    /// True once the read has ended, well or badly.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.phase() != ReadPhase::Reading
    }

    /// What is being read.
    #[must_use]
    pub fn name(&self) -> ExtentName {
        self.name
    }

    /// Bytes of the extent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.arriving().len()
    }

    /// Never true: extents have at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Position in the order in which reads ended; meaningful once this one has.
    #[must_use]
    pub fn order(&self) -> u64 {
        self.arriving().finished()
    }

    /// Bytes that are in memory, contiguous from the start, of an extent that its receiver verifies; of others 0.
    #[must_use]
    pub fn arrived_prefix(&self) -> usize {
        self.arriving().arrived_bytes()
    }

    /// The bytes of the arrived prefix. Nobody has verified them.
    #[must_use]
    pub fn prefix(&self) -> &[u8] {
        self.arriving().prefix()
    }

    /// Blocks until at least `bytes` have arrived, or the read has ended.
    pub fn wait_prefix(&self, bytes: usize) {
        let enough = || (self.arrived_prefix() >= bytes || self.is_done()).then_some(());
        self.shared.wait(enough);
    }

    /// Blocks until the read has ended.
    pub fn wait(&self) {
        self.shared.wait(|| self.is_done().then_some(()));
    }

    /// Asks for the read to end early. What the drive is doing already is awaited; the read then
    /// ends as [`ReadError::Cancelled`], or as ready if it was too late.
    pub fn cancel(&self) {
        if !self.is_done() {
            self.shared.send(Command::Cancel(self.id));
        }
    }

    /// Turns a prefetch read into a demand read.
    pub fn promote(&self) {
        if !self.is_done() {
            self.shared.send(Command::Promote(self.id));
        }
    }

    /// Blocks until the read has ended, and returns the slot with its bytes, verified as was asked for.
    ///
    /// # Errors
    /// [`ReadFailure`] with the reason, and the slot to be used again.
    pub fn finish(mut self) -> Result<Slot, ReadFailure> {
        self.wait();
        let Some(arriving) = self.arriving.take() else {
            unreachable!("only `finish` takes it, and ends the life of the read")
        };
        arriving.finish().map_err(|(error, slot)| ReadFailure {
            error: error.unwrap_or_else(|| Box::new(self.shared.stopped_error())),
            slot,
        })
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        if self.arriving.is_some() {
            self.cancel();
        }
    }
}

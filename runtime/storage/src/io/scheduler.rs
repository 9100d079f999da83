//! The handle on the I/O threads: extents go in with the slots for them, and filled slots come out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use super::arena::{PAGE_BYTES, Slot};
use super::error::{ExtentName, IoError, ReadError};
use super::fill::{Arriving, Filling, ReadPhase, STRIPES_MAX};
use super::lane::{Command, IoStats, Lane, LaneInfo, Shared, Waiters};
use super::{DEPTH_MAX, EngineInfo, ReadEngine, worker};

/// Largest chunk: one registered buffer overlaps the next by this much.
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// Why an extent is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The router has asked for it, and a caller waits.
    Demand,
    /// It is certain to be asked for, but nobody waits for it yet. Reads of this class use the drive's full depth, but demand reads
    /// overtake them.
    Certain,
    /// It will probably be asked for.
    Prefetch,
}

/// Who compares an extent's bytes with its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The I/O thread, before the read ends. Damaged bytes are read once more.
    Here,
    /// The I/O thread, and this is already the second reading, because the bytes of the first were damaged.
    Again,
    /// The receiver of the bytes. It can look at them while the read goes on.
    ByReceiver,
}

/// How extents are read. Sizes come from a calibration of the drive if there is one.
#[derive(Clone, Debug)]
pub struct IoConfig {
    /// Bytes of one chunk, a multiple of [`PAGE_BYTES`].
    pub chunk_bytes: usize,
    /// Chunks in flight.
    pub depth: usize,
    /// Of these, at most this many for prefetch reads.
    pub prefetch_depth: usize,
    /// Verify every extent by its checksum. Turn this off only to measure what it costs.
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
    /// Why it is read.
    pub class: Class,
    /// What verifies it; nothing does if [`IoConfig::verify`] is off.
    pub check: Check,
    /// What it is, for messages.
    pub name: ExtentName,
}

/// A part of an extent that lies in a file of its own, perhaps on a drive of its own. Its bytes follow those of the stripe before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StripeRead {
    /// Index of the file.
    pub file: u16,
    /// Byte offset in the file, a multiple of [`PAGE_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`PAGE_BYTES`].
    pub len: usize,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
}

/// A read that ended without its extent.
#[derive(Debug)]
pub struct ReadFailure {
    /// Why.
    pub error: Box<ReadError>,
    /// The slot, which can be used again; `None` if the I/O thread died while a drive could write to it.
    pub slot: Option<Slot>,
}

/// The I/O threads, one for each lane. Dropping it cancels what is queued, awaits what is in flight, and ends them.
#[derive(Debug)]
pub struct Scheduler {
    lanes: Vec<Running>,
    /// For each file, its lane and its index in it.
    places: Vec<(usize, u16)>,
    waiters: Arc<Waiters>,
}

/// A lane with its thread.
#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    info: LaneInfo,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts an I/O thread, which owns the engine from now on: one lane for all files.
    ///
    /// # Errors
    /// [`IoError::Config`] or [`IoError::Thread`].
    pub fn start(engine: Box<dyn ReadEngine>, config: IoConfig) -> Result<Scheduler, IoError> {
        let files = (0..).take(engine.info().files.len()).collect();
        Self::start_lanes(vec![Lane { engine, files, config, adapts: false }])
    }

    /// Starts an I/O thread for each lane.
    ///
    /// # Errors
    /// [`IoError::Config`], also if only some lanes verify, or [`IoError::Thread`].
    ///
    /// # Panics
    /// Without a lane, or unless every file is in one lane and every lane knows the index of each file of its engine.
    pub fn start_lanes(lanes: Vec<Lane>) -> Result<Scheduler, IoError> {
        let verify = lanes.first().expect("a scheduler has a lane").config.verify;
        let mut places: Vec<Option<(usize, u16)>> = vec![None; lanes.iter().map(|lane| lane.files.len()).sum()];
        for (number, lane) in lanes.iter().enumerate() {
            lane.config.validate()?;
            if lane.config.verify != verify {
                return Err(IoError::Config { name: "verify", value: number, rule: "the same in all lanes" });
            }
            assert_eq!(lane.files.len(), lane.engine.info().files.len(), "lane {number} does not know its files");
            for (own, &file) in (0..).zip(&lane.files) {
                let place = places[usize::from(file)].replace((number, own));
                assert!(place.is_none(), "file {file} is in two lanes");
            }
        }
        let places = places.into_iter().flatten().collect();
        // From now on, dropping the scheduler ends the threads that already run.
        let mut scheduler = Scheduler { lanes: Vec::new(), places, waiters: Arc::default() };
        for Lane { engine, files, config, adapts } in lanes {
            let shared = Arc::new(Shared::new(&*engine, &scheduler.waiters));
            shared.depth.store(config.depth, Relaxed);
            let info = LaneInfo { engine: engine.info().clone(), files, config: config.clone() };
            let for_thread = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name("sluice-io".to_owned())
                .spawn(move || worker::run(engine, for_thread, &config, adapts))
                .map_err(IoError::Thread)?;
            scheduler.lanes.push(Running { shared, info, thread: Some(thread) });
        }
        Ok(scheduler)
    }

    /// The lanes: in the order in which they were given.
    pub fn lanes(&self) -> impl ExactSizeIterator<Item = &LaneInfo> {
        self.lanes.iter().map(|lane| &lane.info)
    }

    /// Chunks of the first lane that may be in flight now: its configured depth, or what its own reads have shown to be enough.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.lanes[0].shared.depth.load(Relaxed)
    }

    /// Where a file is, for messages.
    ///
    /// # Panics
    /// If there is no such file.
    #[must_use]
    pub fn path(&self, file: u16) -> &std::path::Path {
        let (lane, own) = self.places[usize::from(file)];
        &self.lanes[lane].shared.files[usize::from(own)].path
    }

    /// What the engine of the first lane is.
    #[must_use]
    pub fn engine(&self) -> &EngineInfo {
        &self.lanes[0].info.engine
    }

    /// Whether extents are verified by their checksums.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.lanes[0].info.config.verify
    }

    /// Says at any time whether reads are in flight.
    #[must_use]
    pub fn reading(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.waiters.reading)
    }

    /// Queues the read of an extent into a slot. Returns at once.
    ///
    /// # Errors
    /// [`ReadError::Request`] if file, offset or length are not possible or the slot is too
    /// small, [`ReadError::Stopped`] if the I/O thread of the file's lane
    /// has ended.
    pub fn submit(&self, slot: Slot, read: ExtentRead) -> Result<PendingRead, ReadFailure> {
        let ExtentRead { file, offset, len, checksum, .. } = read;
        self.submit_stripes(slot, read, &[StripeRead { file, offset, len, checksum }])
    }

    /// Queues the reads of the stripes of an extent into a slot, one behind the other: those on different drives proceed at the same time.
    /// `read` says what they are; its file, offset, length and checksum are those of the first stripe, or do not matter. What an I/O
    /// thread verifies, it verifies stripe by stripe. Returns at once.
    ///
    /// # Errors
    /// As [`Scheduler::submit`]; with several stripes, an I/O thread that has ended makes the read end with the error.
    pub fn submit_stripes(
        &self,
        slot: Slot,
        read: ExtentRead,
        stripes: &[StripeRead],
    ) -> Result<PendingRead, ReadFailure> {
        let of = |stripe: &StripeRead| {
            let StripeRead { file, offset, len, checksum } = *stripe;
            ExtentRead { file, offset, len, checksum, ..read }
        };
        if let Err(error) = self.check_all(&slot, stripes.iter().map(of)).map_err(Box::new) {
            return Err(ReadFailure { error, slot: Some(slot) });
        }
        let lane = |stripe: &StripeRead| &self.lanes[self.places[usize::from(stripe.file)].0];
        let only = if let [only] = stripes { lane(only).shared.lock_inbox().stopped.clone() } else { None };
        if let Some(reason) = only {
            let error = Box::new(ReadError::Stopped { reason });
            return Err(ReadFailure { error, slot: Some(slot) });
        }
        let mut parts = [(0, 0); STRIPES_MAX];
        for (part, stripe) in parts.iter_mut().zip(stripes) {
            *part = (stripe.len, lane(stripe).info.config.chunk_bytes);
        }
        let mut pending = Vec::with_capacity(stripes.len() - 1);
        let (mut first, mut next) = (None, stripes.iter());
        let open = read.check == Check::ByReceiver;
        let arriving = Filling::begin_stripes(slot, &parts[..stripes.len()], open, |filling| {
            let stripe = next.next().expect("one for each");
            let part = self.send(filling, of(stripe));
            match first {
                None => first = Some(part),
                Some(_) => pending.push(part),
            }
        });
        let first = first.expect("an extent has a stripe");
        Ok(PendingRead { arriving: Some(arriving), first, others: pending, name: read.name })
    }

    /// Hands a stripe to the I/O thread of its lane. If that has ended, so does the stripe.
    fn send(&self, filling: Filling, read: ExtentRead) -> LaneRead {
        let (lane, own) = self.places[usize::from(read.file)];
        let shared = &self.lanes[lane].shared;
        let id = shared.new_id();
        let mut inbox = shared.lock_inbox();
        if let Some(reason) = inbox.stopped.clone() {
            drop(inbox);
            filling.end(Err(ReadError::Stopped { reason }), self.waiters.next_end());
            self.waiters.announce();
        } else {
            inbox.commands.push_back(Command::Read { id, filling, read: ExtentRead { file: own, ..read } });
            drop(inbox);
            shared.wake_thread();
        }
        LaneRead { shared: Arc::clone(shared), id }
    }

    fn check_all(&self, slot: &Slot, reads: impl Iterator<Item = ExtentRead>) -> Result<(), ReadError> {
        let (mut bytes, mut stripes) = (0usize, 0);
        for read in reads {
            (bytes, stripes) = (bytes.saturating_add(read.len), stripes + 1);
            self.check(slot, &read)?;
            let ExtentRead { file, offset, len, name: extent, .. } = read;
            if bytes > slot.capacity() {
                return Err(ReadError::Request { extent, file, offset, len, rule: "it is larger than the slot" });
            }
            if stripes > STRIPES_MAX {
                return Err(ReadError::Request { extent, file, offset, len, rule: "an extent has at most 16 stripes" });
            }
        }
        Ok(())
    }

    fn check(&self, slot: &Slot, read: &ExtentRead) -> Result<(), ReadError> {
        let &ExtentRead { file, offset, len, name: extent, .. } = read;
        let refuse = |rule| Err(ReadError::Request { extent, file, offset, len, rule });
        let Some(&(lane, own)) = self.places.get(usize::from(file)) else {
            return refuse("there is no such file");
        };
        let info = &self.lanes[lane].shared.files[usize::from(own)];
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

    /// Makes the I/O threads notice memory that was given back or taken again.
    pub fn wake(&self) {
        self.lanes.iter().for_each(|lane| lane.shared.wake_thread());
    }

    /// Blocks until `ready` returns a value; it is called whenever a read's state has changed. The time is counted in
    /// [`IoStats::wait_ns`].
    pub fn wait<T>(&self, ready: impl FnMut() -> Option<T>) -> T {
        self.waiters.wait(ready)
    }

    /// Totals of all lanes since the start.
    #[must_use]
    pub fn stats(&self) -> IoStats {
        let wait_ns = self.waiters.wait_ns.load(Relaxed);
        IoStats { wait_ns, ..self.lane_stats().sum() }
    }

    /// Totals of each lane since the start.
    pub fn lane_stats(&self) -> impl ExactSizeIterator<Item = IoStats> {
        self.lanes.iter().map(|lane| lane.shared.stats())
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        // Tell all threads to end before waiting for one.
        for lane in &self.lanes {
            lane.shared.lock_inbox().closing = true;
            lane.shared.wake_thread();
        }
        for thread in self.lanes.iter_mut().filter_map(|lane| lane.thread.take()) {
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
    /// Its stripes: the first, and the others if there are any.
    first: LaneRead,
    others: Vec<LaneRead>,
    name: ExtentName,
}

/// A stripe that is read in a lane.
#[derive(Debug)]
struct LaneRead {
    shared: Arc<Shared>,
    id: u64,
}

impl PendingRead {
    fn stripes(&self) -> impl Iterator<Item = &LaneRead> {
        std::iter::once(&self.first).chain(&self.others)
    }

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

    /// Bytes in memory, contiguous from the start, of an extent that its receiver verifies; 0 for other extents.
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
        self.first.shared.waiters.wait(enough);
    }

    /// Blocks until the read has ended.
    pub fn wait(&self) {
        self.first.shared.waiters.wait(|| self.is_done().then_some(()));
    }

    /// Asks for the read to end early. Chunks that the drive is already reading are awaited; the read then ends as
    /// [`ReadError::Cancelled`], or as ready if it was too late.
    pub fn cancel(&self) {
        if !self.is_done() {
            self.stripes().for_each(|stripe| stripe.shared.send(Command::Cancel(stripe.id)));
        }
    }

    /// Turns a read of another class into a demand read.
    pub fn promote(&self) {
        if !self.is_done() {
            self.stripes().for_each(|stripe| stripe.shared.send(Command::Promote(stripe.id)));
        }
    }

    /// Blocks until the read has ended, and returns the slot with its bytes, verified as the request said.
    ///
    /// # Errors
    /// [`ReadFailure`] with the reason, and the slot to be used again.
    pub fn finish(mut self) -> Result<Slot, ReadFailure> {
        self.wait();
        let Some(arriving) = self.arriving.take() else {
            unreachable!("only `finish` takes it, and ends the life of the read")
        };
        arriving.finish().map_err(|(error, slot)| ReadFailure {
            error: error.unwrap_or_else(|| Box::new(self.stopped_error())),
            slot,
        })
    }
}

impl PendingRead {
    /// Why a read was lost: the reason of the lane that has ended.
    fn stopped_error(&self) -> ReadError {
        let has_ended = |stripe: &&LaneRead| stripe.shared.lock_inbox().stopped.is_some();
        self.stripes().find(has_ended).unwrap_or(&self.first).shared.stopped_error()
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        if self.arriving.is_some() {
            self.cancel();
        }
    }
}

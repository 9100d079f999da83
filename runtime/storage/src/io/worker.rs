//! An I/O thread: keeps the drive of its lane busy, and turns chunks into extents. It verifies those that their receiver does not
//! verify.
//!
//! One loop: take messages, fill the engine up to its depth, wait for completions, refill, then
//! hash a piece of what has arrived. Hashing never delays a chunk that could be issued.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst};
use std::time::Instant;

use sluice_checksum::Xxh3;

use super::arena::PAGE_BYTES;
use super::depth::Depth;
use super::error::ReadError;
use super::fill::{ChunkMem, Filling};
use super::lane::{Command, Shared};
use super::queue::{ChunkQueue, Issuable};
use super::scheduler::{Check, Class, ExtentRead, IoConfig};
use super::{ChunkRead, Completion, ReadEngine, Wait, sys};

/// Bytes hashed before the thread checks the engine again: about 20 µs of work. A check costs far less when nothing
/// has arrived.
const HASH_STEP_BYTES: usize = 256 << 10;

/// How many reads in a row may make no progress (interrupted, or less than a page) before the file is taken for cut
/// off.
const STALLS_MAX: u32 = 64;

/// Requests for which room is made at start, so that the tables do not grow later.
const REQUESTS: usize = 1024;

/// A request that has not ended.
struct Active {
    id: u64,
    filling: Filling,
    read: ExtentRead,
    hasher: Xxh3,
    hashed: usize,
    /// The extent has been read again because its checksum was wrong.
    read_again: bool,
    /// Why it is going to end, once its chunks are back.
    stop: Option<ReadError>,
}

impl Active {
    /// A piece of work for the hasher.
    fn has_hash_work(&self) -> bool {
        let arrived = self.filling.arrived_bytes();
        self.stop.is_none() && (self.hashed < arrived || arrived == self.filling.len())
    }

    fn is_complete(&self) -> bool {
        self.filling.arrived_bytes() == self.filling.len()
    }

    /// Byte offset in the file at which the rest of a chunk begins.
    fn offset_of(&self, chunk: u32, rest: &ChunkMem) -> u64 {
        self.read.offset + (self.filling.chunk_end(chunk) - rest.len()) as u64
    }
}

/// A chunk in flight; its place in the table is its tag.
#[derive(Clone, Copy)]
struct Flight {
    request: u32,
    chunk: u32,
    prefetch: bool,
    /// The drive has failed once to read it.
    failed: bool,
    stalls: u32,
}

struct Worker<'a> {
    /// First, so that it is dropped first: it waits for everything in flight.
    engine: Box<dyn ReadEngine>,
    shared: &'a Shared,
    config: &'a IoConfig,
    depth: Depth,
    /// When the thread began; times for `depth` count from then.
    epoch: Instant,
    queue: ChunkQueue,
    active: Vec<Option<Active>>,
    free: Vec<u32>,
    /// Indices into `active`, in the order of arrival.
    live: Vec<u32>,
    flights: Vec<Option<Flight>>,
    free_tags: Vec<u32>,
    prefetch_flights: usize,
    /// Most of them.
    prefetch_depth: usize,
    ended: Vec<Completion>,
    commands: VecDeque<Command>,
    busy_since: Option<Instant>,
}

/// The body of the I/O thread. `adapts`: it finds out how many chunks should be in flight, as many as the engine takes at most.
pub(crate) fn run(engine: Box<dyn ReadEngine>, shared: Arc<Shared>, config: &IoConfig, adapts: bool) {
    // Declared first, so that it runs last, also in a panic: by then every fill has ended.
    let _farewell = Farewell { shared: &shared };
    sys::ask_for_short_slices();
    let mut worker = Worker::new(engine, &shared, config, adapts);
    let reason = match worker.run() {
        Ok(()) => "it was shut down".to_owned(),
        Err(error) => format!("the read engine failed: {error}"),
    };
    // Before the worker and its fills are dropped, so that no waiter sees an end without reason.
    shared.lock_inbox().stopped = Some(reason);
}

/// Tells everyone that there is no I/O thread any more.
struct Farewell<'a> {
    shared: &'a Shared,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        let mut inbox = self.shared.lock_inbox();
        inbox.stopped.get_or_insert_with(|| "it has panicked".to_owned());
        inbox.commands.clear();
        drop(inbox);
        self.shared.set_reading(false);
        self.shared.waiters.announce();
    }
}

impl<'a> Worker<'a> {
    fn new(engine: Box<dyn ReadEngine>, shared: &'a Shared, config: &'a IoConfig, adapts: bool) -> Self {
        let adapts = adapts && engine.depth() >= Depth::MOST;
        let depth = if adapts { Depth::MOST } else { engine.depth().min(config.depth) };
        Self {
            depth: if adapts { Depth::found_out() } else { Depth::fixed(depth) },
            epoch: Instant::now(),
            engine,
            shared,
            config,
            queue: ChunkQueue::with_capacity(REQUESTS),
            active: Vec::with_capacity(REQUESTS),
            free: Vec::with_capacity(REQUESTS),
            live: Vec::with_capacity(REQUESTS),
            flights: vec![None; depth],
            free_tags: (0..depth as u32).rev().collect(),
            prefetch_flights: 0,
            prefetch_depth: if adapts { depth } else { config.prefetch_depth },
            ended: Vec::with_capacity(depth),
            commands: VecDeque::with_capacity(REQUESTS),
            busy_since: None,
        }
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let closing = self.take_commands();
            if closing && self.live.is_empty() {
                return Ok(());
            }
            self.issue();
            let hash_next = self.hash_candidate().is_some();
            self.collect(!hash_next)?;
            // The drive must not idle while this thread hashes, nor read what is less urgent than a new message.
            self.take_commands();
            if self.issue() {
                self.collect(false)?;
            }
            if let Some(request) = self.hash_candidate() {
                self.hash(request);
            }
        }
    }

    /// Takes what others have sent. True if the thread is to end.
    fn take_commands(&mut self) -> bool {
        self.shared.asleep.store(false, SeqCst);
        let mut inbox = self.shared.lock_inbox();
        let closing = inbox.closing;
        std::mem::swap(&mut inbox.commands, &mut self.commands);
        drop(inbox);
        while let Some(command) = self.commands.pop_front() {
            match command {
                Command::Read { id, filling, read } => self.admit(id, filling, read),
                Command::Cancel(id) => {
                    if let Some(request) = self.find(id) {
                        self.cancel(request);
                    }
                }
                Command::Promote(id) => {
                    if let Some(request) = self.find(id) {
                        self.queue.promote(request);
                        self.request(request).read.class = Class::Demand;
                    }
                }
            }
        }
        if closing {
            while let Some(request) = self
                .live
                .iter()
                .copied()
                .find(|&request| self.active[request as usize].as_ref().is_some_and(|active| active.stop.is_none()))
            {
                self.cancel(request);
            }
        }
        closing
    }

    fn admit(&mut self, id: u64, filling: Filling, read: ExtentRead) {
        let read_again = read.check == Check::Again;
        self.shared.counters.checksum_retries.fetch_add(u64::from(read_again), Relaxed);
        let active = Active { id, filling, read, hasher: Xxh3::new(), hashed: 0, read_again, stop: None };
        let request = match self.free.pop() {
            Some(request) => request,
            None => {
                self.active.push(None);
                (self.active.len() - 1) as u32
            }
        };
        self.active[request as usize] = Some(active);
        self.live.push(request);
        self.queue.add(request, read.class);
    }

    fn find(&self, id: u64) -> Option<u32> {
        let is_it = |request: &u32| self.active[*request as usize].as_ref().is_some_and(|active| active.id == id);
        self.live.iter().copied().find(is_it)
    }

    fn request(&mut self, request: u32) -> &mut Active {
        match &mut self.active[request as usize] {
            Some(active) => active,
            None => unreachable!("live, queued and in-flight requests are active"),
        }
    }

    fn cancel(&mut self, request: u32) {
        let extent = self.request(request).read.name;
        self.shared.counters.cancelled.fetch_add(1, Relaxed);
        self.stop(request, ReadError::Cancelled { extent });
    }

    /// Chunks in flight.
    fn in_flight(&self) -> usize {
        self.flights.len() - self.free_tags.len()
    }

    /// Fills the engine up to its depth. True if anything was issued.
    fn issue(&mut self) -> bool {
        let mut issued = false;
        while self.in_flight() < self.depth.limit() {
            let Some(&tag) = self.free_tags.last() else {
                break;
            };
            let Some(request) = self.next_request() else {
                break;
            };
            let active = self.request(request);
            let Some((chunk, mem)) = active.filling.next_chunk() else {
                break;
            };
            let prefetch = active.read.class == Class::Prefetch;
            let flight = Flight { request, chunk, prefetch, failed: false, stalls: 0 };
            self.free_tags.pop();
            self.flights[tag as usize] = Some(flight);
            self.prefetch_flights += usize::from(prefetch);
            self.submit(tag, flight, mem);
            issued = true;
        }
        issued
    }

    /// Chooses the next chunk: one of a less urgent class only if no read of a more urgent one has chunks to issue.
    fn next_request(&mut self) -> Option<u32> {
        let active = &self.active;
        let mut issuable = |request: u32| match &active[request as usize] {
            Some(active) if active.filling.can_issue() => {
                if active.filling.is_last() {
                    Issuable::Last
                } else {
                    Issuable::More
                }
            }
            _ => Issuable::Blocked,
        };
        for class in [Class::Demand, Class::Certain] {
            let next = self.queue.next(class, &mut issuable);
            if next.is_some() || !self.queue.is_empty(class) {
                return next;
            }
        }
        if self.prefetch_flights >= self.prefetch_depth {
            return None;
        }
        self.queue.next(Class::Prefetch, &mut issuable)
    }

    /// Gives a chunk, or what is left of it, to the engine.
    fn submit(&mut self, tag: u32, flight: Flight, mem: ChunkMem) {
        let active = self.request(flight.request);
        let offset = active.offset_of(flight.chunk, &mem);
        let file = active.read.file;
        self.engine.submit(ChunkRead { tag, file, offset, mem });
    }

    /// Waits for completions and handles them. Blocks only if told so.
    fn collect(&mut self, may_block: bool) -> io::Result<()> {
        let in_flight = self.in_flight() > 0;
        if in_flight && self.busy_since.is_none() {
            self.busy_since = Some(Instant::now());
            self.shared.set_reading(true);
        }
        let mut wait = Wait::Poll;
        if may_block {
            self.shared.asleep.store(true, SeqCst);
            // A thread that acts after `asleep` was set wakes the engine; changes before that are seen here. A
            // closing thread with nothing in flight must look at its messages again.
            let inbox = self.shared.lock_inbox();
            if inbox.commands.is_empty() && (!inbox.closing || in_flight) {
                wait = Wait::Forever;
            }
        }
        let mut ended = std::mem::take(&mut self.ended);
        let result = self.engine.complete(&mut ended, wait);
        self.shared.asleep.store(false, SeqCst);
        if !ended.is_empty() {
            let bytes = ended.iter().filter_map(|completion| completion.result.as_ref().ok()).sum::<usize>();
            let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.depth.ended(bytes as u64, now, self.in_flight() >= self.depth.limit());
            self.shared.depth.store(self.depth.limit(), Relaxed);
        }
        for completion in ended.drain(..) {
            self.completed(completion);
        }
        self.ended = ended;
        self.account_busy();
        result
    }

    fn account_busy(&mut self) {
        let Some(since) = self.busy_since else { return };
        let now = Instant::now();
        let busy_ns = u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX);
        self.shared.counters.busy_ns.fetch_add(busy_ns, Relaxed);
        let in_flight = self.in_flight() > 0;
        self.busy_since = in_flight.then_some(now);
        if !in_flight {
            self.shared.set_reading(false);
        }
    }

    fn completed(&mut self, completion: Completion) {
        let Completion { tag, mut mem, result } = completion;
        let Some(mut flight) = self.flights[tag as usize] else {
            unreachable!("a completion of a read that was not in flight")
        };
        let retry = match result {
            Ok(bytes) => self.received(&mut flight, &mut mem, bytes),
            Err(error) => self.refused(&mut flight, &mem, error),
        };
        if retry && self.request(flight.request).stop.is_none() {
            self.flights[tag as usize] = Some(flight);
            self.submit(tag, flight, mem);
        } else {
            self.land(tag, flight, mem);
        }
    }

    /// Bytes have arrived. True if reading the chunk has to continue.
    fn received(&mut self, flight: &mut Flight, mem: &mut ChunkMem, bytes: usize) -> bool {
        // A continuation has to be aligned: bytes beyond the last whole page are read once more. That happens only if
        // the file ends there.
        let whole = bytes.min(mem.len()) / PAGE_BYTES * PAGE_BYTES;
        mem.advance(whole);
        let counters = &self.shared.counters;
        let total = if flight.prefetch { &counters.prefetch_bytes } else { &counters.demand_bytes };
        total.fetch_add(bytes as u64, Relaxed);
        if mem.is_empty() {
            counters.chunks.fetch_add(1, Relaxed);
            return false;
        }
        flight.stalls = if whole > 0 { 0 } else { flight.stalls + 1 };
        if bytes == 0 || flight.stalls > STALLS_MAX {
            let error = self.truncated(flight, mem);
            self.stop(flight.request, error);
            return false;
        }
        counters.short_reads.fetch_add(1, Relaxed);
        true
    }

    /// The system has reported an error. True if the chunk has to be read again.
    fn refused(&mut self, flight: &mut Flight, mem: &ChunkMem, source: io::Error) -> bool {
        let transient = matches!(source.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
        if transient && flight.stalls < STALLS_MAX {
            flight.stalls += 1;
            return true;
        }
        if !flight.failed {
            flight.failed = true;
            self.shared.counters.device_retries.fetch_add(1, Relaxed);
            return true;
        }
        let active = self.request(flight.request);
        let (extent, file) = (active.read.name, usize::from(active.read.file));
        let offset = active.offset_of(flight.chunk, mem);
        let (path, len) = (self.shared.files[file].path.clone(), mem.len());
        let error = match source.raw_os_error() {
            // Not the drive's fault: the slot's memory is taken from the system while it is filled.
            Some(libc::ENOMEM | libc::EFAULT) => ReadError::Memory { extent, len, source },
            _ => ReadError::Device { extent, path, offset, len, source },
        };
        self.stop(flight.request, error);
        false
    }

    fn truncated(&mut self, flight: &Flight, mem: &ChunkMem) -> ReadError {
        let active = self.request(flight.request);
        let (extent, file) = (active.read.name, usize::from(active.read.file));
        let offset = active.offset_of(flight.chunk, mem);
        ReadError::Truncated { extent, path: self.shared.files[file].path.clone(), offset }
    }

    /// A chunk is back for good: with all its bytes, or because its request is ending.
    fn land(&mut self, tag: u32, flight: Flight, mem: ChunkMem) {
        self.flights[tag as usize] = None;
        self.free_tags.push(tag);
        self.prefetch_flights -= usize::from(flight.prefetch);
        self.request(flight.request).filling.give_back(flight.chunk, mem);
        self.end_if_stopped(flight.request);
        self.shared.waiters.announce();
    }

    /// Lets a request end with an error, once all its chunks are back.
    fn stop(&mut self, request: u32, error: ReadError) {
        let active = self.request(request);
        if active.stop.is_some() {
            return;
        }
        active.stop = Some(error);
        self.queue.remove(request);
        for tag in 0..self.flights.len() {
            if let Some(flight) = self.flights[tag].filter(|flight| flight.request == request)
                && let Some(read) = self.engine.cancel(tag as u32)
            {
                self.flights[tag] = None;
                self.free_tags.push(tag as u32);
                self.prefetch_flights -= usize::from(flight.prefetch);
                self.request(request).filling.give_back(flight.chunk, read.mem);
            }
        }
        self.end_if_stopped(request);
    }

    fn end_if_stopped(&mut self, request: u32) {
        let Some(active) = &mut self.active[request as usize] else {
            return;
        };
        if active.filling.outstanding() == 0
            && let Some(error) = active.stop.take()
        {
            self.end(request, Err(error));
        }
    }

    fn end(&mut self, request: u32, result: Result<(), ReadError>) {
        let Some(active) = self.active[request as usize].take() else {
            return;
        };
        self.live.retain(|&live| live != request);
        self.free.push(request);
        active.filling.end(result, self.shared.waiters.next_end());
        self.shared.waiters.announce();
    }

    /// Chooses the bytes to hash next: complete extents before partial ones, demand before prefetch, then in the
    /// order of arrival.
    fn hash_candidate(&self) -> Option<u32> {
        let rank = |request: &u32| {
            let active = self.active[*request as usize].as_ref()?;
            let is_prefetch = active.read.class == Class::Prefetch;
            active.has_hash_work().then_some((is_prefetch, !active.is_complete()))
        };
        let ranked = self.live.iter().filter_map(|request| Some((rank(request)?, *request)));
        ranked.min_by_key(|&(rank, _)| rank).map(|(_, request)| request)
    }

    /// Hashes a piece of what has arrived; at the end of the extent, compares its checksum.
    fn hash(&mut self, request: u32) {
        let config = self.config;
        let active = self.request(request);
        let verify = config.verify && active.read.check != Check::ByReceiver;
        let arrived = active.filling.arrived_bytes();
        if verify {
            let end = arrived.min(active.hashed + HASH_STEP_BYTES);
            active.hasher.update(&active.filling.prefix()[active.hashed..end]);
            active.hashed = end;
        } else {
            active.hashed = arrived;
        }
        if active.hashed < active.filling.len() {
            return;
        }
        let (expected, got) = (active.read.checksum, active.hasher.digest());
        if !verify || got == expected {
            // An extent counts once, in the lane of its first stripe.
            let extents = u64::from(active.filling.is_first());
            self.shared.counters.extents.fetch_add(extents, Relaxed);
            self.end(request, Ok(()));
        } else if active.read_again {
            let ExtentRead { name: extent, offset, len, file, .. } = active.read;
            let path = self.shared.files[usize::from(file)].path.clone();
            let error = ReadError::Checksum { extent, path, offset, len, expected, got };
            self.stop(request, error);
        } else {
            active.read_again = true;
            active.hashed = 0;
            active.hasher = Xxh3::new();
            active.filling.retract();
            let class = active.read.class;
            self.shared.counters.checksum_retries.fetch_add(1, Relaxed);
            self.queue.add(request, class);
        }
    }
}

//! A simulated drive of any speed that costs no processor time, to measure how well reading and computing overlap.
//!
//! In a virtual machine the cores that compute often serve the drive too, so the overlap cannot be measured there with a real drive.
//! This drive moves nothing. The memory for reads holds the bytes from the beginning; a read only waits until its time has come to
//! end ([`Bus`]), and the I/O thread sleeps meanwhile, as it does while a real drive works. Everything above it is the same:
//! scheduler, pool, policy, prefetch, checksums.
//!
//! Bytes outside the simulated ranges of the files, such as the dense parts of a model, are read from the files without delay.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::timing::{Bus, DriveSpeed};
use crate::io::file::DataFile;
use crate::io::{ChunkRead, Completion, EngineInfo, ReadEngine, Wait, Wake, sys};

/// The handle on a simulated drive: its contents, its speed, and what it has done. For a model that is striped it stands for several
/// drives, one for each volume, which work at the same time. Clones are the same drive.
#[derive(Clone, Debug)]
pub struct SimulatedDrive {
    shared: Arc<Mutex<State>>,
    contents: Arc<[u8]>,
}

/// What a simulated drive has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriveUse {
    /// Reads that have ended, of chunks.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Time in which it was busy: each time from the first byte that it could give after being idle, until the end of the last
    /// read in flight was noticed.
    pub busy: Duration,
    /// Total delay with which ends of reads were noticed: timers and the system's scheduler are not exact.
    pub late: Duration,
}

impl DriveUse {
    /// What has been done since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &DriveUse) -> DriveUse {
        DriveUse {
            reads: self.reads - earlier.reads,
            bytes: self.bytes - earlier.bytes,
            busy: self.busy.saturating_sub(earlier.busy),
            late: self.late.saturating_sub(earlier.late),
        }
    }
}

#[derive(Debug)]
struct State {
    /// By volume; volumes behind the last have the last one's.
    speeds: Vec<DriveSpeed>,
    /// By volume.
    used: Vec<DriveUse>,
}

impl State {
    fn speed(&self, volume: usize) -> DriveSpeed {
        self.speeds.get(volume).or(self.speeds.last()).copied().unwrap_or(DriveSpeed::UNLIMITED)
    }
}

/// Whether an engine has been woken.
#[derive(Debug, Default)]
struct Woken {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Woken {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimulatedDrive {
    /// A drive of this speed. `contents` are the bytes that every read of a whole extent within the simulated ranges
    /// gives.
    #[must_use]
    pub fn new(speed: DriveSpeed, contents: Vec<u8>) -> Self {
        let state = State { speeds: vec![speed], used: Vec::new() };
        SimulatedDrive { shared: Arc::new(Mutex::new(state)), contents: contents.into() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What every extent on the drive holds.
    #[must_use]
    pub fn contents(&self) -> &[u8] {
        &self.contents
    }

    /// Changes the speed of reads that are submitted from now on, on the drives of all volumes.
    pub fn set_speed(&self, speed: DriveSpeed) {
        self.set_speeds(&[speed]);
    }

    /// The same for the drive of each volume; those behind the last have its speed.
    pub fn set_speeds(&self, speeds: &[DriveSpeed]) {
        self.lock().speeds = speeds.to_vec();
    }

    /// Totals since the drive was made, of the drive of each volume that an engine reads.
    #[must_use]
    pub fn used(&self) -> Vec<DriveUse> {
        self.lock().used.clone()
    }

    /// An engine on the drive of volume `volume`, for up to `depth` reads in flight. Reads that begin within `simulated` (ranges of bytes by index of the
    /// file) move nothing: their slots must already hold [`contents`](Self::contents).
    pub(crate) fn engine(
        &self,
        volume: usize,
        files: Vec<DataFile>,
        mut simulated: Vec<(u16, Range<u64>)>,
        depth: usize,
    ) -> TimedEngine {
        simulated.sort_unstable_by_key(|(file, range)| (*file, range.start));
        simulated.dedup_by(|next, last| {
            let continues = last.0 == next.0 && last.1.end == next.1.start;
            if continues {
                last.1.end = next.1.end;
            }
            continues
        });
        let mut state = self.lock();
        let volumes = state.used.len().max(volume + 1);
        state.used.resize(volumes, DriveUse::default());
        drop(state);
        let info = EngineInfo {
            name: "simulated",
            note: "no drive: reads of experts end when those of such a drive would".to_owned(),
            depth,
            files: files.iter().map(DataFile::info).collect(),
        };
        TimedEngine {
            info,
            files,
            simulated,
            volume,
            drive: self.clone(),
            woken: Arc::default(),
            bus: Bus::default(),
            epoch: Instant::now(),
            staged: VecDeque::with_capacity(depth),
            flying: VecDeque::with_capacity(depth),
            busy_from: 0,
            exact_timers: false,
        }
    }
}

/// A read engine on a [`SimulatedDrive`].
pub(crate) struct TimedEngine {
    info: EngineInfo,
    files: Vec<DataFile>,
    /// Ascending, and not touching each other.
    simulated: Vec<(u16, Range<u64>)>,
    volume: usize,
    drive: SimulatedDrive,
    woken: Arc<Woken>,
    bus: Bus,
    epoch: Instant,
    staged: VecDeque<ChunkRead>,
    /// Reads in flight, and when they end, which is the order in which they were submitted.
    flying: VecDeque<(u64, ChunkRead)>,
    /// Since when the drive could give bytes; meaningful while reads are in flight.
    busy_from: u64,
    exact_timers: bool,
}

impl TimedEngine {
    /// Nanoseconds since the engine was made.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn is_simulated(&self, read: &ChunkRead) -> bool {
        let place = (read.file, read.offset);
        let after = self.simulated.partition_point(|(file, range)| (*file, range.start) <= place);
        let before = after.checked_sub(1).map(|at| &self.simulated[at]);
        before.is_some_and(|(file, range)| *file == read.file && range.contains(&read.offset))
    }

    /// Starts the accepted reads. Reads that are not simulated end here.
    fn issue(&mut self, speed: DriveSpeed, ended: &mut Vec<Completion>) {
        while let Some(mut read) = self.staged.pop_front() {
            if !self.is_simulated(&read) {
                let file = &self.files[usize::from(read.file)];
                let result = file.read_at(read.mem.as_mut_slice(), read.offset);
                ended.push(Completion { tag: read.tag, mem: read.mem, result });
                continue;
            }
            let now = self.now();
            if self.flying.is_empty() {
                self.busy_from = now.saturating_add(speed.latency_ns());
            }
            let end = self.bus.submit(speed, now, read.mem.len());
            self.flying.push_back((end, read));
        }
    }

    /// Hands back the reads that have ended by `now`.
    fn land(&mut self, now: u64, ended: &mut Vec<Completion>, used: &mut DriveUse) {
        while self.flying.front().is_some_and(|(end, _)| *end <= now) {
            let Some((end, read)) = self.flying.pop_front() else { return };
            let bytes = read.mem.len();
            used.reads += 1;
            used.bytes += bytes as u64;
            used.late += Duration::from_nanos(now - end);
            if self.flying.is_empty() {
                used.busy += Duration::from_nanos(now.saturating_sub(self.busy_from));
            }
            ended.push(Completion { tag: read.tag, mem: read.mem, result: Ok(bytes) });
        }
    }
}

impl ReadEngine for TimedEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn submit(&mut self, read: ChunkRead) {
        assert!(usize::from(read.file) < self.files.len(), "no such file");
        let accepted = self.staged.len() + self.flying.len();
        assert!(accepted < self.info.depth, "more reads than the engine's depth");
        self.staged.push_back(read);
    }

    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        let at = self.staged.iter().position(|read| read.tag == tag)?;
        self.staged.remove(at)
    }

    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()> {
        if !std::mem::replace(&mut self.exact_timers, true) {
            sys::ask_for_exact_timers();
        }
        let own = Arc::clone(&self.woken);
        let mut woken = own.lock();
        let already = ended.len();
        let speed = self.drive.lock().speed(self.volume);
        self.issue(speed, ended);
        let deadline = match wait {
            Wait::Timeout(timeout) => {
                let timeout = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
                Some(self.now().saturating_add(timeout))
            }
            Wait::Poll | Wait::Forever => None,
        };
        loop {
            let now = self.now();
            let drive = self.drive.clone();
            self.land(now, ended, &mut drive.lock().used[self.volume]);
            let given_up = deadline.is_some_and(|deadline| deadline <= now);
            if ended.len() > already || wait == Wait::Poll || *woken || given_up {
                *woken = false;
                return Ok(());
            }
            let next = self.flying.front().map(|(end, _)| *end);
            woken = match next.into_iter().chain(deadline).min() {
                Some(until) => {
                    let left = Duration::from_nanos(until - now);
                    own.changed.wait_timeout(woken, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => own.changed.wait(woken).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.woken) as Arc<dyn Wake>
    }
}

impl Wake for Woken {
    fn wake(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::io::error::ExtentName;
    use crate::io::{Arena, Check, Class, DirectMode, ExtentRead, IoConfig, PAGE_BYTES, Scheduler, Slot};

    const PAGES: usize = 6;

    /// A file whose page `n` is full of `n`, of which pages 2 to 4 are simulated.
    fn engine(drive: &SimulatedDrive, depth: usize) -> (tempfile::NamedTempFile, TimedEngine) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        (0..PAGES).for_each(|page| file.write_all(&[page as u8; PAGE_BYTES]).expect("written"));
        let files = vec![DataFile::open(file.path(), DirectMode::Never).expect("opened")];
        let page = PAGE_BYTES as u64;
        let engine = drive.engine(0, files, vec![(0, 3 * page..5 * page), (0, 2 * page..3 * page)], depth);
        (file, engine)
    }

    fn read(page: usize, pages: usize) -> ExtentRead {
        ExtentRead {
            file: 0,
            offset: (page * PAGE_BYTES) as u64,
            len: pages * PAGE_BYTES,
            checksum: 0,
            class: Class::Demand,
            check: Check::ByReceiver,
            name: ExtentName::expert(0, 0),
        }
    }

    fn slots(count: usize, contents: &[u8]) -> Vec<Slot> {
        let mut arena = Arena::uniform(contents.len(), count, "test").expect("memory");
        arena.fill(contents);
        arena.into_slots()
    }

    #[test]
    fn simulated_reads_leave_the_slot_as_it_was_and_others_come_from_the_file() {
        let contents = vec![77; 2 * PAGE_BYTES];
        let drive = SimulatedDrive::new(DriveSpeed::UNLIMITED, contents.clone());
        let config = IoConfig { chunk_bytes: PAGE_BYTES, depth: 2, prefetch_depth: 2, verify: true };
        let (_file, engine) = engine(&drive, config.depth);
        let io = Scheduler::start(Box::new(engine), config).expect("started");
        let mut slots = slots(4, &contents);
        let mut bytes = |page, pages| {
            let slot = slots.pop().expect("a slot");
            io.submit(slot, read(page, pages)).expect("submitted").finish().expect("read").bytes().to_vec()
        };
        assert_eq!(bytes(2, 2), contents);
        assert_eq!(bytes(4, 1), contents[..PAGE_BYTES]);
        assert_eq!((bytes(1, 1), bytes(5, 1)), (vec![1; PAGE_BYTES], vec![5; PAGE_BYTES]));
        let DriveUse { reads, bytes, .. } = drive.used()[0];
        assert_eq!((reads, bytes), (3, 3 * PAGE_BYTES as u64), "what comes from the file is not the drive's");
    }

    #[test]
    fn a_read_waits_for_its_time_and_a_wake_up_does_not() {
        // So slow that no read ends while this test runs.
        let hours = DriveSpeed { bytes_per_second: 1, latency: Duration::from_secs(10_000) };
        let drive = SimulatedDrive::new(hours, vec![1; PAGE_BYTES]);
        let (_file, mut engine) = engine(&drive, 3);
        let chunk = || {
            let slot = slots(1, &[1; PAGE_BYTES]).remove(0);
            let (mut filling, _arriving) = crate::io::fill::Filling::begin(slot, PAGE_BYTES, PAGE_BYTES, true);
            let (_, mem) = filling.next_chunk().expect("a chunk");
            mem
        };
        let offset = 2 * PAGE_BYTES as u64;
        engine.submit(ChunkRead { tag: 0, file: 0, offset, mem: chunk() });
        engine.submit(ChunkRead { tag: 1, file: 0, offset, mem: chunk() });
        assert_eq!(engine.cancel(1).expect("not issued yet").tag, 1);
        let mut ended = Vec::new();
        engine.complete(&mut ended, Wait::Poll).expect("works");
        assert!(ended.is_empty() && engine.cancel(0).is_none(), "it is on its way");
        engine.complete(&mut ended, Wait::Timeout(Duration::from_millis(1))).expect("works");
        engine.waker().wake();
        engine.complete(&mut ended, Wait::Forever).expect("works");
        assert!(ended.is_empty());
        // A read that is submitted at another speed queues behind it, as on a real bus; reads from the file do not.
        drive.set_speed(DriveSpeed::UNLIMITED);
        engine.submit(ChunkRead { tag: 1, file: 0, offset, mem: chunk() });
        engine.submit(ChunkRead { tag: 2, file: 0, offset: 0, mem: chunk() });
        engine.complete(&mut ended, Wait::Forever).expect("works");
        assert_eq!(ended.iter().map(|completion| completion.tag).collect::<Vec<_>>(), [2]);
        assert_eq!(drive.used()[0].reads, 0);
    }

    #[test]
    fn use_is_counted_from_an_earlier_moment() {
        let us = Duration::from_micros;
        let earlier = DriveUse { reads: 1, bytes: 10, busy: us(5), late: us(1) };
        let now = DriveUse { reads: 4, bytes: 50, busy: us(25), late: us(3) };
        assert_eq!(now.since(&earlier), DriveUse { reads: 3, bytes: 40, busy: us(20), late: us(2) });
    }
}

//! Several drives at once: none waits for another, and a waiter gets the first read from any of them.

use std::io;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use super::super::sim::{Fault, FaultKind, SimDrive, SimEngine};
use super::super::*;
use super::*;

mod stripes;

const EXTENT: usize = 5 * PAGE_BYTES;
const EXTENTS: usize = 12;

/// Bytes of file `file`.
fn contents(file: u16) -> Vec<u8> {
    (0..EXTENTS).flat_map(|index| vec![16 * file as u8 + index as u8 + 1; EXTENT]).collect()
}

fn extent(file: u16, index: usize) -> ExtentRead {
    let bytes = vec![16 * file as u8 + index as u8 + 1; EXTENT];
    ExtentRead {
        file,
        offset: (index * EXTENT) as u64,
        len: EXTENT,
        checksum: xxh3_64(&bytes),
        class: Class::Demand,
        check: Check::Here,
        name: ExtentName::expert(u32::from(file), index as u32),
    }
}

/// Chunks and depth of a drive that likes large reads, and of one that likes many.
fn configs() -> [IoConfig; 2] {
    let config =
        |pages: usize, depth| IoConfig { chunk_bytes: pages * PAGE_BYTES, depth, prefetch_depth: 1, verify: true };
    [config(2, 2), config(1, 4)]
}

/// Two drives and three files: the first drive has 0 and 2, the second one 1.
fn drives() -> [SimDrive; 2] {
    [SimDrive::new(vec![contents(0), contents(2)]), SimDrive::new(vec![contents(1)])]
}

fn start(engines: [Box<dyn ReadEngine>; 2]) -> Scheduler {
    let files = [vec![0, 2], vec![1]];
    let lanes = engines.into_iter().zip(files).zip(configs());
    let lanes = lanes.map(|((engine, files), config)| Lane { engine, files, config, adapts: false });
    Scheduler::start_lanes(lanes.collect()).expect("threads")
}

fn start_both(drives: &[SimDrive; 2], seed: u64) -> Scheduler {
    let [first, second] = configs();
    start([Box::new(drives[0].engine(first.depth, seed)), Box::new(drives[1].engine(second.depth, seed))])
}

fn slots(count: usize) -> Vec<Slot> {
    Arena::uniform(EXTENT, count, "test").expect("memory").into_slots()
}

/// Submits all extents of these files.
fn submit(io: &Scheduler, files: &[u16]) -> Vec<PendingRead> {
    let extents = files.iter().flat_map(|&file| (0..EXTENTS).map(move |index| extent(file, index)));
    slots(files.len() * EXTENTS)
        .into_iter()
        .zip(extents)
        .map(|(slot, read)| io.submit(slot, read).expect("accepted"))
        .collect()
}

/// Waits for what another thread does sooner or later; a test that never ends says that it did not.
fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn finish_right(read: PendingRead) {
    let ExtentName { layer, index, .. } = read.name();
    let expect = 16 * layer.expect("a file") as u8 + index.expect("an extent") as u8 + 1;
    assert!(read.finish().expect("ready").bytes().iter().all(|&byte| byte == expect));
}

#[test]
fn every_file_is_read_by_its_drive_as_that_likes_it() {
    for seed in 0..10 {
        let drives = drives();
        let io = start_both(&drives, seed);
        submit(&io, &[0, 1, 2]).into_iter().for_each(finish_right);
        let lanes: Vec<_> = io.lanes().collect();
        assert_eq!((lanes[0].files.as_slice(), lanes[1].files.as_slice()), (&[0, 2][..], &[1][..]));
        for (lane, drive) in lanes.iter().zip(&drives) {
            let largest = drive.log().iter().map(|read| read.2).max();
            assert_eq!(largest, Some(lane.config.chunk_bytes));
        }
        let of_lanes: Vec<IoStats> = io.lane_stats().collect();
        assert_eq!((of_lanes[0].extents, of_lanes[1].extents), (2 * EXTENTS as u64, EXTENTS as u64));
        assert_eq!(io.stats().demand_bytes, 3 * (EXTENTS * EXTENT) as u64);
    }
}

#[test]
fn a_fast_drive_does_not_wait_for_a_slow_one() {
    let drives = drives();
    // As slow as can be.
    drives[0].hold();
    let io = start_both(&drives, 1);
    let slow = submit(&io, &[0, 2]);
    let mut fast = submit(&io, &[1]);
    // A caller that waits for any read gets one of the fast drive, each time.
    while !fast.is_empty() {
        let reads = || slow.iter().chain(&fast);
        let first =
            io.wait(|| reads().filter(|read| read.is_done()).min_by_key(|read| read.order()).map(PendingRead::name));
        assert_eq!(first.layer, Some(1));
        let at = fast.iter().position(|read| read.name() == first).expect("a read of the fast drive");
        finish_right(fast.swap_remove(at));
    }
    assert!(slow.iter().all(|read| !read.is_done()));
    // The slow drive's thread may not have had a core so far; it reads as soon as it has.
    wait_until(|| io.reading().load(Relaxed));
    drives[0].release();
    slow.into_iter().for_each(finish_right);
}

#[test]
fn reads_end_in_one_order_whatever_drive_they_are_of() {
    let drives = drives();
    let io = start_both(&drives, 3);
    let reads = submit(&io, &[0, 1, 2]);
    reads.iter().for_each(PendingRead::wait);
    let mut order: Vec<u64> = reads.iter().map(PendingRead::order).collect();
    order.sort_unstable();
    assert_eq!(order, (1..=3 * EXTENTS as u64).collect::<Vec<_>>());
    // Set before the last read of a lane is announced, or soon after.
    wait_until(|| !io.reading().load(Relaxed));
}

#[test]
fn cancelling_and_promoting_reach_the_right_drive() {
    let drives = drives();
    drives.iter().for_each(SimDrive::hold);
    let io = start_both(&drives, 5);
    let reads = submit(&io, &[0, 1, 2]);
    // The last extents of each file: nothing of them is in flight.
    let cancelled = |index: usize| index % EXTENTS >= EXTENTS - 2;
    for (index, read) in reads.iter().enumerate().filter(|(index, _)| cancelled(*index)) {
        read.cancel();
        read.wait();
        assert!(read.is_done(), "{index}");
    }
    drives.iter().for_each(SimDrive::release);
    for (index, read) in reads.into_iter().enumerate() {
        if cancelled(index) {
            assert!(read.finish().expect_err("cancelled").error.is_cancelled());
        } else {
            finish_right(read);
        }
    }
    let of_lanes: Vec<u64> = io.lane_stats().map(|stats| stats.cancelled).collect();
    assert_eq!(of_lanes, [4, 2]);
}

#[test]
fn damage_names_the_file_and_stays_in_its_lane() {
    let drives = drives();
    // The second file of the first drive, which is file 2 of all.
    let range = EXTENT as u64..EXTENT as u64 + 1;
    drives[0].add_fault(Fault { kind: FaultKind::Flip, file: 1, range, times: u32::MAX });
    let io = start_both(&drives, 7);
    for (index, read) in submit(&io, &[0, 1, 2]).into_iter().enumerate() {
        if index == 2 * EXTENTS + 1 {
            let text = read.finish().expect_err("damaged").error.to_string();
            assert!(text.contains("layer 2 expert 1") && text.contains("sim:1"), "{text}");
        } else {
            finish_right(read);
        }
    }
    let missing = io.submit(slots(1).remove(0), ExtentRead { file: 3, ..extent(0, 0) }).expect_err("no such file");
    assert!(matches!(*missing.error, ReadError::Request { file: 3, .. }), "{}", missing.error);
}

/// An engine that breaks down at its first completion, and one that tells when it is dropped.
struct Special {
    engine: SimEngine,
    breaks: bool,
    dropped: Arc<AtomicUsize>,
}

impl ReadEngine for Special {
    fn info(&self) -> &EngineInfo {
        self.engine.info()
    }
    fn submit(&mut self, read: ChunkRead) {
        self.engine.submit(read);
    }
    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        self.engine.cancel(tag)
    }
    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()> {
        self.engine.complete(ended, wait)?;
        if self.breaks && !ended.is_empty() { Err(io::Error::other("the drive was pulled out")) } else { Ok(()) }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.engine.waker()
    }
}

impl Drop for Special {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
    }
}

fn special(drives: &[SimDrive; 2], breaks: [bool; 2], dropped: &Arc<AtomicUsize>) -> Scheduler {
    let engine = |at: usize| -> Box<dyn ReadEngine> {
        let engine = drives[at].engine(configs()[at].depth, 9);
        Box::new(Special { engine, breaks: breaks[at], dropped: Arc::clone(dropped) })
    };
    start([engine(0), engine(1)])
}

#[test]
fn a_dead_lane_fails_its_own_files_only() {
    let drives = drives();
    let io = special(&drives, [true, false], &Arc::default());
    let lost = slots(1).remove(0);
    let error = io.submit(lost, extent(0, 0)).expect("accepted").finish().expect_err("broken").error;
    assert!(matches!(*error, ReadError::Stopped { .. }), "{error}");
    assert!(error.to_string().contains("the drive was pulled out"), "{error}");
    for round in 0..3 {
        submit(&io, &[1]).into_iter().for_each(finish_right);
        for file in [0, 2] {
            // The message that the lane is dead may come with the slot or, for a moment, without.
            let error = match io.submit(slots(1).remove(0), extent(file, round)) {
                Ok(read) => read.finish().expect_err("dead").error,
                Err(failure) => failure.error,
            };
            assert!(matches!(*error, ReadError::Stopped { .. }), "{error}");
        }
    }
}

#[test]
fn dropping_ends_every_lane() {
    for held in [false, true] {
        let drives = drives();
        let dropped = Arc::new(AtomicUsize::new(0));
        let io = special(&drives, [false, false], &dropped);
        let reads = submit(&io, &[0, 1, 2]);
        if held {
            drives[1].hold();
            let drive = drives[1].clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                drive.release();
            });
        }
        drop(io);
        assert_eq!(dropped.load(SeqCst), 2);
        assert!(reads.iter().all(PendingRead::is_done));
    }
}

#[test]
fn lanes_that_do_not_fit_together_are_refused() {
    let drives = drives();
    let lane = |at: usize, files: Vec<u16>| Lane {
        engine: Box::new(drives[at].engine(configs()[at].depth, 1)) as Box<dyn ReadEngine>,
        files,
        config: configs()[at].clone(),
        adapts: false,
    };
    let mut unverified = lane(1, vec![1]);
    unverified.config.verify = false;
    let error = Scheduler::start_lanes(vec![lane(0, vec![0, 2]), unverified]).expect_err("verified or not");
    assert!(matches!(error, IoError::Config { name: "verify", .. }), "{error}");
    let twice =
        std::panic::catch_unwind(|| Scheduler::start_lanes(vec![lane(0, vec![0, 1]), lane(1, vec![1])]).is_ok());
    assert!(twice.is_err(), "file 1 is in two lanes");
}

#[test]
fn files_on_one_drive_share_a_lane() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = (0..3).map(|file| {
        let path = folder.path().join(format!("{file}.bin"));
        std::fs::write(&path, contents(file)).expect("written");
        DataFile::open(&path, DirectMode::Prefer).expect("open")
    });
    let files: Vec<DataFile> = files.collect();
    let tuning = |chunk_bytes| {
        let config = IoConfig { chunk_bytes, ..IoConfig::default() };
        Tuning::choose(folder.path(), Some(&config), Some(EngineKind::Pread), None)
    };
    let tunings = [tuning(8 << 10), tuning(16 << 10), tuning(32 << 10)];
    let lanes = open_lanes(files, &tunings, &[]).expect("engines");
    assert_eq!(lanes.len(), 1);
    assert!(!lanes[0].adapts, "the settings were given");
    assert_eq!((lanes[0].files.as_slice(), lanes[0].config.chunk_bytes), (&[0, 1, 2][..], 8 << 10));
    let io = Scheduler::start_lanes(lanes).expect("a thread");
    submit(&io, &[0, 1, 2]).into_iter().for_each(finish_right);
}

/// This tests something only if the machine has a second filesystem to write to.
#[cfg(target_os = "linux")]
#[test]
fn files_on_two_drives_have_a_lane_each() {
    let (Ok(here), Ok(there)) = (tempfile::tempdir(), tempfile::tempdir_in("/dev/shm")) else { return };
    let open = |(file, folder): (u16, &tempfile::TempDir)| {
        let path = folder.path().join("part");
        std::fs::write(&path, contents(file)).expect("written");
        DataFile::open(&path, DirectMode::Prefer).expect("open")
    };
    let files: Vec<DataFile> = [(0, &here), (1, &there)].into_iter().map(open).collect();
    let devices: Vec<DeviceId> = files.iter().map(|file| DeviceId::of(file).expect("a device")).collect();
    let lanes = open_lanes(files, &[Tuning::default(), Tuning::default()], &[]).expect("engines");
    assert!(lanes.iter().all(|lane| lane.adapts), "nothing is known about them");
    assert_eq!(lanes.len(), if devices[0].is_same(&devices[1]) { 1 } else { 2 });
    let io = Scheduler::start_lanes(lanes).expect("threads");
    submit(&io, &[0, 1]).into_iter().for_each(finish_right);
}

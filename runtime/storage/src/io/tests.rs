//! One test body for every read engine, and the faults that only the simulated drive can have.

use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use super::sim::{Fault, FaultKind, SimDrive};
use super::*;

/// Pages per extent of the test file: single pages, odd counts, more than a few chunks.
const EXTENT_PAGES: [usize; 8] = [1, 3, 17, 64, 257, 2, 520, 31];

/// Two files of reproducible bytes, and the extents in them.
fn files() -> (Vec<Vec<u8>>, Vec<ExtentRead>) {
    let mut word = 1u64;
    let mut extents = Vec::new();
    let mut make = |file: u16| {
        let pages: usize = EXTENT_PAGES.iter().sum();
        let mut bytes = Vec::with_capacity(pages * PAGE_BYTES);
        while bytes.len() < pages * PAGE_BYTES {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
        let mut offset = 0;
        for (index, pages) in EXTENT_PAGES.into_iter().enumerate() {
            let len = pages * PAGE_BYTES;
            extents.push(ExtentRead {
                file,
                offset: offset as u64,
                len,
                checksum: xxh3_64(&bytes[offset..offset + len]),
                class: Class::Demand,
                check: Check::Here,
                name: ExtentName::expert(u32::from(file), index as u32),
            });
            offset += len;
        }
        bytes
    };
    (vec![make(0), make(1)], extents)
}

fn slots(extents: &[ExtentRead]) -> (Region, Vec<Slot>) {
    let arena = Arena::carve(extents.iter().map(|extent| extent.len), "test").expect("memory");
    (arena.region(), arena.into_slots())
}

fn config(chunk_bytes: usize, depth: usize) -> IoConfig {
    IoConfig { chunk_bytes, depth, prefetch_depth: depth.div_ceil(2), verify: true }
}

fn sim(drive: &SimDrive, seed: u64, config: &IoConfig) -> Scheduler {
    let engine = drive.engine(config.depth, seed);
    Scheduler::start(Box::new(engine), config.clone()).expect("a thread")
}

/// Reads every extent `rounds` times and compares every byte.
fn read_everything(io: &Scheduler, mut slots: Vec<Slot>, rounds: usize) {
    let (files, extents) = files();
    for _ in 0..rounds {
        let pending: Vec<_> =
            slots.drain(..).zip(&extents).map(|(slot, extent)| io.submit(slot, *extent).expect("accepted")).collect();
        for (read, extent) in pending.into_iter().zip(&extents) {
            let slot = read.finish().expect("ready");
            let start = extent.offset as usize;
            let expect = &files[usize::from(extent.file)][start..start + extent.len];
            assert!(slot.bytes() == expect, "{} differs", extent.name);
            slots.push(slot);
        }
    }
    let total: usize = extents.iter().map(|extent| extent.len).sum();
    let stats = io.stats();
    assert!(stats.demand_bytes >= (total * rounds) as u64);
    assert_eq!(stats.extents, (extents.len() * rounds) as u64);
    assert!(stats.busy_ns > 0);
}

/// The body that every engine has to pass.
fn engine_body(open: impl Fn(&[Region], &IoConfig) -> Scheduler) {
    for (chunk_bytes, depth) in [(4 << 10, 4), (64 << 10, 1), (1 << 20, 16), (2 << 20, 128)] {
        let (_, extents) = files();
        let (region, slots) = slots(&extents);
        let io = open(&[region], &config(chunk_bytes, depth));
        read_everything(&io, slots, 2);
    }
    wrong_checksum_is_an_error(&open);
    impossible_requests_are_errors(&open);
    dropping_with_reads_in_flight(&open);
    memory_that_was_given_back_can_be_read_into(&open);
}

/// The engine may have the memory registered: it must not read into pages that the slot had before.
fn memory_that_was_given_back_can_be_read_into(open: &impl Fn(&[Region], &IoConfig) -> Scheduler) {
    let (files, extents) = files();
    let (region, slots) = slots(&extents);
    let io = open(&[region], &config(64 << 10, 8));
    let mut slots: Vec<Option<Slot>> = slots.into_iter().map(Some).collect();
    for round in 0..12 {
        for (number, slot) in slots.iter_mut().flatten().enumerate() {
            if (number + round) % 3 != 0 {
                continue;
            }
            slot.give_back().expect("advice");
            assert!(slot.bytes().is_empty());
            // Otherwise it is read into before the engine has had a chance to notice.
            if (number + round) % 2 == 1 {
                io.wake();
            }
        }
        for (slot, extent) in slots.iter_mut().zip(&extents) {
            let read = io.submit(slot.take().expect("it came back"), *extent).expect("accepted");
            let read = read.finish().expect("ready");
            let start = extent.offset as usize;
            assert!(read.bytes() == &files[usize::from(extent.file)][start..start + extent.len], "{}", extent.name);
            *slot = Some(read);
        }
    }
}

fn wrong_checksum_is_an_error(open: &impl Fn(&[Region], &IoConfig) -> Scheduler) {
    let (_, mut extents) = files();
    let (region, mut slots) = slots(&extents);
    let io = open(&[region], &config(64 << 10, 8));
    extents[4].checksum ^= 1;
    let read = io.submit(slots.remove(4), extents[4]).expect("accepted");
    let failure = read.finish().expect_err("damaged");
    let text = failure.error.to_string();
    assert!(matches!(*failure.error, ReadError::Checksum { .. }), "{text}");
    assert!(text.contains("layer 0 expert 4"), "{text}");
    assert_eq!(io.stats().checksum_retries, 1);
    assert_eq!(io.stats().demand_bytes, 2 * extents[4].len as u64);
    // The slot is as good as new.
    extents[4].checksum ^= 1;
    let slot = failure.slot.expect("the slot is back");
    assert!(slot.bytes().is_empty());
    assert!(io.submit(slot, extents[4]).expect("accepted").finish().is_ok());
}

fn impossible_requests_are_errors(open: &impl Fn(&[Region], &IoConfig) -> Scheduler) {
    let (_, extents) = files();
    let (region, mut slots) = slots(&extents);
    let io = open(&[region], &config(64 << 10, 8));
    let good = extents[3];
    let bad = [
        ExtentRead { file: 2, ..good },
        ExtentRead { offset: 512, ..good },
        ExtentRead { offset: u64::MAX - 4095, ..good },
        ExtentRead { offset: 1 << 40, ..good },
        ExtentRead { len: 0, ..good },
        ExtentRead { len: 4097, ..good },
        ExtentRead { len: good.len + 4096, ..good },
    ];
    let mut slot = slots.remove(3);
    for read in bad {
        let failure = io.submit(slot, read).expect_err("impossible");
        assert!(matches!(*failure.error, ReadError::Request { .. }), "{}", failure.error);
        slot = failure.slot.expect("the slot is back");
    }
}

fn dropping_with_reads_in_flight(open: &impl Fn(&[Region], &IoConfig) -> Scheduler) {
    let (_, extents) = files();
    let (region, slots) = slots(&extents);
    let io = open(&[region], &config(16 << 10, 4));
    let mut pending: Vec<_> =
        slots.into_iter().zip(&extents).map(|(slot, extent)| io.submit(slot, *extent).expect("accepted")).collect();
    drop(pending.split_off(5));
    drop(io);
    for read in pending {
        match read.finish() {
            Ok(_) => {}
            Err(failure) => {
                assert!(failure.error.is_cancelled(), "{}", failure.error);
                assert!(failure.slot.is_some());
            }
        }
    }
}

/// The test files on a real filesystem.
struct OnDisk {
    _folder: tempfile::TempDir,
    paths: Vec<std::path::PathBuf>,
}

impl OnDisk {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |(number, bytes): (usize, Vec<u8>)| {
            let path = folder.path().join(format!("{number}.bin"));
            std::fs::write(&path, bytes).expect("written");
            path
        };
        let paths = files().0.into_iter().enumerate().map(write).collect();
        Self { _folder: folder, paths }
    }

    fn open(&self, kind: EngineKind, mode: DirectMode, r: &[Region], c: &IoConfig) -> Scheduler {
        let open = |path: &std::path::PathBuf| DataFile::open(path, mode).expect("a file");
        let files = self.paths.iter().map(open).collect();
        let engine = open_engine(kind, files, r, c).expect("an engine");
        Scheduler::start(engine, c.clone()).expect("a thread")
    }
}

#[test]
fn pread_direct() {
    let disk = OnDisk::new();
    engine_body(|r, c| disk.open(EngineKind::Pread, DirectMode::Prefer, r, c));
}

#[test]
fn pread_buffered() {
    let disk = OnDisk::new();
    engine_body(|r, c| disk.open(EngineKind::Pread, DirectMode::Never, r, c));
}

#[test]
fn automatic_choice() {
    let disk = OnDisk::new();
    engine_body(|r, c| disk.open(EngineKind::Auto, DirectMode::Prefer, r, c));
    let io = disk.open(EngineKind::Auto, DirectMode::Never, &[], &IoConfig::default());
    assert_eq!(io.engine().name, "pread");
}

#[cfg(target_os = "linux")]
#[test]
fn uring_direct_and_buffered() {
    let disk = OnDisk::new();
    if let Err(reason) = uring::UringEngine::new(&[], &[], 4) {
        println!("skipped: {reason}");
        return;
    }
    for mode in [DirectMode::Prefer, DirectMode::Never] {
        engine_body(|r, c| {
            let io = disk.open(EngineKind::Uring, mode, r, c);
            println!("{}", io.engine().note);
            io
        });
        // Without registered memory.
        engine_body(|_, c| disk.open(EngineKind::Uring, mode, &[], c));
    }
}

#[test]
fn simulated_drive() {
    for seed in 0..20 {
        let drive = SimDrive::new(files().0);
        drive.set_short_reads(if seed % 2 == 0 { 0 } else { 300 });
        engine_body(|_, c| sim(&drive, seed, c));
        assert_eq!(drive.fired(FaultKind::Short) > 0, seed % 2 == 1, "seed {seed}");
    }
}

#[test]
fn every_engine_waits_no_longer_than_told_and_can_be_woken() {
    let disk = OnDisk::new();
    let config = config(64 << 10, 4);
    let data = || {
        let open = |path| DataFile::open(path, DirectMode::Prefer).expect("a file");
        disk.paths.iter().map(|path| open(path.as_path())).collect::<Vec<_>>()
    };
    let mut engines: Vec<Box<dyn ReadEngine>> = vec![
        Box::new(SimDrive::new(files().0).engine(4, 1)),
        open_engine(EngineKind::Pread, data(), &[], &config).expect("an engine"),
        open_engine(EngineKind::Auto, data(), &[], &config).expect("an engine"),
    ];
    for engine in &mut engines {
        let mut ended = Vec::new();
        engine.complete(&mut ended, Wait::Poll).expect("poll");
        engine.complete(&mut ended, Wait::Timeout(Duration::from_millis(1))).expect("timeout");
        let waker = engine.waker();
        std::thread::scope(|scope| {
            scope.spawn(|| waker.wake());
            engine.complete(&mut ended, Wait::Forever).expect("woken");
        });
        assert!(ended.is_empty(), "{}", engine.name());
    }
}

#[test]
fn an_engine_gives_back_what_it_has_not_issued() {
    let drive = SimDrive::new(files().0);
    drive.hold();
    let mut engine = drive.engine(4, 1);
    let slot = Arena::uniform(3 * 4096, 1, "test").expect("memory").into_slots().remove(0);
    let (mut filling, _arriving) = fill::Filling::begin(slot, 3 * 4096, 4096, false);
    for tag in 0..3 {
        let (_, mem) = filling.next_chunk().expect("a chunk");
        engine.submit(ChunkRead { tag, file: 0, offset: u64::from(tag) * 4096, mem });
    }
    assert_eq!(engine.cancel(1).expect("staged").tag, 1);
    assert!(engine.cancel(1).is_none());
    let mut ended = Vec::new();
    engine.complete(&mut ended, Wait::Poll).expect("poll");
    assert!(engine.cancel(0).is_none(), "issued reads cannot be taken back");
    drive.release();
    while ended.len() < 2 {
        engine.complete(&mut ended, Wait::Forever).expect("complete");
    }
    assert_eq!(drive.log().len(), 2);
}

fn fault(kind: FaultKind, extent: &ExtentRead, times: u32) -> Fault {
    let at = extent.offset + extent.len as u64 / 2;
    Fault { kind, file: extent.file, range: at..at + 1, times }
}

/// Reads all extents of the simulated drive; the error of the given one, if there is one.
fn read_with(drive: &SimDrive, seed: u64, victim: usize) -> (Option<ReadError>, IoStats) {
    let (_, extents) = files();
    let io = sim(drive, seed, &config(16 << 10, 8));
    let (_, slots) = slots(&extents);
    let submit = |(slot, extent): (Slot, &ExtentRead)| io.submit(slot, *extent).expect("accepted");
    let pending: Vec<_> = slots.into_iter().zip(&extents).map(submit).collect();
    let mut error = None;
    for (index, read) in pending.into_iter().enumerate() {
        match read.finish() {
            Ok(slot) => assert_eq!(xxh3_64(slot.bytes()), extents[index].checksum),
            Err(failure) => {
                assert_eq!(index, victim, "seed {seed}: {}", failure.error);
                assert!(failure.slot.is_some());
                error = Some(*failure.error);
            }
        }
    }
    (error, io.stats())
}

#[test]
fn one_fault_is_survived_two_are_named() {
    let (_, extents) = files();
    for seed in 0..10 {
        for victim in [0, 4, 14] {
            let name = extents[victim].name.to_string();
            for kind in [FaultKind::Eio, FaultKind::Flip] {
                let drive = SimDrive::new(files().0);
                drive.add_fault(fault(kind, &extents[victim], 1));
                let (error, stats) = read_with(&drive, seed, victim);
                assert!(error.is_none(), "seed {seed}: {error:?}");
                assert_eq!(drive.fired(kind), 1);
                let retries = (stats.device_retries, stats.checksum_retries);
                assert_eq!(retries, if kind == FaultKind::Eio { (1, 0) } else { (0, 1) });

                let drive = SimDrive::new(files().0);
                drive.add_fault(fault(kind, &extents[victim], u32::MAX));
                let (error, _) = read_with(&drive, seed, victim);
                let error = error.expect("a lasting fault is an error");
                match kind {
                    FaultKind::Eio => assert!(matches!(error, ReadError::Device { .. })),
                    _ => assert!(matches!(error, ReadError::Checksum { .. })),
                }
                let text = error.to_string();
                assert!(text.contains(&name) && text.contains("sim:"), "{text}");
                assert!(drive.fired(kind) >= 2);
            }
        }
    }
}

#[test]
fn a_file_that_was_cut_off_is_named() {
    let (_, extents) = files();
    let drive = SimDrive::new(files().0);
    drive.add_fault(fault(FaultKind::Cut, &extents[6], u32::MAX));
    let (error, _) = read_with(&drive, 3, 6);
    let error = error.expect("an error");
    assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
}

#[test]
fn cancelled_reads_give_their_slots_back_and_do_not_disturb_others() {
    let (_, extents) = files();
    for seed in 0..20 {
        let drive = SimDrive::new(files().0);
        drive.hold();
        let io = sim(&drive, seed, &config(16 << 10, 4));
        let (_, slots) = slots(&extents);
        let submit = |(slot, extent): (Slot, &ExtentRead)| io.submit(slot, *extent).expect("accepted");
        let pending: Vec<_> = slots.into_iter().zip(&extents).map(submit).collect();
        for read in pending.iter().skip(1).step_by(2) {
            read.cancel();
        }
        // Far back in the queue: nothing of it is in flight, so it ends while the drive is held.
        pending[15].wait();
        assert!(pending[15].is_done());
        drive.release();
        for (index, read) in pending.into_iter().enumerate() {
            match read.finish() {
                Ok(slot) => assert_eq!(xxh3_64(slot.bytes()), extents[index].checksum),
                Err(failure) => {
                    assert!(index % 2 == 1 && failure.error.is_cancelled());
                    assert!(failure.slot.is_some());
                }
            }
        }
    }
}

#[test]
fn demand_overtakes_prefetch() {
    let (_, mut extents) = files();
    let drive = SimDrive::new(files().0);
    drive.hold();
    let io = sim(&drive, 1, &config(64 << 10, 2));
    let (_, slots) = slots(&extents);
    for extent in &mut extents[..8] {
        extent.class = Class::Prefetch;
    }
    let submit = |(slot, extent): (Slot, &ExtentRead)| io.submit(slot, *extent).expect("accepted");
    let pending: Vec<_> = slots.into_iter().zip(&extents).map(submit).collect();
    pending[7].promote();
    drive.release();
    pending.iter().for_each(PendingRead::wait);
    let log = drive.log();
    let first_of_file = |file| log.iter().rposition(|read| read.0 == file).expect("read");
    let last_demand = first_of_file(1);
    let prefetched_before = log[..last_demand].iter().filter(|read| read.0 == 0 && (read.1 < extents[7].offset));
    // At most what was in flight before the first demand was known.
    assert!(prefetched_before.count() <= 1, "{log:?}");
    assert!(io.stats().prefetch_bytes > 0);
}

#[test]
fn extents_are_read_one_after_the_other() {
    let (_, extents) = files();
    let drive = SimDrive::new(files().0);
    drive.hold();
    let io = sim(&drive, 1, &config(16 << 10, 1));
    let (_, slots) = slots(&extents);
    let submit = |(slot, extent): (Slot, &ExtentRead)| io.submit(slot, *extent).expect("accepted");
    let pending: Vec<_> = slots.into_iter().zip(&extents).map(submit).collect();
    drive.release();
    pending.iter().for_each(PendingRead::wait);
    let of = |read: &(u16, u64, usize)| {
        let within = |e: &ExtentRead| e.file == read.0 && (e.offset..e.offset + e.len as u64).contains(&read.1);
        extents.iter().position(within).expect("part of an extent")
    };
    let order: Vec<usize> = drive.log().iter().map(of).collect();
    assert!(order.is_sorted() && order.last() == Some(&(extents.len() - 1)), "{order:?}");
}

#[test]
fn a_receiver_that_verifies_sees_the_prefix_and_gets_what_was_read() {
    let (contents, extents) = files();
    for seed in 0..10 {
        let drive = SimDrive::new(contents.clone());
        drive.add_fault(fault(FaultKind::Flip, &extents[6], 1));
        let io = sim(&drive, seed, &config(64 << 10, 4));
        let slot = Arena::uniform(extents[6].len, 1, "test").expect("memory").into_slots().remove(0);
        let first = ExtentRead { check: Check::ByReceiver, ..extents[6] };
        let read = io.submit(slot, first).expect("accepted");
        let mut seen = Vec::new();
        while !read.is_done() {
            read.wait_prefix(seen.len() + 4096);
            assert!(read.prefix().starts_with(&seen), "seed {seed}: bytes have changed");
            seen = read.prefix().to_vec();
        }
        let slot = read.finish().expect("all bytes came");
        assert!(slot.bytes().starts_with(&seen));
        assert_ne!(xxh3_64(slot.bytes()), extents[6].checksum);
        assert_eq!(io.stats().checksum_retries, 0);
        // The second reading is the last one, and shows nothing before it is verified.
        let read = io.submit(slot, ExtentRead { check: Check::Again, ..extents[6] }).expect("accepted");
        while !read.is_done() {
            assert!(read.prefix().is_empty());
            std::thread::yield_now();
        }
        assert_eq!(xxh3_64(read.finish().expect("ready").bytes()), extents[6].checksum);
        assert_eq!(io.stats().checksum_retries, 1);
    }
}

#[test]
fn a_second_reading_is_not_followed_by_a_third() {
    let (contents, extents) = files();
    let drive = SimDrive::new(contents);
    drive.add_fault(fault(FaultKind::Flip, &extents[3], 1));
    let io = sim(&drive, 1, &config(64 << 10, 4));
    let slot = Arena::uniform(extents[3].len, 1, "test").expect("memory").into_slots().remove(0);
    let read = io.submit(slot, ExtentRead { check: Check::Again, ..extents[3] }).expect("accepted");
    let failure = read.finish().expect_err("damaged");
    assert!(matches!(*failure.error, ReadError::Checksum { .. }), "{}", failure.error);
}

#[test]
fn without_verification_damage_passes_and_nothing_else_changes() {
    let (_, mut extents) = files();
    extents.truncate(8);
    extents.iter_mut().for_each(|extent| extent.checksum = 0);
    let drive = SimDrive::new(files().0);
    let config = IoConfig { verify: false, ..config(16 << 10, 8) };
    let io = sim(&drive, 5, &config);
    let (_, slots) = slots(&extents);
    for (slot, extent) in slots.into_iter().zip(&extents) {
        assert!(io.submit(slot, *extent).expect("accepted").finish().is_ok());
    }
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let good = IoConfig::default();
    let bad = [
        IoConfig { chunk_bytes: 0, ..good.clone() },
        IoConfig { chunk_bytes: 4097, ..good.clone() },
        IoConfig { chunk_bytes: 1 << 30, ..good.clone() },
        IoConfig { depth: 0, ..good.clone() },
        IoConfig { depth: 129, ..good.clone() },
        IoConfig { prefetch_depth: 17, ..good.clone() },
    ];
    assert!(good.validate().is_ok());
    for config in bad {
        assert!(matches!(config.validate(), Err(IoError::Config { .. })), "{config:?}");
    }
}

/// An engine that breaks down.
struct Broken(sim::SimEngine);

impl ReadEngine for Broken {
    fn info(&self) -> &EngineInfo {
        self.0.info()
    }
    fn submit(&mut self, read: ChunkRead) {
        self.0.submit(read);
    }
    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        self.0.cancel(tag)
    }
    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> std::io::Result<()> {
        self.0.complete(ended, wait)?;
        if ended.is_empty() { Ok(()) } else { Err(std::io::Error::other("the ring is gone")) }
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.0.waker()
    }
}

#[test]
fn a_broken_engine_ends_all_reads_with_its_reason() {
    let (_, extents) = files();
    let drive = SimDrive::new(files().0);
    let engine = Broken(drive.engine(4, 1));
    let io = Scheduler::start(Box::new(engine), config(16 << 10, 4)).expect("a thread");
    let (_, slots) = slots(&extents);
    for (slot, extent) in slots.into_iter().zip(&extents) {
        let error = match io.submit(slot, *extent) {
            Ok(read) => read.finish().expect_err("lost").error,
            Err(failure) => failure.error,
        };
        assert!(error.to_string().contains("the ring is gone"), "{error}");
    }
}

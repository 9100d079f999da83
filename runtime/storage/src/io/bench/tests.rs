use std::time::Duration;

use super::*;
use crate::io::PAGE_BYTES;

const ENGINES: [BenchEngine; 3] = [BenchEngine::Uring, BenchEngine::UringPlain, BenchEngine::Pread];

/// A file of 8 MiB of noise, on the drive.
fn noise() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut state = 0;
    let bytes: Vec<u8> = (0..1 << 20).flat_map(|_| splitmix(&mut state).to_le_bytes()).collect();
    std::fs::write(file.path(), bytes).expect("written");
    file.as_file().sync_all().expect("synced");
    scratch::forget_pages(file.as_file());
    file
}

/// The temporary folder may be in memory; then there is nothing to measure but the page cache.
fn open(path: &Path) -> DiskBench {
    DiskBench::open(path, DirectMode::Prefer)
        .or_else(|_| DiskBench::open(path, DirectMode::Never))
        .expect("one of the two")
}

/// The engines that run here.
fn engines(bench: &mut DiskBench) -> Vec<BenchEngine> {
    let here = ENGINES.into_iter().filter(|&engine| bench.engine_note(engine).is_ok()).collect::<Vec<_>>();
    assert!(here.contains(&BenchEngine::Pread));
    here
}

#[test]
fn every_engine_reads_for_a_while_and_stops() {
    let file = noise();
    let mut bench = open(file.path());
    for engine in engines(&mut bench) {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            for (block_bytes, depth) in [(PAGE_BYTES, 1), (64 << 10, 16), (1 << 20, 4), (8 << 20, 2)] {
                let point = Point { engine, pattern, block_bytes, depth };
                let visit = bench.visit(&point, Duration::from_millis(5)).expect("measured");
                assert!(visit.bytes >= point.in_flight_bytes() as u64, "{point:?}");
                assert_eq!(visit.bytes % block_bytes as u64, 0);
                assert!(!visit.elapsed.is_zero());
            }
        }
    }
}

#[test]
fn memory_is_read_into_in_turns_or_again_and_again() {
    let file = noise();
    for reuse in [false, true] {
        let mut bench = open(file.path());
        bench.reuse_memory(reuse);
        let point = Point { engine: BenchEngine::Pread, pattern: Pattern::Random, block_bytes: 64 << 10, depth: 16 };
        let visit = bench.visit(&point, Duration::from_millis(20)).expect("measured");
        let pieces = || bench.slots.iter().flat_map(|slot| slot.bytes().chunks_exact(point.block_bytes));
        let read_into = pieces().filter(|piece| piece.iter().any(|&byte| byte != 0)).count();
        let reads = usize::try_from(visit.bytes).expect("few") / point.block_bytes;
        assert_eq!(read_into, if reuse { point.depth } else { reads.min(pieces().count()) });
    }
}

#[test]
fn a_sweep_measures_every_point_and_proves_itself() {
    let file = noise();
    let mut bench = open(file.path());
    let engines = engines(&mut bench);
    let options = SweepOptions {
        engines: engines.clone(),
        patterns: vec![Pattern::Random, Pattern::Sequential],
        blocks: vec![256 << 10, 512 << 10],
        depths: vec![1, 4],
        time: Duration::from_millis(600),
    };
    let mut heard = 0.0;
    let sweep = sweep(&mut bench, &options, &mut |done| heard = done).expect("measured");
    assert!(heard > 0.0 && heard <= 1.0);
    assert_eq!(sweep.points.len(), engines.len() * 8);
    assert!(sweep.points[0].bytes_per_second > 0.0 && sweep.points[0].mean_bytes_per_second > 0.0);
    assert!(sweep.finalists.is_empty());
    assert_eq!(sweep.proof.direct, bench.direct().is_engaged());
    assert!(sweep.proof.bytes_read > 0);
    let json = serde_json::to_value(&sweep).expect("JSON");
    assert_eq!(json["points"][0]["block_bytes"], 256 << 10);
    assert_eq!(json["points"][0]["engine"], sweep.points[0].point.engine.name());
}

#[test]
fn a_sweep_without_time_still_ends() {
    let file = noise();
    let mut bench = open(file.path());
    let options = SweepOptions {
        engines: vec![BenchEngine::Pread],
        patterns: vec![Pattern::Random],
        blocks: Vec::new(),
        depths: Vec::new(),
        time: Duration::ZERO,
    };
    let sweep = sweep(&mut bench, &options, &mut |_| ()).expect("measured");
    assert_eq!(sweep.points.iter().filter(|m| !m.rates.is_empty()).count(), 1);
    assert!(sweep.knee.is_some());
}

#[test]
fn whether_a_file_is_too_small_does_not_depend_on_time() {
    let file = noise();
    file.as_file().set_len((4 << 20) - 1).expect("cut");
    let mut bench = open(file.path());
    for milliseconds in [0, 10, 5000] {
        let options = SweepOptions {
            engines: vec![BenchEngine::Pread],
            patterns: vec![Pattern::Random],
            blocks: Vec::new(),
            depths: Vec::new(),
            time: Duration::from_millis(milliseconds),
        };
        let error = sweep(&mut bench, &options, &mut |_| ()).expect_err("too small").to_string();
        assert!(error.contains("4194303 bytes") && error.contains("up to 4194304"), "{error}");
        let smaller = SweepOptions { blocks: vec![2 << 20], depths: vec![1], ..options };
        assert!(milliseconds > 1000 || sweep(&mut bench, &smaller, &mut |_| ()).is_ok());
    }
}

#[test]
fn what_cannot_be_measured_says_why() {
    let refused = |path: &Path| DiskBench::open(path, DirectMode::Never).err().expect("refused").to_string();
    let folder = tempfile::tempdir().expect("a folder");
    assert!(refused(folder.path()).contains("not a regular file"));
    let path = folder.path().join("file");
    std::fs::write(&path, [1; 100]).expect("written");
    assert!(refused(&path).contains("100 bytes"));
    std::fs::File::create(&path).and_then(|f| f.set_len(64 << 20)).expect("made");
    assert!(refused(&path).contains("holes"), "{}", refused(&path));
    let file = noise();
    let point = Point { engine: BenchEngine::Pread, pattern: Pattern::Random, block_bytes: 16 << 20, depth: 1 };
    let error = open(file.path()).visit(&point, Duration::ZERO).expect_err("too large").to_string();
    // How a command reacts to this is not part of this test.
    let words = ["8388608 bytes", "up to 16777216"];
    assert!(words.iter().all(|word| error.contains(word)) && !error.contains("--"), "{error}");
    let mut bench = open(file.path());
    let point = Point { block_bytes: 100, ..point };
    assert!(matches!(bench.visit(&point, Duration::ZERO), Err(BenchError::Io(IoError::Config { .. }))));
}

#[test]
fn a_file_in_memory_is_refused() {
    let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
    std::fs::write(file.path(), vec![1; 1 << 20]).expect("written");
    let error = DiskBench::open(file.path(), DirectMode::Prefer).err().expect("refused");
    assert!(matches!(error, BenchError::NotDirect { .. }));
    let text = error.to_string();
    assert!(text.contains("tmpfs") && !text.contains("--"), "{text}");
    let bench = DiskBench::open(file.path(), DirectMode::Never).expect("asked for");
    assert!(bench.proof().expect("none needed").summary().starts_with("BUFFERED"));
}

#[test]
fn what_is_in_the_page_cache_is_not_measured() {
    let file = noise();
    let options = SweepOptions {
        engines: vec![BenchEngine::Pread],
        patterns: vec![Pattern::Random],
        blocks: vec![1 << 20],
        depths: vec![1],
        time: Duration::from_millis(50),
    };
    std::fs::read(file.path()).expect("read through the page cache");
    let mut bench = open(file.path());
    if bench.direct().is_engaged() && bench.file.is_cached(0) == Some(true) {
        let error = sweep(&mut bench, &options, &mut |_| ()).expect_err("cached").to_string();
        assert!(error.contains("page cache") && !error.contains("--"), "{error}");
    }
    let mut buffered = DiskBench::open(file.path(), DirectMode::Never).expect("asked for");
    sweep(&mut buffered, &options, &mut |_| ()).expect("the page cache is what is measured");
}

#[test]
fn scratch_files_go_away_and_never_replace() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("scratch");
    let error = Scratch::create(&path, Some(1 << 20), &mut |_, _| ()).expect_err("too small");
    let text = error.to_string();
    assert!(matches!(error, BenchError::ScratchSize { bytes: 1_048_576 }), "{text}");
    assert!(text.contains("of 1.0 MiB") && text.contains("at least 64MiB") && !text.contains("space"), "{text}");
    assert!(!path.exists());
    let error = Scratch::create(&path, Some(u64::MAX), &mut |_, _| ()).expect_err("too large");
    assert!(error.to_string().contains("are free"), "{error}");
    std::fs::write(&path, "precious").expect("written");
    assert!(matches!(Scratch::create(&path, None, &mut |_, _| ()), Err(BenchError::Scratch { .. })));
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
}

#[test]
fn a_scratch_file_is_on_the_drive() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("scratch");
    let mut heard = 0;
    let made = Scratch::create(&path, Some(scratch::LEAST_BYTES), &mut |done, _| {
        heard = done;
        assert!(!path.exists(), "whoever kills the program now would find it");
    });
    let Ok(scratch) = made else { return };
    assert_eq!(heard, scratch::LEAST_BYTES);
    let open = |mode| DiskBench::open_scratch(&scratch, mode);
    let mut bench = open(DirectMode::Prefer).or_else(|_| open(DirectMode::Never)).expect("one of the two");
    drop(scratch);
    assert_eq!((bench.file_bytes(), bench.path()), (scratch::LEAST_BYTES, path.as_path()));
    for engine in engines(&mut bench) {
        let point = Point { engine, pattern: Pattern::Random, block_bytes: 1 << 20, depth: 4 };
        assert!(bench.visit(&point, Duration::from_millis(5)).expect("measured").bytes > 0);
    }
    let proof = bench.proof().expect("the drive has answered");
    assert_eq!(proof.direct, bench.direct().is_engaged());
}

//! Dense extents on their way into memory.

use super::*;

/// Chunks are of two pages, and one is read at a time, so that they come in order.
fn one_by_one() -> IoConfig {
    IoConfig { depth: 1, prefetch_depth: 1, ..config() }
}

/// The experts of the first layers stand for dense extents: of several sizes, and some are compressed.
fn dense(layers: u32) -> Vec<DenseLocation> {
    let located = (1..=layers).flat_map(|layer| model().1.remove(layer as usize));
    located.map(|extent| DenseLocation { extent, name: ExtentName::dense("norms", Some(1)) }).collect()
}

fn scheduler(drive: &SimDrive, config: IoConfig, seed: u64) -> Arc<Scheduler> {
    Arc::new(Scheduler::start(Box::new(drive.engine(config.depth, seed)), config).expect("a thread"))
}

fn load(io: &Arc<Scheduler>, dense: &[DenseLocation]) -> DenseParts {
    let pinned = vec![true; dense.len()];
    let memory = DenseParts::reserve(dense, &pinned).expect("addresses");
    DenseParts::load(io, memory, dense, &pinned).expect("queued")
}

/// Asks for an extent; whether it is right.
fn is_right(parts: &DenseParts, handle: usize) -> bool {
    let number = handle as u32;
    let guard = parts.dense(DenseHandle(number)).expect("readable");
    is_content(guard.bytes(), 1 + number / EXPERTS, number % EXPERTS)
}

fn is_packed(location: &DenseLocation) -> bool {
    location.extent.packed.is_some()
}

fn chunks(location: &DenseLocation) -> usize {
    (location.extent.len as usize).div_ceil(config().chunk_bytes)
}

#[test]
fn a_caller_waits_only_for_the_extent_that_it_needs() {
    let mut dense = dense(2);
    dense.retain(|location| !is_packed(location));
    let drive = SimDrive::new(vec![model().0]);
    drive.hold();
    let io = scheduler(&drive, one_by_one(), 1);
    let parts = load(&io, &dense);
    let bytes = |dense: &[DenseLocation]| dense.iter().map(|location| location.extent.memory_len()).sum::<u64>();
    assert_eq!(parts.missing_bytes(), bytes(&dense), "nothing has been waited for");
    assert!(!parts.is_here(DenseHandle(0)));
    for number in 0..dense.len() {
        drive.let_through(chunks(&dense[number]));
        drop(parts.dense(DenseHandle(number as u32)).expect("its bytes have come"));
        assert!(parts.is_here(DenseHandle(number as u32)));
        let behind = number + 1..dense.len();
        assert!(behind.clone().all(|later| !parts.is_here(DenseHandle(later as u32))), "those behind {number}");
        assert_eq!(parts.missing_bytes(), bytes(&dense[behind]));
    }
    assert_eq!(parts.stats().bytes_read, bytes(&dense));
    // They are read in the order of use, whole extents one after the other.
    let offsets: Vec<u64> = drive.log().iter().map(|read| read.1).collect();
    assert!(offsets.is_sorted(), "{offsets:?}");
}

#[test]
fn what_a_caller_waits_for_overtakes_dense_extents() {
    let dense = dense(2);
    let drive = SimDrive::new(vec![model().0]);
    drive.hold();
    let io = scheduler(&drive, one_by_one(), 1);
    let parts = load(&io, &dense);
    let wanted = model().1[4][0].clone();
    let slot = Arena::uniform(wanted.len as usize, 1, "test").expect("addresses").into_slots().remove(0);
    let read = crate::io::ExtentRead {
        file: 0,
        offset: wanted.offset,
        len: wanted.len as usize,
        checksum: wanted.checksum,
        class: Class::Demand,
        check: Check::Here,
        name: ExtentName::expert(4, 0),
    };
    let read = io.submit(slot, read).expect("queued");
    drive.release();
    read.finish().expect("readable");
    let log = drive.log();
    let place = log.iter().position(|read| read.1 == wanted.offset).expect("it was read");
    assert!(place <= 1, "only what was in flight comes before it: {log:?}");
    assert!((0..dense.len()).all(|handle| is_right(&parts, handle)));
}

#[test]
fn damage_is_an_error_of_the_extent_that_has_it_and_of_no_other() {
    let dense = dense(1);
    for (bad, kind) in [(3, FaultKind::Flip), (11, FaultKind::Flip), (2, FaultKind::Flip), (8, FaultKind::Eio)] {
        let drive = SimDrive::new(vec![model().0]);
        let at = dense[bad].extent.offset + 10;
        let fault = |times| Fault { kind, file: 0, range: at..at + 1, times };
        drive.add_fault(fault(u32::MAX));
        let io = scheduler(&drive, config(), bad as u64);
        let parts = load(&io, &dense);
        for handle in (0..dense.len()).chain(0..dense.len()) {
            if handle != bad {
                assert!(is_right(&parts, handle));
                continue;
            }
            let error = parts.dense(DenseHandle(bad as u32)).expect_err("damaged");
            let expected = match kind {
                FaultKind::Flip => matches!(error, PoolError::Read(ReadError::Checksum { .. })),
                _ => matches!(error, PoolError::Read(ReadError::Device { .. })),
            };
            assert!(expected && error.to_string().contains("layer 1 norms"), "{error}");
        }
        assert!(parts.wait_for_all().is_err());
        drive.heal();
        assert!(is_right(&parts, bad), "the next call reads it again");
        // Damage that does not last is read again at once.
        let before = drive.fired(kind);
        drive.add_fault(fault(1));
        let parts = load(&io, &dense);
        assert!((0..dense.len()).all(|handle| is_right(&parts, handle)));
        assert_eq!(drive.fired(kind), before + 1);
    }
}

#[test]
fn no_memory_to_read_into_is_not_the_drives_fault() {
    let dense = dense(1);
    let drive = SimDrive::new(vec![model().0]);
    let at = dense[7].extent.offset;
    drive.add_fault(Fault { kind: FaultKind::NoMemory, file: 0, range: at..at + 1, times: u32::MAX });
    let parts = load(&scheduler(&drive, config(), 1), &dense);
    let error = parts.dense(DenseHandle(7)).expect_err("no memory");
    assert!(matches!(error, PoolError::Read(ReadError::Memory { .. })), "{error}");
    assert!(error.to_string().contains("smaller budget"), "{error}");
    drive.heal();
    assert!(is_right(&parts, 7));
}

#[test]
fn loading_can_be_left_at_any_point() {
    let dense = dense(2);
    for seed in 0..24 {
        let drive = SimDrive::new(vec![model().0]);
        drive.hold();
        let io = scheduler(&drive, config(), seed);
        let mut parts = load(&io, &dense);
        drive.release();
        let reached = seed as usize % dense.len();
        assert!((0..reached).all(|handle| is_right(&parts, handle)));
        if seed % 3 > 0 {
            parts.give_back();
            assert!(parts.is_away());
        }
        if seed % 3 == 2 {
            parts.take_again().expect("queued");
            assert!((0..dense.len()).all(|handle| is_right(&parts, handle)));
            assert_eq!(parts.missing_bytes(), 0);
        }
        drop(parts);
        drop(io);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Compressed extents have to share a few staging slots; whoever asks for one in whatever order gets it.
    #[test]
    fn any_order_gives_the_right_bytes(
        order in proptest::collection::vec(0usize..2 * EXPERTS as usize, 0..60),
        seed in any::<u64>(),
        damaged in proptest::collection::btree_set(0usize..2 * EXPERTS as usize, 0..3),
    ) {
        let dense = dense(2);
        let drive = SimDrive::new(vec![model().0]);
        for bad in damaged {
            let at = dense[bad].extent.offset;
            drive.add_fault(Fault { kind: FaultKind::Flip, file: 0, range: at..at + 1, times: 1 });
        }
        let io = scheduler(&drive, config(), seed);
        let parts = load(&io, &dense);
        for handle in order {
            prop_assert!(is_right(&parts, handle));
        }
        prop_assert!(parts.wait_for_all().is_ok());
        prop_assert_eq!(parts.missing_bytes(), 0);
    }
}

#[test]
fn a_slot_takes_memory_when_it_is_first_filled() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = pool(&drive, 12, 1);
    assert_eq!(pool.unfilled(), 12, "opening takes none");
    run_pass(&mut pool, 1, &[0, 3, 4]).expect("no faults");
    assert_eq!(pool.unfilled(), 9);
    run_pass(&mut pool, 1, &[0, 3, 4]).expect("no faults");
    assert_eq!(pool.unfilled(), 9, "hits take none");
    // The smaller pool loses slots without memory first, and no expert.
    pool.resize(&[4]);
    assert_eq!((pool.resident_count(), pool.unfilled(), pool.slot_count()), (3, 1, 4));
    pool.resize(&[2]);
    assert_eq!((pool.resident_count(), pool.unfilled()), (2, 0));
    pool.resize(&[12]);
    assert_eq!((pool.resident_count(), pool.unfilled()), (2, 10));
}

#[test]
fn slots_beyond_what_the_system_has_stay_empty() {
    let drive = SimDrive::new(vec![model().0]);
    let all: Vec<u32> = (0..EXPERTS).collect();
    for allowed in [0u64, 1, 3, 12] {
        let mut pool = pool(&drive, 12, 2);
        pool.limit_new_memory(allowed * pool.directory().slot_bytes() as u64);
        for layer in 1..=LAYERS {
            assert_eq!(run_pass(&mut pool, layer, &all).expect("no faults").len(), all.len());
        }
        assert_eq!(pool.unfilled(), 12 - allowed.max(1) as usize, "a pass needs one slot");
        pool.limit_new_memory(u64::MAX);
        run_pass(&mut pool, 1, &all).expect("no faults");
        assert_eq!(pool.unfilled(), 0);
    }
}

//! Filling the pool while there is nothing to do.

use super::*;

/// A pool whose policy knows what passes of another run have used.
fn warm_pool(drive: &SimDrive, slots: usize, seed: u64) -> Pool {
    let mut first = pool(drive, 8, 0);
    for round in 0..4 {
        for layer in 1..=LAYERS {
            // The higher the number, the rarer; the last two are never used.
            let used: Vec<u32> = (0..EXPERTS - 2).filter(|expert| round % (1 + expert / 3) == 0).collect();
            run_pass(&mut first, layer, &used).expect("no faults");
        }
    }
    let counts = first.policy().export();
    // Two engines on one drive would take each other's wake-ups.
    drop(first);
    let mut pool = pool(drive, slots, seed);
    pool.policy_mut().import(&counts).expect("of the same shape");
    drive.clear_log();
    pool
}

fn warm_to_the_end(pool: &mut Pool) {
    while pool.warm() {
        std::thread::yield_now();
    }
}

/// What the policy expects of experts in memory and of the others, where it knows anything.
fn lateness(pool: &Pool) -> (Vec<u64>, Vec<u64>) {
    let of = |resident: bool| {
        let keys = (0..LAYERS * EXPERTS).map(Key).filter(move |key| (pool.table[key.index()] != ABSENT) == resident);
        keys.filter_map(|key| pool.policy.lateness(key)).collect()
    };
    (of(true), of(false))
}

#[test]
fn an_empty_pool_is_filled_with_what_was_used_most() {
    let drive = SimDrive::new(vec![model().0]);
    for seed in 0..6 {
        let mut pool = warm_pool(&drive, 20, seed);
        warm_to_the_end(&mut pool);
        let stats = pool.stats();
        assert_eq!((pool.resident_count(), stats.warmed, stats.warmed_bytes), (20, 20, stats.bytes_read));
        assert!(stats.warmed_bytes > 0);
        let (resident, absent) = lateness(&pool);
        assert!(resident.iter().max() <= absent.iter().min(), "{resident:?} {absent:?}");
        let residents: Vec<ExpertKey> = pool.residents().collect();
        for key in residents {
            run_pass(&mut pool, key.layer, &[key.expert]).expect("no faults");
        }
        assert_eq!((pool.stats().hits, pool.stats().misses), (20, 0));
    }
}

#[test]
fn nothing_is_read_of_which_nothing_is_known() {
    let drive = SimDrive::new(vec![model().0]);
    assert!(!pool(&drive, 40, 1).warm());
    let mut pool = warm_pool(&drive, 48, 1);
    warm_to_the_end(&mut pool);
    assert_eq!(pool.resident_count() as u32, LAYERS * (EXPERTS - 2));
    assert_eq!(pool.unfilled() as u32, 2 * LAYERS);
    let read = drive.log().len();
    assert!(!pool.warm());
    assert_eq!(drive.log().len(), read, "there is an end to it");
}

#[test]
fn an_expert_leaves_only_for_one_that_is_expected_sooner() {
    let drive = SimDrive::new(vec![model().0]);
    for seed in 0..6 {
        let mut pool = warm_pool(&drive, 10, seed);
        run_pass(&mut pool, 2, &[1, 5, 9, 10, 11]).expect("no faults");
        run_pass(&mut pool, 3, &[0, 4, 9, 10, 11]).expect("no faults");
        let before: u64 = lateness(&pool).0.iter().sum();
        warm_to_the_end(&mut pool);
        let (resident, absent) = lateness(&pool);
        assert!(resident.iter().sum::<u64>() <= before);
        assert!(resident.iter().max() <= absent.iter().min());
        assert_eq!(pool.resident_count(), 10);
    }
}

#[test]
fn a_pass_ends_it_and_waits_for_no_more_than_what_is_in_flight() {
    let drive = SimDrive::new(vec![model().0]);
    for seed in 0..8 {
        let mut pool = warm_pool(&drive, 30, seed);
        drive.hold();
        assert!(pool.warm());
        let (open, io) = (pool.warming.open.len(), Arc::clone(&pool.io));
        assert!(open > 2, "{open} reads are queued");
        let in_flight = config().prefetch_depth;
        while drive.log().len() < in_flight {
            std::thread::yield_now();
        }
        std::thread::scope(|scope| {
            // The drive goes on once all reads have been cancelled.
            scope.spawn(|| {
                while (io.stats().cancelled as usize) < open {
                    std::thread::yield_now();
                }
                drive.release();
            });
            pool.stop_warming();
        });
        assert!(pool.warming.open.is_empty());
        assert_eq!(drive.log().len(), in_flight, "nothing else was read of them");
        assert_eq!(run_pass(&mut pool, 1, &[0, 1, 10, 11]).expect("no faults").len(), 4);
        assert!(pool.warm() || pool.resident_count() == 30);
        run_pass(&mut pool, 4, &[0, 1, 2]).expect("a pass ends it by itself");
        assert!(pool.warming.open.is_empty());
    }
}

#[test]
fn a_fault_ends_it_until_the_next_pass() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = warm_pool(&drive, 40, 2);
    drive.add_fault(Fault { kind: FaultKind::Eio, file: 0, range: 0..u64::MAX, times: u32::MAX });
    warm_to_the_end(&mut pool);
    assert_eq!((pool.resident_count(), pool.stats().warmed), (0, 0));
    assert!(!pool.warm());
    drive.heal();
    run_pass(&mut pool, 1, &[0]).expect("healed");
    warm_to_the_end(&mut pool);
    assert_eq!(pool.resident_count() as u32, LAYERS * (EXPERTS - 2));
}

#[test]
fn memory_that_the_system_does_not_have_is_not_filled() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = warm_pool(&drive, 30, 1);
    pool.limit_new_memory(7 * pool.directory().slot_bytes() as u64);
    warm_to_the_end(&mut pool);
    assert_eq!((pool.resident_count(), pool.unfilled()), (7, 23));
    let (resident, absent) = lateness(&pool);
    assert!(resident.iter().max() <= absent.iter().min());
}

#[test]
fn a_policy_that_remembers_nothing_warms_nothing() {
    let drive = SimDrive::new(vec![model().0]);
    let directory = ExpertDirectory::new(&model().1).expect("valid");
    let io = Arc::new(Scheduler::start(Box::new(drive.engine(4, 1)), config()).expect("a thread"));
    let (arena, staging) = (
        Pool::reserve(&directory, &directory.uniform_slots(20)).expect("addresses"),
        Pool::reserve_staging(&directory, 2),
    );
    let policy = PolicyKind::Lru.build(directory.shape()).expect("online");
    let mut pool = Pool::new(io, arena, staging.expect("addresses"), directory, policy);
    run_pass(&mut pool, 1, &[0, 1, 2]).expect("no faults");
    assert!(!pool.warm());
}

//! The pool against a simple model of itself, on the simulated drive and on a real one.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::io::sim::{Fault, FaultKind, SimDrive};
use crate::io::{DirectMode, IoConfig, PAGE_BYTES, ReadError, Tuning};

mod ahead;
mod load;
mod sizes;
mod warm;

const LAYERS: u32 = 4;
const EXPERTS: u32 = 12;
/// Staging slots of pools here.
const STAGING: usize = 3;

/// A file of experts whose bytes say which expert they are; sizes differ.
fn model() -> (Vec<u8>, Vec<Vec<ExtentLocation>>) {
    let mut file = Vec::new();
    let mut layers = vec![Vec::new()];
    for layer in 1..=LAYERS {
        let mut locations = Vec::new();
        for expert in 0..EXPERTS {
            let len = PAGE_BYTES * (1 + (layer + expert) as usize % 5);
            let bytes = vec![content(layer, expert); len];
            let (offset, checksum) = (file.len() as u64, xxh3_64(&bytes));
            let packed = Packed { logical_len: len as u64 - 64, padded_len: len as u64, checksum };
            let logical = &bytes[..len - 64];
            // Some are compressed; what follows their logical bytes is zero.
            let (stored, packed) = match (expert % 4, compress(logical)) {
                (1 | 2, Some(stored)) => {
                    let padded = [logical, &[0; 64]].concat();
                    (stored, Some(Packed { checksum: xxh3_64(&padded), ..packed }))
                }
                _ => (bytes, None),
            };
            let (len, checksum) = (stored.len() as u64, xxh3_64(&stored));
            locations.push(ExtentLocation { file: 0, offset, len, checksum, packed, stripes: None });
            file.extend_from_slice(&stored);
        }
        layers.push(locations);
    }
    (file, layers)
}

/// The stored bytes of an extent of halves, if they are fewer.
fn compress(logical: &[u8]) -> Option<Vec<u8>> {
    let tensor = sluice_format::TensorRecord {
        kind: sluice_format::ExtentKind::Expert,
        weight_type: sluice_format::WeightType::Bf16,
        layout: sluice_format::Layout::Plain,
        layer: 0,
        index: sluice_format::ANY_INDEX,
        shape: [1, 1, logical.len() as u64 / 2],
        offset: 0,
        len: logical.len() as u64,
        name: "x".into(),
    };
    sluice_format::planes::encode(logical, &[tensor], PAGE_BYTES as u32)
}

/// Whether these are the bytes of an expert.
fn is_content(bytes: &[u8], layer: u32, expert: u32) -> bool {
    let (logical, tail) = bytes.split_at(bytes.len() - 64);
    let zeros = tail.iter().all(|&byte| byte == 0);
    let same = |bytes: &[u8]| bytes.iter().all(|&byte| byte == content(layer, expert));
    same(logical) && (same(tail) || (zeros && matches!(expert % 4, 1 | 2)))
}

fn content(layer: u32, expert: u32) -> u8 {
    (layer * EXPERTS + expert) as u8
}

fn config() -> IoConfig {
    IoConfig { chunk_bytes: 2 * PAGE_BYTES, depth: 4, prefetch_depth: 2, verify: true }
}

fn pool(drive: &SimDrive, slots: usize, seed: u64) -> Pool {
    pool_with(config(), drive, slots, seed)
}

fn pool_with(config: IoConfig, drive: &SimDrive, slots: usize, seed: u64) -> Pool {
    let engine = Box::new(drive.engine(config.depth, seed));
    let io = Arc::new(Scheduler::start(engine, config).expect("a thread"));
    let directory = ExpertDirectory::new(&model().1).expect("valid");
    let arena = Arena::uniform(directory.slot_bytes(), slots, "test").expect("memory");
    let policy = PolicyKind::NextUse.build(directory.shape()).expect("online");
    let staging = Pool::reserve_staging(&directory, STAGING).expect("memory");
    let mut pool = Pool::new(io, arena, staging, directory, policy);
    if seed.is_multiple_of(2) {
        pool.set_workers(Arc::new(Started));
    }
    pool
}

fn choices(experts: &[u32]) -> Vec<Choice> {
    experts.iter().map(|&expert| Choice { expert, weight: 1.0 }).collect()
}

fn routing(choices: &[Choice]) -> Routing<'_> {
    Routing { tokens: 1, prefill: false, in_order: false, choices }
}

/// Runs a whole pass and checks every byte; returns the experts in the order in which they were yielded.
fn run_pass(pool: &mut Pool, layer: u32, experts: &[u32]) -> Result<Vec<u32>, PoolError> {
    let choices = choices(experts);
    let mut pass = pool.begin_layer(layer, experts, &routing(&choices))?;
    let mut yielded = Vec::new();
    while let Some(guard) = pass.next()? {
        assert!(is_content(guard.bytes(), layer, guard.expert()));
        yielded.push(guard.expert());
    }
    assert_eq!(pass.remaining(), 0);
    Ok(yielded)
}

/// Runs a whole pass in ascending order; returns the experts that were yielded.
fn run_in_order(pool: &mut Pool, layer: u32, experts: &[u32]) -> Result<Vec<u32>, PoolError> {
    let choices = choices(experts);
    let mut pass = pool.begin_layer(layer, experts, &Routing { in_order: true, ..routing(&choices) })?;
    let mut yielded = Vec::new();
    while let Some(guard) = pass.next()? {
        assert!(is_content(guard.bytes(), layer, guard.expert()));
        yielded.push(guard.expert());
    }
    assert_eq!(pass.remaining(), 0);
    Ok(yielded)
}

fn passes() -> impl Strategy<Value = Vec<(u32, BTreeSet<u32>)>> {
    let experts = proptest::collection::btree_set(0..EXPERTS, 0..=EXPERTS as usize);
    proptest::collection::vec((1..=LAYERS, experts), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_pool_agrees_with_its_model(
        passes in passes(),
        slots in 1usize..16,
        seed in any::<u64>(),
        short in prop_oneof![Just(0u32), Just(200)],
    ) {
        let drive = SimDrive::new(vec![model().0]);
        drive.set_short_reads(short);
        let mut pool = pool(&drive, slots, seed);
        let mut requests = 0;
        for (layer, experts) in passes {
            let wanted: Vec<u32> = experts.iter().copied().collect();
            let is_resident = |expert: &u32| pool.is_resident(ExpertKey { layer, expert: *expert });
            let resident: BTreeSet<u32> = wanted.iter().copied().filter(is_resident).collect();
            let before = pool.stats();
            let yielded = run_pass(&mut pool, layer, &wanted).expect("no faults");
            let after = pool.stats();

            // Resident ones first, each expert once.
            prop_assert!(yielded[..resident.len()].iter().all(|id| resident.contains(id)));
            prop_assert_eq!(yielded.len(), wanted.len());
            prop_assert_eq!(yielded.iter().copied().collect::<BTreeSet<_>>(), experts);
            prop_assert_eq!(after.hits - before.hits, resident.len() as u64);
            let misses = after.misses - before.misses;
            prop_assert_eq!(misses, (wanted.len() - resident.len()) as u64);
            requests += wanted.len() as u64;
            prop_assert_eq!(after.hits + after.misses, requests);
            prop_assert!(pool.resident_count() <= slots);
            prop_assert_eq!(after.misses - after.evictions, pool.resident_count() as u64);
            prop_assert_eq!(pool.residents().filter(|&key| pool.is_resident(key)).count(), pool.resident_count());
            // As much as fits stays, if all reads can begin at once.
            let packed = wanted.iter().filter(|&&expert| matches!(expert % 4, 1 | 2)).count();
            if wanted.len() <= slots && packed <= STAGING {
                for expert in wanted {
                    let key = ExpertKey { layer, expert };
                    prop_assert!(pool.is_resident(key), "{:?}", key);
                }
            }
        }
        prop_assert_eq!(pool.io.stats().extents, pool.stats().misses);
    }

    /// Whatever is in memory, being prefetched, or damaged the first time, experts come in ascending order, and each
    /// once.
    #[test]
    fn a_pass_in_order_yields_experts_in_ascending_order(
        passes in passes(),
        slots in 1usize..16,
        seed in any::<u64>(),
        (bad_layer, bad_expert) in (1..=LAYERS, 0..EXPERTS),
    ) {
        let (file, layers) = model();
        let drive = SimDrive::new(vec![file]);
        let location = &layers[bad_layer as usize][bad_expert as usize];
        let range = location.offset..location.offset + location.len;
        drive.add_fault(Fault { kind: FaultKind::Flip, file: 0, range, times: 1 });
        let mut pool = pool(&drive, slots, seed);
        for (i, (layer, experts)) in passes.into_iter().enumerate() {
            let wanted: Vec<u32> = experts.into_iter().collect();
            // Some passes in any order, which leave other experts behind, and some prefetches.
            if i % 3 == 0 {
                run_pass(&mut pool, layer, &wanted).expect("damaged once only");
                pool.prefetch(layer, &[0, 5]);
                continue;
            }
            let before = pool.stats();
            let yielded = run_in_order(&mut pool, layer, &wanted).expect("damaged once only");
            let after = pool.stats();
            prop_assert_eq!(yielded, &wanted[..]);
            prop_assert_eq!(after.hits + after.misses - before.hits - before.misses, wanted.len() as u64);
        }
    }

    #[test]
    fn faults_end_passes_not_pools(
        passes in passes(),
        slots in 1usize..8,
        seed in any::<u64>(),
        bad in (1..=LAYERS, 0..EXPERTS),
    ) {
        let (file, layers) = model();
        let drive = SimDrive::new(vec![file]);
        let location = &layers[bad.0 as usize][bad.1 as usize];
        let range = location.offset..location.offset + location.len;
        drive.add_fault(Fault { kind: FaultKind::Flip, file: 0, range, times: u32::MAX });
        let mut pool = pool(&drive, slots, seed);
        for (layer, experts) in passes {
            let wanted: Vec<u32> = experts.iter().copied().collect();
            let result = run_pass(&mut pool, layer, &wanted);
            let hit = layer == bad.0 && experts.contains(&bad.1);
            prop_assert_eq!(result.is_err(), hit);
            if let Err(error) = result {
                let name = format!("layer {layer} expert {}", bad.1);
                prop_assert!(error.to_string().contains(&name), "{}", error);
            }
            prop_assert!(pool.pass.pending.is_empty() && pool.resident_count() <= slots);
            let pinned = pool.slots.iter().any(|content| {
                matches!(content, Content::Resident { pins: 1.., .. })
            });
            prop_assert!(!pinned);
        }
        drive.heal();
        let all: Vec<u32> = (0..EXPERTS).collect();
        prop_assert_eq!(run_pass(&mut pool, bad.0, &all).expect("healed").len(), all.len());
    }
}

#[test]
fn what_is_compressed_must_become_what_the_table_says() {
    let (file, mut layers) = model();
    let bad = |change: &mut dyn FnMut(&mut Packed)| {
        let location = &mut layers[1][2];
        let right = location.clone();
        change(location.packed.as_mut().expect("this one is compressed"));
        let drive = SimDrive::new(vec![file.clone()]);
        let io = Arc::new(Scheduler::start(Box::new(drive.engine(4, 0)), config()).expect("a thread"));
        let directory = ExpertDirectory::new(&layers).expect("valid");
        layers[1][2] = right;
        let arena = Arena::uniform(directory.slot_bytes(), 4, "test").expect("memory");
        let staging = Pool::reserve_staging(&directory, 2).expect("memory");
        let policy = PolicyKind::Lru.build(directory.shape()).expect("online");
        let mut pool = Pool::new(io, arena, staging, directory, policy);
        for in_order in [false, true] {
            let run = if in_order { run_in_order } else { run_pass };
            let error = run(&mut pool, 1, &[0, 1, 2, 5]).expect_err("it is not what the table says").to_string();
            assert!(error.contains("layer 1 expert 2") && error.contains("cannot be decompressed"), "{error}");
            // Everything is as before: staging slots too.
            assert_eq!((pool.staging.len(), pool.pass.pending.len(), pool.pass.todo.len()), (2, 0, 0));
            assert_eq!(run(&mut pool, 1, &[0, 1, 5, 6]).expect("the others are right").len(), 4);
        }
    };
    let mut bad = bad;
    bad(&mut |packed| packed.checksum ^= 1);
    bad(&mut |packed| packed.logical_len -= 64);
}

#[test]
fn a_pass_can_be_left_at_any_point() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = pool(&drive, 5, 7);
    let all: Vec<u32> = (0..EXPERTS).collect();
    for layer in 1..=LAYERS {
        for stop_after in 0..EXPERTS {
            let chosen = choices(&all);
            let mut pass = pool.begin_layer(layer, &all, &routing(&chosen)).expect("begun");
            for _ in 0..stop_after {
                assert!(pass.next().expect("no faults").is_some());
            }
            drop(pass);
            assert!(pool.pass.pending.is_empty());
        }
    }
    assert_eq!(run_pass(&mut pool, 1, &all).expect("no faults").len(), all.len());
}

#[test]
fn missing_experts_are_all_submitted_at_once_and_the_caller_is_not_blocked() {
    let drive = SimDrive::new(vec![model().0]);
    drive.hold();
    let mut pool = pool(&drive, 6, 1);
    let chosen = choices(&[0, 3, 5, 11]);
    let mut pass = pool.begin_layer(2, &[0, 3, 5, 11], &routing(&chosen)).expect("begun");
    assert_eq!(pass.remaining(), 4);
    assert_eq!(pass.pool.pass.pending.len(), 4);
    drive.release();
    let mut count = 0;
    while pass.next().expect("no faults").is_some() {
        count += 1;
    }
    assert_eq!(count, 4);
    assert!(pass.next().expect("no faults").is_none());
}

#[test]
fn dropping_a_pool_with_reads_in_flight_is_safe() {
    for seed in 0..10 {
        let drive = SimDrive::new(vec![model().0]);
        drive.hold();
        let mut pool = pool(&drive, 4, seed);
        let chosen = choices(&[0, 1, 2, 3, 4, 5]);
        let pass = pool.begin_layer(1, &[0, 1, 2, 3, 4, 5], &routing(&chosen)).expect("begun");
        // Leaked, so that the pool itself has to cope.
        std::mem::forget(pass);
        drive.release();
        drop(pool);
    }
}

#[test]
fn a_leaked_pass_is_cleaned_up_by_the_next() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = pool(&drive, 2, 3);
    run_pass(&mut pool, 1, &[0, 1]).expect("no faults");
    for _ in 0..3 {
        let chosen = choices(&[0, 1, 2, 3]);
        let pass = pool.begin_layer(1, &[0, 1, 2, 3], &routing(&chosen)).expect("begun");
        std::mem::forget(pass);
    }
    let all: Vec<u32> = (0..EXPERTS).collect();
    assert_eq!(run_pass(&mut pool, 3, &all).expect("no faults").len(), all.len());
}

#[test]
fn a_directory_beyond_the_file_is_an_error_of_the_expert() {
    let drive = SimDrive::new(vec![model().0[..64 * PAGE_BYTES].to_vec()]);
    let mut pool = pool(&drive, 3, 3);
    let all: Vec<u32> = (0..EXPERTS).collect();
    let error = run_pass(&mut pool, LAYERS, &all).expect_err("beyond the end");
    assert!(matches!(error, PoolError::Read(ReadError::Request { .. })), "{error}");
    assert!(error.to_string().contains("layer 4 expert"), "{error}");
    assert_eq!(run_pass(&mut pool, 1, &[0, 1]).expect("still there").len(), 2);
}

#[test]
fn storage_opens_loads_and_serves() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.sluice");
    let (file, layers) = model();
    std::fs::write(&path, &file).expect("written");
    let dense: Vec<DenseLocation> = layers[1]
        .iter()
        .cloned()
        .map(|extent| DenseLocation { extent, name: ExtentName::dense("norms", Some(1)) })
        .collect();
    let open = |expert_slots| {
        let experts = ExpertDirectory::new(&layers).expect("valid");
        let expert_slots = experts.uniform_slots(expert_slots);
        let policy = PolicyKind::Lru.build(experts.shape()).expect("online");
        let paths = [path.clone()];
        let (tuning, direct) = (vec![Tuning::default()], DirectMode::default());
        let pinned = dense.iter().enumerate().map(|(i, _)| i % 2 == 0).collect();
        let config = StorageConfig {
            expert_slots,
            staging_slots: 2,
            pinned,
            tables: Vec::new(),
            sectors: 0,
            tuning,
            direct,
            #[cfg(feature = "sim")]
            simulated: None,
            #[cfg(feature = "sim")]
            simulated_packed: None,
        };
        Storage::open(&paths, &dense, experts, policy, &config)
    };
    for slots in [0, 1, 2, 1 << 20] {
        let storage = open(slots);
        assert_eq!(storage.is_ok(), slots > 0, "{slots} slots");
        let mut storage = match storage {
            Ok(storage) => storage,
            Err(error) => {
                assert!(matches!(error, PoolError::NoRoom), "{error}");
                continue;
            }
        };
        // In order, again and again, and then out of order: streamed or not, the bytes are the extent's.
        let handles = (0..dense.len()).cycle().take(3 * dense.len()).chain((0..dense.len()).rev());
        for handle in handles {
            let guard = storage.dense.dense(DenseHandle(handle as u32)).expect("readable");
            assert!(is_content(guard.bytes(), 1, handle as u32));
        }
        assert!(storage.pool.slot_count() <= (LAYERS * EXPERTS) as usize);
        for layer in 1..=LAYERS {
            assert_eq!(run_pass(&mut storage.pool, layer, &[0, 5, 9]).expect("read").len(), 3);
        }
        println!("{}; {}", storage.io.engine().note, storage.direct[0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is prefetched, and however much of it is right, every pass gets every expert, with the right bytes.
    #[test]
    fn prefetches_never_change_what_a_pass_gets(
        passes in passes(),
        prefetches in proptest::collection::vec((1..=LAYERS, proptest::collection::vec(0..EXPERTS, 0..8)), 40),
        slots in 32usize..48,
        seed in any::<u64>(),
        short in prop_oneof![Just(0u32), Just(200)],
    ) {
        let drive = SimDrive::new(vec![model().0]);
        drive.set_short_reads(short);
        let mut pool = pool(&drive, slots, seed);
        for ((layer, experts), (prefetched_layer, prefetched)) in passes.into_iter().zip(prefetches) {
            let wanted: Vec<u32> = experts.iter().copied().collect();
            let chosen = choices(&wanted);
            let mut pass = pool.begin_layer(layer, &wanted, &routing(&chosen)).expect("begun");
            pass.prefetch(prefetched_layer, &prefetched);
            let mut yielded = BTreeSet::new();
            while let Some(guard) = pass.next().expect("no faults") {
                prop_assert!(is_content(guard.bytes(), layer, guard.expert()));
                yielded.insert(guard.expert());
            }
            drop(pass);
            prop_assert_eq!(yielded, experts);
            let stats = pool.stats();
            prop_assert!(stats.prefetched_used + stats.prefetched_wasted <= stats.prefetched);
        }
    }
}

/// Runs a pass in parts of at least `least` bytes, wanting `step` more each time.
fn run_in_parts(pool: &mut Pool, layer: u32, experts: &[u32], least: usize, step: usize) -> Result<(), TestCaseError> {
    let chosen = choices(experts);
    let mut pass = pool.begin_layer(layer, experts, &routing(&chosen)).expect("begun");
    let mut seen: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut begun: Option<(u32, usize)> = None;
    let mut whole = BTreeSet::new();
    while let Some(arrival) = pass.arrival(Some(least)).expect("the fault does not last") {
        match arrival {
            Arrival::Part(part) => {
                let (id, prefix) = (part.expert(), part.bytes().to_vec());
                prop_assert!(!whole.contains(&id), "a part of an expert that has come");
                prop_assert!(prefix.len() >= least && prefix.len() <= part.len());
                if let Some((expert, wanted)) = begun {
                    prop_assert_eq!(id, expert, "another one had been begun");
                    prop_assert!(prefix.len() >= wanted);
                }
                let more = (prefix.len() < 3 * PAGE_BYTES).then_some(prefix.len() + step);
                begun = more.map(|bytes| (id, bytes));
                part.more_at(more);
                seen.insert(id, prefix);
            }
            Arrival::Unsettled(expert) => {
                let id = expert.expert();
                begun = begun.filter(|begun| begun.0 != id);
                let seen = seen.remove(&id).unwrap_or_default();
                prop_assert!(expert.bytes().starts_with(&seen), "other bytes than the part's");
                let right = is_content(expert.bytes(), layer, id);
                let sum = xxh3_64(expert.bytes());
                match expert.settle(sum) {
                    Ok(expert) => prop_assert!(right && expert.expert() == id),
                    Err(damaged) => prop_assert_eq!((right, damaged), (false, Damaged { expert: id })),
                }
                prop_assert!(!right || whole.insert(id), "an expert came twice");
            }
            Arrival::Settled(expert) => {
                let id = expert.expert();
                begun = begun.filter(|begun| begun.0 != id);
                seen.remove(&id);
                prop_assert!(is_content(expert.bytes(), layer, id));
                prop_assert!(whole.insert(id), "an expert came twice");
            }
        }
    }
    prop_assert_eq!(whole, experts.iter().copied().collect::<BTreeSet<_>>());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Experts are handed out before they are verified: a bit that was wrong once must not be taken for right.
    #[test]
    fn parts_are_what_the_whole_is_and_damage_is_read_again(
        passes in passes(),
        slots in 2usize..16,
        seed in any::<u64>(),
        short in prop_oneof![Just(0u32), Just(200)],
        bad in (1..=LAYERS, 0..EXPERTS),
        (least, step) in (1usize..4, 1usize..3),
    ) {
        let (file, layers) = model();
        let drive = SimDrive::new(vec![file]);
        drive.set_short_reads(short);
        let location = &layers[bad.0 as usize][bad.1 as usize];
        let range = location.offset..location.offset + location.len;
        drive.add_fault(Fault { kind: FaultKind::Flip, file: 0, range, times: 1 });
        let mut pool = pool(&drive, slots, seed);
        for (layer, experts) in passes {
            let wanted: Vec<u32> = experts.into_iter().collect();
            run_in_parts(&mut pool, layer, &wanted, least * PAGE_BYTES, step * PAGE_BYTES)?;
        }
    }
}

#[test]
fn a_part_comes_while_the_rest_is_being_read() {
    let drive = SimDrive::new(vec![model().0]);
    // One chunk at a time, so that they come in order, and only the first until the part has been seen.
    let mut pool = pool_with(IoConfig { depth: 1, prefetch_depth: 1, ..config() }, &drive, 4, 0);
    drive.let_through(1);
    let chosen = choices(&[3]);
    let mut pass = pool.begin_layer(1, &[3], &routing(&chosen)).expect("begun");
    let Ok(Some(Arrival::Part(part))) = pass.arrival(Some(PAGE_BYTES)) else { panic!("no part before the whole") };
    assert_eq!((part.expert(), part.len()), (3, 5 * PAGE_BYTES));
    assert_eq!(part.bytes(), [content(1, 3); 2 * PAGE_BYTES]);
    part.more_at(None);
    drive.release();
    let Ok(Some(Arrival::Unsettled(expert))) = pass.arrival(Some(PAGE_BYTES)) else { panic!("the whole comes once") };
    assert_eq!(expert.bytes(), [content(1, 3); 5 * PAGE_BYTES]);
    let sum = xxh3_64(expert.bytes());
    assert_eq!(expert.settle(sum).expect("right").expert(), 3);
    assert!(pass.arrival(Some(PAGE_BYTES)).expect("no faults").is_none());
}

#[test]
fn what_is_in_memory_and_verified_can_be_looked_at_before_it_is_handed_out() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = pool(&drive, 40, 1);
    run_pass(&mut pool, 1, &[2, 5, 7]).expect("a pass");
    let choices = choices(&[2, 3, 7]);
    let mut pass = pool.begin_layer(1, &[2, 3, 7], &routing(&choices)).expect("a pass");
    let seen: Vec<u32> = pass
        .in_memory()
        .map(|(expert, bytes)| {
            assert!(is_content(bytes, 1, expert));
            expert
        })
        .collect();
    assert_eq!(seen, [2, 7], "not what is being read");
    for expert in seen {
        assert_eq!(pass.next().expect("no error").expect("an expert").expert(), expert);
    }
    assert_eq!(pass.in_memory().count(), 0);
    drop(pass);
    assert!(!pool.has_all(1));
    run_pass(&mut pool, 1, &(0..EXPERTS).collect::<Vec<_>>()).expect("a pass");
    assert!(pool.has_all(1) && !pool.has_all(2));
}

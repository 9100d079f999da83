//! Experts of several sizes: slots of several sizes.

use super::*;

const MIXED_LAYERS: u32 = 5;
/// Pages of an expert of each layer, and experts: three sizes, layers of which do not stand together.
const PAGES: [usize; MIXED_LAYERS as usize] = [3, 2, 3, 7, 2];
const MIXED_EXPERTS: u32 = 40;

fn content(layer: u32, expert: u32) -> u8 {
    (layer * MIXED_EXPERTS + expert) as u8
}

/// A file whose experts are as large as their layer says.
fn mixed() -> (Vec<u8>, Vec<Vec<ExtentLocation>>) {
    let mut file = Vec::new();
    let layers = (0..MIXED_LAYERS).map(|layer| {
        let expert = |expert| {
            let bytes = vec![content(layer, expert); PAGES[layer as usize] * PAGE_BYTES];
            let (offset, len) = (file.len() as u64, bytes.len() as u64);
            file.extend_from_slice(&bytes);
            ExtentLocation { file: 0, offset, len, checksum: xxh3_64(&bytes), packed: None, stripes: None }
        };
        (0..MIXED_EXPERTS).map(expert).collect()
    });
    let layers = layers.collect();
    (file, layers)
}

fn layer_sizes() -> impl Iterator<Item = LayerSize> {
    PAGES.iter().map(|&pages| LayerSize { len: (pages * PAGE_BYTES) as u64, experts: MIXED_EXPERTS as usize, top_k: 4 })
}

fn mixed_pool(drive: &SimDrive, plan: &SlotPlan, kind: PolicyKind, seed: u64) -> Pool {
    let engine = Box::new(drive.engine(config().depth, seed));
    let io = Arc::new(Scheduler::start(engine, config()).expect("a thread"));
    let directory = ExpertDirectory::new(&mixed().1).expect("valid");
    let arena = Pool::reserve(&directory, plan).expect("addresses");
    let staging = Pool::reserve_staging(&directory, 0).expect("addresses");
    let policy = kind.build(directory.shape()).expect("online");
    Pool::new(io, arena, staging, directory, policy)
}

/// Bytes of the slots with memory, or with a read that takes some; that is all that a pool of experts takes.
fn bytes_taken(pool: &Pool) -> u64 {
    let taken = pool.slots.iter().map(|content| match content {
        Content::Empty(slot) if slot.is_absent() => 0,
        Content::Empty(slot) | Content::Resident { slot, .. } => slot.capacity() as u64,
        // Its slot is with the I/O thread.
        Content::Loading { expert, .. } => pool.classes[usize::from(pool.class_of(*expert))].bytes as u64,
        Content::Lost => panic!("memory is lost"),
    });
    taken.sum()
}

fn check(pool: &Pool, plan: &SlotPlan) {
    assert!(bytes_taken(pool) <= plan.bytes());
    for content in &pool.slots {
        if let Content::Resident { expert, slot, pins, .. } = content {
            assert_eq!(*pins, 0);
            let class = usize::from(pool.class_of(*expert));
            assert_eq!(slot.capacity(), pool.classes[class].bytes, "an expert in a slot of another size");
        }
    }
}

/// Runs a pass, with prefetches for another layer before each expert.
fn run(pool: &mut Pool, layer: u32, experts: &[u32], in_order: bool, ahead: (u32, &[u32])) {
    let choices = choices(experts);
    let mut pass = pool.begin_layer(layer, experts, &Routing { in_order, ..routing(&choices) }).expect("no faults");
    let mut yielded = Vec::new();
    pass.prefetch(ahead.0, ahead.1);
    loop {
        {
            let Some(guard) = pass.next().expect("no faults") else { break };
            let (expert, bytes) = (guard.expert(), guard.bytes());
            assert_eq!(bytes.len(), PAGES[layer as usize] * PAGE_BYTES);
            assert!(bytes.iter().all(|&byte| byte == content(layer, expert)));
            yielded.push(expert);
        }
        pass.prefetch(ahead.0, ahead.1);
    }
    assert!(!in_order || yielded.is_sorted());
    yielded.sort_unstable();
    assert_eq!(yielded, experts);
}

#[derive(Clone, Debug)]
enum Step {
    Pass(u32, BTreeSet<u32>, bool, (u32, Vec<u32>)),
    /// Shrinks to a part of the bytes, or grows back.
    Resize(f64),
    Warm,
}

fn step() -> impl Strategy<Value = Step> {
    let experts = || proptest::collection::btree_set(0..MIXED_EXPERTS, 0..=MIXED_EXPERTS as usize);
    let ahead = (0..MIXED_LAYERS, experts().prop_map(|experts| experts.into_iter().collect()));
    let pass = (0..MIXED_LAYERS, experts(), any::<bool>(), ahead);
    prop_oneof![
        8 => pass.prop_map(|(layer, experts, in_order, ahead)| Step::Pass(layer, experts, in_order, ahead)),
        1 => (0.0..1.0).prop_map(Step::Resize),
        1 => Just(Step::Warm),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every pass gets its experts with their bytes, and the pool stays within its bytes, whatever is read, prefetched, warmed and given
    /// back in between.
    #[test]
    fn slots_of_several_sizes_hold_every_pass_and_never_more_than_the_budget(
        steps in proptest::collection::vec(step(), 1..30),
        pages in 1u64..700,
        kind in 0usize..3,
        seed in any::<u64>(),
    ) {
        let plan = SlotPlan::new(layer_sizes(), pages.max(7) * PAGE_BYTES as u64);
        prop_assert!(plan.bytes() <= pages.max(7) * PAGE_BYTES as u64);
        let drive = SimDrive::new(vec![mixed().0]);
        let mut pool = mixed_pool(&drive, &plan, PolicyKind::ONLINE[kind], seed);
        let mut now = plan.clone();
        for step in steps {
            match step {
                Step::Pass(layer, experts, in_order, (next, ahead)) => {
                    let experts: Vec<u32> = experts.into_iter().collect();
                    run(&mut pool, layer, &experts, in_order, (next, &ahead));
                }
                Step::Resize(part) => {
                    let least = plan.least_bytes();
                    now = plan.within(least + ((plan.bytes() - least) as f64 * part) as u64, LEAST_SLOTS).expect("at least the least");
                    pool.resize(&now.counts());
                    prop_assert!(pool.slot_counts().eq(now.counts()));
                }
                Step::Warm => while pool.warm() {
                    std::thread::yield_now();
                },
            }
            check(&pool, &now);
        }
    }
}

#[test]
fn all_experts_are_in_memory_when_there_is_room_for_exactly_their_bytes() {
    let bytes: u64 = layer_sizes().map(|layer| layer.len * layer.experts as u64).sum();
    let plan = SlotPlan::new(layer_sizes(), bytes);
    assert_eq!((plan.bytes(), plan.slots()), (bytes, PAGES.len() * MIXED_EXPERTS as usize));
    let drive = SimDrive::new(vec![mixed().0]);
    let mut pool = mixed_pool(&drive, &plan, PolicyKind::default(), 1);
    let all: Vec<u32> = (0..MIXED_EXPERTS).collect();
    for _ in 0..2 {
        (0..MIXED_LAYERS).for_each(|layer| run(&mut pool, layer, &all, false, (0, &[])));
    }
    assert_eq!(pool.stats().misses, u64::from(MIXED_LAYERS * MIXED_EXPERTS));
    assert_eq!((bytes_taken(&pool), pool.stats().evictions), (bytes, 0));
}

/// With slots of the largest size, the same memory would hold 64 of the 200 experts.
#[test]
fn the_budget_is_filled_to_95_percent() {
    let bytes = 450 * PAGE_BYTES as u64;
    let plan = SlotPlan::new(layer_sizes(), bytes);
    let directory = ExpertDirectory::new(&mixed().1).expect("valid");
    let drive = SimDrive::new(vec![mixed().0]);
    let mut pool = mixed_pool(&drive, &plan, PolicyKind::default(), 1);
    let all: Vec<u32> = (0..MIXED_EXPERTS).collect();
    (0..MIXED_LAYERS).for_each(|layer| run(&mut pool, layer, &all, false, (0, &[])));
    let held: u64 = pool.residents().map(|key| directory.location(directory.index(key)).memory_len()).sum();
    assert!(held <= bytes && held * 100 >= bytes * 95, "{held} of {bytes} bytes");
    assert!(pool.resident_count() >= 115, "{} experts", pool.resident_count());
}

#[test]
fn memory_that_the_system_does_not_have_is_counted_in_bytes() {
    let plan = SlotPlan::new(layer_sizes(), u64::MAX);
    let drive = SimDrive::new(vec![mixed().0]);
    let mut pool = mixed_pool(&drive, &plan, PolicyKind::Lru, 1);
    let all: Vec<u32> = (0..MIXED_EXPERTS).collect();
    let limit = 100 * PAGE_BYTES as u64;
    pool.limit_new_memory(limit);
    for layer in 0..MIXED_LAYERS {
        run(&mut pool, layer, &all, false, (0, &[]));
    }
    // Each size may take a slot beyond the limit, because a pass needs one.
    let beyond = PAGES.iter().max().map_or(0, |&pages| (2 * pages * PAGE_BYTES) as u64);
    assert!((limit - 7 * PAGE_BYTES as u64..=limit + beyond).contains(&bytes_taken(&pool)), "{}", bytes_taken(&pool));
}

//! Reading the experts of the next layer while a prompt computes with those of this one.

use super::*;

/// A pass over a layer that says which one follows.
fn run_then(pool: &mut Pool, layer: u32, experts: &[u32], next: Option<u32>, in_order: bool) {
    let choices = choices(experts);
    let mut pass = pool.begin_layer(layer, experts, &Routing { in_order, ..routing(&choices) }).expect("begun");
    next.into_iter().for_each(|next| pass.then_read(next));
    let mut yielded = Vec::new();
    while let Some(guard) = pass.next().expect("no faults") {
        assert!(is_content(guard.bytes(), layer, guard.expert()));
        yielded.push(guard.expert());
    }
    drop(pass);
    yielded.sort_unstable();
    assert_eq!(yielded, experts);
}

fn following(layer: u32) -> u32 {
    layer % LAYERS + 1
}

#[test]
fn what_is_read_ahead_is_used_by_the_next_layer() {
    let all: Vec<u32> = (0..EXPERTS).collect();
    for (seed, slots) in [(0, 32), (1, 36), (2, 47), (3, 48)] {
        let drive = SimDrive::new(vec![model().0]);
        let mut pool = pool(&drive, slots, seed);
        for layer in (1..=LAYERS).cycle().take(3 * LAYERS as usize) {
            run_then(&mut pool, layer, &all, Some(following(layer)), seed % 2 == 1);
            pool.read_ahead(following(layer));
            // Few slots, and staging slots, bound how many; those that are on their way are for this layer and no other.
            let open = pool.prefetches.open.clone();
            for number in open {
                let Content::Loading { expert, .. } = &pool.slots[number as usize] else { panic!("not being read") };
                assert_eq!(pool.directory.key(*expert).layer, following(layer));
            }
        }
        let stats = pool.stats();
        assert!(stats.prefetched > 0, "{slots} slots");
        // Those of the layer whose turn would come next are still open.
        let open = pool.prefetches.open.len() as u64;
        assert_eq!((stats.prefetched_used, stats.prefetched_wasted), (stats.prefetched - open, 0), "{slots} slots");
    }
}

#[test]
fn no_expert_of_the_next_layer_gives_its_slot_to_another() {
    let drive = SimDrive::new(vec![model().0]);
    let all: Vec<u32> = (0..EXPERTS).collect();
    let mut pool = pool(&drive, 40, 1);
    for layer in (1..=LAYERS).cycle().take(2 * LAYERS as usize) {
        run_then(&mut pool, layer, &all, None, false);
        let there = |pool: &Pool| (0..EXPERTS).filter(|&expert| pool.has(following(layer), expert)).collect::<Vec<_>>();
        let before = there(&pool);
        pool.read_ahead(following(layer));
        let after = there(&pool);
        assert!(before.iter().all(|expert| after.contains(expert)), "{before:?} {after:?}");
    }
}

#[test]
fn a_prompt_that_uses_few_experts_reads_none_ahead() {
    let most = EXPERTS * 3 / 4;
    for (used, reads) in [(EXPERTS, true), (most - 1, false), (most, true), (1, false)] {
        let drive = SimDrive::new(vec![model().0]);
        let mut pool = pool(&drive, 40, 0);
        let experts: Vec<u32> = (0..used).collect();
        run_then(&mut pool, 1, &experts, Some(2), false);
        pool.read_ahead(2);
        assert_eq!(pool.stats().prefetched > 0, reads, "{used} of {EXPERTS}");
        // A layer that uses most of them changes that again.
        run_then(&mut pool, 2, &(0..EXPERTS).collect::<Vec<_>>(), Some(3), false);
        let before = pool.stats().prefetched;
        run_then(&mut pool, 3, &experts, None, false);
        pool.read_ahead(1);
        assert_eq!(pool.stats().prefetched > before, used < EXPERTS, "{used} of {EXPERTS}: what layer 1 lacks");
    }
}

#[test]
fn reading_ahead_can_be_given_up() {
    let drive = SimDrive::new(vec![model().0]);
    let mut pool = pool(&drive, 40, 0);
    pool.read_ahead(1);
    assert!(!pool.prefetches.open.is_empty());
    pool.stop_reading_ahead();
    let all: Vec<u32> = (0..EXPERTS).collect();
    for layer in [2, 1, 3] {
        run_then(&mut pool, layer, &all, None, false);
    }
    assert_eq!(pool.prefetching(), 0);
    let stats = pool.stats();
    assert_eq!(stats.prefetched, stats.prefetched_used + stats.prefetched_wasted);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever layer follows and whatever it uses, each pass gets its experts with their bytes.
    #[test]
    fn reading_ahead_never_changes_what_a_pass_gets(
        passes in passes(),
        next in proptest::collection::vec(proptest::option::of(1..=LAYERS), 40),
        in_order in any::<bool>(),
        slots in 2usize..48,
        seed in any::<u64>(),
    ) {
        let drive = SimDrive::new(vec![model().0]);
        let mut pool = pool(&drive, slots, seed);
        for ((layer, experts), next) in passes.into_iter().zip(next) {
            let experts: Vec<u32> = experts.into_iter().collect();
            run_then(&mut pool, layer, &experts, next, in_order);
            prop_assert!(pool.prefetches.held.is_empty());
        }
    }
}

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SHAPE: Shape = Shape { layers: 3, experts: 8 };

fn choices(experts: &[u32]) -> Vec<Choice> {
    experts.iter().map(|&expert| Choice { expert, weight: 0.5 }).collect()
}

/// Passes `tokens` tokens through a layer.
fn pass(policy: &mut dyn Policy, layer: u32, tokens: u32, experts: &[u32]) {
    policy.begin_pass(&Pass { layer, tokens, prefill: tokens > 1, choices: &choices(experts) });
}

/// Two different experts of eight.
fn pair() -> impl Strategy<Value = [u32; 2]> {
    (0u32..8, 1u32..8).prop_map(|(a, b)| [a, (a + b) % 8])
}

#[test]
fn names_round_trip() {
    for kind in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::NextUse, PolicyKind::Belady] {
        assert_eq!(kind.name().parse(), Ok(kind));
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        assert_eq!(kind.build(SHAPE).is_some(), PolicyKind::ONLINE.contains(&kind));
    }
    assert_eq!(
        "mru".parse::<PolicyKind>().unwrap_err().to_string(),
        "there is no policy `mru`: choose lru, lfu, next-use or belady"
    );
    assert_eq!(PolicyKind::default(), PolicyKind::NextUse);
}

#[test]
fn lru_evicts_the_oldest_use() {
    let mut lru = Lru::new(SHAPE);
    assert_eq!(lru.victim(), None);
    (0..4).for_each(|k| lru.insert(Key(k)));
    lru.hit(Key(0));
    assert_eq!(lru.victim(), Some(Key(1)));
    lru.pin(Key(1));
    assert_eq!(lru.victim(), Some(Key(2)));
    lru.evict(Key(2));
    lru.unpin(Key(1));
    assert_eq!(lru.victim(), Some(Key(3)), "the end of a pin is a use");
}

#[test]
fn lfu_evicts_the_rarest_and_remembers_the_evicted() {
    let mut lfu = Lfu::new(SHAPE);
    pass(&mut lfu, 0, 1, &[0, 1]);
    lfu.insert(Key(0));
    lfu.insert(Key(1));
    pass(&mut lfu, 0, 1, &[0, 2]);
    lfu.hit(Key(0));
    assert_eq!(lfu.victim(), Some(Key(1)));
    lfu.evict(Key(1));
    lfu.insert(Key(2));
    pass(&mut lfu, 0, 1, &[1]);
    lfu.insert(Key(1));
    assert_eq!(lfu.victim(), Some(Key(2)), "key 1 was used twice, once before it left");
}

#[test]
fn next_use_prefers_frequent_recent_and_near() {
    let mut policy = NextUse::new(SHAPE);
    for _ in 0..20 {
        for layer in 0..3 {
            pass(&mut policy, layer, 1, &[0, 1]);
        }
    }
    pass(&mut policy, 0, 1, &[0, 2]);
    (0..3).for_each(|k| policy.insert(Key(k)));
    assert_eq!(policy.victim(), Some(Key(2)), "used once, though last");
    // The same history in each layer: the expert of the layer that comes last is evicted first.
    let mut policy = NextUse::new(SHAPE);
    for layer in [0, 1, 2, 0, 1, 2] {
        pass(&mut policy, layer, 1, &[3, 4]);
    }
    (0..3).for_each(|layer| policy.insert(SHAPE.key(layer, 3)));
    assert_eq!(policy.victim(), Some(SHAPE.key(2, 3)));
}

#[test]
fn a_prompt_counts_like_its_tokens() {
    let (mut one_by_one, mut together) = (NextUse::new(SHAPE), NextUse::new(SHAPE));
    let tokens = [[0, 1], [1, 2], [1, 5], [7, 0]];
    tokens.iter().for_each(|t| pass(&mut one_by_one, 1, 1, t));
    pass(&mut together, 1, 4, tokens.as_flattened());
    let counts = |p: &NextUse| -> Vec<f32> {
        p.export()[12..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    for (a, b) in counts(&one_by_one).iter().zip(counts(&together)) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
}

/// The layer for multi-token prediction stands behind the others, and only some runs open it.
#[test]
fn counts_serve_runs_with_one_layer_more_or_less() {
    let fewer = Shape { layers: 2, experts: 8 };
    let (mut with, mut without) = (NextUse::new(SHAPE), NextUse::new(fewer));
    for (layer, experts) in [(0, [1, 2]), (1, [3, 4]), (2, [5, 6])] {
        pass(&mut with, layer, 1, &experts);
    }
    without.import(&with.export()).unwrap();
    assert_eq!(without.export(), with.export(), "counts of the layer that is not open are kept");
    without.insert(fewer.key(1, 3));
    without.insert(fewer.key(1, 7));
    assert_eq!(without.victim(), Some(fewer.key(1, 7)));
    pass(&mut without, 0, 1, &[7, 0]);
    let mut again = NextUse::new(SHAPE);
    again.import(&without.export()).unwrap();
    assert_eq!(again.export(), without.export());
    let (of_layers, head) = (2 * 8 * 12, 12);
    assert_eq!(again.export()[head + of_layers..], with.export()[head + of_layers..]);
    // What knows nothing of the last layer leaves it as it is.
    let mut fresh = NextUse::new(fewer);
    pass(&mut fresh, 0, 1, &[7, 0]);
    again.import(&fresh.export()).unwrap();
    assert_eq!(again.export()[head + of_layers..], with.export()[head + of_layers..]);
}

#[test]
fn foreign_counts_are_refused() {
    let mut policy = NextUse::new(SHAPE);
    pass(&mut policy, 0, 1, &[1, 2]);
    let good = policy.export();
    let before = format!("{policy:?}");
    let other = NextUse::new(Shape { layers: 8, experts: 3 }).export();
    assert_eq!(policy.import(&other), Err(ImportError::Shape { layers: 8, experts: 3 }));
    let two_more = NextUse::new(Shape { layers: SHAPE.layers + 2, ..SHAPE }).export();
    assert_eq!(policy.import(&two_more), Err(ImportError::Shape { layers: 5, experts: 8 }));
    assert_eq!(policy.import(b""), Err(ImportError::Policy));
    assert_eq!(policy.import(b"SNU\x02aaaaaaaa"), Err(ImportError::Policy));
    for cut in 12..good.len() {
        assert_eq!(policy.import(&good[..cut]), Err(ImportError::Damaged));
    }
    for bad in [f32::NAN, -0.5, 2.0, f32::INFINITY] {
        let mut bytes = good.clone();
        bytes[40..44].copy_from_slice(&bad.to_le_bytes());
        assert_eq!(policy.import(&bytes), Err(ImportError::Damaged), "{bad}");
    }
    assert_eq!(format!("{policy:?}"), before, "a refused import changes nothing");
    assert_eq!(Lru::new(SHAPE).export(), b"");
    assert_eq!(Lru::new(SHAPE).import(b""), Ok(()));
    assert_eq!(Lru::new(SHAPE).import(&good), Err(ImportError::Policy));
}

#[derive(Clone, Debug)]
enum Op {
    Pass(u32, Vec<[u32; 2]>),
    Hit(u32),
    Insert(u32),
    Evict(Option<u32>),
    Pin(u32),
    Unpin(u32),
    Warm,
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0..SHAPE.keys() as u32;
    prop_oneof![
        3 => (0..SHAPE.layers, prop::collection::vec(pair(), 1..4)).prop_map(|(l, c)| Op::Pass(l, c)),
        2 => key.clone().prop_map(Op::Hit),
        4 => key.clone().prop_map(Op::Insert),
        3 => prop::option::weighted(0.3, key.clone()).prop_map(Op::Evict),
        2 => key.clone().prop_map(Op::Pin),
        2 => key.prop_map(Op::Unpin),
        1 => Just(Op::Warm),
    ]
}

/// The formula of [`NextUse`] computed from the whole history.
#[derive(Default)]
struct Oracle {
    /// The tokens of every layer.
    tokens: BTreeMap<u32, Vec<[u32; 2]>>,
    similar: BTreeMap<usize, f64>,
    /// When each layer was passed last, and the R of its experts then.
    passed: BTreeMap<u32, (u64, Vec<f64>)>,
    clock: u64,
}

impl Oracle {
    fn pass(&mut self, layer: u32, experts: [u32; 2]) {
        self.clock += 1;
        let tokens = self.tokens.entry(layer).or_default();
        tokens.push(experts);
        let now = tokens.len() - 1;
        for age in 1..=now.min(255) {
            let same = tokens[now - age].iter().filter(|e| experts.contains(e)).count() as f64 / 2.0;
            let s = self.similar.entry(age).or_insert(0.0);
            *s = 0.85 * *s + 0.15 * same;
        }
        let (mut total, mut expected) = ((20.0f64 * 0.42).exp(), vec![0.0; SHAPE.experts as usize]);
        for age in 2..=now.min(255) {
            for d in 1..=4.min(age - 1) {
                let weight = 0.7f64.powi(d as i32 - 1) * (20.0 * self.similar[&age]).exp();
                total += weight;
                tokens[now - age + d].iter().for_each(|&e| expected[e as usize] += weight);
            }
        }
        expected.iter_mut().for_each(|e| *e /= total);
        self.passed.insert(layer, (self.clock, expected));
    }

    /// Expected next use of a key in passes from the start.
    fn next_use(&self, key: Key) -> f64 {
        let (layer, expert) = SHAPE.expert(key);
        let layers = f64::from(SHAPE.layers);
        let empty = (0, vec![0.0; SHAPE.experts as usize]);
        let (passed, recall) = self.passed.get(&layer).unwrap_or(&empty);
        let rate = |h: f64| -> f64 {
            let keep = (-1.0 / h).exp2();
            let tokens = self.tokens.get(&layer).map_or(&[][..], |t| t);
            tokens.iter().fold(0.0, |r, t| r * keep + if t.contains(&expert) { 1.0 - keep } else { 0.0 })
        };
        let mean = if *passed == 0 { 1.0 } else { 2.0 } / f64::from(SHAPE.experts);
        let p = 0.2 * rate(1.0) + 0.3 * rate(8.0) + 0.1 * rate(64.0) + 0.4 * recall[expert as usize] + mean;
        let next = if *passed == 0 { f64::from(layer) } else { *passed as f64 + layers };
        next + (1.0 / p.min(1.0) - 1.0) * layers
    }
}

proptest! {
    #[test]
    fn victims_are_resident_and_not_pinned(kind in 0usize..3, ops in prop::collection::vec(op(), 1..200)) {
        let mut policy = PolicyKind::ONLINE[kind].build(SHAPE).unwrap();
        // Resident keys, and whether they are pinned.
        let mut resident = BTreeMap::<u32, bool>::new();
        for op in ops {
            match op {
                Op::Pass(layer, tokens) => pass(policy.as_mut(), layer, tokens.len() as u32, tokens.as_flattened()),
                Op::Hit(k) if resident.contains_key(&k) => policy.hit(Key(k)),
                Op::Insert(k) if !resident.contains_key(&k) => {
                    policy.insert(Key(k));
                    resident.insert(k, false);
                }
                Op::Evict(Some(k)) if resident.contains_key(&k) => {
                    policy.evict(Key(k));
                    resident.remove(&k);
                }
                Op::Evict(None) => if let Some(Key(k)) = policy.victim() {
                    policy.evict(Key(k));
                    resident.remove(&k);
                },
                Op::Pin(k) if resident.get(&k) == Some(&false) => {
                    policy.pin(Key(k));
                    resident.insert(k, true);
                }
                Op::Unpin(k) if resident.get(&k) == Some(&true) => {
                    policy.unpin(Key(k));
                    resident.insert(k, false);
                }
                // Calls about absent keys must not make them victims.
                Op::Hit(k) | Op::Pin(k) | Op::Unpin(k) if !resident.contains_key(&k) => {
                    policy.hit(Key(k));
                    policy.pin(Key(k));
                    policy.unpin(Key(k));
                }
                Op::Warm => {
                    let bytes = policy.export();
                    prop_assert_eq!(policy.import(&bytes), Ok(()));
                    prop_assert_eq!(policy.export(), bytes);
                }
                _ => {}
            }
            match policy.victim() {
                Some(victim) => prop_assert_eq!(resident.get(&victim.0), Some(&false)),
                None => prop_assert!(resident.values().all(|&pinned| pinned)),
            }
        }
    }

    #[test]
    fn next_use_finds_what_brute_force_finds(
        tokens in prop::collection::vec([pair(), pair(), pair()], 1..60),
        resident in prop::collection::btree_set(0..SHAPE.keys() as u32, 1..20),
    ) {
        let (mut policy, mut oracle) = (NextUse::new(SHAPE), Oracle::default());
        resident.iter().for_each(|&k| policy.insert(Key(k)));
        for token in tokens {
            for (layer, experts) in token.into_iter().enumerate() {
                pass(&mut policy, layer as u32, 1, &experts);
                oracle.pass(layer as u32, experts);
                let victim = oracle.next_use(policy.victim().unwrap());
                let latest = resident.iter().map(|&k| oracle.next_use(Key(k))).fold(0.0, f64::max);
                prop_assert!(victim >= latest * (1.0 - 1e-3) - 0.1, "{} instead of {}", victim, latest);
            }
        }
    }

    #[test]
    fn counts_warm_the_next_start(tokens in prop::collection::vec([pair(), pair(), pair()], 5..40)) {
        let mut old = NextUse::new(SHAPE);
        for token in &tokens {
            for (layer, experts) in token.iter().enumerate() {
                pass(&mut old, layer as u32, 1, experts);
            }
        }
        let mut new = NextUse::new(SHAPE);
        new.import(&old.export()).unwrap();
        prop_assert_eq!(new.export(), old.export());
        // An expert that was used last is kept before one that was never used.
        let last = tokens.last().unwrap()[1];
        if let Some(never) = (0..8).find(|e| tokens.iter().all(|t| !t[1].contains(e))) {
            new.insert(SHAPE.key(1, last[0]));
            new.insert(SHAPE.key(1, never));
            prop_assert_eq!(new.victim(), Some(SHAPE.key(1, never)));
        }
    }
}

proptest! {
    /// A victim is the one among all keys of its size class, by the order of a policy that has only these.
    #[test]
    fn a_victim_is_of_the_size_class_that_was_asked_for(
        kind in 0usize..3,
        tokens in prop::collection::vec([pair(), pair(), pair()], 1..20),
        resident in prop::collection::btree_set(0..SHAPE.keys() as u32, 1..20),
        classes in [0u8..3, 0u8..3, 0u8..3],
    ) {
        let mut policy = PolicyKind::ONLINE[kind].build(SHAPE).unwrap();
        policy.classify(&classes);
        // For each class a policy in which nothing else is resident.
        let mut alone: Vec<_> = (0..3).map(|_| PolicyKind::ONLINE[kind].build(SHAPE).unwrap()).collect();
        for (layer, experts) in tokens.into_iter().flat_map(|token| (0u32..).zip(token)) {
            pass(policy.as_mut(), layer, 1, &experts);
            alone.iter_mut().for_each(|alone| pass(alone.as_mut(), layer, 1, &experts));
        }
        for &key in &resident {
            policy.insert(Key(key));
            alone[usize::from(classes[SHAPE.expert(Key(key)).0 as usize])].insert(Key(key));
        }
        for (class, alone) in (0u8..).zip(&mut alone).filter(|(class, _)| classes.contains(class)) {
            while let Some(victim) = alone.victim() {
                prop_assert_eq!(policy.victim_in(class), Some(victim));
                policy.evict(victim);
                alone.evict(victim);
            }
            prop_assert_eq!(policy.victim_in(class), None);
        }
    }
}

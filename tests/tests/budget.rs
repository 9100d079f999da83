//! The budget of an opened model shrinks and grows, and an idle model gives its memory back. No bit of any result changes.

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_model::memory::Wish;
use sluice_model::{Engine, EngineOptions, ReadEngineKind, RuntimeError, Yields};
use sluice_storage::pool::PolicyKind;
use sluice_tests::{Converted, argmax};

const TOKENS: usize = 20;

/// What happens between two steps.
#[derive(Clone, Copy, Debug)]
enum Change {
    Nothing,
    /// A budget, as a fraction of the range from the least to the most.
    Budget(f64),
    Rest,
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => Just(Change::Nothing),
        3 => (0.0..=1.0).prop_map(Change::Budget),
        1 => Just(Change::Rest),
    ]
}

fn apply(engine: &mut Engine, change: Change) {
    let plan = engine.memory().clone();
    match change {
        Change::Nothing => {}
        Change::Budget(part) => {
            let bytes = plan.least() + ((plan.most() - plan.least()) as f64 * part) as u64;
            engine.set_budget(bytes).unwrap();
            let now = engine.memory();
            assert!(now.used() <= bytes && now.used() + now.slot_len > bytes.min(plan.most()), "{now:?}");
            assert_eq!((now.least(), now.most(), now.effective), (plan.least(), plan.most(), now.used()));
        }
        Change::Rest => {
            engine.release_idle();
            assert!(engine.is_at_rest());
        }
    }
}

/// Greedy tokens and all their logits, with a change before every step.
fn run(engine: &mut Engine, changes: &[Change]) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut sequence = engine.new_sequence();
    let (mut logits, mut ids, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    let prompt: Vec<u32> = (0..30).map(|i| (i * 7919 + 13) % 128).collect();
    for step in 0..TOKENS {
        apply(engine, changes.get(step).copied().unwrap_or(Change::Nothing));
        match ids.last() {
            None => engine.forward(&mut sequence, &prompt, &mut logits).unwrap(),
            Some(&id) => engine.decode(&mut sequence, id, &mut logits).unwrap(),
        }
        assert!(!engine.is_at_rest());
        ids.push(argmax(&logits));
        rows.push(logits.clone());
    }
    (ids, rows)
}

#[test]
fn budgets_that_change_between_steps_change_no_bit() {
    // Latents with shared and dense parts; keys and values; recurrent states.
    let models = [("demo-model", Some(WeightType::Q4)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)];
    let models: Vec<_> = models.map(|(name, ty)| Converted::new(name, ty)).into();
    let references: Vec<_> = models
        .iter()
        .map(|model| run(&mut model.open(&EngineOptions { context: Some(64), ..EngineOptions::default() }), &[]))
        .collect();
    let changes = proptest::collection::vec(any_change(), TOKENS);
    let engine = prop_oneof![Just(ReadEngineKind::Auto), Just(ReadEngineKind::Pread)];
    let policy = proptest::sample::select(PolicyKind::ONLINE.to_vec());
    let case = (0..models.len(), changes, engine, policy, 0.0..1.0, 1usize..=3);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&case, |(model, changes, engine, policy, budget, threads)| {
        let least = models[model].least_budget();
        let mut engine = models[model].open(&EngineOptions {
            // Below twice the least budget, some dense parts are streamed.
            budget: Some(least + (3.0 * least as f64 * budget) as u64),
            read_engine: Some(engine),
            policy,
            threads: Some(threads),
            context: Some(64),
            forget: true,
            ..EngineOptions::default()
        });
        let (ids, rows) = run(&mut engine, &changes);
        prop_assert_eq!(&ids, &references[model].0);
        prop_assert!(rows == references[model].1, "other logits");
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn less_than_the_least_is_refused_and_more_than_the_most_is_the_most() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = model.open(&EngineOptions { budget: Some(3 * model.least_budget()), ..EngineOptions::default() });
    let plan = engine.memory().clone();
    let refused = engine.set_budget(plan.least() - 1).unwrap_err();
    assert!(
        matches!(&refused, RuntimeError::Shrink(e) if e.least == plan.least() && e.asked == plan.least() - 1),
        "{refused}"
    );
    assert_eq!(engine.memory(), &plan, "nothing has changed");
    engine.set_budget(plan.least()).unwrap();
    assert_eq!(engine.memory().slots, 2);
    engine.set_budget(u64::MAX).unwrap();
    assert_eq!(engine.memory().slots, plan.slots);
    // The idle engine keeps the new budget for the next step.
    engine.release_idle();
    engine.set_budget(plan.least()).unwrap();
    assert!(engine.is_at_rest());
    run(&mut engine, &[]);
    assert_eq!(engine.memory().slots, 2);
}

#[test]
fn experts_that_stay_when_the_budget_shrinks_need_not_be_read_again() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = model.open(&EngineOptions { forget: true, ..EngineOptions::default() });
    run(&mut engine, &[]);
    let (plan, read) = (engine.memory().clone(), engine.stats().misses);
    engine.set_budget(plan.most() - plan.slot_len).unwrap();
    run(&mut engine, &[]);
    // All experts fitted before. An evicted one can only be missed, come back, and evict another.
    assert!(engine.stats().misses - read < read, "most have stayed");
    engine.set_budget(plan.most()).unwrap();
    run(&mut engine, &[]);
    let warm = engine.stats().misses;
    run(&mut engine, &[]);
    assert_eq!(engine.stats().misses, warm, "all fit again");
}

#[test]
fn under_pressure_the_budget_shrinks_in_steps_and_grows_back() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = model.open(&EngineOptions { yields: Yields::Never, forget: true, ..EngineOptions::default() });
    let want = run(&mut engine, &[]);
    let plan = engine.memory().clone();
    assert!(!engine.heed_pressure(), "one that does not yield looks at nothing");
    let mut slots = vec![plan.slots];
    while engine.follow(Wish::Less) {
        slots.push(engine.memory().slots);
        assert!(run(&mut engine, &[]) == want);
    }
    assert_eq!(slots.last(), Some(&2));
    assert!(slots.windows(2).all(|s| s[0] - s[1] == plan.slots / 8 || s[1] == 2), "{slots:?}");
    while engine.follow(Wish::More) {}
    assert_eq!(engine.memory(), &plan);
    assert!(run(&mut engine, &[]) == want);
    // Not beyond a budget that was set.
    engine.set_budget(plan.least() + plan.slot_len).unwrap();
    assert!(!engine.follow(Wish::More) && engine.memory().slots == 3);
}

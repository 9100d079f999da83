//! Models whose layers have experts of different sizes: slots have these sizes, and no bit of any result depends on them.

use std::path::Path;

use proptest::prelude::*;
use sluice_converter::{Options, Recipe, TypeChoice};
use sluice_format::WeightType;
use sluice_model::memory::Wish;
use sluice_model::{EngineOptions, Yields};
use sluice_storage::pool::PolicyKind;
use sluice_tests::{Converted, greedy};

/// Two of five layers in twice the bits.
fn mixed() -> Converted {
    let recipe = Recipe::parse(Path::new("recipe"), "layers.{1-2}.expert.* q8\n").unwrap();
    let choice = TypeChoice::Type(WeightType::Q4);
    let options = Options { expert_type: choice, dense_type: choice, recipe: Some(recipe), ..Options::default() };
    Converted::with("demo-model", &options)
}

fn prompt() -> Vec<u32> {
    (0..30).map(|i| (i * 7919 + 13) % 128).collect()
}

#[test]
fn no_bit_depends_on_how_the_budget_is_divided_between_sizes() {
    let model = mixed();
    let mut engine = model.open(&EngineOptions { forget: true, yields: Yields::Never, ..EngineOptions::default() });
    let all = engine.memory().clone();
    assert_eq!((all.slots, all.slot_plan.classes().len()), (all.experts, 2), "{all:?}");
    let reference = greedy(&mut engine, &prompt(), 12);
    let least = model.least_budget();
    let case = (0.0..1.05f64, 0.0..1.0f64, proptest::sample::select(PolicyKind::ONLINE.to_vec()));
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
    let mut sizes = [0; 3];
    let outcome = proptest::test_runner::TestRunner::new(config).run(&case, |(budget, less, policy)| {
        let budget = least + ((all.most() - least) as f64 * budget) as u64;
        let options = EngineOptions { budget: Some(budget), policy, forget: true, ..EngineOptions::default() };
        let mut engine = model.open(&options);
        let plan = engine.memory().clone();
        prop_assert!(plan.used() <= budget && plan.slot_plan.bytes() == plan.slot_bytes);
        prop_assert!(greedy(&mut engine, &prompt(), 12) == reference, "other logits with {:?}", plan);
        // A smaller budget while the model is open, and then again the first.
        let smaller = plan.least() + ((plan.most() - plan.least()) as f64 * less) as u64;
        engine.set_budget(smaller).unwrap();
        prop_assert!(engine.memory().used() <= smaller);
        prop_assert!(greedy(&mut engine, &prompt(), 12) == reference, "other logits with {:?}", engine.memory());
        engine.set_budget(plan.most()).unwrap();
        prop_assert_eq!(&engine.memory().slot_plan, &plan.slot_plan);
        prop_assert_eq!(engine.memory().used(), plan.used());
        Ok(())
    });
    outcome.unwrap();
    // The cases have not all been of one kind.
    for part in [0.0, 0.3, 0.6, 0.9] {
        let budget = least + ((all.most() - least) as f64 * part) as u64;
        let engine = model.open(&EngineOptions { budget: Some(budget), forget: true, ..EngineOptions::default() });
        sizes[engine.memory().slot_plan.classes().len()] += 1;
    }
    assert!(sizes[1] > 0 && sizes[2] > 0, "{sizes:?}");
}

#[test]
fn slots_fill_their_part_of_the_budget() {
    let model = mixed();
    let open = |budget| {
        let options = EngineOptions { budget, forget: true, yields: Yields::Never, ..EngineOptions::default() };
        model.open(&options)
    };
    let all = open(None).memory().clone();
    for part in [50, 70, 90, 100] {
        let budget = all.most() - all.slot_bytes * (100 - part) / 100;
        let plan = open(Some(budget)).memory().clone();
        assert!(plan.used() <= budget && plan.used() * 100 >= budget * 95, "{part}: {} of {budget} bytes", plan.used());
    }
    // Two thirds of the experts are half as large: slots of the largest size would hold fewer than half of all.
    let plan = open(Some(all.most() - all.slot_bytes / 3)).memory().clone();
    assert!(plan.slots * 100 >= plan.experts * 60, "{plan:?}");
    assert!(plan.slots as u64 * plan.slot_len > plan.slot_bytes);
}

#[test]
fn under_pressure_all_sizes_shrink_and_grow_back() {
    let model = mixed();
    let mut engine = model.open(&EngineOptions { forget: true, yields: Yields::Never, ..EngineOptions::default() });
    let reference = greedy(&mut engine, &prompt(), 4);
    let plan = engine.memory().clone();
    let mut bytes = plan.slot_bytes;
    while engine.follow(Wish::Less) {
        assert!(engine.memory().slot_bytes < bytes);
        bytes = engine.memory().slot_bytes;
        assert!(greedy(&mut engine, &prompt(), 4) == reference);
    }
    assert_eq!(engine.memory().slot_plan.counts(), [2, 2]);
    while engine.follow(Wish::More) {}
    assert_eq!(engine.memory(), &plan);
}

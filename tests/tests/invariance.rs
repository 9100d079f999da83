//! Same file, same CPU, same prompt: same bits, whatever the budget, the read engine or the number of threads.

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_runtime::io::IoConfig;
use sluice_runtime::pool::PolicyKind;
use sluice_runtime::{EngineOptions, Prefetch, ReadEngineKind, RuntimeError};
use sluice_tests::{Converted, Golden, greedy};

/// The smallest budget that works, from the error that a budget of one byte gives.
fn least_budget(model: &Converted) -> u64 {
    let options = EngineOptions { budget: Some(1), ..EngineOptions::default() };
    match sluice_runtime::Engine::open(&model.path, &options) {
        Err(RuntimeError::Budget(e)) => e.least,
        Err(other) => panic!("a budget of one byte: {other}"),
        Ok(_) => panic!("a budget of one byte was accepted"),
    }
}

#[test]
fn budget_engine_and_threads_do_not_change_a_bit() {
    let golden = Golden::load("deepseek_v3");
    let prompt = golden.ids("input_ids");
    for (fixture, ty) in [("golden/deepseek_v3", None), ("demo-model", Some(WeightType::Q8))] {
        let model = Converted::new(fixture, ty);
        let least = least_budget(&model);
        let mut reference: Option<(Vec<u32>, Vec<Vec<f32>>)> = None;
        for exact in [true, false] {
            for budget in [Some(least), Some(least + (least >> 3)), Some(least * 2), None] {
                for read_engine in [ReadEngineKind::Uring, ReadEngineKind::Pread] {
                    if cfg!(not(target_os = "linux")) && read_engine == ReadEngineKind::Uring {
                        continue;
                    }
                    for threads in [1, 2] {
                        let mut engine = model.open(&EngineOptions {
                            budget,
                            read_engine: Some(read_engine),
                            threads: Some(threads),
                            exact,
                            ..EngineOptions::default()
                        });
                        let result = greedy(&mut engine, &prompt, 12);
                        let reference = reference.get_or_insert_with(|| result.clone());
                        let case =
                            format!("{fixture}, budget {budget:?}, {read_engine:?}, {threads} threads, exact {exact}");
                        assert_eq!(result.0, reference.0, "{case}");
                        assert!(result.1 == reference.1, "{case}: other logits");
                    }
                }
            }
            reference = None;
        }
    }
}

#[test]
fn one_byte_below_the_least_budget_is_refused() {
    let model = Converted::new("golden/deepseek_v3", None);
    let least = least_budget(&model);
    let open = |budget| {
        sluice_runtime::Engine::open(&model.path, &EngineOptions { budget: Some(budget), ..EngineOptions::default() })
    };
    assert!(open(least).is_ok());
    assert!(matches!(open(least - 1), Err(RuntimeError::Budget(_))));
}

#[test]
fn prefill_reads_each_expert_once() {
    let model = Converted::new("demo-model", Some(WeightType::F32));
    let mut engine = model.open(&EngineOptions { budget: Some(least_budget(&model)), ..EngineOptions::default() });
    let memory = engine.memory().clone();
    assert!(memory.slots < memory.experts / 2, "the budget holds too much for this test: {memory:?}");
    let prompt: Vec<u32> = (0..200).map(|i| (i * 7919 + 13) % 1536).collect();

    let touched = std::rc::Rc::new(std::cell::RefCell::new(std::collections::BTreeSet::new()));
    let sink = touched.clone();
    engine.observe_routing(Box::new(move |layer, _, _, choices| {
        sink.borrow_mut().extend(choices.iter().map(|c| (layer, c.expert)));
    }));
    let mut logits = Vec::new();
    let mut session = engine.new_session();
    engine.forward(&mut session, &prompt, &mut logits).unwrap();
    let distinct = touched.borrow().len() as u64 * memory.slot_len;
    let read = engine.stats().expert_bytes_read;
    assert!(read as f64 <= 1.05 * distinct as f64, "{read} bytes read for {distinct} bytes of distinct experts");
}

/// Everything about storage that a user or a calibration can change.
fn any_storage(least: u64, everything: u64) -> impl Strategy<Value = EngineOptions> {
    let engine = prop_oneof![Just(ReadEngineKind::Auto), Just(ReadEngineKind::Pread)];
    let policy = proptest::sample::select(PolicyKind::ONLINE.to_vec());
    let prefetch = prop_oneof![Just(Prefetch::Auto), Just(Prefetch::Off)];
    let io = (1usize..=64, 1usize..=32, any::<bool>()).prop_map(|(pages, depth, verify)| IoConfig {
        chunk_bytes: 4096 * pages,
        depth,
        prefetch_depth: depth.div_ceil(2),
        verify,
    });
    (least..=everything, engine, policy, prefetch, io, 1usize..=3).prop_map(
        |(budget, engine, policy, prefetch, io, threads)| EngineOptions {
            budget: Some(budget),
            read_engine: Some(engine),
            policy,
            prefetch,
            io: Some(io),
            threads: Some(threads),
            forget: true,
            ..EngineOptions::default()
        },
    )
}

#[test]
fn engine_policy_prefetch_and_budget_never_change_a_bit() {
    let model = Converted::new("demo-model", Some(WeightType::Q4));
    let least = least_budget(&model);
    let prompt: Vec<u32> = (0..40).map(|i| (i * 7919 + 13) % 1536).collect();
    let reference = greedy(&mut model.open(&EngineOptions::default()), &prompt, 24);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig { cases: 60, ..ProptestConfig::default() });
    let outcome = runner.run(&any_storage(least, 4 * least), |options| {
        let (ids, rows) = greedy(&mut model.open(&options), &prompt, 24);
        prop_assert_eq!(&ids, &reference.0);
        prop_assert!(rows == reference.1, "other logits");
        Ok(())
    });
    outcome.unwrap();
}

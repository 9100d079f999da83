//! The same file, processor and prompt give the same bits, whatever the budget, the read engine or the number of threads.

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_model::{Control, EngineOptions, KvType, Prefetch, ReadEngineKind, RuntimeError, Span, Want};
use sluice_storage::io::IoConfig;
use sluice_storage::pool::{Choice, PolicyKind};
use sluice_tests::{ATTENTIONS, Converted, Golden, greedy, relative_error};

/// The smallest budget that works, from the error for a budget of one byte.
#[test]
fn budget_engine_and_threads_do_not_change_a_bit() {
    let golden = Golden::load("deepseek_v3");
    let prompt = golden.ids("input_ids");
    for (fixture, ty) in [("golden/deepseek_v3", None), ("demo-model", Some(WeightType::Q8))] {
        let model = Converted::new(fixture, ty);
        let least = model.least_budget();
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
    let least = model.least_budget();
    let open = |budget| {
        sluice_model::Engine::open(&model.path, &EngineOptions { budget: Some(budget), ..EngineOptions::default() })
    };
    assert!(open(least).is_ok());
    assert!(matches!(open(least - 1), Err(RuntimeError::Budget(_))));
}

#[test]
fn prefill_reads_each_expert_once() {
    let model = Converted::new("demo-model", Some(WeightType::F32));
    let mut engine = model.open(&EngineOptions { budget: Some(model.least_budget()), ..EngineOptions::default() });
    let memory = engine.memory().clone();
    assert!(memory.slots < memory.experts / 2, "the budget holds too much for this test: {memory:?}");
    let prompt: Vec<u32> = (0..200).map(|i| (i * 7919 + 13) % 1536).collect();

    let mut touched = std::collections::BTreeSet::new();
    let mut sequence = engine.new_sequence();
    let mut routing = |layer: usize, _: usize, _: usize, choices: &[Choice]| {
        touched.extend(choices.iter().map(|c| (layer, c.expert)));
    };
    let mut control = Control { routing: Some(&mut routing), ..Control::default() };
    let span = Span::prompt(&mut sequence, &prompt, Want::Last);
    engine.step(&mut [span], &mut control, &mut |_, _, _| ()).unwrap();
    let distinct = touched.len() as u64 * memory.slot_len;
    let read = engine.stats().expert_bytes_read;
    assert!(read as f64 <= 1.05 * distinct as f64, "{read} bytes read for {distinct} bytes of distinct experts");
}

/// All properties of storage that a user or a calibration can change.
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
    let least = model.least_budget();
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

/// How far the logits of half of the tokens may be from those with f32. The others may be further away: the models are tiny and
/// random, so sometimes a rounding changes a choice of the router or the indexer.
const KV_ERROR: [(KvType, f64); 4] =
    [(KvType::F32, 0.0), (KvType::F16, 0.005), (KvType::Bf16, 0.02), (KvType::Q8, 0.1)];

#[test]
fn keys_and_values_of_every_type_keep_their_bits() {
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        let ids = Golden::load(family).ids("input_ids");
        let prompt: Vec<u32> = ids.iter().chain(ids.iter().rev()).copied().take(30).collect();
        let least = model.least_budget();
        let mut with_f32 = Vec::new();
        for (kv_type, bound) in KV_ERROR {
            let mut reference: Option<Vec<f32>> = None;
            for (step, threads, budget) in [(1, 1, None), (prompt.len(), 2, None), (7, 3, None), (11, 2, Some(least))] {
                let threads = Some(threads);
                let mut engine = model.open(&EngineOptions { kv_type, threads, budget, ..EngineOptions::default() });
                let mut sequence = engine.new_sequence();
                assert!(sequence.bytes() <= engine.memory().kv_cache, "{family} {kv_type}");
                let mut logits = Vec::new();
                for tokens in prompt.chunks(step) {
                    engine.forward_all(&mut sequence, tokens, &mut |_, row| logits.extend_from_slice(row)).unwrap();
                }
                let reference = reference.get_or_insert_with(|| logits.clone());
                assert!(*reference == logits, "{family} {kv_type}: {step} tokens at a time give other bits");
            }
            let logits = reference.expect("computed");
            if kv_type == KvType::F32 {
                with_f32 = logits;
                continue;
            }
            let vocab = logits.len() / prompt.len();
            let rows = logits.chunks_exact(vocab).zip(with_f32.chunks_exact(vocab));
            let mut errors: Vec<f64> = rows.map(|(row, with_f32)| relative_error(row, with_f32)).collect();
            errors.sort_by(f64::total_cmp);
            let (median, largest) = (errors[errors.len() / 2], errors[errors.len() - 1]);
            println!("{family} {kv_type}: median {median:.1e}, largest {largest:.1e}");
            assert!(largest > 0.0 && median < bound, "{family} {kv_type}: logits differ by {median:e}");
        }
    }
}

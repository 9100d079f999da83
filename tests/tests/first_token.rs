//! The first token: opening waits for no weights, each layer waits for its own, and nothing of this changes a result.

use std::path::Path;

use sluice_format::{ExtentKind, ExtentRecord, ModelFile, WeightType};
use sluice_generate::{Model, Request};
use sluice_model::{Engine, EngineOptions, ModelError, ReadEngineKind, RuntimeError};
use sluice_storage::io::ReadError;
use sluice_storage::pool::PoolError;
use sluice_tests::{Converted, greedy};

const PROMPT: [u32; 3] = [838, 29, 202];

fn options() -> EngineOptions {
    EngineOptions { threads: Some(2), context: Some(64), forget: true, ..EngineOptions::default() }
}

/// The last extent that a step needs of this kind.
fn last(file: &ModelFile, kind: ExtentKind) -> ExtentRecord {
    let of_kind = file.extents().iter().filter(|extent| extent.kind == kind);
    *of_kind.max_by_key(|extent| (extent.layer, extent.index)).unwrap()
}

/// Changes a byte of an extent, and returns what it was.
fn damage(path: &Path, extent: &ExtentRecord) -> Vec<u8> {
    let sound = std::fs::read(path).unwrap();
    let mut bytes = sound.clone();
    bytes[extent.offset as usize + 5] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
    sound
}

#[test]
fn damage_in_a_later_layer_is_an_error_of_the_step_that_names_it() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let file = ModelFile::open(&model.path).unwrap();
    let want = greedy(&mut model.open(&options()), &PROMPT, 3);
    for kind in [ExtentKind::Attention, ExtentKind::Head] {
        let extent = last(&file, kind);
        let sound = damage(&model.path, &extent);
        let mut engine = model.open(&options());
        let (mut sequence, mut logits) = (engine.new_sequence(), Vec::new());
        for _ in 0..2 {
            let error = engine.forward(&mut sequence, &PROMPT, &mut logits).unwrap_err();
            let RuntimeError::Model(ModelError::Pool(PoolError::Read(ReadError::Checksum { path, .. }))) = &error
            else {
                panic!("{error}")
            };
            assert_eq!(path, &model.path);
            let name = sluice_format::extent_name(kind, extent.layer, extent.index).to_string();
            assert!(error.to_string().contains("damaged"), "{error}; it is {name}");
        }
        assert!(engine.wait_for_dense().is_err());
        assert_eq!(sequence.position(), 0, "nothing was appended");
        // Once the file is sound again, the same engine goes on.
        std::fs::write(&model.path, sound).unwrap();
        assert!(greedy(&mut engine, &PROMPT, 3) == want);
        engine.wait_for_dense().unwrap();
    }
}

#[test]
fn engines_can_be_dropped_while_they_load() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    for round in 0..60 {
        let read_engine = Some(if round % 2 == 0 { ReadEngineKind::Auto } else { ReadEngineKind::Pread });
        let mut engine = model.open(&EngineOptions { read_engine, ..options() });
        match round % 4 {
            0 => {}
            1 => engine.release_idle(),
            2 => drop(engine.new_sequence()),
            _ => {
                engine.release_idle();
                drop(greedy(&mut engine, &PROMPT, 1));
            }
        }
    }
}

#[test]
fn a_first_step_gives_the_same_bits_whether_the_weights_are_there_or_not() {
    for (name, ty) in [("demo-model", Some(WeightType::Q4)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)] {
        let model = Converted::new(name, ty);
        let mut loaded = model.open(&options());
        loaded.wait_for_dense().unwrap();
        let prompt: Vec<u32> = (0..10).map(|i| (i * 37 + 5) % 128).collect();
        let want = greedy(&mut loaded, &prompt, 4);
        for budget in [None, Some(model.least_budget_for(&options())), Some(2 * model.least_budget_for(&options()))] {
            let mut engine = model.open(&EngineOptions { budget, ..options() });
            assert!(greedy(&mut engine, &prompt, 4) == want, "{name}, {budget:?}");
        }
    }
}

#[test]
fn a_context_that_is_decided_while_the_drive_reads_is_as_good_as_one_from_the_start() {
    let prompt: Vec<u32> = (0..10).map(|i| (i * 37 + 5) % 128).collect();
    let with = |context, budget| EngineOptions { context: Some(context), budget, ..options() };
    for (name, ty) in [("demo-model", Some(WeightType::Q4)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)] {
        let model = Converted::new(name, ty);
        let mut kept = 0;
        let contexts = [12, 16, 120];
        for context in contexts {
            let least = model.least_budget_for(&with(context, None));
            for budget in [None, Some(least), Some(least + least / 4), Some(2 * least), Some(4 * least)] {
                let mut direct = model.open(&with(context, budget));
                let mut engine = model.open(&with(12, budget));
                let (before, foreign) = (engine.memory().clone(), engine.new_sequence());
                let available = before.available;
                let fits = engine.set_context(context).unwrap();
                if fits {
                    kept += 1;
                    let error = engine.forward(&mut { foreign }, &prompt, &mut Vec::new()).unwrap_err();
                    assert!(matches!(error, RuntimeError::Model(ModelError::ForeignSequence)), "{error}");
                } else {
                    assert!(budget.is_some(), "{name}: everything fits");
                    assert_eq!(engine.memory(), &before);
                    drop(foreign);
                    engine = Engine::of(engine.into_file(), &with(context, budget)).unwrap();
                }
                // What the system had differs from moment to moment.
                let plan = |engine: &Engine| {
                    let mut plan = engine.memory().clone();
                    plan.available = available;
                    plan
                };
                assert_eq!(plan(&engine), plan(&direct), "{name}, {context} tokens in {budget:?}");
                assert_eq!((engine.pages(), engine.pages().is_empty()), (direct.pages(), false));
                assert!(greedy(&mut engine, &prompt, 3) == greedy(&mut direct, &prompt, 3), "{name}, {budget:?}");
                assert_eq!(engine.stats().expert_bytes_read, direct.stats().expert_bytes_read, "{name}, {budget:?}");
            }
        }
        assert!(kept >= 2 * contexts.len(), "{name}: {kept}");
    }
}

#[test]
fn a_context_that_does_not_fit_changes_nothing() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let budget = Some(model.least_budget_for(&options()));
    let mut engine = model.open(&EngineOptions { budget, ..options() });
    let plan = engine.memory().clone();
    let error = engine.set_context(4096).unwrap_err();
    assert!(error.to_string().contains("--budget") && error.least > error.effective, "{error}");
    assert_eq!(engine.memory(), &plan);
    assert!(engine.set_context(64).unwrap());
    assert_eq!(greedy(&mut engine, &PROMPT, 3), greedy(&mut model.open(&options()), &PROMPT, 3));
}

#[test]
fn warming_changes_no_bit_and_spares_reads() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let learn = EngineOptions { forget: false, ..options() };
    let mut first = model.open(&learn);
    let want = greedy(&mut first, &PROMPT, 12);
    first.save_counts().unwrap();
    let cold = first.stats();
    drop(first);

    let warm = |engine: &mut Engine| {
        while engine.warm() {
            std::thread::yield_now();
        }
    };
    let mut engine = model.open(&learn);
    warm(&mut engine);
    let warmed = engine.stats().warmed;
    assert!(warmed > 0 && engine.stats().expert_bytes_read > 0);
    assert!(greedy(&mut engine, &PROMPT, 12) == want);
    let stats = engine.stats();
    assert_eq!((stats.misses, stats.hits), (0, cold.hits + cold.misses), "all that it needs is in memory");

    // In the middle of it, with little memory, at rest, and turned off.
    let budget = Some(model.least_budget_for(&options()) * 2);
    let mut engine = model.open(&EngineOptions { budget, ..learn.clone() });
    for _ in 0..3 {
        engine.warm();
        assert!(greedy(&mut engine, &PROMPT, 12) == want);
    }
    engine.release_idle();
    assert!(!engine.warm() && engine.is_at_rest());
    let mut off = model.open(&EngineOptions { no_warm: true, ..learn });
    assert!(!off.warm());
    assert_eq!(off.stats().warmed, 0);
    // Nothing is known where nothing was learned.
    assert!(!model.open(&options()).warm());
}

#[test]
fn a_model_with_nothing_to_do_fills_its_cache() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let learn = EngineOptions { forget: false, ..options() };
    let request = || Request::new(PROMPT.to_vec(), 12);
    let first = Model::open(&converted.path, &learn).unwrap();
    let want = first.complete(request()).unwrap();
    let used = first.stats();
    drop(first);

    let model = Model::open(&converted.path, &learn).unwrap();
    let in_memory = |model: &Model| {
        let report = model.report()?;
        Some(report.experts.iter().map(|layer| layer.count()).sum::<usize>()).filter(|count| *count > 0)
    };
    // All of those that were used, at some time, though nobody has asked for anything.
    let mut before = 0;
    loop {
        std::thread::sleep(std::time::Duration::from_millis(20));
        let Some(now) = in_memory(&model) else { continue };
        if now == before {
            break;
        }
        before = now;
    }
    assert_eq!(model.complete(request()).unwrap(), want);
    let stats = model.stats();
    assert!(stats.warmed > 0 && stats.misses < used.misses, "{stats:?}");
}

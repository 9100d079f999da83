//! Lossy on request: fewer experts are read than the routers request, but only if an option says so, and results computed that way
//! are never confused with the model's own.

use std::fs;
use std::num::NonZeroU16;
use std::path::Path;

use serde_json::Value;
use sluice_format::WeightType;
use sluice_model::session::SessionError;
use sluice_model::{Engine, EngineOptions, Preference, Prefetch, Stats, Thrift};
use sluice_sessions::{Store, StoreOptions};
use sluice_tests::{Converted, Golden, fixture, greedy};
use tempfile::TempDir;

fn options(thrift: Thrift) -> EngineOptions {
    EngineOptions { thrift, forget: true, threads: Some(2), context: Some(64), ..EngineOptions::default() }
}

fn preferring(part: f64) -> Thrift {
    Thrift { preference: Preference::new(part).unwrap(), ..Thrift::default() }
}

fn at_most(experts: u16) -> Thrift {
    Thrift { top_k: NonZeroU16::new(experts), ..Thrift::default() }
}

/// A copy of a golden checkpoint with a changed configuration.
fn reconfigured(family: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("golden").join(family)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    folder
}

fn converted(folder: &Path) -> Converted {
    Converted::new(&folder.to_string_lossy(), None)
}

/// All logits of a prompt.
fn logits(engine: &mut Engine, prompt: &[u32]) -> Vec<f32> {
    let (mut sequence, mut logits) = (engine.new_sequence(), Vec::new());
    engine.forward_all(&mut sequence, prompt, &mut |_, row| logits.extend_from_slice(row)).unwrap();
    logits
}

#[test]
fn fewer_experts_are_what_the_model_would_say_if_it_had_no_more() {
    // Scores by group and chosen logits: weights are renormalised in different ways.
    for family in ["qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let prompt = Golden::load(family).ids("input_ids");
        let few = reconfigured(family, |config| {
            assert!(config["num_experts_per_tok"].as_u64().unwrap() > 1, "{family}");
            ["num_experts_per_tok", "experts_per_token"].iter().for_each(|field| config[*field] = 1.into());
        });
        let whole = Converted::new(&format!("golden/{family}"), None);
        let want = logits(&mut converted(few.path()).open(&options(Thrift::default())), &prompt);
        let mut engine = whole.open(&options(at_most(1)));
        assert_eq!(engine.thrift(), at_most(1));
        assert!(logits(&mut engine, &prompt) == want, "{family}");
        assert!(logits(&mut whole.open(&options(Thrift::default())), &prompt) != want, "{family}");
        let mut many = whole.open(&options(at_most(99)));
        assert!(many.thrift().is_exact(), "{family}: no layer has so many");
        assert!(logits(&mut many, &prompt) == logits(&mut whole.open(&options(Thrift::default())), &prompt));
    }
}

/// Greedy text of the demo model in little memory, and its statistics.
fn stream(model: &Converted, thrift: Thrift) -> (Vec<u32>, Stats) {
    let options = EngineOptions { prefetch: Prefetch::Off, budget: Some(budget(model)), ..options(thrift) };
    let mut engine = model.open(&options);
    assert!(engine.memory().slots < engine.memory().experts / 2);
    let (ids, _) = greedy(&mut engine, &[1, 2, 3], 30);
    (ids, engine.stats())
}

/// The least budget, and some slots.
fn budget(model: &Converted) -> u64 {
    let options = options(Thrift::default());
    model.least_budget_for(&options) + 40 * model.open(&options).memory().slot_len
}

#[test]
fn experts_in_memory_are_preferred_while_text_is_generated() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let (own, exact) = stream(&model, Thrift::default());
    let (text, stats) = stream(&model, preferring(0.5));
    assert_eq!(exact.replaced, 0);
    assert!(stats.replaced > 0 && stats.misses < exact.misses, "{stats:?} against {exact:?}");
    assert_ne!(text, own);
    let (again, of_again) = stream(&model, preferring(0.5));
    assert_eq!((again, of_again.replaced), (text, stats.replaced), "what was in memory was the same");
    let (_, all) = stream(&model, preferring(1.0));
    assert!(all.misses < exact.misses, "{all:?} against {exact:?}");
}

#[test]
fn prompts_are_read_as_the_routers_say() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let prompt: Vec<u32> = (0..40).map(|i| i * 31 % 1536).collect();
    let mut engine = model.open(&EngineOptions { budget: Some(budget(&model)), ..options(preferring(1.0)) });
    let want = logits(&mut model.open(&options(Thrift::default())), &prompt);
    for _ in 0..2 {
        assert!(logits(&mut engine, &prompt) == want);
    }
    assert_eq!(engine.stats().replaced, 0);
    let mut sequence = engine.new_sequence();
    prompt.iter().for_each(|&token| engine.decode(&mut sequence, token, &mut Vec::new()).unwrap());
    assert!(engine.stats().replaced > 0, "one by one they are generated tokens");
}

#[test]
fn what_is_in_memory_anyway_is_no_loss() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = model.open(&options(preferring(1.0)));
    // All experts have been read after some prompts.
    (0..16).for_each(|n| _ = logits(&mut engine, &(0..60).map(|i| (i * 131 + n * 17) % 1536).collect::<Vec<_>>()));
    let (memory, resident) = (engine.memory().experts, engine.residency());
    assert_eq!(resident.iter().map(|layer| layer.count()).sum::<usize>(), memory, "all are in memory");
    let want = greedy(&mut model.open(&options(Thrift::default())), &[1, 2, 3], 30);
    assert!(greedy(&mut engine, &[1, 2, 3], 30) == want);
}

#[test]
fn models_without_a_choice_are_exact() {
    for family in ["llama", "qwen3"] {
        let model = Converted::new(&format!("golden/{family}"), None);
        let both = Thrift { preference: Preference::new(0.5).unwrap(), ..at_most(1) };
        assert!(model.open(&options(both)).thrift().is_exact(), "{family}");
    }
}

#[test]
fn what_was_computed_otherwise_is_not_mixed() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let folder = tempfile::tempdir().unwrap();
    let ways = [Thrift::default(), at_most(1), preferring(0.2), preferring(0.3)];
    let tokens: Vec<u32> = (0..60).collect();
    let store =
        Store::open(StoreOptions { folder: folder.path().join("store"), max_bytes: 1 << 30, expire_after: None });
    let store = store.unwrap();
    for (number, way) in ways.into_iter().enumerate() {
        let mut engine = model.open(&options(way));
        assert_eq!(store.longest(engine.binding(), &tokens).map(|found| found.position()), None, "{way}");
        let mut sequence = engine.new_sequence();
        engine.forward(&mut sequence, &tokens, &mut Vec::new()).unwrap();
        sequence.save_file(&folder.path().join(number.to_string())).unwrap();
        store.keep(sequence, None);
        store.flush();
        for (other, found) in ways.into_iter().enumerate().take(number + 1) {
            let restored = engine.restore_file(&folder.path().join(other.to_string()));
            match restored {
                Ok(sequence) => assert!(other == number && sequence.tokens() == tokens),
                Err(SessionError::Thrift { found: said, wanted, .. }) => {
                    assert_eq!((said, wanted), (found.to_string(), way));
                    assert_ne!(other, number);
                }
                Err(error) => panic!("{way}: {error}"),
            }
        }
    }
    assert_eq!(store.usage().files, ways.len());
}

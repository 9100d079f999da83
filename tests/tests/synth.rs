//! Model files with random weights: valid, computable, the same from the same seed, and routed like a real model.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use sluice_converter::ConvertError;
use sluice_converter::synth::{Geometry, Layout, SynthOptions, TYPES, WeightTypes, synth, token_stream};
use sluice_format::{ExtentKind, ModelFile, WeightType};
use sluice_lab::trace::{Choice, Replay, Stats, Trace, TraceWriter};
use sluice_model::router;
use sluice_model::{Control, Engine, EngineOptions, Span};
use sluice_storage::io::{
    Arena, Check, Class, DataFile, DirectMode, EngineKind, ExtentName, ExtentRead, IoConfig, Scheduler, open_engine,
};
use sluice_storage::pool::policy::PolicyKind;
use sluice_tests::{Converted, fixture};
use tempfile::TempDir;

const FOUR_BITS: WeightTypes = WeightTypes { experts: WeightType::Int4, dense: WeightType::Q8 };

/// A small model in the shape of the benchmark's: 128 experts, 8 of them used.
fn small(folder: &Path, layers: usize) -> Geometry {
    let config = serde_json::json!({
        "model_type": "deepseek_v3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 128,
        "moe_intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "n_shared_experts": 0,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0, "q_lora_rank": null, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 4096
    });
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    Geometry::load(path.to_str().unwrap(), None).unwrap()
}

/// The demo model's geometry: dense layers, shared experts, groups, low-rank queries.
fn demo() -> Geometry {
    Geometry::load(fixture("demo-model").to_str().unwrap(), None).unwrap()
}

fn write(folder: &TempDir, name: &str, geometry: &Geometry, options: &SynthOptions) -> PathBuf {
    let path = folder.path().join(name);
    synth(geometry, &path, options, &()).unwrap();
    path
}

#[test]
fn every_type_is_valid_and_computes() {
    let (folder, geometry) = (tempfile::tempdir().unwrap(), demo());
    for ty in TYPES {
        let options = SynthOptions::new(WeightTypes { experts: ty, dense: ty });
        let path = write(&folder, ty.name(), &geometry, &options);
        assert_eq!(ModelFile::open(&path).unwrap().verify_all(&mut |_| ()).len(), 0, "{ty}");
        let mut engine = Engine::open(&path, &EngineOptions { context: Some(16), ..EngineOptions::default() }).unwrap();
        let mut sequence = engine.new_sequence();
        let mut tokens = 0;
        let check = &mut |_: usize, logits: &[f32]| {
            let mean_square = logits.iter().map(|l| l * l).sum::<f32>() / logits.len() as f32;
            assert!((0.5..2.0).contains(&mean_square), "{ty}: {mean_square}");
            tokens += 1;
        };
        engine.forward_all(&mut sequence, &token_stream(0, 6, geometry.spec().vocab_size), check).unwrap();
        assert_eq!(tokens, 6);
    }
}

/// A conversion of the same configuration to the same types gives every part the same place and size.
#[test]
fn the_layout_is_that_of_a_conversion() {
    let geometry = demo();
    for ty in [WeightType::F32, WeightType::Q8, WeightType::Q4] {
        let converted = Converted::new("demo-model", Some(ty));
        let file = ModelFile::open(&converted.path).unwrap();
        let layout = Layout::new(geometry.spec(), WeightTypes { experts: ty, dense: ty }, 4096).unwrap();
        assert_eq!(file.spec(), geometry.spec());
        let places = |extents: &[sluice_format::ExtentRecord]| {
            extents.iter().map(|e| (e.name(), e.offset, e.stored_len, e.logical_len)).collect::<Vec<_>>()
        };
        let ours = places(layout.extents());
        // The demo's router is f32 in the checkpoint, and a conversion keeps that.
        let theirs = places(file.extents());
        if ty == WeightType::F32 {
            assert_eq!(ours, theirs);
        }
        let experts = |all: &[(String, u64, u64, u64)]| {
            all.iter().filter(|e| e.0.contains("expert")).map(|e| (e.0.clone(), e.2, e.3)).collect::<Vec<_>>()
        };
        assert_eq!(experts(&ours), experts(&theirs), "{ty}");
    }
}

#[test]
fn the_seed_decides_and_threads_do_not() {
    let (folder, geometry) = (tempfile::tempdir().unwrap(), demo());
    let bytes = |name: &str, threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = SynthOptions { seed, ..SynthOptions::new(FOUR_BITS) };
        fs::read(pool.install(|| write(&folder, name, &geometry, &options))).unwrap()
    };
    let first = bytes("a", 1, 7);
    assert!(first == bytes("b", 3, 7));
    assert!(first != bytes("c", 1, 8));
}

#[test]
fn refusals_leave_nothing_behind() {
    let (folder, geometry) = (tempfile::tempdir().unwrap(), demo());
    let path = folder.path().join("m.sluice");
    let with_skew = |skew| synth(&geometry, &path, &SynthOptions { skew, ..SynthOptions::new(FOUR_BITS) }, &());
    for skew in [-1.0, f32::NAN, 101.0] {
        assert!(matches!(with_skew(skew), Err(ConvertError::Options(_))));
    }
    let f16 = WeightTypes { experts: WeightType::F16, ..FOUR_BITS };
    assert!(matches!(synth(&geometry, &path, &SynthOptions::new(f16), &()), Err(ConvertError::Options(_))));
    fs::write(&path, "mine").unwrap();
    assert!(matches!(with_skew(1.0), Err(ConvertError::Exists { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    // Only model files are ever replaced.
    let overwrite = SynthOptions { overwrite: true, ..SynthOptions::new(FOUR_BITS) };
    assert!(matches!(synth(&geometry, &path, &overwrite, &()), Err(ConvertError::NotReplaced { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    fs::remove_file(&path).unwrap();
    synth(&geometry, &path, &SynthOptions::new(FOUR_BITS), &()).unwrap();
    synth(&geometry, &path, &overwrite, &()).unwrap();
    assert!(ModelFile::open(&path).is_ok());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Computes `tokens` one by one; returns their routing.
fn trace(path: &Path, tokens: &[u32]) -> Trace {
    let options = EngineOptions { context: Some(tokens.len()), ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options).unwrap();
    let moe = engine.spec().layers[0].ffn.moe.clone().unwrap();
    let layers = engine.spec().layers.len() as u32;
    let mut writer = TraceWriter::new(Vec::new(), layers, moe.experts as u32, moe.top_k as u32, None).unwrap();
    let mut sequence = engine.new_sequence();
    for token in tokens {
        let mut record = |layer: usize, position: usize, top_k: usize, choices: &[router::Choice]| {
            let choices = choices.iter().map(|c| Choice { expert: c.expert, weight: c.weight });
            writer.record(layer, position, top_k, choices).unwrap();
        };
        let mut control = Control { routing: Some(&mut record), ..Control::default() };
        engine.step(&mut [Span::decode(&mut sequence, token)], &mut control, &mut |_, _, _| ()).unwrap();
    }
    let bytes = writer.finish().unwrap();
    Trace::read(Cursor::new(bytes), "synth").unwrap()
}

/// Compares with real models (Qwen3-30B: 38–43 % of a token's experts were used by the token before; LRU with an eighth of the
/// experts hits 53 %), and at skew 0 with independent tokens: 8 of 128 repeat by chance.
#[test]
fn routing_repeats_itself_like_that_of_a_real_model() {
    let folder = tempfile::tempdir().unwrap();
    let geometry = small(folder.path(), 24);
    let figures = |skew: f32| {
        let options = SynthOptions { skew, ..SynthOptions::new(FOUR_BITS) };
        let path = write(&folder, &format!("skew{skew}"), &geometry, &options);
        let trace = trace(&path, &token_stream(1, 300, geometry.spec().vocab_size));
        let stats = Stats::new(&trace, None).unwrap();
        let replay = Replay::new(&trace, None).unwrap();
        let lru = |part| replay.run(PolicyKind::Lru, replay.slots(part)).hit_rate();
        let figures = [stats.repeated, stats.top_tenth, lru(0.12), lru(0.33)];
        println!("skew {skew}: repeated, top tenth, LRU at 12 %, at 33 %: {figures:.3?}");
        figures
    };
    let [repeated, top_tenth, lru_eighth, lru_third] = figures(1.0);
    assert!((0.35..0.45).contains(&repeated), "{repeated}");
    assert!((0.2..0.5).contains(&top_tenth), "{top_tenth}");
    assert!((0.45..0.60).contains(&lru_eighth), "{lru_eighth}");
    assert!((0.65..0.80).contains(&lru_third), "{lru_third}");
    let [repeated, ..] = figures(0.0);
    assert!(repeated < 0.2, "{repeated}");
}

/// A full-size DeepSeek-R1 of holes: the file's reader and both read engines reach offsets beyond 2^38.
#[test]
fn a_sparse_file_of_380_gigabytes_is_served() {
    const BEYOND: u64 = 1 << 38;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r1.sluice");
    let geometry = Geometry::load("deepseek-r1", None).unwrap();
    let options = SynthOptions { sparse: true, ..SynthOptions::new(FOUR_BITS) };
    match synth(&geometry, &path, &options, &()) {
        Ok(summary) => assert!((370e9..400e9).contains(&(summary.file_bytes as f64)), "{}", summary.file_bytes),
        Err(ConvertError::Io { source, .. }) if source.kind() == std::io::ErrorKind::FileTooLarge => {
            eprintln!("skipped: the filesystem of {} has no files that long", folder.path().display());
            return;
        }
        Err(other) => panic!("{other}"),
    }
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
    assert!(allocated < 64 << 20, "{allocated}");

    let file = ModelFile::open(&path).unwrap();
    let last = file.extent(ExtentKind::Expert, 60, 255).unwrap();
    let first = file.extents().iter().find(|e| e.offset > BEYOND).unwrap();
    let mut buffer = Vec::new();
    for extent in [first, last] {
        assert!(extent.kind == ExtentKind::Expert && extent.offset > BEYOND);
        file.read_extent(extent, &mut buffer).unwrap();
        assert_eq!(buffer.len() as u64, extent.stored_len);
    }
    for kind in [EngineKind::Auto, EngineKind::Pread] {
        let arena = Arena::uniform(last.stored_len as usize, 1, "a test").unwrap();
        let data = DataFile::open(&path, DirectMode::Prefer).unwrap();
        let engine = open_engine(kind, vec![data], &[arena.region()], &IoConfig::default()).unwrap();
        let scheduler = Scheduler::start(engine, IoConfig::default()).unwrap();
        let mut slot = arena.into_slots().pop().unwrap();
        for extent in [first, last] {
            let read = ExtentRead {
                file: 0,
                offset: extent.offset,
                len: extent.stored_len as usize,
                checksum: extent.checksum,
                class: Class::Demand,
                check: Check::Here,
                name: ExtentName::expert(extent.layer, extent.index),
            };
            slot = scheduler.submit(slot, read).unwrap().finish().unwrap();
            assert!(slot.bytes().iter().all(|&b| b == 0));
            // The checksum is compared, hole or not.
            let wrong = ExtentRead { checksum: extent.checksum ^ 1, ..read };
            slot = scheduler.submit(slot, wrong).unwrap().finish().unwrap_err().slot.unwrap();
        }
    }
}

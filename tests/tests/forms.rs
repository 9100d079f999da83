//! One model in every form that a file can have: compressed, in volumes, of version 1, and rewritten. All give the same bits.

use std::fs;
use std::path::{Path, PathBuf};

use sluice_converter::{Options, TypeChoice, UpgradeOptions, UpgradeSummary, convert, upgrade};
use sluice_format::{Codec, ExtentKind, ModelFile, WeightType};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::{fixture, greedy};

const PROMPT: [u32; 7] = [838, 29, 202, 17, 5, 999, 1];

fn converted(folder: &Path, name: &str, change: impl FnOnce(&mut Options)) -> ModelFile {
    let choice = TypeChoice::Type(WeightType::Bf16);
    let mut options = Options { expert_type: choice, dense_type: choice, ..Options::default() };
    change(&mut options);
    let path = folder.join(name);
    let summary = convert(&fixture("demo-model"), &path, &options, &()).unwrap();
    let model = ModelFile::open(&summary.files[0]).unwrap();
    assert_eq!(summary.file_bytes, model.file_bytes());
    assert_eq!(summary.stored_bytes, model.extent_bytes());
    assert!(model.verify_all(&mut |_| ()).is_empty());
    assert!(fs::read_dir(folder).unwrap().all(|f| !f.unwrap().file_name().to_string_lossy().contains("partial")));
    model
}

/// Token ids, logits, and the number of experts that were read; with this budget, or with all memory.
fn run(path: &Path, budget: Option<u64>) -> (Vec<u32>, Vec<Vec<f32>>, u64) {
    let options = EngineOptions { budget, forget: true, threads: Some(2), ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options).unwrap();
    let (ids, logits) = greedy(&mut engine, &PROMPT, 12);
    (ids, logits, engine.stats().misses)
}

fn least(path: &Path) -> u64 {
    match Engine::open(path, &EngineOptions { budget: Some(1), ..EngineOptions::default() }) {
        Err(sluice_model::RuntimeError::Budget(e)) => e.least,
        _ => panic!("a budget of one byte is refused"),
    }
}

#[test]
fn every_form_computes_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let plain = converted(dir.path(), "plain.sluice", |_| ());
    let want = run(plain.path(), None);
    let part = plain.file_bytes() / 3;
    let forms: [(&str, bool, Option<u64>); 3] =
        [("compressed", true, None), ("split", false, Some(part)), ("both", true, Some(part))];
    for (name, compress, split_size) in forms {
        let name = format!("{name}.sluice");
        let model = converted(dir.path(), &name, |o| (o.compress, o.split_size) = (compress, split_size));
        assert_eq!(model.state_id(), plain.state_id());
        assert_eq!(model.volumes().len() > 1, split_size.is_some());
        assert!(split_size.is_none_or(|most| model.volumes().iter().all(|v| v.superblock().file_len <= most)));
        let experts = || model.extents().iter().filter(|e| e.kind == ExtentKind::Expert);
        assert!(experts().all(|e| (e.codec == Codec::Planes) == compress));
        if compress {
            let (stored, padded): (u64, u64) = experts().fold((0, 0), |(s, p), e| (s + e.stored_len, p + e.padded_len));
            // These experts are small, so whole pages lose some of the gain.
            assert!(stored * 100 <= padded * 80, "{stored} of {padded}");
        }
        // By any of its names, with all memory, and with so little that experts and dense parts are read again and again.
        let last = model.volumes().last().unwrap().path();
        assert!(run(last, None) == want, "{name}");
        let tight = least(last);
        let short = run(last, Some(tight + 4096));
        assert!((&short.0, &short.1) == (&want.0, &want.1), "{name} with {tight} bytes");
        assert!(short.2 > want.2, "experts were read again");
    }
}

fn upgraded(src: &Path, dst: &Path, options: UpgradeOptions) -> UpgradeSummary {
    let summary = upgrade(src, Some(dst), &options, &()).unwrap();
    assert!(summary.written);
    assert!(ModelFile::open(&summary.files[0]).unwrap().verify_all(&mut |_| ()).is_empty());
    summary
}

#[test]
fn rewriting_gives_what_converting_would() {
    let dir = tempfile::tempdir().unwrap();
    let plain = converted(dir.path(), "plain.sluice", |_| ());
    let part = plain.file_bytes() / 3;
    let both = converted(dir.path(), "both.sluice", |o| (o.compress, o.split_size) = (true, Some(part)));
    let compressed = converted(dir.path(), "compressed.sluice", |o| o.compress = true);
    let to = |name: &str| dir.path().join(name);
    let same =
        |a: &Path, b: &Path| assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} {}", a.display(), b.display());

    let (compress, as_it_is) = (Some(true), UpgradeOptions::default());
    let s = upgraded(plain.path(), &to("a.sluice"), UpgradeOptions { compress, ..as_it_is });
    same(&s.files[0], compressed.path());
    let s = upgraded(plain.path(), &to("b.sluice"), UpgradeOptions { compress, split_size: Some(part), ..as_it_is });
    assert_eq!(s.files.len(), both.volumes().len());
    assert_eq!(s.state_id, both.state_id().to_string());
    // Back to one file, with its compression kept and removed.
    let s = upgraded(both.volumes()[1].path(), &to("c.sluice"), as_it_is);
    same(&s.files[0], compressed.path());
    let s = upgraded(both.path(), &to("d.sluice"), UpgradeOptions { compress: Some(false), ..as_it_is });
    same(&s.files[0], plain.path());
    assert_eq!(s.state_id, both.state_id().to_string());

    // Nothing has to change, and nothing does.
    for (model, options) in [
        (&plain, as_it_is),
        (&plain, UpgradeOptions { compress: Some(false), ..as_it_is }),
        (&compressed, UpgradeOptions { compress, ..as_it_is }),
        (&both, UpgradeOptions { compress, split_size: Some(part), ..as_it_is }),
    ] {
        let before: Vec<PathBuf> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path()).collect();
        assert!(!upgrade(model.path(), None, &options, &()).unwrap().written);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before.len());
    }
    // Volumes are not replaced in place, and no other file without `overwrite`.
    assert!(upgrade(both.path(), None, &as_it_is, &()).unwrap_err().to_string().contains("several volumes"));
    let exists = upgrade(plain.path(), Some(&to("d.sluice")), &UpgradeOptions { compress, ..as_it_is }, &());
    assert!(exists.unwrap_err().to_string().contains("exists"));
    // A damaged extent ends the rewriting, and leaves no file.
    let damaged = to("damaged.sluice");
    let mut bytes = fs::read(plain.path()).unwrap();
    let at = plain.extents()[20].offset as usize;
    bytes[at] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let count = fs::read_dir(dir.path()).unwrap().count();
    let refused = upgrade(&damaged, None, &UpgradeOptions { compress, ..as_it_is }, &()).unwrap_err().to_string();
    assert!(refused.contains(&plain.extents()[20].name()), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), count);
}

/// The committed file of version 1 opens and runs, and still does after it was rewritten in place.
#[test]
fn version_1_runs_and_is_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.sluice");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../format/tests/data/v1-small.sluice");
    fs::copy(golden, &path).unwrap();
    let step = |path: &Path| {
        let mut engine = Engine::open(path, &EngineOptions { threads: Some(1), ..EngineOptions::default() }).unwrap();
        let mut sequence = engine.new_sequence();
        let mut logits = Vec::new();
        engine.forward(&mut sequence, &[1, 2, 3], &mut logits).unwrap();
        logits.iter().map(|l| l.to_bits()).collect::<Vec<_>>()
    };
    let before = ModelFile::open(&path).unwrap();
    let (old, state) = (step(&path), before.state_id());
    let summary = upgrade(&path, None, &UpgradeOptions::default(), &()).unwrap();
    assert!(summary.written && summary.from_version == 1);
    let model = ModelFile::open(&path).unwrap();
    assert_eq!((model.superblock().version, model.state_id()), (2, state));
    assert_eq!((model.tensors(), model.metadata()), (before.tensors(), before.metadata()));
    assert_eq!(step(&path), old);
    assert!(!upgrade(&path, None, &UpgradeOptions::default(), &()).unwrap().written);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

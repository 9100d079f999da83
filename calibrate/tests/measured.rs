//! Conversions that measure on the way.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_calibrate::{Measurement, TEXT, digest};
use sluice_converter::measure::{Inputs, Measure};
use sluice_converter::{ConvertError, Options, Plan, TypeChoice, convert_measured, plan};
use sluice_format::{ExtentKind, Importance, WeightType};
use sluice_model::{Engine, EngineOptions};
use sluice_text::Tokenizer;

const WINDOW: usize = 256;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/demo-model")
}

fn planned(ty: WeightType, measured: bool) -> Plan {
    let choice = TypeChoice::Type(ty);
    let measured = measured.then(|| digest(TEXT));
    plan(&fixture(), &Options { expert_type: choice, dense_type: choice, measured, ..Options::default() }).unwrap()
}

fn measurement(plan: &Plan) -> Measurement {
    Measurement::new(plan, TEXT).unwrap().expect("the fixture has a tokenizer")
}

/// Logits behind every token of a text, computed in windows.
fn rows(model: &Path, text: &str) -> Vec<Vec<f32>> {
    let options =
        EngineOptions { exact: true, no_calibration: true, context: Some(WINDOW), ..EngineOptions::default() };
    let mut engine = Engine::open(model, &options).unwrap();
    let ids = Tokenizer::of(engine.file().metadata()).unwrap().unwrap().encode(text, true).unwrap();
    let mut sequence = engine.new_sequence();
    let mut rows = Vec::new();
    for ids in ids.chunks(WINDOW) {
        sequence.clear();
        engine.forward_all(&mut sequence, ids, &mut |_, row| rows.push(log_probabilities(row))).unwrap();
    }
    rows
}

fn log_probabilities(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
    row.iter().map(|&l| l - max - sum.ln() as f32).collect()
}

/// Mean Kullback-Leibler divergence.
fn divergence(truth: &[Vec<f32>], other: &[Vec<f32>]) -> f64 {
    let one = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
        p.iter().zip(q).map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum()
    };
    truth.iter().zip(other).map(one).sum::<f64>() / truth.len() as f64
}

/// The built-in text has nothing of the plays that the model was trained on, and still tells which errors matter.
#[test]
fn what_is_measured_brings_the_model_nearer_to_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = fs::read_to_string(fixture().join("eval.txt")).unwrap();
    convert_measured(&planned(WeightType::F32, true), &path("f32"), None, &()).unwrap();
    let truth = rows(&path("f32"), &text);
    for ty in [WeightType::Q4, WeightType::Q3] {
        let (plain, measured) = (path(&format!("{ty}-plain")), path(&format!("{ty}")));
        convert_measured(&planned(ty, false), &plain, None, &()).unwrap();
        let plan = planned(ty, true);
        let mut measurement = measurement(&plan);
        convert_measured(&plan, &measured, Some(&mut measurement), &()).unwrap();
        let [before, after] = [plain, measured].map(|model| divergence(&truth, &rows(&model, &text)));
        println!("{ty}: divergence {before:.5} plainly, {after:.5} measured");
        assert!(after < 0.95 * before, "{ty}: {after} beside {before}");
        let importance = measurement.importance(&plan).unwrap();
        importance.save(&path("importance")).unwrap();
        let loaded = Importance::load(&path("importance"), plan.spec()).unwrap();
        assert!(loaded.matrices().keys().any(|key| key.kind == ExtentKind::Head));
        assert_eq!(loaded.digest(), importance.digest());
    }
}

/// Ends a conversion before a layer.
struct Failing {
    inner: Measurement,
    at: usize,
}

impl Measure for Failing {
    fn tokens(&self) -> &[u32] {
        self.inner.tokens()
    }

    fn begin(&mut self, states: Vec<f32>) {
        self.inner.begin(states);
    }

    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>> {
        if layer == self.at { Err("enough".into()) } else { self.inner.layer(layer, file) }
    }
}

#[test]
fn the_file_depends_neither_on_interruptions_nor_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let plan = planned(WeightType::Q3, true);
    convert_measured(&plan, &path("whole"), Some(&mut measurement(&plan)), &()).unwrap();
    let mut failing = Failing { inner: measurement(&plan), at: plan.spec().layers.len() - 1 };
    let failed = convert_measured(&plan, &path("cut"), Some(&mut failing), &());
    assert!(matches!(failed, Err(ConvertError::Measure { .. })), "{failed:?}");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let summary = pool.install(|| convert_measured(&plan, &path("cut"), Some(&mut measurement(&plan)), &())).unwrap();
    assert!(summary.resumed_extents > 0);
    assert!(fs::read(path("whole")).unwrap() == fs::read(path("cut")).unwrap(), "the files differ");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_plan_that_is_measured_needs_somebody_to_measure() {
    let folder = tempfile::tempdir().unwrap();
    let (measured, plain) = (planned(WeightType::Q4, true), planned(WeightType::Q4, false));
    assert!(measured.is_measured() && !plain.is_measured() && !planned(WeightType::Q8, true).is_measured());
    let refused = convert_measured(&measured, &folder.path().join("a"), None, &());
    assert!(matches!(refused, Err(ConvertError::Options(_))));
    let refused = convert_measured(&plain, &folder.path().join("a"), Some(&mut measurement(&measured)), &());
    assert!(matches!(refused, Err(ConvertError::Options(_))));
}

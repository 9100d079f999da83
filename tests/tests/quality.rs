//! The cost of quantising, for a trained model and a text on which it was not trained.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_converter::{Options, TypeChoice, convert};
use sluice_format::WeightType;
use sluice_lab::calibrate::Calibration;
use sluice_model::{Control, Engine, EngineOptions, KvType, Span, Want};
use sluice_tests::{Converted, fixture};
use sluice_text::Tokenizer;
use tempfile::TempDir;

const MODEL: &str = "demo-model";
const WINDOW: usize = 256;

/// Logits after every token of a text, `[tokens, vocabulary]`, computed in windows.
struct Scores {
    ids: Vec<u32>,
    rows: Vec<Vec<f32>>,
}

fn text(name: &str) -> String {
    fs::read_to_string(fixture(MODEL).join(name)).unwrap()
}

/// The text in two parts, cut at a line.
fn halves(text: &str) -> (&str, &str) {
    text.split_at(text[..text.len() / 2].rfind('\n').unwrap() + 1)
}

fn scores(model: &Path, text: &str, exact: bool) -> Scores {
    scores_with(model, text, &EngineOptions { exact, ..EngineOptions::default() })
}

fn scores_with(model: &Path, text: &str, options: &EngineOptions) -> Scores {
    let mut engine = Engine::open(model, options).unwrap();
    let ids = Tokenizer::of(engine.file().metadata()).unwrap().unwrap().encode(text, true).unwrap();
    let mut sequence = engine.new_sequence();
    let mut rows = Vec::new();
    for ids in ids.chunks(WINDOW) {
        sequence.clear();
        engine.forward_all(&mut sequence, ids, &mut |_, row| rows.push(row.to_vec())).unwrap();
    }
    Scores { ids, rows }
}

fn log_probabilities(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    row.iter().map(|&l| f64::from(l) - max - sum.ln()).collect()
}

impl Scores {
    fn perplexity(&self) -> f64 {
        let scored = || (1..self.ids.len()).filter(|i| i % WINDOW != 0);
        let nll: f64 = scored().map(|i| -log_probabilities(&self.rows[i - 1])[self.ids[i] as usize]).sum();
        (nll / scored().count() as f64).exp()
    }

    /// Mean Kullback-Leibler divergence from another model's predictions.
    fn divergence(&self, truth: &Scores) -> f64 {
        let one = |(truth, other): (&Vec<f32>, &Vec<f32>)| -> f64 {
            let (p, q) = (log_probabilities(truth), log_probabilities(other));
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        truth.rows.iter().zip(&self.rows).map(one).sum::<f64>() / self.rows.len() as f64
    }
}

/// Converts experts to one type and everything else to another.
fn quantised(folder: &TempDir, types: [TypeChoice; 2], importance: Option<&Path>) -> PathBuf {
    let path = folder.path().join("quantised.sluice");
    let [expert_type, dense_type] = types;
    let importance = importance.map(Path::to_owned);
    let options = Options { expert_type, dense_type, importance, overwrite: true, ..Options::default() };
    convert(&fixture(MODEL), &path, &options, &()).unwrap();
    path
}

#[test]
fn perplexity_stays_near_that_of_f32() {
    let (text, folder) = (text("eval.txt"), tempfile::tempdir().unwrap());
    let f32_model = Converted::new(MODEL, Some(WeightType::F32));
    let truth = scores(&f32_model.path, &text, true);
    let reference = truth.perplexity();
    let bounds = [(WeightType::Q8, 0.001), (WeightType::Q4, 0.015), (WeightType::Q3, 0.05), (WeightType::Q2, 0.12)];
    for (ty, bound) in bounds {
        let model = quantised(&folder, [TypeChoice::Type(ty); 2], None);
        for exact in [false, true] {
            let scores = scores(&model, &text, exact);
            let (perplexity, divergence) = (scores.perplexity(), scores.divergence(&truth));
            println!("{ty}, exact {exact}: {perplexity:.4} beside {reference:.4}, divergence {divergence:.5}");
            assert!(perplexity <= reference * (1.0 + bound), "{ty}: {perplexity} beside {reference}");
        }
    }
}

#[test]
fn narrow_keys_and_values_cost_little() {
    let text = text("eval.txt");
    let model = Converted::new(MODEL, Some(WeightType::F32));
    let with = |kv_type| scores_with(&model.path, &text, &EngineOptions { exact: true, kv_type, ..Default::default() });
    let truth = with(KvType::F32);
    let reference = truth.perplexity();
    for (kv_type, bound, most) in [(KvType::F16, 0.0005, 2e-4), (KvType::Bf16, 0.002, 5e-3), (KvType::Q8, 0.002, 8e-3)]
    {
        let scores = with(kv_type);
        let (perplexity, divergence) = (scores.perplexity(), scores.divergence(&truth));
        println!("{kv_type}: {perplexity:.4} beside {reference:.4}, divergence {divergence:.2e}");
        assert!((perplexity / reference - 1.0).abs() < bound, "{kv_type}: {perplexity} beside {reference}");
        assert!(divergence > 0.0 && divergence < most, "{kv_type}: {divergence}");
    }
}

/// Measures importance on a text and saves the result.
fn calibrate(model: &Path, text: &str, out: &Path) {
    let mut engine = Engine::open(model, &EngineOptions { exact: true, ..EngineOptions::default() }).unwrap();
    let ids = Tokenizer::of(engine.file().metadata()).unwrap().unwrap().encode(text, true).unwrap();
    let calibration = Arc::new(Calibration::new());
    let mut sequence = engine.new_sequence();
    for ids in ids.chunks(WINDOW) {
        sequence.clear();
        let mut control = Control { inputs: Some(calibration.clone()), ..Control::default() };
        let span = Span::prompt(&mut sequence, ids, Want::Nothing);
        engine.step(&mut [span], &mut control, &mut |_, _, _| ()).unwrap();
    }
    calibration.importance(engine.spec(), ids.len() as u64).unwrap().save(out).unwrap();
}

/// Importance measured on another play improves the measured text, with the usual arithmetic and with f32, and whether or not the dense part
/// is quantised too.
#[test]
fn importance_from_another_play_lowers_perplexity() {
    let (text, play, folder) = (text("eval.txt"), text("calibration.txt"), tempfile::tempdir().unwrap());
    let f32_model = Converted::new(MODEL, Some(WeightType::F32));
    let imatrix = folder.path().join("imatrix.bin");
    calibrate(&f32_model.path, &play, &imatrix);
    let truth = scores(&f32_model.path, &text, true);
    for ty in [WeightType::Q4, WeightType::Q3] {
        for (dense, exact) in [(TypeChoice::Keep, true), (TypeChoice::Type(ty), false)] {
            let [plain, weighted] = [None, Some(imatrix.as_path())].map(|importance| {
                let path = quantised(&folder, [TypeChoice::Type(ty), dense], importance);
                let scores = scores(&path, &text, exact);
                (scores.perplexity(), scores.divergence(&truth))
            });
            println!("{ty}, dense {dense:?}: {plain:?} without, {weighted:?} with; f32 {}", truth.perplexity());
            assert!(weighted.0 < plain.0 && weighted.1 < plain.1, "{ty}, dense {dense:?}");
        }
    }
}

/// Importance from a few pages, in which an expert sees some 300 tokens, brings the model's predictions nearer to f32. Their
/// perplexity is not a good measure: there are too few tokens.
#[test]
fn importance_from_a_few_pages_lowers_divergence() {
    let (text, folder) = (text("eval.txt"), tempfile::tempdir().unwrap());
    let f32_model = Converted::new(MODEL, Some(WeightType::F32));
    let imatrix = folder.path().join("imatrix.bin");
    let (first, second) = halves(&text);
    for (seen, unseen, ty) in [(first, second, WeightType::Q4), (second, first, WeightType::Q3)] {
        calibrate(&f32_model.path, seen, &imatrix);
        let truth = scores(&f32_model.path, unseen, true);
        let [plain, weighted] = [None, Some(imatrix.as_path())].map(|importance| {
            let path = quantised(&folder, [TypeChoice::Type(ty); 2], importance);
            let scores = scores(&path, unseen, true);
            (scores.divergence(&truth), scores.perplexity())
        });
        println!("{ty}: {plain:?} without, {weighted:?} with; f32 {}", truth.perplexity());
        assert!(weighted.0 < plain.0, "{ty}");
    }
}

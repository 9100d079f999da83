//! Conversions that measure the model.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_calibrate::{Effort, Measurement, TEXT, digest};
use sluice_converter::measure::{Inputs, Measure};
use sluice_converter::{ConvertError, Options, Plan, TypeChoice, convert_measured, plan};
use sluice_format::{ExtentKind, Importance, WeightType};
use sluice_model::{Engine, EngineOptions};
use sluice_text::Tokenizer;

const WINDOW: usize = 256;
/// The system's error for a full drive, on Linux and macOS.
const ENOSPC: i32 = 28;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/demo-model")
}

fn planned(ty: WeightType, measured: bool) -> Plan {
    planned_of(&fixture(), ty, measured)
}

fn planned_of(source: &Path, ty: WeightType, measured: bool) -> Plan {
    let choice = TypeChoice::Type(ty);
    let measured = measured.then(|| digest(TEXT, Effort::Default));
    plan(source, &Options { expert_type: choice, dense_type: choice, measured, ..Options::default() }).unwrap()
}

/// A few tokens: longer texts would show no more about interruptions.
fn few() -> &'static str {
    let (end, _) = TEXT.match_indices("\n\n").nth(4).expect("the text has paragraphs");
    &TEXT[..end]
}

fn measurement(plan: &Plan, text: &str) -> Measurement {
    let measurement = Measurement::new(plan, text, Effort::Default).unwrap();
    measurement.expect("the fixture has a tokenizer").keeping_means()
}

/// Logits after every token of a text, computed in windows.
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

/// The built-in text contains nothing of the plays on which the model was trained, and still shows which errors matter.
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
        let mut measurement = measurement(&plan, TEXT);
        convert_measured(&plan, &measured, Some(&mut measurement), &()).unwrap();
        let [before, after] = [plain, measured].map(|model| divergence(&truth, &rows(&model, &text)));
        println!("{ty}: divergence {before:.5} plainly, {after:.5} measured");
        assert!(after < 0.95 * before, "{ty}: {after} beside {before}");
        let importance = measurement.importance().unwrap();
        importance.save(&path("importance")).unwrap();
        let loaded = Importance::load(&path("importance"), plan.spec()).unwrap();
        assert!(loaded.matrices().keys().any(|key| key.kind == ExtentKind::Head));
        assert_eq!(loaded.digest(), importance.digest());
    }
}

/// The golden checkpoint of Qwen3.8-Flash-Next, whose layers have tables of n-grams and several residual streams, with a token for
/// each printable character.
fn model_of_ngrams(to: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/qwen4_exp");
    fs::create_dir(to).unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden.join(name), to.join(name)).unwrap();
    }
    let characters = ('!'..='~').chain(['\u{120}', '\u{10a}']).enumerate();
    let vocab: Vec<String> = characters.map(|(id, character)| format!("{:?}: {id}", character.to_string())).collect();
    let bytes = r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true}"#;
    let tokenizer = format!(
        r#"{{"version": "1.0", "added_tokens": [], "pre_tokenizer": {bytes}, "decoder": {bytes},
            "model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#,
        vocab.join(", ")
    );
    fs::write(to.join("tokenizer.json"), tokenizer).unwrap();
}

/// A layer's table is written to its temporary file, and the layer's results continue to the next.
#[test]
fn layers_with_tables_of_ngrams_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = path("source");
    model_of_ngrams(&source);
    let text = "A measurement takes the states of a text through one layer after the other. ".repeat(40);
    convert_measured(&planned_of(&source, WeightType::F32, false), &path("f32"), None, &()).unwrap();
    let plan = planned_of(&source, WeightType::Q4, true);
    let mut measurement = measurement(&plan, &text);
    convert_measured(&plan, &path("q4"), Some(&mut measurement), &()).unwrap();
    let importance = measurement.importance().unwrap();
    let measured = |layer: u32, name: &str| {
        importance.matrices().iter().any(|(key, means)| key.layer == layer && key.name == name && means.tokens > 0)
    };
    for layer in 0..4 {
        assert!(measured(layer, "o"), "layer {layer}");
        assert!(measured(layer, "ngram_key") == (layer % 2 == 0), "layer {layer}");
    }
    // Rounded where it costs least, the model predicts nearly the same.
    let divergence = divergence(&rows(&path("f32"), &text), &rows(&path("q4"), &text));
    assert!(divergence < 0.05, "{divergence}");
}

/// Ends a conversion before a layer, and counts those that are measured.
struct Failing {
    inner: Measurement,
    at: usize,
    /// The error with which the layer ends.
    problem: fn() -> Box<dyn Error + Send + Sync>,
    measured: Vec<usize>,
    /// The plan's figure for the space that measuring takes on the drive.
    scratch: u64,
    /// How much more it claims to keep than it does.
    more: u64,
}

impl Failing {
    fn new(plan: &Plan, at: usize) -> Self {
        let inner = measurement(plan, few());
        let scratch = plan.measuring_bytes(inner.kept_bytes());
        Failing { inner, at, problem: || "enough".into(), measured: Vec::new(), scratch, more: 0 }
    }
}

impl Measure for Failing {
    fn tokens(&self) -> &[u32] {
        self.inner.tokens()
    }

    fn begin(&mut self, states: Vec<f32>) {
        self.inner.begin(states);
    }

    fn layer(&mut self, layer: usize, file: &Path) -> Result<Arc<dyn Inputs>, Box<dyn Error + Send + Sync>> {
        if layer == self.at {
            return Err((self.problem)());
        }
        self.measured.push(layer);
        assert!(file.metadata()?.len() + 2 * self.inner.kept_bytes() <= self.scratch, "layer {layer}");
        self.inner.layer(layer, file)
    }

    fn kept_bytes(&self) -> u64 {
        self.inner.kept_bytes() + self.more
    }

    fn keep(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        let kept = self.inner.keep()?;
        assert!(kept.len() as u64 <= self.kept_bytes());
        Ok(kept)
    }

    fn go_on(&mut self, kept: &[u8]) -> bool {
        self.inner.go_on(kept)
    }
}

/// On one thread, to find out whether the file depends on threads.
fn resumed(plan: &Plan, path: &Path, measure: &mut Failing) -> usize {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| convert_measured(plan, path, Some(measure), &())).unwrap().resumed_extents
}

#[test]
fn the_file_depends_neither_on_interruptions_nor_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let plan = planned(WeightType::Q3, true);
    let layers = plan.spec().layers.len();
    let mut whole = measurement(&plan, few());
    convert_measured(&plan, &path("whole"), Some(&mut whole), &()).unwrap();
    for at in 0..layers {
        let failed = convert_measured(&plan, &path("cut"), Some(&mut Failing::new(&plan, at)), &());
        assert!(matches!(failed, Err(ConvertError::Measure { .. })), "{failed:?}");
        assert!(path("cut.partial.states").exists());
        let mut going_on = Failing::new(&plan, layers);
        let kept = resumed(&plan, &path("cut"), &mut going_on);
        assert!(kept > 0);
        // What was measured is not measured again, but nothing of it is missing.
        assert_eq!(going_on.measured, (at..layers).collect::<Vec<_>>());
        assert_eq!(going_on.inner.importance().unwrap().digest(), whole.importance().unwrap().digest());
        assert!(fs::read(path("whole")).unwrap() == fs::read(path("cut")).unwrap(), "the files differ");
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        fs::remove_file(path("cut")).unwrap();
    }
}

#[test]
fn states_that_are_damaged_are_measured_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let plan = planned(WeightType::Q3, true);
    let layers = plan.spec().layers.len();
    convert_measured(&plan, &path("whole"), Some(&mut measurement(&plan, few())), &()).unwrap();
    let whole = fs::read(path("whole")).unwrap();
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes[100] ^= 1,
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.clear(),
        // The number of its layer.
        |bytes| bytes[24] ^= 1,
    ];
    for damage in damages {
        convert_measured(&plan, &path("cut"), Some(&mut Failing::new(&plan, layers - 1)), &()).unwrap_err();
        let states = path("cut.partial.states");
        let mut bytes = fs::read(&states).unwrap();
        damage(&mut bytes);
        fs::write(&states, bytes).unwrap();
        let mut again = Failing::new(&plan, layers);
        resumed(&plan, &path("cut"), &mut again);
        assert_eq!(again.measured, (0..layers).collect::<Vec<_>>());
        assert!(fs::read(path("cut")).unwrap() == whole && !states.exists());
        fs::remove_file(path("cut")).unwrap();
    }
    // Those of another plan are removed with its journal.
    convert_measured(&planned(WeightType::Q4, true), &path("cut"), Some(&mut Failing::new(&plan, 1)), &()).unwrap_err();
    let mut other = Failing::new(&plan, layers);
    resumed(&plan, &path("cut"), &mut other);
    assert_eq!(other.measured.len(), layers);
    assert!(fs::read(path("cut")).unwrap() == whole);
}

/// A copy of the fixture.
fn copied(to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(fixture()).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A copy of the fixture in `source`, whose conversion to `cut` was interrupted before its last layer; returns the number of
/// layers.
fn interrupted(folder: &Path) -> usize {
    let source = folder.join("source");
    copied(&source);
    let plan = planned_of(&source, WeightType::Q3, true);
    let layers = plan.spec().layers.len();
    convert_measured(&plan, &folder.join("cut"), Some(&mut Failing::new(&plan, layers - 1)), &()).unwrap_err();
    layers
}

/// The rounding of a matrix depends on all weights before it, and so does what is kept of an interrupted conversion.
#[test]
fn weights_that_have_changed_change_what_was_rounded_behind_them() {
    for tenths in [1, 4, 7] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let layers = interrupted(folder.path());
        let weights = path("source").join("model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        let at = bytes.len() / 10 * tenths / 8 * 8;
        let (first, second) = bytes[at..at + 1024].split_at_mut(512);
        first.swap_with_slice(second);
        fs::write(&weights, bytes).unwrap();
        let now = planned_of(&path("source"), WeightType::Q3, true);
        resumed(&now, &path("cut"), &mut Failing::new(&now, layers));
        convert_measured(&now, &path("whole"), Some(&mut measurement(&now, few())), &()).unwrap();
        assert!(fs::read(path("cut")).unwrap() == fs::read(path("whole")).unwrap(), "changed at {tenths} tenths");
    }
}

/// Tokens are measured: a change that gives different tokens for the text changes the measurement, and nothing else does.
#[test]
fn with_other_tokens_a_conversion_begins_anew() {
    let replace = |path: &Path, from: &str, to: &str| {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{} lacks {from}", path.display());
        fs::write(path, text.replace(from, to)).unwrap();
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let layers = interrupted(folder.path());
    let tokenizer = path("source").join("tokenizer.json");
    // The ids of two letters are exchanged.
    for [from, to] in [["\"e\": ", "\"?e\": "], ["\"z\": ", "\"e\": "], ["\"?e\": ", "\"z\": "]] {
        replace(&tokenizer, from, to);
    }
    let now = planned_of(&path("source"), WeightType::Q3, true);
    assert_eq!(resumed(&now, &path("cut"), &mut Failing::new(&now, layers)), 0);

    // A template is carried, and changes no token.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let layers = interrupted(folder.path());
    fs::write(path("source").join("chat_template.jinja"), "{{ messages[0]['content'] }}").unwrap();
    let now = planned_of(&path("source"), WeightType::Q3, true);
    let mut going_on = Failing::new(&now, layers);
    assert!(resumed(&now, &path("cut"), &mut going_on) > 0);
    assert_eq!(going_on.measured, [layers - 1]);
    convert_measured(&now, &path("whole"), Some(&mut measurement(&now, few())), &()).unwrap();
    assert!(fs::read(path("cut")).unwrap() == fs::read(path("whole")).unwrap());
}

/// Without room for a layer or for the data to keep, the conversion is not lost, and reports the reason.
#[test]
fn a_drive_that_becomes_full_while_measuring_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut");
    let plan = planned(WeightType::Q3, true);
    let layers = plan.spec().layers.len();
    let problem = || std::io::Error::from_raw_os_error(ENOSPC).into();
    let mut full = Failing { problem, ..Failing::new(&plan, layers - 1) };
    let error = convert_measured(&plan, &path, Some(&mut full), &()).unwrap_err();
    assert!(matches!(error, ConvertError::Full { .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("the same command continues") && !said.contains("--no-importance"), "{said}");
    let mut again = Failing::new(&plan, layers);
    assert!(resumed(&plan, &path, &mut again) > 0);
    assert_eq!(again.measured, [layers - 1]);
}

/// Leftovers of another conversion are removed, whatever was requested in between.
#[test]
fn nothing_is_left_of_a_conversion_that_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    interrupted(folder.path());
    // The files that a kill leaves, in the middle of a layer and of the kept data.
    fs::copy(path("cut.partial"), path("cut.partial.layer")).unwrap();
    fs::copy(path("cut.partial.states"), path("cut.partial.states.new")).unwrap();
    // Files of others stay.
    let strange = ["cut.partial.journal.old", "cut.partial-2", "cut.partial-00099", "other.partial.states"];
    strange.iter().for_each(|name| fs::write(path(name), "a novel").unwrap());
    convert_measured(&planned_of(&path("source"), WeightType::Q3, false), &path("cut"), None, &()).unwrap();
    let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(
        left,
        ["cut", "cut.partial-00099", "cut.partial-2", "cut.partial.journal.old", "other.partial.states", "source"]
    );
    assert!(strange.iter().all(|name| fs::read_to_string(path(name)).unwrap() == "a novel"));
}

#[test]
fn what_lies_where_measuring_writes_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (plan, plain) = (planned(WeightType::Q3, true), planned(WeightType::Q3, false));
    fs::write(path("precious"), "a novel").unwrap();
    for place in ["layer", "states", "states.new"] {
        let of = |name: &str| path(&format!("{name}.partial.{place}"));
        std::os::unix::fs::symlink(path("precious"), of("a")).unwrap();
        fs::write(of("c"), "a novel").unwrap();
        for name in ["a", "c"] {
            let refused = convert_measured(&plan, &path(name), Some(&mut measurement(&plan, few())), &());
            assert!(matches!(refused, Err(ConvertError::InTheWay { .. })), "{place}: {refused:?}");
            assert!(!path(&format!("{name}.partial")).exists(), "nothing was begun");
            // A conversion without measurement does not need the space.
            convert_measured(&plain, &path(name), None, &()).unwrap();
            assert_eq!(fs::read_to_string(of(name)).unwrap(), "a novel");
            fs::remove_file(path(name)).unwrap();
            fs::remove_file(of(name)).unwrap();
        }
        fs::hard_link(path("precious"), of("b")).unwrap();
        let refused = convert_measured(&plan, &path("b"), Some(&mut measurement(&plan, few())), &());
        assert!(matches!(refused, Err(ConvertError::InTheWay { .. })), "{place}: {refused:?}");
        fs::remove_file(of("b")).unwrap();
    }
    assert_eq!(fs::read_to_string(path("precious")).unwrap(), "a novel");
}

#[test]
fn a_drive_without_room_to_measure_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    for compress in [false, true] {
        let choice = TypeChoice::Type(WeightType::Q4);
        let options =
            Options { expert_type: choice, dense_type: choice, measured: Some(1), compress, ..Options::default() };
        let plan = plan(&fixture(), &options).unwrap();
        let mut measure = Failing { more: 1 << 60, ..Failing::new(&plan, 0) };
        let refused = convert_measured(&plan, &folder.path().join("a"), Some(&mut measure), &()).unwrap_err();
        assert!(refused.to_string().contains("--no-importance"), "{refused}");
        let ConvertError::NoSpace { needed, scratch, available, .. } = refused else { panic!("{refused}") };
        assert!(scratch >= 2 << 60 && needed >= scratch && available < needed);
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing is left behind");
    }
}

#[test]
fn a_plan_that_is_measured_needs_somebody_to_measure() {
    let folder = tempfile::tempdir().unwrap();
    let (measured, plain) = (planned(WeightType::Q4, true), planned(WeightType::Q4, false));
    assert!(measured.is_measured() && !plain.is_measured() && !planned(WeightType::Q8, true).is_measured());
    let refused = convert_measured(&measured, &folder.path().join("a"), None, &());
    assert!(matches!(refused, Err(ConvertError::Options(_))));
    let refused = convert_measured(&plain, &folder.path().join("a"), Some(&mut measurement(&measured, few())), &());
    assert!(matches!(refused, Err(ConvertError::Options(_))));
}

//! Multi-token prediction: the layer after the decoder gives the reference's results, with the same bits however its tokens are
//! divided, and costs nothing if it is not opened.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sluice_converter::{Options, TypeChoice, convert};
use sluice_format::{ExtentKind, ModelFile, WeightType};
use sluice_model::memory::{Demand, MemoryPlan};
use sluice_model::{
    Control, Engine, EngineOptions, KvType, ModelError, Phase, PredictionSequence, PredictionSpan, RuntimeError, Span,
    Want,
};
use sluice_tests::{Converted, Golden, fixture, relative_error};
use tempfile::TempDir;

fn options(budget: Option<u64>) -> EngineOptions {
    EngineOptions { exact: true, budget, threads: Some(2), prediction: true, ..EngineOptions::default() }
}

/// The inputs of the head for each token.
fn head_inputs(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let mut inputs = Vec::new();
    let mut observer = |rows: &[f32]| inputs.extend_from_slice(rows);
    let mut control = Control { head_inputs: Some(&mut observer), ..Control::default() };
    let mut sequence = engine.new_sequence();
    engine.step(&mut [Span::prompt(&mut sequence, tokens, Want::Last)], &mut control, &mut |_, _, _| ()).unwrap();
    inputs
}

/// Appends tokens to a sequence of the prediction layer; returns the inputs of its head, and logits.
fn predict(
    engine: &mut Engine,
    sequence: &mut PredictionSequence,
    tokens: &[u32],
    head_inputs: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (mut hidden, mut logits) = (Vec::new(), Vec::new());
    let mut observer = |rows: &[f32]| hidden.extend_from_slice(rows);
    let mut control = Control { head_inputs: Some(&mut observer), ..Control::default() };
    let span = PredictionSpan { sequence, tokens, head_inputs, phase: Phase::Prompt, logits: Want::All };
    engine.predict(&mut [span], &mut control, &mut |_, _, row| logits.extend_from_slice(row)).unwrap();
    (hidden, logits)
}

/// All predictions of a prompt, `step` tokens at a time.
fn predictions(engine: &mut Engine, prompt: &[u32], inputs: &[f32], step: usize) -> (Vec<f32>, Vec<f32>) {
    let width = engine.spec().hidden_size;
    let mut sequence = engine.new_prediction_sequence().unwrap();
    let (mut hidden, mut logits) = (Vec::new(), Vec::new());
    for (tokens, inputs) in prompt[1..].chunks(step).zip(inputs.chunks(step * width)) {
        let found = predict(engine, &mut sequence, tokens, &inputs[..tokens.len() * width]);
        hidden.extend(found.0);
        logits.extend(found.1);
    }
    assert_eq!(sequence.tokens(), &prompt[1..]);
    (hidden, logits)
}

/// A copy of a golden checkpoint, with the prediction layer of `fixtures/mtp` if it has one there.
fn checkpoint(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("golden").join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let mtp = fixture("mtp").join(name).join("mtp.safetensors");
    if mtp.exists() {
        add_file(folder.path(), &mtp);
    }
    folder
}

/// Names of the tensors of a safetensors file.
fn tensors(path: &Path) -> Vec<String> {
    let header = header(&fs::read(path).unwrap());
    header.as_object().unwrap().keys().filter(|name| *name != "__metadata__").cloned().collect()
}

fn header(bytes: &[u8]) -> Value {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + len]).unwrap()
}

/// Adds a file to a checkpoint and its tensors to the index.
fn add_file(folder: &Path, file: &Path) {
    let index = folder.join("model.safetensors.index.json");
    let single = folder.join("model.safetensors");
    let mut map = match fs::read(&index) {
        Ok(bytes) => serde_json::from_slice::<Value>(&bytes).unwrap(),
        Err(_) => {
            let of_single = tensors(&single).into_iter().map(|name| (name, json!("model-1.safetensors")));
            let map: serde_json::Map<String, Value> = of_single.collect();
            fs::rename(&single, folder.join("model-1.safetensors")).unwrap();
            json!({ "metadata": {}, "weight_map": map })
        }
    };
    fs::copy(file, folder.join("model-mtp.safetensors")).unwrap();
    for name in tensors(file) {
        map["weight_map"][name] = json!("model-mtp.safetensors");
    }
    fs::write(&index, map.to_string()).unwrap();
}

/// Changes the bytes of a tensor, in any file.
fn change_tensor(folder: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") || path.ends_with("golden.safetensors") {
            continue;
        }
        let mut bytes = fs::read(&path).unwrap();
        let header = header(&bytes);
        let Some(tensor) = header.get(name) else { continue };
        let base = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let at = |i: usize| base + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        change(&mut bytes[at(0)..at(1)]);
        return fs::write(&path, bytes).unwrap();
    }
    panic!("no tensor {name}");
}

/// The golden results of the prediction layer.
fn golden(name: &str) -> Golden {
    let own = fixture("mtp").join(name);
    if own.exists() { Golden::load(&own.to_string_lossy()) } else { Golden::load(name) }
}

fn converted(folder: &TempDir, ty: Option<WeightType>) -> Converted {
    Converted::new(&folder.path().to_string_lossy(), ty)
}

fn check(name: &str) {
    let folder = checkpoint(name);
    let model = converted(&folder, None);
    let golden = golden(name);
    let prompt = golden.ids("input_ids");
    let mut engine = model.open(&options(None));
    assert!(engine.predicts() && engine.spec().prediction_layer() == Some(engine.spec().layers.len()));
    let inputs = head_inputs(&mut engine, &prompt);
    let error = relative_error(&inputs, &Golden::load(name).array("hidden.final").data);
    assert!(error < 1e-4, "{name}: what the head sees differs by {error:e}");

    let (hidden, logits) = predictions(&mut engine, &prompt, &inputs, prompt.len());
    let [of_hidden, of_logits] = [(&hidden, "mtp.hidden"), (&logits, "mtp.logits")].map(|(found, array)| {
        let error = relative_error(found, &golden.array(array).data);
        assert!(error < 1e-4, "{name}: {array} differs by {error:e}");
        error
    });
    println!("{name}: relative error of hidden states {of_hidden:.1e}, of logits {of_logits:.1e}");
    for step in [1, 5] {
        let again = predictions(&mut engine, &prompt, &inputs, step);
        assert!(again == (hidden.clone(), logits.clone()), "{name}: {step} tokens at a time give other bits");
    }
    let options = EngineOptions { threads: Some(1), ..options(Some(model.least_budget_for(&options(None)))) };
    let mut engine = model.open(&options);
    assert_eq!(head_inputs(&mut engine, &prompt), inputs, "{name}, streamed");
    let streamed = predictions(&mut engine, &prompt, &inputs, 7);
    assert!(streamed == (hidden, logits), "{name}: streaming gives other bits");
}

#[test]
fn deepseek_v3() {
    check("deepseek_v3");
}

#[test]
fn glm4_moe() {
    check("glm4_moe");
}

#[test]
fn qwen3_next() {
    check("qwen3_next");
}

#[test]
fn qwen3_5_moe() {
    check("qwen3_5_moe");
}

#[test]
fn sequences_share_a_step_go_back_and_fork() {
    let folder = checkpoint("glm4_moe");
    let model = converted(&folder, Some(WeightType::Q8));
    let prompt = golden("glm4_moe").ids("input_ids");
    let mut engine = model.open(&EngineOptions { exact: false, sequences: Some(3), ..options(None) });
    let width = engine.spec().hidden_size;
    let inputs = head_inputs(&mut engine, &prompt);
    let (_, all) = predictions(&mut engine, &prompt, &inputs, prompt.len());
    let vocab = engine.spec().vocab_size;
    let tokens = &prompt[1..];

    let mut first = engine.new_prediction_sequence().unwrap();
    let mut second = engine.new_prediction_sequence().unwrap();
    predict(&mut engine, &mut second, &tokens[..4], &inputs[..4 * width]);
    // A decoder's step in between makes no difference.
    head_inputs(&mut engine, &prompt[..3]);
    let spans = |sequence, at: std::ops::Range<usize>, phase| PredictionSpan {
        sequence,
        tokens: &tokens[at.clone()],
        head_inputs: &inputs[at.start * width..at.end * width],
        phase,
        logits: Want::Last,
    };
    let mut rows = Vec::new();
    let mut both = [spans(&mut first, 0..9, Phase::Prompt), spans(&mut second, 4..6, Phase::Draft)];
    engine
        .predict(&mut both, &mut Control::default(), &mut |span, token, row| rows.push((span, token, row.to_vec())))
        .unwrap();
    assert!(rows == [(0, 8, all[8 * vocab..9 * vocab].to_vec()), (1, 1, all[5 * vocab..6 * vocab].to_vec())]);

    let mut fork = first.fork();
    assert_eq!(first.rewind_to(5).unwrap(), 5);
    assert!(first.rewind_to(6).is_err());
    for sequence in [&mut first, &mut fork] {
        let from = sequence.position();
        let (_, logits) = predict(&mut engine, sequence, &tokens[from..12], &inputs[from * width..12 * width]);
        assert!(logits == all[from * vocab..12 * vocab], "from {from}");
    }
    engine.release_idle();
    first.clear();
    let (_, logits) = predict(&mut engine, &mut first, &tokens[..2], &inputs[..2 * width]);
    assert!(logits == all[..2 * vocab], "after a rest");
}

#[test]
fn its_own_embedding_and_head_are_used_where_they_are_others() {
    let name = "deepseek_v3";
    let prompt = golden(name).ids("input_ids");
    let mut shared = converted(&checkpoint(name), None).open(&options(None));
    let (width, vocab) = (shared.spec().hidden_size, shared.spec().vocab_size);
    let inputs = head_inputs(&mut shared, &prompt);
    let next = |ids: &[u32]| ids.iter().map(|&id| (id + 1) % vocab as u32).collect::<Vec<_>>();
    let (_, expected) = predictions(&mut shared, &next(&prompt), &inputs, 8);

    let folder = checkpoint(name);
    // Row `id` of the layer's own embedding is row `id + 1` of the model's; its own head is twice the model's.
    change_tensor(folder.path(), "model.layers.3.embed_tokens.weight", |bytes| bytes.rotate_left(2 * width));
    change_tensor(folder.path(), "model.layers.3.shared_head.head.weight", |bytes| {
        let doubled = |x: u16| if x & 0x7f80 == 0 { x } else { x + 0x80 };
        bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = doubled(u16::from_le_bytes(*b)).to_le_bytes());
    });
    let model = converted(&folder, None);
    let mut engine = model.open(&options(None));
    let of_spec = engine.spec().prediction.clone().unwrap();
    assert!(of_spec.own_embedding && of_spec.own_head);
    assert_eq!(engine.file().parts_of(ExtentKind::Head, 3).count(), 1);
    assert!(head_inputs(&mut engine, &prompt) == inputs, "the decoder has the model's");
    let (_, found) = predictions(&mut engine, &prompt, &inputs, 8);
    assert!(found.iter().zip(&expected).all(|(found, expected)| *found == 2.0 * expected), "the same bits, doubled");
    let mut engine = model.open(&options(Some(model.least_budget_for(&options(None)))));
    assert!(predictions(&mut engine, &prompt, &inputs, 8).1 == found, "streamed");
}

#[test]
fn what_is_not_opened_costs_nothing() {
    let folder = checkpoint("deepseek_v3");
    let with = converted(&folder, None);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("without.sluice");
    convert(folder.path(), &path, &Options { mtp: false, ..Options::default() }, &()).unwrap();
    let [with_file, without] = [&with.path, &path].map(|path| ModelFile::open(path).unwrap());
    assert!(without.spec().prediction.is_none() && with_file.file_bytes() > without.file_bytes());

    // The same plan, to the byte, and the same answer.
    let plan = |file: &ModelFile, prediction| {
        let demand = Demand { prediction, ..Demand::one(64, KvType::F32) };
        MemoryPlan::of_extents(file.spec(), file.extents(), None, demand, 1 << 40).unwrap()
    };
    assert_eq!(plan(&with_file, false), plan(&without, false));
    let opened = plan(&with_file, true);
    assert!(opened.dense > plan(&without, false).dense && opened.kv_cache > plan(&without, false).kv_cache);
    assert_eq!(opened.experts, plan(&without, false).experts + 16);
    assert_eq!(with_file.token_cycle_bytes(), without.token_cycle_bytes());
    let prompt = golden("deepseek_v3").ids("input_ids");
    let run = |path: &Path, prediction| {
        let mut engine = Engine::open(path, &EngineOptions { prediction, ..options(None) }).unwrap();
        engine.wait_for_dense().unwrap();
        (head_inputs(&mut engine, &prompt), engine.residency().len(), engine.stats().dense_bytes_read)
    };
    let [a, b, opened] = [run(&path, false), run(&with.path, false), run(&with.path, true)];
    assert_eq!(a, b);
    assert!(opened.0 == a.0 && opened.1 == a.1 && opened.2 > a.2);

    let error = Engine::open(&path, &options(None)).map(drop).unwrap_err();
    assert!(matches!(&error, RuntimeError::NoPrediction { path: named } if *named == path), "{error}");
    let mut closed = with.open(&EngineOptions { prediction: false, ..options(None) });
    assert!(!closed.predicts());
    assert!(matches!(closed.new_prediction_sequence(), Err(RuntimeError::PredictionClosed)));
    let refused = closed.predict(&mut [], &mut Control::default(), &mut |_, _, _| ());
    assert!(matches!(refused, Err(RuntimeError::PredictionClosed)));
}

#[test]
fn spans_that_do_not_fit_are_refused() {
    let model = converted(&checkpoint("glm4_moe"), None);
    let mut engine = model.open(&EngineOptions { context: Some(8), ..options(None) });
    let mut other = model.open(&options(None));
    let width = engine.spec().hidden_size;
    let inputs = vec![0.5; 16 * width];
    let mut sequence = engine.new_prediction_sequence().unwrap();
    let mut try_it = |engine: &mut Engine, tokens: &[u32], numbers: usize| {
        let head_inputs = &inputs[..numbers];
        let span =
            PredictionSpan { sequence: &mut sequence, tokens, head_inputs, phase: Phase::Decode, logits: Want::Last };
        let outcome = engine.predict(&mut [span], &mut Control::default(), &mut |_, _, _| ());
        (outcome, sequence.position())
    };
    let refused = |(outcome, position): (Result<(), RuntimeError>, usize)| match outcome {
        Err(RuntimeError::Model(error)) if position == 0 => error,
        other => panic!("{other:?} at {position}"),
    };
    let error = refused(try_it(&mut engine, &[1, 2], width));
    assert!(matches!(error, ModelError::HeadInputs { tokens: 2, found, .. } if found == width), "{error}");
    assert!(matches!(refused(try_it(&mut engine, &[], 0)), ModelError::NoTokens));
    assert!(matches!(refused(try_it(&mut engine, &[160], width)), ModelError::Token { token: 160, .. }));
    let error = refused(try_it(&mut engine, &[1; 9], 9 * width));
    assert!(matches!(error, ModelError::ContextFull { capacity: 8, wanted: 9 }), "{error}");
    assert!(matches!(refused(try_it(&mut other, &[1], width)), ModelError::ForeignSequence));
    assert_eq!(try_it(&mut engine, &[1; 8], 8 * width).1, 8);
}

#[test]
fn it_is_rounded_like_any_layer() {
    let name = "glm4_moe";
    let prompt = golden(name).ids("input_ids");
    let folder = checkpoint(name);
    for (ty, most) in [("q8", 0.02), ("q4", 0.25)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sluice");
        let choice: TypeChoice = ty.parse().unwrap();
        let options_of = Options { expert_type: choice, dense_type: choice, ..Options::default() };
        let summary = convert(folder.path(), &path, &options_of, &()).unwrap();
        assert_eq!(summary.types["prediction.projection"], [ty]);
        let file = ModelFile::open(&path).unwrap();
        assert_eq!(file.tensor(ExtentKind::Expert, 3, 0, "down").unwrap().weight_type.name(), ty);
        let mut engine = Engine::open(&path, &options(None)).unwrap();
        let inputs = Golden::load(name).array("hidden.final").data;
        let (_, logits) = predictions(&mut engine, &prompt, &inputs, prompt.len());
        let error = relative_error(&logits, &golden(name).array("mtp.logits").data);
        assert!(error > 1e-4 && error < most, "{ty}: {error}");
    }
}

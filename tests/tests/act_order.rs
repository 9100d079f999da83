//! GPTQ with activation order, where the columns of a group are not adjacent. It is carried bit for bit, in the size of the source,
//! and gives the logits of the same numbers in f32.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sluice_converter::{Options, Summary, TypeChoice, convert};
use sluice_format::{ExtentKind, ModelFile, WeightType};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::{Golden, fixture, greedy, relative_error};
use tempfile::TempDir;

use crate::safetensors::{Tensor, Tensors};

/// Reproducible random numbers.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// The numbers below `count` in random order.
    fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.bits() as usize % (i + 1));
        }
        order
    }

    /// The group of each column: groups of equal size, in random order.
    fn groups(&mut self, columns: usize, count: usize) -> Vec<usize> {
        let mut groups = vec![0; columns];
        self.order(columns).into_iter().enumerate().for_each(|(i, column)| groups[column] = i * count / columns);
        groups
    }
}

fn words(shape: &[usize], words: impl IntoIterator<Item = u32>) -> Tensor {
    let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
    Tensor { dtype: "I32".into(), shape: shape.to_vec(), bytes }
}

/// A checkpoint and its configuration.
struct Checkpoint {
    config: Value,
    tensors: Tensors,
}

impl Checkpoint {
    fn of_fixture(name: &str) -> Checkpoint {
        let folder = fixture(&format!("golden/{name}"));
        let config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        Checkpoint { config, tensors: crate::safetensors::read_dir(&folder) }
    }

    fn convert(&self, choice: TypeChoice) -> Model {
        let (source, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        crate::safetensors::write_dir(source.path(), &self.config, &self.tensors, 1);
        let options = Options { expert_type: choice, dense_type: choice, ..Options::default() };
        let summary = convert(source.path(), &folder.path().join("model.sluice"), &options, &()).unwrap();
        Model { summary, folder }
    }

    fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes.len() as u64).sum()
    }
}

struct Model {
    summary: Summary,
    folder: TempDir,
}

impl Model {
    fn open(&self, options: &EngineOptions) -> Engine {
        Engine::open(&self.folder.path().join("model.sluice"), options).unwrap()
    }

    fn file(&self) -> ModelFile {
        ModelFile::open(&self.folder.path().join("model.sluice")).unwrap()
    }
}

fn options(exact: bool, threads: usize) -> EngineOptions {
    EngineOptions { exact, threads: Some(threads), forget: true, ..EngineOptions::default() }
}

/// Logits of every position, `step` tokens at a time.
fn logits(engine: &mut Engine, prompt: &[u32], step: usize) -> Vec<f32> {
    let (mut sequence, mut all) = (engine.new_sequence(), Vec::new());
    for tokens in prompt.chunks(step) {
        engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
    }
    all
}

/// Divides every group of 64 columns into two of 32, each with its scales and zeros, mixes their columns, and numbers the groups in
/// random order. The weights stay the same numbers. As in GPTQ, matrices with the same input have the same order.
fn in_disorder(ordered: &Checkpoint) -> Checkpoint {
    let mut tensors = ordered.tensors.clone();
    for stem in ordered.tensors.keys().filter_map(|name| name.strip_suffix(".g_idx")) {
        let alike = stem.replace("up_proj", "gate_proj");
        let seed = alike.bytes().fold(7, |seed, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let mut noise = Noise(seed);
        let part = |end: &str| ordered.tensors[&format!("{stem}.{end}")].clone();
        let (columns, scales, zeros) = (part("g_idx").shape[0], part("scales"), part("qzeros"));
        let count = columns / 32;
        let numbers = noise.order(count);
        // A random half of the columns of each old group goes to each of its new groups.
        let mut group = vec![0; columns];
        for old in 0..columns / 64 {
            for (column, half) in noise.groups(64, 2).into_iter().enumerate() {
                group[64 * old + column] = numbers[2 * old + half];
            }
        }
        let mut rows = vec![0; count];
        numbers.iter().enumerate().for_each(|(new, &number)| rows[number] = new / 2);
        let repeated = |t: &Tensor| {
            let row = t.bytes.len() / t.shape[0];
            let bytes = rows.iter().flat_map(|old| t.bytes[old * row..][..row].to_vec()).collect();
            Tensor { shape: vec![count, t.shape[1]], bytes, ..t.clone() }
        };
        tensors.insert(format!("{stem}.scales"), repeated(&scales));
        tensors.insert(format!("{stem}.qzeros"), repeated(&zeros));
        tensors.insert(format!("{stem}.g_idx"), words(&[columns], group.iter().map(|&g| g as u32)));
    }
    let mut config = ordered.config.clone();
    config["quantization_config"]["desc_act"] = json!(true);
    config["quantization_config"]["group_size"] = json!(32);
    Checkpoint { config, tensors }
}

#[test]
fn the_logits_are_those_of_the_reference_at_the_size_of_the_source() {
    let golden = Golden::load("qwen3_moe_gptq");
    let ordered = Checkpoint::of_fixture("qwen3_moe_gptq");
    let disordered = in_disorder(&ordered);
    let model = disordered.convert(TypeChoice::Keep);
    assert!(model.summary.widened.is_empty(), "{:?}", model.summary.widened);
    let file = model.file();
    for (kind, name) in [(ExtentKind::Attention, "q"), (ExtentKind::Attention, "o")] {
        assert!(file.tensor(kind, 1, 0, name).unwrap().layout.is_ordered(), "{name}");
    }
    for name in ["gate_up", "down"] {
        let t = file.tensor(ExtentKind::Expert, 1, sluice_format::ANY_INDEX, name).unwrap();
        assert!(t.layout.is_ordered() && t.weight_type.to_string() == "u4-g32-f16-zero", "{name}: {t:?}");
    }
    // Vectors are f32 in a file, which is insignificant in larger models.
    let vectors: u64 = file.tensors().iter().filter(|t| t.shape[1] == 1).map(|t| t.len / 2).sum();
    let stored: u64 = file.extents().iter().map(|e| e.logical_len).sum::<u64>() - vectors;
    assert!(stored * 100 <= disordered.bytes() * 103, "{stored} bytes of {}", disordered.bytes());

    let prompt = golden.ids("input_ids");
    let expected = golden.array("logits");
    let exact = logits(&mut model.open(&options(true, 2)), &prompt, prompt.len());
    let error = relative_error(&exact, &expected.data);
    assert!(error < 1e-4, "prefill logits differ by {error:e}");
    let (ids, rows) = greedy(&mut model.open(&options(true, 2)), &prompt, 16);
    assert_eq!(ids, golden.ids("greedy_ids")[..16]);
    let steps = golden.array("step_logits");
    let error = relative_error(&rows.concat(), &steps.data[..rows.len() * steps.shape[1]]);
    assert!(error < 1e-4, "step logits differ by {error:e}");
    // With int8 activations, other columns share a block and so a scale. The error is that of the columns in their original order.
    let with_int8 = |checkpoint: &Checkpoint| {
        let model = checkpoint.convert(TypeChoice::Keep);
        relative_error(&logits(&mut model.open(&options(false, 2)), &prompt, prompt.len()), &expected.data)
    };
    let (found, before) = (with_int8(&disordered), with_int8(&ordered));
    assert!(found < 1.5 * before && found < 0.1, "{found:e}, in order {before:e}");
}

#[test]
fn batches_threads_and_budgets_give_the_same_bits() {
    let golden = Golden::load("qwen3_moe_gptq");
    let model = in_disorder(&Checkpoint::of_fixture("qwen3_moe_gptq")).convert(TypeChoice::Keep);
    let path = model.folder.path().join("model.sluice");
    let least = match Engine::open(&path, &EngineOptions { budget: Some(1), ..EngineOptions::default() }) {
        Err(sluice_model::RuntimeError::Budget(e)) => e.least,
        other => panic!("a budget of one byte: {:?}", other.map(|_| "accepted")),
    };
    // Longer than the number of rows that are reordered at a time.
    let prompt: Vec<u32> = golden.ids("input_ids").into_iter().cycle().take(140).collect();
    for exact in [true, false] {
        let want = logits(&mut model.open(&options(exact, 1)), &prompt, 140);
        for (threads, step, budget) in
            [(2, 140, None), (3, 31, Some(least)), (2, 1, Some(least)), (1, 129, Some(least))]
        {
            let mut engine = model.open(&EngineOptions { budget, ..options(exact, threads) });
            let found = logits(&mut engine, &prompt, step);
            assert!(found == want, "exact: {exact}, {threads} threads, {step} at a time, budget {budget:?}");
        }
    }
}

/// Turns every suitable projection into a GPTQ matrix with activation order and random codes, and makes the same matrix in f32.
/// `alike`: gate and up have the same order.
fn by_chance(source: &Checkpoint, alike: bool) -> [Checkpoint; 2] {
    let (mut packed, mut plain) = (source.tensors.clone(), source.tensors.clone());
    for (name, t) in &source.tensors {
        let Some(stem) = name.strip_suffix(".weight").filter(|s| s.contains("_proj")) else { continue };
        let &[out, inputs] = &t.shape[..] else { continue };
        if !out.is_multiple_of(8) || !inputs.is_multiple_of(16) || inputs < 32 {
            continue;
        }
        let seed = inputs as u64 + if alike { 0 } else { stem.len() as u64 };
        let count = inputs / 16;
        let group = Noise(seed).groups(inputs, count);
        let mut noise = Noise(stem.bytes().fold(3u64, |seed, byte| seed.wrapping_mul(31) + u64::from(byte)));
        let codes: Vec<u32> = (0..inputs * out).map(|_| noise.bits() & 15).collect();
        let zeros: Vec<u32> = (0..count * out).map(|_| 6 + noise.bits() % 3).collect();
        let of_magnitude = |n: &mut Noise| (0.5 + n.bits() as f32 / (1u64 << 31) as f32) * 0.2 / (inputs as f32).sqrt();
        let scales = Tensor::f16(&[count, out], (0..count * out).map(|_| of_magnitude(&mut noise)));
        let scale = scales.values();
        let value = |o: usize, i: usize| {
            let at = group[i] * out + o;
            (codes[i * out + o] as f32 - (zeros[at] + 1) as f32) * scale[at]
        };
        let values: Vec<f32> =
            (0..out).flat_map(|o| (0..inputs).map(move |i| (o, i))).map(|(o, i)| value(o, i)).collect();
        let word = |codes: &mut dyn Iterator<Item = u32>| codes.enumerate().fold(0, |word, (i, c)| word | c << (4 * i));
        let column = |o: usize, w: usize| word(&mut (0..8).map(|i| codes[(8 * w + i) * out + o]));
        let packed_codes = (0..inputs / 8).flat_map(|w| (0..out).map(move |o| (o, w))).map(|(o, w)| column(o, w));
        let packed_zeros = zeros.chunks(8).map(|z| word(&mut z.iter().copied()));
        plain.insert(name.clone(), Tensor::f32(&[out, inputs], values));
        packed.remove(name);
        packed.insert(format!("{stem}.qweight"), words(&[inputs / 8, out], packed_codes));
        packed.insert(format!("{stem}.qzeros"), words(&[count, out / 8], packed_zeros));
        packed.insert(format!("{stem}.scales"), scales);
        packed.insert(format!("{stem}.g_idx"), words(&[inputs], group.iter().map(|&g| g as u32)));
    }
    let mut config = source.config.clone();
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "desc_act": true, "group_size": 16});
    [Checkpoint { config, tensors: packed }, Checkpoint { config: source.config.clone(), tensors: plain }]
}

/// Also covers latent attention, a matrix per head, shared experts and dense layers; gate and up together, and separate.
#[test]
fn every_kind_of_matrix_meets_its_columns_in_order() {
    let golden = Golden::load("deepseek_v3");
    let prompt = golden.ids("input_ids");
    for (alike, pair) in [(true, &["gate_up"][..]), (false, &["gate", "up"])] {
        let [packed, plain] = by_chance(&Checkpoint::of_fixture("deepseek_v3"), alike);
        let (packed, plain) = (packed.convert(TypeChoice::Keep), plain.convert(TypeChoice::Type(WeightType::F32)));
        let file = packed.file();
        let ordered = file.tensors().iter().filter(|t| t.layout.is_ordered());
        let ordered: Vec<&str> = ordered.map(|t| t.name.as_str()).collect();
        for name in ["q_b", "v_b", "o", "down"].iter().chain(pair) {
            assert!(ordered.contains(name), "{name} is not among {ordered:?}");
        }
        let want = logits(&mut plain.open(&options(true, 2)), &prompt, prompt.len());
        let found = logits(&mut packed.open(&options(true, 2)), &prompt, prompt.len());
        let error = relative_error(&found, &want);
        assert!(error < 1e-4, "{pair:?}: logits differ by {error:e}");
        assert!(logits(&mut packed.open(&options(true, 1)), &prompt, 3) == found, "{pair:?}: other bits");
        let int8 = logits(&mut packed.open(&options(false, 2)), &prompt, prompt.len());
        let error = relative_error(&int8, &want);
        // Columns in a wrong order would give completely different logits.
        assert!(error < 0.5, "{pair:?}: logits with int8 activations differ by {error:e}");
    }
}

/// An order that names a column that does not exist, in a file with right checksums, causes neither a result nor a panic.
#[test]
fn an_order_that_names_no_column_gives_no_number() {
    let model = in_disorder(&Checkpoint::of_fixture("qwen3_moe_gptq")).convert(TypeChoice::Keep);
    let from = model.file();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.sluice");
    write_with_bad_order(&from, &path);
    let mut engine = Engine::open(&path, &options(false, 2)).unwrap();
    let mut sequence = engine.new_sequence();
    let mut logits = Vec::new();
    engine.forward(&mut sequence, &[1, 2, 3], &mut logits).unwrap();
    assert!(logits.iter().all(|l| l.is_nan()));
}

/// Copies a model with the first number of every order out of range.
fn write_with_bad_order(from: &ModelFile, path: &Path) {
    let planned: Vec<_> = from
        .extents()
        .iter()
        .map(|e| sluice_format::PlannedExtent {
            kind: e.kind,
            layer: e.layer,
            index: e.index,
            logical_len: e.logical_len,
        })
        .collect();
    let layout = sluice_format::FileLayout::new(4096, &planned).unwrap();
    let writer = sluice_format::FileWriter::open(path, layout).unwrap();
    let mut written = Vec::new();
    let mut bytes = Vec::new();
    for (i, e) in from.extents().iter().enumerate() {
        from.read_extent(e, &mut bytes).unwrap();
        for t in from.tensors_of(e).iter().filter(|t| t.layout.is_ordered()) {
            bytes[t.offset as usize..][..2].copy_from_slice(&u16::MAX.to_le_bytes());
        }
        let mut extent = writer.extent(i);
        extent.write(&bytes[..e.logical_len as usize]).unwrap();
        written.push(extent.finish().unwrap());
    }
    writer.finish(&written, from.tensors(), from.metadata()).unwrap();
}

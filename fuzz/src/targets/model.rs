//! Model files: opened, listed, verified, planned for, and run for a few tokens.
//!
//! An input that is JSON is the specification of a model: a file of it is made, with weights that mean nothing. A mutated
//! file seldom has a specification that still fits its tensors, so this is how the computation meets strange ones. An input can also consist
//! of two files, the volumes of a model that is striped.

use std::fs;
use std::path::{Path, PathBuf};

use sluice_format::fields::superblock;
use sluice_format::{ExtentKind, FormatError, MAGIC, ModelFile, ModelSpec, NO_LAYER, WeightType};
use sluice_generate::sampler::{Sampler, SamplerConfig};
use sluice_model::memory::{Demand, MemoryPlan};
use sluice_model::{Engine, EngineOptions, KvType, ReadEngineKind};
use sluice_storage::io::IoConfig;
use sluice_text::{ChatTemplate, GenerationDefaults, Tokenizer};

use super::{Seeds, choice};

#[path = "../../../format/tests/support/mod.rs"]
pub(crate) mod support;

/// Longest file that is written for a specification.
const FILE_MAX: u64 = 4 << 20;
/// Longest model that is run, in extents: each is a read.
const EXTENTS_MAX: usize = 256;
const BUDGET: u64 = 256 << 20;
const CONTEXT: usize = 8;

/// The volumes of a model of two.
const VOLUMES: [&str; 2] = ["model-00001-of-00002.sluice", "model-00002-of-00002.sluice"];

/// Where the second of two volumes begins.
pub(crate) fn second_volume(input: &[u8]) -> Option<usize> {
    let field = |name| {
        let (offset, len) = support::at(&superblock::FIELDS, name);
        support::get(input, offset, len)
    };
    if input.len() < superblock::LEN || !input.starts_with(&MAGIC) || field("volume_count") != 2 {
        return None;
    }
    usize::try_from(field("file_len")).ok().filter(|&len| len > 0 && len < input.len())
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let mut path = folder.join("model.sluice");
    if let Some(second) = second_volume(input) {
        let (first, second) = input.split_at(second);
        let [first_path, second_path] = VOLUMES.map(|name| folder.join(name));
        fs::write(&first_path, first).expect("the folder can be written");
        fs::write(second_path, second).expect("the folder can be written");
        path = first_path;
    } else if input.starts_with(b"{") {
        match ModelSpec::from_json(input).map(|spec| write(&path, &spec, choice(input))) {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return,
            Ok(Err(error)) => return drop(error.to_string()),
            Err(problem) => return drop(problem),
        }
    } else {
        fs::write(&path, input).expect("the folder can be written");
    }
    match ModelFile::open(&path) {
        Ok(file) => {
            let sound = look_at(&file);
            assert!(sound || !input.starts_with(b"{"), "a file that was just written is damaged");
            if file.extents().len() <= EXTENTS_MAX {
                generate(&path, choice(input));
            }
        }
        Err(error) => {
            assert!(!input.starts_with(b"{"), "what the writer has written is refused: {error}");
            drop(error.to_string());
        }
    }
}

/// Writes a file of this specification; `false` if it would be too long to be worth it.
fn write(path: &Path, spec: &ModelSpec, choice: u64) -> Result<bool, FormatError> {
    let experts: usize = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref()).map(|m| m.experts).sum();
    if spec.layers.len() + experts > EXTENTS_MAX || spec.vocab_size > 4096 || spec.hidden_size > 4096 {
        return Ok(false);
    }
    // Lengths are checked before anything is laid out, for this makes the extents' bytes in memory.
    let tensors = (0..=spec.layers.len()).flat_map(|layer| {
        let count = move |kind| spec.extent_count(kind, layer) as u64;
        ExtentKind::ALL.into_iter().flat_map(move |k| spec.tensors(k, layer).into_iter().map(move |t| (count(k), t)))
    });
    let elements = tensors.fold(0u64, |sum, (count, tensor)| {
        let [batch, rows, cols] = tensor.shape.map(|d| d as u64);
        let padded = rows.next_multiple_of(8).saturating_mul(cols.next_multiple_of(64));
        sum.saturating_add(padded.saturating_mul(batch).saturating_mul(count))
    });
    if elements > FILE_MAX / 4 {
        return Ok(false);
    }
    let rows = spec.vocab_size.div_ceil(1 + choice as usize % 3);
    // Written anew: a longer file from before would keep its end.
    fs::write(path, []).expect("the folder can be written");
    support::write(path, &support::plan(spec, rows), 4096)?;
    Ok(true)
}

/// What `inspect`, `verify` and `plan` do. Returns whether every extent is what its checksum says.
fn look_at(file: &ModelFile) -> bool {
    for kind in ExtentKind::ALL {
        drop(file.weight_types(kind));
        let _ = file.parts(kind).count();
    }
    for extent in file.extents() {
        drop((extent.name(), file.tensors_in(extent.kind, extent.layer, extent.index).count()));
        let layer = if extent.layer == NO_LAYER { usize::MAX } else { extent.layer as usize };
        for wanted in file.spec().tensors(extent.kind, layer) {
            let has = |name| file.tensor(extent.kind, extent.layer, extent.index, name).is_some();
            let apart = wanted.apart().is_some_and(|halves| halves.iter().all(|half| has(half.name)));
            assert!(has(wanted.name) || apart, "{} has no {}", extent.name(), wanted.name);
        }
    }
    drop((file.bytes_by_kind(), file.extent_bytes(), file.token_cycle_bytes(), file.spec().routed_per_token()));
    for kv_type in KvType::ALL {
        for context in [1, 4096, file.spec().max_positions] {
            match MemoryPlan::new(file, None, Demand::one(context, kv_type)) {
                Ok(plan) => drop(plan.used()),
                Err(error) => drop(error.to_string()),
            }
        }
    }
    let damaged = file.verify_all(&mut |_| ());
    damaged.iter().for_each(|error| drop(error.to_string()));
    damaged.is_empty()
}

/// What `run` does, with little of everything.
fn generate(path: &Path, choice: u64) {
    let options = EngineOptions {
        budget: Some(BUDGET),
        read_engine: Some(ReadEngineKind::Pread),
        io: Some(IoConfig { chunk_bytes: 4096 << (choice % 4), ..IoConfig::default() }),
        threads: Some(1 + (choice >> 2) as usize % 2),
        exact: choice & 16 != 0,
        kv_type: KvType::ALL[(choice >> 5) as usize % KvType::ALL.len()],
        context: Some(CONTEXT),
        ..EngineOptions::default()
    };
    let mut engine = match Engine::open(path, &options) {
        Ok(engine) => engine,
        Err(error) => return drop(error.to_string()),
    };
    let blob = |name: &str| engine.file().metadata().get(name);
    drop((Tokenizer::find(blob).err(), ChatTemplate::find(blob).err()));
    drop(GenerationDefaults::parse(blob("generation_config.json"), blob("config.json")).err());
    let vocabulary = engine.spec().vocab_size as u64;
    let mut sequence = engine.new_sequence();
    let mut sampler = Sampler::new(SamplerConfig::default()).expect("the defaults are valid");
    let (mut tokens, mut history, mut logits) = (vec![0, (choice % vocabulary) as u32, 1], Vec::new(), Vec::new());
    for _ in 0..3 {
        match engine.forward(&mut sequence, &tokens, &mut logits) {
            Ok(()) => assert_eq!(logits.len() as u64, vocabulary),
            Err(error) => return drop(error.to_string()),
        }
        history.append(&mut tokens);
        match sampler.sample(&logits, &history) {
            Ok(token) => tokens.push(token),
            // Weights that mean nothing may have logits that are no numbers.
            Err(error) => return drop(error.to_string()),
        }
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let specs = [
        ("mla", support::small_spec()),
        ("gqa", support::gqa_spec()),
        ("sparse", support::sparse_spec()),
        ("streams", support::streams_spec()),
        ("hybrid", support::hybrid_spec()),
    ];
    let files = specs.iter().map(|(name, spec)| ((*name).to_owned(), support::file_of(spec, 4096)));
    let jsons = specs.iter().map(|(name, spec)| (format!("{name}.json"), spec.to_json()));
    let mut seeds: Seeds = files.chain(jsons).collect();
    for compress in [false, true] {
        seeds.push((format!("striped-{compress}"), striped(folder, compress)));
    }
    // Rotary embeddings, without which grouped queries know no places.
    let mut spec = support::gqa_spec();
    let rope = support::small_spec().layers.into_iter().find_map(|l| match l.attention {
        sluice_format::AttentionSpec::Mla(mla) => mla.rope,
        _ => None,
    });
    for layer in &mut spec.layers {
        if let sluice_format::AttentionSpec::Gqa(gqa) = &mut layer.attention {
            gqa.rope = rope.clone();
        }
    }
    seeds.push(("rope.json".to_owned(), spec.to_json()));
    seeds
}

/// The volumes of a striped model, one behind the other.
fn striped(folder: &Path, compress: bool) -> Vec<u8> {
    let folder = folder.join("striped");
    fs::create_dir_all(&folder).expect("the folder can be made");
    let folders: [PathBuf; 2] = [folder.clone(), folder.clone()];
    let paths = support::write_striped(&folders, &support::wide(WeightType::Bf16), &[2, 1], compress);
    let volumes = paths.iter().flat_map(|path| fs::read(path).expect("it was written")).collect();
    let _ = fs::remove_dir_all(folder);
    volumes
}

//! Journals of interrupted conversions: one lies beside a partial file, and the conversion goes on from there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};
use sluice_converter::fuzzing::{seal_journal, tensors_of};
use sluice_converter::{Options, Plan, convert_plan, plan};
use sluice_format::{Metadata, ModelFile, PROVENANCE_BLOB, SOURCE_DIGESTS_BLOB};

use super::Seeds;
use super::checkpoint::{header_for, write_sparse};

/// A conversion, and what it left behind when it was interrupted.
struct Conversion {
    plan: Plan,
    destination: PathBuf,
    journal: Vec<u8>,
    partial: Vec<u8>,
    /// The file in the end.
    whole: Vec<u8>,
    metadata: Metadata,
}

fn partial(destination: &Path) -> PathBuf {
    destination.with_extension("sluice.partial")
}

fn journal(destination: &Path) -> PathBuf {
    destination.with_extension("sluice.partial.journal")
}

/// The smallest model that has a bit of everything, and its conversion.
fn conversion(folder: &Path) -> &'static Conversion {
    static MADE: OnceLock<Conversion> = OnceLock::new();
    MADE.get_or_init(|| {
        let config = json!({
            "model_type": "deepseek_v3", "hidden_act": "silu", "vocab_size": 40, "hidden_size": 32,
            "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8, "max_position_embeddings": 128, "rope_theta": 10000,
            "tie_word_embeddings": false
        });
        let config = config.to_string().into_bytes();
        let checkpoint = folder.join("checkpoint");
        fs::create_dir_all(&checkpoint).expect("the folder can be written");
        fs::write(checkpoint.join("config.json"), &config).expect("the folder can be written");
        let mut tensors = tensors_of(&config, usize::MAX).expect("the configuration is sound");
        // The tensors that are read last lie last, so that all but them are converted when the end of the file is missing.
        tensors.sort_by_key(|(name, _)| name.contains("experts.3."));
        let weights = checkpoint.join("model.safetensors");
        write_sparse(&weights, &header_for(&tensors).expect("they are small"));
        // Something else than zeros, which are also what a partial file has where nothing was written.
        let mut bytes = fs::read(&weights).expect("it was written");
        let data = bytes.len() - tensors.iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum::<usize>();
        bytes[data..].iter_mut().zip(0u32..).for_each(|(b, i)| *b = if i % 2 == 0 { i as u8 } else { 0x3c });
        fs::write(&weights, &bytes).expect("the folder can be written");

        let destination = folder.join("model.sluice");
        // With errors for the journal to keep.
        let q8 = "q8".parse().expect("a name of a type");
        let options = Options { expert_type: q8, dense_type: q8, overwrite: true, ..Options::default() };
        let plan_now = || plan(&checkpoint, &options).expect("the checkpoint is sound");
        let interrupted = plan_now();
        fs::write(&weights, &bytes[..bytes.len() - 1]).expect("the folder can be written");
        convert_plan(&interrupted, &destination, &()).expect_err("a byte is missing");
        fs::write(&weights, &bytes).expect("the folder can be written");
        let read = |path: PathBuf| fs::read(path).expect("an interrupted conversion leaves it");
        let (journal, partial) = (read(journal(&destination)), read(partial(&destination)));
        let plan = plan_now();
        convert_plan(&plan, &destination, &()).expect("the checkpoint is sound");
        let whole = read(destination.clone());
        let metadata = ModelFile::open(&destination).expect("what was converted opens").metadata().clone();
        Conversion { plan, destination, journal, partial, whole, metadata }
    })
}

/// Repairs checksums, so that what was mutated behind them is looked at.
#[allow(dead_code, reason = "the test that replays inputs mutates none")]
pub(crate) fn seal(input: &mut [u8], folder: &Path) {
    seal_journal(&conversion(folder).plan, input);
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let conversion = conversion(folder);
    let destination = &conversion.destination;
    let _ = fs::remove_file(destination);
    fs::write(partial(destination), &conversion.partial).expect("the folder can be written");
    fs::write(journal(destination), input).expect("the folder can be written");
    match convert_plan(&conversion.plan, destination, &()) {
        Ok(summary) => {
            assert!(summary.resumed_extents <= conversion.plan.extents().len());
            let file = ModelFile::open(destination).expect("what was converted opens");
            assert!(file.verify_all(&mut |_| ()).is_empty(), "what was converted is damaged");
            let now = fs::read(destination).expect("it was written");
            if conversion.journal.starts_with(input) {
                assert!(now == conversion.whole, "what nobody forged ends in another file");
            } else {
                check_forged(conversion, &now, &file);
            }
        }
        Err(error) => drop(error.to_string()),
    }
}

/// A forged journal can have nothing to say about the weights, of which there are few enough here for all to be sampled: they and
/// their tables are those of a clean conversion. It can lie about figures of the provenance, within bounds: errors of the
/// quantisation, which take the making of an extent to find out, and digests of parts that nobody reads again.
fn check_forged(conversion: &Conversion, now: &[u8], file: &ModelFile) {
    let weights = file.superblock().page_size as usize..file.superblock().metadata.offset as usize;
    assert!(now[weights.clone()] == conversion.whole[weights], "other weights");
    for (name, clean) in conversion.metadata.iter() {
        let now = file.metadata().get(name).unwrap_or_default();
        match name {
            PROVENANCE_BLOB => assert_eq!(without_figures(clean), without_figures(now)),
            SOURCE_DIGESTS_BLOB => assert_eq!(clean.len(), now.len()),
            _ => assert!(clean == now, "another {name}"),
        }
    }
}

fn without_figures(provenance: &[u8]) -> Value {
    let mut provenance: Value = serde_json::from_slice(provenance).expect("provenance is JSON");
    let errors = provenance["relative_rms_error"].take();
    for error in errors.as_object().expect("errors have names").values() {
        assert!(error.as_f64().is_some_and(|error| (0.0..=2.0).contains(&error)), "{error}");
    }
    for file in provenance["source_files"].as_array_mut().expect("there are files") {
        file["xxh3_128"].take();
    }
    provenance
}

/// The journal with the same figures for every tensor, and right checksums.
fn with_figures(journal: &[u8], plan: &Plan, figures: [u64; 3]) -> Vec<u8> {
    const STAMP: usize = 7 * 8;
    // Magic, hash, four counts, the stamp of the one file, checksum; in a record kind, extent, checksum, digest, bytes.
    const HEADER: usize = 8 + 16 + 4 * 8 + STAMP + 8;
    const FIXED: usize = 1 + 8 + 8 + 16 + 8;
    const PART: usize = 1 + 8 + 16 + 8;
    let mut forged = journal.to_vec();
    let figures = figures.map(u64::to_le_bytes).concat();
    let tensors = u64::from_le_bytes(journal[24..32].try_into().expect("eight bytes")) as usize;
    let mut at = HEADER;
    while at < forged.len() {
        if forged[at] == 1 {
            let sums = &mut forged[at + FIXED..][..tensors * figures.len()];
            sums.chunks_exact_mut(figures.len()).for_each(|sums| sums.copy_from_slice(&figures));
            at += FIXED + tensors * figures.len() + 8;
        } else {
            at += PART;
        }
    }
    seal_journal(plan, &mut forged);
    forged
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let Conversion { plan, journal, .. } = conversion(folder);
    let cut = |part: usize| (format!("{part}-of-4"), journal[..journal.len() * part / 4].to_vec());
    let forged = |name: &str, error: f64, magnitude: f64, vanished: u64| {
        let figures = [error.to_bits(), magnitude.to_bits(), vanished];
        (name.to_owned(), with_figures(journal, plan, figures))
    };
    let forgeries = [
        forged("vanished-sums", 0.0, 1.0, u64::MAX),
        forged("no-numbers", f64::NAN, f64::NAN, 0),
        forged("infinite-errors", f64::MAX, f64::MIN_POSITIVE, 0),
        forged("believable", 0.01, 1.0, 0),
    ];
    (1..=4).map(cut).chain(forgeries).collect()
}

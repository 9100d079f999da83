//! Journals of interrupted conversions: one lies beside a partial file, and the conversion goes on from there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::json;
use sluice_converter::fuzzing::tensors_of;
use sluice_converter::{Options, Plan, convert_plan, plan};
use sluice_format::ModelFile;

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
        let options = Options { overwrite: true, ..Options::default() };
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
        Conversion { plan, destination, journal, partial, whole }
    })
}

/// Repairs checksums, so that what was mutated behind them is looked at.
#[allow(dead_code, reason = "the test that replays inputs mutates none")]
pub(crate) fn seal(input: &mut [u8], folder: &Path) {
    sluice_converter::fuzzing::seal_journal(&conversion(folder).plan, input);
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let conversion = conversion(folder);
    let destination = &conversion.destination;
    let _ = fs::remove_file(destination);
    fs::write(partial(destination), &conversion.partial).expect("the folder can be written");
    fs::write(journal(destination), input).expect("the folder can be written");
    match convert_plan(&conversion.plan, destination, &()) {
        Ok(summary) => {
            assert!(summary.resumed_extents <= conversion.plan.sizes().iter().map(|s| s.extents).sum());
            let file = ModelFile::open(destination).expect("what was converted opens");
            // What nobody forged ends in the very same file.
            if conversion.journal.starts_with(input) {
                assert!(fs::read(destination).expect("it was written") == conversion.whole, "another file");
            }
            drop(file.verify_all(&mut |_| ()));
        }
        Err(error) => drop(error.to_string()),
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let journal = &conversion(folder).journal;
    let cut = |part: usize| (format!("{part}-of-4"), journal[..journal.len() * part / 4].to_vec());
    (1..=4).map(cut).collect()
}

//! Headers of safetensors files: a checkpoint of one file is planned, and converted if it is small.
//!
//! Which configuration lies beside the file is named in the header's own metadata, `{"__metadata__": {"golden": "llama"}}`,
//! so that a mutated header still meets the one that it was made for.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::checkpoint::{GOLDENS, Golden, convert, header_of, write_sparse};
use super::{Seeds, choice};

pub(crate) fn run(input: &[u8], folder: &Path) {
    const KEY: &[u8] = b"\"golden\":\"";
    let name = input.windows(KEY.len()).position(|part| part == KEY).map(|at| &input[at + KEY.len()..]);
    let is_named = |golden: &&Golden| {
        name.is_some_and(|n| n.strip_prefix(golden.name.as_bytes()).is_some_and(|n| n.starts_with(b"\"")))
    };
    let golden = GOLDENS.iter().find(is_named).unwrap_or(&GOLDENS[0]);
    let checkpoint = folder.join("checkpoint");
    fs::create_dir_all(&checkpoint).expect("the folder can be written");
    fs::write(checkpoint.join("config.json"), golden.config).expect("the folder can be written");
    write_sparse(&checkpoint.join("model.safetensors"), input);
    let _ = convert(&checkpoint, &folder.join("model.sluice"), choice(input));
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    let seed = |golden: &Golden| {
        let header = header_of(golden.weights);
        let mut json: Value = serde_json::from_slice(&header[8..]).expect("the header is sound");
        json["__metadata__"] = json!({"format": "pt", "golden": golden.name});
        let json = json.to_string().into_bytes();
        (golden.name.to_owned(), [&(json.len() as u64).to_le_bytes()[..], &json].concat())
    };
    GOLDENS.iter().map(seed).collect()
}

//! `model.safetensors.index.json`: the checkpoint that it describes is planned, in a folder that also has what an index had
//! better not name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::checkpoint::{convert, header_of, write_sparse};
use super::{Seeds, choice, fixture};

const CONFIG: &[u8] = fixture!("golden/kimi_k2/config.json");
const INDEX: &[u8] = fixture!("golden/kimi_k2/model.safetensors.index.json");
const SHARDS: [(&str, &[u8]); 2] = [
    ("model-00001-of-00002.safetensors", fixture!("golden/kimi_k2/model-00001-of-00002.safetensors")),
    ("model-00002-of-00002.safetensors", fixture!("golden/kimi_k2/model-00002-of-00002.safetensors")),
];
const INDEX_NAME: &str = "model.safetensors.index.json";

/// The folder of the checkpoint, made once.
fn checkpoint(folder: &Path) -> PathBuf {
    let checkpoint = folder.join("checkpoint");
    if checkpoint.is_dir() {
        return checkpoint;
    }
    let made = || {
        fs::create_dir_all(checkpoint.join("folder"))?;
        fs::write(checkpoint.join("config.json"), CONFIG)?;
        fs::write(checkpoint.join("empty.safetensors"), [])?;
        symlink("loop.safetensors", checkpoint.join("loop.safetensors"))?;
        symlink("model-00001-of-00002.safetensors", checkpoint.join("link.safetensors"))
    };
    made().expect("the folder can be written");
    SHARDS.iter().for_each(|(name, file)| write_sparse(&checkpoint.join(name), header_of(file)));
    checkpoint
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let checkpoint = checkpoint(folder);
    fs::write(checkpoint.join(INDEX_NAME), input).expect("the folder can be written");
    let _ = convert(&checkpoint, &folder.join("model.sluice"), choice(input));
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    let short: &[u8] = br#"{"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "empty.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors", "a": "link.safetensors", "b": "loop.safetensors",
        "c": "folder", "d": "../config.json", "e": "config.json"}}"#;
    vec![("kimi".to_owned(), INDEX.to_vec()), ("short".to_owned(), short.to_vec())]
}

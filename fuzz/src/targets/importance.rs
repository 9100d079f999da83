//! Importance files (`convert --imatrix`): loaded for a model, asked for every matrix, and used in a conversion.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use sluice_converter::{Options, convert, plan};
use sluice_format::{ColumnMeans, ExtentKind, Importance, MatrixKey, ModelSpec, NO_LAYER};

use super::checkpoint::{GOLDENS, Golden, header_of, write_sparse};
use super::{Seeds, choice};

fn golden() -> &'static Golden {
    GOLDENS.iter().find(|golden| golden.name == "mixtral").expect("it is in the list")
}

/// The checkpoint that the measurements belong to, made once.
fn checkpoint(folder: &Path) -> PathBuf {
    let checkpoint = folder.join("checkpoint");
    if !checkpoint.is_dir() {
        fs::create_dir_all(&checkpoint).expect("the folder can be written");
        fs::write(checkpoint.join("config.json"), golden().config).expect("the folder can be written");
        write_sparse(&checkpoint.join("model.safetensors"), header_of(golden().weights));
    }
    checkpoint
}

fn spec(folder: &Path) -> &'static ModelSpec {
    static SPEC: LazyLock<std::sync::OnceLock<ModelSpec>> = LazyLock::new(Default::default);
    SPEC.get_or_init(|| plan(&checkpoint(folder), &Options::default()).expect("the checkpoint is sound").spec().clone())
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let path = folder.join("importance");
    fs::write(&path, input).expect("the folder can be written");
    let importance = match Importance::load(&path, spec(folder)) {
        Ok(importance) => importance,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(importance.to_bytes(), input, "what was read is not what was written");
    for key in importance.matrices().keys() {
        for index in [0, 1, key.index, u32::MAX] {
            if let Some(columns) = importance.columns(key.kind, key.layer, &key.name, index) {
                assert!(columns.iter().all(|c| *c >= 0.0), "{key:?}");
            }
        }
    }
    let _ = (importance.digest(), importance.tokens());
    if choice(input).is_multiple_of(32) {
        let q4 = "q4".parse().expect("a name of a type");
        let options =
            Options { expert_type: q4, dense_type: q4, importance: Some(path), overwrite: true, ..Default::default() };
        let converted = convert(&checkpoint(folder), &folder.join("model.sluice"), &options, &());
        converted.expect("a sound checkpoint is converted");
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let spec = spec(folder);
    let mut matrices = std::collections::BTreeMap::new();
    let mut add = |kind, layer: u32, name: &str, index, columns: usize| {
        let mean_squares = (0..columns).map(|c| 0.5 + c as f32).collect();
        let key = MatrixKey { kind, layer, name: name.to_owned(), index };
        matrices.insert(key, ColumnMeans { tokens: u64::from(index) * 100, mean_squares });
    };
    for layer in 0..spec.layers.len() {
        for kind in [ExtentKind::Attention, ExtentKind::Dense, ExtentKind::Expert] {
            let tensors = spec.tensors(kind, layer);
            for tensor in tensors.iter().filter(|t| t.layout != sluice_format::Layout::Plain) {
                for index in 0..spec.extent_count(kind, layer).min(3) as u32 {
                    add(kind, layer as u32, tensor.name, index, tensor.shape[2]);
                }
            }
        }
    }
    let some: std::collections::BTreeMap<_, _> = matrices.iter().take(3).map(|(k, m)| (k.clone(), m.clone())).collect();
    matrices.retain(|key, _| key.layer == 0 || key.layer == NO_LAYER);
    let file = |matrices| Importance::new(spec, 1000, matrices).expect("it fits the model").to_bytes();
    vec![
        ("layer".to_owned(), file(matrices)),
        ("some".to_owned(), file(some)),
        ("none".to_owned(), file(Default::default())),
    ]
}

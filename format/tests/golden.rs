//! A file of version 1 that stays in the repository for ever: it must open, mean the same, and be what the writer writes.

mod support;

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use sluice_format::*;
use support::*;

fn data(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", name].iter().collect()
}

/// The small model in as few pages as it takes. Its weights come from [`Random`].
fn content() -> Content {
    plan(&small_spec(), 20)
}

/// Everything that the crate says about a file.
fn describe(model: &ModelFile) -> Value {
    let table = |t: TableRef| json!([t.offset, t.stored_len, t.logical_len, format!("{:016x}", t.checksum)]);
    let sb = model.superblock();
    let extents = model.extents().iter().map(|e| {
        let sum = format!("{:016x}", e.checksum);
        json!([
            e.name(),
            e.kind as u16,
            e.codec as u16,
            e.layer,
            e.index,
            e.volume,
            e.offset,
            e.stored_len,
            e.logical_len,
            sum
        ])
    });
    let tensors = model.tensors().iter().map(|t| {
        let (kind, ty, layout) = (t.kind.name(), t.weight_type.name(), t.layout.name());
        json!([kind, t.layer, t.index, t.name, ty, layout, t.shape, t.offset, t.len])
    });
    let blobs = model.metadata().iter().map(|(name, blob)| (name.to_owned(), json!(String::from_utf8_lossy(blob))));
    json!({
        "superblock": {
            "page_size": sb.page_size,
            "model_id": sb.model_id.to_string(),
            "volume": sb.volume,
            "volume_count": sb.volume_count,
            "file_len": sb.file_len,
            "extents": table(sb.extents),
            "tensors": table(sb.tensors),
            "metadata": table(sb.metadata),
        },
        "extents": extents.collect::<Vec<_>>(),
        "tensors": tensors.collect::<Vec<_>>(),
        "metadata": blobs.collect::<serde_json::Map<_, _>>(),
        "token_cycle_bytes": model.token_cycle_bytes(),
    })
}

#[test]
fn the_golden_file_opens_and_means_the_same() {
    let model = ModelFile::open(&data("v1-small.sluice")).unwrap();
    assert!(model.verify_all(&mut |_| ()).is_empty());
    assert_eq!(*model.spec(), small_spec());
    let expected: Value = serde_json::from_slice(&fs::read(data("v1-small.json")).unwrap()).unwrap();
    let found = describe(&model);
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&found[key], value, "{key}");
    }
    assert_eq!(found.as_object().unwrap().len(), expected.as_object().unwrap().len());
}

#[test]
fn the_writer_still_writes_the_golden_file() {
    let (_dir, path) = temp();
    write(&path, &content(), 4096).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(data("v1-small.sluice")).unwrap());
}

/// Made the golden file. A change of version 1 is a mistake: make a new version with its own file instead.
#[test]
#[ignore = "writes the golden file"]
fn write_the_golden_file() {
    let path = data("v1-small.sluice");
    write(&path, &content(), 4096).unwrap();
    let description = serde_json::to_string_pretty(&describe(&ModelFile::open(&path).unwrap())).unwrap();
    fs::write(data("v1-small.json"), description + "\n").unwrap();
}

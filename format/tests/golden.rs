//! Files that stay in the repository for ever: each must open and mean the same, and that of the newest version must be what the
//! writer writes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;
use serde_json::{Value, json};
use sluice_format::*;

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
    let stripe = |s: &Stripe| json!([s.volume, s.offset, s.len, format!("{:016x}", s.checksum)]);
    let stripes = |all: &[Stripe]| all.iter().map(stripe).collect::<Vec<_>>();
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
        "stripes": model.extents().iter().map(|e| stripes(model.stripes(e))).collect::<Vec<_>>(),
    })
}

/// The golden files, by version; one model that is compressed and split, and one that is compressed and striped.
const GOLDEN: [&str; 4] = ["v1-small", "v2-small", "v2-parts", "v2-striped"];

/// The file of a golden model by which it is opened.
fn path_of(name: &str) -> PathBuf {
    let volumes = VolumeName::first_of(&data(&format!("{name}.sluice")), PARTS);
    match name {
        "v2-parts" => volumes.path_of(1),
        "v2-striped" => volumes.path_of(0),
        _ => volumes.whole(),
    }
}

/// Volumes of the split model, and of the striped one.
const PARTS: u16 = 3;

#[test]
fn the_golden_files_open_and_mean_the_same() {
    for name in GOLDEN {
        let model = ModelFile::open(&path_of(name)).unwrap();
        assert!(model.verify_all(&mut |_| ()).is_empty());
        let expected: Value = serde_json::from_slice(&fs::read(data(&format!("{name}.json"))).unwrap()).unwrap();
        let found = describe(&model);
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&found[key], value, "{name}: {key}");
        }
    }
    let [v1, v2] = ["v1-small", "v2-small"].map(|name| ModelFile::open(&path_of(name)).unwrap());
    assert_eq!(*v1.spec(), small_spec());
    assert_eq!(v1.metadata(), v2.metadata());
    assert_eq!((v1.superblock().version, v2.superblock().version), (1, 2));
    assert_eq!(v1.state_id(), v2.state_id(), "an upgrade keeps what is bound to the weights");
}

/// What is kept beside a model of version 1 was bound to it before there was another version: by the bytes of its tables.
#[test]
fn the_state_id_of_version_1_is_what_it_always_was() {
    use xxhash_rust::xxh3::xxh3_128;
    let path = path_of("v1-small");
    let (model, bytes) = (ModelFile::open(&path).unwrap(), fs::read(&path).unwrap());
    let sb = model.superblock();
    let table = |t: TableRef| &bytes[t.offset as usize..(t.offset + t.logical_len) as usize];
    let blob = |name| model.metadata().get(name).unwrap();
    let parts: [&[u8]; 6] = [
        table(sb.extents),
        table(sb.tensors),
        SPEC_BLOB.as_bytes(),
        blob(SPEC_BLOB),
        TOKENIZER_BLOB.as_bytes(),
        blob(TOKENIZER_BLOB),
    ];
    let digests: Vec<u8> = parts.iter().flat_map(|part| xxh3_128(part).to_le_bytes()).collect();
    assert_eq!(model.state_id().0, xxh3_128(&digests).to_le_bytes());
}

#[test]
fn the_writer_still_writes_the_golden_files() {
    let (dir, path) = temp();
    write(&path, &content(), 4096).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(data("v2-small.sluice")).unwrap());
    write_golden_parts(&dir.path().join("v2-parts.sluice"));
    write_golden_stripes(dir.path());
    for name in ["v2-parts.sluice", "v2-striped.sluice"] {
        let found = VolumeName::first_of(&dir.path().join(name), PARTS);
        let golden = VolumeName::first_of(&data(name), PARTS);
        for volume in 0..PARTS {
            assert!(fs::read(found.path_of(volume)).unwrap() == fs::read(golden.path_of(volume)).unwrap(), "{volume}");
        }
    }
}

/// The same model striped over volumes of one folder.
fn write_golden_stripes(folder: &Path) {
    let folders = vec![folder.to_owned(); usize::from(PARTS)];
    let paths = write_striped(&folders, &wide(WeightType::Bf16), &[2, 1, 1], true);
    let golden = VolumeName::first_of(&folder.join("v2-striped.sluice"), PARTS);
    for (volume, path) in (0..).zip(paths) {
        fs::rename(path, golden.path_of(volume)).unwrap();
    }
}

/// A model of weights as they are in trained models, compressed, in volumes.
fn write_golden_parts(whole: &Path) {
    let paths = write_parts(whole, &wide(WeightType::Bf16), 80_000, true);
    assert_eq!(paths.len(), usize::from(PARTS));
}

/// Made the golden files. A change of one of them is a mistake: make a new version with its own file instead.
#[test]
#[ignore = "writes the golden files of the newest version"]
fn write_the_golden_files() {
    write(&data("v2-small.sluice"), &content(), 4096).unwrap();
    write_golden_parts(&data("v2-parts.sluice"));
    write_golden_stripes(&data(""));
    for name in &GOLDEN[1..] {
        let description = describe(&ModelFile::open(&path_of(name)).unwrap());
        let json = serde_json::to_string_pretty(&description).unwrap();
        fs::write(data(&format!("{name}.json")), json + "\n").unwrap();
    }
}

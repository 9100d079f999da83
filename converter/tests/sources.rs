//! What a resumed conversion believes: of its source, of its partial file, and of what lies beside the destination.

use crate::common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::common::{Synthetic, fixture, options};
use sluice_converter::provenance::Comparison;
use sluice_converter::{ConvertError, Options, Progress, Summary, convert};
use sluice_format::{ModelFile, PROVENANCE_BLOB, SOURCE_DIGESTS_BLOB};

fn test_options() -> Options {
    options("q8", "keep")
}

/// Does something when the conversion begins, once, and keeps the remarks.
struct Meddler<F> {
    action: F,
    done: AtomicBool,
    notes: Mutex<Vec<String>>,
}

impl<F: Fn() + Sync> Meddler<F> {
    fn new(action: F) -> Self {
        Meddler { action, done: AtomicBool::new(false), notes: Mutex::default() }
    }

    fn heard(&self, words: &str) -> bool {
        self.notes.lock().unwrap().iter().any(|note| note.contains(words))
    }
}

impl<F: Fn() + Sync> Progress for Meddler<F> {
    fn started(&self, _: u64, _: u64) {}
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }
    fn advanced(&self, _: u64) {
        if !self.done.swap(true, Ordering::Relaxed) {
            (self.action)();
        }
    }
}

/// A checkpoint of one layer of experts in a folder of its own.
fn source() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    fs::create_dir(&src).unwrap();
    Synthetic::default().write(&src, 2);
    (dir, src)
}

/// Runs a conversion that ends before its last step: the partial file is whole, and its journal knows all of it.
fn stop_at_the_end(src: &Path, dst: &Path, options: &Options) {
    let error = convert(src, dst, options, &Meddler::new(|| fs::write(dst, "").unwrap())).unwrap_err();
    assert!(matches!(error, ConvertError::Exists { .. }), "{error}");
    fs::remove_file(dst).unwrap();
}

fn clean(src: &Path, dir: &Path, options: &Options) -> Vec<u8> {
    let dst = dir.join("clean");
    convert(src, &dst, options, &()).unwrap();
    let bytes = fs::read(&dst).unwrap();
    fs::remove_file(dst).unwrap();
    bytes
}

fn touch(path: &Path) {
    File::options().write(true).open(path).unwrap().set_modified(SystemTime::now()).unwrap();
}

fn shard(src: &Path) -> PathBuf {
    src.join("model-00001-of-000002.safetensors")
}

/// Changes the sign of the last weight of a shard, in place and with the old times.
fn change_last_weight(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let metadata = file.metadata().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, metadata.len() - 1).unwrap();
    file.write_all_at(&[byte[0] ^ 0x80], metadata.len() - 1).unwrap();
    file.set_modified(metadata.modified().unwrap()).unwrap();
}

fn resume(src: &Path, dst: &Path, options: &Options) -> (Summary, Vec<u8>) {
    let summary = convert(src, dst, options, &()).unwrap();
    (summary, fs::read(dst).unwrap())
}

#[test]
fn only_what_was_made_of_other_bytes_is_made_again() {
    let (dir, src) = source();
    let dst = dir.path().join("m");
    stop_at_the_end(&src, &dst, &test_options());
    change_last_weight(&shard(&src));
    let listener = Meddler::new(|| ());
    let summary = convert(&src, &dst, &test_options(), &listener).unwrap();
    let extents = ModelFile::open(&dst).unwrap().extents().len();
    assert!(summary.resumed_extents < extents && summary.resumed_extents + 2 >= extents, "{}", summary.resumed_extents);
    assert!(listener.heard("were made of other weights"));
    assert!(fs::read(&dst).unwrap() == clean(&src, dir.path(), &test_options()));
}

/// Touched, copied elsewhere: the bytes are the same, and that is what counts. Of every format that the converter reads, since
/// each is read in another way.
#[test]
fn the_same_bytes_with_another_identity_are_all_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut formats = 0;
    for folder in fs::read_dir(fixture("golden")).unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.join("config.json").exists() {
            continue;
        }
        formats += 1;
        let name = folder.file_name().unwrap().to_str().unwrap();
        let (src, dst) = (dir.path().join(name), dir.path().join(format!("{name}.sluice")));
        let copy = |to: &Path| {
            fs::create_dir(to).unwrap();
            fs::read_dir(&folder).unwrap().map(|f| f.unwrap()).for_each(|f| {
                fs::copy(f.path(), to.join(f.file_name())).unwrap();
            });
        };
        copy(&src);
        for types in [options("keep", "keep"), options("q4", "q8")] {
            let wanted = clean(&src, dir.path(), &types);
            stop_at_the_end(&src, &dst, &types);
            let elsewhere = dir.path().join(format!("{name}-elsewhere"));
            copy(&elsewhere);
            let (summary, bytes) = resume(&elsewhere, &dst, &types);
            assert_eq!(
                (summary.resumed_extents, summary.bytes_written),
                (ModelFile::open(&dst).unwrap().extents().len(), 0)
            );
            assert!(bytes == wanted, "{name}");
            fs::remove_dir_all(elsewhere).unwrap();
            fs::remove_file(&dst).unwrap();
        }
    }
    assert!(formats > 10);
}

#[test]
fn a_mended_tokenizer_costs_nothing_and_another_config_everything() {
    let (dir, src) = source();
    let dst = dir.path().join("m");
    fs::write(src.join("tokenizer.json"), r#"{"version": "1.0"}"#).unwrap();
    stop_at_the_end(&src, &dst, &test_options());
    fs::write(src.join("tokenizer.json"), r#"{"version": "1.1"}"#).unwrap();
    let (summary, bytes) = resume(&src, &dst, &test_options());
    assert_eq!(summary.bytes_written, 0);
    assert!(bytes == clean(&src, dir.path(), &test_options()));
    assert_eq!(ModelFile::open(&dst).unwrap().metadata().get("tokenizer.json").unwrap(), br#"{"version": "1.1"}"#);

    fs::remove_file(&dst).unwrap();
    stop_at_the_end(&src, &dst, &test_options());
    let config = fs::read_to_string(src.join("config.json")).unwrap();
    fs::write(src.join("config.json"), config.replace("10000", "20000")).unwrap();
    let (summary, bytes) = resume(&src, &dst, &test_options());
    assert!(summary.restarted && summary.resumed_extents == 0);
    assert!(bytes == clean(&src, dir.path(), &test_options()));
}

#[test]
fn damage_of_the_partial_file_is_mended() {
    let (dir, src) = source();
    let (dst, partial) = (dir.path().join("m"), dir.path().join("m.partial"));
    let wanted = clean(&src, dir.path(), &test_options());
    let model = dir.path().join("intact");
    fs::write(&model, &wanted).unwrap();
    let extents = ModelFile::open(&model).unwrap().extents().to_vec();
    stop_at_the_end(&src, &dst, &test_options());
    // The last byte of one extent, and the first of another.
    let file = File::options().read(true).write(true).open(&partial).unwrap();
    for at in [extents[3].offset + extents[3].stored_len - 1, extents[9].offset] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
    let meddler = Meddler::new(|| fs::write(&dst, "").unwrap());
    assert!(matches!(convert(&src, &dst, &test_options(), &meddler), Err(ConvertError::Exists { .. })));
    assert!(meddler.heard("2 of") && meddler.heard("damaged"));
    fs::remove_file(&dst).unwrap();
    // The journal of the run that has mended them is believed in turn.
    let summary = convert(&src, &dst, &test_options(), &()).unwrap();
    assert_eq!(summary.resumed_extents, extents.len());
    assert!(fs::read(&dst).unwrap() == wanted);
}

#[test]
fn a_source_that_changes_while_it_is_read_is_named_and_nothing_of_it_is_believed() {
    let (dir, src) = source();
    let path = shard(&src);
    let replaced = dir.path().join("download");
    fs::copy(&path, &replaced).unwrap();
    change_last_weight(&replaced);
    let changes: [(&str, &(dyn Fn() + Sync)); 4] = [
        ("in place", &|| change_last_weight(&path)),
        ("touched", &|| touch(&path)),
        ("replaced", &|| fs::rename(&replaced, &path).unwrap()),
        ("cut", &|| File::options().write(true).open(&path).unwrap().set_len(100).unwrap()),
    ];
    for (how, change) in changes {
        let whole = fs::read(&path).unwrap();
        let dst = dir.path().join(how);
        let error = convert(&src, &dst, &test_options(), &Meddler::new(change)).unwrap_err();
        let ConvertError::SourceChanged { path: named } = &error else { panic!("{how}: {error}") };
        assert_eq!(*named, path);
        assert!(error.to_string().contains("Run the same command again"), "{error}");
        if how == "cut" {
            assert!(matches!(convert(&src, &dst, &test_options(), &()), Err(ConvertError::Damaged { .. })));
            fs::write(&path, whole).unwrap();
        }
        let (_, bytes) = resume(&src, &dst, &test_options());
        assert!(bytes == clean(&src, dir.path(), &test_options()), "{how}");
    }
}

/// Two images of filesystems can give the same identity to different files.
#[test]
fn a_journal_that_names_these_files_and_was_made_of_others_is_not_believed() {
    let (dir, src) = source();
    let (other, dst, second) = (dir.path().join("other"), dir.path().join("m"), dir.path().join("second"));
    fs::create_dir(&other).unwrap();
    for file in fs::read_dir(&src).unwrap().map(|f| f.unwrap()) {
        let mut bytes = fs::read(file.path()).unwrap();
        if file.file_name().to_str().unwrap().ends_with(".safetensors") {
            let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[data..].iter_mut().skip(1).step_by(2).for_each(|b| *b ^= 0x80);
        }
        fs::write(other.join(file.file_name()), bytes).unwrap();
    }
    stop_at_the_end(&src, &dst, &test_options());
    stop_at_the_end(&other, &second, &test_options());
    // The header of the journal names the files of the second.
    let header = 8 + 16 + 4 * 8 + 2 * 56 + 8;
    let journal = dir.path().join("m.partial.journal");
    let theirs = fs::read(dir.path().join("second.partial.journal")).unwrap();
    File::options().write(true).open(journal).unwrap().write_all_at(&theirs[..header], 0).unwrap();
    let listener = Meddler::new(|| ());
    let summary = convert(&other, &dst, &test_options(), &listener).unwrap();
    assert!(summary.resumed_extents == 0 && listener.heard("were made of other weights"));
    assert!(fs::read(&dst).unwrap() == clean(&other, dir.path(), &test_options()));
}

#[test]
fn an_index_that_names_the_other_copy_of_a_tensor_is_another_source() {
    let (dir, src) = source();
    let dst = dir.path().join("m");
    // Both shards hold the final norm, with other values; the index says which one counts.
    let mut shards = [1, 2].map(|n| {
        let path = src.join(format!("model-{n:05}-of-000002.safetensors"));
        let mut tensors = common::safetensors::Tensors::new();
        common::safetensors::read_file(&path, &mut tensors);
        (path, tensors)
    });
    let name = "model.norm.weight";
    let holder = usize::from(shards[1].1.contains_key(name));
    let mut copy = shards[holder].1[name].clone();
    copy.bytes.iter_mut().skip(1).step_by(2).for_each(|b| *b ^= 0x80);
    shards[1 - holder].1.insert(name.into(), copy);
    for (path, tensors) in &shards {
        fs::write(path, common::safetensors::encode(tensors.iter())).unwrap();
    }
    stop_at_the_end(&src, &dst, &test_options());
    let index = src.join("model.safetensors.index.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    json["weight_map"][name] = shards[1 - holder].0.file_name().unwrap().to_str().unwrap().into();
    fs::write(index, json.to_string()).unwrap();
    let (summary, bytes) = resume(&src, &dst, &test_options());
    assert!(summary.restarted);
    assert!(bytes == clean(&src, dir.path(), &test_options()));
}

#[test]
fn a_conversion_that_comes_second_does_no_harm_to_the_first() {
    let (dir, src) = source();
    let (dst, partial) = (dir.path().join("m"), dir.path().join("m.partial"));
    // As if the first had written everything, superblock included, and had only its name to give.
    fs::write(&partial, clean(&src, dir.path(), &test_options())).unwrap();
    let before = fs::read(&partial).unwrap();
    let first = File::open(&partial).unwrap();
    first.lock().unwrap();
    assert!(matches!(convert(&src, &dst, &test_options(), &()), Err(ConvertError::Locked { .. })));
    assert!(fs::read(&partial).unwrap() == before);
    drop(first);
    // What has taken the name of the partial file meanwhile is not made the model.
    let meddler = Meddler::new(|| {
        fs::remove_file(&partial).unwrap();
        fs::write(&partial, "precious").unwrap();
    });
    assert!(matches!(convert(&src, &dst, &test_options(), &meddler), Err(ConvertError::InTheWay { .. })));
    assert!(!dst.exists());
    assert_eq!(fs::read(&partial).unwrap(), b"precious");
}

#[test]
fn provenance_covers_every_byte_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    // DeepSeek-V3 has tensors that no conversion uses, fp8 scales, and matrices that are cut apart.
    let src = dir.path().join("src");
    fs::create_dir(&src).unwrap();
    Synthetic { dtype: "F8_E4M3", ..Synthetic::default() }.write(&src, 3);
    let dst = dir.path().join("m");
    convert(&src, &dst, &options("keep", "keep"), &()).unwrap();
    let model = ModelFile::open(&dst).unwrap();
    let provenance: serde_json::Value = serde_json::from_slice(model.metadata().get(PROVENANCE_BLOB).unwrap()).unwrap();
    let files = provenance["source_files"].as_array().unwrap();
    assert_eq!(files.len(), 3);
    let mut digests = model.metadata().get(SOURCE_DIGESTS_BLOB).unwrap().chunks(16);
    for file in files {
        let bytes = fs::read(src.join(file["name"].as_str().unwrap())).unwrap();
        assert_eq!(file["bytes"], bytes.len());
        // The definition, as the documentation gives it, computed once more.
        let hash = |bytes: &[u8]| xxhash_rust::xxh3::xxh3_128(bytes).to_le_bytes();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..data]).unwrap();
        let offset = |t: &serde_json::Value, i: usize| data + t["data_offsets"][i].as_u64().unwrap() as usize;
        let mut places: Vec<_> = header.iter().filter(|(name, _)| *name != "__metadata__").map(|(_, t)| t).collect();
        places.sort_by_key(|t| offset(t, 0));
        let mut all = hash(&bytes[..data]).to_vec();
        for tensor in places {
            let leaves = bytes[offset(tensor, 0)..offset(tensor, 1)].chunks(16 << 10).flat_map(hash);
            let digest = hash(&leaves.collect::<Vec<_>>());
            assert_eq!(digests.next().unwrap(), digest);
            all.extend(digest);
        }
        let whole = u128::from_le_bytes(hash(&all));
        assert_eq!(file["xxh3_128"], format!("{whole:032x}"));
    }
    assert!(digests.next().is_none());

    let same = |src: &Path| {
        let files = Comparison::new(&model, src).unwrap().run(&|_| ()).unwrap();
        files.iter().all(|f| f.difference.is_none())
    };
    assert!(same(&src));
    for at in [9, 600, 5000] {
        let path = src.join("model-00002-of-000003.safetensors");
        let bytes = fs::read(&path).unwrap();
        let mut changed = bytes.clone();
        let at = bytes.len() - at;
        changed[at] ^= 1;
        fs::write(&path, changed).unwrap();
        assert!(!same(&src));
        fs::write(&path, bytes).unwrap();
    }
    assert!(same(&src));
}

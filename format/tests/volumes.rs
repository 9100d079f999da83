//! Models in several volumes: opened by any of their names, and refused where one is missing, damaged or of another model.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;
use sluice_format::*;

/// A model in four volumes or so.
fn parts() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(&dir.path().join("m.sluice"), &wide(WeightType::Bf16), 60_000, false);
    assert!(paths.len() > 2, "{paths:?}");
    (dir, paths)
}

fn refusal(path: &Path) -> FormatError {
    ModelFile::open(path).expect_err("a volume is wrong")
}

#[test]
fn any_name_opens_the_model() {
    let (dir, paths) = parts();
    let content = wide(WeightType::Bf16);
    for path in &paths {
        let model = ModelFile::open(path).unwrap();
        assert_eq!(model.path(), paths[0]);
        assert_eq!(model.volumes().iter().map(Volume::path).collect::<Vec<_>>(), paths);
        assert_eq!((model.tensors(), model.metadata()), (&content.tensors[..], &content.metadata));
        assert!(model.verify_all(&mut |_| ()).is_empty());
        let lens: u64 = paths.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert_eq!(model.file_bytes(), lens);
        assert!(model.volumes().iter().all(|v| v.superblock().file_len <= 60_000));
        let mut buffer = Vec::new();
        for (i, extent) in model.extents().iter().enumerate() {
            model.read_extent(extent, &mut buffer).unwrap();
            assert!(buffer[..extent.logical_len as usize] == trained(&content, i), "{}", extent.name());
        }
    }
    // Through links, from another folder.
    let other = tempfile::tempdir().unwrap();
    for path in &paths {
        std::os::unix::fs::symlink(path, other.path().join(path.file_name().unwrap())).unwrap();
    }
    ModelFile::open(&other.path().join(paths[1].file_name().unwrap())).unwrap();
    drop(dir);
}

/// The name that the model would have as one file opens it, as long as it says which model.
#[test]
fn the_name_without_numbers_opens_the_model() {
    let (dir, paths) = parts();
    let whole = dir.path().join("m.sluice");
    assert_eq!(model_path(&whole).unwrap(), paths[0]);
    assert_eq!(ModelFile::open(&whole).unwrap().path(), paths[0]);
    assert!(recover(&whole).unwrap().is_none());
    for other in ["n.sluice", "m", "m.sluice.partial"] {
        let other = dir.path().join(other);
        assert_eq!(model_path(&other).unwrap(), other);
        assert!(matches!(refusal(&other), FormatError::Io { .. }));
    }
    // What is not there and is called like a volume may be on a drive that is mounted elsewhere.
    let other = dir.path().join("m-00009-of-00009.sluice");
    assert_eq!(model_path(&other).unwrap(), other);
    let refused = refusal(&other);
    assert!(matches!(&refused, FormatError::MissingVolume { path, count: 9, .. } if *path == other), "{refused}");
    assert!(refused.to_string().contains("it is one of the 9") && refused.to_string().contains("SLUICE_VOLUMES"));
    // Without the first one, it is said which is missing.
    let hidden = dir.path().join("hidden");
    fs::rename(&paths[0], &hidden).unwrap();
    assert!(refusal(&whole).to_string().contains(&paths[0].display().to_string()));
    fs::rename(&hidden, &paths[0]).unwrap();
    // Volumes of two models are ambiguous; a file of that name is not.
    let second = dir.path().join("m-00002-of-00077.sluice");
    fs::copy(&paths[1], &second).unwrap();
    let refused = refusal(&whole);
    assert!(matches!(&refused, FormatError::Ambiguous { .. }), "{refused}");
    assert!(refused.to_string().contains("m-00001-of-00077.sluice"), "{refused}");
    fs::copy(&paths[0], &whole).unwrap();
    assert_eq!(model_path(&whole).unwrap(), whole);
}

#[test]
fn what_a_model_is_does_not_depend_on_its_volumes() {
    let content = wide(WeightType::Bf16);
    let id = |most, compress| {
        let dir = tempfile::tempdir().unwrap();
        let paths = write_parts(&dir.path().join("m.sluice"), &content, most, compress);
        let model = ModelFile::open(&paths[0]).unwrap();
        (model.state_id(), paths.len(), model.compressed_extents() > 0)
    };
    let whole = id(u64::MAX, false);
    assert_eq!((whole.1, whole.2), (1, false));
    for (most, compress) in [(60_000, false), (60_000, true), (u64::MAX, true)] {
        let other = id(most, compress);
        assert_eq!((other.0, other.2), (whole.0, compress));
    }
}

#[test]
fn a_missing_volume_is_named() {
    let (_dir, paths) = parts();
    for (missing, path) in paths.iter().enumerate() {
        let hidden = path.with_extension("hidden");
        fs::rename(path, &hidden).unwrap();
        let named = &paths[(missing + 1) % paths.len()];
        let refused = refusal(named);
        assert!(matches!(&refused, FormatError::MissingVolume { path: p, .. } if p == path), "{refused}");
        assert!(refused.to_string().contains(&path.display().to_string()), "{refused}");
        fs::rename(&hidden, path).unwrap();
    }
}

#[test]
fn a_name_that_does_not_say_which_volume_it_is_is_refused() {
    let (dir, paths) = parts();
    for name in ["m.sluice", "m-00003-of-00009.sluice", "m-00002-of-00003.sluice"] {
        let copy = dir.path().join(name);
        fs::copy(&paths[0], &copy).unwrap();
        let refused = refusal(&copy);
        assert!(matches!(refused, FormatError::VolumeName { volume: 0, .. }), "{name}: {refused}");
        fs::remove_file(&copy).unwrap();
    }
}

#[test]
fn volumes_of_another_model_are_refused() {
    let (_dir, paths) = parts();
    let mut content = wide(WeightType::Bf16);
    content.planned.reverse();
    let other = tempfile::tempdir().unwrap();
    let others = write_parts(&other.path().join("m.sluice"), &content, 60_000, false);
    assert_eq!(others.len(), paths.len());
    for (own, other) in paths.iter().zip(&others) {
        let bytes = fs::read(own).unwrap();
        fs::copy(other, own).unwrap();
        let named = paths.iter().find(|path| *path != own).unwrap();
        let refused = refusal(named);
        assert!(matches!(refused, FormatError::ForeignVolume { .. }), "{refused}");
        fs::write(own, bytes).unwrap();
    }
    // The right model, under the wrong number.
    fs::copy(&paths[1], &paths[2]).unwrap();
    let refused = refusal(&paths[0]);
    assert!(matches!(refused, FormatError::ForeignVolume { .. }), "{refused}");
}

/// Every byte of every volume is guarded: at opening, by the checksum of an extent, or by the verification of the tables' copies.
#[test]
fn every_changed_byte_of_every_volume_is_noticed() {
    for compress in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let paths = write_parts(&dir.path().join("m.sluice"), &wide(WeightType::Bf16), 60_000, compress);
        every_change_is_noticed(&paths, 176);
    }
}

#[test]
fn metadata_is_replaced_in_the_first_volume_alone() {
    let (_dir, paths) = parts();
    let before: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let model = ModelFile::open(&paths[2]).unwrap();
    let mut metadata = model.metadata().clone();
    metadata.insert(TOKENIZER_BLOB, Random(5).bytes(50_000));
    let new = rewrite_metadata(&model, &metadata).unwrap();
    assert_eq!(*new.metadata(), metadata);
    assert_ne!(new.superblock().model_id, model.superblock().model_id);
    for (path, before) in paths.iter().zip(&before).skip(1) {
        assert!(fs::read(path).unwrap() == *before, "{}", path.display());
    }
    // Interrupted with half a log: named by any volume, it is undone.
    let mut torn = fs::read(&paths[0]).unwrap();
    torn.extend([7; 5000]);
    fs::write(&paths[0], &torn).unwrap();
    assert_eq!(recover(&paths[1]).unwrap(), Some(Recovery::Undone));
    assert_eq!(*ModelFile::open(&paths[1]).unwrap().metadata(), metadata);
}

#[test]
fn what_cannot_be_split_is_refused() {
    let layout = || FileLayout::new(4096, &wide(WeightType::Bf16).planned).unwrap();
    let least = |layout: FileLayout, most, tables| match layout.split(most, tables).unwrap_err() {
        FormatError::VolumeSize { most: asked, least } if asked == most => least,
        other => panic!("{other}"),
    };
    // The longest extent, the superblock and the tables.
    let named = least(layout(), 20_000, 3 * 4096);
    assert_eq!(named, least(layout(), 0, 3 * 4096));
    layout().split(named, 3 * 4096).unwrap();
    let many = vec![PlannedExtent { kind: ExtentKind::Expert, layer: 0, index: 0, logical_len: 1 }; 1025];
    let layout = || FileLayout::new(4096, &many).unwrap();
    assert_eq!(least(layout(), 3 * 4096, 4096), 4 * 4096);
    assert_eq!(layout().split(4 * 4096, 4096).unwrap().ends().len(), 513);
}

/// A run that was killed while it drew a compressed model together, wherever it was, is gone on with.
#[test]
fn what_was_drawn_together_before_a_kill_stays() {
    let content = wide(WeightType::Bf16);
    let dir = tempfile::tempdir().unwrap();
    let want = write_parts(&dir.path().join("want.sluice"), &content, 60_000, true);
    let want: Vec<Vec<u8>> = want.iter().map(|path| fs::read(path).unwrap()).collect();
    let layout = || FileLayout::new(4096, &content.planned).unwrap().split(60_000, 3 * 4096).unwrap();
    let open = |volume: u16| {
        let path = dir.path().join(format!("v{volume}"));
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        (path, file)
    };
    let writer = || {
        let mut writer = FileWriter::of_files((0..layout().ends().len() as u16).map(open).collect(), layout()).unwrap();
        writer.compress(&content.tensors);
        writer
    };
    for drawn in (0..=content.planned.len()).step_by(3) {
        let first = writer();
        let write = |i| {
            let mut extent = first.extent(i);
            extent.write(&trained(&content, i)).unwrap();
            extent.finish().unwrap()
        };
        // In any order.
        let mut written: Vec<_> = (0..content.planned.len()).rev().map(write).collect();
        written.reverse();
        let placed = FileWriter::places(&layout(), &written).unwrap();
        for (from, to) in layout().extents().iter().zip(placed.iter().map(|placed| placed.record)).take(drawn) {
            let mut bytes = vec![0; to.stored_len as usize];
            std::os::unix::fs::FileExt::read_exact_at(&open(from.volume).1, &mut bytes, from.offset).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&open(to.volume).1, &bytes, to.offset).unwrap();
        }
        drop(first);
        let (_, lens) = writer().finish(&written, &content.tensors, &content.metadata).unwrap();
        assert_eq!(lens.len(), want.len());
        for (volume, want) in want.iter().enumerate() {
            assert!(fs::read(open(volume as u16).0).unwrap() == *want, "{drawn} drawn, volume {volume}");
        }
    }
}

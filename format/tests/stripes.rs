//! Models that are striped: every read uses all volumes, and every volume must be there, be of this model and be sound.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;
use sluice_checksum::xxh3_128;
use sluice_format::fields::{extent, superblock};
use sluice_format::*;

/// Folders, as if on drives of their own.
fn folders(count: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let folders: Vec<PathBuf> = (0..count).map(|number| dir.path().join(format!("drive-{number}"))).collect();
    folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    (dir, folders)
}

fn refusal(path: &Path) -> FormatError {
    ModelFile::open(path).expect_err("a volume is wrong")
}

#[test]
fn striped_extents_hold_what_whole_ones_do() {
    let whole = tempfile::tempdir().unwrap();
    let content = wide(WeightType::Bf16);
    let whole = write_parts(&whole.path().join("m.sluice"), &content, u64::MAX, false);
    let whole = ModelFile::open(&whole[0]).unwrap();
    for shares in [&[1, 1][..], &[2, 1], &[1, 1, 1], &[1, 3], &[3, 1, 2]] {
        for compress in [false, true] {
            let (_dir, folders) = folders(shares.len());
            let paths = write_striped(&folders, &content, shares, compress);
            let model = ModelFile::open(&paths[0]).unwrap();
            assert!(model.is_striped());
            assert_eq!(model.compressed_extents() > 0, compress);
            assert_eq!(model.state_id(), whole.state_id());
            assert_eq!(model.volumes().iter().map(Volume::path).collect::<Vec<_>>(), paths);
            assert_eq!((model.tensors(), model.metadata()), (whole.tensors(), whole.metadata()));
            let (mut buffer, mut done) = (Vec::new(), 0);
            assert!(model.verify_all(&mut |bytes| done = bytes).is_empty());
            assert_eq!(done, model.extent_bytes());
            for (i, e) in model.extents().iter().enumerate() {
                model.read_extent(e, &mut buffer).unwrap();
                assert!(buffer[..e.logical_len as usize] == trained(&content, i), "{}", e.name());
                let stripes = model.stripes(e);
                assert_eq!(stripes.iter().map(|s| s.len).sum::<u64>(), e.stored_len);
                // As many as there are pages for.
                assert!(stripes.len() <= shares.len() && stripes.len() as u64 <= e.stored_len / 4096);
                assert_eq!((stripes[0].volume, stripes[0].offset), (e.volume, e.offset));
            }
            let shares_found = model.expert_shares();
            assert!((shares_found.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn bytes_are_divided_by_share() {
    let planned: Vec<_> = (0..3)
        .map(|index| PlannedExtent { kind: ExtentKind::Head, layer: NO_LAYER, index, logical_len: 300 * 4096 })
        .collect();
    let layout = FileLayout::new(4096, &planned).unwrap().stripe(Shares::new(&[2, 1]).unwrap()).unwrap();
    for number in 0..3 {
        let lens: Vec<u64> = layout.stripes(number, 300 * 4096).iter().map(|s| s.len / 4096).collect();
        assert_eq!(lens, [200, 100]);
        // What is compressed lies in front of where the next one begins.
        let short = layout.stripes(number, 7 * 4096);
        assert!(
            short.iter().zip(layout.stripes(number, 300 * 4096)).all(|(a, b)| a.offset == b.offset && a.len <= b.len)
        );
    }
    assert_eq!(layout.ends(), [4096 * 601, 4096 * 301]);
}

/// A flipped bit is found in whichever volume it is, and named with volume and offset.
#[test]
fn damage_is_named_with_its_volume_and_place() {
    let content = wide(WeightType::Bf16);
    for compress in [false, true] {
        let (_dir, folders) = folders(3);
        let paths = write_striped(&folders, &content, &[2, 1, 1], compress);
        let model = ModelFile::open(&paths[0]).unwrap();
        let striped = model.extents().iter().filter(|e| model.stripes(e).len() == 3);
        for e in striped.step_by(3) {
            for stripe in model.stripes(e) {
                let path = &paths[usize::from(stripe.volume)];
                let sound = fs::read(path).unwrap();
                let mut damaged = sound.clone();
                damaged[(stripe.offset + stripe.len / 2) as usize] ^= 0x10;
                fs::write(path, damaged).unwrap();
                let wrong = model.verify_all(&mut |_| ());
                let [FormatError::ExtentChecksum { path: named, extent, offset }] = &wrong[..] else {
                    panic!("{wrong:?}")
                };
                assert_eq!((named, extent, *offset), (path, &e.name(), stripe.offset));
                let read = model.read_extent(e, &mut Vec::new()).unwrap_err();
                assert!(read.to_string().contains(&path.display().to_string()), "{read}");
                fs::write(path, sound).unwrap();
            }
        }
    }
}

/// Every byte of every volume is guarded.
#[test]
fn every_changed_byte_of_every_volume_is_noticed() {
    let (_dir, folders) = folders(2);
    let paths = write_striped(&folders, &wide(WeightType::Bf16), &[2, 1], true);
    every_change_is_noticed(&paths, 300);
}

#[test]
fn volumes_are_found_where_the_first_says_or_beside_it() {
    let (dir, folders) = folders(3);
    let paths = write_striped(&folders, &wide(WeightType::Bf16), &[1, 1, 1], false);
    let model = ModelFile::open(&paths[0]).unwrap();
    assert_eq!(model.volumes()[0].folders(), &folders[1..]);
    // By the name without numbers too; by that of another volume only if the first is beside it.
    ModelFile::open(&folders[0].join("m.sluice")).unwrap();
    let refused = refusal(&paths[1]);
    let first = folders[1].join(paths[0].file_name().unwrap());
    assert!(matches!(&refused, FormatError::MissingVolume { path, .. } if *path == first), "{refused}");
    // Beside the first.
    let beside = folders[0].join(paths[2].file_name().unwrap());
    fs::rename(&paths[2], &beside).unwrap();
    assert_eq!(ModelFile::open(&paths[0]).unwrap().volumes()[2].path(), beside);
    fs::rename(&beside, &paths[2]).unwrap();
    // Nowhere: the place where it should be is named, and what to do.
    let hidden = dir.path().join("hidden");
    fs::rename(&folders[2], &hidden).unwrap();
    let refused = refusal(&paths[0]);
    assert!(matches!(&refused, FormatError::MissingVolume { path, .. } if *path == paths[2]), "{refused}");
    assert!(refused.to_string().contains("SLUICE_VOLUMES"), "{refused}");
    fs::rename(&hidden, &folders[2]).unwrap();
    ModelFile::open(&paths[0]).unwrap();
}

/// Another conversion's volume, the right volume under another number, and two that have changed places.
#[test]
fn volumes_that_do_not_belong_are_refused() {
    let content = wide(WeightType::Bf16);
    let (_dir, mine) = folders(2);
    let (_other_dir, theirs) = folders(2);
    let paths = write_striped(&mine, &content, &[1, 1], false);
    let other_shares = write_striped(&theirs, &content, &[2, 1], false);
    let second = fs::read(&paths[1]).unwrap();
    fs::copy(&other_shares[1], &paths[1]).unwrap();
    let refused = refusal(&paths[0]);
    assert!(matches!(&refused, FormatError::ForeignVolume { path, .. } if *path == paths[1]), "{refused}");
    fs::copy(&paths[0], &paths[1]).unwrap();
    let refused = refusal(&paths[0]);
    assert!(matches!(&refused, FormatError::ForeignVolume { path, .. } if *path == paths[1]), "{refused}");
    // Swapped: the first is named by its number, and is not it.
    let first = fs::read(&paths[0]).unwrap();
    fs::write(&paths[0], &second).unwrap();
    let refused = refusal(&paths[0]);
    assert!(matches!(refused, FormatError::VolumeName { volume: 1, count: 2, .. }), "{refused}");
    fs::write(&paths[0], first).unwrap();
    fs::write(&paths[1], &second[..second.len() - 1]).unwrap();
    assert!(matches!(refusal(&paths[0]), FormatError::FileLength { path, .. } if path == paths[1]));
    fs::write(&paths[1], &second).unwrap();
    ModelFile::open(&paths[0]).unwrap();
}

#[test]
fn metadata_is_replaced_and_the_folders_stay() {
    let (_dir, folders) = folders(2);
    let paths = write_striped(&folders, &wide(WeightType::Bf16), &[1, 1], false);
    let model = ModelFile::open(&paths[0]).unwrap();
    let mut metadata = model.metadata().clone();
    metadata.insert(TOKENIZER_BLOB, Random(5).bytes(50_000));
    let new = rewrite_metadata(&model, &metadata).unwrap();
    assert_eq!((new.metadata(), new.volumes()[0].folders()), (&metadata, &folders[1..]));
    assert_eq!(new.volumes()[1].path(), paths[1]);
    assert!(new.verify_all(&mut |_| ()).is_empty());
}

/// Changes the records of the extent table in every volume, and makes the checksums and ids right again.
fn forge(paths: &[PathBuf], change: &dyn Fn(&mut [[u8; extent::LEN]])) {
    let table_of = |file: &[u8], name| {
        let start = at(&superblock::FIELDS, name).0;
        let number = |offset| get(file, start + offset, 8) as usize;
        (start, number(0)..number(0) + number(8), number(16))
    };
    for (volume, path) in paths.iter().enumerate() {
        let mut file = fs::read(path).unwrap();
        let (reference, stored, logical) = table_of(&file, "extents");
        change(file[stored.clone()][..logical].as_chunks_mut().0);
        let sum = checksum(&file[stored.clone()]);
        set(&mut file, reference + 24, 8, sum);
        let (_, tensors, tensors_len) = table_of(&file, "tensors");
        let (_, metadata, metadata_len) = table_of(&file, "metadata");
        let blobs = match volume {
            0 => blobs(&file, &file[metadata][..metadata_len]).unwrap(),
            _ => Vec::new(),
        };
        let parts = [&file[stored][..logical], &file[tensors][..tensors_len], &blobs].map(xxh3_128);
        let id = xxh3_128(&parts.map(u128::to_le_bytes).concat()).to_le_bytes();
        let place = at(&superblock::FIELDS, "model_id").0;
        file[place..place + 16].copy_from_slice(&id);
        seal_superblock(&mut file[..4096]);
        fs::write(path, file).unwrap();
    }
}

/// Records that are sound by their checksums, and mean nothing.
#[test]
fn stripes_that_cannot_be_are_refused() {
    let content = wide(WeightType::Bf16);
    let set_field = |record: &mut [u8], name: &str, value| {
        let (offset, len) = at(&extent::FIELDS, name);
        set(record, offset, len, value);
    };
    let field = |record: &[u8], name: &str| {
        let (offset, len) = at(&extent::FIELDS, name);
        get(record, offset, len)
    };
    // The last extent whose second stripe is record `i`.
    let second =
        |records: &[[u8; extent::LEN]]| records.iter().rposition(|r| field(r, "stripe") == 1).expect("it is striped");
    type Change<'a> = (&'a str, &'a dyn Fn(&mut [[u8; extent::LEN]]));
    let changes: [Change<'_>; 11] = [
        ("does not follow", &|r| set_field(&mut r[0], "stripe", 1)),
        ("does not follow", &|r| set_field(&mut r[second(r)], "stripe", 2)),
        ("impossible stored length", &|r| set_field(&mut r[second(r)], "stripe", 0)),
        ("does not follow", &|r| set_field(&mut r[second(r)], "stripe", 0xffff)),
        ("not in ascending volumes", &|r| set_field(&mut r[second(r)], "volume", 0)),
        ("lies in volume 7", &|r| set_field(&mut r[second(r)], "volume", 7)),
        ("disagree", &|r| set_field(&mut r[second(r)], "codec", 1)),
        ("disagree", &|r| set_field(&mut r[second(r)], "logical_len", 1)),
        ("disagree", &|r| set_field(&mut r[second(r)], "logical_checksum", 1)),
        ("2^64", &|r| set_field(&mut r[second(r)], "stored_len", u64::MAX - 4095)),
        ("a region begins at offset", &|r| {
            let i = second(r);
            let (a, b) = (field(&r[i - 1], "stored_len"), field(&r[i], "stored_len"));
            set_field(&mut r[i - 1], "stored_len", a + 1);
            set_field(&mut r[i], "stored_len", b - 1);
        }),
    ];
    for (problem, change) in changes {
        let (_dir, folders) = folders(2);
        let paths = write_striped(&folders, &content, &[1, 1], false);
        forge(&paths, &|_| ());
        ModelFile::open(&paths[0]).expect("nothing was changed");
        forge(&paths, change);
        let refused = refusal(&paths[0]);
        assert!(matches!(refused, FormatError::Invalid { region: Region::ExtentTable, .. }), "{problem}: {refused}");
        assert!(refused.to_string().contains(problem), "{problem}: {refused}");
    }
    // Stripes with the right sums, in the wrong order, are not what the extent was.
    let (_dir, folders) = folders(2);
    let paths = write_striped(&folders, &content, &[1, 1], false);
    forge(&paths, &|r| {
        let i = second(r);
        set_field(&mut r[i - 1], "logical_checksum", 1);
        set_field(&mut r[i], "logical_checksum", 1);
    });
    let model = ModelFile::open(&paths[0]).unwrap();
    assert!(matches!(&model.verify_all(&mut |_| ())[..], [FormatError::ExtentChecksum { .. }]));
}

/// Any field of any record of the table, changed and sealed: an error, or a model that can be verified; never a panic.
#[test]
fn any_changed_record_is_an_error_or_a_model() {
    let content = wide(WeightType::Bf16);
    let mut random = Random(11);
    for round in 0..200 {
        let (_dir, folders) = folders(2);
        let paths = write_striped(&folders, &content, &[2, 1], round % 2 == 0);
        let (record, field) = (random.next() as usize, random.next() as usize);
        let value = [0, 1, 4096, u64::MAX, random.next(), random.next() % 5][random.next() as usize % 6];
        forge(&paths, &|records| {
            let field = &extent::FIELDS[field % extent::FIELDS.len()];
            set(&mut records[record % records.len()], field.offset, field.len, value);
        });
        if let Ok(model) = ModelFile::open(&paths[0]) {
            model.verify_all(&mut |_| ()).iter().for_each(|wrong| assert!(!wrong.to_string().is_empty()));
        }
    }
}

/// Names of folders in the superblock that have no end, or are followed by something, or stand in another volume.
#[test]
fn folders_in_the_superblock_are_checked() {
    let (_dir, folders) = folders(2);
    let paths = write_striped(&folders, &wide(WeightType::Bf16), &[1, 1], false);
    let changed = |volume: usize, change: &dyn Fn(&mut [u8])| {
        let sound = fs::read(&paths[volume]).unwrap();
        let mut file = sound.clone();
        change(&mut file[..4096]);
        seal_superblock(&mut file[..4096]);
        fs::write(&paths[volume], file).unwrap();
        let opened = ModelFile::open(&paths[0]);
        fs::write(&paths[volume], sound).unwrap();
        opened
    };
    let invalid = |opened: Result<ModelFile, FormatError>| {
        let refused = opened.expect_err("it is refused");
        assert!(matches!(refused, FormatError::Invalid { region: Region::Superblock, .. }), "{refused}");
    };
    invalid(changed(0, &|page| page[superblock::LEN..].fill(b'x')));
    invalid(changed(0, &|page| page[4095] = 1));
    invalid(changed(1, &|page| page[superblock::LEN] = b'x'));
    // Another folder, and none: the volume is not there, and not beside the first either.
    let missing = changed(0, &|page| page[superblock::LEN] = b'x').expect_err("it is not there");
    assert!(matches!(missing, FormatError::MissingVolume { .. }), "{missing}");
    let missing = changed(0, &|page| page[superblock::LEN..].fill(0)).expect_err("it is not there");
    assert!(matches!(missing, FormatError::MissingVolume { .. }), "{missing}");
}

//! Damage in transit and on the drive: every changed byte and every wrong length is noticed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use crate::support::*;
use sluice_format::*;

/// One bit, another bit, all bits.
const MASKS: [u8; 3] = [0x01, 0x40, 0xff];

/// Every byte of the file is in the superblock, a table or an extent; a change of any is refused by the check that guards it.
#[test]
fn every_changed_byte_is_noticed() {
    let (_dir, path) = temp();
    let file = small_file(4096);
    let sound = open_bytes(&path, &file).unwrap();
    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    let extents_end = sound.superblock().extents.offset as usize;
    let mut buffer = Vec::new();
    for (at, &byte) in file.iter().enumerate() {
        let extent = sound.extents().iter().find(|e| (e.offset..e.offset + e.stored_len).contains(&(at as u64)));
        for mask in MASKS {
            disk.write_all_at(&[byte ^ mask], at as u64).unwrap();
            match extent {
                Some(extent) => {
                    let error = sound.read_extent(extent, &mut buffer).expect_err("the extent is damaged");
                    assert_eq!(variant(&error), "ExtentChecksum", "byte {at} mask {mask}");
                    assert!(error.to_string().contains(&extent.name()));
                }
                None => {
                    let error = ModelFile::open(&path).expect_err("superblock or table is damaged");
                    let expected: &[&str] = match at {
                        0..8 => &["NotSluice"],
                        8..12 => &["Version"],
                        // 4096 ^ mask may be the other allowed size, whose page then has another checksum.
                        12..16 => &["PageSize", "RegionChecksum"],
                        _ => &["RegionChecksum"],
                    };
                    assert!(expected.contains(&variant(&error).as_str()), "byte {at} mask {mask}: {error}");
                    assert!(at < 4096 || at >= extents_end);
                }
            }
        }
        disk.write_all_at(&[byte], at as u64).unwrap();
    }
    assert!(fs::read(&path).unwrap() == file);
}

#[test]
fn every_wrong_length_is_noticed() {
    let (_dir, path) = temp();
    let file = small_file(4096);
    let lengths = (0..file.len()).step_by(4096).flat_map(|page| [page, page + 1, page + 151, page + 152, page + 4095]);
    for len in lengths {
        let error = open_bytes(&path, &file[..len]).expect_err("the file is cut");
        let expected = if len < 152 { "NotSluice" } else { "FileLength" };
        assert_eq!(variant(&error), expected, "{len} bytes");
        assert!(len < 152 || error.to_string().contains("incomplete"), "{error}");
    }
    for extra in [1, 2, 4095, 4096, 4097] {
        let longer = [file.as_slice(), &vec![0; extra]].concat();
        let error = open_bytes(&path, &longer).unwrap_err();
        assert_eq!(variant(&error), "FileLength", "{extra} bytes more");
        assert!(error.to_string().contains("behind its end"), "{error}");
    }
}

#[test]
fn what_is_no_model_is_said_to_be_none() {
    let (dir, path) = temp();
    for (bytes, expected) in [
        (Vec::new(), "NotSluice"),
        (vec![0; 100], "NotSluice"),
        (vec![0; 4096], "Unfinished"),
        (vec![b'x'; 10_000], "NotSluice"),
        // A transfer in text mode changes the line ending.
        (small_file(4096).into_iter().filter(|&b| b != b'\r').collect(), "NotSluice"),
    ] {
        assert_eq!(variant(&open_bytes(&path, &bytes).unwrap_err()), expected);
    }
    assert_eq!(variant(&ModelFile::open(&dir.path().join("absent")).unwrap_err()), "Io");
    assert_eq!(variant(&ModelFile::open(dir.path()).unwrap_err()), "Io");
}

#[test]
fn verification_names_every_damaged_extent() {
    let (_dir, path) = temp();
    let model = open_bytes(&path, &small_file(4096)).unwrap();
    let mut steps = Vec::new();
    assert!(model.verify_all(&mut |done| steps.push(done)).is_empty());
    assert!(steps.is_sorted());
    assert_eq!(steps.last(), Some(&model.extent_bytes()));

    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    let hit = [(ExtentKind::Head, NO_LAYER, 1), (ExtentKind::Router, 1, 0), (ExtentKind::Expert, 1, 2)];
    for (kind, layer, index) in hit {
        let e = model.extent(kind, layer, index).unwrap();
        disk.write_all_at(&[0xa5, 0x5a], e.offset + e.logical_len - 9).unwrap();
    }
    let found: Vec<String> = model.verify_all(&mut |_| ()).iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), hit.len(), "{found:?}");
    for (message, (kind, layer, index)) in found.iter().zip(hit) {
        assert!(message.contains(&extent_name(kind, layer, index)), "{message}");
    }
    // Cut while open: the lost extents are listed, the others still verified.
    let first_expert = model.extent(ExtentKind::Expert, 1, 0).unwrap();
    disk.set_len(first_expert.offset).unwrap();
    let variants: Vec<String> = model.verify_all(&mut |_| ()).iter().map(variant).collect();
    assert_eq!(variants, ["ExtentChecksum", "ExtentChecksum", "ExtentRead", "ExtentRead", "ExtentRead"]);
}

/// An extent longer than the buffer of the verification, in several pieces.
#[test]
fn verification_reads_long_extents_in_pieces() {
    let (_dir, path) = temp();
    let mut spec = small_spec();
    spec.layers.truncate(1);
    spec.layers[0].ffn.dense_width = 150_000;
    write(&path, &plan(&spec, 20), 16384).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let dense = *model.extent(ExtentKind::Dense, 0, 0).unwrap();
    assert!(dense.stored_len > 8 << 20, "{}", dense.stored_len);
    let mut steps = 0;
    assert!(model.verify_all(&mut |_| steps += 1).is_empty());
    assert!(steps > model.extents().len());
    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    disk.write_all_at(&[1, 2, 3, 4], dense.offset + (8 << 20)).unwrap();
    let damaged = model.verify_all(&mut |_| ());
    assert_eq!(damaged.iter().map(variant).collect::<Vec<_>>(), ["ExtentChecksum"]);
}

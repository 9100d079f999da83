//! Importance files: what is written is read, what is damaged is refused, and what was not measured is made up sensibly.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::support::{gqa_spec, small_spec, temp};
use proptest::prelude::*;
use sluice_format::*;
use xxhash_rust::xxh3::Xxh3;

/// Offsets of the header, as in `docs/FORMAT.md`.
const CHECKSUM: usize = 40;
const HEADER: usize = 64;

fn expert(name: &str, index: u32) -> MatrixKey {
    MatrixKey { kind: ExtentKind::Expert, layer: 1, name: name.into(), index }
}

fn means(tokens: u64, mean_squares: Vec<f32>) -> ColumnMeans {
    ColumnMeans { tokens, mean_squares }
}

fn sample() -> Importance {
    let k_b = |index| MatrixKey { kind: ExtentKind::Attention, layer: 0, name: "k_b".into(), index };
    let head = MatrixKey { kind: ExtentKind::Head, layer: NO_LAYER, name: "head".into(), index: 0 };
    let matrices = BTreeMap::from([
        (expert("gate_up", 0), means(8, vec![1.0; 32])),
        (expert("gate_up", 2), means(24, (0..32).map(|i| i as f32).collect())),
        (expert("down", 2), means(24, vec![0.5; 24])),
        (k_b(0), means(100, vec![2.0; 8])),
        (k_b(1), means(100, vec![3.0; 8])),
        (head, means(100, vec![0.25; 32])),
    ]);
    Importance::new(&small_spec(), 100, matrices).unwrap()
}

fn load(path: &Path, bytes: &[u8]) -> Result<Importance, ImportanceError> {
    fs::write(path, bytes).unwrap();
    Importance::load(path, &small_spec())
}

/// Makes the checksum right.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let body_len = (bytes.len() - HEADER) as u64;
    bytes[32..40].copy_from_slice(&body_len.to_le_bytes());
    let mut hash = Xxh3::new();
    hash.update(&bytes[..CHECKSUM]);
    hash.update(&bytes[CHECKSUM + 8..]);
    bytes[CHECKSUM..CHECKSUM + 8].copy_from_slice(&hash.digest().to_le_bytes());
    bytes
}

#[test]
fn what_has_no_end_is_refused() {
    let endless = Importance::load(Path::new("/dev/zero"), &small_spec());
    assert!(matches!(endless, Err(ImportanceError::Io { .. })), "{endless:?}");
    // A sparse file of 64 GiB that begins like one of ours: nobody has to read it to the end.
    let (_folder, path) = temp();
    sample().save(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(64 << 30).unwrap();
    let long = Importance::load(&path, &small_spec());
    assert!(matches!(long, Err(ImportanceError::Damaged { .. })), "{long:?}");
    assert!(matches!(Importance::load(&path, &gqa_spec()), Err(ImportanceError::Geometry { .. })));
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    assert!(matches!(Importance::load(&path, &small_spec()), Err(ImportanceError::NotImportance { .. })));
}

#[test]
fn round_trip() {
    let (_folder, path) = temp();
    let importance = sample();
    importance.save(&path).unwrap();
    let again = Importance::load(&path, &small_spec()).unwrap();
    assert_eq!(again, importance);
    assert_eq!((again.tokens(), again.matrices().len(), again.digest()), (100, 6, importance.digest()));
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no partial file is left");
}

#[test]
fn unreached_experts_get_the_mean_of_the_layer() {
    let importance = sample();
    let of = |name, index| importance.columns(ExtentKind::Expert, 1, name, index);
    // Weighted with the tokens: (8·1 + 24·i) / 32.
    let mean: Vec<f32> = (0..32).map(|i| (8.0 + 24.0 * i as f32) / 32.0).collect();
    assert_eq!(of("gate_up", 1).unwrap(), mean);
    // Eight tokens of its own count as much as the eight of the mean.
    let mixed = of("gate_up", 0).unwrap();
    assert!(mixed.iter().zip(&mean).all(|(m, mean)| (m - (1.0 + mean) / 2.0).abs() < 1e-6));
    assert_eq!(of("down", 0).unwrap(), vec![0.5; 24]);
    assert_eq!(importance.columns(ExtentKind::Attention, 0, "k_b", 1).unwrap(), vec![3.0; 8]);
    assert_eq!(importance.columns(ExtentKind::Attention, 1, "k_b", 1), None, "another layer says nothing");
    assert_eq!(importance.columns(ExtentKind::Attention, 0, "o", 0), None);
}

#[test]
fn a_measurement_belongs_to_one_geometry() {
    let (_folder, path) = temp();
    sample().save(&path).unwrap();
    assert!(matches!(Importance::load(&path, &gqa_spec()), Err(ImportanceError::Geometry { .. })));
    let mut other = small_spec();
    other.layers[1].ffn.moe.as_mut().unwrap().experts = 4;
    assert!(matches!(Importance::load(&path, &other), Err(ImportanceError::Geometry { .. })));
}

#[test]
fn impossible_measurements_are_refused() {
    let new = |key, means| Importance::new(&small_spec(), 1, BTreeMap::from([(key, means)]));
    assert!(new(expert("gate_up", 2), means(1, vec![0.0; 32])).is_ok());
    assert!(new(expert("gate_up", 3), means(1, vec![0.0; 32])).is_err(), "no such expert");
    assert!(new(expert("gate_up", 0), means(1, vec![0.0; 31])).is_err(), "a column is missing");
    assert!(new(expert("gate", 0), means(1, vec![0.0; 32])).is_err(), "no such matrix");
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        assert!(new(expert("gate_up", 0), means(1, vec![bad; 32])).is_err(), "{bad}");
    }
}

#[test]
fn damage_has_a_name() {
    let (_folder, path) = temp();
    let good = sample().to_bytes();
    assert!(load(&path, &good).is_ok());
    let change = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert!(matches!(load(&path, b""), Err(ImportanceError::NotImportance { .. })));
    assert!(matches!(load(&path, &change(0, b'X')), Err(ImportanceError::NotImportance { .. })));
    assert!(matches!(load(&path, &change(8, 9)), Err(ImportanceError::Version { found: 9, .. })));
    assert!(matches!(load(&path, &good[..good.len() - 1]), Err(ImportanceError::Damaged { .. })));
    assert!(matches!(load(&path, &good[..20]), Err(ImportanceError::Damaged { .. })));
    assert!(matches!(Importance::load(&path.with_extension("no"), &small_spec()), Err(ImportanceError::Io { .. })));
    // Sealed again, so that each check behind the checksum is reached: entries, reserved bytes, kind, columns, order.
    let more = |n: u8| seal(change(12, n));
    for bytes in [more(5), more(7), seal(change(50, 1)), seal(change(HEADER, 99)), seal(change(HEADER + 2, 1))] {
        assert!(matches!(load(&path, &bytes), Err(ImportanceError::Damaged { .. })));
    }
    for (at, value) in [(HEADER + 12, 255), (HEADER + 15, 255), (HEADER + 24, 7), (HEADER + 4, 200)] {
        assert!(matches!(load(&path, &seal(change(at, value))), Err(ImportanceError::Damaged { .. })));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        changes in prop::collection::vec((8usize..900, any::<u8>()), 0..6),
        cut in 0usize..200,
        sealed: bool,
    ) {
        let (_folder, path) = temp();
        let mut bytes = sample().to_bytes();
        let unchanged = bytes.clone();
        for (at, value) in changes {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        bytes.truncate(bytes.len() - cut.saturating_sub(100));
        if sealed {
            bytes = seal(bytes);
        }
        let result = load(&path, &bytes);
        if bytes == unchanged {
            prop_assert!(result.is_ok());
        } else if !sealed && bytes[..8] == unchanged[..8] {
            prop_assert!(result.is_err());
        }
    }
}

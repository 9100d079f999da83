//! Compressed extents: whatever is compressed comes back, and whatever is hostile is refused.

use std::fs;
use std::sync::OnceLock;

use crate::support::*;
use proptest::prelude::*;
use sluice_format::fields::{extent, planes_frame, planes_head};
use sluice_format::planes::{Frames, LEAST_GAIN, decode};
use sluice_format::*;

fn compressed(content: &Content) -> (tempfile::TempDir, ModelFile) {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(&dir.path().join("m.sluice"), content, u64::MAX, true);
    let model = ModelFile::open(&paths[0]).unwrap();
    (dir, model)
}

#[test]
fn extents_come_back_and_only_those_are_compressed_that_gain() {
    for ty in WeightType::all().filter(|ty| ty.matrix_len(8, 128).is_some()) {
        let content = wide(ty);
        let (_dir, model) = compressed(&content);
        let mut buffer = Vec::new();
        for (i, e) in model.extents().iter().enumerate() {
            model.read_extent(e, &mut buffer).unwrap();
            assert_eq!(buffer.len() as u64, e.padded_len);
            let (logical, padding) = buffer.split_at(e.logical_len as usize);
            assert!(logical == trained(&content, i) && padding.iter().all(|&b| b == 0), "{ty} {}", e.name());
            match e.codec {
                Codec::Raw => assert_eq!(e.stored_len, e.padded_len),
                Codec::Planes => assert!(e.stored_len * 100 <= e.padded_len * (100 - LEAST_GAIN), "{ty} {}", e.name()),
            }
        }
        assert!(model.verify_all(&mut |_| ()).is_empty());
        let experts = model.extents().iter().filter(|e| e.kind == ExtentKind::Expert);
        let gains = matches!(ty, WeightType::Bf16 | WeightType::F16);
        assert!(!gains || experts.clone().all(|e| e.codec == Codec::Planes), "{ty}");
        let few_bits = ty.plain_element_len().is_none() && ty.row_group_len(1024).unwrap() <= 8 * 1024 * 7 / 8;
        assert!(!few_bits || experts.clone().all(|e| e.codec == Codec::Raw), "{ty}");
    }
}

/// One compressed expert, and its stored bytes.
fn expert() -> &'static (ExtentRecord, Vec<u8>, Vec<u8>) {
    static EXPERT: OnceLock<(ExtentRecord, Vec<u8>, Vec<u8>)> = OnceLock::new();
    EXPERT.get_or_init(|| {
        let (_dir, model) = compressed(&wide(WeightType::Bf16));
        let record = *model.extent(ExtentKind::Expert, 1, 0).unwrap();
        let (mut stored, mut padded) = (Vec::new(), Vec::new());
        model.read_stored(&record, &mut stored).unwrap();
        model.read_extent(&record, &mut padded).unwrap();
        (record, stored, padded)
    })
}

/// What decoding says.
fn outcome(stored: &[u8], logical_len: u64) -> Result<Vec<u8>, String> {
    let mut out = vec![0xee; expert().2.len()];
    decode(stored, logical_len, &mut out).map(|()| out)
}

#[test]
fn frames_are_independent() {
    let (record, stored, padded) = expert();
    let mut frames = Frames::default();
    let mut out = vec![0; padded.len()];
    let all = frames.read(stored, record.logical_len).unwrap().to_vec();
    assert!(all.len() > 1);
    for frame in all.iter().rev() {
        frame.decode(stored, &mut out[frame.range()]).unwrap();
    }
    assert!(out == *padded);
    assert!(outcome(stored, record.logical_len).unwrap() == *padded);
}

#[test]
fn broken_rules_are_named() {
    let (record, stored, _) = expert();
    let frame = |number: usize| planes_head::LEN + number * planes_frame::LEN;
    let bad = |says: &str, spoil: &dyn Fn(&mut Vec<u8>)| {
        let mut stored = stored.clone();
        spoil(&mut stored);
        let refused = outcome(&stored, record.logical_len).expect_err(says);
        assert!(refused.contains(says), "{says}: {refused}");
    };
    bad("no head", &|b| b.truncate(15));
    bad("records run past", &|b| set(b, 0, 4, u64::from(u32::MAX)));
    bad("its frames end at", &|b| set(b, 0, 4, 0));
    bad("reserved", &|b| b[4] = 1);
    bad("longer than its extent", &|b| set(b, 8, 8, u64::MAX));
    bad("longer than its extent", &|b| b.truncate(b.len() - 4096));
    bad("padding", &|b| *b.last_mut().unwrap() = 1);
    bad("padding", &|b| set(b, 8, 8, 40));
    for width in [0, 3, 5, 8, 255] {
        bad("frame 0: its width", &|b| b[frame(0) + 4] = width);
    }
    bad("frame 0: it has 0 bytes", &|b| set(b, frame(0), 4, 0));
    bad("frame 0: it has 16383 bytes", &|b| set(b, frame(0), 4, 16383));
    bad("frame 0: it has 4294967294 bytes", &|b| set(b, frame(0), 4, u64::from(u32::MAX) - 1));
    bad("frame 0: its reserved bytes", &|b| b[frame(0) + 5] = 1);
    bad("frame 0: its planes", &|b| set(b, frame(0) + 8, 4, 0));
    bad("frame 0: its planes", &|b| set(b, frame(0) + 8, 4, 1 << 20));
    bad("frame 0: its planes", &|b| set(b, frame(0) + 16, 4, 1));
    let wrong_len = outcome(stored, record.logical_len - 64).unwrap_err();
    assert!(wrong_len.contains("runs past the end"), "{wrong_len}");
}

/// A file whose checksums are right and whose planes are not is refused when the extent is read, and named by the verification.
#[test]
fn sealed_nonsense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_parts(&dir.path().join("m.sluice"), &wide(WeightType::Bf16), u64::MAX, true);
    let file = fs::read(&paths[0]).unwrap();
    let model = ModelFile::open(&paths[0]).unwrap();
    let number = model.extents().iter().position(|e| e.kind == ExtentKind::Expert).unwrap();
    let e = model.extents()[number];
    drop(model);
    let record = |image: &mut Image, name: &str, value: u64| {
        let (offset, len) = at(&extent::FIELDS, name);
        set(&mut image.extents[number], offset, len, value);
    };
    for at_stored in [planes_head::LEN, planes_head::LEN + 8, e.stored_len as usize / 4] {
        let mut image = Image::of(&file);
        let body = (e.offset - 4096) as usize..(e.offset - 4096 + e.stored_len) as usize;
        image.body[body.start + at_stored] ^= 0x01;
        let sum = checksum(&image.body[body]);
        record(&mut image, "checksum", sum);
        let model = open_bytes(&paths[0], &image.seal()).unwrap();
        let refused = model.read_extent(&model.extents()[number], &mut Vec::new()).unwrap_err();
        assert_eq!(variant(&refused), "ExtentCode", "{refused}");
        let found = model.verify_all(&mut |_| ());
        assert_eq!(found.iter().map(variant).collect::<Vec<_>>(), ["ExtentCode"]);
    }
    let mut image = Image::of(&file);
    record(&mut image, "logical_checksum", 1);
    let model = open_bytes(&paths[0], &image.seal()).unwrap();
    let refused = model.read_extent(&model.extents()[number], &mut Vec::new()).unwrap_err();
    assert!(refused.to_string().contains("another checksum"), "{refused}");
    // One that is no shorter than it would be without compression.
    let mut image = Image::of(&file);
    record(&mut image, "logical_len", e.stored_len);
    let refused = open_bytes(&paths[0], &image.seal()).unwrap_err().to_string();
    assert!(refused.contains("impossible stored length"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes that were changed are refused or become as many bytes; nothing panics.
    #[test]
    fn changed_bytes_are_refused_or_decode(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6)) {
        let (record, stored, _) = expert();
        let mut stored = stored.clone();
        for (at, byte, in_records) in changes {
            let most = if in_records { 200 } else { stored.len() };
            stored[at.index(most)] = byte;
        }
        if let Ok(out) = outcome(&stored, record.logical_len) {
            prop_assert!(out[record.logical_len as usize..].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn any_bytes_are_refused_or_decode(stored in prop::collection::vec(any::<u8>(), 0..300), logical_len in 0u64..5000) {
        let mut out = vec![0; 5000];
        let _ = decode(&stored, logical_len, &mut out);
    }
}

//! What is written is what is read; what the reader would refuse is not written.

use std::fs;

use crate::support::*;
use sluice_format::*;

#[test]
fn a_model_comes_back_as_it_was_written() {
    let others = [gqa_spec(), sparse_spec(), streams_spec(), hybrid_spec(), tables_spec(), recurrent_spec()];
    let others = others.into_iter().chain([predicting_spec(), norms_spec()]).map(|spec| (spec, 4096));
    for (spec, page_size) in [(small_spec(), 4096), (small_spec(), 16384)].into_iter().chain(others) {
        let (_dir, path) = temp();
        let content = plan(&spec, 8);
        let id = write(&path, &content, page_size).unwrap();
        let model = ModelFile::open(&path).unwrap();
        assert_eq!(model.superblock().model_id, id);
        assert_eq!(model.superblock().page_size, page_size);
        assert_eq!(*model.spec(), spec);
        assert_eq!(*model.metadata(), content.metadata);
        assert_eq!(model.tensors(), content.tensors);
        assert_eq!(model.extents().len(), content.planned.len());
        let (mut random, mut buffer) = (Random(1), Vec::new());
        for (record, planned) in model.extents().iter().zip(&content.planned) {
            assert_eq!((record.kind, record.layer, record.index), (planned.kind, planned.layer, planned.index));
            model.read_extent(record, &mut buffer).unwrap();
            let (logical, padding) = buffer.split_at(record.logical_len as usize);
            assert_eq!(logical, random.bytes(logical.len()), "{}", record.name());
            assert!(padding.iter().all(|&b| b == 0), "{}", record.name());
        }
    }
}

#[test]
fn taking_apart_and_sealing_changes_nothing() {
    let file = small_file(4096);
    assert!(Image::of(&file).seal() == file);
}

#[test]
fn parts_and_experts_are_found() {
    let (_dir, path) = temp();
    write(&path, &plan(&small_spec(), 8), 4096).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let rows = |kind| model.parts(kind).map(|(_, t)| t.shape[1]).collect::<Vec<_>>();
    assert_eq!(rows(ExtentKind::Embedding), [8, 8, 4]);
    assert_eq!(rows(ExtentKind::Head), [8, 8, 4]);
    let names = |i| model.tensors_in(ExtentKind::Expert, 1, i).map(|t| t.name.as_str()).collect::<Vec<_>>();
    assert_eq!(names(2), ["gate_up", "down"]);
    assert!(model.extent(ExtentKind::Expert, 1, 3).is_none());
    assert!(model.extent(ExtentKind::Expert, 0, 0).is_none());
}

#[test]
fn sizes_for_reports_add_up() {
    let (_dir, path) = temp();
    write(&path, &plan(&small_spec(), 8), 4096).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let by_kind = model.bytes_by_kind();
    assert_eq!(by_kind.iter().map(|k| k.extents).sum::<usize>(), model.extents().len());
    assert_eq!(by_kind.iter().map(|k| k.bytes).sum::<u64>(), model.extent_bytes());
    let sb = model.superblock();
    let tables = sb.extents.stored_len + sb.tensors.stored_len + sb.metadata.stored_len;
    assert_eq!(4096 + model.extent_bytes() + tables, sb.file_len);
    let expert = model.extent(ExtentKind::Expert, 1, 0).unwrap();
    assert_eq!(model.token_cycle_bytes(), 2 * expert.stored_len);
    let types = model.weight_types(ExtentKind::Expert);
    let logical: u64 = types.iter().map(|t| t.bytes).sum();
    assert!(logical <= 3 * expert.logical_len && logical > 3 * (expert.logical_len - 128), "{types:?}");
    let embedding = model.weight_types(ExtentKind::Embedding);
    assert_eq!(embedding, [TypeSize { weight_type: WeightType::Bf16, bytes: 20 * 32 * 2 }]);
}

#[test]
fn equal_content_makes_equal_files_and_ids() {
    let (_dir, path) = temp();
    let first = write(&path, &plan(&small_spec(), 8), 4096).unwrap();
    let bytes = fs::read(&path).unwrap();
    // Over the finished file, as a repeated conversion does it.
    assert_eq!(write(&path, &plan(&small_spec(), 8), 4096).unwrap(), first);
    assert!(fs::read(&path).unwrap() == bytes);
    let mut other = plan(&small_spec(), 8);
    other.metadata.insert(SOURCE_CONFIG_BLOB, b"{ }".to_vec());
    assert_ne!(write(&path, &other, 4096).unwrap(), first);
}

#[test]
fn a_file_is_unfinished_until_its_superblock() {
    let (_dir, path) = temp();
    let content = plan(&small_spec(), 8);
    let unfinished = || variant(&ModelFile::open(&path).unwrap_err()) == "Unfinished";
    write(&path, &content, 4096).unwrap();
    // Reopening a finished file for writing takes its superblock away before anything else can change.
    let writer = FileWriter::open(&path, FileLayout::new(4096, &content.planned).unwrap()).unwrap();
    assert!(unfinished());
    let mut sums = Vec::new();
    for i in 0..content.planned.len() {
        let mut extent = writer.extent(i);
        extent.write(&vec![7; content.planned[i].logical_len as usize]).unwrap();
        sums.push(extent.finish().unwrap());
        assert!(unfinished());
    }
    writer.finish(&sums, &content.tensors, &content.metadata).unwrap();
    assert!(ModelFile::open(&path).unwrap().verify_all(&mut |_| ()).is_empty());
}

#[test]
fn extents_must_be_as_long_as_planned() {
    let (_dir, path) = temp();
    let content = plan(&small_spec(), 8);
    let writer = FileWriter::open(&path, FileLayout::new(4096, &content.planned).unwrap()).unwrap();
    let len = content.planned[0].logical_len as usize;
    let mut short = writer.extent(0);
    short.write(&vec![1; len - 1]).unwrap();
    assert_eq!(variant(&short.finish().unwrap_err()), "Layout");
    let mut long = writer.extent(0);
    assert_eq!(variant(&long.write(&[1; 4097]).unwrap_err()), "Layout");
    let mut padded = writer.extent(0);
    padded.write(&vec![1; len + 1]).unwrap();
    assert_eq!(variant(&padded.finish().unwrap_err()), "Layout");
}

/// Changes the records of extents of a kind with a matrix, those of the first layer that has any, and what follows from them.
fn change(content: &mut Content, kind: ExtentKind, change: &dyn Fn(&mut Vec<TensorRecord>)) {
    let matrix = content.tensors.iter().find(|t| t.kind == kind && t.layout != Layout::Plain).unwrap();
    let (layer, index) = (matrix.layer, matrix.index);
    let same = |t: &&TensorRecord| (t.kind, t.layer, t.index) == (kind, layer, index);
    let first = content.tensors.iter().position(|t| same(&t)).unwrap();
    let count = content.tensors[first..].iter().take_while(same).count();
    let mut records = content.tensors[first..first + count].to_vec();
    change(&mut records);
    let len = pack_tensors(&mut records).unwrap();
    let of_kind = content.planned.iter_mut().filter(|p| (p.kind, p.layer) == (kind, layer));
    of_kind.filter(|p| index == ANY_INDEX || p.index == index).for_each(|p| p.logical_len = len);
    content.tensors.splice(first..first + count, records);
}

type Change = fn(&mut Vec<TensorRecord>);

/// Gives every matrix an order of its columns.
const ORDER: Change = |records| {
    records.iter_mut().for_each(|t| t.layout = t.layout.ordered().unwrap_or(t.layout));
};

/// Puts gate and up apart.
fn part(records: &mut Vec<TensorRecord>) {
    let at = records.iter().position(|t| t.name == "gate_up").unwrap();
    let half = |name: &str, weight_type| {
        let layout = if records[at].layout.is_ordered() { Layout::TiledOrdered } else { Layout::Tiled };
        TensorRecord { name: name.to_owned(), weight_type, layout, ..records[at].clone() }
    };
    let halves = [half("gate", WeightType::Q8), half("up", WeightType::Q4)];
    records.splice(at..=at, halves);
}

/// Columns may have an order, and gate and up stand apart; not where rows are looked up, nor where a router decides.
#[test]
fn matrices_may_be_ordered_and_pairs_apart() {
    let taken: [(ExtentKind, Change); 7] = [
        (ExtentKind::Attention, ORDER),
        (ExtentKind::Head, ORDER),
        (ExtentKind::Dense, ORDER),
        (ExtentKind::Expert, ORDER),
        (ExtentKind::Dense, part),
        (ExtentKind::Expert, part),
        (ExtentKind::Expert, |records| {
            part(records);
            ORDER(records);
        }),
    ];
    for (kind, form) in taken {
        let (_dir, path) = temp();
        let mut content = plan(&small_spec(), 8);
        change(&mut content, kind, &form);
        write(&path, &content, 4096).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(ModelFile::open(&path).unwrap().tensors(), content.tensors);
    }
    let refused: [(ExtentKind, Change, &str); 4] = [
        (ExtentKind::Router, ORDER, "its spec implies tiled"),
        (
            ExtentKind::Expert,
            |r| {
                part(r);
                r[1].name = "gate".into();
            },
            "its spec implies `up`",
        ),
        (ExtentKind::Expert, |r| r.swap(0, 1), "its spec implies `gate_up`"),
        (ExtentKind::Expert, |r| r[0].layout = Layout::Tiled, "its spec implies tiled-pair"),
    ];
    for (kind, form, says) in refused {
        let (_dir, path) = temp();
        let mut content = plan(&small_spec(), 8);
        change(&mut content, kind, &form);
        let error = write(&path, &content, 4096).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    // Columns have numbers of 16 bits.
    let mut wide = TensorRecord { shape: [1, 8, 1 << 16], ..plan(&small_spec(), 8).tensors.pop().unwrap() };
    wide.layout = Layout::TiledOrdered;
    assert!(pack_tensors(std::slice::from_mut(&mut wide)).is_ok());
    wide.shape[2] += 32;
    assert!(pack_tensors(std::slice::from_mut(&mut wide)).is_err());
}

/// Whatever is wrong with a plan is said before the first byte of a weight is written, and `finish` refuses it too.
#[test]
fn the_writer_refuses_what_the_reader_would() {
    type Spoil = fn(&mut Content);
    let cases: [(&str, Spoil); 10] = [
        ("the name", |c| c.tensors[0].name = "two words".into()),
        ("is missing", |c| c.planned.truncate(c.planned.len() - 1)),
        ("appears twice", |c| c.planned.push(c.planned[0])),
        ("belongs to no extent", |c| {
            let stray = TensorRecord { layer: 9, ..c.tensors[0].clone() };
            c.tensors.push(stray);
        }),
        ("its spec implies `", |c| c.tensors[0].name = "other".into()),
        ("tensors of", |c| c.planned[0].logical_len += 64),
        ("what its shape implies", |c| c.tensors[0].len += 4),
        ("has index", |c| c.tensors.last_mut().unwrap().index = 0),
        ("is plain bf16", |c| {
            c.tensors[0].weight_type = WeightType::Bf16;
            c.planned[0].logical_len = pack_tensors(&mut c.tensors[..1]).unwrap();
        }),
        ("the tensor before it ends", |c| c.tensors[0].offset = 64),
    ];
    for (expected, spoil) in cases {
        let (_dir, path) = temp();
        let mut content = plan(&small_spec(), 8);
        spoil(&mut content);
        let layout = FileLayout::new(4096, &content.planned).unwrap();
        let planned = layout.check(&content.tensors, &small_spec()).unwrap_err().to_string();
        let finished = write(&path, &content, 4096).unwrap_err().to_string();
        assert_eq!(planned, finished);
        let says_name = expected == "the name" && planned.contains("the tensor name `two words` does not fit");
        assert!(says_name || planned.contains(expected), "{expected}: {planned}");
        assert_eq!(variant(&ModelFile::open(&path).unwrap_err()), "Unfinished");
    }
    let (_dir, path) = temp();
    let mut content = plan(&small_spec(), 8);
    content.metadata.insert(SPEC_BLOB, b"{}".to_vec());
    assert_eq!(variant(&write(&path, &content, 4096).unwrap_err()), "Layout");
    assert_eq!(variant(&FileLayout::new(8192, &content.planned).unwrap_err()), "Layout");
}

#[test]
fn impossible_lengths_are_refused_by_the_plan() {
    let giant = |logical_len| PlannedExtent { kind: ExtentKind::Dense, layer: 0, index: 0, logical_len };
    assert_eq!(variant(&FileLayout::new(4096, &[giant(u64::MAX)]).unwrap_err()), "Layout");
    assert_eq!(variant(&FileLayout::new(4096, &[giant(1 << 63), giant(1 << 63)]).unwrap_err()), "Layout");
    let shape = [u64::MAX, u64::MAX, 2];
    for layout in Layout::ALL {
        for weight_type in WeightType::all() {
            let name = "x".to_owned();
            let kind = ExtentKind::Dense;
            let mut t =
                [TensorRecord { kind, weight_type, layout, layer: 0, index: 0, shape, offset: 0, len: 0, name }];
            assert!(pack_tensors(&mut t).is_err());
        }
    }
}

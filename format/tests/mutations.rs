//! Random hostility: fields altered, records dropped, doubled and swapped, the spec's numbers replaced, then everything sealed
//! with right checksums so that the deeper checks are reached. Whatever opens must keep every promise of [`ModelFile`].

use std::sync::OnceLock;

use crate::support::*;
use proptest::prelude::*;
use sluice_format::fields::{Field, extent, superblock, table_ref, tensor};
use sluice_format::*;

#[derive(Clone, Debug)]
enum Mutation {
    Superblock { field: usize, value: Value },
    TableRef { table: usize, field: usize, value: Value },
    Extent { record: usize, field: usize, value: Value },
    Tensor { record: usize, field: usize, value: Value },
    Drop { tensor: bool, record: usize },
    Double { tensor: bool, record: usize },
    Swap { tensor: bool, a: usize, b: usize },
    Spec { number: usize, value: Value },
    MetadataByte { at: usize, mask: u8 },
    Body { pages: usize },
}

/// A new value for a number: near the old one, or one that arithmetic trips over.
#[derive(Clone, Copy, Debug)]
enum Value {
    Exactly(u64),
    Add(i64),
    Shift(u32),
}

impl Value {
    fn of(self, old: u64) -> u64 {
        match self {
            Value::Exactly(v) => v,
            Value::Add(d) => old.wrapping_add_signed(d),
            Value::Shift(by) => old.wrapping_shl(by),
        }
    }
}

fn value() -> impl Strategy<Value = Value> {
    let exact = prop_oneof![
        0u64..12,
        (0u32..64).prop_map(|b| 1 << b),
        (0u32..64).prop_map(|b| (1u64 << b).wrapping_neg()),
        Just(u64::from(u32::MAX)),
        any::<u64>(),
    ];
    let near = prop::sample::select(vec![-4096i64, -64, -8, -1, 1, 8, 64, 4096, 16384]);
    prop_oneof![exact.prop_map(Value::Exactly), near.prop_map(Value::Add), (1u32..8).prop_map(Value::Shift)]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let n = 0usize..1000;
    prop_oneof![
        1 => (n.clone(), value()).prop_map(|(field, value)| Mutation::Superblock { field, value }),
        2 => (n.clone(), n.clone(), value()).prop_map(|(table, field, value)| Mutation::TableRef { table, field, value }),
        4 => (n.clone(), n.clone(), value()).prop_map(|(record, field, value)| Mutation::Extent { record, field, value }),
        4 => (n.clone(), n.clone(), value()).prop_map(|(record, field, value)| Mutation::Tensor { record, field, value }),
        1 => (any::<bool>(), n.clone()).prop_map(|(tensor, record)| Mutation::Drop { tensor, record }),
        1 => (any::<bool>(), n.clone()).prop_map(|(tensor, record)| Mutation::Double { tensor, record }),
        2 => (any::<bool>(), n.clone(), n.clone()).prop_map(|(tensor, a, b)| Mutation::Swap { tensor, a, b }),
        6 => (n.clone(), value()).prop_map(|(number, value)| Mutation::Spec { number, value }),
        2 => (any::<usize>(), any::<u8>()).prop_map(|(at, mask)| Mutation::MetadataByte { at, mask }),
        1 => n.prop_map(|pages| Mutation::Body { pages: pages % 4 }),
    ]
}

fn change(record: &mut [u8], base: usize, f: &Field, value: Value) {
    let len = f.len.min(8);
    let old = get(record, base + f.offset, len);
    set(record, base + f.offset, len, value.of(old));
}

fn change_list<const N: usize>(list: &mut Vec<[u8; N]>, fields: &[Field], m: &Mutation) {
    if list.is_empty() {
        return;
    }
    let n = list.len();
    match *m {
        Mutation::Extent { record, field, value } | Mutation::Tensor { record, field, value } => {
            change(&mut list[record % n], 0, &fields[field % fields.len()], value);
        }
        Mutation::Drop { record, .. } => drop(list.remove(record % n)),
        Mutation::Double { record, .. } => list.insert(record % n, list[record % n]),
        Mutation::Swap { a, b, .. } => list.swap(a % n, b % n),
        _ => {}
    }
}

/// All numbers of a JSON value, in order.
fn numbers(json: &mut serde_json::Value) -> Vec<&mut serde_json::Value> {
    match json {
        serde_json::Value::Number(_) => vec![json],
        serde_json::Value::Array(list) => list.iter_mut().flat_map(numbers).collect(),
        serde_json::Value::Object(map) => map.values_mut().flat_map(numbers).collect(),
        _ => Vec::new(),
    }
}

fn apply(image: &mut Image, m: &Mutation) {
    match *m {
        Mutation::Extent { .. }
        | Mutation::Drop { tensor: false, .. }
        | Mutation::Double { tensor: false, .. }
        | Mutation::Swap { tensor: false, .. } => change_list(&mut image.extents, &extent::FIELDS, m),
        Mutation::Tensor { .. } | Mutation::Drop { .. } | Mutation::Double { .. } | Mutation::Swap { .. } => {
            change_list(&mut image.tensors, &tensor::FIELDS, m);
        }
        Mutation::Spec { number, value } => image.change_spec(|json| {
            let mut all = numbers(json);
            let n = all.len();
            let chosen = &mut all[number % n];
            **chosen = value.of(chosen.as_u64().unwrap_or(1)).into();
        }),
        Mutation::Body { pages } => image.body.resize(pages * 4096, 0),
        // Applied when sealing, or last: they do not survive the others.
        Mutation::Superblock { .. } | Mutation::TableRef { .. } | Mutation::MetadataByte { .. } => {}
    }
}

fn hostile_file(model: usize, mutations: &[Mutation]) -> Vec<u8> {
    static SOUND: OnceLock<[Image; 3]> = OnceLock::new();
    let sound = SOUND
        .get_or_init(|| [small_spec(), gqa_spec(), predicting_spec()].map(|spec| Image::of(&file_of(&spec, 4096))));
    let mut image = sound[model].clone();
    mutations.iter().for_each(|m| apply(&mut image, m));
    for m in mutations {
        if let Mutation::MetadataByte { at, mask } = *m {
            let n = image.metadata.len();
            image.metadata[at % n] ^= mask;
        }
    }
    image.seal_with(|page| {
        for m in mutations {
            match *m {
                Mutation::Superblock { field, value } => {
                    // The checksum is sealed again; the page must still be as long as it is.
                    change(page, 0, &superblock::FIELDS[field % superblock::FIELDS.len()], value);
                }
                Mutation::TableRef { table, field, value } => {
                    let base = at(&superblock::FIELDS, ["extents", "tensors", "metadata"][table % 3]).0;
                    change(page, base, &table_ref::FIELDS[field % table_ref::FIELDS.len()], value);
                }
                _ => {}
            }
        }
    })
}

/// What a user of an opened model relies on without looking.
fn keeps_its_promises(model: &ModelFile, file_len: u64) {
    let spec = model.spec();
    spec.validate().expect("an opened model's spec is valid");
    let mut end = u64::from(model.superblock().page_size);
    for e in model.extents() {
        assert_eq!(e.offset, end);
        end += e.stored_len;
        assert!(end <= file_len && e.logical_len <= e.stored_len);
        for t in model.tensors_in(e.kind, e.layer, e.index) {
            assert!(t.offset.is_multiple_of(64) && t.offset + t.len <= e.logical_len);
            assert_eq!(t.expected_len(), Some(t.len));
        }
    }
    for (i, layer) in spec.all_layers().enumerate() {
        for kind in ExtentKind::ALL {
            for index in 0..spec.extent_count(kind, i).min(4) as u32 {
                let id = if kind == ExtentKind::FinalNorm { NO_LAYER } else { i as u32 };
                for wanted in spec.tensors(kind, i) {
                    let t = model.tensor(kind, id, index, wanted.name).expect("the spec's tensors are there");
                    assert_eq!(t.shape, wanted.shape.map(|d| d as u64));
                }
            }
        }
        if let Some(moe) = &layer.ffn.moe {
            assert!(model.extent(ExtentKind::Expert, i as u32, moe.experts as u32 - 1).is_some());
        }
    }
    for kind in [ExtentKind::Embedding, ExtentKind::Head] {
        assert_eq!(model.parts(kind).map(|(_, t)| t.shape[1]).sum::<u64>(), spec.vocab_size as u64);
    }
    assert_eq!(model.bytes_by_kind().iter().map(|k| k.bytes).sum::<u64>(), model.extent_bytes());
    let _ = (model.token_cycle_bytes(), model.spec().routed_per_token(), model.verify_all(&mut |_| ()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_file_is_refused_or_keeps_every_promise(model in 0usize..3, mutations in prop::collection::vec(mutation(), 1..4)) {
        let (_dir, path) = temp();
        let file = hostile_file(model, &mutations);
        match open_bytes(&path, &file) {
            Ok(model) => keeps_its_promises(&model, file.len() as u64),
            Err(error) => prop_assert!(!matches!(error, FormatError::Io { .. }), "{error}"),
        }
    }

    #[test]
    fn any_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..8192), magic in any::<bool>()) {
        if magic && bytes.len() >= 4096 {
            bytes[..8].copy_from_slice(&MAGIC);
            set(&mut bytes, 8, 4, u64::from(FORMAT_VERSION));
            set(&mut bytes, 12, 4, 4096);
            seal_superblock(&mut bytes[..4096]);
        }
        let (_dir, path) = temp();
        prop_assert!(open_bytes(&path, &bytes).is_err());
    }
}

proptest! {
    // Each case waits for the drive twice.
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Metadata of arbitrary blobs comes back.
    #[test]
    fn blobs_come_back(blobs in prop::collection::vec(("[a-z/.]{1,40}", prop::collection::vec(any::<u8>(), 0..500)), 0..20)) {
        let (_dir, path) = temp();
        let mut content = plan(&small_spec(), 20);
        for (name, blob) in blobs {
            content.metadata.insert(&name, blob);
        }
        write(&path, &content, 4096).unwrap();
        let model = ModelFile::open(&path).unwrap();
        prop_assert_eq!(model.metadata(), &content.metadata);
    }
}

/// The machinery above is alive: what it leaves alone opens.
#[test]
fn an_untouched_file_opens() {
    for model in 0..3 {
        let (_dir, path) = temp();
        let file = hostile_file(model, &[]);
        keeps_its_promises(&open_bytes(&path, &file).unwrap(), file.len() as u64);
    }
}

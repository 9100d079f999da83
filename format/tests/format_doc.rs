//! `docs/FORMAT.md` and the code say the same, in both directions.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::*;
use sluice_format::fields::Field;
use sluice_format::*;

/// The rows of the table that follows `*checked: NAME*`, each a list of cells without backticks.
fn table(name: &str) -> Vec<Vec<String>> {
    let text = include_str!("../../docs/FORMAT.md");
    let marker = format!("*checked: {name}*");
    let after = text.split_once(&marker).unwrap_or_else(|| panic!("no table {name}")).1;
    let lines = after.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|'));
    let cells = |l: &str| l[1..l.len() - 1].split('|').map(|c| c.trim().replace('`', "")).collect::<Vec<_>>();
    let rows: Vec<_> = lines.skip(2).map(cells).collect();
    assert!(!rows.is_empty(), "{name} has no rows");
    rows
}

/// The first `n` columns of a table, joined.
fn columns(name: &str, n: usize) -> Vec<String> {
    table(name).iter().map(|row| row[..n].join(" ")).collect()
}

#[test]
fn every_table_is_checked() {
    let names = [
        "superblock",
        "table_ref",
        "extent",
        "kinds",
        "codecs",
        "planes_head",
        "planes_frame",
        "tensor",
        "weight_types",
        "layouts",
        "tensors",
        "blobs",
        "limits",
        "checks",
        "importance",
        "importance_entry",
        "rewrite_footer",
    ];
    let text = include_str!("../../docs/FORMAT.md");
    let marked = text.lines().filter_map(|l| l.strip_prefix("*checked: ")?.strip_suffix('*'));
    assert_eq!(marked.collect::<Vec<_>>(), names);
}

#[test]
fn fields() {
    let all: [(&str, &[Field]); 9] = [
        ("superblock", &fields::superblock::FIELDS),
        ("table_ref", &fields::table_ref::FIELDS),
        ("extent", &fields::extent::FIELDS),
        ("planes_head", &fields::planes_head::FIELDS),
        ("planes_frame", &fields::planes_frame::FIELDS),
        ("tensor", &fields::tensor::FIELDS),
        ("importance", &fields::importance::FIELDS),
        ("importance_entry", &fields::importance_entry::FIELDS),
        ("rewrite_footer", &fields::rewrite_footer::FIELDS),
    ];
    for (name, fields) in all {
        let code: Vec<_> = fields.iter().map(|f| format!("{} {} {}", f.offset, f.len, f.name)).collect();
        assert_eq!(columns(name, 3), code, "{name}");
    }
}

#[test]
fn codes() {
    let code = |code: u16, name: &str| format!("{code} {name}");
    assert_eq!(columns("kinds", 2), ExtentKind::ALL.map(|k| code(k as u16, k.name())));
    assert_eq!(columns("codecs", 2), Codec::ALL.map(|c| code(c as u16, c.name())));
    assert_eq!(columns("weight_types", 2), WeightType::OWN.map(|t| code(t.code(), t.name())));
    assert_eq!(columns("layouts", 2), Layout::ALL.map(|l| code(l as u16, l.name())));
    for value in 0..=u16::MAX {
        assert!(ExtentKind::from_code(value).is_none_or(|k| k as u16 == value && ExtentKind::ALL.contains(&k)));
        assert!(
            WeightType::from_code(value)
                .is_none_or(|t| t.code() == value && (t.code() >= 0x8000 || WeightType::OWN.contains(&t)))
        );
        assert!(Layout::from_code(value).is_none_or(|l| l as u16 == value && Layout::ALL.contains(&l)));
        assert!(Codec::from_code(value).is_none_or(|c| c as u16 == value && Codec::ALL.contains(&c)));
    }
}

#[test]
fn constants_in_prose() {
    let text = include_str!("../../docs/FORMAT.md");
    assert!(text.starts_with(&format!("# The model file, version {FORMAT_VERSION}\n")));
    assert_eq!(MAGIC, *b"SLUICE\x0d\x1a");
    assert_eq!(table("superblock")[0][3].split(':').next(), Some("SLUICE 0D 1A"));
    assert_eq!(table("superblock")[2][3], PAGE_SIZES.map(|p| p.to_string()).join(" or "));
    assert!(table("extent")[2][3].contains(&NO_LAYER.to_string()));
    assert!(table("tensor")[5][3].contains(&ANY_INDEX.to_string()));
    assert!(table("blobs")[0][1].ends_with(&format!("version {SPEC_VERSION}")));
    assert_eq!(
        columns("blobs", 1),
        [SPEC_BLOB, PROVENANCE_BLOB, SOURCE_DIGESTS_BLOB, SOURCE_CONFIG_BLOB, TOKENIZER_BLOB]
    );
    assert!(text.contains(&format!("each other one at the next multiple of {PLANE_ALIGN}")));
    assert_eq!(table("importance")[0][3].as_bytes(), IMPORTANCE_MAGIC);
    assert_eq!(table("importance")[1][3], IMPORTANCE_VERSION.to_string());
    assert_eq!(table("rewrite_footer")[0][3].as_bytes(), REWRITE_MAGIC);
    assert_eq!(table("rewrite_footer")[1][3], REWRITE_VERSION.to_string());
    for blob in TOKENIZER_BLOBS {
        assert!(text.contains(&format!("`{blob}`")), "{blob}");
    }
    assert!(table("checks")[0][1].contains(&format!("{} bytes", fields::superblock::LEN)));
}

#[test]
fn limits() {
    let source = include_str!("../src/limits.rs");
    let names: Vec<_> = source.lines().filter_map(|l| l.strip_prefix("pub const ")?.split(':').next()).collect();
    assert_eq!(columns("limits", 1), names);
    let values: Vec<u64> = table("limits").iter().map(|row| row[1].parse().unwrap()).collect();
    let code = [
        limits::MAX_EXTENTS as u64,
        limits::MAX_TENSORS as u64,
        limits::MAX_METADATA_BYTES,
        limits::MAX_BLOBS as u64,
        limits::MAX_BLOB_NAME as u64,
        limits::MAX_SPEC_BYTES as u64,
        limits::MAX_EXTENT_BYTES,
        limits::MAX_FRAME_BYTES as u64,
        limits::MAX_VOLUMES as u64,
        limits::MAX_STRIPES as u64,
        limits::MAX_LAYERS as u64,
        limits::MAX_EXPERTS as u64,
        limits::MAX_MODEL_EXPERTS as u64,
        limits::MAX_WIDTH as u64,
        limits::MAX_LENGTH as u64,
        limits::MAX_TABLE_ROWS,
        limits::MAX_FAMILY_NAME as u64,
    ];
    assert_eq!(values, code);
}

/// Errors in the table are variants of `FormatError`, and every variant that opening or reading can yield is documented.
#[test]
fn errors() {
    let source = include_str!("../src/error.rs").split_once("pub enum FormatError {").expect("the enum is there").1;
    let variants = source.lines().filter_map(|l| l.strip_prefix("    ")).filter(|l| l.starts_with(char::is_alphabetic));
    let variants: BTreeSet<_> =
        variants.map(|l| l.trim_end_matches(" {").split('(').next().unwrap().to_owned()).collect();
    let mut documented: BTreeSet<_> = table("checks").into_iter().map(|row| row[2].clone()).collect();
    // Named in the sentences below the table.
    let below = ["Io", "ExtentRead", "Interrupted", "Locked", "Layout", "VolumeSize", "Ambiguous", "DamagedVolume"];
    documented.extend(below.map(str::to_owned));
    assert_eq!(documented, variants);
    let steps: Vec<_> = table("checks").iter().map(|row| row[0].parse::<usize>().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len()).collect::<Vec<_>>());
}

/// Everything in a layer's JSON by its path, such as `ffn.moe.experts`.
type Paths = BTreeMap<String, serde_json::Value>;

fn paths(spec: &ModelSpec, number: usize, layer: &LayerSpec) -> Paths {
    fn collect(json: &serde_json::Value, prefix: &str, out: &mut Paths) {
        for (name, value) in json.as_object().into_iter().flatten() {
            let path = format!("{prefix}.{name}");
            collect(value, &path, out);
            out.insert(path, value.clone());
        }
    }
    let streams = spec.streams.as_ref().map_or(0, |streams| streams.count);
    let mut out = Paths::from([
        (".hidden_size".into(), spec.hidden_size.into()),
        (".part_rows".into(), 7.into()),
        (".streams".into(), streams.into()),
        (".prediction".into(), (spec.prediction_layer() == Some(number)).into()),
        (".residual_width".into(), spec.residual_width().into()),
        (".vocab_size".into(), spec.vocab_size.into()),
        (".norms.centred".into(), spec.norms.centred.into()),
        (".norms.behind".into(), spec.norms.behind.into()),
        (".layer_scale".into(), spec.layer_scale.into()),
        (".head_bias".into(), spec.head_bias.into()),
    ]);
    if let Some(ngrams) = spec.ngrams_of(number) {
        out.insert(".ngrams.row_width".into(), ngrams.row_width().into());
        out.insert(".ngrams".into(), true.into());
        collect(&serde_json::to_value(ngrams).unwrap(), ".ngrams", &mut out);
    }
    if let Some(gated) = &spec.gated_streams {
        out.insert(".gated_streams".into(), true.into());
        collect(&serde_json::to_value(gated).unwrap(), ".gated_streams", &mut out);
    }
    collect(&serde_json::to_value(layer).unwrap(), "", &mut out);
    out
}

/// The value whose path ends in this name.
fn find<'a>(paths: &'a Paths, name: &str) -> Option<&'a serde_json::Value> {
    let suffix = format!(".{name}");
    paths.iter().find(|(path, _)| path.ends_with(&suffix)).map(|(_, value)| value)
}

/// Evaluates `a·b + c` over fields.
fn evaluate(expression: &str, paths: &Paths) -> usize {
    let field = |f: &str| find(paths, f).and_then(|v| v.as_u64()).unwrap_or_else(|| panic!("no number `{f}`"));
    let factor = |f: &str| f.parse().unwrap_or_else(|_| field(f));
    expression.split('+').map(|term| term.split('·').map(|f| factor(f.trim())).product::<u64>()).sum::<u64>() as usize
}

/// Whether a layer has what the last column asks for: `field`, `no field`, `field = value` or `field ≠ value`, all of them.
fn applies(when: &str, paths: &Paths) -> bool {
    let set = |name: &str| find(paths, name).is_some_and(|v| !(v.is_null() || *v == false || *v == 0));
    when.split(',').map(str::trim).filter(|term| !term.is_empty()).all(|term| match term.split_once(" = ") {
        Some((name, value)) => find(paths, name).is_some_and(|v| *v == value),
        None if term.contains(" ≠ ") => {
            let (name, value) = term.split_once(" ≠ ").expect("it is there");
            find(paths, name).is_none_or(|v| *v != value)
        }
        None => term.strip_prefix("no ").map_or_else(|| set(term), |name| !set(name)),
    })
}

/// Layers that between them have everything a layer can have, and each without.
fn specs() -> Vec<ModelSpec> {
    let mut plain = gqa_spec();
    (plain.layers[1].ffn.dense_width, plain.layers[1].ffn.dense_gate) = (0, false);
    for layer in &mut plain.layers {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            (gqa.qkv_bias, gqa.o_bias, gqa.sinks, gqa.output_gate) = (false, false, false, false);
            // No norm, or one without weights: there are no tensors of either.
            gqa.qk_norm = gqa.qk_norm.take().filter(|norm| norm.scope == QkNormScope::Whole);
            gqa.qk_norm.iter_mut().for_each(|norm| norm.weightless = true);
        }
    }
    let others = [sparse_spec(), hybrid_spec(), streams_spec(), tables_spec(), recurrent_spec()];
    let latest = [predicting_spec(), norms_spec()];
    [small_spec(), gqa_spec(), plain].into_iter().chain(others).chain(latest).collect()
}

#[test]
fn canonical_tensors() {
    let rows = table("tensors");
    let mut used = BTreeSet::new();
    for spec in specs() {
        for (i, layer) in spec.all_layers().enumerate() {
            let paths = paths(&spec, i, layer);
            for kind in ExtentKind::ALL {
                let documented = rows.iter().enumerate().filter(|(_, r)| r[0] == kind.name() && applies(&r[6], &paths));
                let documented: Vec<_> = documented
                    .map(|(n, r)| {
                        used.insert(n);
                        (r[1].clone(), r[2].clone(), [&r[3], &r[4], &r[5]].map(|e| evaluate(e, &paths)))
                    })
                    .collect();
                let table = || spec.ngrams_of(i).filter(|_| kind == ExtentKind::Table).map(|n| n.part_tensor(7));
                let part = spec.part_tensor(kind, 7, WeightType::Bf16).or_else(table);
                let shapes = part.map_or_else(|| spec.tensors(kind, i), |t| vec![t]);
                let code = shapes.into_iter().map(|t| (t.name.to_owned(), t.layout.name().to_owned(), t.shape));
                assert_eq!(documented, code.collect::<Vec<_>>(), "{kind} of layer {i}");
            }
        }
    }
    assert_eq!(used.len(), rows.len(), "some documented tensors exist in no spec");
}

//! Files made to deceive: every checksum is right, what they say is not.

use std::fs::OpenOptions;

use crate::support::*;
use sluice_format::fields::{superblock, table_ref};
use sluice_format::*;

fn sb_set(page: &mut [u8], name: &str, value: u64) {
    let (offset, len) = at(&superblock::FIELDS, name);
    set(page, offset, len, value);
}

fn table_set(page: &mut [u8], table: &str, name: &str, value: u64) {
    let (offset, len) = at(&table_ref::FIELDS, name);
    set(page, at(&superblock::FIELDS, table).0 + offset, len, value);
}

fn extent_of(image: &Image, kind: ExtentKind) -> usize {
    image.extents.iter().position(|e| get(e, 0, 2) == kind as u64).expect("the small model has every kind")
}

fn tensor_named(image: &Image, name: &str) -> usize {
    image.tensors.iter().position(|t| t[64..].starts_with(name.as_bytes())).expect("the small model has this tensor")
}

/// Asserts that the file is refused with this variant and a message that contains `says`.
fn refused(file: &[u8], expected: &str, says: &str) {
    let (_dir, path) = temp();
    let error = open_bytes(&path, file).expect_err(says);
    assert_eq!(variant(&error), expected, "{says}: {error}");
    assert!(error.to_string().contains(says), "{says}: {error}");
}

fn spoilt(expected: &str, says: &str, spoil: impl FnOnce(&mut Image)) {
    let mut image = Image::of(&small_file(4096));
    spoil(&mut image);
    refused(&image.seal(), expected, says);
}

fn spoilt_superblock(expected: &str, says: &str, spoil: impl FnOnce(&mut Vec<u8>)) {
    refused(&Image::of(&small_file(4096)).seal_with(spoil), expected, says);
}

/// The records of the extent table.
fn records(extents: &[ExtentRecord]) -> Vec<[u8; fields::extent::LEN]> {
    let record = |e: &ExtentRecord| {
        let mut b = [0; fields::extent::LEN];
        let fields: [(&str, u64); 6] = [
            ("kind", e.kind as u64),
            ("layer", e.layer.into()),
            ("index", e.index.into()),
            ("offset", e.offset),
            ("stored_len", e.stored_len),
            ("logical_len", e.logical_len),
        ];
        for (name, value) in fields {
            let (offset, len) = at(&fields::extent::FIELDS, name);
            set(&mut b, offset, len, value);
        }
        b
    };
    extents.iter().map(record).collect()
}

#[test]
fn superblocks() {
    spoilt_superblock("Version", "format version 3", |p| sb_set(p, "version", 3));
    spoilt_superblock("PageSize", "page size 8192", |p| sb_set(p, "page_size", 8192));
    spoilt_superblock("PageSize", "page size 0", |p| sb_set(p, "page_size", 0));
    spoilt_superblock("RegionChecksum", "superblock", |p| sb_set(p, "page_size", 16384));
    spoilt_superblock("VolumeName", "volume 1 of 2", |p| sb_set(p, "volume_count", 2));
    spoilt_superblock("Invalid", "more volumes", |p| sb_set(p, "volume_count", 1025));
    spoilt_superblock("Invalid", "reserved", |p| sb_set(p, "version", 1));
    spoilt_superblock("Invalid", "volume number", |p| sb_set(p, "volume_count", 0));
    spoilt_superblock("Invalid", "volume number", |p| sb_set(p, "volume", 1));
    spoilt_superblock("Invalid", "reserved", |p| p[36] = 1);
    spoilt_superblock("Invalid", "reserved", |p| p[152] = 1);
    spoilt_superblock("Invalid", "reserved", |p| p[4095] = 1);
    spoilt_superblock("FileLength", "bytes", |p| sb_set(p, "file_len", u64::MAX));
    spoilt_superblock("Invalid", "model id", |p| p[20] ^= 1);
}

#[test]
fn table_references() {
    for (table, region) in [("extents", "extent table"), ("tensors", "tensor table"), ("metadata", "metadata")] {
        let bad = |says: &str, name: &str, value: u64| {
            spoilt_superblock("Invalid", &format!("{region} is invalid: {says}"), |p| table_set(p, table, name, value));
        };
        bad("it runs past the end", "offset", u64::MAX);
        bad("it runs past the end", "offset", u64::MAX - 4095);
        bad("it runs past the end", "stored_len", u64::MAX - 4095);
        bad("it runs past the end", "stored_len", 1 << 40);
        bad("it does not begin on a page", "offset", 64);
        bad("it has an impossible stored length", "logical_len", u64::MAX);
        bad("it has an impossible stored length", "logical_len", 1 << 20);
        bad("it has an impossible stored length", "stored_len", 0);
        spoilt_superblock("RegionChecksum", region, |p| table_set(p, table, "checksum", 1));
        spoilt_superblock("RegionChecksum", region, |p| table_set(p, table, "offset", 4096));
    }
    // Fewer logical bytes than written: the rest is not zero. The checksum is still right.
    let start = at(&superblock::FIELDS, "metadata").0;
    spoilt_superblock("Invalid", "padding", |p| {
        let len = get(p, start + 16, 8);
        set(p, start + 16, 8, len - 1);
    });
}

/// A sparse file may claim tables of any length at no cost: they are refused before anything is read or allocated.
#[test]
fn huge_tables_in_a_sparse_file() {
    for (table, region) in [("extents", "extent table"), ("tensors", "tensor table"), ("metadata", "metadata")] {
        let file = Image::of(&small_file(4096)).seal_with(|p| {
            sb_set(p, "file_len", 1 << 42);
            table_set(p, table, "stored_len", 1 << 41);
            table_set(p, table, "logical_len", 1 << 41);
        });
        let (_dir, path) = temp();
        std::fs::write(&path, file).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 42).unwrap();
        let error = ModelFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("{region} is invalid: it has an impossible stored length")), "{error}");
    }
}

#[test]
fn extent_records() {
    let bad = |says: &str, name: &str, value: u64| {
        spoilt("Invalid", says, |i| i.set_extent(4, name, value));
    };
    bad("record 4: its kind 0 is unknown", "kind", 0);
    bad("record 4: its kind 10 is unknown", "kind", 10);
    bad("record 4: its codec 2 is unknown", "codec", 2);
    bad("head part 0 has an impossible stored length", "codec", 1);
    bad("is not compressed, and has another checksum", "logical_checksum", 1);
    bad("in volume 1", "volume", 1);
    bad("impossible stored length", "logical_len", 0x2000);
    bad("impossible stored length", "logical_len", u64::MAX);
    bad("the one before it ends", "stored_len", 0);
    bad("the one before it ends", "stored_len", 4097);
    bad("the one before it ends", "stored_len", 8192);
    bad("a region runs past 2^64", "stored_len", u64::MAX);
    bad("the one before it ends", "offset", 0);
    bad("the one before it ends", "offset", u64::MAX);
    bad("the one before it ends", "offset", u64::MAX - 4095);
    bad("the one before it ends", "offset", 4096);
    for stripe in [1, 2, 256, u64::MAX] {
        bad("of head part 0 does not follow the one before it", "stripe", stripe);
    }
    for byte in [56, 63] {
        spoilt("Invalid", "record 4: its reserved bytes", |i| i.extents[4][byte] = 1);
    }
    // The last byte of the last record is reserved and zero: without it the table looks intact but for its length.
    spoilt_superblock("Invalid", "not a multiple of 64", |p| {
        let len = get(p, at(&superblock::FIELDS, "extents").0 + 16, 8);
        table_set(p, "extents", "logical_len", len - 1);
    });
}

#[test]
fn extent_tables() {
    spoilt("Invalid", "the one before it ends", |i| i.extents.swap(0, 1));
    spoilt("Invalid", "the one before it ends", |i| i.extents.truncate(i.extents.len() - 1));
    spoilt("Invalid", "the one before it ends", |i| i.extents.push(i.extents[0]));
    spoilt("Invalid", "the one before it ends", |i| i.extents.clear());
    // Bytes between regions, which no checksum covers.
    spoilt("Invalid", "the one before it ends", |i| i.body.extend([0; 4096]));
    spoilt("Invalid", "appears twice", |i| {
        let expert = extent_of(i, ExtentKind::Expert);
        i.set_extent(expert, "index", 1);
    });
    spoilt("Invalid", "layer 1 expert 0 is missing", |i| {
        let expert = extent_of(i, ExtentKind::Expert);
        i.set_extent(expert, "index", 3);
    });
    spoilt("Invalid", "has no tensors", |i| {
        let attention = extent_of(i, ExtentKind::Attention);
        i.set_extent(attention, "layer", 7);
    });
    // A page that belongs to nothing: an expert too many.
    spoilt("Invalid", "the file has 17 extents, its spec implies 16", |i| {
        let mut extra = *i.extents.last().unwrap();
        let end = get(&extra, 16, 8) + get(&extra, 24, 8);
        set(&mut extra, 8, 4, 3);
        set(&mut extra, 16, 8, end);
        let copy = i.body[i.body.len() - get(&extra, 24, 8) as usize..].to_vec();
        i.body.extend(copy);
        i.extents.push(extra);
    });
}

#[test]
fn tensor_records() {
    let bad = |says: &str, name: &str, value: u64| {
        spoilt("Invalid", says, |i| {
            let record = tensor_named(i, "kv_a\0");
            i.set_tensor(record, name, value);
        });
    };
    bad("its extent kind 0 is unknown", "kind", 0);
    bad("its extent kind 65535 is unknown", "kind", 65535);
    bad("its weight type 0 is unknown", "weight_type", 0);
    bad("its weight type 99 is unknown", "weight_type", 99);
    bad("its layout 6 is unknown", "layout", 6);
    for layout in 2..6 {
        bad("what its shape implies", "layout", layout);
    }
    for dim in ["batch", "rows", "cols"] {
        bad("what its shape implies", dim, 0);
        bad("what its shape implies", dim, u64::MAX);
        bad("what its shape implies", dim, 1 << 32);
    }
    bad("what its shape implies", "len", 0);
    bad("what its shape implies", "len", u64::MAX);
    bad("the tensor before it ends", "offset", 0);
    bad("the tensor before it ends", "offset", u64::MAX);
    bad("the tensor before it ends", "offset", u64::MAX - 63);
    bad("has index 4294967295", "index", u64::from(ANY_INDEX));
    for byte in [6, 7, 56, 63, 112, 127] {
        spoilt("Invalid", "record 0: its reserved bytes", |i| i.tensors[0][byte] = 1);
    }
    for name in [b"\0a", b"a\0b".as_slice(), b"a b", b"\xff", b"a\n"] {
        spoilt("Invalid", "record 0: its name", |i| {
            i.tensors[0][64..112].fill(0);
            i.tensors[0][64..64 + name.len()].copy_from_slice(name);
        });
    }
}

#[test]
fn tensor_tables() {
    spoilt("Invalid", "has no tensors", |i| i.tensors.clear());
    spoilt("Invalid", "holds `other` where its spec implies `gate_up`", |i| {
        let record = tensor_named(i, "gate_up");
        i.tensors[record][64..112].fill(0);
        i.tensors[record][64..69].copy_from_slice(b"other");
    });
    spoilt("Invalid", "stands apart", |i| i.tensors.push(i.tensors[0]));
    spoilt("Invalid", "belongs to no extent", |i| {
        let mut extra = i.tensors[0];
        set(&mut extra, 8, 4, 5);
        i.tensors.push(extra);
    });
    spoilt("Invalid", "the tensors of", |i| i.tensors.truncate(i.tensors.len() - 1));
    // A vector in another type of the same length would need another kernel.
    spoilt("Invalid", "its spec implies plain", |i| {
        let record = tensor_named(i, "norm");
        i.set_tensor(record, "weight_type", u64::from(WeightType::Bf16.code()));
        let cols = get(&i.tensors[record], 32, 8);
        i.set_tensor(record, "batch", 2);
        i.set_tensor(record, "cols", cols);
    });
    // Embedding and head: parts that do not cover the vocabulary, or whose heights differ.
    spoilt("Invalid", "the embedding has 20 rows, the vocabulary 21", |i| {
        i.change_spec(|s| s["vocab_size"] = 21.into());
    });
    spoilt("Invalid", "embedding part 1 is f16, the first part bf16", |i| {
        let record = tensor_named(i, "embedding") + 1;
        i.set_tensor(record, "weight_type", u64::from(WeightType::F16.code()));
    });
    spoilt("Invalid", "embedding part 2 has 8 rows, the first part 4", |i| {
        // The last part becomes the first: 4, 8, 8 rows.
        let (e, t) = (extent_of(i, ExtentKind::Embedding), tensor_named(i, "embedding"));
        i.set_extent(e, "index", 2);
        i.set_extent(e + 2, "index", 0);
        i.set_tensor(t, "index", 2);
        i.set_tensor(t + 2, "index", 0);
        let one = get(&i.tensors[t], 24, 8);
        assert_eq!(one, 8);
        i.set_tensor(t + 1, "rows", 4);
        i.set_tensor(t + 1, "len", 4 * 32 * 2);
        i.set_extent(e + 1, "logical_len", 4 * 32 * 2);
    });
}

#[test]
fn metadata() {
    let raw = |says: &str, bytes: Vec<u8>| spoilt("Invalid", says, |i| i.metadata = bytes);
    let blob = |name: &[u8], name_len: u32, len: u64| {
        let mut out = 1u32.to_le_bytes().to_vec();
        out.extend(name_len.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(name);
        out
    };
    raw("a blob runs past the end", Vec::new());
    raw("a blob runs past the end", vec![1, 0, 0, 0]);
    raw("announces 4294967295 blobs", vec![0xff; 4]);
    raw("announces 1025 blobs", 1025u32.to_le_bytes().to_vec());
    raw("it has no `sluice/spec.json`", vec![0; 4]);
    raw("1 bytes follow the last blob", vec![0; 5]);
    raw("a blob name has 0 bytes", blob(b"", 0, 0));
    raw("a blob name has 256 bytes", blob(&[b'a'; 256], 256, 0));
    raw("a blob name has 4294967295 bytes", blob(b"a", u32::MAX, 0));
    raw("a blob runs past the end", blob(b"a", 1, u64::MAX));
    raw("a blob runs past the end", blob(b"a", 1, 1));
    raw("is not UTF-8", blob(b"\xff", 1, 0));
    raw("is not printable", blob(b"\x1b", 1, 0));
    let twice = [&2u32.to_le_bytes(), &blob(b"a", 1, 0)[4..], &blob(b"a", 1, 0)[4..]].concat();
    raw("`a` appears twice", twice);
}

#[test]
fn specs() {
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        spoilt("Invalid", says, |i| {
            i.change_spec(|s| *s.pointer_mut(pointer).expect("the spec has this field") = value);
        });
    };
    let max = u64::MAX;
    bad("its version is 2", "/version", 2.into());
    bad("missing field", "", serde_json::json!({ "version": 1 }));
    bad("its version is 9", "", serde_json::json!({ "version": 9, "other": [] }));
    bad("expected", "", serde_json::Value::Null);
    bad("it has 0 layers", "/layers", serde_json::json!([]));
    bad("family", "/family", "\u{1b}[2J".into());
    for field in ["/vocab_size", "/hidden_size", "/max_positions"] {
        bad("outside 1..=", field, 0.into());
        bad("outside 1..=", field, max.into());
        bad("invalid value", field, (-1).into());
    }
    for field in ["heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"] {
        bad("outside 1..=", &format!("/layers/1/attention/{field}"), max.into());
        bad("outside 1..=", &format!("/layers/1/attention/{field}"), (1u64 << 21).into());
    }
    bad("heads × v_head_dim", "/layers/1/attention/v_head_dim", (1 << 20).into());
    bad("rope.dim", "/layers/1/attention/rope/dim", 6.into());
    bad("rope.theta", "/layers/1/attention/rope/theta", 1.0.into());
    bad("YaRN", "/layers/1/attention/rope/scaling/factor", 0.0.into());
    let scaling = |value: serde_json::Value, says: &str| bad(says, "/layers/1/attention/rope/scaling", value);
    scaling(serde_json::json!({ "kind": "linear", "factor": 0.0 }), "linear rope factor is 0");
    scaling(serde_json::json!({ "kind": "divided", "divisors": [1.0] }), "1 divisors");
    scaling(serde_json::json!({ "kind": "divided", "divisors": [1.0, -1.0] }), "a rope divisor is -1");
    bad("original_max_positions", "/layers/1/attention/rope/scaling/original_max_positions", max.into());
    bad("unknown variant", "/layers/1/attention/kind", "other".into());
    bad("norm_eps", "/norm_eps", 1e300.into());
    bad("norm_eps", "/norm_eps", (-1.0).into());
    bad("outside 1..=", "/layers/1/ffn/moe/experts", max.into());
    bad("outside 1..=", "/layers/1/ffn/moe/experts", (1 << 24).into());
    bad("outside 1..=", "/layers/1/ffn/moe/width", max.into());
    bad("outside 1..=", "/layers/1/ffn/dense_width", max.into());
    bad("top_k is 4 of 3", "/layers/1/ffn/moe/top_k", 4.into());
    bad("top_k is 0", "/layers/1/ffn/moe/top_k", 0.into());
    let groups = |count: u64, keep: u64| serde_json::json!({ "count": count, "keep": keep, "score": "top_two_sum" });
    bad("groups of 3 experts", "/layers/1/ffn/moe/router/groups", groups(2, 1));
    bad("groups of 3 experts", "/layers/1/ffn/moe/router/groups", groups(0, 0));
    bad("groups of 3 experts", "/layers/1/ffn/moe/router/groups", groups(1, max));
    bad("no two best scores", "/layers/1/ffn/moe/router/groups", groups(3, 3));
    bad("its spec implies", "/layers/1/ffn/moe/experts", (1 << 16).into());
    bad("its spec implies", "/hidden_size", 64.into());
    bad("layer 1", "/layers/1/attention/q_lora_rank", serde_json::Value::Null);
    bad("its spec implies 14", "/layers/0/ffn/dense_width", 0.into());
}

#[test]
fn specs_of_hybrids() {
    assert_eq!(ModelSpec::from_json(&hybrid_spec().to_json()).unwrap(), hybrid_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&hybrid_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    for value in [0, u64::MAX] {
        bad("decay_rank is", "/layers/0/attention/decay_rank", value.into());
        bad("gate_rank is", "/layers/0/attention/gate_rank", value.into());
        for field in ["index_heads", "index_head_dim", "block_len", "top_blocks"] {
            bad(field, &format!("/layers/2/attention/blocks/{field}"), value.into());
        }
    }
    bad("4 of 3 blocks", "/layers/2/attention/blocks/local_blocks", 4.into());
    bad("3 index heads", "/layers/2/attention/blocks/index_heads", 3.into());
    bad("index_norm_eps", "/layers/2/attention/blocks/index_norm_eps", (-1.0).into());

    let mut spec = hybrid_spec();
    let AttentionSpec::Gqa(gqa) = &mut spec.layers[2].attention else { panic!() };
    gqa.window = Some(4);
    assert!(spec.validate().unwrap_err().contains("within a window"));
    let mut spec = sparse_spec();
    let AttentionSpec::Mla(mla) = &mut spec.layers[0].attention else { panic!() };
    mla.rope = None;
    assert!(spec.validate().unwrap_err().contains("an indexer needs positions"));
}

#[test]
fn specs_of_recurrent_layers() {
    assert_eq!(ModelSpec::from_json(&recurrent_spec().to_json()).unwrap(), recurrent_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&recurrent_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    for value in [0, u64::MAX] {
        for field in ["heads", "head_dim", "groups", "state_dim", "conv_width"] {
            bad(field, &format!("/layers/0/attention/{field}"), value.into());
        }
        bad("latent", "/layers/0/ffn/moe/latent", value.into());
    }
    bad("4 heads share 3 groups", "/layers/0/attention/groups", 3.into());
    bad("channels × conv_width", "/layers/0/attention/conv_width", (1 << 18).into());
    bad("norm_eps", "/layers/0/attention/norm_eps", (-1.0).into());
    for value in [0.0, 1.0, 1e300] {
        bad("least_log_decay", "/layers/2/attention/least_log_decay", value.into());
    }
    bad("activation has limit 0", "/layers/3/ffn/dense_activation/limit", 0.0.into());
    bad("has a gate", "/layers/3/ffn/dense_activation", serde_json::json!({ "kind": "relu_squared" }));

    let mut twice = recurrent_spec();
    let AttentionSpec::Gqa(gqa) = &mut twice.layers[1].attention else { panic!() };
    gqa.output_gate = true;
    assert!(twice.validate().unwrap_err().contains("gates its heads twice"));
    let changed = |change: fn(&mut MoeSpec)| {
        let mut spec = recurrent_spec();
        change(spec.layers[0].ffn.moe.as_mut().unwrap());
        spec.validate().unwrap_err()
    };
    assert!(changed(|moe| moe.weighted_input = true).contains("multiplies the input"));
    assert!(changed(|moe| moe.expert_bias = true).contains("biases and no gate"));
    let mut streams = streams_spec();
    streams.layers[0].ffn = FfnSpec::NONE;
    assert!(streams.validate().unwrap_err().contains("several streams and a layer without"));
}

#[test]
fn specs_of_grouped_queries() {
    assert_eq!(ModelSpec::from_json(&sparse_spec().to_json()).unwrap(), sparse_spec());
    let mut orphan = sparse_spec();
    orphan.layers.remove(0);
    assert!(ModelSpec::from_json(&orphan.to_json()).unwrap_err().contains("indexer"));
    assert_eq!(ModelSpec::from_json(&gqa_spec().to_json()).unwrap(), gqa_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&gqa_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    let mut both = gqa_spec();
    if let AttentionSpec::Gqa(gqa) = &mut both.layers[0].attention {
        gqa.stretch = gqa.window;
    }
    assert!(both.validate().unwrap_err().contains("a window and stretches"));
    for field in ["heads", "kv_heads", "head_dim", "v_head_dim", "window"] {
        bad("outside 1..=", &format!("/layers/0/attention/{field}"), 0.into());
        bad("outside 1..=", &format!("/layers/0/attention/{field}"), u64::MAX.into());
    }
    bad("4 heads share 3", "/layers/0/attention/kv_heads", 3.into());
    bad("4 heads share 8", "/layers/0/attention/kv_heads", 8.into());
    bad("clip_qkv", "/layers/0/attention/clip_qkv", 0.0.into());
    bad("temperature.step", "/layers/0/attention/temperature/step", 0.into());
    bad("temperature.slope", "/layers/0/attention/temperature/slope", 1e300.into());
    bad("value_factor", "/layers/0/attention/value_factor", 1e300.into());
    bad("factors.logits is 0", "/factors/logits", 0.0.into());
    bad("factors.residual", "/factors/residual", 1e300.into());
    bad("least_sum", "/layers/1/ffn/moe/router/least_sum", (-1.0).into());
    bad("qk_norm.eps", "/layers/0/attention/qk_norm/eps", (-1.0).into());
    bad("activation", "/layers/0/ffn/activation/limit", (-7.0).into());
    bad("activation", "/layers/0/ffn/activation/alpha", 1e300.into());
    bad("gates a dense part", "/layers/1/ffn/dense_width", 0.into());
}

#[test]
fn specs_of_norms_and_scales() {
    assert_eq!(ModelSpec::from_json(&norms_spec().to_json()).unwrap(), norms_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&norms_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    for value in [0.0f64, -1.0, 1e300] {
        bad("logit_cap", "/logit_cap", value.into());
        bad("attention_factor", "/layers/0/attention/rope/scaling/attention_factor", value.min(0.0).into());
    }
    bad("value_norm", "/layers/0/attention/value_norm", (-1.0).into());
    bad("its values are keys, but have 6", "/layers/0/attention/v_head_dim", 6.into());
    bad("0 pairs turn of the 6", "/layers/1/attention/rope/scaling/pairs", 0.into());
    bad("4 pairs turn of the 6", "/layers/1/attention/rope/scaling/pairs", 4.into());
    bad("logit_factor", "/layers/1/ffn/moe/router/logit_factor", 1e300.into());
    bad("jitter", "/layers/1/ffn/moe/router/score/sparse_mixer/jitter", (-1.0).into());
    bad("sparse mixer chooses by logits alone", "/layers/1/ffn/moe/router/choice_bias", true.into());
    let mut alone = norms_spec();
    (alone.layers[1].ffn.dense_width, alone.layers[1].ffn.dense_gate) = (0, false);
    assert!(alone.validate().unwrap_err().contains("apart from a dense part"));
    let mut several = norms_spec();
    several.factors.residual = 1.0;
    several.streams = Some(StreamsSpec { count: 2, iterations: 1, eps: 1e-6 });
    assert!(several.validate().unwrap_err().contains("beside several streams"));
}

#[test]
fn specs_of_streams_and_entries() {
    assert_eq!(ModelSpec::from_json(&streams_spec().to_json()).unwrap(), streams_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&streams_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    let attention = "/layers/2/attention";
    for field in ["output_groups", "group_heads", "output_rank", "head_dim", "q_lora_rank", "window"] {
        bad("outside 1..=", &format!("{attention}/{field}"), 0.into());
        bad("outside 1..=", &format!("{attention}/{field}"), u64::MAX.into());
    }
    for field in ["ratio", "spans", "indexer/index_heads", "indexer/index_head_dim", "indexer/index_top_k"] {
        bad("outside 1..=", &format!("{attention}/compression/{field}"), 0.into());
        bad("outside 1..=", &format!("{attention}/compression/{field}"), u64::MAX.into());
    }
    bad("rope.dim is 14 of a head of 12", &format!("{attention}/rope/dim"), 14.into());
    bad("rope.dim is 8 of an index head of 6", &format!("{attention}/rope/dim"), 8.into());
    bad("heads × head_dim", &format!("{attention}/head_dim"), (1 << 20).into());
    bad("ratio × spans × width", &format!("{attention}/compression/ratio"), (1 << 22).into());
    bad("norm_eps", &format!("{attention}/norm_eps"), (-1.0).into());
    bad("streams.count is 0", "/streams/count", 0.into());
    bad("streams.count", "/streams/count", u64::MAX.into());
    bad("streams.count × hidden_size", "/streams/count", (1 << 16).into());
    bad("streams.iterations", "/streams/iterations", 0.into());
    bad("streams.iterations", "/streams/iterations", (1 << 20).into());
    bad("streams.eps", "/streams/eps", (-1.0).into());
    bad("router.token_table", "/layers/0/ffn/moe/router/token_table", 0.into());
    bad("router.token_table × top_k", "/layers/0/ffn/moe/router/token_table", (1 << 24).into());
    bad("activation", "/layers/0/ffn/activation/limit", 0.0.into());
}

#[test]
fn specs_of_gated_streams_and_tables() {
    assert_eq!(ModelSpec::from_json(&tables_spec().to_json()).unwrap(), tables_spec());
    let bad = |says: &str, pointer: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&tables_spec().to_json()).unwrap();
        *json.pointer_mut(pointer).expect("the spec has this field") = value;
        let error = ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    for value in [0, u64::MAX] {
        bad("gated_streams.count", "/gated_streams/count", value.into());
        bad("gated_streams.rank", "/gated_streams/rank", value.into());
        bad("ngrams.width", "/ngrams/0/width", value.into());
        bad("ngrams.conv_width", "/ngrams/0/conv_width", value.into());
        bad("ngrams.table_rows", "/ngrams/0/table_rows", value.into());
        bad("a head of n-grams has", "/ngrams/0/heads/3/rows", value.into());
    }
    bad("gated_streams.count × hidden_size", "/gated_streams/count", (1 << 16).into());
    bad("layer 2 of 2 has a table", "/ngrams/1/layer", 2.into());
    bad("not in the order of layers", "/ngrams/1/layer", 0.into());
    bad("numbers together", "/ngrams/0/width", 13.into());
    bad("numbers together", "/ngrams/0/heads", serde_json::json!([]));
    bad("n-grams have up to 1 tokens", "/ngrams/0/multipliers", serde_json::json!([1]));
    bad("a head of n-grams has 5 rows from 2896 on", "/ngrams/0/heads/0/first", 2896.into());
    bad("a head of n-grams has", "/ngrams/0/heads/0/first", u64::MAX.into());
    bad("tokens of the convolution", "/ngrams/0/conv_width", (1 << 17).into());
    bad("invalid value", "/ngrams/0/separator", (-1).into());
    bad("unknown variant", "/layers/1/attention/blocks/score", "other".into());
    bad("scored by their mean key", "/layers/1/attention/blocks/local_blocks", 1.into());

    let mut both = tables_spec();
    both.streams = streams_spec().streams;
    assert!(both.validate().unwrap_err().contains("two kinds of streams"));
    let mut factor = tables_spec();
    factor.factors.residual = 0.5;
    assert!(factor.validate().unwrap_err().contains("beside several streams"));
}

#[test]
fn tables_cover_their_rows_and_are_not_compressed() {
    let (_dir, path) = temp();
    write(&path, &plan(&tables_spec(), 8), 4096).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let rows: Vec<_> = file.table_parts(0).map(|(_, tensor)| tensor.shape[1]).collect();
    assert_eq!((rows, file.table_parts(1).count(), file.table_parts(2).count()), (vec![1500, 1400], 1, 0));
    let spoilt = |says: &str, change: &dyn Fn(&mut Image)| {
        let mut image = Image::of(&std::fs::read(&path).unwrap());
        change(&mut image);
        std::fs::write(path.with_extension("bad"), image.seal()).unwrap();
        let error = ModelFile::open(&path.with_extension("bad")).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    };
    spoilt("the table of layer 0 has 2900 rows, its spec implies 2901", &|i| {
        i.change_spec(|s| s["ngrams"][0]["table_rows"] = 2901.into());
    });
    spoilt("implies", &|i| i.change_spec(|s| drop(s["ngrams"].as_array_mut().unwrap().pop())));
    spoilt("not what its shape implies", &|i| {
        let record = tensor_named(i, "table");
        i.set_tensor(record, "rows", 1);
    });
    spoilt("table part 1 is f16, the first part bf16", &|i| {
        let record = tensor_named(i, "table") + 1;
        i.set_tensor(record, "weight_type", u64::from(WeightType::F16.code()));
    });
    let tensors: Vec<_> = plan(&tables_spec(), 8).tensors.into_iter().filter(|t| t.kind == ExtentKind::Table).collect();
    assert!(tensors.len() == 3 && !planes::may_gain(&tensors));
    spoilt("table part 0 is compressed", &|i| {
        let extent = extent_of(i, ExtentKind::Table);
        i.set_extent(extent, "codec", 1);
        // A page shorter, as what is compressed must be.
        let stored = get(&i.extents[extent], 24, 8);
        i.set_extent(extent, "stored_len", stored - 4096);
        let start = get(&i.extents[extent], 16, 8) as usize - 4096;
        i.body.drain(start..start + 4096);
        for later in extent + 1..i.extents.len() {
            let offset = get(&i.extents[later], 16, 8);
            i.set_extent(later, "offset", offset - 4096);
        }
    });
}

/// The most that a spec can claim: 4 layers of 65536 experts. The extent table ends the check, not the claim.
#[test]
fn a_spec_cannot_make_the_check_long() {
    let claim = |moe_layers: usize| {
        move |s: &mut serde_json::Value| {
            let mut layer = s["layers"][1].clone();
            layer["ffn"]["moe"]["experts"] = (1 << 16).into();
            let mut layers = vec![s["layers"][0].clone()];
            layers.resize(1 + moe_layers, layer);
            s["layers"] = layers.into();
        }
    };
    spoilt("Invalid", "its spec implies", |i| i.change_spec(claim(4)));
    spoilt("Invalid", "327680 experts together", |i| i.change_spec(claim(5)));
    spoilt("Invalid", "268369920 experts together", |i| i.change_spec(claim(4095)));
    spoilt("Invalid", "it has 4097 layers", |i| {
        i.change_spec(|s| s["layers"] = vec![s["layers"][0].clone(); 4097].into());
    });
    spoilt("Invalid", "more than 16777216", |i| {
        i.change_spec(|s| s["family"] = " ".repeat(17 << 20).into());
    });
}

/// A sparse file may hold extents of any length at no cost: one that memory could not take is refused at open.
#[test]
fn a_giant_extent_is_refused() {
    let mut spec = small_spec();
    spec.layers.truncate(1);
    spec.hidden_size = 1 << 20;
    spec.layers[0].ffn.dense_width = 1 << 20;
    let content = plan(&spec, 8);
    let layout = FileLayout::new(4096, &content.planned).unwrap();
    let error = layout.check(&content.tensors, &spec).unwrap_err().to_string();
    assert!(error.contains("layer 0 dense has an impossible stored length"), "{error}");

    let (_dir, path) = temp();
    let mut image = Image::of(&small_file(4096));
    let end = layout.ends()[0];
    image.extents = records(layout.extents());
    image.tensors = content.tensors.iter().map(TensorRecord::to_bytes).collect();
    image.metadata = content.metadata.to_bytes();
    image.body.clear();
    // The tables move behind a hole that stands for the extents.
    let shift = end - 4096;
    let sealed = image.seal_with(|p| {
        for table in ["extents", "tensors", "metadata"] {
            let offset = get(p, at(&superblock::FIELDS, table).0, 8);
            table_set(p, table, "offset", offset + shift);
        }
        let len = get(p, at(&superblock::FIELDS, "file_len").0, 8);
        sb_set(p, "file_len", len + shift);
    });
    std::fs::write(&path, &sealed[..4096]).unwrap();
    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &sealed[4096..], end).unwrap();
    let error = ModelFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("layer 0 dense has an impossible stored length"), "{error}");
}

//! Tables of n-grams: their description in a checkpoint is checked, and every row is in the file.

use crate::common;

use std::fs;
use std::path::Path;

use crate::common::fixture;
use crate::common::safetensors::{Tensor, Tensors, read_dir, values, write_dir};
use serde_json::{Value, json};
use sluice_converter::{Options, convert, plan};
use sluice_format::sectors::{SectorId, Sectors};
use sluice_format::{ModelFile, NgramHead};

const TABLE: &str = "model.language_model.layers.0.ple.ple_embedding";

fn golden() -> (Value, Tensors) {
    let dir = fixture("golden/qwen4_exp");
    (serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap(), read_dir(&dir))
}

fn integers(numbers: &[i64]) -> Tensor {
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    Tensor { dtype: "I64".into(), shape: vec![numbers.len()], bytes }
}

/// The error of planning the golden checkpoint with other tensors and another configuration.
fn refused(change: impl FnOnce(&mut Tensors, &mut Value)) -> String {
    let (mut config, mut tensors) = golden();
    change(&mut tensors, &mut config["text_config"]);
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &config, &tensors, 1);
    plan(dir.path(), &Options::default()).unwrap_err().to_string()
}

#[track_caller]
fn assert_names(error: &str, words: &[&str]) {
    words.iter().for_each(|w| assert!(error.contains(w), "{error} lacks {w}"));
}

#[test]
fn what_decides_the_rows_is_checked_and_named() {
    let (sizes, offsets) = (format!("{TABLE}.ngram_heads_vocab_sizes"), format!("{TABLE}.ngram_heads_offsets"));
    let multipliers = format!("{TABLE}.layer_multipliers");
    let replaced = |name: &str, tensor: Tensor| refused(|t, _| drop(t.insert(name.to_owned(), tensor)));
    assert_names(&replaced(&sizes, integers(&[53; 15])), &[&sizes, "[15]", "[16]"]);
    assert_names(&replaced(&offsets, integers(&[-1; 16])), &[&offsets, "negative"]);
    assert_names(&replaced(&offsets, integers(&[1391; 16])), &["rows from 1391 on", "1392"]);
    assert_names(&replaced(&sizes, integers(&[0; 16])), &["0 rows from 0 on"]);
    assert_names(&replaced(&sizes, integers(&[i64::MAX; 16])), &["a head of n-grams has"]);
    assert_names(&replaced(&multipliers, Tensor::f32(&[3], [1.0; 3])), &[&multipliers, "F32", "I64"]);
    assert_names(&refused(|t, _| drop(t.remove(&multipliers))), &[&multipliers, "missing"]);
}

#[test]
fn parts_that_are_missing_or_of_another_shape_are_named() {
    let part = format!("{TABLE}.ngram_embedding.shard_7.weight");
    assert_names(&refused(|t, _| drop(t.remove(&part))), &["a tensor is missing", &part]);
    // The rows of the whole suffice, but those of this part are too few for its place.
    let more = format!("{TABLE}.ngram_embedding.shard_8.weight");
    let error = refused(|t, _| {
        t.insert(part.clone(), Tensor::bf16(&[115, 4], vec![0.0; 460]));
        t.insert(more, Tensor::bf16(&[117, 4], vec![0.0; 468]));
    });
    assert_names(&error, &[&part, "[115, 4]", "[116, 4]"]);
    let first = format!("{TABLE}.ngram_embedding.shard_0.weight");
    let error = refused(|t, _| drop(t.insert(first.clone(), Tensor::bf16(&[116, 5], vec![0.0; 580]))));
    assert_names(&error, &[&first, "[116, 5]", "[116, 4]"]);
    let error = refused(|_, c| c["split_ngram_parts"] = json!(11));
    assert_names(&error, &["shard_11.weight", "not part of"]);
    assert_names(&refused(|_, c| c["split_ngram_parts"] = json!(13)), &["shard_12.weight", "missing"]);
}

#[test]
fn configurations_that_cannot_be_meant_are_named_by_their_keys() {
    let with = |key: &str, value: Value| refused(|_, c| c[key] = value);
    assert_names(&with("ple_layer_ids", json!([0])), &["`text_config.ple_layer_ids` holds 0", "4 layers"]);
    assert_names(&with("ple_layer_ids", json!([5])), &["`text_config.ple_layer_ids` holds 5"]);
    assert_names(&with("ple_embed_dim", json!(63)), &["`text_config.ple_embed_dim` is 63", "16 heads"]);
    assert_names(&with("ngram_size", json!(1)), &["`text_config.ngram_size` is 1"]);
    assert_names(&with("heads_per_ngram", json!(u64::MAX)), &["`text_config.heads_per_ngram`"]);
    assert_names(&with("ngram_vocab_size_base", json!(u64::MAX)), &["`text_config.ngram_vocab_size_base`"]);
    assert_names(&with("split_ngram_parts", json!(0)), &["`text_config.split_ngram_parts` is 0"]);
    assert_names(&with("ple_conv_kernel_size", json!(0)), &["`text_config.ple_conv_kernel_size` is 0"]);
    assert_names(&with("eos_token_id", json!(-1)), &["`text_config.eos_token_id`"]);
    assert_names(&with("eos_token_id", json!([])), &["`text_config.eos_token_id`", "n-grams"]);
    assert_names(&with("hc_count", json!(0)), &["`text_config.hc_count` is 0"]);
    assert_names(&with("hc_lowrank", json!(0)), &["`text_config.hc_lowrank` is 0"]);
    assert_names(&with("output_gate_type", json!("tanh")), &["`text_config.output_gate_type`", "sigmoid"]);
    assert_names(&with("indexer_kv_heads", json!(2)), &["`text_config.indexer_kv_heads` must be 1"]);
    assert_names(&with("indexer_budget", json!(3)), &["`text_config.indexer_budget` is 3", "4"]);
    assert_names(&with("indexer_head_dim", json!(null)), &["`text_config.indexer_head_dim` is missing"]);
}

/// All rows of a table in the file, in order; each sector has its checksum.
fn rows(path: &Path, layer: u32) -> Vec<f32> {
    let file = ModelFile::open(path).unwrap();
    let (mut all, mut extent) = (Vec::new(), Vec::new());
    for (record, tensor) in file.table_parts(layer) {
        file.read_extent(record, &mut extent).unwrap();
        let [_, rows, cols] = tensor.shape.map(|n| n as usize);
        let element = tensor.weight_type.plain_element_len().unwrap();
        let sectors = Sectors::of_rows(cols * element).unwrap();
        for (number, sector) in extent.chunks_exact(sectors.len).take(rows.div_ceil(sectors.rows)).enumerate() {
            let id = SectorId { layer, part: record.index, sector: number as u32 };
            assert_eq!(sectors.check(id, sector), Ok(()), "{id:?}");
        }
        for row in 0..rows {
            let (sector, at) = sectors.place(row);
            let bytes = &extent[sector * sectors.len + at..][..sectors.row_len];
            all.extend(bytes.chunks_exact(element).map(|b| match b {
                [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([*a, *b])) << 16),
                _ => f32::from_le_bytes(b.try_into().unwrap()),
            }));
        }
    }
    all
}

#[test]
fn every_row_is_in_its_place_whatever_the_types_and_pages() {
    let (_, source) = golden();
    let whole = |layer: u32| -> Vec<f32> {
        let name =
            |part| format!("model.language_model.layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{part}.weight");
        (0..12).flat_map(|part| values(&source, &name(part))).collect()
    };
    for (types, page_size, compress) in [("keep", 4096, true), ("q4", 16384, false), ("f32", 4096, false)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sluice");
        let options = Options { page_size, compress, ..common::options(types, types) };
        convert(&fixture("golden/qwen4_exp"), &path, &options, &()).unwrap();
        for layer in [0, 2] {
            assert!(rows(&path, layer) == whole(layer), "{types}: layer {layer} has other rows");
        }
        let file = ModelFile::open(&path).unwrap();
        let [first, second] = &file.spec().ngrams[..] else { panic!("two tables") };
        assert_eq!((first.layer, first.table_rows, second.layer), (0, 1392, 2));
        assert_eq!(first.multipliers, [25912437101140037, 21043097849633001, 55314113489879299]);
        assert_eq!(first.heads[15], NgramHead { first: 1265, rows: 127 });
    }
}

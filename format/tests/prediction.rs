//! A layer that predicts: what its spec must be, and that extents and spec agree.

use crate::support::*;
use sluice_format::*;

/// Asserts that the file with a prediction layer is refused once it is spoilt, with a message that contains `says`.
fn spoilt(says: &str, spoil: impl FnOnce(&mut Image)) {
    refused(&predicting_spec(), says, spoil);
}

fn refused(spec: &ModelSpec, says: &str, spoil: impl FnOnce(&mut Image)) {
    let mut image = Image::of(&file_of(spec, 4096));
    spoil(&mut image);
    let (_dir, path) = temp();
    let error = open_bytes(&path, &image.seal()).expect_err(says);
    assert!(matches!(error, FormatError::Invalid { .. }), "{says}: {error}");
    assert!(error.to_string().contains(says), "{says}: {error}");
}

fn tensor_of(image: &Image, kind: ExtentKind, name: &str) -> usize {
    let found = image.tensors.iter().position(|t| get(t, 0, 2) == kind as u64 && t[64..].starts_with(name.as_bytes()));
    found.expect("the model has this tensor")
}

#[test]
fn its_extents_are_found_behind_those_of_the_decoder() {
    let (_dir, path) = temp();
    write(&path, &plan(&predicting_spec(), 8), 4096).unwrap();
    let model = ModelFile::open(&path).unwrap();
    let spec = model.spec();
    assert_eq!((spec.layers.len(), spec.prediction_layer(), spec.all_layers().count()), (2, Some(2), 3));
    let names: Vec<_> = model.tensors_in(ExtentKind::Prediction, 2, 0).map(|t| (t.name.as_str(), t.shape)).collect();
    let expected = [
        ("embedding_norm", [1, 1, 32]),
        ("hidden_norm", [1, 1, 32]),
        ("projection", [1, 32, 64]),
        ("norm", [1, 1, 32]),
    ];
    assert_eq!(names, expected);
    for kind in [ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense, ExtentKind::Expert] {
        assert_eq!(spec.tensors(kind, 2), spec.tensors(kind, 1), "{kind}");
        assert!(model.extent(kind, 2, 0).is_some() && model.extent(kind, 3, 0).is_none(), "{kind}");
    }
    for kind in [ExtentKind::Embedding, ExtentKind::Head] {
        assert_eq!(model.parts_of(kind, 2).map(|(_, t)| t.shape[1]).collect::<Vec<_>>(), [8, 8, 4], "{kind}");
        let last = model.extents().iter().rfind(|e| e.kind == kind).unwrap();
        assert_eq!(last.name(), format!("layer 2 {kind} part 2"));
    }
    // What decoding takes is the decoder's.
    assert_eq!(spec.routed_per_token(), 2);
    assert_eq!(model.token_cycle_bytes(), 2 * model.extent(ExtentKind::Expert, 1, 0).unwrap().stored_len);
    assert!(model.verify_all(&mut |_| ()).is_empty());

    let alone = spec.prediction_model().unwrap();
    assert_eq!((alone.layers.len(), alone.prediction.is_none(), alone.hidden_size), (1, true, spec.hidden_size));
    alone.validate().unwrap();
    assert!(small_spec().prediction_model().is_none() && small_spec().prediction_layer().is_none());
}

#[test]
fn what_its_spec_says_must_be_there_and_nothing_else() {
    let prediction = |own: bool| {
        let mut prediction = predicting_spec().prediction;
        prediction.iter_mut().for_each(|p| (p.own_embedding, p.own_head) = (own, own));
        serde_json::to_value(prediction).unwrap()
    };
    // A file without it whose spec has one.
    refused(&small_spec(), "layer 2 prediction is missing, which its spec implies", |i| {
        i.change_spec(|s| s["prediction"] = prediction(false));
    });
    spoilt("layer 2 prediction is missing", |i| {
        let (at, _) = (i.extents.iter().enumerate())
            .find(|(_, e)| get(*e, 0, 2) == ExtentKind::Prediction as u64)
            .expect("it has one");
        i.set_extent(at, "layer", 1);
        for t in 0..i.tensors.len() {
            if get(&i.tensors[t], 0, 2) == ExtentKind::Prediction as u64 {
                i.set_tensor(t, "layer", 1);
            }
        }
    });
    spoilt("its spec implies", |i| i.change_spec(|s| drop(s.as_object_mut().unwrap().remove("prediction"))));
    spoilt("its spec implies", |i| i.change_spec(|s| s["prediction"]["own_embedding"] = false.into()));
    spoilt("its spec implies", |i| i.change_spec(|s| s["prediction"]["own_head"] = false.into()));
    let mut shared = predicting_spec();
    shared.prediction.iter_mut().for_each(|p| (p.own_embedding, p.own_head) = (false, false));
    refused(&shared, "the embedding of layer 2 has 0 rows, the vocabulary 20", |i| {
        i.change_spec(|s| s["prediction"]["own_embedding"] = true.into());
    });
    refused(&shared, "the head of layer 2 has 0 rows, the vocabulary 20", |i| {
        i.change_spec(|s| s["prediction"]["own_head"] = true.into());
    });
    spoilt("experts", |i| i.change_spec(|s| s["prediction"]["layer"]["ffn"]["moe"]["experts"] = (1 << 18).into()));
    spoilt("`router` of layer 2 router is", |i| {
        i.change_spec(|s| s["prediction"]["layer"]["ffn"]["moe"]["experts"] = 4.into());
    });
}

#[test]
fn its_tensors_must_have_the_shapes_that_follow() {
    for (name, other) in [("embedding_norm", "x_embedding_no"), ("projection", "perjection"), ("norm", "mron")] {
        spoilt(&format!("where its spec implies `{name}`"), |i| {
            let t = tensor_of(i, ExtentKind::Prediction, name);
            i.tensors[t][64..64 + other.len()].copy_from_slice(other.as_bytes());
        });
    }
    spoilt("which is not what its shape implies", |i| {
        let t = tensor_of(i, ExtentKind::Prediction, "projection");
        i.set_tensor(t, "cols", 32);
    });
    // The same bytes as a matrix of one row.
    spoilt("its spec implies plain", |i| {
        let t = tensor_of(i, ExtentKind::Prediction, "hidden_norm");
        i.set_tensor(t, "rows", 32);
        i.set_tensor(t, "cols", 1);
    });
    spoilt("its spec implies", |i| {
        i.change_spec(|s| s["prediction"]["layer"]["attention"]["kv_lora_rank"] = 8.into());
    });
}

#[test]
fn specs() {
    let spec = predicting_spec();
    assert_eq!(ModelSpec::from_json(&spec.to_json()).unwrap(), spec);
    assert!(!String::from_utf8(small_spec().to_json()).unwrap().contains("prediction"));
    let bad = |says: &str, spec: &ModelSpec| {
        let error = ModelSpec::from_json(&spec.to_json()).expect_err(says);
        assert!(error.contains(says), "{says}: {error}");
    };
    let with_layer = |change: &dyn Fn(&mut LayerSpec)| {
        let mut spec = predicting_spec();
        change(&mut spec.prediction.as_mut().unwrap().layer);
        spec
    };
    bad("prediction layer: top_k is 0", &with_layer(&|l| l.ffn.moe.as_mut().unwrap().top_k = 0));
    bad(
        "prediction layer: it has no feed-forward part",
        &with_layer(&|l| {
            (l.ffn.moe, l.ffn.dense_width) = (None, 0);
        }),
    );
    bad(
        "prediction layer: kv_lora_rank",
        &with_layer(&|l| {
            if let AttentionSpec::Mla(mla) = &mut l.attention {
                mla.kv_lora_rank = usize::MAX;
            }
        }),
    );
    bad(
        "prediction layer: its indexer is shared",
        &with_layer(&|l| {
            l.attention = sparse_spec().layers[1].attention.clone();
        }),
    );
    let mut wide = small_spec();
    wide.hidden_size = limits::MAX_WIDTH;
    wide.validate().unwrap();
    wide.prediction = predicting_spec().prediction;
    bad("prediction layer: hidden_size × 2", &wide);
    let mut streams = streams_spec();
    streams.prediction = predicting_spec().prediction;
    bad("prediction layer: the model has several residual streams", &streams);
    let mut json: serde_json::Value = serde_json::from_slice(&spec.to_json()).unwrap();
    json["prediction"]["steps"] = 2.into();
    assert!(ModelSpec::from_json(&serde_json::to_vec(&json).unwrap()).unwrap_err().contains("unknown field"));
}

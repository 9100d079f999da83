//! Every number in a converted file against the checkpoint, read by code of its own.

use crate::common;

use std::path::Path;

use crate::common::safetensors::{Tensors, read_dir, values};
use crate::common::{Content, GOLDENS, Synthetic, content, fixture, joined, options};
use sluice_converter::{Options, Summary, convert};
use sluice_format::{AttentionSpec, ExtentKind, MlaSpec, ModelFile, ModelSpec, WeightType};

/// Name of the source tensor, and the slice of rows and transposition that a test applies to it.
fn expected(spec: &ModelSpec, source: &Tensors, kind: ExtentKind, layer: u32, index: u32, name: &str) -> Vec<f32> {
    let l = |rest: &str| format!("model.layers.{layer}.{rest}");
    let all = |rest: &str| values(source, &l(rest));
    let ffn = |module: &str| match name {
        "gate_up" => [all(&format!("{module}.gate_proj.weight")), all(&format!("{module}.up_proj.weight"))].concat(),
        _ => all(&format!("{module}.{name}_proj.weight")),
    };
    match (kind, name) {
        (ExtentKind::FinalNorm, _) => values(source, "model.norm.weight"),
        (ExtentKind::Attention, "k_b") => kv_b(mla(spec), &all("self_attn.kv_b_proj.weight"), true),
        (ExtentKind::Attention, "v_b") => kv_b(mla(spec), &all("self_attn.kv_b_proj.weight"), false),
        (ExtentKind::Attention, name) => all(match name {
            "attn_norm" => "input_layernorm.weight",
            "q" => "self_attn.q_proj.weight",
            "q_a" => "self_attn.q_a_proj.weight",
            "q_a_norm" => "self_attn.q_a_layernorm.weight",
            "q_b" => "self_attn.q_b_proj.weight",
            "kv_a" => "self_attn.kv_a_proj_with_mqa.weight",
            "kv_a_norm" => "self_attn.kv_a_layernorm.weight",
            "o" => "self_attn.o_proj.weight",
            other => panic!("{other}"),
        }),
        (ExtentKind::Router, "ffn_norm") => all("post_attention_layernorm.weight"),
        (ExtentKind::Router, "router") => all("mlp.gate.weight"),
        (ExtentKind::Router, _) => all("mlp.gate.e_score_correction_bias"),
        (ExtentKind::Dense, _) if source.contains_key(&l("mlp.gate_proj.weight")) => ffn("mlp"),
        (ExtentKind::Dense, _) => ffn("mlp.shared_experts"),
        (ExtentKind::Expert, _) => ffn(&format!("mlp.experts.{index}")),
        (ExtentKind::Embedding | ExtentKind::Head, _) => unreachable!("joined by the caller"),
        (ExtentKind::Prediction, name) => all(match name {
            "embedding_norm" => "enorm.weight",
            "hidden_norm" => "hnorm.weight",
            "projection" => "eh_proj.weight",
            _ => "shared_head.norm.weight",
        }),
        (ExtentKind::Table, _) => unreachable!("no family has them yet"),
    }
}

fn mla(spec: &ModelSpec) -> &MlaSpec {
    match &spec.layers[0].attention {
        AttentionSpec::Mla(mla) => mla,
        other => panic!("latent attention, not {other:?}"),
    }
}

fn kv_b(m: &MlaSpec, source: &[f32], keys: bool) -> Vec<f32> {
    let (nope, v, rank) = (m.qk_nope_head_dim, m.v_head_dim, m.kv_lora_rank);
    let mut out = Vec::new();
    for head in source.chunks((nope + v) * rank) {
        if keys {
            out.extend((0..rank).flat_map(|r| (0..nope).map(move |c| head[c * rank + r])));
        } else {
            out.extend(&head[nope * rank..]);
        }
    }
    out
}

fn convert_to(src: &Path, experts: &str, dense: &str) -> (tempfile::TempDir, Summary, ModelSpec, Content) {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("m.sluice");
    let summary = convert(src, &dst, &options(experts, dense), &()).unwrap();
    let spec = ModelFile::open(&dst).unwrap().spec().clone();
    let content = content(&dst);
    (dir, summary, spec, content)
}

/// Calls `check(key name, type, stored, source)` for every tensor.
fn compare(spec: &ModelSpec, content: &Content, source: &Tensors, check: impl Fn(&str, WeightType, &[f32], &[f32])) {
    for ((kind, layer, index, name), (ty, stored)) in content {
        if matches!(kind, ExtentKind::Embedding | ExtentKind::Head) {
            continue;
        }
        let want = expected(spec, source, *kind, *layer, *index, name);
        check(&format!("layer {layer} {kind} {index} {name}"), *ty, stored, &want);
    }
    for (kind, name) in [(ExtentKind::Embedding, "model.embed_tokens.weight"), (ExtentKind::Head, "lm_head.weight")] {
        let ty = content.iter().find(|(k, _)| k.0 == kind).unwrap().1.0;
        let name = if source.contains_key(name) { name } else { "model.embed_tokens.weight" };
        check(kind.name(), ty, &joined(content, kind), &values(source, name));
    }
}

fn assert_exact(name: &str, stored: &[f32], want: &[f32]) {
    assert_eq!(stored.len(), want.len(), "{name}");
    let wrong = stored.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits() && !(*a == 0.0 && *b == 0.0));
    assert!(wrong.is_none(), "{name} differs at {wrong:?}");
}

#[test]
fn goldens_and_demo_model_are_carried_and_widened_exactly() {
    for name in GOLDENS.into_iter().chain(["demo-model"]) {
        let source = read_dir(&fixture(name));
        for choice in ["keep", "f32"] {
            let (_dir, summary, spec, content) = convert_to(&fixture(name), choice, choice);
            compare(&spec, &content, &source, |name, ty, stored, want| {
                assert!(choice == "keep" || ty == WeightType::F32, "{name} is {ty}");
                assert_exact(name, stored, want);
            });
            assert_eq!(summary.errors.values().sum::<f64>(), 0.0);
            assert!(summary.widened.is_empty(), "{:?}", summary.widened);
        }
    }
}

#[test]
fn kept_fp8_stays_fp8() {
    let (_dir, summary, ..) = convert_to(&fixture("golden/deepseek_v3_fp8"), "keep", "keep");
    for group in ["expert.gate_up", "expert.down", "attention.k_b", "attention.v_b", "attention.o", "dense.down"] {
        assert_eq!(summary.types[group], ["fp8"], "{group}");
    }
    assert_eq!(summary.types["router.router"], ["bf16"]);
    assert_eq!(summary.types["embedding"], ["bf16"]);
}

#[test]
fn synthetic_checkpoints_of_every_float_type_and_odd_shapes() {
    let odd = Synthetic { q_lora: None, vocab: 17, hidden: 33, width: 9, ..Synthetic::default() };
    let wide = Synthetic { hidden: 300, width: 140, kv_lora: 150, ..Synthetic::default() };
    for (shape, dtype) in [(odd, "F16"), (wide.clone(), "F32"), (wide.clone(), "F8_E4M3"), (wide, "BF16")] {
        let dir = tempfile::tempdir().unwrap();
        let source = Synthetic { dtype, ..shape }.write(dir.path(), 4);
        let (_dir, _, spec, content) = convert_to(dir.path(), "keep", "keep");
        compare(&spec, &content, &source, |name, _, stored, want| assert_exact(name, stored, want));
        let (_dir, summary, spec, content) = convert_to(dir.path(), "bf16", "bf16");
        compare(&spec, &content, &source, |name, ty, stored, want| {
            if ty == WeightType::Bf16 {
                let narrow: Vec<f32> = want.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
                assert_exact(name, stored, &narrow);
            } else {
                assert_exact(name, stored, want);
            }
        });
        // Half a unit in the last of 8 bits at most.
        assert!(summary.errors.values().all(|e| *e < 1.0 / 256.0), "{:?}", summary.errors);
        assert_eq!(summary.errors.contains_key("expert.down"), dtype != "BF16");
    }
}

/// Five heads of 20 + 14 or 20 + 20 rows: a tile of the values, or of the transposed keys, straddles row 128 of the
/// source, where one scale ends and the next begins.
#[test]
fn slices_that_no_tile_scale_can_carry_are_widened_and_named() {
    for (v, torn, whole) in [(14, "v_b", "k_b"), (20, "k_b", "v_b")] {
        let dir = tempfile::tempdir().unwrap();
        let source = Synthetic { dtype: "F8_E4M3", nope: 20, v, ..Synthetic::default() }.write(dir.path(), 1);
        for choice in ["keep", "fp8"] {
            let (_dir, summary, spec, content) = convert_to(dir.path(), "keep", choice);
            assert_eq!(summary.types[&format!("attention.{torn}")], ["f32"]);
            assert_eq!(summary.types[&format!("attention.{whole}")], ["fp8"]);
            assert_eq!(summary.widened, [0, 1, 2].map(|l| format!("layer {l} attention.{torn}")));
            compare(&spec, &content, &source, |name, _, stored, want| {
                // The head is bf16 in the source: `fp8` quantises it.
                if choice == "keep" || name != "head" {
                    assert_exact(name, stored, want);
                }
            });
        }
    }
}

#[test]
fn q8_is_within_half_a_step_of_each_block() {
    for name in ["golden/deepseek_v3", "golden/deepseek_v3_fp8"] {
        let source = read_dir(&fixture(name));
        let (_dir, summary, spec, content) = convert_to(&fixture(name), "q8", "q8");
        compare(&spec, &content, &source, |name, ty, stored, want| {
            if ty != WeightType::Q8 {
                return assert_exact(name, stored, want);
            }
            // A block's step is its largest magnitude / 127, so no error exceeds that of the whole tensor's largest. The
            // rounding of the scale to f16 adds 2^-11 of the value.
            let absmax = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let bound = absmax / 127.0 * 0.5 * 1.01 + absmax / 2048.0;
            assert!(stored.iter().zip(want).all(|(a, b)| (a - b).abs() <= bound), "{name}");
        });
        assert_eq!(summary.types["attention.k_b"], ["q8"]);
        assert!(summary.errors["expert.gate_up"] > 1e-3 && summary.errors["expert.gate_up"] < 2e-2);
        assert_eq!(summary.types["router.router"], ["bf16"]);
    }
}

#[test]
fn fp8_from_wider_sources_is_within_half_a_code_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { hidden: 300, width: 140, ..Synthetic::default() };
    let source = shape.write(dir.path(), 1);
    let (_dir, summary, spec, content) = convert_to(dir.path(), "fp8", "keep");
    compare(&spec, &content, &source, |name, ty, stored, want| {
        if ty != WeightType::Fp8 {
            return assert_exact(name, stored, want);
        }
        // 3 bits of mantissa: half a step is 2^-4 of the value; below the normal numbers 2^-10 of the block's scale.
        let absmax = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 16.0 * 1.001 + absmax / 448.0 / 1024.0 * 1.001;
        assert!(stored.iter().zip(want).all(near), "{name}");
    });
    assert_eq!(summary.types["expert.down"], ["fp8"]);
    assert!(summary.errors["expert.down"] > 0.01 && summary.errors["expert.down"] < 0.05, "{:?}", summary.errors);
}

#[test]
fn experts_of_different_types_share_the_wider_one_and_the_other_matrix_of_the_pair_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut source = shape.tensors();
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let t = source[name].clone();
    source.insert(name.into(), common::safetensors::Tensor::f16(&t.shape, t.values()));
    common::safetensors::write_dir(dir.path(), &shape.config(), &source, 1);
    let (_dir, summary, spec, content) = convert_to(dir.path(), "keep", "keep");
    compare(&spec, &content, &source, |name, _, stored, want| assert_exact(name, stored, want));
    assert_eq!(summary.types["expert.gate"], ["bf16"]);
    assert_eq!(summary.types["expert.up"], ["f32"]);
    assert_eq!(summary.widened, ["layer 1 expert.up"]);
}

#[test]
fn tied_embeddings_are_also_the_head() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic::default();
    let mut source = shape.tensors();
    source.remove("lm_head.weight");
    let mut config = shape.config();
    config["tie_word_embeddings"] = true.into();
    common::safetensors::write_dir(dir.path(), &config, &source, 1);
    let (_dir, summary, spec, content) = convert_to(dir.path(), "keep", "q8");
    assert_eq!(summary.types["embedding"], ["bf16"]);
    assert_eq!(summary.types["head"], ["q8"]);
    compare(&spec, &content, &source, |name, ty, stored, want| {
        if ty != WeightType::Q8 {
            assert_exact(name, stored, want);
        }
    });
}

#[test]
fn prediction_layers_are_carried() {
    let src = fixture("golden/deepseek_v3");
    let (_dir, summary, spec, content) = convert_to(&src, "keep", "keep");
    assert_eq!((spec.layers.len(), spec.prediction_layer()), (3, Some(3)));
    let prediction = spec.prediction.as_ref().unwrap();
    assert_eq!(prediction.layer, spec.layers[2]);
    // Embedding and head are copies of the model's, and accounted for.
    assert!(!prediction.own_embedding && !prediction.own_head);
    let remarks = summary.notes.iter().filter(|note| note.contains("prediction"));
    assert_eq!((summary.left_out.as_slice(), remarks.count()), (&[][..], 0), "{:?}", summary.notes);
    let count = |kind| content.keys().filter(|(k, layer, ..)| *k == kind && *layer == 3).count();
    assert_eq!((count(ExtentKind::Prediction), count(ExtentKind::Expert)), (4, 16 * 2));
    compare(&spec, &content, &read_dir(&src), |name, _, stored, want| assert_exact(name, stored, want));
}

#[test]
fn prediction_layers_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("m.sluice");
    let without = Options { mtp: false, ..options("keep", "keep") };
    let summary = convert(&fixture("golden/deepseek_v3"), &dst, &without, &()).unwrap();
    let spec = ModelFile::open(&dst).unwrap().spec().clone();
    assert_eq!((spec.layers.len(), spec.prediction), (3, None));
    let [left_out] = summary.left_out.as_slice() else { panic!("{:?}", summary.left_out) };
    assert_eq!(left_out.reason, "multi-token prediction layers");
    assert!(left_out.tensors > 16 * 3 && left_out.bytes > 0);
}

#[test]
fn the_file_keeps_the_side_files_and_says_where_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("m.sluice");
    let summary = convert(&fixture("demo-model"), &dst, &options("q8", "keep"), &()).unwrap();
    let model = ModelFile::open(&dst).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let bytes = std::fs::read(fixture("demo-model").join(name)).unwrap();
        assert_eq!(model.metadata().get(name), Some(bytes.as_slice()), "{name}");
    }
    let provenance: serde_json::Value =
        serde_json::from_slice(model.metadata().get(sluice_format::PROVENANCE_BLOB).unwrap()).unwrap();
    assert_eq!(provenance["recipe"]["expert_type"], "q8");
    assert_eq!(provenance["source_files"][0]["name"], "model.safetensors");
    assert!(provenance["relative_rms_error"]["expert.down"].as_f64().unwrap() > 0.0);
    assert_eq!(model.superblock().model_id.to_string(), summary.model_id);
    assert_eq!(summary.file_bytes, std::fs::metadata(&dst).unwrap().len());
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["m.sluice"], "partial and journal are gone");
}

#[test]
fn embedding_and_head_parts_keep_their_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { vocab: 10_000, hidden: 1000, layers: 1, dense_layers: 1, ..Synthetic::default() };
    let source = Synthetic { dtype: "F32", ..shape }.write(dir.path(), 1);
    let out = tempfile::tempdir().unwrap();
    let dst = out.path().join("m");
    convert(dir.path(), &dst, &options("keep", "keep"), &()).unwrap();
    let model = ModelFile::open(&dst).unwrap();
    let parts = |kind| model.parts(kind).map(|(_, t)| (t.shape[1], t.len)).collect::<Vec<_>>();
    let (embedding, head) = (parts(ExtentKind::Embedding), parts(ExtentKind::Head));
    assert!(embedding.iter().all(|p| p.1 <= 256 << 10) && embedding[0].0 == 65);
    assert!(head.iter().all(|p| p.1 <= 16 << 20) && head.len() == 3 && head[0].0.is_multiple_of(8));
    let content = content(&dst);
    assert_exact("embedding", &joined(&content, ExtentKind::Embedding), &values(&source, "model.embed_tokens.weight"));
    assert_exact("head", &joined(&content, ExtentKind::Head), &values(&source, "lm_head.weight"));
}

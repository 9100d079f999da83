//! The tokens are the model's own: logits and greedy continuations agree with Hugging Face transformers.

use std::fs;

use sluice_format::WeightType;
use sluice_model::EngineOptions;
use sluice_tests::{Converted, Golden, fixture, greedy, relative_error};
use sluice_text::Tokenizer;

const FAMILIES: [&str; 3] = ["deepseek_v3", "deepseek_v3_fp8", "kimi_k2"];

fn exact() -> EngineOptions {
    EngineOptions { exact: true, ..EngineOptions::default() }
}

#[test]
fn goldens_prefill_step_by_step_and_greedy() {
    for family in FAMILIES {
        let golden = Golden::load(family);
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&exact());
        let prompt = golden.ids("input_ids");
        let expected = golden.array("logits");

        let mut sequence = engine.new_sequence();
        let mut prefill = Vec::new();
        engine.forward_all(&mut sequence, &prompt, &mut |_, row| prefill.extend_from_slice(row)).unwrap();
        let error = relative_error(&prefill, &expected.data);
        assert!(error < 1e-4, "{family}: prefill logits differ by {error:e}");

        let mut sequence = engine.new_sequence();
        let mut stepped = Vec::new();
        for token in &prompt {
            engine.forward_all(&mut sequence, &[*token], &mut |_, row| stepped.extend_from_slice(row)).unwrap();
        }
        assert!(stepped == prefill, "{family}: a token at a time gives other bits than all at once");

        let (ids, rows) = greedy(&mut engine, &prompt, 16);
        assert_eq!(ids, golden.ids("greedy_ids"), "{family}");
        let steps = golden.array("step_logits");
        let error = relative_error(&rows[1..].concat(), &steps.data[..15 * steps.shape[1]]);
        let shifted = relative_error(&rows.concat(), &steps.data);
        assert!(error.min(shifted) < 1e-4, "{family}: step logits differ by {error:e} ({shifted:e} unshifted)");
    }
}

#[test]
fn demo_model_speaks_as_the_reference_does() {
    let expected: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("demo-model/expected.json")).unwrap()).unwrap();
    let model = Converted::new("demo-model", Some(WeightType::F32));
    let mut engine = model.open(&exact());
    let tokenizer = Tokenizer::of(engine.file().metadata()).unwrap().expect("the demo model has a tokenizer");
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
    };
    for case in expected["greedy"].as_array().unwrap() {
        let prompt = tokenizer.encode(case["prompt"].as_str().unwrap(), true).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]));
        let wanted = ids(&case["ids"]);
        let (continuation, _) = greedy(&mut engine, &prompt, wanted.len());
        assert_eq!(continuation, wanted, "prompt {:?}", case["prompt"]);
        assert_eq!(tokenizer.decode(&continuation, true).unwrap(), case["text"].as_str().unwrap());
    }
}

/// Sum of −ln p over the windows in `expected.json`.
fn negative_log_likelihood(ty: WeightType, options: &EngineOptions) -> (f64, usize) {
    let model = Converted::new("demo-model", Some(ty));
    let mut engine = model.open(options);
    let text = fs::read_to_string(fixture("demo-model/eval.txt")).unwrap();
    let ids = Tokenizer::of(engine.file().metadata()).unwrap().unwrap().encode(&text, true).unwrap();
    let (mut nll, mut scored) = (0.0, 0);
    let mut sequence = engine.new_sequence();
    for start in (0..ids.len() - 1).step_by(256) {
        let window = &ids[start..ids.len().min(start + 257)];
        sequence.clear();
        engine
            .forward_all(&mut sequence, &window[..window.len() - 1], &mut |t, row| {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
                nll += sum.ln() + f64::from(max) - f64::from(row[window[t + 1] as usize]);
                scored += 1;
            })
            .unwrap();
    }
    (nll, scored)
}

#[test]
fn demo_model_perplexity() {
    let reference: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("demo-model/expected.json")).unwrap()).unwrap();
    let expected = reference["perplexity"]["perplexity"].as_f64().unwrap();
    let check = |ty, options: &EngineOptions, tolerance: f64| {
        let (nll, scored) = negative_log_likelihood(ty, options);
        assert_eq!(scored as u64, reference["perplexity"]["tokens_scored"].as_u64().unwrap());
        let perplexity = (nll / scored as f64).exp();
        let error = (perplexity / expected - 1.0).abs();
        assert!(error < tolerance, "{ty}: perplexity {perplexity}, the reference has {expected}");
    };
    check(WeightType::F32, &exact(), 1e-3);
    check(WeightType::Q8, &exact(), 5e-3);
    check(WeightType::Q8, &EngineOptions::default(), 5e-3);
}

//! Long prompts take longer passes than the plan has scratch for, where that saves reading; no bit changes, and neither does the plan.

use std::path::{Path, PathBuf};

use sluice_converter::synth::{Geometry, SynthOptions, WeightTypes, synth};
use sluice_format::WeightType;
use sluice_model::{Cancel, Control, Engine, EngineOptions, PromptAttention, Span, Want};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const TOKENS: usize = 1500;

/// A model whose scratch for so many tokens is worth a tenth of its experts.
fn model() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 256,
        "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "n_shared_experts": 0,
        "n_routed_experts": 128, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0, "q_lora_rank": null, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 2048
    });
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let geometry = Geometry::load(path.to_str().unwrap(), None).unwrap();
    let path = folder.path().join("model.sluice");
    let types = WeightTypes { experts: WeightType::Q8, dense: WeightType::Q8 };
    synth(&geometry, &path, &SynthOptions::new(types), &()).unwrap();
    (folder, path)
}

fn open(path: &Path, budget: Option<u64>, prompt_attention: PromptAttention) -> Engine {
    let context = Some(TOKENS + 8);
    let options = EngineOptions { context, budget, prompt_attention, forget: true, ..EngineOptions::default() };
    Engine::open(path, &options).unwrap()
}

fn prompt() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * 7919 + 13) % 512).collect()
}

/// The logits behind the prompt and a token after it, and the bytes of experts that the prompt has read.
fn run(engine: &mut Engine) -> (Vec<f32>, u64) {
    let (mut sequence, mut logits, mut next) = (engine.new_sequence(), Vec::new(), Vec::new());
    let before = engine.stats().expert_bytes_read;
    engine.forward(&mut sequence, &prompt(), &mut logits).unwrap();
    let read = engine.stats().expert_bytes_read - before;
    engine.decode(&mut sequence, 7, &mut next).unwrap();
    (logits.into_iter().chain(next).collect(), read)
}

#[test]
fn a_long_prompt_reads_experts_once_and_leaves_the_plan_as_it_was() {
    let (_folder, path) = model();
    for form in [PromptAttention::Absorbed, PromptAttention::Expanded] {
        let mut large = open(&path, None, form);
        assert!(large.memory().rows >= TOKENS, "what fits beside all experts needs no decision");
        let (want, all) = run(&mut large);
        let least = large.memory().used() - large.memory().slot_bytes - large.memory().scratch;
        let mut engine = open(&path, Some(least + 43 * MIB), form);
        let plan = engine.memory().clone();
        assert!(plan.slots < plan.experts / 2 && plan.rows < TOKENS, "{plan:?}");
        let together = engine.rows_together(TOKENS, 0);
        assert!(together >= TOKENS, "{together} rows");
        for _ in 0..2 {
            let (logits, read) = run(&mut engine);
            assert!(logits == want, "other bits in passes of {together} rows");
            assert!(read <= all + all / 8, "{read} bytes read, all experts have {all}");
            assert_eq!(engine.memory(), &plan);
        }
    }
}

#[test]
fn a_long_pass_that_is_cancelled_leaves_the_plan_as_it_was() {
    let (_folder, path) = model();
    let mut engine = open(&path, None, PromptAttention::Absorbed);
    let least = engine.memory().used() - engine.memory().slot_bytes - engine.memory().scratch;
    let (want, _) = run(&mut engine);
    let mut engine = open(&path, Some(least + 43 * MIB), PromptAttention::Absorbed);
    let (plan, cancel) = (engine.memory().clone(), Cancel::new());
    let (mut sequence, switch, mut rows) = (engine.new_sequence(), cancel.clone(), 0);
    let mut progress = |p: sluice_model::Progress| {
        rows = p.rows;
        switch.cancel();
    };
    let mut control = Control { cancel: Some(&cancel), progress: Some(&mut progress), ..Control::default() };
    let tokens = prompt();
    let span = Span::prompt(&mut sequence, &tokens, Want::Last);
    engine.step(&mut [span], &mut control, &mut |_, _, _| ()).unwrap_err();
    assert!(rows >= TOKENS, "{rows} rows in a pass");
    assert_eq!((engine.memory(), sequence.position()), (&plan, 0));
    assert!(run(&mut engine).0 == want);
}

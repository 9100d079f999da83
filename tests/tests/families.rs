//! Every family in every form gives what Hugging Face transformers computes from the golden checkpoints, also with a budget that
//! holds only few of the experts.

use sluice_model::{Control, Engine, EngineOptions, RuntimeError, Span, Want};
use sluice_tests::{Converted, Golden, fixture, greedy, relative_error};

/// Parity of one golden checkpoint, converted with its own types. `folder` is relative to the fixtures, or absolute.
fn check(folder: &str) {
    let golden = Golden::load(&fixture(folder).to_string_lossy());
    let model = Converted::new(folder, None);
    let mut engine = model.open(&exact(None));
    let prompt = golden.ids("input_ids");
    let prefill = logits(&mut engine, &prompt, prompt.len());
    let error = relative_error(&prefill, &golden.array("logits").data);
    println!("{folder}: relative error {error:.1e}");
    assert!(error < 1e-4, "{folder}: prefill logits differ by {error:e}");
    check_layers(folder, &golden, &mut engine, &prompt);
    let stepped = logits(&mut engine, &prompt, 1);
    assert!(stepped == prefill, "{folder}: a token at a time gives other bits than all at once");

    let expected = golden.ids("greedy_ids");
    let (ids, rows) = greedy(&mut engine, &prompt, expected.len());
    assert_eq!(ids, expected, "{folder}");
    let error = relative_error(&rows.concat(), &golden.array("step_logits").data);
    assert!(error < 1e-4, "{folder}: logits through the cache differ by {error:e}");

    let mut engine = model.open(&exact(Some(least_budget(&model))));
    let streamed = greedy(&mut engine, &prompt, expected.len());
    assert_eq!(streamed.0, ids, "{folder}, streamed");
    assert!(streamed.1 == rows, "{folder}: streaming gives other bits");
}

/// Compares the residual stream after every layer, so that a failure names the wrong layer.
fn check_layers(folder: &str, golden: &Golden, engine: &mut Engine, prompt: &[u32]) {
    let mut streams: Vec<Vec<f32>> = Vec::new();
    let mut sequence = engine.new_sequence();
    let mut hidden = |layers: usize, stream: &[f32]| {
        let known = streams.len().max(layers + 1);
        streams.resize_with(known, Vec::new);
        streams[layers].extend_from_slice(stream);
    };
    let mut control = Control { hidden: Some(&mut hidden), ..Control::default() };
    let span = Span::prompt(&mut sequence, prompt, Want::Nothing);
    engine.step(&mut [span], &mut control, &mut |_, _, _| ()).unwrap();
    for (layers, stream) in streams.iter().enumerate() {
        let error = relative_error(stream, &golden.array(&format!("hidden.{layers}")).data);
        assert!(error < 1e-4, "{folder}: the first layer that is wrong is {}: error {error:e}", layers as i64 - 1);
    }
}

fn exact(budget: Option<u64>) -> EngineOptions {
    EngineOptions { exact: true, budget, threads: Some(2), ..EngineOptions::default() }
}

/// Logits of every position, `step` tokens at a time.
fn logits(engine: &mut Engine, prompt: &[u32], step: usize) -> Vec<f32> {
    let mut sequence = engine.new_sequence();
    let mut all = Vec::new();
    for tokens in prompt.chunks(step) {
        engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
    }
    all
}

/// The smallest budget that works, from the error for a budget of one byte.
fn least_budget(model: &Converted) -> u64 {
    match Engine::open(&model.path, &exact(Some(1))) {
        Err(RuntimeError::Budget(e)) => e.least,
        other => panic!("a budget of one byte: {:?}", other.map(|_| "accepted")),
    }
}

/// One test per golden checkpoint, so that every wrong one is named.
macro_rules! goldens {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(concat!("golden/", stringify!($name)));
        })*
    };
}

goldens! {
    deepseek_v2
    deepseek_v2_lite
    deepseek_v3
    deepseek_v3_fp8
    deepseek_v32
    deepseek_v4
    deepseek_v4_fp4
    kimi_k2
    kimi_k2_int4
    kimi_k25_int4
    kimi_linear
    dots1
    glm4_moe
    glm4_moe_air
    glm4_moe_lite
    glm_moe_dsa
    gpt_oss
    gpt_oss_mxfp4
    qwen2_moe
    qwen3_moe
    qwen3_moe_awq
    qwen3_moe_gptq
    qwen3_moe_mlx
    qwen3_moe_nvfp4
    qwen3_next
    qwen3_5_moe
    qwen4_exp
    minimax_m2
    minimax_m3
    mixtral
    mixtral_swa
    olmoe
    phimoe
    granitemoe
    ernie4_5_moe
    ernie4_5
    hunyuan_v1_moe
    hy_v3
    llama4_text
    mimo_v2_flash
    mimo_v2
    mimo_v2_fp8
    bailing_moe
    bailing_moe_v2
    bailing_hybrid
    nemotron_h
    nemotron_h_latent
    step3p5
    llama
    mistral
    qwen3
    gemma3
    gemma4
    gemma4_text
}

/// The golden checkpoints of the folder `SLUICE_GOLDENS`, if it is set: other seeds, shapes and forms.
#[test]
fn goldens_of_a_folder() {
    let Ok(folder) = std::env::var("SLUICE_GOLDENS") else { return };
    let mut failed = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.to_str().unwrap().to_owned();
        if path.join("golden.json").exists() && std::panic::catch_unwind(|| check(&name)).is_err() {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

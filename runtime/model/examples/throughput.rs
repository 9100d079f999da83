//! Tokens per second of prompt and generation with all experts in memory, as JSON: one line per round.
//!
//! `cargo run --release -p sluice-model --example throughput -- FILE THREADS PROMPT_TOKENS DECODE_TOKENS ROUNDS
//! [absorbed|expanded] [BUDGET_GIB]`: the form of latent attention in which the prompt is read, and the memory, which also decides how many
//! tokens go through a layer together.
//! A first round, not printed, reads the experts. `tests/bench/llama_cpp.py` and `revisions.py` compare these figures.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use sluice_model::{Engine, EngineOptions, PromptAttention, Stats};

/// Meaningless token ids, the same in the program with which ours is compared.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
}

/// Where the time of one phase went, in seconds: attention, experts, head, the rest.
fn parts(before: &Stats, after: &Stats) -> String {
    format!(
        "[{:.5}, {:.5}, {:.5}, {:.5}]",
        after.attention_seconds - before.attention_seconds,
        after.expert_seconds - before.expert_seconds,
        after.head_seconds - before.head_seconds,
        after.other_seconds - before.other_seconds
    )
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, numbers @ ..] = args.as_slice() else { return Err("give a model file".into()) };
    let number = |i: usize, default| numbers.get(i).map_or(Ok(default), |n| n.parse::<usize>());
    let (threads, prefill, decode, rounds) = (number(0, 2)?, number(1, 128)?, number(2, 64)?, number(3, 3)?);
    let prompt_attention = match numbers.get(4).map(String::as_str) {
        None | Some("absorbed") => PromptAttention::Absorbed,
        Some("expanded") => PromptAttention::Expanded,
        Some(other) => return Err(format!("{other} is no form of attention: absorbed or expanded").into()),
    };
    let budget = numbers.get(5).map(|n| n.parse::<u64>()).transpose()?.map(|gib| gib << 30);
    let context = Some(prefill + decode + 1);
    let options =
        EngineOptions { threads: Some(threads), context, prompt_attention, budget, ..EngineOptions::default() };
    let mut engine = Engine::open(Path::new(file), &options)?;
    let vocab = engine.spec().vocab_size;
    let prompt = prompt(prefill, vocab);
    let mut logits = Vec::new();
    let mut sequence = engine.new_sequence();
    for round in 0..=rounds {
        sequence.clear();
        let (started, before) = (Instant::now(), engine.stats());
        engine.forward(&mut sequence, &prompt, &mut logits)?;
        let (prefilled, between) = (Instant::now(), engine.stats());
        for i in 0..decode {
            engine.decode(&mut sequence, ((i * 104_729 + 7) % vocab) as u32, &mut logits)?;
        }
        let (decoded, after) = (prefilled.elapsed().as_secs_f64(), engine.stats());
        if round > 0 {
            println!(
                "{{\"prefill\": {:.3}, \"decode\": {:.3}, \"prefill_parts\": {}, \"decode_parts\": {}}}",
                prefill as f64 / (prefilled - started).as_secs_f64(),
                decode as f64 / decoded,
                parts(&before, &between),
                parts(&between, &after)
            );
        }
    }
    Ok(())
}

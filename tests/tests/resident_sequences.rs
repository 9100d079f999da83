//! Many sequences stay within the budget: resident memory, in a process that does nothing else.
#![cfg(target_os = "linux")]

use sluice_format::WeightType;
use sluice_model::{Control, Engine, EngineOptions, Sequence, Span, Want};
use sluice_tests::Converted;

/// Memory that a run may take in addition to its budget.
const BESIDE: u64 = 96 << 20;
const SEQUENCES: usize = 64;
const CONTEXT: usize = 512;

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn step(engine: &mut Engine, sequences: &mut [Sequence], tokens: &[u32]) {
    let spans = sequences.iter_mut().map(|sequence| Span::prompt(sequence, tokens, Want::Last));
    engine.step(&mut spans.collect::<Vec<_>>(), &mut Control::default(), &mut |_, _, _| ()).unwrap();
}

#[test]
fn sixty_four_full_sequences_stay_within_the_budget() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let options =
        EngineOptions { sequences: Some(SEQUENCES), context: Some(CONTEXT), forget: true, ..EngineOptions::default() };
    let budget = model.least_budget_for(&options);
    let mut engine = model.open(&EngineOptions { budget: Some(budget), ..options });
    assert!(engine.memory().used() <= budget);
    let mut sequences: Vec<_> = (0..SEQUENCES).map(|_| engine.new_sequence()).collect();
    let tokens: Vec<u32> = (0..CONTEXT as u32).collect();
    for part in tokens.chunks(64) {
        step(&mut engine, &mut sequences, part);
        let now = resident();
        assert!(now <= budget + BESIDE, "{now} bytes with a budget of {budget}");
    }
    assert!(engine.pages().iter().all(|pages| pages.free == 0), "every planned page is in use");
    println!("{} MiB in memory with a budget of {} MiB", resident() >> 20, budget >> 20);
}

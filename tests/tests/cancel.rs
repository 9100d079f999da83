//! Cancelling a step: it ends soon, at any moment, and leaves everything as it was before the step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use sluice_model::ModelError;
use sluice_model::{Cancel, Control, Engine, EngineOptions, RuntimeError, Sequence, Span, Want};
use sluice_tests::{Converted, Golden};

/// One of each kind of attention.
const ATTENTIONS: [&str; 6] = ["deepseek_v3", "deepseek_v32", "gpt_oss", "mixtral_swa", "qwen3_next", "deepseek_v4"];

fn is_cancelled(outcome: &Result<(), RuntimeError>) -> bool {
    matches!(outcome, Err(RuntimeError::Model(ModelError::Cancelled)))
}

/// All logits of a prompt, computed with `control`.
fn logits(
    engine: &mut Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    control: &mut Control<'_>,
) -> Result<Vec<f32>, RuntimeError> {
    let mut all = Vec::new();
    let span = Span::prompt(sequence, prompt, Want::All);
    engine.step(&mut [span], control, &mut |_, _, row| all.extend_from_slice(row))?;
    Ok(all)
}

#[test]
fn a_step_that_is_cancelled_behind_any_layer_can_be_repeated() {
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        let ids = Golden::load(family).ids("input_ids");
        let options = EngineOptions { sequences: Some(2), forget: true, ..EngineOptions::default() };
        let mut engine = model.open(&EngineOptions { budget: Some(model.least_budget_for(&options)), ..options });
        let (layers, most) = (engine.spec().layers.len(), engine.memory().rows);
        let mut sequence = engine.new_sequence();
        let want = logits(&mut engine, &mut sequence, &ids, &mut Control::default()).unwrap();
        let vocab = want.len() / ids.len();
        for at in 1..=layers {
            let cancel = Cancel::new();
            let (mut sequence, switch) = (engine.new_sequence(), cancel.clone());
            let mut progress = |p: sluice_model::Progress| {
                if p.layers == at {
                    switch.cancel();
                }
            };
            let mut control = Control { cancel: Some(&cancel), progress: Some(&mut progress), ..Control::default() };
            let outcome = logits(&mut engine, &mut sequence, &ids, &mut control).map(drop);
            assert!(is_cancelled(&outcome), "{family}, layer {at}");
            assert_eq!(sequence.position(), 0, "{family}: of {most} rows at a time none were complete");
            let again = logits(&mut engine, &mut sequence, &ids, &mut Control::default()).unwrap();
            assert!(again == want, "{family}: other bits after a step that was cancelled behind layer {at}");
            assert_eq!(again.len(), ids.len() * vocab);
        }
    }
}

/// Cancels from another thread, whatever the step is doing: reading, multiplying, attending.
#[test]
fn a_step_can_be_cancelled_at_any_moment() {
    let model = Converted::new("demo-model", Some(sluice_format::WeightType::Q8));
    let prompt: Vec<u32> = (0..300).map(|i| (i * 7919 + 13) % 1536).collect();
    let options = EngineOptions { sequences: Some(2), forget: true, ..EngineOptions::default() };
    let mut engine = model.open(&EngineOptions { budget: Some(model.least_budget_for(&options)), ..options });
    let mut sequence = engine.new_sequence();
    let want = logits(&mut engine, &mut sequence, &prompt, &mut Control::default()).unwrap();
    let (mut cancelled, mut finished) = (0, 0);
    for delay in 0..60 {
        let (cancel, running) = (Cancel::new(), AtomicBool::new(false));
        let mut sequence = engine.new_sequence();
        let outcome = thread::scope(|scope| {
            scope.spawn(|| {
                while !running.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                thread::sleep(Duration::from_micros(300 * delay));
                cancel.cancel();
            });
            if delay == 0 {
                // At least one step is cancelled, however late threads run.
                cancel.cancel();
            }
            running.store(true, Ordering::Release);
            let mut control = Control { cancel: Some(&cancel), ..Control::default() };
            logits(&mut engine, &mut sequence, &prompt, &mut control)
        });
        match outcome {
            Ok(got) => {
                assert!(got == want);
                finished += 1;
                continue;
            }
            outcome => assert!(is_cancelled(&outcome.map(drop))),
        }
        cancelled += 1;
        // Complete passes stay; the rest of the prompt gives the usual logits.
        let done = sequence.position();
        let rest = logits(&mut engine, &mut sequence, &prompt[done..], &mut Control::default()).unwrap();
        let vocab = want.len() / prompt.len();
        assert!(rest == want[done * vocab..], "other bits after {done} tokens");
    }
    println!("{cancelled} cancelled, {finished} finished");
    assert!(cancelled > 0, "every step was over before it could be cancelled");
}

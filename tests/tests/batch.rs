//! Many sequences in one step: each gives the same bits as alone.

use proptest::prelude::*;
use sluice_model::{Control, Engine, EngineOptions, Phase, ReadEngineKind, Sequence, Span, Want};
use sluice_tests::{ATTENTIONS, Converted, Golden};

/// Tokens of a sequence.
const LENGTH: usize = 30;

/// The tokens of sequence `number`: a golden prompt, rotated so that sequences route differently.
fn tokens(family: &str, number: usize) -> Vec<u32> {
    let ids = Golden::load(family).ids("input_ids");
    ids.iter().chain(ids.iter().rev()).copied().cycle().skip(3 * number).take(LENGTH).collect()
}

/// Logits of every token of a single sequence, computed at once.
fn alone(engine: &mut Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
    let (mut sequence, mut rows) = (engine.new_sequence(), Vec::new());
    engine.forward_all(&mut sequence, tokens, &mut |_, row| rows.push(row.to_vec())).unwrap();
    rows
}

/// One case: the budget and other options of storage, and how many tokens each sequence takes in each step.
#[derive(Clone, Debug)]
struct Case {
    family: &'static str,
    sequences: usize,
    threads: usize,
    engine: ReadEngineKind,
    /// Position between the least budget and one that holds everything.
    budget: f64,
    /// Tokens per step and sequence; with 0, the sequence takes no part in the step.
    steps: Vec<Vec<usize>>,
}

fn any_case() -> impl Strategy<Value = Case> {
    let engine = prop_oneof![Just(ReadEngineKind::Auto), Just(ReadEngineKind::Pread)];
    let takes = prop_oneof![3 => Just(0usize), 4 => Just(1usize), 2 => 2usize..8, 1 => 8usize..LENGTH];
    (proptest::sample::select(ATTENTIONS.to_vec()), 1usize..=12, 1usize..=3, engine, 0.0f64..1.0).prop_flat_map(
        move |(family, sequences, threads, engine, budget)| {
            let step = proptest::collection::vec(takes.clone(), sequences);
            proptest::collection::vec(step, 1..12).prop_map(move |steps| Case {
                family,
                sequences,
                threads,
                engine,
                budget,
                steps,
            })
        },
    )
}

/// Runs a case and compares every row of logits with `reference`.
fn run(model: &Converted, case: &Case, reference: &[Vec<Vec<f32>>]) -> Result<(), TestCaseError> {
    let options = EngineOptions {
        threads: Some(case.threads),
        read_engine: Some(case.engine),
        context: Some(LENGTH),
        sequences: Some(case.sequences),
        forget: true,
        ..EngineOptions::default()
    };
    let (least, everything) = (model.least_budget_for(&options), 8 * model.least_budget_for(&options));
    let budget = Some(least + ((everything - least) as f64 * case.budget) as u64);
    let mut engine = model.open(&EngineOptions { budget, ..options });
    let tokens: Vec<Vec<u32>> = (0..case.sequences).map(|number| tokens(case.family, number)).collect();
    let mut sequences: Vec<Sequence> = (0..case.sequences).map(|_| engine.new_sequence()).collect();
    for step in &case.steps {
        let (mut spans, mut numbers, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (sequence, &take)) in sequences.iter_mut().zip(step).enumerate() {
            let start = sequence.position();
            let take = take.min(LENGTH - start);
            if take > 0 {
                let phase = if take == 1 { Phase::Decode } else { Phase::Prompt };
                let logits = if number % 2 == 0 { Want::All } else { Want::Last };
                numbers.push(number);
                starts.push(start);
                spans.push(Span { sequence, tokens: &tokens[number][start..start + take], phase, logits });
            }
        }
        if spans.is_empty() {
            continue;
        }
        let mut seen = Vec::new();
        engine
            .step(&mut spans, &mut Control::default(), &mut |span, token, row| seen.push((span, token, row.to_vec())))
            .unwrap();
        let wanted = spans.iter().enumerate().flat_map(|(i, span)| {
            let count = span.tokens.len();
            let logits = span.logits;
            (0..count).filter(move |&token| logits.includes(token, count)).map(move |token| (i, token))
        });
        prop_assert_eq!(seen.iter().map(|s| (s.0, s.1)).collect::<Vec<_>>(), wanted.collect::<Vec<_>>());
        for (span, token, row) in seen {
            let (number, position) = (numbers[span], starts[span] + token);
            prop_assert!(row == reference[number][position], "sequence {number} at {position} has other bits");
        }
    }
    Ok(())
}

#[test]
fn a_sequence_has_the_same_bits_whatever_else_is_in_the_step() {
    let cases = std::env::var("SLUICE_BATCH_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let models = ATTENTIONS.map(|family| {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&EngineOptions { context: Some(LENGTH), ..EngineOptions::default() });
        let reference: Vec<_> = (0..12).map(|number| alone(&mut engine, &tokens(family, number))).collect();
        (family, model, reference)
    });
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = proptest::test_runner::TestRunner::new(config).run(&any_case(), |case| {
        let (_, model, reference) = models.iter().find(|m| m.0 == case.family).expect("one of them");
        run(model, &case, reference)
    });
    outcome.unwrap();
}
